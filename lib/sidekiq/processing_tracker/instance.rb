# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A process that tracks jobs, as Redis knows it. See {ProcessingTracker.instances}.
    #
    # - `identity`: `instance_id:pid:nonce`; `instance_id`, the label that a person chose; `pid`
    # - `hostname`, `queues` (an Array), `concurrency`, `sidekiq_identity` (as in Sidekiq::ProcessSet): what it tells of
    #   itself; nil, or empty, where somebody has removed that
    # - `started_at`: a Time: when it took this identity, which is later than its boot where it has lost a lease
    # - `last_beat_at`: a Time: its last heartbeat. It is worked out from the end of its lease, so it may have been longer
    #   ago: time in which Redis was away, or in which nobody beat, does not show. Of a process that has no lease any
    #   more it is the last time at which its Ruby threads were seen to run, which is up to some beats too early
    # - `state`: see {STATES}
    # - `in_flight`: how many jobs are on record there; nil where somebody has overwritten that key
    #
    # Frozen. Two are equal when all of that is.
    Instance = Struct.new(:identity, :instance_id, :hostname, :pid, :started_at, :last_beat_at, :state, :in_flight, :queues,
      :concurrency, :sidekiq_identity, keyword_init: true) do
      include Value
    end

    class Instance
      # - :running: it has its lease
      # - :silent: it has its lease, but has not beaten for longer than a lease lasts. The lease clock stands, because
      #   Redis was away until just now, or because no process is left to move it: then all may be dead
      # - :dead: its lease has run out, or it has left jobs behind. The next process that beats recovers them
      # - :recovering: another process puts its jobs back, or tries to (docs/operations.md, *Stuck jobs*)
      STATES = %i[running silent dead recovering].freeze

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
