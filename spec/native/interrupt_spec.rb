# frozen_string_literal: true

# What ends a thread, or wants to, while it waits in a native call.
RSpec.describe "an interrupt in a native call" do
  native = Sidekiq::ProcessingTracker::Native

  let(:redis) { RedisServer.new }
  let(:engine) { Engines.start_engine(redis) }

  def works?(engine, payload)
    handle = Engines.recorded(engine, payload)
    held = Engines.held(redis, engine)
    engine.ack(handle)
    held.include?(payload)
  end

  def at_rest(engine)
    eventually("an empty in-flight hash") { Engines.fields(redis, engine.identity) == ["call"] }
  end

  BlockedThread::INTERRUPTS.each do |name, interrupt|
    describe name do
      it "ends Engine#await, and the job is recorded all the same" do
        Engines.recorded(engine, "before")
        redis.pause
        handle = engine.track("default", "job", nil)
        interrupt.call(-> { engine.await(handle, 60_000) })
        redis.resume
        expect(engine.await(handle, 10_000)).to be(true)
        expect(Engines.held(redis, engine)).to contain_exactly("before", "job")
        expect(works?(engine, "next")).to be(true)
      end

      it "ends Engine#requeue, and what was recorded is put back, once" do
        handles = %w[one two].map { |payload| Engines.recorded(engine, payload) }
        redis.pause
        interrupt.call(-> { engine.requeue(handles, 60_000) })
        redis.resume
        at_rest(engine)
        expect(Queues.queued(redis)).to contain_exactly("one", "two")
        expect(engine.requeue(handles, 10_000)).to be_empty
        expect(works?(engine, "next")).to be(true)
        at_rest(engine)
        expect(Queues.queued(redis)).to contain_exactly("one", "two")
      end

      it "ends Engine#next_event, and the next event is there for the next call" do
        interrupt.call(-> { engine.next_event(60_000) })
        redis.call("SET", "queue:odd", "no list")
        engine.release(Engines.recorded(engine, "job", queue: "odd"))
        engine.leave(10_000)
        expect(engine.next_event(10_000)).to include("kind" => "warning", "message" => include("queue:odd"))
      end

      it "ends Engine#leave, and the record is recovered by others" do
        Engines.recorded(engine, "job")
        redis.pause
        interrupt.call(-> { engine.leave(60_000) })
        BlockedThread.promptly(within: 2) { expect(engine.leave(10_000)).to be(false) }
        expect(engine.next_event(1_000)).to eq(:stopped)
        redis.resume
        # The call may have been on its way. If it was not, the lease is left as it was.
        eventually("the job's way back") do
          redis.call("ZADD", "#{Engines::NAMESPACE}:instances", "XX", 1, engine.identity)
          native.reenqueue_orphans(Engines.settings(redis))
          Queues.queued(redis) == ["job"]
        end
        expect(works?(Engines.start_engine(redis), "next")).to be(true)
      end

      it "ends Native.read_key" do
        redis.call("SET", "key", "value")
        redis.pause
        interrupt.call(-> { native.read_key(Engines.target(redis, connect_timeout_ms: 5_000, read_timeout_ms: 5_000), "key", 5_000) })
        redis.resume
        expect(native.read_key(Engines.target(redis), "key", 5_000)).to eq("value")
      end

      it "ends Native.reenqueue_orphans, with Redis stopped" do
        Engines.orphan(redis, "job")
        redis.pause
        settings = Engines.settings(redis, redis: Engines.target(redis, connect_timeout_ms: 5_000, read_timeout_ms: 5_000))
        interrupt.call(-> { native.reenqueue_orphans(settings) })
        redis.resume
        native.reenqueue_orphans(Engines.settings(redis))
        expect(Queues.queued(redis)).to eq(["job"])
      end

      it "ends Native.reenqueue_orphans, which waits for an instance that never settles" do
        native.reenqueue_orphans(Engines.settings(redis, **Engines.fast))
        living = Engines.orphan(redis, "job", lease_end: 10**14)
        interrupt.call(-> { native.reenqueue_orphans(Engines.settings(redis, **Engines.fast)) })
        expect(Queues.queued(redis)).to be_empty
        redis.call("ZADD", "#{Engines::NAMESPACE}:instances", 1, living)
        expect(native.reenqueue_orphans(Engines.settings(redis, **Engines.fast))).to include("requeued" => 1)
        expect(Queues.queued(redis)).to eq(["job"])
      end
    end
  end

  it "leaves no job behind that Engine#requeue has taken but had no record of" do
    Engines.recorded(engine, "recorded").then do |recorded|
      redis.pause
      sent = engine.track("default", "sent", nil)
      thread = BlockedThread.blocked { engine.await(sent, 60_000) }
      unsent = engine.track("default", "unsent", nil)
      waiting = BlockedThread.blocked { engine.requeue([recorded, sent, unsent], 60_000) }
      waiting.kill.join(10)
      thread.kill.join(10)
    end
    redis.resume
    # Nobody was told to put it back, so the engine has to.
    eventually("all three") { Queues.queued(redis).sort == %w[recorded sent unsent] }
  end

  it "that is masked does not end a wait, nor make it spin, and comes after it" do
    redis.pause
    handle = engine_before_pause = nil
    redis.resume
    engine_before_pause = engine
    redis.pause
    handle = engine_before_pause.track("default", "job", nil)
    events = []
    thread = BlockedThread.blocked do
      Thread.handle_interrupt(BlockedThread::Poke => :never) do
        start = now
        cpu = Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID)
        events << engine_before_pause.await(handle, 800)
        events << (now - start) << (Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID) - cpu)
      end
    rescue BlockedThread::Poke
      events << :poked
    end
    thread.raise(BlockedThread::Poke)
    expect(thread.join(10)).to be(thread)
    expect(events).to match([false, be_between(0.8, 1.8), be < 0.2, :poked])
  end

  it "that is masked leaves the result of a wait as it is" do
    engine
    redis.pause
    handle = engine.track("default", "job", nil)
    thread = BlockedThread.blocked do
      Thread.handle_interrupt(BlockedThread::Poke => :never) { Thread.current[:result] = engine.await(handle, 60_000) }
    end
    thread.raise(BlockedThread::Poke)
    redis.resume
    expect { thread.join(10) }.to raise_error(BlockedThread::Poke)
    expect(thread[:result]).to be(true)
  end

  it "by a signal whose trap raises nothing runs the trap at once, and the wait goes on" do
    engine
    trapped = nil
    before = trap("USR2") { trapped = now }
    redis.pause
    handle = engine.track("default", "job", nil)
    sender = BlockedThread.once_blocked(Thread.current) do
      Process.kill("USR2", Process.pid)
      sent = now
      eventually("the trap") { trapped }
      redis.resume
      sent
    end
    expect(engine.await(handle, 60_000)).to be(true)
    expect(trapped - sender.value).to be < BlockedThread::PROMPT
  ensure
    trap("USR2", before)
  end

  it "never costs a result that is there" do
    jobs = Array.new(300) { |i| JSON.generate("jid" => "j#{i}", "class" => "A") }
    Engines.orphan(redis, *jobs)
    seen, interrupts, running = [], 0, true
    reader = Thread.new do
      Thread.handle_interrupt(BlockedThread::Poke => :on_blocking) do
        while running
          begin
            event = engine.next_event(60_000)
            seen << event["jid"] if event.is_a?(Hash) && event["kind"] == "recovered"
            break if seen.size == jobs.size
          rescue BlockedThread::Poke
            interrupts += 1
          end
        end
      end
    rescue BlockedThread::Poke
      nil
    end
    eventually("every event") do
      50.times { reader.raise(BlockedThread::Poke) if reader.alive? && reader.pending_interrupt? == false }
      !reader.alive?
    end
    expect(seen.sort).to eq(jobs.map { |job| JSON.parse(job)["jid"] }.sort)
    expect(interrupts).to be > 0
  ensure
    running = false
    reader&.kill
  end
end
