# frozen_string_literal: true

# Sidekiq's own settings, found without being told: both are in the same database of a real server, by every way there is
# to name it. (TLS, Sentinels and changing passwords have specs of their own.)
RSpec.describe "Sidekiq's own Redis settings" do
  let(:redis) { RedisServer.new(tcp: true, requirepass: "of-all").log_in(password: "of-all") }
  let(:local) { RedisServer.new }

  def configure(settings)
    %w[server client].map { |side| "Sidekiq.configure_#{side} { |config| config.redis = #{settings} }\n" }.join
  end

  # A job of a killed process comes back where Sidekiq has its queues, so both look there. Answers the one that was killed.
  def expect_found(server, settings, db: 0, env: {}, more: "", **options)
    app = more + (settings ? configure(settings) : "")
    env = {"REDIS_URL" => nil, "REDIS_PROVIDER" => nil, **env}
    gate = Gate.new
    victim = SidekiqProcess.new(server, app: app, env: env, **options).up
    job = Queues.marked("GatedJob", gate.path)
    server.with(db: db) { |client| client.call("LPUSH", "queue:default", job) }
    victim.runs(jid = Queues.jid(job))
    server.with(db: db) do |client|
      identities = client.call("ZRANGE", "sidekiq_processing:instances", 0, -1)
      expect(identities).to eq(victim.identities)
      eventually("the record") { client.call("HVALS", "sidekiq_processing:inflight:#{identities.first}").include?(job) }
      eventually("Sidekiq's heartbeat") { client.call("SCARD", "processes") == 1 }
    end
    expect(victim.log).to match(/ProcessingTracker .*fetch: native/i)
    victim.kill
    heir = SidekiqProcess.new(server, app: app, env: env, **options).up.runs(jid)
    gate.open
    eventually("the end of the job") { heir.done == [jid] }
    expect(heir.stop).to be_success
    expect([victim.log, heir.log].join).not_to match(/of-all|of-its-own/)
    victim
  end

  it "are found by url, with a password and a database" do
    expect_found(redis, {url: "redis://:of-all@127.0.0.1:#{redis.port}/3"}, db: 3)
  end

  it "are found by host, port and db, with timeouts one by one" do
    timeouts = {connect_timeout: 2, read_timeout: 4, write_timeout: 3}
    expect_found(redis, {host: "127.0.0.1", port: redis.port, db: 2, password: "of-all", **timeouts}, db: 2)
  end

  it "are found by the path of a socket, and a user" do
    local.call("ACL", "SETUSER", "sidekiq", "on", ">of-its-own", "~*", "&*", "+@all")
    local.log_in(username: "sidekiq", password: "of-its-own").call("ACL", "SETUSER", "default", "off")
    expect_found(local, {path: local.socket, db: 1, username: "sidekiq", password: "of-its-own"}, db: 1)
  end

  it "are found by the url of a socket" do
    # The redis-rb of Sidekiq 6.5 reads no database there.
    expect_found(local, {url: local.url(db: 5)}, db: (Sidekiq::VERSION < "7") ? 0 : 5)
  end

  it "are found in REDIS_URL" do
    expect_found(redis, nil, db: 4, env: {"REDIS_URL" => "redis://:of-all@127.0.0.1:#{redis.port}/4"})
  end

  it "are found where REDIS_PROVIDER says" do
    expect_found(redis, nil, env: {"REDIS_PROVIDER" => "OUR_REDIS", "OUR_REDIS" => "redis://:of-all@127.0.0.1:#{redis.port}"})
  end

  it "are found with hiredis as Sidekiq's driver, which is its own affair", bundle: :hiredis do
    url = "redis://:of-all@127.0.0.1:#{redis.port}/3"
    asked = "require 'hiredis-client'\n" \
            "Sidekiq.configure_server { |config| config.on(:startup) { Sidekiq.redis { |conn| puts conn.config.driver } } }\n"
    victim = expect_found(redis, %({url: #{url.inspect}, driver: :hiredis}), db: 3, bundle: :hiredis, more: asked)
    expect(victim.log).to match(/^RedisClient::HiredisConnection$/)
  end
end
