# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A job that the engine has claimed for this process: Sidekiq's unit of work under the native fetch. Redis has had it
    # on record since it left its queue.
    #
    # The engine knows it by its handle and settles it once, whoever comes first: the thread that acknowledges it, or the one that
    # puts it back.
    #
    # @api private
    class ClaimedJob
      # How long to wait for Redis to take jobs back, when Sidekiq ends. Milliseconds.
      REQUEUE_TIMEOUT = 2_000

      # What the jobs of one fetcher have in common.
      class Origin
        # @return [Native::Engine] the engine that claims them
        attr_reader :engine
        # @return [Sidekiq::Capsule, Sidekiq::Config, Module] what Sidekiq's own fetch gives its units
        attr_reader :config

        # @param engine [Native::Engine]
        # @param config [Object]
        def initialize(engine, config)
          @engine = engine
          @config = config
        end
      end

      class << self
        # Puts jobs back into their queues, each once: not one that is done, nor one that others have by now.
        #
        # @param jobs [Array<ClaimedJob>]
        # @return [void]
        def requeue(jobs)
          jobs.reject(&:settled?).group_by(&:engine).each do |engine, group|
            answer = engine.requeue(group.map(&:handle), REQUEUE_TIMEOUT)
            UnitOfWork.report_requeue(group.size, answer.values.sum(&:size))
          end
        rescue => error
          # Their records bring them back.
          Log.failure("requeue #{jobs.size} jobs", error)
        end
      end

      # What the engine has answered: the handle, the queue, the payload.
      #
      # @return [Array(Integer, String, String)]
      attr_writer :taken

      # It is made before there is a job for it, so that a job does not wait for that.
      #
      # @param origin [Origin]
      def initialize(origin)
        @origin = origin
        @taken = nil
        @stage = nil
      end

      # @return [String] the raw bytes, as they were in the queue
      def job = @taken[2]

      # @return [String] without "queue:"
      def queue_name = @taken[1]

      # @return [Sidekiq::Capsule, Sidekiq::Config, Module] what Sidekiq's own fetch gives its units
      def config = @origin.config

      # @return [Native::Engine] the engine that has claimed it
      def engine = @origin.engine

      # @return [Integer] what the engine calls it
      def handle = @taken[0]

      # @return [String] with "queue:"
      def queue = "queue:#{queue_name}"

      # Sidekiq is done with the job: it has succeeded, was skipped, or its retry is written. An error here would cost the
      # processor its thread without a word in the log.
      #
      # @return [void]
      def acknowledge
        engine.ack(handle)
        @stage = :settled
      rescue => error
        Log.failure("ack a job", error)
      end

      # Puts the job back, once.
      #
      # @return [void]
      def requeue
        ClaimedJob.requeue([self])
      end

      # The processor begins with the job. From here on it may have done some of its work.
      #
      # @return [void]
      def begin
        @stage = :begun
      end

      # Its thread is through with the job. If nobody has settled it, it is an orphan in a living process, and the engine
      # settles it as recovery would. One that has not begun just goes back to its queue.
      #
      # @return [void]
      def release
        return if settled?

        (@stage == :begun) ? engine.release(handle) : engine.requeue([handle], 0)
        @stage = :settled
      rescue => error
        Log.failure("release a job", error)
      end

      # Whether its thread is through with it: Sidekiq may name it at its end all the same.
      #
      # @return [Boolean]
      def settled? = @stage == :settled

      # @return [String] without the payload, whose arguments may be secret
      def inspect
        "#<#{self.class} queue=#{queue_name} handle=#{handle}>"
      end
    end
  end
end
