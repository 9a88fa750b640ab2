# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Prepended to Sidekiq::Processor: tells the middleware which job its thread is working on, and notices when a
    # thread ends its work on a job without having acknowledged it. The methods are the same in Sidekiq 6.5 to 8.1.
    #
    # @api private
    module Processor
      private

      def run
        super
      ensure
        give_up_current_unit
      end

      def process_one(...)
        give_up_current_unit
        super
      end

      # What was raised into the thread may have come between its getting a job and its beginning with it, or its end and our
      # noticing that. Sidekiq swallows some of it, and the thread goes on.
      def give_up_current_unit
        unit = UnitOfWork.current
        UnitOfWork.give_up(unit) if unit
      end

      # The work between here and the job's first line is done for each job, by a processor that may have just woken up: each method
      # that need not be called is worth a microsecond or two.
      def process(unit)
        @processing_tracker_unit = unit
        if unit.is_a?(ClaimedJob)
          begin
            unit.begin
            super
          ensure
            UnitOfWork.give_up(unit)
          end
        elsif unit.is_a?(UnitOfWork)
          UnitOfWork.during(unit) { super }
        else
          super
        end
      ensure
        @processing_tracker_unit = nil
      end

      # Under the native fetch the job is on record already, and what remains is the mark that only its class has. The middleware gets
      # the very hash that is passed here.
      def dispatch(job_hash, queue, jobstr)
        case unit = @processing_tracker_unit
        when ClaimedJob
          return super if !job_hash.is_a?(Hash) || job_hash.key?(Worker::OPTION)

          return super do |instance|
            Mark.note(unit, instance, job_hash)
            yield instance
          end
        when UnitOfWork
          unit.job_hash = job_hash
        end
        super
      end
    end
  end
end
