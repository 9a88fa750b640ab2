# frozen_string_literal: true

require "fileutils"
require "open3"

# The gem as its users get it: compiled at installation, or compiled before. Each in a home of its own that has nothing but
# what it depends on, and shows that it works by the demo.
RSpec.describe "the packaged gem" do
  let(:root) { File.expand_path("..", __dir__) }
  let(:home) { Scratch.folder }
  let(:minor) { RUBY_VERSION[/\d+\.\d+/] }

  # What a process sees: nothing of this one's bundle, and cargo only where it may be needed.
  def environment(cargo:)
    paths = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", File.dirname(Gem.ruby)]
    paths << File.dirname(which("cargo")) if cargo
    ENV.keys.grep(/\A(BUNDLE|BUNDLER|RUBY|GEM|CARGO|RB_SYS)/).to_h { |name| [name, nil] }
      .merge("HOME" => home, "GEM_HOME" => File.join(home, "gems"), "GEM_PATH" => File.join(home, "gems"),
        "PATH" => paths.join(":"), "RUSTUP_HOME" => ENV.fetch("RUSTUP_HOME", File.expand_path("~/.rustup")),
        "CARGO_HOME" => ENV.fetch("CARGO_HOME", File.expand_path("~/.cargo")))
  end

  def which(command)
    ENV.fetch("PATH").split(":").map { |folder| File.join(folder, command) }.find { |file| File.executable?(file) } ||
      skip("#{command} is not on the PATH")
  end

  # @return [String] the output
  def run(env, *command, chdir: home)
    output, status = Open3.capture2e(env, *Scratch.bound(*command), chdir: chdir)
    expect(status).to be_success, "#{command.join(" ")}:\n#{output}"
    output
  end

  # The gem files of what the gem depends on, as Bundler has left them in its cache.
  def dependencies(*names)
    specs = names.flat_map { |name| closure(Gem.loaded_specs[name] || Gem::Specification.find_by_name(name)) }.uniq
    files = specs.reject(&:default_gem?).map(&:cache_file)
    missing = files.reject { |file| File.exist?(file) }
    skip "there are no gem files of the bundle: #{missing.first}" if missing.any?
    files
  end

  def closure(spec, seen = {})
    return seen.values if seen.key?(spec.name)

    seen[spec.name] = spec
    spec.runtime_dependencies.each { |dependency| closure(dependency.to_spec, seen) }
    seen.values
  end

  # @param gems [Array<String>] files
  def install(env, *gems)
    run(env, Gem.ruby, "-S", "gem", "install", "--local", "--ignore-dependencies", "--no-document", "--quiet", *gems)
  end

  # Runs a command of the checkout's, with the checkout's bundle.
  def build(*command, **env)
    run(env.transform_keys(&:to_s), *command, chdir: root)
    Dir[File.join(home, "*.gem")].first
  end

  def demo(env)
    take_demo(home)
    run(env, Gem.ruby, "demo/run.rb")
  end

  def take_demo(place)
    %w[demo spec/support].each do |folder|
      FileUtils.mkdir_p(File.join(place, File.dirname(folder)))
      FileUtils.cp_r(File.join(root, folder), File.join(place, folder))
    end
  end

  # Other Rubies that this machine has, or can make. They take a minute to make, so in a run of the matrix only.
  def others
    return [] unless ENV.key?("MATRIX_RUN")

    (%w[3.1 3.3] - [minor]).select { |other| Open3.capture2e("matrix/ruby", other, "true", chdir: root).last.success? }
  end

  # Installs gems for another Ruby, in a folder which that can see too, and runs the demo with them.
  #
  # @return [String] where the native library was loaded from
  def loaded_by(other, gems)
    place = File.join(root, "tmp", "packaging-#{Process.pid}")
    Scratch.undo { FileUtils.rm_rf(place) }
    take_demo(place)
    FileUtils.cp(gems, place)
    # Its Bundler is none of ours, and neither is its HOME: the machine's own finds its Rubies.
    env = environment(cargo: false).merge("HOME" => ENV.fetch("HOME"), "PATH" => ENV.fetch("PATH"))
    names = %w[GEM_HOME GEM_PATH].map { |name| "#{name}=#{place}/gems" }
    foreign = ->(*command) { run(env, "matrix/ruby", other, "env", *names, *command, chdir: root) }
    foreign.call("gem", "install", "--local", "--ignore-dependencies", "--no-document", "--quiet", *gems.map { |gem| File.join(place, File.basename(gem)) })
    foreign.call("ruby", "#{place}/demo/run.rb")
    foreign.call("ruby", "-e", 'require "sidekiq-processing-tracker"; puts $LOADED_FEATURES.grep(/native\.[a-z]+\z/)').chomp
  end

  # @return [String] where the native library was loaded from
  def loaded_from(env)
    script = 'require "sidekiq-processing-tracker"; puts $LOADED_FEATURES.grep(/native\.[a-z]+\z/)'
    File.realpath(run(env, Gem.ruby, "-e", script).chomp)
  end

  def installed = File.join(File.realpath(home), "gems", "gems")

  it "is compiled at its installation, and works" do
    env = environment(cargo: true)
    gem = build(Gem.ruby, "-S", "gem", "build", "--silent", "--output", File.join(home, "source.gem"), "sidekiq-processing-tracker.gemspec")
    install(env, *dependencies("sidekiq", "rb_sys"), gem)
    expect(loaded_from(env))
      .to match(%r{\A#{installed}/sidekiq-processing-tracker-\d[^/]*/lib/sidekiq/processing_tracker/native\.#{RbConfig::CONFIG["DLEXT"]}\z})
    expect(Dir[File.join(installed, "sidekiq-processing-tracker-*", "**", "target")]).to be_empty
    demo(env)
  end

  it "was compiled before, for some Rubies, and works on them without cargo" do |example|
    env = environment(cargo: false)
    foreign = others
    example.reporter.message("  a gem for #{[minor, *foreign].join(", ")}")
    gem = build("bundle", "exec", "rake", "native", NATIVE_RUBIES: [minor, *foreign].join(" "), PKG: home)
    install(env, *dependencies("sidekiq"), gem)
    expect(loaded_from(env)).to match(%r{\A#{installed}/sidekiq-processing-tracker-\d[^/]*/lib/sidekiq/processing_tracker/#{minor}/native\.})
    expect(Dir[File.join(installed, "sidekiq-processing-tracker-*", "ext")]).to be_empty
    demo(env)
    foreign.each { |other| expect(loaded_by(other, [*dependencies("sidekiq"), gem])).to end_with("/sidekiq/processing_tracker/#{other}/native.so") }

    libraries = Dir[File.join(installed, "sidekiq-processing-tracker-*", "lib", "sidekiq", "processing_tracker")].first
    foreign.each { |other| FileUtils.rm_r(File.join(libraries, other)) }
    File.rename(File.join(libraries, minor), File.join(libraries, "2.7"))
    message = run(env, Gem.ruby, "-e", <<~RUBY)
      begin
        require "sidekiq-processing-tracker"
      rescue LoadError => error
        puts error.message
      end
    RUBY
    expect(message).to include("no native library for Ruby #{minor} here, but for 2.7", "--platform ruby")
  end
end
