# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Due jobs of one set that could not be pushed: whom to tell of them, and when a poll has met enough of them.
    #
    # One client middleware that fails makes every due job fail, at every poll. So few are told, and a poll that meets nothing
    # else gives the set up. But what fails goes back to the head of its set, so the next poll bears more of them: bad jobs must
    # not keep the others waiting.
    #
    # @api private
    class DueFailures
      # How many in a row end a poll of the set, as long as none before it was ended so.
      PATIENCE = 10
      # How many a poll tells Sidekiq's error handlers.
      TOLD = 3

      # @param sorted_set [String]
      # @param config [Sidekiq::Config, Module] whose error handlers are told
      def initialize(sorted_set, config)
        @sorted_set = sorted_set
        @config = config
        @patience = PATIENCE
        begin_poll
      end

      # @return [void]
      def begin_poll
        @count = @row = @longest = 0
        @last = nil
      end

      # A job could not be pushed.
      #
      # @param error [StandardError]
      # @return [void]
      def add(error)
        @count += 1
        @row += 1
        @longest = [@longest, @row].max
        @last = error
        return if @count > TOLD

        @config.handle_exception(error, {context: "ProcessingTracker could not push a due job; it stays scheduled"})
      end

      # A job has found its way.
      #
      # @return [void]
      def none
        @row = 0
      end

      # @return [Boolean] whether this poll should give the set up
      def enough? = @row >= @patience

      # @return [void]
      def end_poll
        given_up = enough?
        if @count > TOLD || given_up
          Log.write(:warn, "could not push #{@count} due jobs of #{@sorted_set}, the last one for #{@last.class}; they stay scheduled" \
            "#{", and what is due after them waits for the next poll" if given_up}")
        end
        if given_up
          @patience *= 2
        elsif @longest < PATIENCE
          @patience = PATIENCE
        end
      end
    end
  end
end
