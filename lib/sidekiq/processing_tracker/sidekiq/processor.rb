# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Prepended to Sidekiq::Processor: tells the middleware which job its thread is working on, and notices when a
    # thread ends its work on a job without having acknowledged it. Both methods are the same in Sidekiq 6.5 to 8.1.
    #
    # @api private
    module Processor
      private

      def process(unit)
        return super unless unit.is_a?(UnitOfWork)

        UnitOfWork.during(unit) { super }
      end

      # The middleware gets the very hash that is passed here.
      def dispatch(job_hash, queue, jobstr)
        UnitOfWork.current&.job_hash = job_hash
        super
      end
    end
  end
end
