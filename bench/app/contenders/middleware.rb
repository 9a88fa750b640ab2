# frozen_string_literal: true

# This gem around Sidekiq's own fetch.

require "sidekiq-processing-tracker"

Sidekiq::ProcessingTracker.configure { |config| config.fetch = :sidekiq if config.respond_to?(:fetch=) }
