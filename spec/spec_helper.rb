# frozen_string_literal: true

require "json"
require "sidekiq"
require "sidekiq-processing-tracker"

Dir[File.join(__dir__, "support", "*.rb")].sort.each { |file| require file }

# Sidekiq logs the options of each connection pool.
Sidekiq.logger.level = Logger::WARN

RSpec.configure do |config|
  config.disable_monkey_patching!
  config.expect_with(:rspec) { |expectations| expectations.include_chain_clauses_in_custom_matcher_descriptions = true }
  config.filter_run_when_matching :focus
  config.order = :random
  Kernel.srand config.seed

  config.include Eventually
  config.include WithEnvironment
  config.extend Fetches

  # After all that looks at what there is.
  config.append_after { Scratch.close }
end
