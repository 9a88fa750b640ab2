# frozen_string_literal: true

# What the tracker is allowed to do in Redis, and which Redis it takes.
RSpec.describe "what Redis lets the tracker do" do
  let(:redis) { RedisServer.new }

  def rules(user = LeastUser::NAME) = LeastUser.rules(user)

  def boot(redis, options, &check)
    app = "Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{options.inspect} }"
    sidekiq = SidekiqProcess.new(redis, app: app)
    expect(sidekiq.process.wait.exitstatus).to eq(1)
    expect(Queues.identities(redis)).to be_empty
    sidekiq.log
  end

  it "is content with the user in the documentation, and names what is missing without" do
    redis.call("ACL", "SETUSER", "tracker", *rules)
    options = {path: redis.socket, username: "tracker", password: "password"}
    app = "Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{options.inspect} }"
    gate = Gate.new
    victim = SidekiqProcess.new(redis, app: app, queues: %w[default second third fourth]).up
    jid = Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path)))
    victim.runs(jid).kill
    heir = SidekiqProcess.new(redis, app: app, queues: %w[first second third default]).up.runs(jid)
    gate.open
    eventually("the end of the job") { heir.done == [jid] }
    expect(heir.stop).to be_success
    expect([victim.log, heir.log]).to all(satisfy { |log| !log.match?(/WARN|ERROR/) })
    # Nor is anything refused that nobody speaks of.
    expect(redis.call("ACL", "LOG").map { |entry| entry["object"] } - ["client|setinfo"]).to be_empty

    redis.call("ACL", "SETUSER", "tracker", "-rpop", "-hset")
    expect(boot(redis, options)).to match(/this user lacks rights that the tracker needs: hset on sidekiq_processing:\*; rpop on sidekiq_processing:\*; rpop on queue:\*; hset on uniquejobs:\*/)
  end

  it "is content with Sidekiq's user in the documentation where its queues are in another Redis, and names what is missing without" do
    redis.call("ACL", "SETUSER", "sidekiq", *rules("sidekiq"))
    gate = Gate.new
    app = "Sidekiq::ProcessingTracker.config.redis_options = #{redis.url(db: 2).inspect}"
    victim = SidekiqProcess.new(redis, app: app).up
    jid = Queues.jid(job = Queues.push(redis, Queues.marked("GatedJob", gate.path)))
    victim.runs(jid).kill
    recover = lambda do
      RubyProcess.run_ruby(<<~RUBY, env: {"HEARTBEAT_TTL" => "2"}).first
        Sidekiq.configure_client { |config| config.redis = {path: #{redis.socket.inspect}, username: "sidekiq", password: "password"} }
        #{app}
        p Sidekiq::ProcessingTracker.reenqueue_orphans!
      RUBY
    end
    needed = rules("sidekiq").grep(/\A\+/) - %w[+eval +evalsha +info +select +set]
    needed.each { |right| redis.call("ACL", "SETUSER", "sidekiq", right.tr("+", "-")) }
    named = recover.call[/ConfigurationError.*|.*ConfigurationError.*/]
    expect(named).to include("this user lacks rights that the tracker needs").and include("Two Redises")
    expect(needed.map { |right| right.delete("+") }.reject { |command| named.match?(/\b#{command}\b/) }).to be_empty
    needed.each { |right| redis.call("ACL", "SETUSER", "sidekiq", right) }
    redis.call("ACL", "SETUSER", "sidekiq", "-eval", "-evalsha")
    expect(recover.call).to match(/this user lacks rights that the tracker needs: .*(eval|NOPERM)/)
    redis.call("ACL", "SETUSER", "sidekiq", "+eval", "+evalsha")
    expect(recover.call).to match(/requeued(: |=>)1/)
    expect(Queues.queued(redis)).to eq([job])
  end

  it "refuses a replica and a cluster" do
    replica = RedisServer.new(replicaof: "127.0.0.1 #{RedisServer.new(tcp: true).port}")
    examine = ->(server) { Sidekiq::ProcessingTracker::Native.examine(Engines.target(server), "namespace", false, 5_000) }
    expect { examine.call(replica) }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /is a replica, which takes no writes/)
    cluster = RedisServer.new(tcp: true, "cluster-enabled": "yes")
    expect { examine.call(cluster) }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /part of a Redis Cluster/)
    expect(examine.call(redis)).to be_nil
    redis.pause
    Scratch.undo { redis.resume }
    expect { Sidekiq::ProcessingTracker::Native.examine(Engines.target(redis), "namespace", false, 100) }
      .to raise_error(Sidekiq::ProcessingTracker::ConnectionError)
  end

  it "warns once of a Redis that may throw keys away" do
    redis.config_set(maxmemory_policy: "allkeys-lru")
    sidekiq = SidekiqProcess.new(redis).up.wait_for_log(/ProcessingTracker Redis throws keys away/)
    redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    gate = Gate.new
    sidekiq.runs(Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path))))
    eventually("the record") { Queues.in_flight(redis).values.flatten.size == 1 }
    expect(sidekiq.log.scan("ProcessingTracker Redis throws keys away").size).to eq(1)
  end
end
