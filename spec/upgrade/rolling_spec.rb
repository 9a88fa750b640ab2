# frozen_string_literal: true

# From the 1.0 gem to this one, and back, with processes of both at the same time.
RSpec.describe "an upgrade from 1.0" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:env) { {"HEARTBEAT_INTERVAL" => AppProcess::INTERVAL.to_s, "HEARTBEAT_TTL" => AppProcess::TTL.to_s} }

  # @return [Array<String>] the jids
  def employ(worker, count, queue: "default")
    jids = Array.new(count) { |i| Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path, i, queue: queue), queue: queue)) }
    worker.runs(*jids)
    jids
  end

  # @return [String] what a console prints
  def reenqueue_orphans
    output, = RubyProcess.run_ruby(<<~RUBY, env: env.merge("REDIS_URL" => redis.url))
      p Sidekiq::ProcessingTracker.reenqueue_orphans!
    RUBY
    output
  end

  # Returns when somebody has looked for what 1.0 has left, and has seen living processes of it, or none.
  def wait_for_search(minutes:)
    eventually("the end of a search") { redis.call("HGET", "sidekiq_processing:clock", "scan_after") == (minutes * 60_000).to_s }
  end

  it "recovers what a killed process of 1.0 has left, byte for byte" do
    old = LegacyProcess.new(redis, instance: "web:1").up
    jids = employ(old, 2)
    recorded = old.recorded
    expect(recorded.keys).to match_array(jids)
    old.kill
    eventually("the end of its heartbeat") { redis.call("EXISTS", "sidekiq_processing:instance:web:1").zero? }

    recoverer = SidekiqProcess.new(redis, queues: ["later"]).up
    eventually("the recovery") { Queues.queued(redis).size == 2 }
    expect(Queues.queued(redis)).to match_array(recorded.values)
    eventually("the end of it") { Queues.identities(redis) == [recoverer.identity] }
    expect(LegacyProcess.keys(redis)).to be_empty
    expect(Queues.journal(redis)).to match_array(jids.map { |jid|
      a_hash_including("from" => "1.0 web:1", "by" => recoverer.identity, "jid" => jid, "class" => "GatedJob", "outcome" => "requeued")
    })
    jids.each { |jid| recoverer.wait_for_log(/recovered job: jid=#{jid} class=GatedJob queue=default from="1\.0 web:1" outcome=requeued/) }

    gate.open
    runner = SidekiqProcess.new(redis).up
    eventually("the second runs") { runner.done.size == 2 }
    expect(runner.done).to match_array(jids)
  end

  it "leaves a living process of 1.0 alone, which goes on beside the new ones" do
    old = LegacyProcess.new(redis, instance: "web:1", queues: ["old"]).up
    jids = employ(old, 2, queue: "old")
    before = old.recorded
    new = SidekiqProcess.new(redis).up
    own = employ(new, 1)
    wait_for_search(minutes: 10)
    let_pass(AppProcess::TTL + (2 * AppProcess::STEP))
    expect(reenqueue_orphans).to include("requeued: 0").or include(":requeued=>0")
    expect(old.recorded).to eq(before)
    expect(Queues.queued(redis, queue: "old")).to be_empty

    gate.open
    eventually("the end of all jobs") { old.done.size == 2 && new.done.size == 1 }
    expect([old.done, new.done]).to match([match_array(jids), own])
    eventually("the acks") { LegacyProcess.keys(redis) == ["sidekiq_processing:instance:web:1"] }
    expect(Queues.journal(redis)).to be_empty
  end

  it "replaces the processes one by one, one of them killed, without losing a job or running one twice" do
    olds = Array.new(2) { |i| LegacyProcess.new(redis, instance: "web:#{i}", queues: ["q#{i}"], timeout: 1).up }
    jids = olds.each_with_index.map { |old, i| employ(old, 2, queue: "q#{i}") }
    news = [SidekiqProcess.new(redis, queues: %w[q0 q1], concurrency: 5).up]
    # At the end of Sidekiq's timeout 1.0 gives its jobs back itself.
    olds[0].signal(:TERM).process.wait
    news[0].runs(*jids[0])
    olds[1].kill
    eventually("the end of its heartbeat") { redis.call("EXISTS", "sidekiq_processing:instance:web:1").zero? }
    # The console finds it and waits until it counts as dead. Then either of the two may be the one that recovers.
    count = reenqueue_orphans[/requeued(?:: |=>)(\d+)/, 1].to_i
    lines = Queues.journal(redis).select { |line| line["from"] == "1.0 web:1" }
    expect(lines.map { |line| line["jid"] }).to match_array(jids[1])
    expect(count + lines.count { |line| line["by"] == news[0].identity }).to eq(2)
    news[0].runs(*jids[1])
    gate.open
    eventually("the end of all jobs") { news[0].done.size == 4 }
    expect(news[0].started).to match_array(jids.flatten)
    expect(LegacyProcess.keys(redis)).to be_empty
  end

  it "recovers from a console what 1.0 has left, and nothing of a living process" do
    dead = LegacyProcess.new(redis, instance: "worker a:1:2", queues: ["dead"]).up
    alive = LegacyProcess.new(redis, instance: "worker a:1", queues: ["alive"]).up
    jids = employ(dead, 2, queue: "dead")
    employ(alive, 2, queue: "alive")
    before = alive.recorded
    recorded = dead.recorded
    dead.kill
    eventually("the end of its heartbeat") { redis.call("EXISTS", "sidekiq_processing:instance:worker a:1:2").zero? }
    expect(reenqueue_orphans).to include("requeued: 2").or include(":requeued=>2")
    expect(Queues.queued(redis, queue: "dead")).to match_array(recorded.values)
    expect(recorded.keys).to match_array(jids)
    expect(alive.recorded).to eq(before)
    expect(Queues.identities(redis)).to be_empty
    expect(dead.recorded).to be_empty
  end

  it "does not disturb 1.0 after a way back: each recovers its own" do
    new = SidekiqProcess.new(redis, queues: ["new"]).up
    ours = employ(new, 1, queue: "new")
    old = LegacyProcess.new(redis, instance: "web:1", queues: ["old"]).up
    theirs = employ(old, 1, queue: "old")
    new.kill
    old.kill
    eventually("the end of its heartbeat") { redis.call("EXISTS", "sidekiq_processing:instance:web:1").zero? }

    # With all the keys of the new gem in the same namespace.
    back = LegacyProcess.new(redis, instance: "web:2", queues: %w[old new]).up
    expect(back.recovered).to eq(theirs)
    back.runs(*theirs)
    expect(Queues.in_flight(redis).values.flatten.map { |payload| Queues.jid(payload) }).to eq(ours)
    expect(reenqueue_orphans).to include("requeued: 1").or include(":requeued=>1")
    back.runs(*ours)
    expect(Queues.keys_of_instances(redis).grep_v(/:instance:web:2/)).to be_empty

    gate.open
    eventually("the end of all jobs") { back.done.size == 2 }
    expect(back.started).to match_array(theirs + ours)
  end
end
