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

      # @return [String] the raw bytes, as they were in the queue
      attr_reader :job
      # @return [String] without "queue:"
      attr_reader :queue_name
      # @return [Sidekiq::Capsule, Sidekiq::Config, Module] what Sidekiq's own fetch gives its units
      attr_reader :config
      # @return [Native::Engine] the engine that has claimed it
      attr_reader :engine
      # @return [Integer] what the engine calls it
      attr_reader :handle
      # @return [Hash, nil] the job as the processor has parsed it
      attr_accessor :job_hash

      # @param engine [Native::Engine]
      # @param handle [Integer]
      # @param queue_name [String]
      # @param job [String]
      # @param config [Object]
      def initialize(engine, handle, queue_name, job, config)
        @engine = engine
        @handle = handle
        @queue_name = queue_name
        @job = job
        @config = config
        @job_hash = nil
        @begun = @settled = false
      end

      # @return [String] with "queue:"
      def queue = "queue:#{@queue_name}"

      # Sidekiq is done with the job: it has succeeded, was skipped, or its retry is written. An error here would cost the
      # processor its thread without a word in the log.
      #
      # @return [void]
      def acknowledge
        @engine.ack(@handle)
        @settled = true
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
        @begun = true
      end

      # Its thread is through with the job. If nobody has settled it, it is an orphan in a living process, and the engine
      # settles it as recovery would. One that has not begun just goes back to its queue.
      #
      # @return [void]
      def release
        return if @settled

        @begun ? @engine.release(@handle) : @engine.requeue([@handle], 0)
        @settled = true
      rescue => error
        Log.failure("release a job", error)
      end

      # Whether its thread is through with it: Sidekiq may name it at its end all the same.
      #
      # @return [Boolean]
      def settled? = @settled

      # Whether the given hash is this very job, and not one that the job runs inline.
      #
      # @param job_hash [Hash] what the middleware was called with
      # @return [Boolean]
      def runs?(job_hash)
        @job_hash.equal?(job_hash)
      end

      # @return [String] without the payload, whose arguments may be secret
      def inspect
        "#<#{self.class} queue=#{@queue_name} handle=#{@handle}>"
      end
    end
  end
end
