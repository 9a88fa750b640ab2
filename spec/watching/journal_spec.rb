# frozen_string_literal: true

RSpec.describe "journal" do
  let(:redis) { RedisServer.new }

  it "has the last orphans of every process, the newest first" do
    payloads = Array.new(30) { |i| Queues.marked("PaymentJob", "secret", i) }
    dead = payloads.each_slice(6).map { |some| Engines.orphan(redis, *some) }
    tracker = Watching.watch(redis)
    env = {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE}
    RubyProcess.run_ruby("Sidekiq::ProcessingTracker.reenqueue_orphans!", env: env)
    events = tracker.journal
    expect(events.map(&:jid)).to match_array(payloads.map { |payload| Queues.jid(payload) })
    expect(events).to all(have_attributes(kind: :recovered, reason: nil, job_class: "PaymentJob", queue: "default", payload: nil,
      from: satisfy { |from| dead.include?(from) }, by: a_string_matching(/:\d+:\h{32}\z/), at: be_within(60).of(Time.now)))
    expect(events.map(&:at)).to eq(events.map(&:at).sort.reverse)
    expect(tracker.journal(count: 7)).to eq(events.take(7))
    expect(tracker.journal(count: 0)).to eq([])
    expect(tracker.journal(count: 10**30)).to eq(events)
    expect(events.map(&:jid)).to eq(Queues.journal(redis, namespace: Engines::NAMESPACE).map { |line| line["jid"] }.reverse)
  end

  it "leaves out what others have written there" do
    tracker = Watching.watch(redis)
    add = ->(*fields) { redis.call("XADD", "native:journal", "*", *fields) }
    head = ["from", "a:1:x", "by", "b:1:y", "piece", "p", "outcomes", "r"]
    add.call(*head, "jid", "j1", "class", "A", "queue", "q", "outcome", "requeued")
    add.call("foreign", "entry")
    add.call("from", "a", "jid", "no outcome")
    add.call("jid", "j", "outcome", "requeued")
    add.call(*head, "jid", "j2", "class", "", "queue", "q", "outcome", "evaporated")
    25.times { add.call("x", "y") }
    add.call(*head, "jid", "", "class", "", "queue", "q", "outcome", "dead", "reason", "unreadable", "recoveries", "2")
    add.call(*head, "jid", "j\xff", "class", "", "queue", "\xff", "outcome", "superseded", "reason", "\xff")
    add.call(*head, "jid", "gone", "class", "", "queue", "q", "outcome", "expired")
    expect(tracker.journal(count: 1)).to match([have_attributes(kind: :superseded)])
    expect(tracker.journal(count: 5)).to match([
      have_attributes(kind: :superseded, reason: satisfy { |reason| reason.to_s == "\uFFFD" }, jid: "j\xff"),
      have_attributes(kind: :dead, reason: :unreadable, recoveries: 2, jid: nil, job_class: nil, queue: "q"),
      have_attributes(kind: :recovered, jid: "j1", from: "a:1:x", by: "b:1:y", reason: nil, recoveries: nil)
    ])
  end

  it "says so when the key holds something else, and when the count is none" do
    tracker = Watching.watch(redis)
    redis.call("SET", "native:journal", "x")
    expect { tracker.journal }
      .to raise_error(Sidekiq::ProcessingTracker::ConnectionError, /native:journal holds something that is no stream/)
    [-1, 1.5, "5", nil].each { |count| expect { tracker.journal(count: count) }.to raise_error(ArgumentError, /count is/) }
  end
end
