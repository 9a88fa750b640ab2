# frozen_string_literal: true

# A deploy under load: no job is lost, none is in a queue twice.
RSpec.describe "a rolling restart under load" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      class ShortJob
        include Sidekiq::Job
        include Sidekiq::ProcessingTracker::Worker

        def perform(number)
          note("started", number)
          sleep 0.05
          note("done", number)
        end
      end
    RUBY
  end

  let(:short) { 300 }
  let(:long) { 4 }

  def start
    SidekiqProcess.new(redis, app: app, concurrency: 5, timeout: 3)
  end

  with_each_fetch do
    it "loses no job and puts none back twice" do
      numbers = (1..short).to_a
      long_ones = Array.new(long) { |i| Queues.marked("GatedJob", gate.path, i) }
      payloads = numbers.map { |number| Queues.marked("ShortJob", number) }
      doubled = []
      watching = true
      watcher = Thread.new do
        while watching
          jids = Queues.everywhere(redis).map { |payload| Queues.jid(payload) }
          doubled |= jids.tally.select { |_, count| count > 1 }.keys
          let_pass(0.01)
        end
      end

      workers = Array.new(2) { start }.each(&:up)
      all = workers.dup
      payloads.each_slice(short / 3).with_index do |some, generation|
        some.each { |payload| Queues.push(redis, payload) }
        long_ones.each { |payload| Queues.push(redis, payload) } if generation.zero?
        workers.map! do |worker|
          successor = start
          all << successor
          worker.signal(:TERM)
          successor.up
        end
      end
      gate.open
      eventually("the end of all jobs", within: 30) do
        redis.call("LLEN", "done") >= short && all.sum { |worker| worker.done.size } >= long
      end
      (all - workers).each { |worker| worker.process.wait }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      workers.each(&:stop)
      watching = false
      watcher.value

      expect(doubled).to be_empty
      %w[started done].each do |list|
        expect(redis.call("LRANGE", list, 0, -1).map(&:to_i)).to match_array(numbers)
      end
      # A job that outlasts a generation begins once in each, and ends once.
      expect(all.flat_map(&:done)).to match_array(long_ones.map { |payload| Queues.jid(payload) })
      expect(Queues.journal(redis)).to be_empty
      expect(Queues.keys_of_instances(redis)).to be_empty
      expect(redis.call("LLEN", "queue:default") + redis.call("ZCARD", "retry") + redis.call("ZCARD", "dead")).to eq(0)
      expect(all.map { |worker| worker.process.status }).to all(be_success)
    end
  end
end
