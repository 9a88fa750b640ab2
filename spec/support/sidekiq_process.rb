# frozen_string_literal: true

# A real `sidekiq` command with an app file of its own. With {ScriptProcess} (Sidekiq embedded) the only way in which
# the specs start Sidekiq.
class SidekiqProcess < AppProcess
  # @param redis [RedisServer]
  # @param app [String] Ruby code after {AppProcess::PRELUDE}
  # @param interval [Numeric] heartbeat_interval, seconds
  # @param ttl [Integer] heartbeat_ttl, seconds
  # @param timeout [Integer] seconds Sidekiq waits for its jobs when it ends
  # @param env [Hash{String => String, nil}]
  def initialize(redis, app: "", concurrency: 2, queues: ["default"], interval: INTERVAL, ttl: TTL, timeout: 5, env: {})
    super(redis, app, interval: interval, ttl: ttl, env: env) do |file|
      [Gem.ruby, "-I", LIB, Gem.bin_path("sidekiq", "sidekiq"), "-r", file, "-c", concurrency.to_s,
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
