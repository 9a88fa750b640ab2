# frozen_string_literal: true

# The process ends while a thread waits in a native call.
RSpec.describe "the exit of a process with a thread in a native call" do
  let(:redis) { RedisServer.new }
  # A thread in each native call, but for leave, after which the others have nothing to wait for.
  let(:waits) { <<~RUBY }
    engine = start_engine
    held = Array.new(3) { |i| recorded(engine, "job \#{i}") }
    blocked { Sidekiq::ProcessingTracker::Orphans.recover(SETTINGS) }
    blocked { loop { engine.next_event(60_000) } }
    pause_redis
    blocked { engine.requeue(held, 60_000) }
    blocked { Native.read_key(SETTINGS[:redis], "key", 60_000) }
    5.times { |i| blocked { engine.await(engine.track("default", "more \#{i}", nil), 60_000) } }
    puts clock
  RUBY

  # Seconds from the time that the script has written to the end of the process.
  def exits(code)
    script = EngineProcess.new(redis, code)
    start = script.values.last
    now - start
  end

  it "is prompt and clean by exit" do
    expect(exits("#{waits} exit")).to be < BlockedThread::PROMPT
  end

  it "is prompt and clean by exit!" do
    expect(exits("#{waits} exit!(0)")).to be < BlockedThread::PROMPT
  end

  it "is prompt and clean at the end of the script, with a last garbage collection" do
    expect(exits("at_exit { engine = nil; GC.start }; #{waits}")).to be < BlockedThread::PROMPT
  end

  it "is prompt and clean in leave" do
    expect(exits("engine = start_engine; pause_redis; blocked { engine.leave(60_000) }; puts clock; exit")).to be < BlockedThread::PROMPT
  end

  it "loses nothing: what was held is recovered" do
    exits("engine = start_engine; recorded(engine, 'job'); blocked { loop { engine.next_event(60_000) } }; puts clock; exit")
    Queues.identities(redis, namespace: Engines::NAMESPACE).each do |identity|
      redis.call("ZADD", "#{Engines::NAMESPACE}:instances", 1, identity)
    end
    expect(Sidekiq::ProcessingTracker::Orphans.recover(Engines.settings(redis))).to include("requeued" => 1)
    expect(Queues.queued(redis)).to eq(["job"])
  end

  it "comes at once by a signal to a main thread in a native call" do
    script = EngineProcess.new(redis, "engine = start_engine; puts clock; loop { engine.next_event(60_000) }")
    script.value
    start = now
    expect(script.process.signal(:TERM).wait.termsig).to eq(Signal.list["TERM"])
    expect(now - start).to be < BlockedThread::PROMPT
  end

  it "comes at once by a signal, also when no other Ruby thread is left to pass it on" do
    # Ruby looks after signals in a thread of its own only if there was no other when the wait began.
    script = EngineProcess.new(redis, <<~RUBY)
      engine = start_engine
      main = Thread.current
      Thread.new do
        sleep 0.01 until main.status == "sleep"
        puts clock
      end
      loop { engine.next_event(60_000) }
    RUBY
    script.value
    start = now
    expect(script.process.signal(:TERM).wait(within: 5).termsig).to eq(Signal.list["TERM"])
    expect(now - start).to be < BlockedThread::PROMPT
  end
end
