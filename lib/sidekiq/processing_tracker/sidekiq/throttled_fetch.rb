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

        crew = throttled_crew
        return sleep(NativeFetch::PAUSE) && nil unless crew

        job = claimed_job(crew)
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

      # Queues whose jobs were throttled often are left alone for a while: a crew for each set of queues that remains.
      #
      # @return [Integer, nil] nil where no queue remains
      def throttled_crew
        cool = (::Sidekiq::Throttled.cooldown&.queues || []).map { |queue| queue.delete_prefix("queue:") }
        return @processing_tracker_crew if cool.empty?

        queues = @processing_tracker_source.queues - cool
        processing_tracker_crew(queues) unless queues.empty?
      end
    end
  end
end
