# frozen_string_literal: true

# A death on the same host is not waited for. The lease is a minute here, so whatever runs again within the time of an example
# has not waited for its end.
RSpec.describe "kill -9 on a host where somebody looks" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def start(bundle, interval: 5, **settings) = SidekiqProcess.new(redis, interval: interval, ttl: 60, bundle: bundle, **settings)

  def push(*args)
    Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path, *args)))
  end

  def say(example, what, since)
    example.reporter.message("  kill -9 to re-run by #{what}: #{(now - since).round(2)} s (lease 60 s)")
  end

  {nil => "of the specs", :unique_jobs_7 => "6.5"}.each do |bundle, version|
    context("with Sidekiq #{version}", bundle: bundle) do
      it "runs its jobs again in the process that is started in its place" do |example|
        victim = start(bundle).up
        jid = push
        victim.runs(jid)
        victim.kill
        killed = now
        runner = start(bundle).runs(jid)
        say(example, "the next process, its boot included", killed)
        runner.wait_for_log(/found dead before its lease ran out: #{victim.identity}: its process #{victim.identity.split(":")[-2]} has ended/)
        gate.open
        eventually("the ack") { Queues.everywhere(redis).empty? }
        expect(Queues.journal(redis)).to contain_exactly(a_hash_including("jid" => jid, "from" => victim.identity, "outcome" => "requeued"))
        expect(Queues.identities(redis)).to eq([runner.identity])
        # Sidekiq gave the dead one a minute more on its page of the busy.
        expect(redis.call("SMEMBERS", "processes")).to contain_exactly(a_string_including(":#{runner.identity.split(":")[-2]}:"))
      end

      it "runs its jobs again in a neighbour" do |example|
        victim = start(bundle, interval: 1)
        jid = push
        victim.runs(jid)
        neighbour = start(bundle, interval: 1).up
        neighbour_has_beaten = Queues.lease_end(redis, neighbour.identity)
        eventually("a beat of the neighbour") { Queues.lease_end(redis, neighbour.identity) > neighbour_has_beaten }
        victim.kill
        killed = now
        neighbour.runs(jid)
        say(example, "a neighbour that beats every second", killed)
        gate.open
        eventually("the ack") { Queues.everywhere(redis).empty? }
        expect(neighbour.log).not_to include("lost the lease")
      end
    end
  end

  it "does not take over an exclusive instance_id from a process that lives, and says so" do
    env = {"PROCESSING_INSTANCE_ID" => "shop-0", "PROCESSING_EXCLUSIVE_INSTANCE_ID" => "true"}
    first = start(nil, env: env).up
    jid = push
    first.runs(jid)
    second = start(nil, env: env).up.wait_for_log(/exclusive_instance_id is set, but another process works as shop-0: process \d+ of this host/)
    gate.open
    eventually("the end of the job") { first.done == [jid] }
    expect([first.log, second.log].join).not_to match(/lost the lease|found dead/)
  end
end
