# frozen_string_literal: true

# What Sidekiq's processors, managers and capsules expect of a fetch: the same behaviour of Sidekiq's own and of the native one,
# side by side, on real processes.
RSpec.describe "Sidekiq's contract" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def push(job_class = "GatedJob", *args, queue: "default", **fields)
    args = [gate.path] if job_class == "GatedJob" && args.empty?
    Queues.push(redis, Queues.marked(job_class, *args, queue: queue, **fields), queue: queue)
  end

  def jids(payloads) = payloads.map { |payload| Queues.jid(payload) }

  def expect_clean
    eventually("the acks") { Queues.in_flight(redis).values.flatten.empty? }
    expect(Queues.journal(redis)).to be_empty
  end

  with_each_fetch do
    describe "the unit of work" do
      let(:app) do
        <<~RUBY
          require "sidekiq/processor"

          class NothingJob
            include Sidekiq::Job

            def perform(*)
            end
          end

          # Notes what the processor is given. Its configuration is the capsule's in 8.1; a fetch has the capsule itself.
          Sidekiq::Processor.prepend(Module.new do
            private

            def process(unit)
              job = unit.job
              note("units", [
                job.unpack1("H*"), job.encoding.name, job.frozen?, unit.queue, unit.queue_name, unit.config.equal?(respond_to?(:capsule) ? capsule : config),
                unit.respond_to?(:acknowledge) && unit.respond_to?(:requeue), Encoding.default_external.name
              ].to_json)
              super
            end
          end)
        RUBY
      end

      let(:payloads) do
        binary = Queues.payload("NothingJob", "BYTES").b.sub("BYTES".b, "\xff\xfe".b)
        [Queues.payload("NothingJob"), Queues.payload("NothingJob", "größe 漢字 😀"), binary, "\xff not json".b, "not json",
          "", " {} ", Queues.payload("NothingJob", "x" * (1 << 20))]
      end

      # What BasicFetch gives: since 7.0 UTF-8 where it is that, else binary; before, the default, whatever it is.
      def encoding(payload, default)
        return default if Sidekiq::VERSION < "7"

        payload.dup.force_encoding(Encoding::UTF_8).valid_encoding? ? "UTF-8" : "ASCII-8BIT"
      end

      ["C", "C.UTF-8"].each do |locale|
        it "has the very bytes, in the encoding of Sidekiq's own, in the locale #{locale}" do
          payloads.each { |payload| Queues.push(redis, payload, queue: "some:queue") }
          SidekiqProcess.new(redis, app: app, queues: ["some:queue"], env: {"LC_ALL" => locale})
          eventually("all units", within: 30) { redis.call("LLEN", "units") == payloads.size }
          units = Queues.notes(redis, "units")
          expect(units.map { |unit| [unit[0]].pack("H*") }).to match_array(payloads.map(&:b))
          units.each do |hex, name, *rest, default|
            expect(name).to eq(encoding([hex].pack("H*"), default))
            expect(rest).to eq([false, "queue:some:queue", "some:queue", true, true])
          end
          eventually("the acks") { Queues.everywhere(redis, queue: "some:queue").empty? }
        end
      end
    end

    it "replaces the thread of a failed job, and the pool stays whole" do
      app = <<~RUBY
        class FailingJob
          include Sidekiq::Job
          include Sidekiq::ProcessingTracker::Worker

          def perform
            note("threads", Thread.current.object_id)
            raise "as told"
          end
        end
      RUBY
      worker = SidekiqProcess.new(redis, app: app, concurrency: 2).up
      failing = Array.new(20) { push("FailingJob") }
      running = Array.new(2) { push }
      worker.runs(*jids(running))
      expect(redis.call("ZRANGE", "retry", 0, -1).map { |payload| Queues.jid(payload) }).to match_array(jids(failing))
      expect(redis.call("LRANGE", "threads", 0, -1).uniq.size).to eq(20)
      gate.open
      eventually("the ends") { worker.done.size == 2 }
      expect_clean
    end

    it "takes nothing after TSTP, neither for threads that wait nor for those that become free" do
      worker = SidekiqProcess.new(redis, concurrency: 5, timeout: 3).up
      running = push
      worker.runs(Queues.jid(running))
      worker.signal(:TSTP).wait_for_log(/no longer accepting new work/)
      # Stock's threads may take a job for which they have waited since before, and give it back.
      settle = (fetch == :native) ? 0 : 3
      let_pass(settle)
      waiting = Array.new(4) { push }
      50.times do
        expect(Queues.queued(redis)).to eq(waiting)
        expect(Queues.in_flight(redis)).to eq(worker.identity => [running])
        let_pass(0.02)
      end
      gate.open
      eventually("the end of the job") { Queues.in_flight(redis) == {worker.identity => []} }
      expect(Queues.queued(redis)).to eq(waiting)
      expect(worker.stop).to be_success
      expect(worker.started).to eq([Queues.jid(running)])
      expect(Queues.queued(redis)).to eq(waiting)
      expect(Queues.keys_of_instances(redis)).to be_empty
    end

    it "ends at TERM while its threads wait, and while new jobs come" do
      worker = SidekiqProcess.new(redis, concurrency: 5, timeout: 3).up
      pushing = true
      pushed = []
      pusher = Thread.new do
        while pushing
          pushed << push("QuickJob")
          let_pass(0.001)
        end
      end
      eventually("some jobs") { redis.call("LLEN", "done") > 100 }
      expect(worker.stop).to be_success
      pushing = false
      pusher.value
      expect(jids(Queues.queued(redis)) + Queues.notes(redis, "done").map(&:first)).to match_array(jids(pushed))
      expect(Queues.keys_of_instances(redis)).to be_empty
      expect(Queues.journal(redis)).to be_empty
    end

    describe "several capsules" do
      before { skip "Sidekiq #{Sidekiq::VERSION} has none" if Sidekiq::VERSION < "7" }

      let(:app) do
        <<~RUBY
          Sidekiq.configure_server do |config|
            config.capsule("serial") do |capsule|
              capsule.concurrency = 1
              capsule.queues = %w[serial]
            end
            config.capsule("weighted") do |capsule|
              capsule.concurrency = 3
              capsule.queues = %w[heavy,3 light,1]
            end
          end

          class WhereJob
            include Sidekiq::Job
            include Sidekiq::ProcessingTracker::Worker

            def perform(queue)
              note("where", [queue, Thread.current[:sidekiq_capsule].name].to_json)
            end
          end
        RUBY
      end

      let(:queues) { {"default" => 2, "serial" => 1, "heavy" => 3, "light" => 3} }

      def in_flight_by_queue(worker)
        fields = redis.call("HKEYS", "sidekiq_processing:inflight:#{worker.identity}") - ["call"]
        fields.map { |token| token.split(" ", 3).last }.tally
      end

      it "each work on their own queues, with their own number of threads" do
        worker = SidekiqProcess.new(redis, app: app, concurrency: 2, timeout: 3).up
        queues.each_key { |queue| 5.times { push("WhereJob", queue, queue: queue) } }
        eventually("all jobs") { redis.call("LLEN", "where") == 20 }
        expect(Queues.notes(redis, "where").tally).to eq(
          %w[default default] => 5, %w[serial serial] => 5, %w[heavy weighted] => 5, %w[light weighted] => 5
        )

        payloads = %w[default serial heavy].to_h { |queue| [queue, Array.new(5) { push(queue: queue) }] }
        eventually("all threads") { worker.started.size == 6 }
        let_pass(0.5)
        expect(in_flight_by_queue(worker)).to eq("default" => 2, "serial" => 1, "heavy" => 3)
        expect(worker.started.size).to eq(6)
        expect(worker.stop).to be_success
        payloads.each do |queue, all|
          expect(Queues.queued(redis, queue: queue)).to match_array(all)
        end
        expect(Queues.keys_of_instances(redis)).to be_empty
        expect(Queues.journal(redis)).to be_empty
      end
    end

    it "has no thread more than it is told to, and one fetcher for all" do
      app = <<~RUBY
        require "sidekiq/fetch"

        Sidekiq::BasicFetch.singleton_class.prepend(Module.new do
          def new(...)
            super.tap { $stdout.write("fetcher made\\n") }
          end
        end)
      RUBY
      worker = SidekiqProcess.new(redis, app: app, concurrency: 8).up
      payloads = Array.new(12) { push }
      eventually("all threads") { worker.started.size == 8 }
      expect(Queues.in_flight(redis)[worker.identity].size).to eq(8)
      expect(worker.log.scan("fetcher made").size).to eq(1)
      gate.open
      eventually("the rest") { worker.done.sort == jids(payloads).sort }
      expect_clean
    end
  end
end
