# frozen_string_literal: true

# Arguments that make no sense raise, and calls in the wrong order do nothing. Nothing crashes.
RSpec.describe "a wrong call of the native library" do
  native = Sidekiq::ProcessingTracker::Native
  engine_class = native::Engine
  huge = (2**64) - 1

  let(:redis) { RedisServer.new }
  let(:engine) { Engines.start_engine(redis) }

  # An object that empties an array while it is converted.
  def saboteur(array)
    Class.new do
      define_method(:to_int) do
        array.clear
        GC.start
        77
      end
    end.new
  end

  it "refuses wrong types" do
    aggregate_failures do
      [
        -> { engine.track(1, "payload", nil) }, -> { engine.track("queue", nil, nil) }, -> { engine.track("queue", "p", :Job) },
        -> { engine.await(nil, 1) }, -> { engine.await(1, nil) }, -> { engine.await("1", 1) }, -> { engine.ack("1") }, -> { engine.ack(nil) },
        -> { engine.release([]) }, -> { engine.requeue(nil, 1) }, -> { engine.requeue(1, 1) }, -> { engine.requeue([nil], 1) },
        -> { engine.requeue([1], "1") }, -> { engine.next_event(nil) }, -> { engine.leave("1") },
        -> { native.namespaced_key(nil, "key") }, -> { native.read_key(nil, "key", 1) },
        -> { native.read_key(Engines.target(redis), nil, 1) }, -> { native::Orphans.start(nil) },
        -> { engine_class.start(nil) }, -> { engine_class.start(Engines.settings(redis, info: nil)) },
        -> { engine_class.start(Engines.settings(redis, info: {"pid" => 1})) },
        -> { engine_class.start(Engines.settings(redis, interval_ms: "5")) },
        -> { engine_class.start(Engines.settings(redis, redis: "redis://host")) },
        -> { engine_class.instance_method(:ack).bind_call(Object.new, 1) }
      ].each { |call| expect(&call).to raise_error(TypeError) }
    end
  end

  it "refuses wrong numbers of arguments" do
    aggregate_failures do
      [
        -> { engine.track("queue", "payload") }, -> { engine.await(1) }, -> { engine.ack }, -> { engine.identity(1) },
        -> { engine.requeue([]) }, -> { engine.next_event }, -> { engine.leave }, -> { engine_class.start },
        -> { native.namespaced_key("a") }, -> { native.read_key({}, "key") }
      ].each { |call| expect(&call).to raise_error(ArgumentError) }
    end
  end

  it "refuses numbers that are no milliseconds or handles" do
    aggregate_failures do
      [-1, -(2**70), 2**64, 2**200].each do |number|
        [
          -> { engine.await(1, number) }, -> { engine.await(number, 1) }, -> { engine.ack(number) }, -> { engine.release(number) },
          -> { engine.requeue([number], 1) }, -> { engine.requeue([], number) }, -> { engine.next_event(number) },
          -> { engine.leave(number) }, -> { native.read_key(Engines.target(redis), "key", number) },
          -> { engine_class.start(Engines.settings(redis, interval_ms: number)) },
          -> { engine_class.start(Engines.settings(redis, redis: Engines.target(redis, path: nil, host: "h", port: number))) }
        ].each { |call| expect(&call).to raise_error(RangeError) }
      end
      expect { engine.next_event(Float::NAN) }.to raise_error(FloatDomainError)
      expect { engine.next_event(Float::INFINITY) }.to raise_error(FloatDomainError)
    end
  end

  it "takes the longest timeouts there are" do
    handle = Engines.recorded(engine, "job")
    expect(engine.await(handle, huge)).to be(true)
    expect(native.read_key(Engines.target(redis, connect_timeout_ms: huge, read_timeout_ms: huge), "none", huge)).to be_nil
    BlockedThread.blocked { engine.next_event(huge) }.kill.join(10)
    redis.pause
    BlockedThread.blocked { engine.await(engine.track("default", "next", nil), huge) }.kill.join(10)
    redis.resume
    expect(engine.requeue([handle], huge)["unrecorded"]).to be_empty
    expect(engine.leave(huge)).to be(true)
  end

  it "works with the longest and the shortest settings there are" do
    longest = Sidekiq::ProcessingTracker::Configuration::LONGEST * 1_000
    slow = Engines.start_engine(redis, namespace: "long", interval_ms: longest, ttl_ms: longest, hold_ms: longest)
    slow.ack(Engines.recorded(slow, "job"))
    expect(slow.leave(5_000)).to be(true)
    [{interval_ms: 0, ttl_ms: 0, hold_ms: 0}, {interval_ms: huge, ttl_ms: huge, hold_ms: huge}].each do |settings|
      odd = engine_class.start(Engines.settings(redis, namespace: "odd", **settings))
      odd.track("default", "job", nil)
      BlockedThread.promptly(within: 2) { odd.leave(100) }
    end
  end

  it "says which setting is missing" do
    Engines.settings(redis).each_key do |key|
      expect { engine_class.start(Engines.settings(redis).except(key)) }.to raise_error(KeyError, /#{key}/)
    end
    expect { native.read_key({}, "key", 1) }.to raise_error(KeyError)
  end

  it "makes no engines but by start" do
    [-> { engine_class.new }, -> { engine_class.allocate }, -> { engine.dup }, -> { engine.clone }, -> { Marshal.dump(engine) }]
      .each { |call| expect(&call).to raise_error(TypeError) }
    expect(engine.inspect).to match(/\A#<Sidekiq::ProcessingTracker::Native::Engine:0x\h+>\z/)
  end

  it "survives arguments that change while they are converted" do
    handles = Array.new(50) { |i| Engines.recorded(engine, "job #{i}") }
    array = handles.dup
    array[1] = saboteur(array)
    engine.requeue(array, 10_000)
    handles.each { |handle| engine.ack(handle) }
    eventually("an empty in-flight hash") { Engines.fields(redis, engine.identity) == ["call"] }
    expect(Queues.queued(redis)).to all(start_with("job"))
  end

  it "carries every kind of String, byte for byte" do
    binary = (0..255).map(&:chr).join.b * 10
    payloads = ["", "\0", binary, "größe", "\xff\xfe", "ä".encode("UTF-16LE"), "x" * 3_000_000, Class.new(String).new("sub"), "frozen"]
    payloads.last.freeze
    handles = payloads.map { |payload| Engines.recorded(engine, payload, queue: "q \n\xff") }
    expect(Engines.held(redis, engine).map(&:b)).to match_array(payloads.map(&:b))
    expect(engine.requeue(handles, 10_000)["unrecorded"]).to be_empty
    expect(Queues.queued(redis, queue: "q \n\xff").map(&:b)).to match_array(payloads.map(&:b))
    expect(payloads[3]).to eq("größe")
  end

  it "is not confused when a String changes after the call" do
    redis.pause if engine
    payload, queue, marked = +"before", +"default", +"Before"
    handle = engine.track(queue, payload, marked)
    [payload, queue, marked].each { |string| string.replace("after" * 1_000) }
    redis.resume
    expect(engine.await(handle, 10_000)).to be(true)
    expect(Engines.held(redis, engine)).to eq(["before"])
    expect(redis.call("HGET", "#{Engines::NAMESPACE}:info:#{engine.identity}", "marked:Before")).to eq("1")
  end

  it "builds keys from what is a text, and refuses what is none" do
    expect(native.namespaced_key("größe", "ä".encode("ISO-8859-1"))).to eq("größe:ä")
    expect(native.namespaced_key("n", "ä".encode("UTF-16LE"))).to eq("n:ä")
    expect(native.namespaced_key("n" * 100_000, "k\0")).to eq("#{"n" * 100_000}:k\0")
    expect { native.namespaced_key("\xff", "key") }.to raise_error(EncodingError)
    expect { native.namespaced_key("n", "\xff") }.to raise_error(EncodingError)
    expect { engine.track("queue", "payload", "\xff") }.to raise_error(EncodingError)
  end

  it "does nothing for handles that it does not know" do
    [0, 12_345, huge].each do |handle|
      expect([engine.ack(handle), engine.release(handle), engine.requeue([handle, handle], 10_000)])
        .to eq([nil, nil, {"unrecorded" => [], "pending" => []}])
      BlockedThread.promptly { engine.await(handle, 60_000) }
    end
    expect(engine.requeue([], 60_000)["unrecorded"]).to be_empty
  end

  it "does each thing to a job once" do
    acked = Engines.recorded(engine, "acked")
    3.times { engine.ack(acked) }
    engine.release(acked)
    expect(engine.requeue([acked, acked], 10_000)["unrecorded"]).to be_empty
    requeued = Engines.recorded(engine, "requeued")
    expect(engine.requeue([requeued, requeued], 10_000)["unrecorded"]).to be_empty
    engine.ack(requeued)
    engine.release(requeued)
    expect(engine.leave(10_000)).to be(true)
    expect(Queues.queued(redis)).to eq(["requeued"])
  end

  it "leaves nothing behind when it leaves in the moment in which it registers" do
    left = Array.new(20) { engine_class.start(Engines.settings(redis)).leave(10_000) }
    expect([left.uniq, Queues.identities(redis, namespace: Engines::NAMESPACE)]).to eq([[true], []])
  end

  it "does no harm after leave" do
    acked, requeued, held = %w[acked requeued held].map { |payload| Engines.recorded(engine, payload) }
    expect(engine.leave(10_000)).to be(true)
    expect(Queues.queued(redis)).to contain_exactly("acked", "requeued", "held")
    BlockedThread.promptly do
      engine.ack(acked)
      engine.release(held)
      expect(engine.requeue([requeued], 60_000)["unrecorded"]).to be_empty
      late = engine.track("default", "late", "Late")
      expect(engine.await(late, 60_000)).to be(false)
      expect(engine.requeue([late], 60_000)["unrecorded"]).to eq([late])
      engine.touch
      expect(engine.next_event(60_000)).to eq(:stopped)
      expect(engine.leave(60_000)).to be(true)
      expect(engine.identity).to be_a(String)
    end
    expect(Queues.queued(redis)).to contain_exactly("acked", "requeued", "held")
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "does no harm after a leave that was too late" do
    handle = Engines.recorded(engine, "job")
    redis.pause
    expect(engine.leave(50)).to be(false)
    BlockedThread.promptly do
      expect(engine.leave(60_000)).to be(false)
      late = engine.track("default", "late", nil)
      expect(engine.await(late, 60_000)).to be(false)
      expect(engine.requeue([late], 60_000)["unrecorded"]).to eq([late])
      engine.ack(handle)
      expect(engine.next_event(60_000)).to eq(:stopped).or include("kind" => "outage")
    end
  end

  it "does not wait, after a leave that was too late, for what nobody will do any more" do
    handle = Engines.recorded(engine, "job")
    redis.pause
    expect(engine.leave(50)).to be(false)
    BlockedThread.promptly { expect(engine.requeue([handle], 3_000)["unrecorded"]).to be_empty }
  end
end
