# frozen_string_literal: true

# The real sidekiq-throttled, which hangs on Sidekiq's own fetch: its limits hold in every mode.
RSpec.describe "sidekiq-throttled", bundle: :throttled_1 do
  let(:redis) { RedisServer.new }

  let(:app) do
    <<~RUBY
      require "sidekiq/throttled"

      class LimitedJob
        include Sidekiq::Job
        include Sidekiq::Throttled::Job

        sidekiq_options queue: "limited"
        sidekiq_throttle concurrency: {limit: 1}

        # Notes how many run at the same time, this one included.
        def perform(number)
          at_once = Sidekiq.redis { |conn| conn.incr("running") }
          sleep 0.02
          note("limited", [number, at_once].to_json)
          Sidekiq.redis { |conn| conn.decr("running") }
        end
      end

      class FreeJob
        include Sidekiq::Job

        def perform(number)
          note("free", number)
        end
      end
    RUBY
  end

  def fill(count)
    numbers = (1..count).to_a
    numbers.each do |number|
      Queues.push(redis, Queues.payload("LimitedJob", number, queue: "limited"), queue: "limited")
      Queues.push(redis, Queues.payload("FreeJob", number, queue: "free"), queue: "free")
    end
    numbers
  end

  # What leaves a queue alone whose jobs were throttled often. A processor of Sidekiq's that waits for other queues meanwhile
  # is away for 2 s, whatever the period: how long the jobs take then depends on how fast the machine throttles.
  def cooldown(period, threshold: 100)
    <<~RUBY
      Sidekiq::Throttled.configure do |config|
        config.cooldown_period = #{period.inspect}
        config.cooldown_threshold = #{threshold}
      end
    RUBY
  end

  def start(app = self.app, **options)
    SidekiqProcess.new(redis, app: app, queues: %w[limited free], concurrency: 10, timeout: 3, bundle: :throttled_1, **options).up
  end

  def expect_limit_held(numbers, within: 60)
    eventually("all jobs", within: within) { %w[limited free].all? { |list| redis.call("LLEN", list) == numbers.size } }
    limited = Queues.notes(redis, "limited")
    expect(limited.map(&:first)).to match_array(numbers)
    expect(limited.map(&:last).uniq).to eq([1])
    expect(redis.call("LRANGE", "free", 0, -1).map(&:to_i)).to match_array(numbers)
  end

  def expect_nothing_left(worker)
    eventually("the acks") { Queues.in_flight(redis) == {worker.identity => []} }
    expect([Queues.queued(redis, queue: "limited"), Queues.queued(redis, queue: "free")]).to eq([[], []])
    expect(Queues.journal(redis)).to be_empty
    expect(worker.stop).to be_success
    expect(Queues.keys_of_instances(redis)).to be_empty
    expect([redis.call("ZCARD", "retry"), redis.call("ZCARD", "dead")]).to eq([0, 0])
  end

  it "makes the native fetch stand aside, and its limits hold" do
    worker = start(app + cooldown(nil))
    expect(worker.log.scan(/ProcessingTracker fetch: .*$/))
      .to match([/\AProcessingTracker fetch: stands aside, since Sidekiq::Throttled::Patches::\w+ is put before Sidekiq's fetch; /])
    expect_limit_held(fill(60))
    expect_nothing_left(worker)
  end

  with_fetch(:native) do
    it "goes on throttling, and no claims are left behind" do
      worker = start(app + cooldown(nil))
      expect(worker.log.scan(/WARN.*ProcessingTracker fetch: .*$/).size).to eq(1)
      expect_limit_held(fill(60))
      expect_nothing_left(worker)
    end

    it "leaves a queue alone for a while whose jobs were throttled often, and no longer" do
      worker = start(app + cooldown(0.3, threshold: 3))
      # At worst a period each; 2 s each, as with Sidekiq's own fetch, would be a minute.
      expect_limit_held(fill(30), within: 40)
      expect_nothing_left(worker)
    end

    it "schedules a job where it is told to, and no claims are left behind" do
      worker = start(app.sub("concurrency: {limit: 1}", "threshold: {limit: 5, period: 60}, requeue: {with: :schedule}"))
      numbers = fill(20)
      eventually("the schedule") { redis.call("ZCARD", "schedule") == 15 && redis.call("LLEN", "limited") == 5 && redis.call("LLEN", "free") == 20 }
      scheduled = redis.call("ZRANGE", "schedule", 0, -1).map { |payload| JSON.parse(payload)["args"].first }
      expect(Queues.notes(redis, "limited").map(&:first) + scheduled).to match_array(numbers)
      expect_nothing_left(worker)
    end

    it "that fails to put a job off leaves it in its queue" do
      failing = <<~RUBY
        class FailingStrategy
          def self.call(*)
            raise "no requeue today" unless Sidekiq.redis { |conn| conn.get("mended") }

            :enqueue
          end
        end
      RUBY
      worker = start(failing + app.sub("concurrency: {limit: 1}", "concurrency: {limit: 1}, requeue: {with: FailingStrategy}"))
      numbers = fill(10)
      worker.wait_for_log(/no requeue today/)
      redis.call("SET", "mended", 1)
      expect_limit_held(numbers)
      expect_nothing_left(worker)
    end

    it "takes nothing after TSTP, also not from the queues that remain" do
      worker = start(app + cooldown(60.0, threshold: 1))
      fill(3)
      eventually("the free jobs") { redis.call("LLEN", "free") == 3 }
      worker.signal(:TSTP).wait_for_log(/no longer accepting new work/)
      eventually("the acks") { Queues.in_flight(redis) == {worker.identity => []} }
      late = Queues.push(redis, Queues.payload("FreeJob", 4, queue: "free"), queue: "free")
      30.times do
        expect(Queues.queued(redis, queue: "free")).to eq([late])
        let_pass(0.02)
      end
      expect(worker.stop).to be_success
      expect(Queues.keys_of_instances(redis)).to be_empty
    end
  end
end
