# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # sidekiq-throttled hangs on Sidekiq's own fetch, and puts a job that must wait back by itself. This does the same for the
    # native fetch, and gives up the claim, which would else stay.
    #
    # @api private
    module ThrottledFetch
      # @return [Boolean] whether sidekiq-throttled is loaded
      def self.needed?
        defined?(::Sidekiq::Throttled::Patches::ThrottledRetriever) ? true : false
      end

      # @return [ClaimedJob, nil] nil too for a job that must wait
      def retrieve_work
        return super unless @processing_tracker_engine

        cool = cool_queues
        crew = crew_without(cool)
        return sleep(NativeFetch::PAUSE) && nil unless crew

        job = claimed_job(crew, cool.empty? ? NativeFetch::TIMEOUT : cooldown_timeout)
        return unless job
        return admit(job) unless ::Sidekiq::Throttled.throttled?(job.job)

        put_off(job)
        nil
      end

      private

      def admit(job)
        ::Sidekiq::Throttled.cooldown&.notify_admitted(job.queue)
        job
      end

      # Where that fails the job goes back as it is.
      def put_off(job)
        ::Sidekiq::Throttled.cooldown&.notify_throttled(job.queue)
        ::Sidekiq::Throttled.requeue_throttled(job)
        job.acknowledge
      ensure
        UnitOfWork.give_up(job)
      end

      # @return [Array<String>] queues whose jobs were throttled often: they are left alone for a while
      def cool_queues
        (::Sidekiq::Throttled.cooldown&.queues || []).map { |queue| queue.delete_prefix("queue:") }
      end

      # A processor that waits for the other queues is not to miss the end of that while. (With Sidekiq's own fetch it does.)
      #
      # @return [Integer] milliseconds
      def cooldown_timeout
        [(::Sidekiq::Throttled.config.cooldown_period * 1_000).ceil, NativeFetch::TIMEOUT].min
      end

      # A crew for each set of queues that remains.
      #
      # @param cool [Array<String>]
      # @return [Integer, nil] nil where no queue remains
      def crew_without(cool)
        return @processing_tracker_crew if cool.empty?

        queues = @processing_tracker_source.queues - cool
        processing_tracker_crew(queues) unless queues.empty?
      end
    end
  end
end
