# frozen_string_literal: true

require "sidekiq-unique-jobs"

Sidekiq.configure_server { |config| config[:fetch_class] = SidekiqUniqueJobs::Fetch::Reliable }
