# frozen_string_literal: true

module Bench
  module Chaos
    # The jobs, each with a number that its jid tells as well; all of them from the seed.
    class Jobs
      # Queue => its weight, and its share of the jobs.
      QUEUES = {"critical" => 4, "default" => 2, "low" => 1}.freeze
      # Of the steady stream, of a hundred: what is no longer than a moment, sleeps for less than a tenth of a second, sleeps long, fails
      # once, fails twice, has a large payload.
      STREAM = {quick: 38, short: 30, long: 12, fails: 8, fails_twice: 4, large: 8}.freeze
      # The same of a storm.
      STORM = {quick: 94, short: 5, fails: 1}.freeze
      SHORT = (0.001..0.09)
      LONG = (0.3..2.5)
      # Bytes.
      LARGE = (10_000..150_000)

      # @return [Integer] how many there are so far
      attr_reader :count

      def initialize(seed)
        @seed = seed
        @count = 0
        @failures = {}
      end

      # @param batch [Schedule::Batch]
      # @return [Array<Array(String, String)>] queue and payload
      def draw(batch)
        dice = Random.new(@seed * 1_000_003 + batch.number)
        kinds = (batch.storm ? STORM : STREAM).flat_map { |kind, share| [kind] * share }
        Array.new(batch.jobs) { job(kinds.sample(random: dice), dice) }
      end

      # @return [Integer] how often a job is to fail
      def failures(number) = @failures.fetch(number, 0)

      # @return [Integer] the number of the job
      def self.number(jid) = Integer(jid, 16)

      private

      def job(kind, dice)
        number = (@count += 1)
        @failures[number] = (kind == :fails) ? 1 : 2 if kind.start_with?("fails")
        queue = QUEUES.flat_map { |name, share| [name] * share }.sample(random: dice)
        args = [number, seconds(kind, dice), failures(number)]
        args << dice.bytes(dice.rand(LARGE) / 2).unpack1("H*") if kind == :large
        [queue, Queues.payload("ChaosJob", *args, jid: format("%024x", number), queue: queue, processing: true, assured_jobs: true)]
      end

      def seconds(kind, dice)
        case kind
        when :short, :fails, :fails_twice then dice.rand(SHORT).round(3)
        when :long then dice.rand(LONG).round(2)
        else 0
        end
      end
    end
  end
end
