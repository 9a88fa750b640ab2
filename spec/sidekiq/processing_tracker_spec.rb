# frozen_string_literal: true

# What the module can do where no engine runs: a console, a web process, a machine without Redis.
RSpec.describe Sidekiq::ProcessingTracker do
  # A port that nothing listens on.
  let(:nowhere) { {"REDIS_URL" => "redis://127.0.0.1:1/0"} }

  it "is loaded by the gem's name, starts nothing and connects to nothing" do
    output, status = RubyProcess.run_ruby(<<~RUBY, before: "before = Thread.list.size", env: nowhere)
      sockets = ObjectSpace.each_object(BasicSocket).count
      p [Thread.list.size - before, sockets, Sidekiq::ProcessingTracker.identity, defined?(Sidekiq::Launcher)]
    RUBY
    expect([output, status.success?]).to eq(["[0, 0, nil, nil]\n", true])
  end

  it "has the same version in Ruby and in Rust" do
    expect(described_class::Native::VERSION).to eq(described_class::VERSION)
  end

  it "prefixes keys with the namespace, without Redis, also by send as in 1.0" do
    output, = RubyProcess.run_ruby("puts Sidekiq::ProcessingTracker.send(:namespaced_key, 'test')", env: nowhere)
    expect(output).to eq("sidekiq_processing:test\n")
    output, = RubyProcess.run_ruby("puts Sidekiq::ProcessingTracker.namespaced_key(:test)",
      env: nowhere.merge("PROCESSING_NS" => "größe:1"))
    expect(output).to eq("größe:1:test\n")
  end

  it "keeps the readers of 1.0" do
    output, = RubyProcess.run_ruby(<<~RUBY, env: nowhere)
      tracker = Sidekiq::ProcessingTracker
      tracker.configure do |config|
        config.namespace = "shop"
        config.instance_id = "pod-1"
        config.heartbeat_interval = 2
        config.heartbeat_ttl = 20
        config.recovery_lock_ttl = 60
        config.redis_options = {url: "redis://host"}
      end
      p %i[namespace instance_id heartbeat_interval heartbeat_ttl recovery_lock_ttl redis_options track]
        .map { |name| tracker.public_send(name) }
      p tracker.logger.equal?(Sidekiq.logger), tracker.config.equal?(tracker.config)
    RUBY
    expect(output).to eq(<<~TEXT)
      ["shop", "pod-1", 2, 20, 60, {:url=>"redis://host"}, :marked]
      true
      true
    TEXT
  end

  it "raises a ConfigurationError where a bad value is used, and not before" do
    output, = RubyProcess.run_ruby(<<~RUBY, env: nowhere.merge("PROCESSING_NS" => "a b"))
      puts Sidekiq::ProcessingTracker.heartbeat_ttl
      begin
        Sidekiq::ProcessingTracker.namespaced_key("x")
      rescue Sidekiq::ProcessingTracker::ConfigurationError => error
        puts error.message
      end
    RUBY
    expect(output).to start_with("30\nnamespace (from PROCESSING_NS) is \"a b\": allowed is")
  end

  describe ".reenqueue_orphans!" do
    let(:redis) { RedisServer.new }

    def reenqueue_orphans
      RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE}).first.lines(chomp: true)
        require "logger"
        Sidekiq.logger.level = Logger::FATAL
        tracker = Sidekiq::ProcessingTracker
        tracker.config.logger = Logger.new($stdout, formatter: ->(severity, _, _, text) { "\#{severity} \#{text}\n" })
        p tracker.reenqueue_orphans!
      RUBY
    end

    it "returns what came of the jobs, and logs a line for each and one for the sum" do
      payloads = Array.new(2) { |i| Queues.marked("PaymentJob", "secret", i) }
      dead = Engines.orphan(redis, *payloads)
      stuck = Engines.orphan(redis, Queues.marked("PaymentJob", "secret"), queue: "overwritten")
      redis.call("SET", "queue:overwritten", "no list")
      lines = reenqueue_orphans
      *news, sum, result = lines
      expect([sum, result]).to eq(["INFO ProcessingTracker reenqueue_orphans!: requeued=2 dead=0 discarded=0 superseded=0 stuck=1",
        "{:requeued=>2, :dead=>0, :discarded=>0, :superseded=>0, :stuck=>1}"])
      jobs, warnings = news.partition { |line| line.start_with?("INFO") }
      expect(jobs).to match_array(payloads.map { |payload|
        "INFO ProcessingTracker recovered job: jid=#{Queues.jid(payload)} class=PaymentJob queue=default from=#{dead} outcome=requeued"
      })
      expect(warnings).to all(start_with("WARN ProcessingTracker ")).and include(include(stuck).or(include("queue:overwritten")))
      expect(lines.join).not_to include("secret")
      expect(Queues.queued(redis)).to match_array(payloads)
    end

    it "tells of each job as it goes, so that what is interrupted has told what it did" do
      Engines.orphan(redis, *Array.new(2) { |i| Queues.marked("PaymentJob", i) })
      # It waits for this one for ever.
      Engines.orphan(redis, Queues.marked("PaymentJob", 3), lease_end: 10**14)
      output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE})
        Sidekiq.logger.level = Logger::FATAL
        tracker = Sidekiq::ProcessingTracker
        heard = Queue.new
        tracker.on(:recovered) { |event| heard << event.jid }
        main = Thread.current
        Thread.new do
          told = Array.new(2) { heard.pop }
          told.each { |jid| heard << jid }
          main.raise(Interrupt)
        end
        begin
          tracker.reenqueue_orphans!
        rescue Interrupt
          puts Array.new(heard.size) { heard.pop }
        end
      RUBY
      journal = Queues.journal(redis, namespace: Engines::NAMESPACE).map { |line| line["jid"] }
      expect(journal.size).to eq(2)
      expect(output.split).to match_array(journal)
    end

    it "has told what it did when Redis goes away" do
      Engines.orphan(redis, payload = Queues.marked("PaymentJob", 1))
      Engines.orphan(redis, Queues.marked("PaymentJob", 2), lease_end: 10**14)
      output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE})
        Sidekiq.logger.level = Logger::FATAL
        Sidekiq::ProcessingTracker.on(:recovered) do |event|
          puts event.jid
          Process.kill("KILL", #{redis.process.pid})
        end
        begin
          Sidekiq::ProcessingTracker.reenqueue_orphans!
        rescue Sidekiq::ProcessingTracker::ConnectionError
          puts "away"
        end
      RUBY
      expect(output.split).to eq([Queues.jid(payload), "away"])
    end

    it "says so where nothing was to be done" do
      expect(reenqueue_orphans).to eq(["INFO ProcessingTracker reenqueue_orphans!: requeued=0 dead=0 discarded=0 superseded=0 stuck=0",
        "{:requeued=>0, :dead=>0, :discarded=>0, :superseded=>0, :stuck=>0}"])
    end
  end

  describe ".redis_sync" do
    let(:redis) { RedisServer.new }

    it "yields a connection of Sidekiq's own", :own_user do
      output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url})
        Sidekiq.logger.level = Logger::FATAL
        tracker = Sidekiq::ProcessingTracker
        puts tracker.redis_sync { |conn| conn.ping }
        puts tracker.redis_sync { |conn| conn.set(tracker.namespaced_key("demo"), "value") }
        puts tracker.redis_sync { |conn| conn.class } == Sidekiq.redis { |conn| conn.class }
      RUBY
      expect(output).to eq("PONG\nOK\ntrue\n")
      expect(redis.call("GET", "sidekiq_processing:demo")).to eq("value")
    end

    it "yields a connection to redis_options, of the same type, also in a forked child" do
      output, = RubyProcess.run_ruby(<<~RUBY, env: nowhere)
        Sidekiq.logger.level = Logger::FATAL
        tracker = Sidekiq::ProcessingTracker
        tracker.configure { |config| config.redis_options = {path: #{redis.socket.inspect}, db: 3} }
        puts tracker.redis_sync { |conn| conn.set("a", 1) }
        puts tracker.redis_sync { |conn| conn.class } == Sidekiq.redis { |conn| conn.class }
        Process.wait(fork { tracker.redis_sync { |conn| conn.incr("a") } })
        puts tracker.redis_sync { |conn| conn.get("a") }
      RUBY
      expect(output).to eq("OK\ntrue\n2\n")
      expect(redis.with(db: 3) { |client| client.call("GET", "a") }).to eq("2")
    end

    it "makes a new pool for other options, and for no others" do
      output, = RubyProcess.run_ruby(<<~RUBY, env: nowhere)
        Sidekiq.logger.level = Logger::FATAL
        tracker = Sidekiq::ProcessingTracker
        options = {path: #{redis.socket.inspect}, db: 3}
        changes = [-> { options }, -> { {path: #{redis.socket.inspect}, db: 3} }, -> { options.merge!(db: 4) }, -> { options.dup }]
        pools = changes.map do |change|
          tracker.config.redis_options = change.call
          tracker.redis_sync { |conn| conn.incr("a") }
          tracker.send(:redis_pool, tracker.redis_options).object_id
        end
        p pools.map { |pool| pools.index(pool) }
      RUBY
      expect(output).to eq("[0, 0, 2, 2]\n")
      expect([3, 4].map { |db| redis.with(db: db) { |client| client.call("GET", "a") } }).to eq(%w[2 2])
    end

    it "logs in with the password of redis_options and shows it nowhere" do
      redis.config_set(requirepass: "secret").log_in(password: "secret")
      ['{path: SOCKET, password: "secret"}', '{path: SOCKET, password: -> { "secret" }}', '"unix://:secret@" + SOCKET'].each do |options|
        output, = RubyProcess.run_ruby(<<~RUBY, env: nowhere)
          SOCKET = #{redis.socket.inspect}
          tracker = Sidekiq::ProcessingTracker
          tracker.configure { |config| config.redis_options = #{options} }
          puts tracker.redis_sync { |conn| conn.ping }
          p tracker.config
        RUBY
        expect(output).to include("PONG")
        expect(output).not_to include("secret")
      end
    end

    it "needs a block" do
      expect { described_class.redis_sync }.to raise_error(ArgumentError)
    end
  end
end
