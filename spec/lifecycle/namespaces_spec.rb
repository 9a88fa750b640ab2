# frozen_string_literal: true

# Several applications on one Redis, with a namespace each.
RSpec.describe "applications with namespaces of their own" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def start(name)
    SidekiqProcess.new(redis, queues: [name], env: {"PROCESSING_NS" => name}).up
  end

  def push(name)
    Queues.push(redis, Queues.marked("GatedJob", gate.path, queue: name), queue: name)
  end

  with_each_fetch do
    it "leave each other's orphans alone, and recover their own" do
      shop, blog = %w[shop blog].map { |name| start(name) }
      cut_off, other = push("shop"), push("blog")
      shop.runs(Queues.jid(cut_off))
      blog.runs(Queues.jid(other))
      shop.kill
      let_pass(AppProcess::TTL + 4 * AppProcess::STEP)
      expect(Queues.in_flight(redis, namespace: "shop")).to eq(shop.identity => [cut_off])
      expect(Queues.in_flight(redis, namespace: "blog")).to eq(blog.identity => [other])

      heir = start("shop").runs(Queues.jid(cut_off))
      gate.open
      eventually("both ends") { heir.done == [Queues.jid(cut_off)] && blog.done == [Queues.jid(other)] }
      expect(Queues.journal(redis, namespace: "shop").map { |job| job.values_at("jid", "queue", "outcome") })
        .to eq([[Queues.jid(cut_off), "shop", "requeued"]])
      expect(Queues.journal(redis, namespace: "blog")).to be_empty
      expect(redis.call("KEYS", "sidekiq_processing:*")).to be_empty
    end
  end
end
