# frozen_string_literal: true

# Jobs that are orphaned inside a living process: its threads end, or Sidekiq never acknowledges them. Sidekiq's own fetch
# has lost such a job.
RSpec.describe "a job that its living process has dropped" do
  let(:redis) { RedisServer.new(appendonly: "yes") }
  let(:gate) { Gate.new }

  # Whose threads end in the first run.
  let(:app) do
    <<~RUBY
      class KilledJob
        include Sidekiq::Job

        def perform(name)
          note("runs", [name, jid].to_json)
          Thread.current.kill if Sidekiq.redis { |conn| conn.incr("tries:\#{jid}") } == 1
        end
      end

      # Its arguments cannot be written as JSON if they are not UTF-8, and so cannot its retry.
      class FailingJob
        include Sidekiq::Job

        def perform(*)
          note("runs", ["failing", jid].to_json)
          raise "as told"
        end
      end

      class FullJob
        include Sidekiq::Job

        # No retry of its first run can be written.
        def perform
          limit_memory(0)
          note("runs", ["full", jid].to_json)
          return if Sidekiq.redis { |conn| conn.incr("tries:\#{jid}") } > 1

          limit_memory(1)
          raise "as told"
        end

        def limit_memory(bytes)
          Sidekiq.redis do |conn|
            (Sidekiq::VERSION < "7") ? conn.config(:set, "maxmemory", bytes) : conn.call("CONFIG", "SET", "maxmemory", bytes)
          end
        end
      end
    RUBY
  end

  def push(job_class, *args, **fields)
    Queues.push(redis, Queues.payload(job_class, *args, **fields))
  end

  def runs = Queues.notes(redis, "runs")

  def dead
    redis.call("ZRANGE", "dead", 0, -1).map { |payload| JSON.parse(payload.scrub) }
  end

  def worker(**options)
    @worker ||= SidekiqProcess.new(redis, app: app, **options).up
  end

  # How often Sidekiq has given up on a job.
  def internal_exceptions = worker.log.scan("Internal exception!").size

  def expect_nothing_left
    eventually("the end of all records") { Queues.in_flight(redis) == {worker.identity => []} && Queues.queued(redis).empty? }
  end

  with_each_fetch do
    it "by the end of its thread comes back where it is marked, and is not put back again at the end" do
      worker(concurrency: 3, timeout: 3)
      payload = push("KilledJob", "marked", processing: true)
      jid = Queues.jid(payload)
      eventually("the second run") { runs == [["marked", jid]] * 2 }
      expect_nothing_left
      expect(Queues.journal(redis)).to match([
        a_hash_including("jid" => jid, "outcome" => "requeued", "from" => worker.identity, "by" => worker.identity, "recoveries" => "1")
      ])
      # Sidekiq does not replace such a thread, and at the end puts back what it had.
      expect(worker.stop).to be_success
      expect(Queues.everywhere(redis)).to be_empty
      expect(Queues.keys_of_instances(redis)).to be_empty
      expect(worker.log).not_to match(/jobs back into their queues|stay recorded/)
    end

    it "since its retry could not be written runs again, and is a poison pill at some time" do
      worker(concurrency: 2, env: {"MAX_RECOVERIES" => "1"})
      bytes = Queues.payload("FailingJob", "BYTES", processing: true).b.sub("BYTES".b, "\xff\xfe".b)
      Queues.push(redis, bytes)
      eventually("the dead set") { dead.any? }
      expect(dead).to match([a_hash_including("error_class" => "Sidekiq::ProcessingTracker::PoisonPill", "class" => "FailingJob")])
      expect(redis.call("ZRANGE", "dead", 0, 0).first.b).to include("\xff\xfe".b)
      expect(runs.size).to eq(2)
      expect_nothing_left
    end

    it "since Redis was full when its retry was to be written runs again" do
      worker(concurrency: 1)
      payload = push("FullJob", processing: true)
      eventually("the second run") { runs.size == 2 }
      expect(runs.map(&:last).uniq).to eq([Queues.jid(payload)])
      expect(internal_exceptions).to eq(1)
      expect_nothing_left
      expect([redis.call("ZCARD", "retry"), dead]).to eq([0, []])
    end
  end

  with_fetch(:native) do
    it "and that nobody has marked is in the dead set, with the reason" do
      worker(concurrency: 2)
      killed = push("KilledJob", "unmarked")
      # Which it could not note in a Redis that is full.
      eventually("its run") { runs.size == 1 }
      full = push("FullJob")
      # Not before: its retry could be written.
      eventually("its end") { internal_exceptions == 1 }
      redis.config_set(maxmemory: 0)
      eventually("the dead set") { dead.size == 2 }
      expect(dead.map { |job| job.values_at("jid", "error_class") })
        .to match_array([killed, full].map { |payload| [Queues.jid(payload), "Sidekiq::ProcessingTracker::Orphaned"] })
      expect(Queues.journal(redis).map { |job| job.values_at("outcome", "reason") }).to eq([%w[dead unmarked]] * 2)
      expect(runs.size).to eq(2)
      expect_nothing_left
    end

    it "since it is no job at all is in the dead set at once" do
      worker(concurrency: 2)
      payloads = %w[null 5 []].each { |payload| Queues.push(redis, payload) }
      eventually("the dead set") { dead.size == 3 }
      expect(dead.map { |job| job["args"] }).to match_array(payloads.map { |payload| [JSON.parse(payload)] })
      expect(Queues.journal(redis).map { |job| job.values_at("outcome", "reason") }).to eq([%w[dead unreadable]] * 3)
      expect(internal_exceptions).to eq(3)
      expect_nothing_left
      # The pool is whole.
      gates = Array.new(2) { Queues.push(redis, Queues.marked("GatedJob", gate.path)) }
      worker.runs(*gates.map { |payload| Queues.jid(payload) })
    end

    it "since it is no job at all is a poison pill where all jobs are tracked" do
      worker(concurrency: 2, env: {"PROCESSING_TRACK" => "all", "MAX_RECOVERIES" => "1"})
      payloads = %w[null 5 []].each { |payload| Queues.push(redis, payload) }
      eventually("the dead set", within: 30) { dead.size == 3 }
      expect(dead.map { |job| job["args"] }).to match_array(payloads.map { |payload| [JSON.parse(payload)] })
      expect(Queues.journal(redis).map { |job| job.values_at("outcome", "reason") })
        .to match_array([["requeued", ""]] * 3 + [%w[dead poison_pill]] * 3)
      expect(internal_exceptions).to eq(6)
      expect_nothing_left
    end

    # Sidekiq would lose the thread without a word in its log.
    it "since its ack has failed runs again, and its thread works on" do
      failing = <<~RUBY
        Sidekiq::ProcessingTracker::Native::Engine.prepend(Module.new do
          def ack(handle)
            raise "no ack today" unless @failed
            super
          ensure
            @failed = true
          end
        end)

        class ThreadJob
          include Sidekiq::Job
          include Sidekiq::ProcessingTracker::Worker

          def perform
            note("runs", [Thread.current.object_id, jid].to_json)
          end
        end
      RUBY
      worker = SidekiqProcess.new(redis, app: failing, concurrency: 1).up
      payload = push("ThreadJob")
      eventually("the second run") { runs.size == 2 }
      eventually("the ack") { Queues.everywhere(redis).empty? }
      expect(runs.uniq).to match([[Integer, Queues.jid(payload)]])
      expect(worker.log.scan(/ERROR.*ProcessingTracker failed to ack a job: no ack today \(RuntimeError\)/).size).to eq(1)
      expect(Queues.journal(redis).map { |job| job["outcome"] }).to eq(["requeued"])
    end

    it "since its requeue has failed goes back when the process leaves" do
      failing = <<~RUBY
        Sidekiq::ProcessingTracker::Native::Engine.prepend(Module.new do
          def requeue(*)
            raise "no requeue today"
          end
        end)
      RUBY
      worker = SidekiqProcess.new(redis, app: failing, concurrency: 2, timeout: 3).up
      payloads = Array.new(2) { push("GatedJob", gate.path) }
      worker.runs(*payloads.map { |payload| Queues.jid(payload) })
      expect(worker.stop).to be_success
      expect(worker.log.scan(/ERROR.*ProcessingTracker failed to requeue 2 jobs: no requeue today \(RuntimeError\)/).size).to eq(1)
      expect(Queues.queued(redis)).to match_array(payloads)
      expect(Queues.keys_of_instances(redis)).to be_empty
    end

    it "is found whatever its thread was doing when Sidekiq's Shutdown came" do |example|
      disturbing = <<~RUBY
        class ShortJob
          include Sidekiq::Job
          include Sidekiq::ProcessingTracker::Worker

          def perform(number)
            sleep 0.001
            note("done", number)
          end
        end

        # Raises into a thread of the pool, whatever that does, until it is told to stop.
        Thread.new do
          random = Random.new(1)
          raised = 0
          until Sidekiq.redis { |conn| conn.get("calm") }
            threads = Thread.list.select { |thread| thread.name.to_s.end_with?("processor") }
            threads.sample(random: random)&.raise(Sidekiq::Shutdown)
            raised += 1
            sleep(random.rand * 0.05)
          end
          note("raised", raised)
        end
      RUBY
      # With the heartbeat of the defaults, so that a machine that is busy with all this is no outage.
      disturbed = SidekiqProcess.new(redis, app: disturbing, concurrency: 5, interval: 5, ttl: 30, env: {"MAX_RECOVERIES" => "unlimited"}).up
      numbers = (1..3_000).to_a
      numbers.each_slice(100) do |some|
        redis.call("LPUSH", "queue:default", *some.map { |number| Queues.marked("ShortJob", number) })
        let_pass(0.1)
      end
      redis.call("SET", "calm", 1)
      eventually("the end of all jobs", within: 60) { (numbers - redis.call("LRANGE", "done", 0, -1).map(&:to_i)).empty? }
      eventually("the acks", within: 60) { Queues.everywhere(redis).empty? }
      raised = eventually("the last of it") { redis.call("LRANGE", "raised", 0, -1).first }
      requeued = Queues.journal(redis).size
      runs = redis.call("LLEN", "done")
      example.reporter.message("  #{raised} times Sidekiq::Shutdown: #{requeued} jobs dropped and put back, #{runs} of #{numbers.size} runs to their ends")
      expect(requeued).to be > 10
      expect(Queues.identities(redis)).to eq([disturbed.identity])
      expect(redis.call("ZCARD", "dead")).to eq(0)
      expect(disturbed.log).not_to match(/ERROR.*ProcessingTracker/)
    end
  end
end
