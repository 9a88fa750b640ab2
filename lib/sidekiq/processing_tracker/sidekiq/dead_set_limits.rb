# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What Sidekiq's own configuration says of the dead set, and who is to hear of a death. Sidekiq 6.5 keeps it in the
    # module, later versions in an object.
    #
    # @api private
    module DeadSetLimits
      # Limits that no dead set comes to.
      NONE = {dead_max_jobs: 1 << 40, dead_timeout_ms: 1 << 50}.freeze

      class << self
        # @param known [Boolean] false: Sidekiq's settings need not be those of the servers, so nothing may be lost by them.
        #   (Sidekiq trims by itself with the next job that dies in a server.)
        # @return [Hash{Symbol => Object}] a part of what {Native::Engine.start} takes
        # @raise [ConfigurationError] when Sidekiq's own setting cannot be used
        def to_native(known: true)
          {
            dead_max_jobs: known ? number(:dead_max_jobs).to_i : NONE[:dead_max_jobs],
            dead_timeout_ms: known ? (number(:dead_timeout_in_seconds) * 1000).to_i : NONE[:dead_timeout_ms],
            timestamps: timestamps
          }
        end

        # @return [Array<#call>] to be called with the job and the error
        def death_handlers
          configuration[:death_handlers].to_a
        end

        # Since 8.0 the times in a payload are whole milliseconds; before, they were seconds with a fraction.
        #
        # @return [String] "milliseconds" or "seconds"
        def timestamps
          (Gem::Version.new(::Sidekiq::VERSION) >= Gem::Version.new("8")) ? "milliseconds" : "seconds"
        end

        # @param time [Time]
        # @return [Integer, Float] as the installed Sidekiq writes it into payloads
        def timestamp(time)
          (timestamps == "milliseconds") ? (time.to_r * 1000).to_i : time.to_f.round(3)
        end

        private

        def configuration
          ::Sidekiq.respond_to?(:default_configuration) ? ::Sidekiq.default_configuration : ::Sidekiq
        end

        # is_a? and not ===: ActiveSupport's 6.months answers the first only.
        def number(option)
          value = configuration[option]
          return value.to_f if value.is_a?(Numeric) && value.real? && value.to_f.finite? && value.to_f >= 0

          raise ConfigurationError, "Sidekiq's #{option} is #{value.inspect}: allowed is a number from 0"
        end
      end
    end
  end
end
