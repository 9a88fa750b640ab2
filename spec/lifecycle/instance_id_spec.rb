# frozen_string_literal: true

# An instance_id is a label for people. Who is who is told by the identity alone.
RSpec.describe "instance ids" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def start(id, **options)
    SidekiqProcess.new(redis, env: {"PROCESSING_INSTANCE_ID" => id}, concurrency: 1, **options)
  end

  def employ(worker, queue: "default")
    payload = Queues.push(redis, Queues.marked("GatedJob", gate.path, queue: queue), queue: queue)
    worker.runs(Queues.jid(payload))
    payload
  end

  it "may come back after a kill -9: the new process recovers the old one's job and keeps its own" do
    old = start("pod-1").up
    orphan = employ(old)
    old.kill
    successor = start("pod-1", queues: ["later"]).up
    own = employ(successor, queue: "later")
    expect([old, successor].map { |worker| worker.identity[/\A(.+):\d+:\h{32}\z/, 1] }).to eq(%w[pod-1 pod-1])

    eventually("the recovery") { Queues.queued(redis) == [orphan] }
    expect(Queues.in_flight(redis)).to eq(successor.identity => [own])
    expect(Queues.journal(redis).map { |job| job.values_at("from", "by") }).to eq([[old.identity, successor.identity]])
    expect(successor.log).not_to include("lost the lease")
  end

  it "may be the same in two living processes, and hold colons: the death of one is none of the other's" do
    id = "eu:shop:1"
    one, two = %w[default later].map { |queue| start(id, queues: [queue]) }.each(&:up)
    orphan = employ(one)
    kept = employ(two, queue: "later")
    expect(Queues.identities(redis)).to contain_exactly(one.identity, two.identity)
    expect(Queues.identities(redis)).to all(match(/\Aeu:shop:1:\d+:\h{32}\z/))
    one.kill
    eventually("the recovery") { Queues.queued(redis) == [orphan] }
    expect(Queues.in_flight(redis)).to eq(two.identity => [kept])
    expect(Queues.journal(redis).map { |job| job.values_at("from", "by") }).to eq([[one.identity, two.identity]])
    two.wait_for_log(/queue=default from=#{one.identity} outcome=requeued/)
    expect(two.log).not_to include("lost the lease")
    gate.open
    eventually("the ack") { Queues.in_flight(redis) == {two.identity => []} }
  end
end
