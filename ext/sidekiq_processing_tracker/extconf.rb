# frozen_string_literal: true

require "mkmf"
require "rb_sys/mkmf"

create_rust_makefile("sidekiq/processing_tracker/native") do |config|
  config.ext_dir = "ffi"

  # An installed gem is built from the versions it was released with, and keeps nothing of the build.
  if config.rubygems_invoked?
    config.extra_cargo_args << "--locked"
    # Make expands these: the copy of the library (it is installed by then), and the mark that its folder exists.
    config.rubygems_clean_dirs.push("target", "$(DLLIB)", "$(TIMESTAMP_DIR)/.*.time")
  end
end
