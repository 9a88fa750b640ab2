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

      # Whether a fetcher may keep jobs in a place of its own while they run. Then a kill leaves two copies of a job, and
      # both come back: the fetcher does not know of the tracker's, nor the other way round.
      #
      # @param fetcher_class [Class]
      # @return [Boolean] false where its units are Sidekiq's own, whose acknowledgement does nothing
      def self.may_keep_jobs?(fetcher_class)
        !(fetcher_class <= ::Sidekiq::BasicFetch && fetcher_class::UnitOfWork == ::Sidekiq::BasicFetch::UnitOfWork)
      end

      # Sidekiq's time is up: puts back what its threads still run. See {UnitOfWork.requeue}. What is left to the fetcher
      # goes to it as its own objects.
      #
      # @param units [Array<UnitOfWork>]
      # @param options [Array] Sidekiq 6.5 passes its configuration
      # @return [Object] what the fetcher returns
      def bulk_requeue(units, *options)
        UnitOfWork.requeue(units) { |originals| super(originals, *options) }
      end
    end
  end
end
