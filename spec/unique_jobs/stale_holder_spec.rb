# frozen_string_literal: true

# A lock whose holder is a job that is nowhere any more: it was lost, and nobody has cleaned up after it.
RSpec.describe "a stale holder of an orphan's unique lock" do
  let(:redis) { RedisServer.new }
  let(:payload) { Queues.marked("PaymentJob", 1, lock: "until_executed", lock_digest: "uniquejobs:d", lock_limit: 1) }

  it "has it superseded: it does not go back, and is in the event only" do
    redis.call("HSET", "uniquejobs:d:LOCKED", "stale", "1700000000")
    Engines.orphan(redis, payload)
    output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE})
      Sidekiq.logger.level = Logger::FATAL
      Sidekiq::ProcessingTracker.on(:superseded) { |event| puts event.payload }
      Sidekiq::ProcessingTracker.reenqueue_orphans!
    RUBY
    expect(output).to eq("#{payload}\n")
    expect(Queues.queued(redis)).to be_empty
    expect(redis.call("HKEYS", "uniquejobs:d:LOCKED")).to eq(["stale"])
    expect(Watching.watch(redis).journal).to match([have_attributes(kind: :superseded, jid: Queues.jid(payload), payload: nil)])
  end
end
