# frozen_string_literal: true

# A real `sidekiq` command with an app file of its own. With {ScriptProcess} (Sidekiq embedded) the only way in which
# the specs start Sidekiq.
class SidekiqProcess < AppProcess
  # @param redis [RedisServer]
  # @param app [String] Ruby code after {AppProcess::PRELUDE}
  # @param timeout [Integer] seconds Sidekiq waits for its jobs when it ends
  # @param settings [Hash] interval:, ttl:, bundle: and env: as for {AppProcess}
  def initialize(redis, app: "", concurrency: 2, queues: ["default"], timeout: 5, **settings)
    super(redis, app, **settings) do |file, gems|
      [*gems.ruby_with("sidekiq", "sidekiq"), "-r", file, "-c", concurrency.to_s,
        "-t", timeout.to_s, *queues.flat_map { |queue| ["-q", queue] }]
    end
  end

  # TERM, and wait for the end.
  #
  # @return [Process::Status]
  def stop(within: 30)
    process.signal(:TERM).wait(within: within)
  end
end
