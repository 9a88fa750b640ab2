# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Extends the app's own fetcher, whatever its class: it fetches as it always did, and its units of work get the
    # tracker's around them.
    #
    # @api private
    module Fetch
      # @param fetcher [Object]
      # @return [void]
      def self.decorate(fetcher)
        fetcher.extend(self)
      end

      # @return [UnitOfWork, nil]
      def retrieve_work
        unit = super
        unit && UnitOfWork.new(unit)
      end

      # Sidekiq's time is up: puts back what its threads still run. The tracked jobs go back by the tracker's script,
      # the rest (and what has no record, Redis having been away) by the fetcher itself, which gets its own objects.
      #
      # @param units [Array<UnitOfWork>]
      # @param options [Array] Sidekiq 6.5 passes its configuration
      # @return [Object] what the fetcher returns
      def bulk_requeue(units, *options)
        super(UnitOfWork.requeue(units), *options)
      end
    end
  end
end
