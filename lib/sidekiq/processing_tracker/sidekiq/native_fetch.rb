# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Extends a capsule's fetcher, of whatever class, in place of its own way to get jobs: threads of the engine claim
    # them, for all waiting processors at once, and record them in the same moment.
    #
    # The object stays the one that Sidekiq or the app has made, so this works whenever that was, and for a launcher that is
    # started again.
    #
    # @api private
    module NativeFetch
      # How long a processor waits before it looks by itself whether it is to end. When Sidekiq ends, it is woken for that (see {.quiet}), so
      # this may be more than the 2 s of Sidekiq's own fetch: an idle process has less to do. Milliseconds.
      TIMEOUT = 5_000
      # How long it waits where no job will come any more. Seconds.
      PAUSE = 0.1
      # No interrupt may come between the engine's handing a job out and our holding it: nobody would ever ack it. While the
      # engine waits, all may come.
      WHILE_WAITING = {Object => :on_blocking}.freeze
      # For the crews of all fetchers: it is held for a few microseconds.
      LOCK = Mutex.new

      private_constant :WHILE_WAITING, :LOCK

      class << self
        # Makes a fetcher fetch from the engine.
        #
        # @param fetcher [Object]
        # @param engine [Native::Engine]
        # @param source [JobSource] what its capsule takes jobs from
        # @return [void]
        def attach(fetcher, engine, source)
          fetcher.extend(self)
          fetcher.extend(ThrottledFetch) if ThrottledFetch.needed?
          fetcher.processing_tracker_attach(engine, source)
        end

        # Gives a fetcher back what it was.
        #
        # @param fetcher [Object]
        # @return [void]
        def detach(fetcher)
          fetcher.processing_tracker_attach(nil, nil) if fetcher.is_a?(self)
        end

        # No job is claimed for these fetchers any more.
        #
        # @param fetchers [Array<Object>]
        # @param dismiss [Boolean] see {#processing_tracker_quiet}
        # @return [void]
        def quiet(fetchers, dismiss)
          fetchers.grep(self).each { |fetcher| fetcher.processing_tracker_quiet(dismiss) }
        rescue => error
          Log.failure("stop claiming jobs", error)
        end
      end

      # @param engine [Native::Engine, nil] nil: the fetcher is its own again
      # @param source [JobSource, nil]
      # @return [void]
      def processing_tracker_attach(engine, source)
        @processing_tracker_engine = engine
        @processing_tracker_source = source
        @processing_tracker_origin = engine && ClaimedJob::Origin.new(engine, source.config)
        @processing_tracker_crews = {}
        @processing_tracker_is_quiet = false
        @processing_tracker_crew = engine && processing_tracker_crew(source.queues)
      end

      # Claims no more jobs.
      #
      # @param dismiss [Boolean] whether processors that wait are to look at once whether they should end
      # @return [void]
      def processing_tracker_quiet(dismiss)
        crews = LOCK.synchronize do
          @processing_tracker_is_quiet = true
          @processing_tracker_crews.values
        end
        crews.each { |crew| @processing_tracker_engine.quiet(crew, dismiss) }
      end

      # @return [ClaimedJob, nil]
      def retrieve_work
        return super unless @processing_tracker_engine

        claimed_job(@processing_tracker_crew)
      end

      # Sidekiq's time is up: puts back what its threads still run.
      #
      # @param jobs [Array<ClaimedJob>]
      # @param options [Array] Sidekiq 6.5 passes its configuration
      # @return [Object]
      def bulk_requeue(jobs, *options)
        claimed, others = jobs.partition { |job| job.is_a?(ClaimedJob) }
        ClaimedJob.requeue(claimed) if claimed.any?
        super(others, *options) unless @processing_tracker_engine && others.empty?
      end

      private

      # @param queues [Array<String>] some of the source's
      # @return [Integer, nil] who takes jobs from these queues; nil for one that would be new, once no job is to be claimed any more
      def processing_tracker_crew(queues)
        LOCK.synchronize do
          crew = @processing_tracker_crews[queues]
          return crew if crew || @processing_tracker_is_quiet

          @processing_tracker_crews[queues] = @processing_tracker_engine.add_crew(queues, @processing_tracker_source.strict)
        end
      end

      # @param crew [Integer]
      # @param timeout [Integer] how long to wait for a job, milliseconds
      # @return [ClaimedJob, nil]
      def claimed_job(crew, timeout = TIMEOUT)
        job = Thread.handle_interrupt(WHILE_WAITING) { next_claimed_job(crew, timeout) }
        return job if job

        sleep(PAUSE) if job == false
        nil
      end

      # @return [ClaimedJob, nil, false] false where no job will come any more
      def next_claimed_job(crew, timeout)
        place, job = UnitOfWork.place, ClaimedJob.new(@processing_tracker_origin)
        taken = @processing_tracker_engine.next_job(crew, timeout, @processing_tracker_source.encoding)
        return taken unless taken

        # It may have waited long for this moment: what could be done before has been done.
        job.taken = taken
        place.unit = job
      end
    end
  end
end
