# frozen_string_literal: true

# Redis is away just when a job begins. Fetched by the app's own fetch it runs all the same, and is recorded as soon as that is
# possible.
RSpec.describe "a job that starts while Redis is away" do
  let(:redis) { RedisServer.new(appendonly: "yes") }
  let(:gate) { Gate.new }
  let(:fetched) { Gate.new }

  # The app's own fetcher: it keeps what it has popped until a file is there, so that Redis can go in between.
  let(:app) do
    <<~RUBY
      require "sidekiq/fetch"

      class SlowFetch < Sidekiq::BasicFetch
        def retrieve_work
          super.tap do |unit|
            if unit
              $stdout.write("job fetched\\n")
              sleep 0.02 until File.exist?(#{fetched.path.inspect})
            end
          end
        end
      end

      Sidekiq.configure_server do |config|
        Sidekiq::VERSION < "7" ? config[:fetch] = SlowFetch.new(config) : config[:fetch_class] = SlowFetch
      end
    RUBY
  end

  let(:worker) { SidekiqProcess.new(redis, app: app, concurrency: 1).up }
  let(:payload) { Queues.marked("GatedJob", gate.path) }
  let(:jid) { Queues.jid(payload) }

  def start_without_redis
    worker
    Queues.push(redis, payload)
    worker.wait_for_log(/^job fetched$/)
    yield
    fetched.open
    begun = now
    worker.runs(jid)
    now - begun
  end

  def outages
    worker.log.scan(/ERROR.*ProcessingTracker cannot use Redis/).size
  end

  it "is recorded when Redis comes back while it runs" do
    waited = start_without_redis { redis.stop }
    # It waits 1 s at most; the rest is what a loaded machine may need.
    expect(waited).to be < 4
    redis.start
    eventually("the record") { Queues.in_flight(redis) == {worker.identity => [payload]} }
    expect(worker.done).to be_empty
    worker.wait_for_log(/ProcessingTracker can use Redis again after/)
    expect(outages).to eq(1)

    worker.kill
    other = SidekiqProcess.new(redis).up.runs(jid)
    gate.open
    eventually("the ack") { other.done == [jid] && Queues.everywhere(redis).empty? }
    expect(Queues.journal(redis).map { |job| job["jid"] }).to eq([jid])
  end

  it "leaves nothing when it is done before Redis comes back" do
    start_without_redis { redis.stop }
    gate.open
    eventually("the end of the job") { worker.done == [jid] }
    redis.start
    worker.wait_for_log(/ProcessingTracker can use Redis again after/)
    # The next job's record comes after whatever was still to be told of this one.
    other = Queues.push(redis, Queues.marked("WaitingJob"))
    eventually("the next job") { Queues.in_flight(redis) == {worker.identity => [other]} }
    redis.call("SET", "go", 1)
    eventually("the ack") { Queues.everywhere(redis).empty? }
    expect(outages).to eq(1)
    expect(worker.log).not_to include("lost the lease")
    expect(Queues.journal(redis)).to be_empty
  end

  it "is recorded before it starts when Redis has merely closed idle connections, which is no outage" do
    recorded = <<~RUBY
      class RecordedJob
        include Sidekiq::Job

        def perform
          identity = Sidekiq::ProcessingTracker.identity
          hands = "sidekiq_processing:hands:\#{identity}"
          payloads = Sidekiq.redis do |conn|
            # A job goes from a hand into the hash.
            in_hands = conn.hkeys(hands).flat_map { |number| conn.lrange("\#{hands}:\#{number}", 0, -1) }
            inflight = "sidekiq_processing:inflight:\#{identity}"
            in_hands + conn.hgetall(inflight).filter_map do |token, payload|
              number = token[/\\A(\\d+-\\d+)\\+ /, 1]
              number ? conn.lindex("\#{inflight}:\#{number}", 0) : payload
            end
          end
          note("recorded", payloads.grep(/\#{jid}/).uniq.size)
        end
      end
    RUBY
    workers = %w[native sidekiq].map do |fetch|
      SidekiqProcess.new(redis, app: recorded, queues: [fetch], concurrency: 1, env: {"PROCESSING_FETCH" => fetch}).up
    end
    2.times do |i|
      # One that breaks again while it is made anew would be an outage.
      eventually("connections that are in use") do
        others = redis.call("CLIENT", "LIST", "TYPE", "normal").lines.grep_v(/ cmd=client/)
        others.all? { |client| client[/ age=(\d+)/, 1].to_i >= 1 }
      end
      redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
      %w[native sidekiq].each { |queue| Queues.push(redis, Queues.marked("RecordedJob"), queue: queue) }
      eventually("the job") { redis.call("LLEN", "recorded") == 2 * (i + 1) }
    end
    expect(redis.call("LRANGE", "recorded", 0, -1)).to eq(%w[1] * 4)
    expect(workers.map(&:log).join).not_to include("ProcessingTracker cannot use Redis")
  end

  it "is recorded when Redis was only stopped and goes on while it runs, and says so once each time" do
    2.times do |i|
      start_without_redis { redis.pause } if i.zero?
      redis.pause unless i.zero?
      worker.wait_for_log(/(ProcessingTracker cannot use Redis.*){#{i + 1}}/m)
      redis.resume
      worker.wait_for_log(/(ProcessingTracker can use Redis again after.*){#{i + 1}}/m)
      eventually("the record") { Queues.in_flight(redis) == {worker.identity => [payload]} }
    end
    expect(outages).to eq(2)
    gate.open
    eventually("the ack") { worker.done == [jid] && Queues.everywhere(redis).empty? }
  end

  with_fetch(:native) do
    let(:worker) { SidekiqProcess.new(redis, concurrency: 2).up }

    it "is on record before Redis goes, and its ack waits for the end of the outage" do
      worker
      Queues.push(redis, payload)
      worker.runs(jid)
      redis.stop
      worker.wait_for_log(/ProcessingTracker cannot use Redis/)
      gate.open
      eventually("the end of the job") { worker.done == [jid] }
      redis.start
      worker.wait_for_log(/ProcessingTracker can use Redis again after/)
      eventually("the ack") { Queues.in_flight(redis) == {worker.identity => []} }
      others = Array.new(3) { Queues.push(redis, Queues.marked("GatedJob", gate.path)) }
      worker.runs(*others.map { |other| Queues.jid(other) })
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(worker.started.size).to eq(4)
      expect(worker.log.scan(/ERROR.*ProcessingTracker cannot use Redis/).size).to eq(1)
      expect(worker.log).not_to include("lost the lease")
      expect(Queues.journal(redis)).to be_empty
    end
  end
end
