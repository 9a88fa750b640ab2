# frozen_string_literal: true

require "fileutils"
require "open3"

# Another set of gems than that of the specs, for processes that need another Sidekiq or gems beside it: a file in
# gemfiles/. This gem itself is not in it: processes find it by its folder, built for the Ruby that runs the specs.
#
# An example group that needs one says so, `bundle: :unique_jobs_8`, or `bundle_beside:` where its Sidekiq is that of the specs
# and it belongs in every cell of the matrix. It is skipped, with the reason, where the gems cannot be had; else they are
# installed before its first example.
class Bundle
  ROOT = File.expand_path("../..", __dir__)
  # Where the gems of all sets are installed, apart from those of the specs.
  GEMS = File.join(ROOT, "tmp", "bundles")

  # What Bundler says where gems cannot be had (matrix/cell knows the same words).
  MISSING = /Could not find gem|could not be found in|Could not (reach|fetch)|Network error/

  @known = {}

  # @param name [Symbol, nil] of a file in gemfiles/, without its ending; nil: the gems of the specs
  # @return [Bundle]
  def self.[](name)
    @known[name] ||= new(name)
  end

  # @param name [Symbol, nil]
  def initialize(name)
    @name = name
    @ready = name.nil? || nil
  end

  # @return [Hash{String => String, nil}] of a process that is to use these gems
  def environment
    return {} unless @name

    {"BUNDLE_GEMFILE" => copy, "BUNDLE_PATH" => GEMS}
  end

  # @param gem [String]
  # @param executable [String]
  # @return [Array<String>] the beginning of a command that runs Ruby, and in it an executable of one of these gems
  def ruby_with(gem, executable)
    [*ruby, "-e", "load Gem.bin_path(#{gem.inspect}, #{executable.inspect})", "--"]
  end

  # @return [Array<String>] the beginning of a command that runs a Ruby script
  def ruby = [Gem.ruby, *("-rbundler/setup" if @name), "-I", AppProcess::LIB]

  # Installs what is missing, once. Cells of the matrix do that one after the other.
  #
  # @return [Boolean] whether all is there
  # @raise [RuntimeError] the gems are there and cannot be installed
  def ready?
    return @ready unless @ready.nil?

    FileUtils.mkdir_p(File.dirname(copy))
    File.open(File.join(GEMS, "lock"), File::CREAT | File::RDWR) do |lock|
      lock.flock(File::LOCK_EX)
      original = File.join(ROOT, gemfile)
      FileUtils.cp(original, copy) unless File.exist?(copy) && FileUtils.identical?(original, copy)
      @ready = run("check") || run("install")
    end
    raise "bundle install of #{gemfile}: #{@output}" unless @ready || @output.match?(MISSING)

    @ready
  end

  # @return [String] why it is not ready
  def reason
    "the gems of #{gemfile} cannot be had: #{@output.to_s.lines(chomp: true).reject(&:empty?).last}"
  end

  private

  def gemfile = File.join("gemfiles", "#{@name}.gemfile")

  # Bundler writes down beside it which versions it has chosen, which another Ruby may not be able to use.
  def copy = File.join(GEMS, RUBY_VERSION[/\d+\.\d+/], "#{@name}.gemfile")

  # Without what `bundle exec` has set for the process of the specs. One try: a place that does not answer is none.
  def run(command)
    env = environment.merge("RUBYOPT" => nil, "RUBYLIB" => nil, "BUNDLER_SETUP" => nil, "BUNDLE_RETRY" => "0", "BUNDLE_TIMEOUT" => "5")
    @output, status = Open3.capture2e(env, "bundle", command)
    status.success?
  end
end

RSpec.configure do |config|
  config.before do |example|
    bundle = Bundle[example.metadata[:bundle] || example.metadata[:bundle_beside]]
    skip(bundle.reason) unless bundle.ready?
  end
end
