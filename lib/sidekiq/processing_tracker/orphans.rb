# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # The recovery on demand, in the thread that asks for it.
    #
    # @api private
    module Orphans
      # How long one wait for an event lasts, at most. Milliseconds.
      WAIT = 60_000

      # How long to wait for what a recovery that ends early has just done. Milliseconds.
      LAST = 500

      class << self
        # Recovers all orphans, and tells of each as it goes, also when it fails or is interrupted.
        #
        # @param settings [Hash{Symbol => Object}]
        # @return [Hash{String => Integer}] jobs by outcome
        # @raise [ConnectionError] when Redis cannot be reached
        def recover(settings)
          native = Native::Orphans.start(settings)
          begin
            until (event = native.next_event(WAIT)) == :stopped
              Events.report(event) if event.is_a?(Hash)
            end
            native.counts
          ensure
            native.cancel
            tell_the_rest(native)
          end
        end

        private

        def tell_the_rest(native)
          while (event = native.next_event(LAST)).is_a?(Hash)
            Events.report(event)
          end
        end
      end
    end
  end
end
