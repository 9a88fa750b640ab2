# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What every error of this gem descends from. The native library raises these classes too.
    class Error < StandardError; end

    # A setting cannot be used, or was changed while the engine runs. The message names the option.
    class ConfigurationError < Error; end

    # Redis cannot be reached, or refuses what the tracker asks.
    class ConnectionError < Error; end

    # Redis gave a reply that makes no sense to the tracker.
    class ProtocolError < Error; end

    # A fault in the native library itself. Please report it.
    class InternalError < Error; end

    # Why a job is in the dead set: it was orphaned more than `max_recoveries` times, each within `recovery_window` of the
    # time before, so it may well be what kills its processes. Never raised. Sidekiq's death handlers are given one; in the
    # dead set and on Sidekiq's pages the name stands as the job's error class.
    class PoisonPill < Error; end

    # Why a job is in the dead set: its process died, and it may not run again by itself, since it was not marked or
    # could not be read. Never raised: its name stands as the job's error class.
    class Orphaned < Error; end
  end
end
