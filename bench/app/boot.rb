# frozen_string_literal: true

# The application of the benchmarks, the same for all contenders. What makes one of them is a file of its own.

require "sidekiq"
require "sidekiq/fetch"
require_relative "marks"
require_relative "jobs"

Sidekiq.configure_server do |config|
  config.logger.level = Logger::WARN
  # Several processes begin together.
  gate = ENV["BENCH_GATE"]
  config.on(:startup) { Marks.wait_for(gate) } if gate
end

require_relative "contenders/#{ENV.fetch("BENCH_CONTENDER")}"
