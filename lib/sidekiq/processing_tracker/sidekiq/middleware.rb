# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Server middleware, the outermost: sees to it that Redis has the record of a marked job before the job runs.
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

        # Takes this out of a chain: the native fetch needs none, and each entry costs every job some time.
        #
        # @param chain [Sidekiq::Middleware::Chain]
        # @return [void]
        def absent(chain)
          chain.remove(self)
        end
      end

      # @param instance [Object] the job's instance
      # @param job [Hash] the parsed payload
      # @param _queue [String]
      # @return [Object] what the job returns
      def call(instance, job, _queue)
        unit = UnitOfWork.current
        return yield unless unit.is_a?(UnitOfWork) && unit.runs?(job)
        # All that is pending for this thread is raised at the end of this block, outside of every rescue.
        return yield unless Thread.handle_interrupt(UNINTERRUPTED) { track(unit, instance, job) } == :elsewhere

        # The process was stopped or cut off for longer than its lease: the job was recovered before it began here.
        Log.write(:warn, "does not run job #{job["jid"]}: it was recovered while this process was away")
        nil
      end

      private

      # @return [:elsewhere, nil] the first where the job must not run here
      def track(unit, instance, job)
        engine = Runtime.current&.engine
        return unless engine

        marked = Mark.of(instance, job)
        return unless marked && unit.track(engine, (marked unless marked == true))

        :elsewhere unless unit.await_record
      rescue => error
        # An error of the tracker's own, whatever it is: the job runs.
        Log.failure("track a job", error)
      end
    end
  end
end
