# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Server middleware, the outermost: sees to it that Redis has the record of a marked job before the job runs. Under the
    # native fetch it has one already, and what remains is the mark that only the job's class has.
    #
    # It tracks only the job that its thread's processor has fetched: not a nested perform_inline, nor anything in a
    # console, a web process or the testing modes. Whatever goes wrong in here, the job runs.
    #
    # @api private
    class Middleware
      # What others raise into the thread (Sidekiq::Shutdown, a timeout, Thread#kill) may come at any moment. It waits
      # until the calls to the engine are done, a second at most, so that it is not taken for an error of the tracker.
      UNINTERRUPTED = {Object => :never}.freeze
      private_constant :UNINTERRUPTED

      class << self
        # Makes this the first of a chain, wherever it was.
        #
        # @param chain [Sidekiq::Middleware::Chain]
        # @return [void]
        def outermost(chain)
          chain.prepend(self) unless chain.entries.first&.klass == self
        end
      end

      # @param instance [Object] the job's instance
      # @param job [Hash] the parsed payload
      # @param _queue [String]
      # @return [Object] what the job returns
      def call(instance, job, _queue)
        unit = UnitOfWork.current
        return yield unless unit&.runs?(job)
        # All that is pending for this thread is raised at the end of this block, outside of every rescue.
        return yield unless Thread.handle_interrupt(UNINTERRUPTED) { track(unit, instance, job) } == :elsewhere

        # The process was stopped or cut off for longer than its lease: the job was recovered before it began here.
        Log.write(:warn, "does not run job #{job["jid"]}: it was recovered while this process was away")
        nil
      end

      private

      # @return [:elsewhere, nil] the first where the job must not run here
      def track(unit, instance, job)
        return mark(unit, instance, job) if unit.is_a?(ClaimedJob)

        engine = Instance.current&.engine
        return unless engine

        marked = marked_by(instance, job)
        return unless marked && unit.track(engine, (marked unless marked == true))

        :elsewhere unless unit.await_record
      rescue => error
        # An error of the tracker's own, whatever it is: the job runs.
        Log.failure("track a job", error)
      end

      def mark(unit, instance, job)
        return if job.key?(Worker::OPTION)

        marked = marked_by(instance, job)
        unit.engine.mark(marked, UnitOfWork::RECORD_TIMEOUT) if marked.is_a?(String)
        nil
      rescue => error
        Log.failure("mark a job", error)
      end

      # @return [true, String, nil] true where the payload says it or all jobs are tracked; the class where only that
      #   says it. What the payload says beats the class, `"processing": false` too.
      def marked_by(instance, job)
        return true if ProcessingTracker.track == :all
        return job[Worker::OPTION] == true || nil if job.key?(Worker::OPTION)

        marking_class(instance.class, job["class"]) || marking_class(named(job["wrapped"]), job["wrapped"])
      end

      # @return [String, nil] the name as the payload has it, which is what recovery compares
      def marking_class(job_class, name)
        return unless job_class.respond_to?(:get_sidekiq_options)

        name if job_class.get_sidekiq_options[Worker::OPTION] == true
      end

      # A class that cannot be found or loaded is for the job itself to report.
      def named(class_name)
        Object.const_get(class_name) if class_name.is_a?(String)
      rescue StandardError, ScriptError
        nil
      end
    end
  end
end
