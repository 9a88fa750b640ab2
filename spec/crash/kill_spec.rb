# frozen_string_literal: true

# The gem's main job: a worker dies in the middle of its jobs, and they run elsewhere.
RSpec.describe "kill -9 of a worker" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # Seconds from a kill to the re-run on a loaded machine, beyond what the protocol says.
  let(:noise) { 8 }

  def push(*args, queue: "default", **fields)
    payload = Queues.marked("GatedJob", gate.path, *args, queue: queue, **fields)
    Queues.jid(Queues.push(redis, payload, queue: queue))
  end

  with_each_fetch do
    it "runs its jobs again elsewhere, once" do |example|
      victim = SidekiqProcess.new(redis).up
      other = SidekiqProcess.new(redis, queues: ["later"]).up
      third = SidekiqProcess.new(redis).up
      third.signal(:TSTP).wait_for_log(/no longer accepting new work/)
      jids = [push(1), push(2)]
      victim.runs(*jids)

      victim.kill
      killed = now
      runner = SidekiqProcess.new(redis, concurrency: 3).up
      runner.runs(*jids)
      seconds = now - killed
      example.reporter.message("  kill -9 to re-run: #{seconds.round(2)} s (ttl #{AppProcess::TTL} s, step #{AppProcess::STEP} s)")
      expect(seconds).to be < AppProcess::TTL + AppProcess::STEP + 1 + noise

      gate.open
      eventually("the end of the jobs") { (jids - runner.done).empty? }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(Queues.identities(redis)).to contain_exactly(other.identity, third.identity, runner.identity)
      expect(Queues.journal(redis)).to match_array(jids.map { |jid|
        a_hash_including("from" => victim.identity, "jid" => jid, "class" => "GatedJob", "queue" => "default", "outcome" => "requeued")
      })
      expect(redis.call("HGETALL", "sidekiq_processing:stats")).to eq("requeued" => "2")
      expect([*victim.done, *other.started, *third.started]).to be_empty
      expect([runner.started, runner.done]).to all(match_array(jids))
      lines = -> { [other, third, runner].flat_map { |process| process.log.scan(/recovered job: (.*)$/).flatten } }
      eventually("a line for each") { lines.call.size >= jids.size }
      expect(lines.call).to match_array(jids.map { |jid| "jid=#{jid} class=GatedJob queue=default from=#{victim.identity} outcome=requeued" })
    end

    it "runs them again when the worker that runs them next dies too" do
      jid = push
      workers = Array.new(2) { SidekiqProcess.new(redis).up.runs(jid).tap(&:kill) }
      last = SidekiqProcess.new(redis).up.runs(jid)
      gate.open
      eventually("the end of the job") { last.done == [jid] }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(Queues.journal(redis).map { |job| job.values_at("from", "jid") }).to eq(workers.map { |worker| [worker.identity, jid] })
      expect(Queues.identities(redis)).to eq([last.identity])
    end

    it "gives the jobs of each queue back to that queue, the oldest first" do
      victim = SidekiqProcess.new(redis, queues: %w[default a:b], concurrency: 6).up
      jids = %w[default a:b].to_h do |queue|
        # One after the other, so that their order is known.
        [queue, Array.new(3) { |i| push(i, queue: queue).tap { |jid| victim.runs(jid) } }]
      end
      victim.kill
      redis.call("DEL", "queues")
      SidekiqProcess.new(redis, queues: ["later"]).up
      eventually("the recovery") { Queues.journal(redis).size == 6 }
      jids.each do |queue, own|
        expect(Queues.queued(redis, queue: queue).map { |payload| Queues.jid(payload) }).to eq(own)
      end
      expect(redis.call("SMEMBERS", "queues")).to match_array(jids.keys)
    end
  end
end
