# frozen_string_literal: true

# Which jobs run again after a kill: those that say so themselves, and those whose class says so. Under the native fetch
# the others are recorded too, and end in the dead set.
RSpec.describe "marked jobs" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      class UnmarkedJob
        include Sidekiq::Job

        def perform(gate, *)
          GatedJob.new.tap { |job| job.jid = jid }.perform(gate)
        end
      end
    RUBY
  end

  def push(job_class, **fields)
    Queues.push(redis, Queues.payload(job_class, gate.path, **fields))
  end

  def run(*payloads, **options)
    SidekiqProcess.new(redis, app: app, concurrency: payloads.size, **options).up
      .runs(*payloads.map { |payload| Queues.jid(payload) })
  end

  def info(worker)
    redis.call("HGETALL", "sidekiq_processing:info:#{worker.identity}")
  end

  with_each_fetch do
    it "are so by their payload or their class, and no others" do
      by_payload = push("UnmarkedJob", processing: true)
      by_class = push("GatedJob")
      denied = push("GatedJob", processing: false)
      unmarked = push("UnmarkedJob")
      worker = run(by_payload, by_class, denied, unmarked)
      recorded = [by_payload, by_class]
      recorded.push(denied, unmarked) if fetch == :native
      expect(Queues.in_flight(redis)[worker.identity]).to match_array(recorded)
      expect(info(worker).keys.grep(/\Amarked:/)).to eq(["marked:GatedJob"])

      worker.kill
      other = SidekiqProcess.new(redis, app: app).up.runs(Queues.jid(by_payload), Queues.jid(by_class))
      gate.open
      eventually("the ends") { other.done.size == 2 }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(redis.call("ZRANGE", "dead", 0, -1).map { |payload| Queues.jid(payload) })
        .to match_array((recorded - [by_payload, by_class]).map { |payload| Queues.jid(payload) })
    end

    it "come back after kill -9 when only their class says that they are marked" do
      payload = push("GatedJob")
      worker = run(payload)
      worker.kill
      other = SidekiqProcess.new(redis).up.runs(Queues.jid(payload))
      expect(Queues.in_flight(redis)).to eq(other.identity => [payload])
      expect(info(worker)).to be_empty
    end

    it "are all jobs with track :all" do
      unmarked = push("UnmarkedJob")
      worker = run(unmarked, env: {"PROCESSING_TRACK" => "all"})
      expect(Queues.in_flight(redis)).to eq(worker.identity => [unmarked])
      worker.kill
      other = SidekiqProcess.new(redis, app: app).up.runs(Queues.jid(unmarked))
      gate.open
      eventually("the end") { other.done == [Queues.jid(unmarked)] }
    end

    it "are recorded also where a gem runs the processor's work in a fiber, and come back" do
      fiber = <<~RUBY
        require "sidekiq/processor"

        module InFiber
          private

          def dispatch(...)
            Fiber.new { super }.resume
          end
        end
        Sidekiq::Processor.prepend(InFiber)
      RUBY
      payload = push("GatedJob", processing: true)
      worker = SidekiqProcess.new(redis, app: fiber, concurrency: 1).up.runs(Queues.jid(payload))
      expect(Queues.in_flight(redis)).to eq(worker.identity => [payload])
      gate.open
      eventually("the ack") { worker.done == [Queues.jid(payload)] && Queues.everywhere(redis).empty? }
    end
  end

  it "tell people who runs them" do
    worker = SidekiqProcess.new(redis, queues: %w[default later], concurrency: 3).up
    expect(info(worker)).to include("pid" => worker.pid.to_s, "hostname" => Socket.gethostname, "queues" => "default,later",
      "concurrency" => "3", "version" => Sidekiq::ProcessingTracker::VERSION, "sidekiq_version" => Sidekiq::VERSION)
  end
end
