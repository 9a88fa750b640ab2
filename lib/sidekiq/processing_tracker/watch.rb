# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What there is to see in Redis, as Ruby objects. Reads only.
    #
    # @api private
    class Watch
      # More than any journal has, and few enough for the native library.
      ALL = (1 << 31) - 1

      # @param config [Configuration]
      # @raise [ConfigurationError] when an option cannot be used
      def initialize(config)
        @native = Native::Watch.new(Settings.target(config), config.namespace)
      end

      # @return [Array<Instance>]
      # @raise [ConnectionError]
      def instances
        @native.instances.map { |seen| Instance.from_native(seen) }
      end

      # A page at a time: so much memory is needed, and no more.
      #
      # @yieldparam job [InFlightJob]
      # @return [void]
      # @raise [ConnectionError]
      def each_in_flight(&block)
        @native.identities.each { |identity| each_of(identity, &block) }
        nil
      end

      # @param count [Integer]
      # @return [Array<Event>] the newest first
      # @raise [ConnectionError]
      def journal(count)
        @native.journal([count, ALL].min).filter_map { |line| Event.from_journal(line) }
      end

      # @return [Hash{Symbol => Object}] see {ProcessingTracker.stats}
      # @raise [ConnectionError]
      def stats
        seen = instances
        states = seen.map(&:state).tally
        running, orphaned = seen.partition { |instance| %i[running silent].include?(instance.state) }
        {
          totals: @native.totals.transform_keys(&:to_sym),
          instances: Instance::STATES.to_h { |state| [state, states.fetch(state, 0)] },
          in_flight: jobs(running),
          orphans: jobs(orphaned)
        }
      end

      private

      def each_of(identity)
        page = nil
        loop do
          jobs, page = @native.in_flight(identity, page)
          jobs.each do |jid, job_class, queue, since|
            yield InFlightJob.new(jid: jid, job_class: job_class, queue: queue, since: Time.at(0, since, :millisecond), identity: identity)
          end
          break unless page
        end
      end

      def jobs(instances)
        instances.sum { |instance| instance.in_flight.to_i }
      end
    end
  end
end
