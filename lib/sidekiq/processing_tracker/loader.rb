# frozen_string_literal: true

# A precompiled gem and a checkout have one library per minor version of Ruby; a gem that was compiled when it was
# installed has one, which RubyGems keeps in a place of its own. Only a missing file leads to the next: one that is there and
# cannot be loaded says why.
minor = RUBY_VERSION[/\d+\.\d+/]
libraries = ["sidekiq/processing_tracker/#{minor}/native", "sidekiq/processing_tracker/native"]

begin
  require libraries.first
rescue LoadError => error
  raise unless error.path == libraries.first

  begin
    require libraries.last
  rescue LoadError => error
    raise unless error.path == libraries.last

    others = Dir["#{__dir__}/*.*/native.*"].map { |file| File.basename(File.dirname(file)) }.uniq.sort
    raise LoadError, <<~TEXT, cause: nil
      sidekiq-processing-tracker has no native library for Ruby #{minor} here#{", but for #{others.join(" and ")}" if others.any?}.
      Install the gem that is compiled on this machine (that takes cargo and a minute or two):
        gem install sidekiq-processing-tracker --platform ruby
      or, with Bundler, in the Gemfile:
        gem "sidekiq-processing-tracker", force_ruby_platform: true
      In a checkout: bundle exec rake compile
    TEXT
  end
end
