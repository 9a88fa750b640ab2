# frozen_string_literal: true

# What ends a thread, or wants to, while it waits in a native call.
RSpec.describe "an interrupt in a native call" do
  let(:redis) { RedisServer.new }
  let!(:engine) { Engines.start_engine(redis) }

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
        expect(engine.requeue(handles, 10_000)["unrecorded"]).to be_empty
        expect(works?(engine, "next")).to be(true)
        at_rest(engine)
        expect(Queues.queued(redis)).to contain_exactly("one", "two")
      end

      it "ends Engine#next_job, and the next job is there for the next call" do
        crew = engine.add_crew(["claimed"], true)
        interrupt.call(-> { engine.next_job(crew, 60_000, nil) })
        redis.call("LPUSH", "queue:claimed", "job")
        handle, _, payload = eventually("the job") { engine.next_job(crew, 1_000, nil) }
        expect(payload).to eq("job")
        engine.ack(handle)
        at_rest(engine)
        expect(Queues.queued(redis, queue: "claimed")).to be_empty
      end

      it "ends Engine#mark, and Redis is told all the same" do
        engine
        redis.pause
        interrupt.call(-> { engine.mark("PaymentJob", 60_000) })
        redis.resume
        expect(eventually("the mark") { redis.call("HGET", "#{Engines::NAMESPACE}:info:#{engine.identity}", "marked:PaymentJob") }).to eq("1")
      end

      it "ends Engine#next_event, and the next event is there for the next call" do
        interrupt.call(-> { engine.next_event(60_000) })
        redis.call("SET", "queue:odd", "no list")
        engine.release(Engines.recorded(engine, "job", queue: "odd"))
        engine.leave(10_000)
        expect(engine.next_event(10_000)).to include("kind" => "warning", "message" => include("their queues' keys hold something that is no list: 1"))
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
          Sidekiq::ProcessingTracker::Orphans.recover(Engines.settings(redis))
          Queues.queued(redis) == ["job"]
        end
        expect(works?(Engines.start_engine(redis), "next")).to be(true)
      end
    end
  end

  it "loses no job that Engine#requeue had no record of" do
    recorded = Engines.recorded(engine, "recorded")
    redis.pause
    sent = engine.track("default", "sent", nil)
    waiting = BlockedThread.blocked { engine.await(sent, 60_000) }
    unsent = engine.track("default", "unsent", nil)
    BlockedThread.blocked { engine.requeue([recorded, sent, unsent], 60_000) }.kill.join(10)
    waiting.kill.join(10)
    redis.resume
    # Nobody was told to put it back, so the engine has to.
    at_rest(engine)
    expect(Queues.queued(redis)).to contain_exactly("recorded", "sent", "unsent")
  end

  it "that is masked does not end a wait, nor make it spin, and comes after it" do
    redis.pause
    handle = engine.track("default", "job", nil)
    events = []
    thread = BlockedThread.blocked do
      Thread.handle_interrupt(BlockedThread::Poke => :never) do
        start = now
        cpu = Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID)
        events << engine.await(handle, 800)
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
    redis.pause
    handle = engine.track("default", "job", nil)
    expect(BlockedThread.signalled(-> { redis.resume }) { engine.await(handle, 60_000) }).to be(true)
  end

  it "never costs a result that is there" do
    finder = Engines.start_engine(redis, **Engines.fast)
    seen, interrupts = [], 0
    reader = BlockedThread.blocked do
      Thread.handle_interrupt(BlockedThread::Poke => :on_blocking) do
        while seen.size < 300
          begin
            event = finder.next_event(60_000)
            seen << event["jid"] if event["kind"] == "recovered"
          rescue BlockedThread::Poke
            interrupts += 1
          end
        end
      end
    end
    10.times do |i|
      Engines.orphan(redis, *Array.new(30) { |j| JSON.generate("jid" => "#{i}-#{j}", "class" => "A") })
      eventually("30 more events") do
        50.times { reader.raise(BlockedThread::Poke) unless reader.pending_interrupt? }
        seen.size >= (i + 1) * 30
      end
    end
    expect(seen).to match_array(Array.new(10) { |i| Array.new(30) { |j| "#{i}-#{j}" } }.flatten)
    expect(interrupts).to be > 0
  ensure
    reader&.kill
  end
end
