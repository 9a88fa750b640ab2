# frozen_string_literal: true

# Ruby's other threads run while one waits natively, and the native threads run while Ruby cannot.
RSpec.describe "the GVL" do
  let(:redis) { RedisServer.new }

  {
    "Engine#await" => ->(engine, _) { engine.await(engine.track("default", "job", nil), 300) },
    "Engine#requeue" => ->(engine, handle) { engine.requeue([handle], 300) },
    "Engine#next_event" => ->(engine, _) { engine.next_event(300) },
    "Engine#leave" => ->(engine, _) { engine.leave(300) },
    "Native.read_key" => lambda { |_, target|
      Sidekiq::ProcessingTracker::Native.read_key(target, "key", 300)
    }
  }.each do |name, wait|
    it "is free in #{name}" do
      engine = Engines.start_engine(redis)
      argument = name.start_with?("Native") ? Engines.target(redis) : Engines.recorded(engine, "held")
      redis.pause
      count = 0
      counter = Thread.new { loop { (count += 1) && Thread.pass } }
      before = count
      start = now
      begin
        wait.call(engine, argument)
      rescue Sidekiq::ProcessingTracker::ConnectionError
        nil
      end
      expect(now - start).to be_between(0.25, 2)
      expect(count - before).to be > 1_000
    ensure
      counter&.kill
    end
  end

  it "may be held for longer than the lease: the heart goes on beating" do
    script = EngineProcess.new(redis, <<~RUBY, interval_ms: 200, ttl_ms: 1_000)
      require "fiddle"
      usleep = Fiddle::Function.new(Fiddle::Handle::DEFAULT["usleep"], [-Fiddle::TYPE_INT], Fiddle::TYPE_INT, need_gvl: true)
      engine = start_engine
      handle = recorded(engine, "job")
      ticks = 0
      Thread.new { loop { (ticks += 1) && sleep(0.01) } }
      sleep 0.01 until ticks > 2
      puts JSON.generate(engine.identity)
      before = ticks
      usleep.call(2_200_000)
      held = ticks - before
      identity = engine.identity
      kept = engine.await(handle, 0)
      engine.ack(handle)
      puts JSON.generate([held <= 3, identity, kept, engine.leave(10_000)])
    RUBY
    identity = script.value
    lease_ends = []
    watcher = Engines.start_engine(redis, interval_ms: 200, ttl_ms: 1_000)
    eventually("the end of the hold") do
      lease_ends << redis.call("ZSCORE", "#{Engines::NAMESPACE}:instances", identity)
      script.written.size == 2
    end
    expect(script.values.last).to eq([true, identity, true, true])
    expect(lease_ends.compact.uniq.size).to be > 5
    expect(watcher.next_event(0)).to be_nil
    expect(Queues.queued(redis)).to be_empty
  end
end
