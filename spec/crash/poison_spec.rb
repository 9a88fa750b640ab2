# frozen_string_literal: true

# Jobs that kill their process, and those that ran beside them.
RSpec.describe "poison pills" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      # As sidekiq-unique-jobs and others do: then Sidekiq::Process is a class, which must not stand in the way of Ruby's own.
      require "sidekiq/api"

      class PillJob
        include Sidekiq::Job
        include Sidekiq::ProcessingTracker::Worker

        def perform(*)
          Process.kill(:KILL, Process.pid)
          sleep
        end
      end

      class InnocentJob
        include Sidekiq::Job
        include Sidekiq::ProcessingTracker::Worker

        def perform(*args)
          sleep 2
          note("done", [jid, Process.pid, *args].to_json)
        end
      end

      class UnmarkedJob
        include Sidekiq::Job

        def perform(gate, *)
          GatedJob.new.tap { |job| job.jid = jid }.perform(gate)
        end
      end
    RUBY
  end

  let(:listening) do
    <<~RUBY
      tracker = Sidekiq::ProcessingTracker
      tracker.on(*tracker::Event::KINDS) { |event| note("heard", [event.kind, event.reason, event.jid].to_json) }
    RUBY
  end

  def dead = redis.call("ZRANGE", "dead", 0, -1).map { |entry| JSON.parse(entry) }

  it "die alone: one among nine jobs of two seconds is the only one in the dead set" do |example|
    pill = Queues.push(redis, Queues.marked("PillJob"))
    innocents = Array.new(9) { |i| Queues.push(redis, Queues.marked("InnocentJob", i)) }
    begun = now
    workers = []
    eventually("the end of all ten", within: 150) do
      # What brings a killed process back, as an orchestrator does.
      workers << SidekiqProcess.new(redis, app: app, concurrency: 10) unless workers.last&.running?
      dead.any? && (innocents.map { |job| Queues.jid(job) } - Queues.notes(redis, "done").map(&:first)).empty?
    end
    example.reporter.message("  #{workers.size} processes, #{(now - begun).round} s")
    expect(dead.map { |job| job.values_at("jid", "error_class") }).to eq([[Queues.jid(pill), "Sidekiq::ProcessingTracker::PoisonPill"]])
    expect(dead.first["error_message"]).to include("4 times")
    expect(Queues.journal(redis).count { |line| line["outcome"] != "requeued" }).to eq(1)
    expect(workers.size).to eq(5)
    eventually("the acks") { Queues.everywhere(redis).empty? }
    counters = redis.call("KEYS", "sidekiq_processing:recoveries:*")
    expect(counters).to be_empty
  end

  it "and what may not run twice end where they say, and Sidekiq's Busy page knows them no more" do
    jobs = {
      pill: Queues.marked("GatedJob", gate.path), undying: Queues.marked("GatedJob", gate.path, dead: false),
      unmarked: Queues.payload("UnmarkedJob", gate.path), nowhere: Queues.payload("UnmarkedJob", gate.path, dead: false),
      innocent: Queues.marked("GatedJob", gate.path)
    }
    jids = jobs.transform_values { |payload| Queues.jid(payload) }
    jids.values_at(:pill, :undying).each { |jid| redis.call("SET", "sidekiq_processing:recoveries:#{jid}", 3, "EX", 600) }
    jobs.each_value { |payload| Queues.push(redis, payload) }
    victim = SidekiqProcess.new(redis, app: app, concurrency: jobs.size).up.runs(*jids.values)
    sidekiqs = redis.call("HGET", "sidekiq_processing:info:#{victim.identity}", "sidekiq_identity")
    eventually("Sidekiq's own beat") { redis.call("SMEMBERS", "processes") == [sidekiqs] }
    victim.kill
    reaper = SidekiqProcess.new(redis, app: app + listening, queues: ["later"]).up
    eventually("the recovery") { Queues.identities(redis) == [reaper.identity] }
    eventually("the callbacks") { Queues.notes(redis, "heard").size >= jobs.size }

    expect(Queues.queued(redis)).to eq([jobs[:innocent]])
    expect(dead.to_h { |job| [job["jid"], job["error_class"]] }).to eq(
      jids[:pill] => "Sidekiq::ProcessingTracker::PoisonPill", jids[:unmarked] => "Sidekiq::ProcessingTracker::Orphaned"
    )
    expect(dead.find { |job| job["jid"] == jids[:unmarked] }["error_message"]).to include("was not marked").and include(victim.identity)
    ends = Queues.journal(redis).to_h { |line| [line["jid"], line.values_at("outcome", "reason")] }
    expect(ends).to eq(
      jids[:pill] => %w[dead poison_pill], jids[:undying] => %w[discarded poison_pill], jids[:unmarked] => %w[dead unmarked],
      jids[:nowhere] => %w[discarded unmarked], jids[:innocent] => ["requeued", ""]
    )
    expect(redis.call("SMEMBERS", "processes")).not_to include(sidekiqs)
    expect(redis.call("EXISTS", sidekiqs, "#{sidekiqs}:work")).to eq(0)
    reaper.wait_for_log(/WARN.*moved job to the dead set: jid=#{jids[:unmarked]} .*reason=unmarked/)
    reaper.wait_for_log(/WARN.*discarded job: jid=#{jids[:undying]} .*reason=poison_pill/)
    # At its end it has told all that it had to tell.
    reaper.stop
    expect(Queues.notes(redis, "heard")).to contain_exactly(
      ["dead", "poison_pill", jids[:pill]], ["discarded", "poison_pill", jids[:undying]], ["dead", "unmarked", jids[:unmarked]],
      ["discarded", "unmarked", jids[:nowhere]], ["recovered", nil, jids[:innocent]]
    )
  end

  it "go back for ever where there is no limit" do
    env = {"MAX_RECOVERIES" => "unlimited"}
    payload = Queues.marked("GatedJob", gate.path)
    jid = Queues.jid(payload)
    redis.call("SET", "sidekiq_processing:recoveries:#{jid}", 99, "EX", 600)
    Queues.push(redis, payload)
    SidekiqProcess.new(redis, app: app, env: env).up.runs(jid).kill
    runner = SidekiqProcess.new(redis, app: app, env: env).up.runs(jid)
    runner.wait_for_log(/recovered job: jid=#{jid} .*outcome=requeued recoveries=100$/)
    expect(Queues.in_flight(redis)).to eq(runner.identity => [payload])
    expect(dead).to be_empty
    gate.open
    eventually("its ack, which clears the count") { redis.call("KEYS", "sidekiq_processing:recoveries:*").empty? }
  end
end
