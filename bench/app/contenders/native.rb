# frozen_string_literal: true

# This gem with the native fetch.

require "sidekiq-processing-tracker"

Sidekiq::ProcessingTracker.configure { |config| config.fetch = :native }
