# frozen_string_literal: true

require "fileutils"
require "open3"

# What people are told whose machine the native library was not compiled for.
RSpec.describe "loading the native library" do
  let(:folder) { Scratch.folder }
  let(:minor) { RUBY_VERSION[/\d+\.\d+/] }
  let(:extension) { RbConfig::CONFIG["DLEXT"] }
  let(:hints) do
    ["gem uninstall sidekiq-processing-tracker\n", "gem install sidekiq-processing-tracker --platform ruby\n", "force_ruby_platform: true\n", "bundle exec rake compile\n"]
  end

  # @return [String] the message, of the loader alone: Sidekiq has no part in it
  def load_error(minors)
    FileUtils.cp(File.expand_path("../lib/sidekiq/processing_tracker/loader.rb", __dir__), folder)
    place = File.join(folder, "sidekiq", "processing_tracker")
    FileUtils.mkdir_p(place)
    FileUtils.mv(File.join(folder, "loader.rb"), place)
    minors.each do |minor, library|
      FileUtils.mkdir_p(File.join(place, minor))
      FileUtils.cp(library, File.join(place, minor, "native.#{extension}"))
    end
    code = 'begin; require "sidekiq/processing_tracker/loader"; rescue LoadError => error; puts error.message; end'
    output, = Open3.capture2e({"RUBYOPT" => nil, "RUBYLIB" => nil}, Gem.ruby, "--disable-gems", "-I", folder, "-e", code)
    output
  end

  # A library that needs another one which is not there, as one that was compiled for glibc does on musl.
  def stranger
    gone = File.join(folder, "libgone.so")
    compile(gone, "int gone(void) { return 1; }", "-Wl,-soname,libc.gone.so.1")
    File.join(folder, "stranger.so").tap do |file|
      compile(file, "int gone(void); void Init_native(void) { gone(); }", gone)
    end
  end

  def compile(file, code, *more)
    output, status = Open3.capture2e("cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", file, *more, stdin_data: code)
    expect(status).to be_success, output
  end

  it "says why it cannot be loaded, and how to get one that can", if: RbConfig::CONFIG["host_os"].include?("linux") do
    expect(load_error({minor => stranger})).to include("has a native library that cannot be loaded here:\n  libc.gone.so.1: cannot open", *hints)
  end

  it "says the same of what is no library" do
    file = File.join(folder, "garbage").tap { |name| File.write(name, "garbage") }
    expect(load_error({minor => file, "2.6" => file})).to include("has a native library that cannot be loaded here:\n", *hints)
  end

  it "says for which other Rubies there is one" do
    expect(load_error({"2.6" => __FILE__, "2.7" => __FILE__})).to include("has no native library for Ruby #{minor} here, but for 2.6 and 2.7.\n", *hints)
    expect(load_error({})).to include("here, but for 2.6 and 2.7.\n")
  end

  it "says so where there is none at all" do
    expect(load_error({})).to include("has no native library for Ruby #{minor} here.\n", *hints)
  end
end
