# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A process that tracks jobs, as Redis knows it. See {ProcessingTracker.instances}.
    #
    # What a process tells of itself is nil, or empty, where somebody has removed it from Redis.
    class Instance
      include Value

      # In the order in which {#inspect} shows them.
      MEMBERS = %i[identity instance_id hostname pid started_at last_beat_at state in_flight queues concurrency sidekiq_identity].freeze

      # - :running: it has its lease
      # - :silent: it has its lease, but has not beaten for longer than a lease lasts. The lease clock stands, because
      #   Redis was away until just now, or because no process is left to move it: then all may be dead
      # - :dead: its lease has run out, or it has left jobs behind. The next process that beats recovers them
      # - :recovering: another process puts its jobs back, or tries to (docs/operations.md, *Stuck jobs*)
      STATES = %i[running silent dead recovering].freeze

      # @return [String] `instance_id:pid:nonce`
      attr_reader :identity

      # @return [String] the label that a person chose
      attr_reader :instance_id

      # @return [String, nil] its machine
      attr_reader :hostname

      # @return [Integer, nil] its process id there
      attr_reader :pid

      # @return [Time, nil] when it took this identity: later than its boot where it has lost a lease
      attr_reader :started_at

      # @return [Time, nil] its last heartbeat, worked out from the end of its lease. It may have been longer ago: time in which
      #   Redis was away, or nobody beat, does not show. Without a lease it is the last time at which its Ruby threads were
      #   seen to run, which is some beats earlier
      attr_reader :last_beat_at

      # @return [Symbol] one of {STATES}
      attr_reader :state

      # @return [Integer, nil] how many jobs are on record there; nil where somebody has overwritten that key
      attr_reader :in_flight

      # @return [Array<String>] that it serves
      attr_reader :queues

      # @return [Integer, nil] how many jobs it can run at once
      attr_reader :concurrency

      # @return [String, nil] what Sidekiq calls it, as in Sidekiq::ProcessSet
      attr_reader :sidekiq_identity

      class << self
        # @api private
        # @param seen [Hash{String => Object}] as {Native::Watch#instances} gives it
        # @return [Instance]
        def from_native(seen)
          new(
            **seen.slice("identity", "instance_id", "hostname", "pid", "in_flight", "concurrency", "sidekiq_identity").transform_keys(&:to_sym),
            started_at: time(seen["started_at"]), last_beat_at: time(seen["last_beat_at"]), state: seen["state"].to_sym,
            queues: seen["queues"].to_s.scrub.split(",").freeze
          )
        end

        private

        def time(milliseconds)
          Time.at(0, milliseconds, :millisecond) if milliseconds
        end
      end
    end
  end
end
