# frozen_string_literal: true

# Once payloads have been large, the native fetch keeps each in a list of its own beside the in-flight hash (docs/protocol.md,
# "Large payloads"): nothing else about it may be another.
RSpec.describe "large payloads" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:large) { "x" * 60_000 }

  def push(count, file = gate.path)
    count.times.map { |i| Queues.push(redis, Queues.marked("GatedJob", file, "#{i}#{large}")) }
  end

  def lists = redis.call("KEYS", "sidekiq_processing:inflight:*").grep(/:\d+-\d+\z/)

  # A worker that knows by now that payloads are large.
  def worker(**options)
    first = push(1, Gate.new.open.path)
    sidekiq = SidekiqProcess.new(redis, concurrency: 4, **options).up
    eventually("the first job") { sidekiq.done == first.map { |payload| Queues.jid(payload) } }
    sidekiq
  end

  it "come back after kill -9, byte for byte, and end" do
    victim = worker
    jobs = push(6)
    jids = jobs.map { |payload| Queues.jid(payload) }
    victim.runs(*jids.first(4))
    expect(lists.size).to eq(4)
    expect(Queues.in_flight(redis)).to match(victim.identity => match_array(jobs.first(4)))
    expect(Queues.queued(redis)).to eq(jobs.last(2))
    seen, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url})
      Sidekiq.logger.level = Logger::FATAL
      puts Sidekiq::ProcessingTracker.in_flight.map(&:jid).to_a
    RUBY
    expect(seen.split).to match_array(jids.first(4))
    victim.kill

    heir = SidekiqProcess.new(redis, queues: ["later"]).up
    eventually("the recovery") { Queues.queued(redis).size == 6 }
    expect(Queues.queued(redis)).to match_array(jobs)
    expect(lists).to be_empty
    expect(heir.stop).to be_success
    gate.open
    last = SidekiqProcess.new(redis, concurrency: 4).up
    eventually("the end") { last.done.sort == jids.sort }
    eventually("the acks") { Queues.everywhere(redis).empty? && lists.empty? }
  end

  it "go back when their time is up, each to its place" do
    sidekiq = worker(timeout: 1)
    jobs = push(6)
    sidekiq.runs(*jobs.first(4).map { |payload| Queues.jid(payload) })
    expect(lists.size).to eq(4)
    expect(sidekiq.stop).to be_success
    expect(Queues.queued(redis)).to match_array(jobs)
    expect(Queues.queued(redis).last(2)).to eq(jobs.last(2))
    expect(redis.call("KEYS", "sidekiq_processing:in*")).to be_empty
  end
end
