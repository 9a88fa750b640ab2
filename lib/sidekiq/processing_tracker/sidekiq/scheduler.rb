# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Extends the object with which Sidekiq's poller moves due jobs (`Sidekiq::Scheduled::Enq`), in place of its own way: the
    # engine takes many at once, the job's client middleware runs as ever, and each job is pushed in the moment in which it
    # ceases to be on record as taken. When to poll remains Sidekiq's.
    #
    # @api private
    module Scheduler
      # How long pushed jobs may wait for company on their way to Redis. Seconds.
      COMPANY = 0.02
      # The methods of Sidekiq's client that a job passes without client middleware.
      CLIENT = %i[push normalize_item validate normalized_hash verify_json].freeze

      # Who polls in this process. Several launchers share its engine, and the end of a poll puts back all that is not pushed.
      POLL = Mutex.new

      private_constant :COMPANY, :CLIENT, :POLL

      class << self
        # @param enqueuer [Sidekiq::Scheduled::Enq]
        # @param engine [Native::Engine]
        # @param config [Sidekiq::Config, Module]
        # @return [void]
        def attach(enqueuer, engine, config)
          enqueuer.extend(self)
          enqueuer.processing_tracker_attach(engine, DueClient.for(config), config)
        end

        # Gives an enqueuer back what it was.
        #
        # @param enqueuer [Object]
        # @return [void]
        def detach(enqueuer)
          enqueuer.processing_tracker_attach(nil, nil, nil) if enqueuer.is_a?(self)
        end
      end

      # @param engine [Native::Engine, nil] nil: the enqueuer is its own again
      # @param client [DueClient, nil]
      # @param config [Sidekiq::Config, Module, nil]
      # @return [void]
      def processing_tracker_attach(engine, client, config)
        @processing_tracker_engine = engine
        @processing_tracker_client = client
        @processing_tracker_config = config
        @processing_tracker_failures = {}
        @processing_tracker_unleased = 0
      end

      # Moves what is due into the queues. Called by Sidekiq's poller.
      #
      # @param sorted_sets [Array<String>]
      # @return [void]
      # @raise [ConnectionError] as Sidekiq's own raises when Redis is away; the poller logs it and comes again
      def enqueue_jobs(sorted_sets = ::Sidekiq::Scheduled::SETS)
        return super unless @processing_tracker_engine
        # Another launcher of this process is about to move all that is due.
        return unless POLL.try_lock

        begin
          leased = poll_due(sorted_sets)
        ensure
          POLL.unlock
        end
        super if stand_aside?(leased)
      end

      private

      # Whether due jobs are Sidekiq's own scheduler's to move. A lease that is lost is mostly had anew by the next poll. But
      # where Redis refuses it, all processes may be without one, and due jobs would stand still until somebody mends that.
      #
      # @param leased [Boolean] whether this poll had a lease
      def stand_aside?(leased)
        polls = @processing_tracker_unleased
        @processing_tracker_unleased = leased ? 0 : polls + 1
        if polls == 1 && !leased
          Log.write(:warn, "scheduler: Sidekiq's own, until this process has a lease (see the lines about Redis). A kill in the middle " \
            "of a push may lose a due job meanwhile")
        elsif polls > 1 && leased
          Log.write(:info, "scheduler: native again")
        end
        polls.positive? && !leased
      end

      # @return [Boolean] whether this process has a lease
      def poll_due(sorted_sets)
        sorted_sets.all? { |sorted_set| enqueue_due(sorted_set) }
      ensure
        put_back_unpushed
      end

      # @return [Boolean] the same
      def enqueue_due(sorted_set)
        failures = @processing_tracker_failures[sorted_set] ||= DueFailures.new(sorted_set, @processing_tracker_config)
        failures.begin_poll
        more = true
        while more && !@done && !failures.enough?
          claimed = @processing_tracker_engine.claim_due(
            sorted_set, Time.now.to_f.to_s, straight, transient, DueClient.milliseconds?
          )
          return false unless claimed

          more, pushed, jobs = claimed
          failures.none if pushed.positive?
          push_due(jobs, failures)
          logger_of_sidekiq.debug { "enqueued #{pushed} jobs of #{sorted_set}" } if pushed.positive?
        end
        true
      ensure
        failures&.end_poll
      end

      # @param jobs [Array<Array(String, String)>] token and payload
      # @param failures [DueFailures]
      def push_due(jobs, failures)
        pushes = []
        since = clock
        jobs.each do |token, payload|
          break if @done || failures.enough?

          push = push_of(token, payload, failures)
          pushes << push if push
          next if clock - since < COMPANY

          settle(pushes)
          since = clock
        end
      ensure
        settle(pushes)
      end

      def settle(pushes)
        return if pushes.empty?

        @processing_tracker_engine.settle_due(pushes)
        pushes.clear
      end

      # What would have become of the job is Sidekiq's and the app's to say. One that cannot be pushed goes back to its set
      # at the end of the poll.
      def push_of(token, payload, failures)
        target = @processing_tracker_client.target(DueClient.read(payload))
        logger_of_sidekiq.debug { "enqueues a due job: #{payload}" }
        failures.none
        [token, *target]
      rescue => error
        raise if DueClient.away?(error)

        failures.add(error)
        nil
      end

      # Must not hide the error that has brought us here.
      def put_back_unpushed
        @processing_tracker_engine.end_due
      rescue => error
        Log.failure("put due jobs back that were not pushed (they go back later)", error)
      end

      # @return [Array<String>, nil] the fields that each job has, where nothing of Ruby's has to see it
      def straight
        return unless @processing_tracker_client.middleware.entries.empty? && CLIENT.all? { |name| Stock.client?(name) }

        ::Sidekiq.default_job_options.keys.map(&:to_s) - transient
      end

      # @return [Array<String>] the fields that no job has: they may be among the default options (`Sidekiq.transactional_push!`
      #   puts one there), and Sidekiq's client takes them out. None where this Sidekiq has no such list
      def transient
        defined?(::Sidekiq::JobUtil::TRANSIENT_ATTRIBUTES) ? ::Sidekiq::JobUtil::TRANSIENT_ATTRIBUTES.map(&:to_s) : []
      end

      def logger_of_sidekiq = ::Sidekiq.logger

      def clock = ::Process.clock_gettime(::Process::CLOCK_MONOTONIC)
    end
  end
end
