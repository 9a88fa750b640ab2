# frozen_string_literal: true

# The gem's name, so that a plain `gem "sidekiq-processing-tracker"` in a Gemfile loads it.
require_relative "sidekiq/processing_tracker"
