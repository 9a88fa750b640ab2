# frozen_string_literal: true

require "sidekiq-reliable-fetch"

Sidekiq.configure_server { |config| Sidekiq::ReliableFetch.setup_reliable_fetch!(config) }
