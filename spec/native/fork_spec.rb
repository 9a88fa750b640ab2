# frozen_string_literal: true

# A forked child has the engine's object and none of its threads. It touches nothing of its parent's.
RSpec.describe "a fork" do
  let(:redis) { RedisServer.new }

  def run(code, **settings)
    EngineProcess.new(redis, code, **settings).values(within: 40)
  end

  def lease_end(identity)
    redis.call("ZSCORE", "#{Engines::NAMESPACE}:instances", identity)
  end

  it "leaves the child an engine that does nothing" do
    answers = run(<<~RUBY).first
      engine = start_engine
      handle = recorded(engine, "job")
      reader, writer = IO.pipe
      in_child do
        start = clock
        writer.puts JSON.generate([
          engine.identity, engine.track("default", "child's", nil), engine.await(handle, 60_000), engine.ack(handle),
          engine.release(handle), engine.requeue([handle, 7], 60_000), engine.next_event(60_000), engine.touch,
          engine.leave(60_000), clock - start
        ])
      end
      engine.await(handle, 0) || raise("no record")
      puts reader.gets
    RUBY
    expect(answers).to match([nil, nil, false, nil, nil, {"unrecorded" => [Integer, 7], "pending" => []}, "stopped", nil, false, be < 1])
  end

  {
    "exit" => "exit",
    "exit!" => "exit!(0)",
    "at_exit" => "at_exit { ENGINE.ack(HANDLE); ENGINE.leave(1_000) }; exit",
    "a garbage collection and exit" => "ObjectSpace.each_object(Native::Engine) { |engine| engine.ack(1) }; GC.start; GC.compact; exit",
    "kill -9" => "Process.kill(:KILL, Process.pid)"
  }.each do |name, ending|
    it "leaves the parent's record, lease and beats alone, when the child ends by #{name}" do
      script = EngineProcess.new(redis, <<~RUBY, **Engines.fast)
        ENGINE = start_engine
        HANDLE = recorded(ENGINE, "job")
        pid = fork { #{ending} }
        Process.wait(pid)
        puts JSON.generate(ENGINE.identity)
        ENGINE.next_event(60_000)
      RUBY
      identity = script.value
      before = lease_end(identity)
      expect(before).not_to be_nil
      eventually("beats") { lease_end(identity) > before }
      expect(Queues.in_flight(redis, namespace: Engines::NAMESPACE)).to eq(identity => ["job"])
      expect(Queues.queued(redis)).to be_empty
    end
  end

  it "gives a child that starts its own engine another identity, and its jobs their own record" do
    identities = run(<<~RUBY, **Engines.fast)
      engine = start_engine
      handle = recorded(engine, "parent's")
      puts JSON.generate(engine.identity)
      in_child do
        own = start_engine
        own.ack(recorded(own, "child's, done"))
        recorded(own, "child's")
        puts JSON.generate(own.identity)
        own.leave(10_000) || raise("not left")
      end
      engine.await(handle, 0) || raise("no record")
      engine.ack(handle)
      engine.leave(10_000) || raise("not left")
    RUBY
    expect(identities.uniq.size).to eq(2)
    expect(identities.map { |identity| identity.split(":")[1] }.uniq.size).to eq(2)
    expect(Queues.queued(redis)).to eq(["child's"])
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "by Process.daemon leaves the daemon free to start its own" do
    script = EngineProcess.new(redis, <<~RUBY, **Engines.fast)
      engine = start_engine
      recorded(engine, "before")
      puts JSON.generate(engine.identity)
      Process.daemon(true, true)
      engine.leave(10_000)
      own = start_engine
      own.ack(recorded(own, "after"))
      loop do
        event = own.next_event(10_000)
        puts JSON.generate(event["jid"]) if event["kind"] == "recovered"
        break if event["kind"] == "recovered"
      end
      own.leave(10_000) || raise("not left")
      puts JSON.generate("end")
    RUBY
    expect(script.process.wait).to be_success
    # What the parent held comes back as that of any process that is gone.
    eventually("the daemon's end") { script.written.last == "end" }
    expect(script.written).to match([String, nil, "end"])
    expect(Queues.queued(redis)).to eq(["before"])
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "in the midst of everything leaves no lock behind: every child's own engine works" do
    count = run(<<~RUBY, **Engines.fast).last
      engine = start_engine
      busy = true
      threads = Array.new(4) do
        Thread.new do
          while busy
            handle = engine.track("default", "job" * 100, nil)
            engine.await(handle, 1_000)
            engine.touch
            rand(3).zero? ? engine.release(handle) : engine.ack(handle)
          end
        end
      end
      threads << Thread.new { engine.next_event(100) while busy }
      threads << Thread.new { Native.read_key(SETTINGS[:redis], "key", 1_000) while busy }
      40.times do |i|
        in_child do
          # A lock that is held for ever would make this wait for ever.
          Process.setpgid(0, 0)
          trap(:ALRM, "DEFAULT")
          Thread.new { sleep 8; Process.kill(:KILL, Process.pid) }
          own = start_engine
          handle = recorded(own, "child's")
          own.ack(handle)
          Native.read_key(SETTINGS[:redis], "key", 1_000)
          own.leave(5_000) || raise("not left")
        end
        puts JSON.generate(i)
      end
      busy = false
      threads.each(&:join)
      engine.leave(10_000) || raise("not left")
    RUBY
    expect(count).to eq(39)
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
    expect(Queues.queued(redis)).to all(eq("job" * 100))
  end

  it "in a job of Sidekiq leaves that job, and its process, as they are" do
    sidekiq = SidekiqProcess.new(redis, app: <<~RUBY).up
      class ForkingJob
        include Sidekiq::Job
        include Sidekiq::ProcessingTracker::Worker

        def perform
          tracker = Sidekiq::ProcessingTracker
          before = tracker.identity
          reader, writer = IO.pipe
          ends = [-> { exit }, -> { exit!(0) }, -> { raise "ends with an error" }, -> { GC.start }]
          children = ends.map do |ending|
            fork do
              $stderr.reopen(File::NULL)
              writer.puts tracker.identity.inspect
              ending.call
            end
          end
          children.each { |pid| Process.wait(pid) }
          writer.close
          note("children", [before == tracker.identity, reader.read.split].to_json)
          wait_for_key("go")
          note("done", "done")
        end
      end
    RUBY
    identity = sidekiq.identity
    payload = Queues.push(redis, Queues.payload("ForkingJob", processing: true))
    eventually("the children") { redis.call("LLEN", "children") == 1 }
    expect(JSON.parse(redis.call("LINDEX", "children", 0))).to eq([true, %w[nil nil nil nil]])
    expect(Queues.in_flight(redis)).to eq(identity => [payload])
    before = redis.call("ZSCORE", "sidekiq_processing:instances", identity)
    eventually("beats") { redis.call("ZSCORE", "sidekiq_processing:instances", identity) > before }
    redis.call("SET", "go", 1)
    eventually("the end of the job") { Queues.in_flight(redis) == {identity => []} }
    expect([redis.call("LLEN", "done"), Queues.queued(redis), redis.call("ZCARD", "retry")]).to eq([1, [], 0])
    expect(sidekiq.stop).to be_success
    expect(Queues.identities(redis)).to be_empty
  end
end
