# frozen_string_literal: true

# The application of the benchmarks: jobs that do nothing, on stock Sidekiq or under one kind of tracking.

require "sidekiq"

class NoopJob
  include Sidekiq::Job

  sidekiq_options processing: true

  def perform
  end
end

Sidekiq.configure_server { |config| config.logger.level = Logger::WARN }

case ENV.fetch("BENCH_CONTENDER")
when "tracker" then require "sidekiq-processing-tracker"
when "ruby" then require_relative "tracking_in_ruby"
end
