# frozen_string_literal: true

RSpec.describe "instances and stats" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:now_ms) { redis.call("TIME").first.to_i * 1000 }

  def states(tracker) = tracker.instances.to_h { |instance| [instance.identity, instance.state] }

  it "tells of a real process what there is to tell" do
    tracker = Watching.watch(redis, namespace: "sidekiq_processing")
    before = Time.now - 1
    worker = SidekiqProcess.new(redis, concurrency: 3, queues: %w[default a:b], env: {"PROCESSING_INSTANCE_ID" => "pod:a:1"}).up
    payload = Queues.push(redis, Queues.marked("GatedJob", gate.path, "secret"))
    worker.runs(Queues.jid(payload))
    instance, *others = tracker.instances
    expect(others).to be_empty
    expect(instance).to have_attributes(
      identity: worker.identity, instance_id: "pod:a:1", hostname: Socket.gethostname, pid: worker.pid, state: :running,
      in_flight: 1, queues: %w[default a:b], concurrency: 3, sidekiq_identity: a_string_including(worker.pid.to_s)
    )
    expect([instance.started_at, instance.last_beat_at]).to all(be_between(before, Time.now + 1))
    eventually("the next beat") { tracker.instances.first.last_beat_at > instance.last_beat_at }
    expect(tracker.stats).to eq(
      totals: {requeued: 0, dead: 0, discarded: 0, superseded: 0, expired: 0},
      instances: {running: 1, silent: 0, dead: 0, recovering: 0}, in_flight: 1, orphans: 0
    )
    expect([instance.inspect, instance.to_s, tracker.in_flight.to_a.inspect].join).not_to include("secret")

    worker.kill
    eventually("the silence") { tracker.stats[:instances][:silent] == 1 }
    expect(tracker.stats).to include(in_flight: 1, orphans: 0)
    other = SidekiqProcess.new(redis, queues: ["later"]).up
    eventually("the recovery") { tracker.stats[:totals][:requeued] == 1 }
    eventually("its end") { states(tracker) == {other.identity => :running} }
  end

  it "tells the living from the dead and from those that are being recovered" do
    tracker = Watching.watch(redis)
    Engines.start_clock(redis)
    running, dead, fenced, held, left = %w[running dead fenced held left].map { |name| "#{name}:1:#{SecureRandom.hex(16)}" }
    Engines.orphan(redis, "{}", identity: running, lease_end: now_ms + 30_000)
    Engines.orphan(redis, "{}", "{}", identity: dead, lease_end: now_ms - 60_000)
    Engines.orphan(redis, "{}", identity: fenced, lease_end: now_ms - 60_000)
    Engines.orphan(redis, "{}", identity: held, lease_end: now_ms + 30_000)
    Engines.orphan(redis, "{}", identity: left, lease_end: 0)
    [fenced, held, left].each { |identity| redis.call("HDEL", "native:inflight:#{identity}", "call") }
    redis.call("HSET", "native:info:#{held}", "progress", 1_700_000_000_000)
    expect(states(tracker)).to eq(running => :running, dead => :dead, fenced => :dead, held => :recovering, left => :dead)
    expect(tracker.stats).to include(instances: {running: 1, silent: 0, dead: 3, recovering: 1}, in_flight: 1, orphans: 5)
    by_identity = tracker.instances.to_h { |instance| [instance.identity, instance] }
    expect(by_identity[held].last_beat_at).to eq(Time.at(1_700_000_000))
    expect(by_identity[running].last_beat_at).to be_within(5).of(Time.now)
    expect(by_identity[left].last_beat_at).to be_nil
    expect(by_identity[dead]).to have_attributes(in_flight: 2, instance_id: "dead", pid: 1, hostname: nil, queues: [])
  end

  it "says that a fleet is silent which nobody is left to recover" do
    tracker = Watching.watch(redis)
    redis.call("HSET", "native:clock", "now", 5_000_000, "seen", now_ms - 600_000, "step", 5_000, "ttl", 30_000)
    dead = Engines.orphan(redis, "{}", lease_end: 5_020_000)
    expect(states(tracker)).to eq(dead => :silent)
    expect(tracker.instances.first.last_beat_at).to be_within(5).of(Time.now - 610)
  end

  it "bears what others have written into its keys" do
    tracker = Watching.watch(redis)
    overwritten = Engines.orphan(redis, "{}", identity: "over:1:#{SecureRandom.hex(16)}")
    odd = Engines.orphan(redis, "{}", identity: "no identity\xff".b)
    plain = Engines.orphan(redis, "{}")
    redis.call("SET", "native:inflight:#{overwritten}", "x")
    redis.call("SET", "native:info:#{plain}", "x")
    redis.call("HSET", "native:info:#{odd}", "pid", "x", "started_at", "-1", "queues", "a,b,\xff", "concurrency", "1e9")
    seen = tracker.instances.to_h { |instance| [instance.identity.b, instance] }
    expect(seen[overwritten.b]).to have_attributes(state: :dead, in_flight: nil)
    expect(seen[odd]).to have_attributes(pid: nil, started_at: nil, queues: ["a", "b", "\uFFFD"], concurrency: nil, in_flight: 1)
    expect(seen[plain.b]).to have_attributes(hostname: nil, in_flight: 1, queues: [])
    expect(tracker.stats).to include(orphans: 2)
    redis.call("DEL", "native:clock")
    redis.call("SET", "native:clock", "x")
    expect(tracker.instances.map(&:state).uniq).to contain_exactly(:silent, :recovering)

    redis.call("DEL", "native:instances")
    redis.call("SET", "native:instances", "x")
    expect { tracker.instances }
      .to raise_error(Sidekiq::ProcessingTracker::ConnectionError, /the key native:instances holds something that is no zset/)
  end

  it "sees many instances, and none" do
    tracker = Watching.watch(redis)
    expect([tracker.instances, tracker.in_flight.to_a, tracker.journal]).to eq([[], [], []])
    identities = Array.new(250) { Engines.orphan(redis, "{}") }
    expect(tracker.instances.map(&:identity)).to match_array(identities)
    expect(tracker.stats[:orphans]).to eq(250)
  end

  it "changes nothing, and says so when Redis is away" do
    tracker = Watching.watch(redis)
    Engines.orphan(redis, "{}")
    dump = -> { redis.call("KEYS", "*").sort.to_h { |key| [key, redis.call("DUMP", key)] } }
    before = dump.call
    [tracker.instances, tracker.stats, tracker.in_flight.to_a, tracker.journal]
    expect(dump.call).to eq(before)
    redis.stop
    [-> { tracker.instances }, -> { tracker.stats }, -> { tracker.in_flight.to_a }, -> { tracker.journal }].each do |call|
      expect(&call).to raise_error(Sidekiq::ProcessingTracker::ConnectionError)
    end
  end

  it "gives frozen values that can be compared and matched" do
    tracker = Watching.watch(redis)
    Engines.orphan(redis, "{}")
    first, second = Array.new(2) { tracker.in_flight.first }
    expect(first).to eq(second).and(be_frozen)
    expect(first).not_to respond_to(:jid=)
    expect(first.inspect).to match(/\A#<Sidekiq::ProcessingTracker::InFlightJob queue="default" since=.* identity="dead:1:/)
  end
end
