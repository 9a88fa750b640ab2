# frozen_string_literal: true

# Many threads at once, as in a large Sidekiq process.
RSpec.describe "many threads" do
  let(:redis) { RedisServer.new }

  it "that track, await and end jobs leave nothing in flight and lose nothing" do
    engine = Engines.start_engine(redis)
    deadline = now + 2
    threads = Array.new(20) do |i|
      Thread.new do
        done = Hash.new(0)
        until now > deadline
          payload = "#{i}-#{done.values.sum}"
          handle = engine.track("default", payload, ("Class#{i}" if done.empty?))
          recorded = rand(4).zero? || engine.await(handle, 10_000)
          case rand(10)
          when 0
            done[:pushed] += engine.requeue([handle], 10_000)["unrecorded"].size
            done[:requeued] += 1
          when 1
            engine.release(handle)
            done[:released] += 1
          else
            engine.ack(handle)
            done[:acked] += 1
          end
          recorded || raise("no record")
        end
        done
      end
    end
    done = threads.map(&:value).reduce { |all, one| all.merge(one) { |_, a, b| a + b } }
    identity = engine.identity
    # A released job is settled as an orphan is, which takes a call of its own; here the last ones go with leaving.
    eventually("no more acks") { Engines.fields(redis, identity).size - 1 <= done[:released] }
    expect(engine.leave(10_000)).to be(true)
    expect(done[:acked]).to be > 500
    queued = Queues.queued(redis)
    expect(queued.uniq.size).to eq(queued.size)
    expect(queued.size).to eq(done[:requeued] - done[:pushed] + done[:released])
    rest = redis.call("KEYS", "#{Engines::NAMESPACE}:*") - %w[clock journal stats].map { |name| "#{Engines::NAMESPACE}:#{name}" }
    expect(rest).to all(start_with("#{Engines::NAMESPACE}:recoveries"))
    expect(rest.map { |key| redis.call("TTL", key) }).to all(be_positive)
  end

  it "that only ack leave nothing in flight" do
    engine = Engines.start_engine(redis)
    deadline = now + 1
    Array.new(20) { |i|
      Thread.new do
        until now > deadline
          handle = engine.track("default", "job #{i}", nil)
          engine.await(handle, 10_000) || raise("no record")
          engine.ack(handle)
        end
      end
    }.each(&:join)
    eventually("an empty in-flight hash") { Engines.fields(redis, engine.identity) == ["call"] }
    expect(engine.next_event(0)).to be_nil
    expect(engine.leave(10_000)).to be(true)
    expect(redis.call("KEYS", "*")).to eq(["#{Engines::NAMESPACE}:clock"])
  end

  it "may all leave at once" do
    engine = Engines.start_engine(redis)
    Engines.recorded(engine, "job")
    reader = BlockedThread.blocked { engine.next_event(60_000) }
    expect(Array.new(10) { Thread.new { engine.leave(10_000) } }.map(&:value)).to all(be(true))
    expect(reader.value).to eq(:stopped)
    expect(Queues.queued(redis)).to eq(["job"])
  end

  it "may run several engines" do
    engines = Array.new(5) { |i| Engines.start_engine(redis, instance_id: "spec#{i}") }
    engines.each_with_index { |engine, i| Engines.recorded(engine, "job #{i}") }
    expect(engines.map(&:identity).uniq.size).to eq(5)
    expect(engines.map { |engine| Thread.new { engine.leave(10_000) } }.map(&:value)).to all(be(true))
    expect(Queues.queued(redis).sort).to eq(Array.new(5) { |i| "job #{i}" })
  end
end
