# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Version of the gem. The native library carries the same number.
    VERSION = "2.0.0"
  end
end
