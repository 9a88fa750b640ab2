# frozen_string_literal: true

require "socket"

# Real servers that speak TLS, with certificates made here.
RSpec.describe "Redis by TLS" do
  let(:certificates) { Certificates.new }
  let(:server_pair) { certificates.pair("server") }

  def server(pair, **more)
    RedisServer.new(tls: certificates.directives(pair, **more)).tap { |redis| redis.call("SET", "key", "value") }
  end

  def read(redis, host: "localhost", port: redis.tls_port, **params)
    options = {url: "rediss://#{host}:#{port}", ssl_params: {ca_file: certificates.ca_file}.merge(params)}
    Sidekiq::ProcessingTracker::Native.read_key(Sidekiq::ProcessingTracker::RedisSettings.from_options(options).to_native, "key", 5_000)
  end

  def refuse(*patterns, error: Sidekiq::ProcessingTracker::ConnectionError)
    raise_error(error) { |raised| expect(raised.message).to match(Regexp.union(*patterns)).and match(/rediss:/) }
  end

  it "trusts the authorities that it is told to, and those of the system without" do
    redis = server(server_pair)
    expect(read(redis)).to eq("value")
    expect(read(redis, host: "127.0.0.1")).to eq("value")
    expect(read(redis, ca_file: nil, ca_path: certificates.ca_path)).to eq("value")
    expect { read(redis, ca_file: nil) }.to refuse(/certificate .*authority/)
    with_environment("SSL_CERT_FILE" => certificates.ca_file) { expect(read(redis, ca_file: nil)).to eq("value") }
    expect { read(redis, ca_file: "/nowhere/ca.crt") }
      .to refuse(/ca_file \/nowhere\/ca.crt cannot be read: No such file/, error: Sidekiq::ProcessingTracker::ConfigurationError)
    expect { read(redis, ca_file: server_pair.key) }
      .to refuse(/no certificate in PEM format in ca_file/, error: Sidekiq::ProcessingTracker::ConfigurationError)
  end

  it "refuses certificates that have expired, unless nothing is to be verified" do
    redis = server(certificates.pair("expired", valid: -7200..-3600))
    expect { read(redis) }.to refuse(/certificate .*expired/)
    expect { read(redis, verify_hostname: false) }.to refuse(/certificate .*expired/)
    expect(read(redis, verify_mode: OpenSSL::SSL::VERIFY_NONE)).to eq("value")
  end

  it "refuses certificates of other hosts, unless the name is not to be verified" do
    redis = server(certificates.pair("other", names: ["DNS:elsewhere.example"]))
    expect { read(redis) }.to refuse(/certificate .*not valid for .*localhost/)
    expect(read(redis, verify_hostname: false)).to eq("value")
    expect { read(redis, verify_hostname: false, ca_file: nil) }.to refuse(/certificate .*authority/)
    expect(read(redis, verify_mode: OpenSSL::SSL::VERIFY_NONE, ca_file: nil)).to eq("value")
  end

  it "shows its own certificate to those who want to see one" do
    redis = server(server_pair, "tls-auth-clients": "yes")
    client = certificates.pair("client", names: nil)
    expect { read(redis) }.to refuse(/the server wants a certificate/)
    expect(read(redis, cert: client.cert, key: client.key)).to eq("value")
    cert, key = OpenSSL::X509::Certificate.new(File.read(client.cert)), OpenSSL::PKey.read(File.read(client.key))
    expect(read(redis, cert: cert, key: key)).to eq("value")
    expect { read(redis, cert: client.cert, key: "/nowhere/client.key") }
      .to refuse(/key \/nowhere\/client.key cannot be read/, error: Sidekiq::ProcessingTracker::ConfigurationError)
  end

  it "says so where one side speaks TLS and the other does not" do
    redis = RedisServer.new(tcp: true, tls: certificates.directives(server_pair))
    expect { read(redis, port: redis.port) }.to refuse(/Does it speak TLS there/)
    plain = Sidekiq::ProcessingTracker::RedisSettings.from_options("redis://localhost:#{redis.tls_port}").to_native
    expect { Sidekiq::ProcessingTracker::Native.read_key(plain, "key", 5_000) }
      .to raise_error(Sidekiq::ProcessingTracker::ConnectionError, /closed the connection.*TLS/)
  end

  it "tells the server which host it wants" do
    redis = server(server_pair)
    names = Queue.new
    context = OpenSSL::SSL::SSLContext.new
    context.add_certificate(OpenSSL::X509::Certificate.new(File.read(server_pair.cert)), OpenSSL::PKey.read(File.read(server_pair.key)))
    context.servername_cb = ->((_socket, name)) { names << name and nil }
    front = OpenSSL::SSL::SSLServer.new(TCPServer.new("127.0.0.1", 0), context)
    Scratch.undo { front.close }
    relay = Thread.new do
      client = front.accept
      back = UNIXSocket.new(redis.socket)
      to_client = Thread.new { IO.copy_stream(back, client) }
      IO.copy_stream(client, back)
    ensure
      to_client&.kill
      [client, back].compact.each(&:close)
    end
    expect(read(redis, port: front.addr[1])).to eq("value")
    expect(names.pop).to eq("localhost")
    relay.kill
  end

  it "brings jobs back by it, with Sidekiq's own settings, and warns once where nothing is verified" do
    redis = server(server_pair, "tls-auth-clients": "yes")
    client = certificates.pair("client", names: nil)
    cert, key = client.cert.inspect, client.key.inspect
    # The redis-rb of 6.5 takes no paths.
    cert, key = "OpenSSL::X509::Certificate.new(File.read(#{cert}))", "OpenSSL::PKey.read(File.read(#{key}))" if Sidekiq::VERSION < "7"
    app = lambda do |more|
      <<~RUBY
        ssl = {ca_file: #{certificates.ca_file.inspect}, cert: #{cert}, key: #{key}#{more}}
        [:configure_server, :configure_client].each do |side|
          Sidekiq.public_send(side) { |config| config.redis = {url: "rediss://localhost:#{redis.tls_port}", ssl_params: ssl} }
        end
      RUBY
    end
    gate = Gate.new
    victim = SidekiqProcess.new(redis, app: app.call("")).up
    jid = Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path)))
    victim.runs(jid).kill
    heir = SidekiqProcess.new(redis, app: app.call(", verify_mode: OpenSSL::SSL::VERIFY_NONE")).up.runs(jid)
    gate.open
    eventually("the end of the job") { heir.done == [jid] }
    expect(victim.log).not_to match(/verified/)
    expect(heir.stop).to be_success
    expect(heir.log.scan(/connects to Redis \(rediss:\S+\), but its certificate is not verified/).size).to eq(1)
    expect(heir.log).to match(/recovered job/)
  end
end
