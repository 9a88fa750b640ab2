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

      def process(unit)
        case unit
        when ClaimedJob
          begin
            unit.begin
            super
          ensure
            UnitOfWork.give_up(unit)
          end
        when UnitOfWork then UnitOfWork.during(unit) { super }
        else super
        end
      end

      # The middleware gets the very hash that is passed here.
      def dispatch(job_hash, queue, jobstr)
        UnitOfWork.current&.job_hash = job_hash
        super
      end

      # The job begins. Under the native fetch it is on record already, and what remains is the mark that only its class has.
      def execute_job(instance, arguments)
        unit = UnitOfWork.current
        Mark.note(unit, instance) if unit.is_a?(ClaimedJob)
        super
      end
    end
  end
end
