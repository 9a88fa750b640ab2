# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Whether a job is marked, and where it says so.
    #
    # @api private
    module Mark
      # How long to wait until Redis knows that a class is marked before its first job runs all the same. Milliseconds.
      TIMEOUT = 1_000
      # What others raise into the thread waits until the call to the engine is done.
      UNINTERRUPTED = {Object => :never}.freeze

      private_constant :UNINTERRUPTED

      class << self
        # @param instance [Object] the job's instance
        # @param job [Hash] the parsed payload
        # @return [true, String, nil] true where the payload says it or all jobs are tracked; the class where only that
        #   says it. What the payload says beats the class, `"processing": false` too
        def of(instance, job)
          return true if ProcessingTracker.track == :all
          return job[Worker::OPTION] == true || nil if job.key?(Worker::OPTION)

          marking_class(instance.class, job["class"]) || marking_class(named(job["wrapped"]), job["wrapped"])
        end

        # Sees to it that recovery will know of a mark which only the class of a claimed job has. Raises nothing.
        #
        # @param unit [ClaimedJob]
        # @param instance [Object] the job's instance
        # @param job [Hash] the parsed payload
        # @return [void]
        def note(unit, instance, job)
          marked = of(instance, job)
          return unless marked.is_a?(String)

          Thread.handle_interrupt(UNINTERRUPTED) { unit.engine.mark(marked, TIMEOUT) }
        rescue => error
          # An error of the tracker's own, whatever it is: the job runs.
          Log.failure("mark a job", error)
        end

        private

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
end
