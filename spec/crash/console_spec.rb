# frozen_string_literal: true

# `reenqueue_orphans!` from a process that is no worker: a console, a deploy script.
RSpec.describe "reenqueue_orphans!" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:env) { {"HEARTBEAT_INTERVAL" => AppProcess::INTERVAL.to_s, "HEARTBEAT_TTL" => AppProcess::TTL.to_s} }

  # @return [String] what a console prints
  def reenqueue_orphans(url: redis.url, env: self.env)
    output, = RubyProcess.run_ruby(<<~RUBY, env: env.merge("REDIS_URL" => url))
      begin
        p Sidekiq::ProcessingTracker.reenqueue_orphans!.slice(:requeued)
      rescue => error
        puts error.class, error.message
      end
    RUBY
    output
  end

  def employ(worker, count)
    Array.new(count) { Queues.push(redis, Queues.marked("GatedJob", gate.path)) }.each do |payload|
      worker.runs(Queues.jid(payload))
    end
  end

  it "recovers after a kill -9 with no worker alive" do
    victim = SidekiqProcess.new(redis).up
    payloads = employ(victim, 2)
    victim.kill
    expect(reenqueue_orphans).to include("{:requeued=>2}")
    expect(Queues.queued(redis)).to match_array(payloads)
    expect(Queues.keys_of_instances(redis)).to be_empty
    expect(Queues.journal(redis).map { |job| job["from"] }.uniq).to eq([victim.identity])
    expect(reenqueue_orphans).to include("{:requeued=>0}")
  end

  it "returns when the living have renewed and the dead are recovered, and touches no living one's jobs" do
    victim = SidekiqProcess.new(redis).up
    payloads = employ(victim, 2)
    living = SidekiqProcess.new(redis, queues: ["later"], concurrency: 1).up
    kept = Queues.push(redis, Queues.marked("GatedJob", gate.path, queue: "later"), queue: "later")
    living.runs(Queues.jid(kept))
    victim.kill
    # Either of the two may be the one that recovers.
    count = reenqueue_orphans[/:requeued=>(\d+)/, 1].to_i
    expect(Queues.queued(redis)).to match_array(payloads)
    expect(Queues.in_flight(redis)).to eq(living.identity => [kept])
    by_living = Queues.journal(redis).count { |job| job["by"] == living.identity }
    expect(count + by_living).to eq(2)
    expect(living.log).not_to include("lost the lease")
  end

  it "has nothing to wait for where nobody ever was" do
    expect(reenqueue_orphans(env: {})).to include("{:requeued=>0}")
  end

  it "raises a ConnectionError when Redis is away, or goes away while it waits" do
    expect(reenqueue_orphans(url: "redis://127.0.0.1:1/0")).to include("Sidekiq::ProcessingTracker::ConnectionError\n")

    victim = SidekiqProcess.new(redis).up
    employ(victim, 1)
    victim.kill
    clock = redis.call("HGET", "sidekiq_processing:clock", "now")
    console = Thread.new { reenqueue_orphans(env: env.merge("HEARTBEAT_TTL" => "30")) }
    eventually("the console's first look") { redis.call("HGET", "sidekiq_processing:clock", "now") != clock }
    redis.stop
    expect(console.value).to include("Sidekiq::ProcessingTracker::ConnectionError\n")
  end
end
