# frozen_string_literal: true

# Several capsules in one process, which Sidekiq has since 7.0: each has its own threads, queues and fetcher.
RSpec.describe "capsules", if: Sidekiq.respond_to?(:default_configuration) do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      Sidekiq.configure_server do |config|
        config.capsule("single") do |capsule|
          capsule.concurrency = 1
          capsule.queues = %w[single]
        end
      end
    RUBY
  end

  def push(queue)
    Queues.push(redis, Queues.marked("GatedJob", gate.path, queue: queue), queue: queue)
  end

  with_each_fetch do
    it "keep to their queues and their concurrency, and are recovered together" do
      many = Array.new(2) { push("default") }
      first, second = Array.new(2) { push("single") }
      worker = SidekiqProcess.new(redis, app: app, concurrency: 3).up.runs(*[*many, first].map { |payload| Queues.jid(payload) })
      expect(redis.call("HMGET", "sidekiq_processing:info:#{worker.identity}", "queues", "concurrency")).to eq(["default,single", "4"])
      expect(worker.started).not_to include(Queues.jid(second))
      worker.kill

      other = SidekiqProcess.new(redis, app: app, concurrency: 3).up.runs(*many.map { |payload| Queues.jid(payload) })
      single = [first, second].map { |payload| Queues.jid(payload) }
      eventually("the return of the first") { Queues.journal(redis).any? { |job| job["jid"] == single.first } }
      eventually("one of them") { (other.started & single).any? }
      expect((other.started & single).size).to eq(1)
      gate.open
      eventually("all ends") { other.done.sort == [*many.map { |payload| Queues.jid(payload) }, *single].sort }
      expect(other.stop).to be_success
      expect(Queues.everywhere(redis) + Queues.everywhere(redis, queue: "single")).to be_empty
      requeued = Queues.journal(redis).map { |job| job.values_at("jid", "queue", "outcome") }
      expect(requeued).to include(*many.map { |payload| [Queues.jid(payload), "default", "requeued"] }, [Queues.jid(first), "single", "requeued"])
    end
  end
end
