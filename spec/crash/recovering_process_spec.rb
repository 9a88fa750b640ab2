# frozen_string_literal: true

# The worker that recovers is killed as well, in the middle of it. (The tests of the core kill it at every single step.)
RSpec.describe "kill -9 of the process that recovers" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # A piece of a recovery is 1 MB, so this many of this size take ten pieces.
  let(:jobs) { 20 }
  let(:size) { 500_000 }

  # Polls as fast as it can, so that the kill comes in the middle.
  def kill_when(process)
    redis.with do |client|
      deadline = now + 15
      until yield(client)
        raise "it never came to that" if now > deadline
      end
      process.kill
    end
  end

  def in_flight(client, identity)
    client.call("HLEN", "sidekiq_processing:inflight:#{identity}")
  end

  def fenced?(client, identity)
    client.call("HEXISTS", "sidekiq_processing:inflight:#{identity}", "call").zero?
  end

  it "loses nothing and puts nothing back twice" do |example|
    victim = SidekiqProcess.new(redis, concurrency: jobs).up
    payloads = Array.new(jobs) { |i| Queues.push(redis, Queues.marked("GatedJob", gate.path, i, "x" * size)) }
    jids = payloads.map { |payload| Queues.jid(payload) }
    victim.runs(*jids)
    dead = victim.identity
    victim.kill

    kill_when(SidekiqProcess.new(redis, queues: ["later"]).up) { |client| fenced?(client, dead) }
    left = [redis.with { |client| in_flight(client, dead) }]
    expect(Queues.everywhere(redis)).to match_array(payloads)

    if left.last.positive?
      kill_when(SidekiqProcess.new(redis, queues: ["later"]).up) { |client| in_flight(client, dead) < left.last }
      left << redis.with { |client| in_flight(client, dead) }
      expect(Queues.everywhere(redis)).to match_array(payloads)
    end
    example.reporter.message("  in flight after each kill: #{left.join(", ")} of #{jobs}")

    SidekiqProcess.new(redis, queues: ["later"]).up
    eventually("the rest of the recovery") { Queues.identities(redis).size == 1 }
    expect(Queues.queued(redis)).to match_array(payloads)
    expect(Queues.journal(redis).map { |job| job["jid"] }).to match_array(jids)

    gate.open
    runner = SidekiqProcess.new(redis, concurrency: jobs).up
    eventually("the second runs") { runner.done.size == jobs }
    eventually("the acks") { Queues.everywhere(redis).empty? }
    expect(runner.started).to match_array(jids)
  end

  it "recovers as well when every process lives shorter than a lease" do |example|
    victim = SidekiqProcess.new(redis, queues: ["default"]).up
    payload = Queues.push(redis, Queues.marked("GatedJob", gate.path))
    victim.runs(Queues.jid(payload))
    dead = victim.identity
    victim.kill
    killed = now

    lives = 0
    until Queues.queued(redis) == [payload]
      raise "not recovered after #{lives} short lives" if lives == 15

      shortlived = SidekiqProcess.new(redis, queues: ["later"]).up
      lives += 1
      let_pass(AppProcess::TTL / 2.0)
      shortlived.kill
    end
    example.reporter.message("  crash loop: back after #{(now - killed).round(1)} s and #{lives} lives of #{AppProcess::TTL / 2.0} s")
    expect(Queues.everywhere(redis)).to eq([payload])
    expect(Queues.identities(redis)).not_to include(dead)
    expect(Queues.journal(redis).map { |job| job["from"] }).to eq([dead])
  end
end
