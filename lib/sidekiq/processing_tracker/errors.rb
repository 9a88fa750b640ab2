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
  end
end
