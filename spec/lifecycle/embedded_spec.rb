# frozen_string_literal: true

# Sidekiq embedded in another program, which may start and stop it as it likes. Since 7.0 it can be.
RSpec.describe "an embedded Sidekiq", if: Sidekiq.respond_to?(:configure_embed) do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # A program that does what it is told through the list "orders".
  let(:program) do
    ScriptProcess.new(redis, <<~RUBY)
      sidekiq = Sidekiq.configure_embed do |config|
        config.queues = %w[default]
        config.concurrency = 2
        config[:timeout] = 3
      end
      orders = Sidekiq::RedisConnection.create(size: 1)
      loop do
        _, order = orders.with { |conn| conn.blocking_call(false, "blpop", "orders", 0) }
        order == "start" ? sidekiq.run : sidekiq.stop
        $stdout.write("order done: \#{order}\\n")
      end
    RUBY
  end

  def order(what)
    before = program.log.scan("order done: #{what}").size
    redis.call("RPUSH", "orders", what)
    eventually("#{what} of the embedded Sidekiq", within: 30) { program.log.scan("order done: #{what}").size > before }
  end

  def push
    Queues.push(redis, Queues.marked("GatedJob", gate.path))
  end

  with_each_fetch do
    it "tracks again after each start, and leaves nothing after each stop" do
      order("start")
      cut_off = push
      program.runs(Queues.jid(cut_off))
      eventually("the record") { Queues.in_flight(redis) == {program.identity => [cut_off]} }
      order("stop")
      expect(Queues.everywhere(redis)).to eq([cut_off])
      expect(Queues.queued(redis)).to eq([cut_off])
      expect(Queues.keys_of_instances(redis)).to be_empty

      order("start")
      eventually("another lease") { program.identities.uniq.size == 2 }
      payload = push
      program.runs(Queues.jid(payload))
      eventually("the records") { Queues.in_flight(redis)[program.identity].sort == [cut_off, payload].sort }
      gate.open
      order("stop")
      expect(program.done).to contain_exactly(Queues.jid(cut_off), Queues.jid(payload))
      expect(Queues.everywhere(redis)).to be_empty
      expect(Queues.keys_of_instances(redis)).to be_empty
      expect(Queues.journal(redis)).to be_empty
    end

    # With Redis away it is Sidekiq's poller that raises there. Here its work is done by a class of the program's own,
    # which Sidekiq has an option for.
    it "keeps its jobs when Sidekiq's stop raises, until it has stopped" do
      program = ScriptProcess.new(redis, <<~RUBY)
        class NoScheduler
          def initialize(*)
          end

          def enqueue_jobs(*)
          end

          def terminate
            return if @told

            @told = true
            raise "as told"
          end
        end

        sidekiq = Sidekiq.configure_embed do |config|
          config.queues = %w[default]
          config.concurrency = 1
          config[:timeout] = 10
          config[:scheduled_enq] = NoScheduler
        end
        sidekiq.run
        2.times do |i|
          wait_for_key("stop\#{i}")
          sidekiq.stop
          $stdout.write("stopped\n")
        rescue => error
          $stdout.write("not stopped: \#{error.message}\n")
        end
        wait_for_key("end")
      RUBY
      payload = push
      program.up.runs(Queues.jid(payload))
      eventually("the record") { Queues.in_flight(redis) == {program.identity => [payload]} }
      redis.call("SET", "stop0", 1)
      program.wait_for_log(/^not stopped: as told$/)
      expect(program.log).to match(/WARN.*ProcessingTracker goes on: Sidekiq has failed to stop/)
      let_pass(AppProcess::TTL + 2 * AppProcess::STEP)
      expect(Queues.in_flight(redis)).to eq(program.identity => [payload])

      gate.open
      eventually("the ack") { Queues.everywhere(redis).empty? }
      redis.call("SET", "stop1", 1)
      program.wait_for_log(/^stopped$/)
      expect(Queues.keys_of_instances(redis)).to be_empty
      expect(Queues.journal(redis)).to be_empty
      expect(program.done).to eq([Queues.jid(payload)])
    end

    it "gets an engine of its own in a forked child that runs its parent's launcher" do
      program = ScriptProcess.new(redis, <<~RUBY)
        Sidekiq.configure_embed { |config| config.queues = %w[default] }
        launcher = Sidekiq::Launcher.new(Sidekiq.default_configuration, embedded: true)
        launcher.run
        sleep 0.02 until Sidekiq.redis { |conn| conn.exists("sidekiq_processing:clock") }.positive?
        child = fork do
          launcher.run
          wait_for_key("end")
          exit!
        end
        Process.wait(child)
        launcher.stop
      RUBY
      eventually("both engines") { Queues.identities(redis).size == 2 }
      pids = Queues.identities(redis).map { |identity| identity[/:(\d+):\h{32}\z/, 1].to_i }
      expect(pids.uniq.size).to eq(2)
      expect(pids).to include(program.pid)
      redis.call("SET", "end", 1)
      expect(program.process.wait).to be_success
    end

    it "is recovered after kill -9" do
      order("start")
      payload = push
      program.runs(Queues.jid(payload))
      program.kill
      other = SidekiqProcess.new(redis).up.runs(Queues.jid(payload))
      expect(Queues.journal(redis).map { |job| job.values_at("from", "by") }).to eq([[program.identity, other.identity]])
      eventually("the record") { Queues.in_flight(redis) == {other.identity => [payload]} }
    end
  end
end
