# frozen_string_literal: true

# The native library keeps no Ruby objects, so neither a garbage collection nor a compaction at any moment may matter.
RSpec.describe "a garbage collection", :gc_stress do
  native = Sidekiq::ProcessingTracker::Native

  let(:redis) { RedisServer.new }

  def under_stress
    GC.stress = true
    yield
  ensure
    GC.stress = false
  end

  # Every native method once, with Strings that nobody else holds.
  def all_methods(native, settings, round)
    engine = native::Engine.start(settings)
    loop { break if engine.next_event(10_000)["kind"] == "started" }
    raise "no identity" unless engine.identity.start_with?("spec:#{Process.pid}:")

    handles = Array.new(4) { |i| engine.track(+"queue", "job #{round} #{i} #{"x" * 2_000}", "Class#{i}") }
    raise "no record" unless handles.all? { |handle| engine.await(handle, 10_000) }

    engine.touch
    engine.ack(handles[0])
    engine.release(handles[1])
    raise "not requeued" unless engine.requeue([handles[2], handles[3]], 10_000).empty?
    raise "an event from nowhere" if engine.next_event(0)
    raise "another key" unless native.namespaced_key("name#{round}", +"key") == "name#{round}:key"
    raise "no value" unless native.read_key(settings[:redis], +"key", 1_000) == "value"

    counts = native.reenqueue_orphans(settings)
    raise "not left" unless engine.leave(10_000) && engine.next_event(0) == :stopped

    counts
  end

  it "in every allocation of every native method does no harm" do
    redis.call("SET", "key", "value")
    settings = Engines.settings(redis, **Engines.fast)
    under_stress { all_methods(native, settings, 1) }
    expect(Queues.queued(redis, queue: "queue").size).to eq(3)
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "in the midst of errors and events does no harm" do
    Engines.orphan(redis, *Array.new(5) { |i| JSON.generate("jid" => "j#{i}", "class" => "Größe") })
    settings = Engines.settings(redis, **Engines.fast)
    jids = []
    under_stress do
      engine = native::Engine.start(settings)
      until jids.size == 5
        event = engine.next_event(10_000)
        jids << event["jid"] if event["kind"] == "recovered" && event["job_class"] == "Größe"
      end
      [-> { engine.await(-1, 1) }, -> { engine.track(1, 2, 3) }, -> { native::Engine.start({}) }, -> { engine.requeue([nil], 1) },
        -> { native.read_key(Engines.target(redis, path: "/nowhere"), "key", 100) }].each do |call|
        call.call
        raise "nothing was raised"
      rescue TypeError, RangeError, KeyError, Sidekiq::ProcessingTracker::ConnectionError
        nil
      end
      engine.leave(10_000)
    end
    expect(jids.sort).to eq(Array.new(5) { |i| "j#{i}" })
  end

  it "that moves every object, while threads wait and work, does no harm" do
    redis.call("SET", "key", "value")
    settings = Engines.settings(redis, **Engines.fast)
    engine = Engines.start_engine(redis, **Engines.fast)
    working = true
    workers = Array.new(3) do |i|
      Thread.new do
        rounds = 0
        while working
          handle = engine.track("queue", "job #{i} #{rounds += 1}", "Class#{i}")
          engine.await(handle, 10_000) || raise("no record")
          engine.ack(handle)
        end
        rounds
      end
    end
    waiting = Thread.new { nil while working && engine.next_event(60_000) != :stopped }
    before = GC.auto_compact
    GC.auto_compact = true
    20.times do
      GC.compact
      native.read_key(settings[:redis], "key", 1_000)
    end
    GC.verify_compaction_references(toward: :empty)
    all_methods(native, settings.merge(namespace: "other"), 0)
    working = false
    expect(workers.map(&:value)).to all(be > 0)
    expect(engine.leave(10_000)).to be(true)
    expect(waiting.join(10)).to be(waiting)
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  ensure
    GC.auto_compact = before
    working = false
  end

  it "of engines that nobody holds any more ends none of their threads in the middle of a thing" do
    20.times do
      engine = native::Engine.start(Engines.settings(redis, namespace: "gone"))
      engine.track("queue", "job", nil)
      engine.leave(1_000)
    end
    native::Engine.start(Engines.settings(redis, namespace: "gone"))
    5.times { GC.start }
    kept = Engines.start_engine(redis)
    GC.start
    kept.ack(Engines.recorded(kept, "job"))
    expect(kept.leave(10_000)).to be(true)
  end
end
