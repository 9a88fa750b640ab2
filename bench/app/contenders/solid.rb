# frozen_string_literal: true

require "sidekiq_solid_fetch"

Sidekiq.configure_server { |config| SidekiqSolidFetch.enable!(config) }
