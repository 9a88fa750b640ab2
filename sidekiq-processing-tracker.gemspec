# frozen_string_literal: true

require_relative "lib/sidekiq/processing_tracker/version"

Gem::Specification.new do |spec|
  spec.name = "sidekiq-processing-tracker"
  spec.version = Sidekiq::ProcessingTracker::VERSION
  spec.authors = ["The sidekiq-processing-tracker authors"]
  spec.summary = "Brings Sidekiq jobs back that were running when their process was killed"
  spec.description = <<~TEXT
    Keeps a record in Redis of every marked job while it runs. When the process that runs it is killed
    (kill -9, out of memory, a lost machine), another process puts the job back into its queue.
    The protocol is written in Rust; it needs cargo at installation.
  TEXT
  spec.license = "MIT"
  spec.required_ruby_version = ">= 3.1"
  spec.metadata["rubygems_mfa_required"] = "true"

  # The crates' own tests, and what cargo and make leave behind, stay out of the gem.
  spec.files = Dir.chdir(__dir__) do
    Dir[
      "Cargo.{toml,lock}",
      "ext/sidekiq_processing_tracker/extconf.rb",
      "ext/sidekiq_processing_tracker/{core,ffi}/{Cargo.toml,build.rs,README.md}",
      "ext/sidekiq_processing_tracker/{core,ffi}/src/**/*.{rs,lua}",
      "lib/**/*.rb",
      "sig/**/*.rbs",
      "docs/**/*.md",
      "README.md",
      "CHANGELOG.md",
      "LICENSE.txt"
    ]
  end
  spec.require_paths = ["lib"]
  spec.extensions = ["ext/sidekiq_processing_tracker/extconf.rb"]

  spec.add_dependency "rb_sys", "~> 0.9", ">= 0.9.87"
  spec.add_dependency "sidekiq", ">= 6.5", "< 9"
end
