# frozen_string_literal: true

# A precompiled gem and a checkout have one library per minor version of Ruby; a gem that was compiled when it was
# installed has one, which RubyGems keeps in a place of its own. Only a missing file leads to the next: one that is there and
# cannot be loaded says why. That is often another C library: RubyGems takes a gem for Linux on musl too, and on an old glibc.
minor = RUBY_VERSION[/\d+\.\d+/]
libraries = ["sidekiq/processing_tracker/#{minor}/native", "sidekiq/processing_tracker/native"]

begin
  begin
    require libraries.first
  rescue LoadError => error
    raise unless error.path == libraries.first

    require libraries.last
  end
rescue LoadError => error
  missing = libraries.any? { |library| library == error.path }
  others = Dir["#{__dir__}/*.*/native.*"].map { |file| File.basename(File.dirname(file)) }.uniq.sort - [minor]
  trouble = missing ? "has no native library for Ruby #{minor} here#{", but for #{others.join(" and ")}" if others.any?}." : <<~TEXT.chomp
    has a native library that cannot be loaded here:
      #{error.message}
    It may have been compiled for another Ruby, or for another or newer C library (glibc, musl) than this machine's.
  TEXT
  raise LoadError, <<~TEXT, cause: (error unless missing)
    sidekiq-processing-tracker #{trouble}
    Install the gem that is compiled on this machine, in its place (that takes cargo and a minute or two):
      gem uninstall sidekiq-processing-tracker
      gem install sidekiq-processing-tracker --platform ruby
    or, with Bundler, in the Gemfile:
      gem "sidekiq-processing-tracker", force_ruby_platform: true
    In a checkout: bundle exec rake compile
  TEXT
end
