# frozen_string_literal: true

# From which queue the next job comes: as Sidekiq's own fetch draws it, for each job anew.
RSpec.describe "the order of the queues", if: Sidekiq.respond_to?(:configure_embed) do
  let(:redis) { RedisServer.new }

  # An embedded Sidekiq whose jobs note their queues in memory; after so many it tells them all, and stops.
  def order(fetch, queues, count, concurrency: 10)
    script = ScriptProcess.new(redis, <<~RUBY, env: {"PROCESSING_FETCH" => fetch.to_s})
      Sidekiq.logger.level = Logger::WARN
      ORDER = Queue.new

      class OrderJob
        include Sidekiq::Job

        def perform(queue)
          ORDER << queue
        end
      end

      sidekiq = Sidekiq.configure_embed do |config|
        config.queues = #{queues.inspect}
        config.concurrency = #{concurrency}
      end
      sidekiq.run
      order = Array.new(#{count}) { ORDER.pop }
      sidekiq.stop
      note("order", order.join(" "))
    RUBY
    eventually("the order of #{count} jobs", within: 120) do
      raise script.log unless script.running? || redis.call("LLEN", "order") == 1

      redis.call("LLEN", "order") == 1
    end
    redis.call("LPOP", "order").split
  end

  def fill(queue, count)
    redis.with do |client|
      client.call("DEL", "queue:#{queue}")
      Array.new(count) { Queues.payload("OrderJob", queue, queue: queue) }.each_slice(1_000) { |some| client.call("LPUSH", "queue:#{queue}", *some) }
    end
  end

  # @return [Hash{String => Float}] each queue's share of the first jobs
  def shares(fetch, queues, weights, count)
    sum = weights.values.sum
    # None runs empty before the last of them.
    weights.each { |queue, weight| fill(queue, (1.2 * count * weight / sum).ceil) }
    order(fetch, queues, count).tally.transform_values { |jobs| jobs.fdiv(count) }
  end

  # With 20,000 jobs a share of a half strays by 0.7 % of all at most, in 95 of 100 runs.
  {
    "weighted" => [%w[high,4 middle,3 low,2 least,1], {"high" => 4, "middle" => 3, "low" => 2, "least" => 1}],
    "random" => [%w[a,1 b,1 c,1], {"a" => 1, "b" => 1, "c" => 1}]
  }.each do |name, (queues, weights)|
    it "gives #{name} queues the shares that Sidekiq's own fetch gives them, over 20,000 jobs" do |example|
      count = 20_000
      ours, stock = %i[native sidekiq].map { |fetch| shares(fetch, queues, weights, count) }
      example.reporter.message("  #{name}: #{weights.keys.map { |queue| format("%s %.1f %% (stock %.1f %%)", queue, 100 * ours[queue], 100 * stock[queue]) }.join(", ")}")
      weights.each do |queue, weight|
        expect(ours[queue]).to be_within(0.03).of(stock[queue])
        expect(ours[queue]).to be_within(0.02).of(weight.fdiv(weights.values.sum))
      end
    end
  end

  it "starves no queue: one with the least weight has its turns beside one that never runs empty" do
    fill("much", 4_000)
    fill("little", 20)
    order = order(:native, %w[much,19 little,1], 2_000)
    expect(order.count("little")).to eq(20)
  end

  it "is strict where no weights are given: a queue has its turn when those before it are empty" do
    %i[native sidekiq].each do |fetch|
      %w[first second third].each { |queue| fill(queue, 1_000) }
      order = order(fetch, %w[first second third], 3_000)
      # The threads run side by side, so neighbours may change places.
      strays = order.each_with_index.count { |queue, i| queue != %w[first second third][i / 1_000] }
      expect(strays).to be <= 2 * 2 * 10
    end
  end

  it "is strict for each single job: what comes into the first queue meanwhile is next" do
    app = <<~RUBY
      class NextJob
        include Sidekiq::Job

        def perform(queue, number)
          note("order", [queue, number].to_json)
          # The first job of each second one lets in another one before it.
          Sidekiq::Client.push("class" => "NextJob", "queue" => "first", "args" => ["first", number]) if queue == "second"
        end
      end
    RUBY
    100.times { |number| Queues.push(redis, Queues.payload("NextJob", "second", number, queue: "second"), queue: "second") }
    SidekiqProcess.new(redis, app: app, queues: %w[first second], concurrency: 1, env: {"PROCESSING_FETCH" => "native"})
    eventually("all jobs", within: 30) { redis.call("LLEN", "order") == 200 }
    expect(Queues.notes(redis, "order")).to eq((0...100).flat_map { |number| [["second", number], ["first", number]] })
  end
end
