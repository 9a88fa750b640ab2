# frozen_string_literal: true

# The reliable fetch of sidekiq-unique-jobs 9, where the app has chosen it: it keeps jobs in lists of its own while they run.
RSpec.describe "the fetch of sidekiq-unique-jobs 9", bundle: :unique_jobs_9, if: RUBY_VERSION.to_f >= 3.2 do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:payload) { Queues.push(redis, Queues.marked("GatedJob", gate.path)) }
  let(:jid) { Queues.jid(payload) }

  def start(fetch)
    SidekiqProcess.new(redis, app: <<~RUBY, concurrency: 1, bundle: :unique_jobs_9, env: {"PROCESSING_FETCH" => fetch}).up
      require "sidekiq-unique-jobs"

      Sidekiq.configure_server { |config| config[:fetch_class] = SidekiqUniqueJobs::Fetch::Reliable }
    RUBY
  end

  # Its lists, which have a copy of each job that it has fetched.
  def kept = redis.call("KEYS", "uniquejobs:working:*").flat_map { |key| redis.call("LRANGE", key, 0, -1) }

  it "is left alone, and its jobs are recorded by the middleware" do
    payload
    worker = start("auto").runs(jid)
    expect(worker.log).to match(/fetch: stands aside, since the app fetches with SidekiqUniqueJobs::Fetch::Reliable; jobs are recorded by the middleware/)
    expect(worker.log).to match(/WARN.*SidekiqUniqueJobs::Fetch::Reliable may keep jobs of its own/)
    expect(Queues.in_flight(redis)).to eq(worker.identity => [payload])
    expect(kept.size).to eq(1)
    worker.kill
    other = start("auto").runs(jid)
    expect(Queues.journal(redis).map { |job| job.values_at("jid", "from", "by", "outcome") })
      .to eq([[jid, worker.identity, other.identity, "requeued"]])
    gate.open
    eventually("the end") { other.done.include?(jid) }
  end

  it "is replaced by the native fetch where that is chosen" do
    payload
    worker = start("native").runs(jid)
    expect(worker.log).to match(/WARN.*fetch: native, as configured, though the app fetches with SidekiqUniqueJobs::Fetch::Reliable/)
    expect(Queues.in_flight(redis)).to eq(worker.identity => [payload])
    expect(kept).to be_empty
    worker.kill
    other = start("native").runs(jid)
    gate.open
    eventually("the end") { other.done == [jid] }
    eventually("the ack") { Queues.everywhere(redis).empty? }
    expect(kept).to be_empty
  end
end
