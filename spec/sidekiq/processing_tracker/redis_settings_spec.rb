# frozen_string_literal: true

RSpec.describe Sidekiq::ProcessingTracker::RedisSettings do
  around do |example|
    with_environment("REDIS_URL" => nil, "REDIS_PROVIDER" => nil) { example.run }
  end

  def native(options)
    described_class.from_options(options).to_native
  end

  def refuse(pattern)
    raise_error(Sidekiq::ProcessingTracker::ConfigurationError) { |error|
      expect(error.message).to match(pattern)
      # What led to an error is shown with it.
      expect([error, error.cause].compact.map(&:message).join).not_to include("secret")
    }
  end

  describe ".from_options" do
    {
      "redis://host" => {host: "host", port: 6379, path: nil, db: 0, username: nil, password: nil},
      "redis://host:7000/3" => {host: "host", port: 7000, db: 3},
      "redis://host?db=4" => {host: "host", db: 4},
      "redis://[::1]:7000/1" => {host: "::1", port: 7000, db: 1},
      "redis://my_redis:6379" => {host: "my_redis"},
      "redis:///2" => {host: "localhost", db: 2},
      "redis://:p%40ss@host" => {username: nil, password: "p@ss"},
      "redis://us%40er:p%3Ass@host" => {username: "us@er", password: "p:ss"},
      "redis://only@host" => {username: nil, password: "only"},
      "redis://default:pw@host" => {username: nil, password: "pw"},
      "unix:///run/redis.sock" => {host: nil, port: nil, path: "/run/redis.sock", db: 0},
      "unix:///run/redis.sock?db=5" => {path: "/run/redis.sock", db: 5},
      "unix:///run/redis@1.sock" => {path: "/run/redis@1.sock"},
      "/run/redis.sock" => {path: "/run/redis.sock", db: 0},
      {url: "redis://host/1", db: 7} => {host: "host", db: 7},
      {"url" => "redis://host/1", "port" => "7001"} => {host: "host", port: 7001, db: 1},
      {url: "redis://:one@host", password: "two"} => {password: "two"},
      {host: "host", port: 7000, db: "2"} => {host: "host", port: 7000, db: 2},
      {path: "/run/redis.sock", db: 2} => {path: "/run/redis.sock", host: nil, db: 2},
      {host: "host", username: "me", password: "pw"} => {username: "me", password: "pw"},
      {host: "host", username: "me"} => {username: nil, password: nil},
      {host: "host", password: -> { "made" }} => {password: "made"},
      {host: "host", username: "me", password: ->(user) { "for #{user}" }} => {password: "for me"},
      {host: "host", timeout: 2} => {connect_timeout_ms: 2000, read_timeout_ms: 2000},
      {host: "host", network_timeout: 2, read_timeout: 0.5} => {connect_timeout_ms: 2000, read_timeout_ms: 500},
      {host: "host"} => {connect_timeout_ms: 3000, read_timeout_ms: 3000},
      "rediss://host" => {host: "host", port: 6379, tls: {ca_file: nil, ca_path: nil, cert: nil, key: nil, verify: "full"}},
      {url: "rediss://host", ssl: false} => {tls: nil},
      {host: "host", ssl: true, ssl_params: {"ca_file" => "/ca", :verify_mode => 0}} =>
        {tls: {ca_file: "/ca", ca_path: nil, cert: nil, key: nil, verify: "none"}},
      {url: "rediss://host", ssl_params: {verify_hostname: false, min_version: :TLS1_2, cert: "/c", key: Pathname("/k")}} =>
        {tls: {ca_file: nil, ca_path: nil, cert: "/c", key: "/k", verify: "chain"}},
      {url: "redis://:pw@main/2", sentinels: ["redis://one:1", {"host" => "two"}], sentinel_password: "spw", role: :master} => {
        host: nil, port: nil, db: 2, password: "pw", master: "main", sentinels: [
          {host: "one", port: 1, username: nil, password: "spw", tls: nil},
          {host: "two", port: 26_379, username: nil, password: "spw", tls: nil}
        ]
      },
      {sentinels: [{host: "one", username: "su", password: -> { "made" }}], master_name: "main", ssl: true} => {
        master: "main", tls: {ca_file: nil, ca_path: nil, cert: nil, key: nil, verify: "full"}, sentinels: [
          {host: "one", port: 26_379, username: "su", password: "made", tls: {ca_file: nil, ca_path: nil, cert: nil, key: nil, verify: "full"}}
        ]
      },
      {host: "host", ssl: false, driver: :ruby, size: 3, pool_timeout: 1, id: "x"} => {host: "host"}
    }.each do |options, expected|
      it "reads #{options.inspect}" do
        expect(native(options)).to include(expected)
      end
    end

    it "names the server by the environment where the options do not" do
      with_environment("REDIS_URL" => "redis://env:7000/3") do
        expect(native({password: "pw"})).to include(host: "env", port: 7000, db: 3, password: "pw")
        expect(native({host: "host"})).to include(host: "host", port: 6379, db: 0)
      end
      with_environment("REDIS_PROVIDER" => "MY_REDIS", "MY_REDIS" => "redis://mine") do
        expect(native({db: 1})).to include(host: "mine", db: 1)
      end
    end

    {
      "http://secret@host" => /url has the scheme "http": allowed are redis:\/\/, rediss:\/\/ and unix:\/\//,
      "host:6379" => /url has the scheme "host"/,
      "redis://:sec ret@host" => /url cannot be read \(not shown\)/,
      "redis://:secret@ho st" => /url cannot be read/,
      "redis://host:port" => /url cannot be read/,
      "redis://se/cret@host:6379/0" => /url cannot be read \(not shown\)/,
      "redis://:123/secret@host/0" => /url cannot be read/,
      "redis://:123?secret@host/0" => /url cannot be read/,
      "redis://:123#secret@host/0" => /url cannot be read/,
      "redis:secret@host" => /url cannot be read/,
      "unix://sec/secret@/run/redis.sock" => /url cannot be read/,
      {host: "redis://:secret@h"} => /host is \(not shown\): allowed is a name or an address, without \/ and @; a URL belongs into url/,
      {host: URI("redis://:secret@h")} => /host is \(not shown\)/,
      {path: "redis://:secret@h"} => /path is \(not shown\)/,
      {host: "host", port: "secret@h"} => /port is \(not shown\): allowed is a number/,
      {host: "host", db: "secret@h:6379/0"} => /db is \(not shown\): allowed is a number/,
      {host: "host", timeout: "redis://:secret@h"} => /timeout is \(not shown\)/,
      {sentinels: [{host: "redis://:secret@s"}], name: "main"} => /sentinels: host is \(not shown\)/,
      {sentinels: [{host: "s"}], name: "redis://:secret@main"} => /the name of the master is \(not shown\)/,
      "redis://host:99999" => /port is 99999: allowed is a number from 1 to 65535/,
      "redis://host/abc" => /db is "abc": allowed is a number, 0 or more/,
      {url: 5} => /url is a Integer: allowed is a String/,
      {host: "host", ssl: true, ssl_params: "none"} => /\Aredis_options: ssl_params: a String: allowed is a Hash/,
      {url: "rediss://host", ssl_params: {ciphers: "x", ca_file: "y"}} => /ssl_params: ciphers: the native library knows ca_file, .* only/,
      {url: "rediss://host", ssl_params: {cert_store: Object.new}} => /ssl_params: cert_store: .*Set redis_options/,
      {url: "rediss://host", ssl_params: {cert: "x"}} => /ssl_params: cert without key/,
      {url: "rediss://host", ssl_params: {key: "x"}} => /ssl_params: key without cert/,
      {url: "rediss://host", ssl_params: {ca_file: 5}} => /ssl_params: ca_file is a Integer: allowed is a path/,
      {url: "rediss://host", ssl_params: {verify_mode: :none}} => /ssl_params: verify_mode/,
      {url: "rediss://host", ssl_params: {min_version: :TLS1_3}} => /ssl_params: min_version/,
      {sentinels: []} => /sentinels is a Array: allowed is a list/,
      {sentinels: [{host: "s"}]} => /sentinels need a name/,
      {sentinels: [5], name: "main"} => /sentinels has a Integer/,
      {sentinels: [{host: "s", passwort: "secret"}], name: "main"} => /sentinels: unknown passwort/,
      {sentinels: [{host: "s", port: 0}], name: "main"} => /port is 0/,
      {sentinels: [{host: ""}], name: "main"} => /sentinels: host is ""/,
      {sentinels: [{host: "s"}], name: "main", role: :replica} => /role is replica: a replica takes no writes/,
      {nodes: ["redis://host"]} => /nodes: Redis Cluster is not supported/,
      {host: "host", namespace: "x"} => /unknown namespace: allowed are url, host/,
      {host: "host", passwd: "secret", foo: 1} => /unknown passwd, foo: allowed are/,
      {host: ""} => /host is "": allowed is a String/,
      {host: 5} => /host is 5/,
      {path: :sock} => /path is :sock/,
      {host: "host", port: 0} => /port is 0/,
      {host: "host", port: "six"} => /port is "six"/,
      {host: "host", port: 1.5} => /port is 1.5/,
      {host: "host", db: -1} => /db is -1/,
      {host: "host", db: "1.5"} => /db is "1.5"/,
      {host: "host", username: 5, password: "secret"} => /username is a Integer/,
      {host: "host", password: ["secret"]} => /password is a Array \(not shown\)/,
      {host: "host", timeout: 0} => /timeout is 0: allowed is a number of seconds above 0/,
      {host: "host", connect_timeout: "1"} => /connect_timeout is "1"/,
      {host: "host", read_timeout: -1} => /read_timeout is -1/
    }.each do |options, pattern|
      it "refuses #{options.inspect}" do
        expect { native(options) }.to refuse(pattern)
      end
    end

    it "refuses a password Proc that gives no String" do
      expect { native({host: "host", password: -> { [:secret] }}) }.to refuse(/password is a Proc that gave a Array/)
    end
  end

  describe "#inspect" do
    it "shows the server and no password" do
      settings = described_class.from_options("redis://user:secret@host:7000/1")
      expect(settings.inspect).to eq("#<Sidekiq::ProcessingTracker::RedisSettings redis://host:7000/1 with password>")
      expect(settings.to_s).to eq(settings.inspect)
    end

    it "shows no option before they are read" do
      options = Sidekiq::ProcessingTracker::RedisOptions.new({url: "redis://user:secret@host", password: "secret"})
      expect([options.inspect, options.to_s]).to all(eq("#<Sidekiq::ProcessingTracker::RedisOptions>"))
    end
  end

  # In a process of its own each, since Sidekiq's settings are for good. None of these connects to anything: spec/redis does.
  describe ".from_sidekiq" do
    let(:redis_rb) { Sidekiq::VERSION < "7" }

    def from_sidekiq(configuration, env: {})
      setting = "Sidekiq.configure_client { |config| config.redis = #{configuration} }" if configuration
      # The quiet logger, since Sidekiq logs the options of each pool.
      code = <<~RUBY
        require "json"
        require "openssl"
        Sidekiq.logger.level = Logger::FATAL
        #{setting}
        begin
          puts JSON.generate(Sidekiq::ProcessingTracker::RedisSettings.from_sidekiq.to_native)
        rescue Sidekiq::ProcessingTracker::Error => error
          puts JSON.generate([error.class, [error, error.cause].compact.map(&:message).join(" ")])
        end
      RUBY
      output, = RubyProcess.run_ruby(code, env: {"REDIS_URL" => nil, "REDIS_PROVIDER" => nil}.merge(env))
      result = JSON.parse(output.lines.last)
      result.is_a?(Hash) ? result.transform_keys(&:to_sym) : result
    end

    it "reads hosts, ports, databases, sockets, passwords and timeouts" do
      {
        '{url: "redis://host:7000/3"}' => {host: "host", port: 7000, db: 3, path: nil, username: nil, password: nil},
        '{url: "redis://:p%40ss@host"}' => {username: nil, password: "p@ss"},
        '{url: "redis://host", username: "me", password: "pw"}' => {username: "me", password: "pw"},
        '{path: "/run/redis.sock", db: 2}' => {path: "/run/redis.sock", host: nil, port: nil, db: 2},
        '{host: "host", port: 7000, db: 3}' => {host: "host", port: 7000, db: 3, path: nil},
        '{url: "redis://host", connect_timeout: 2, read_timeout: 4}' => {connect_timeout_ms: 2000, read_timeout_ms: 4000},
        '{url: "redis://host", timeout: 2.5}' => {connect_timeout_ms: 2500, read_timeout_ms: 2500},
        '{url: "redis://[::1]:7000"}' => {host: "::1", port: 7000}
      }.each do |configuration, expected|
        expect(from_sidekiq(configuration)).to include(expected), configuration
      end
    end

    it "follows REDIS_URL and REDIS_PROVIDER" do
      expect(from_sidekiq(nil, env: {"REDIS_URL" => "redis://env/1"})).to include(host: "env", db: 1)
      expect(from_sidekiq(nil, env: {"REDIS_PROVIDER" => "MINE", "MINE" => "redis://mine"})).to include(host: "mine")
    end

    it "reads TLS and Sentinels" do
      expect(from_sidekiq('{url: "rediss://host", ssl_params: {ca_file: "/ca", verify_mode: OpenSSL::SSL::VERIFY_NONE}}'))
        .to include(host: "host", tls: {"ca_file" => "/ca", "ca_path" => nil, "cert" => nil, "key" => nil, "verify" => "none"})
      # redis-rb has the password with each sentinel.
      nodes = redis_rb ? '[{host: "one", port: 1, password: "spw"}, {host: "two", password: "spw"}]' : '[{host: "one", port: 1}, {host: "two"}], sentinel_password: "spw"'
      # Of Sidekiq 7.0 to 7.2 the url is nothing to a client that asks Sentinels.
      place = Sidekiq::VERSION.match?(/\A7\.[0-2]\./) ? 'password: "pw", db: 3' : 'url: "redis://:pw@main/3"'
      sentinels = %({#{place}, name: "main", sentinels: #{nodes}})
      read = from_sidekiq(sentinels)
      expect(read).to include(master: "main", db: 3, password: "pw", host: nil)
      expect(read[:sentinels].map { |sentinel| sentinel.slice("host", "port", "password") }).to match(
        [{"host" => "one", "port" => 1, "password" => "spw"}, {"host" => "two", "port" => Integer, "password" => "spw"}]
      )
    end

    it "passes certificates and keys of OpenSSL on" do
      code = <<~RUBY
        (key = OpenSSL::PKey::EC.generate("prime256v1")) && {url: "rediss://host", ssl_params: {key: key, cert: OpenSSL::X509::Certificate.new.tap { |cert|
          cert.public_key = key
          cert.sign(key, "SHA256")
        }}}
      RUBY
      expect(from_sidekiq(code)[:tls]).to include("cert" => /BEGIN CERTIFICATE/, "key" => /BEGIN PRIVATE KEY/)
    end

    # Sidekiq 6.5 reads these itself, with redis-rb.
    it "does not pass on what a client says of a URL that it cannot read", if: Sidekiq::VERSION.to_i >= 7 do
      ["redis://:123/secret@host/0", "redis://:secret@ho st"].each do |url|
        refused = from_sidekiq("{url: #{url.inspect}}")
        expect(refused).to match(["Sidekiq::ProcessingTracker::ConfigurationError", /\ASidekiq's Redis settings: they cannot be read/])
        expect(refused.last).not_to include("secret")
      end
    end

    it "refuses a URL in the place of a host, and does not show it" do
      refused = from_sidekiq('{host: "redis://:secret@h"}')
      expect(refused).to match(["Sidekiq::ProcessingTracker::ConfigurationError", /a host, .* has a \/ or @ in it/])
      expect(refused.last).not_to include("secret")
    end

    it "refuses by name what the native library cannot do, and names the way out" do
      refused = ["Sidekiq::ProcessingTracker::ConfigurationError", /\ASidekiq's Redis settings: .*redis_options/]
      expect(from_sidekiq('{url: "rediss://host", ssl_params: {cert_store: OpenSSL::X509::Store.new}}'))
        .to match(refused).and match([anything, /ssl_params: cert_store/])
    end

    it "refuses middleware of redis-client's, and takes its circuit breaker", if: Sidekiq::VERSION >= "7" do
      refused = ["Sidekiq::ProcessingTracker::ConfigurationError", /\ASidekiq's Redis settings: .*redis_options/]
      expect(from_sidekiq('{url: "redis://host", middlewares: [Renames = Module.new]}')).to match(refused).and match([anything, /Renames/])
      expect(from_sidekiq('{url: "redis://host", circuit_breaker: {error_threshold: 3, error_timeout: 1}}')).to include(host: "host")
    end
  end
end
