# frozen_string_literal: true

module Bench
  module Chaos
    # Does errands to a Redis that comes and goes, one after the other, each until it has worked.
    class Clerk
      # Seconds.
      PAUSE = 0.05
      TIMEOUT = 2
      PATIENCE = 60

      # @param redis [RedisServer]
      def initialize(redis)
        @redis = redis
        @errands = Queue.new
        @sent = @done = 0
        @thread = Thread.new { work }
        @thread.report_on_exception = false
      end

      # @yieldparam client [RedisClient] the block may be called again, so what it does must not matter twice
      def send_for(&errand)
        @sent += 1
        @errands << errand
      end

      # @return [Boolean] whether all is done
      def idle?
        # Raises here what was raised there.
        @thread.join unless @thread.alive?
        @done == @sent
      end

      # Does all that is left, and ends.
      def close
        @errands << nil
        @thread.join
      end

      private

      def work
        while (errand = @errands.pop)
          insist(errand)
          @done += 1
        end
      end

      def insist(errand)
        deadline = Eventually.now + PATIENCE
        begin
          @redis.with(timeout: TIMEOUT, &errand)
        rescue RedisClient::Error
          raise if Eventually.now > deadline

          sleep PAUSE
          retry
        end
      end
    end
  end
end
