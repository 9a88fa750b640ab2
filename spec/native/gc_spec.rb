# frozen_string_literal: true

# The native library keeps no Ruby objects, so neither a garbage collection nor a compaction at any moment may matter.
# In processes of their own: a collection takes the longer, the more a process has loaded.
RSpec.describe "a garbage collection", :gc_stress do
  let(:redis) { RedisServer.new }

  # Every native method once, with Strings that nobody else holds.
  all_methods = <<~RUBY
    def all_methods(settings)
      engine = Native::Engine.start(settings)
      loop { break if engine.next_event(10_000)["kind"] == "started" }
      raise "no identity" unless engine.identity.start_with?("spec:\#{Process.pid}:")

      payloads = Array.new(4) { |i| "job \#{i} \#{rand} \#{"x" * 2_000}" }
      handles = payloads.map.with_index { |payload, i| engine.track(+"queue", payload.dup, "Class\#{i}") }
      raise "no record" unless handles.all? { |handle| engine.await(handle, 10_000) }

      engine.touch
      engine.ack(handles[0])
      engine.release(handles[1])
      raise "not requeued" unless engine.requeue([handles[2], handles[3]], 10_000).values.all?(&:empty?)
      raise "not told" unless engine.next_event(10_000).values_at("kind", "payload") == ["recovered", payloads[1]]
      event = engine.next_event(0)
      raise "an event from nowhere: \#{event}" if event

      crew = engine.add_crew([+"claimed", +"claimed"], false)
      handle, queue, payload = engine.next_job(crew, 10_000, nil)
      raise "another job" unless [queue, payload, payload.encoding] == ["claimed", "größe", Encoding::UTF_8]
      raise "not marked" unless engine.mark(+"Größe", 10_000)
      engine.ack(handle)
      engine.quiet(crew, true)
      raise "work for nobody" unless engine.next_job(crew, 10_000, Encoding::BINARY) == false
      raise "another key" unless Native.namespaced_key(+"name", +"key") == "name:key"
      raise "no value" unless Native.read_key(settings[:redis], +"key", 1_000) == "value"
      raise "not counted" unless Sidekiq::ProcessingTracker::Orphans.recover(settings).key?("requeued")
      raise "not left" unless engine.leave(10_000) && engine.next_event(0) == :stopped
    end
  RUBY

  def run(code)
    EngineProcess.new(redis, code, **Engines.fast).values(within: 120)
  end

  it "in every allocation of every native method does no harm" do
    redis.call("SET", "key", "value")
    redis.call("LPUSH", "queue:claimed", "größe", "größe")
    run(<<~RUBY)
      #{all_methods}
      GC.stress = true
      all_methods(SETTINGS)
    RUBY
    expect(Queues.queued(redis, queue: "queue").size).to eq(3)
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "in the midst of errors and events does no harm" do
    Engines.orphan(redis, *Array.new(8) { |i| JSON.generate("jid" => "j#{i}", "class" => "Größe") })
    jids = run(<<~RUBY).last
      jids = []
      nowhere = SETTINGS[:redis].merge(path: "/nowhere")
      GC.stress = true
      engine = Native::Engine.start(SETTINGS)
      until jids.size == 8
        event = engine.next_event(10_000)
        jids << event["jid"] if event["kind"] == "recovered" && event["job_class"] == "Größe"
      end
      [-> { engine.await(-1, 1) }, -> { engine.track(1, 2, 3) }, -> { Native::Engine.start({}) }, -> { engine.requeue([nil], 1) },
        -> { Native.read_key(nowhere, "key", 100) }].each do |call|
        call.call
        raise "nothing was raised"
      rescue TypeError, RangeError, KeyError, Sidekiq::ProcessingTracker::ConnectionError
        nil
      end
      engine.leave(10_000)
      GC.stress = false
      puts JSON.generate(jids)
    RUBY
    expect(jids).to match_array(Array.new(8) { |i| "j#{i}" })
  end

  it "that moves every object, while threads wait and work, does no harm" do
    redis.call("SET", "key", "value")
    redis.call("LPUSH", "queue:claimed", "größe", "größe")
    rounds = run(<<~RUBY).last
      #{all_methods}
      engine = start_engine
      working = true
      workers = Array.new(3) do |i|
        Thread.new do
          rounds = 0
          while working
            handle = engine.track("queue", "job \#{i} \#{rounds += 1}", "Class\#{i}")
            engine.await(handle, 10_000) || raise("no record")
            engine.ack(handle)
          end
          rounds
        end
      end
      waiting = Thread.new { nil while engine.next_event(60_000) != :stopped }
      GC.auto_compact = true
      20.times do
        GC.compact
        Native.read_key(SETTINGS[:redis], "key", 1_000)
      end
      GC.verify_compaction_references(toward: :empty)
      all_methods(SETTINGS.merge(namespace: "other"))
      working = false
      puts JSON.generate(workers.map(&:value))
      engine.leave(10_000) || raise("not left")
      waiting.join(10) || raise("it goes on")
    RUBY
    expect(rounds).to all(be > 0)
    expect(Queues.identities(redis, namespace: Engines::NAMESPACE)).to be_empty
  end

  it "of engines that nobody holds any more ends none of their threads in the middle of a thing" do
    left = run(<<~RUBY).last
      20.times do
        engine = Native::Engine.start(SETTINGS)
        engine.track("queue", "job", nil)
        engine.leave(1_000)
      end
      Native::Engine.start(SETTINGS)
      5.times { GC.start }
      kept = start_engine
      GC.start
      kept.ack(recorded(kept, "job"))
      puts JSON.generate(kept.leave(10_000))
    RUBY
    expect(left).to be(true)
  end
end
