# frozen_string_literal: true

# A Ruby script with the gem and the jobs of the specs, as a process that runs beside the example: a Sidekiq that is
# embedded in another program.
class ScriptProcess < AppProcess
  # @param redis [RedisServer]
  # @param code [String] Ruby code after {AppProcess::PRELUDE}
  # @param settings [Hash] interval:, ttl:, bundle: and env: as for {AppProcess}
  def initialize(redis, code, **settings)
    super { |file, gems| [*gems.ruby, file] }
  end
end
