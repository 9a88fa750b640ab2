# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A job that Sidekiq has fetched, around the unit of work of the app's own fetcher. It has the raw bytes of the
    # job and learns the moment at which Sidekiq is done with it, so all that the tracker does with a job hangs here.
    #
    # Its life: fetched, tracked by the middleware (or not), and then settled, once: acked, requeued or released.
    # The stopping thread may requeue a unit in the very moment in which its own thread tracks or acks it. The lock
    # makes one of them first: a unit that was requeued is not tracked any more, one that was acked is not requeued.
    #
    # @api private
    class UnitOfWork
      PLACE = :sidekiq_processing_tracker_unit

      # Where the unit that a thread works on is kept.
      class Place
        # @return [UnitOfWork, ClaimedJob, nil]
        attr_accessor :unit
      end

      # One for all units: it is held for a few microseconds, and no call under it waits for anything.
      LOCK = Mutex.new
      # How long to wait for Redis to have a job's record before the job runs all the same. Milliseconds.
      RECORD_TIMEOUT = 1_000
      # How long to wait for Redis to take jobs back, when Sidekiq ends. Milliseconds.
      REQUEUE_TIMEOUT = 2_000
      # Thread#kill and Timeout wait for the end of a call to the engine, which takes microseconds.
      UNINTERRUPTED = {Object => :never}.freeze

      private_constant :PLACE, :LOCK, :UNINTERRUPTED

      class << self
        # @return [UnitOfWork, ClaimedJob, nil] what this thread's processor is working on
        def current = place.unit

        # @param unit [UnitOfWork, ClaimedJob, nil] what this thread's processor has got to work on
        def current=(unit)
          place.unit = unit
        end

        # The thread's and not the fiber's: a gem may run the processor's work in a fiber. {#runs?} tells the job from
        # others that it runs.
        #
        # @return [Place] where this thread's unit is kept
        def place
          thread = Thread.current
          thread.thread_variable_get(PLACE) || thread.thread_variable_set(PLACE, Place.new)
        end

        # The thread is through with the unit. When nobody has settled it, its thread has gone without a word (an internal error,
        # Thread#kill), and the engine settles the job.
        #
        # @param unit [UnitOfWork, ClaimedJob]
        # @return [void]
        def give_up(unit)
          unit.release
          # Last, since an interrupt may come in between: then the unit is given up once more.
          self.current = nil
        end

        # Logs what became of jobs that were to go back.
        #
        # @param count [Integer] how many there were
        # @param pending [Integer] how many Redis has not put back in time
        # @return [void]
        def report_requeue(count, pending)
          Log.write(:info, "put #{count - pending} jobs back into their queues") if count > pending
          return if pending.zero?

          Log.write(:warn, "#{pending} jobs stay recorded: they come back when the lease has run out")
        end

        # Makes `unit` the current one while the block runs. When the block ends and nobody has settled the unit,
        # its thread has gone without a word (an internal error, Thread#kill), and the engine puts the job back.
        #
        # @param unit [UnitOfWork]
        # @return [Object] what the block returns
        def during(unit)
          self.current = unit
          yield
        ensure
          give_up(unit)
        end

        # Puts units back into their queues, each once. What the tracker has recorded goes back by the tracker's script,
        # in one call, but only where the unit is Sidekiq's own: any other fetcher may have a copy of the job too, which
        # only the fetcher itself can put back, and no script reaches the queues where they are in another Redis. Then the
        # tracker drops its record.
        #
        # @param units [Array<UnitOfWork, Object>]
        # @yieldparam originals [Array<Object>] the fetcher's own units that the fetcher has to put back
        # @return [Object] what the block returns
        def requeue(units)
          ours, others = units.partition { |unit| unit.is_a?(self) }
          tracked, untracked = ours.select(&:surrender).partition(&:handle)
          by_script, by_fetcher = tracked.partition { |unit| unit.stock? && !Runtime.current&.elsewhere? }
          unrecorded = hand_back(by_script)
          result = yield(others + (untracked + by_fetcher + unrecorded).map(&:original))
          by_fetcher.each(&:drop_record)
          result
        end

        private

        # @return [Array<UnitOfWork>] those that have no record in Redis
        def hand_back(units)
          answers = units.group_by(&:engine).map { |engine, group| requeue_by_script(engine, group) }
          unrecorded, pending = %w[unrecorded pending].map { |key| answers.flat_map { |answer| answer.fetch(key) } }
          report_requeue(units.size - unrecorded.size, pending.size)
          unrecorded
        end

        # @return [Hash{String => Array<UnitOfWork>}] as {Native::Engine#requeue} answers, with units for handles
        def requeue_by_script(engine, units)
          by_handle = units.to_h { |unit| [unit.handle, unit] }
          engine.requeue(by_handle.keys, REQUEUE_TIMEOUT).transform_values { |handles| by_handle.fetch_values(*handles) }
        rescue => error
          Log.failure("requeue #{units.size} jobs", error)
          # A recorded job comes back by its record. Pushing it as well would put it back twice.
          pending, unrecorded = units.partition(&:recorded?)
          {"unrecorded" => unrecorded, "pending" => pending}
        end
      end

      # @return [Object] the fetcher's own unit of work
      attr_reader :original
      # @return [Native::Engine, nil] the engine that tracks it
      attr_reader :engine
      # @return [Integer, nil] what the engine calls it
      attr_reader :handle
      # @return [Hash, nil] the job as the processor has parsed it
      attr_accessor :job_hash

      # @param original [Object] what the fetcher's retrieve_work returned
      def initialize(original)
        @original = original
        @engine = @handle = @job_hash = nil
        @recorded = @settled = false
      end

      # @return [String] the raw bytes
      def job = @original.job

      # @return [String] without "queue:"
      def queue_name = @original.queue_name

      # @return [String] with "queue:"
      def queue = @original.queue

      # @return [Object] Sidekiq's configuration, or the capsule
      def config = @original.config

      # Sidekiq is done with the job: it has succeeded, was skipped, or its retry is written. This alone is our ack.
      #
      # @return [Object] what the fetcher's own unit returns
      def acknowledge
        @original.acknowledge
      ensure
        ack
      end

      # Puts the job back, once.
      #
      # @return [void]
      def requeue
        UnitOfWork.requeue([self]) { |originals| originals.each(&:requeue) }
        nil
      end

      # Whether the given hash is this very job. Identity and not the jid is compared: it costs nothing, and it holds
      # for a job without a jid as well as for a nested perform_inline that was given the same one.
      #
      # @param job_hash [Hash] what the middleware was called with
      # @return [Boolean]
      def runs?(job_hash)
        @job_hash.equal?(job_hash)
      end

      # Hands the job to the engine, unless it is tracked or settled.
      #
      # @param engine [Native::Engine]
      # @param marked_class [String, nil] the class, where only the class says that the job is marked
      # @return [Boolean] whether it is tracked by this call
      def track(engine, marked_class)
        # No interrupt may come between the engine's taking the job and our knowing so: nobody would ever ack it.
        Thread.handle_interrupt(UNINTERRUPTED) do
          LOCK.synchronize do
            return false if @handle || @settled

            @handle = engine.track(queue_name, job, marked_class)
            @engine = engine
          end
        end
        true
      end

      # Waits until Redis has the record, but no longer than is reasonable for a job that is ready to run.
      #
      # @return [Boolean] whether the job may run: not when this process was away for so long that another has it
      def await_record
        outcome = @engine.await(@handle, RECORD_TIMEOUT)
        @recorded = outcome == true
        outcome != :lost
      end

      # @return [Boolean] whether the record is known to be in Redis
      def recorded? = @recorded

      # @return [Boolean] whether the fetcher's own unit is Sidekiq's, so that its fetcher has no copy of the job
      def stock? = @original.instance_of?(::Sidekiq::BasicFetch::UnitOfWork)

      # Sidekiq takes the job from its thread to put it back. From here on it is neither tracked, acked nor released.
      #
      # @return [Boolean] false where it is done with already, and must not be put back
      def surrender = settle

      # The thread is through with the job. If nobody has settled it, the engine puts it back.
      #
      # @return [void]
      def release
        finish("release") { @engine.release(@handle) if @handle && settle }
      end

      # The fetcher has put back the job that was surrendered: the tracker must not do it as well.
      #
      # @return [void]
      def drop_record
        finish("ack") { @engine.ack(@handle) }
      end

      # @return [String] without the payload, whose arguments may be secret
      def inspect
        "#<#{self.class} queue=#{queue_name} handle=#{@handle.inspect}>"
      end

      private

      def ack
        finish("ack") { @engine.ack(@handle) if settle && @handle }
      end

      # An error here must not reach the processor, which would lose its thread without a word in the log. What others
      # raise into the thread comes after the block, and passes.
      def finish(doing)
        Thread.handle_interrupt(UNINTERRUPTED) do
          yield
        rescue => error
          Log.failure("#{doing} a job", error)
        end
      end

      # @return [Boolean] whether it was this call that settled it
      def settle
        LOCK.synchronize { !@settled && (@settled = true) }
      end

      def respond_to_missing?(name, include_private = false)
        @original.respond_to?(name, include_private)
      end

      # For what some fetchers' units have beyond Sidekiq's own. All that Sidekiq calls is defined above.
      def method_missing(name, ...)
        @original.respond_to?(name) ? @original.public_send(name, ...) : super
      end
    end
  end
end
