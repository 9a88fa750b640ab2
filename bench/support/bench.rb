# frozen_string_literal: true

# What every benchmark loads.

ENV["BUNDLE_GEMFILE"] ||= File.expand_path("../../Gemfile", __dir__)
begin
  require "bundler/setup"
rescue LoadError, StandardError => error
  abort "#{error.message[0, 200]}\nRun bin/setup once, and `source tmp/env.sh` in this shell."
end

$stdout.sync = true

require_relative "../../spec/support/eventually"
require_relative "../../spec/support/own_process"
require_relative "../../spec/support/queues"
require_relative "../../spec/support/redis_server"
require_relative "../../spec/support/scratch"
require_relative "arguments"
require_relative "bundle"
require_relative "chart"
require_relative "contenders"
require_relative "figures"
require_relative "meter"
require_relative "progress"
require_relative "results"
require_relative "views"
require_relative "worker"

# Measurements of contenders side by side.
module Bench
  ROOT = File.expand_path("../..", __dir__)

  # Runs a benchmark: what the block measures goes to the terminal as a table, and to a JSON file and a plot.
  #
  # @param name [String]
  # @param scenarios [Array<String>] those there are
  # @param contenders [Array<Symbol>] those that run unless others were asked for
  # @param defaults [Hash] see {Arguments}
  # @yieldparam arguments [Arguments]
  # @yieldparam results [Results] for the block to fill
  # @yieldparam progress [Progress]
  def self.run(name, scenarios:, contenders:, **defaults)
    arguments = Arguments.parse(name, scenarios: scenarios, contenders: contenders, **defaults)
    progress = Progress.new
    results = Results.new(name, settings: arguments.to_h)
    puts "#{name}: #{results.environment.map { |key, value| "#{key} #{value}" }.join(", ")}"
    yield arguments, results, progress
    progress.clear
    View.for(results).print
    results.complete(arguments.out) if arguments.partial?
    puts "", "Written: #{results.write(arguments.out).join(", ")}"
  rescue Interrupt
    abort "\ninterrupted"
  end
end
