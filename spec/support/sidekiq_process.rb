# frozen_string_literal: true

require "json"
require "securerandom"

# A real `sidekiq` command with an app file of its own. The only way in which the specs start Sidekiq.
class SidekiqProcess
  LIB = File.expand_path("../../lib", __dir__)

  # What an app file begins with. Jobs write what they did to the list `done`, so that a spec can count it.
  PRELUDE = <<~RUBY
    # frozen_string_literal: true
    $stdout.sync = true
    require "sidekiq"
    require "sidekiq-processing-tracker"

    # Pushes to a list in Redis, on every version of Sidekiq.
    def note(list, value)
      Sidekiq.redis { |conn| conn.rpush(list, value.to_s) }
    end

    # Waits until a key exists in Redis, so a spec can tell a job when to end.
    def wait_for_key(key)
      sleep 0.02 until Sidekiq.redis { |conn| conn.get(key) }
    end

    # Notes when it starts, waits for the key `go`, notes when it is done.
    class WaitingJob
      include Sidekiq::Job
      include Sidekiq::ProcessingTracker::Worker

      def perform(*args)
        note("started", [jid, Process.pid, *args].to_json)
        wait_for_key("go")
        note("done", [jid, Process.pid, *args].to_json)
      end
    end

    # The same without the mark.
    class PlainJob
      include Sidekiq::Job

      def perform(*args)
        note("started", [jid, Process.pid, *args].to_json)
        wait_for_key("go")
        note("done", [jid, Process.pid, *args].to_json)
      end
    end

    # Notes that it ran.
    class QuickJob
      include Sidekiq::Job
      include Sidekiq::ProcessingTracker::Worker

      def perform(*args)
        note("done", [jid, Process.pid, *args].to_json)
      end
    end
  RUBY

  # @return [OwnProcess]
  attr_reader :process

  # @param redis [RedisServer]
  # @param app [String] Ruby code after {PRELUDE}
  # @param interval [Numeric] heartbeat_interval, seconds
  # @param ttl [Integer] heartbeat_ttl, seconds
  # @param timeout [Integer] seconds Sidekiq waits for its jobs when it ends
  # @param env [Hash{String => String, nil}]
  def initialize(redis, app: "", concurrency: 2, queues: ["default"], interval: 0.4, ttl: 2, timeout: 5, env: {})
    folder = Scratch.folder
    file = File.join(folder, "app.rb")
    File.write(file, PRELUDE + app)
    command = [Gem.ruby, "-I", LIB, Gem.bin_path("sidekiq", "sidekiq"), "-r", file, "-c", concurrency.to_s,
      "-t", timeout.to_s, *queues.flat_map { |queue| ["-q", queue] }]
    settings = {"REDIS_URL" => redis.url, "HEARTBEAT_INTERVAL" => interval.to_s, "HEARTBEAT_TTL" => ttl.to_s,
                "RACK_ENV" => "test", "RAILS_ENV" => nil, "DYNO" => nil}
    @process = OwnProcess.new(*command, log: File.join(folder, "sidekiq.log"), env: settings.merge(env), chdir: folder)
  end

  # Returns when the engine has registered.
  #
  # @return [self]
  def up(within: 30)
    wait_for_log(/ProcessingTracker started: identity=/, within: within)
  end

  # @return [String, nil] as the boot line names it
  def identity
    log[/ProcessingTracker started: identity=(\S+)/, 1]
  end

  # @return [self]
  def wait_for_log(pattern, within: 30)
    Eventually.eventually("#{pattern.inspect} in the log of Sidekiq", within: within) do
      raise "Sidekiq ended without #{pattern.inspect} in its log:\n#{log}" unless log.match?(pattern) || process.running?

      log.match?(pattern)
    end
    self
  end

  # @return [String]
  def log = process.output

  def pid = process.pid

  # kill -9
  def kill = process.kill

  # TERM, and wait for the end.
  #
  # @return [Process::Status]
  def stop(within: 30)
    process.signal(:TERM).wait(within: within)
  end

  def signal(name) = process.signal(name)

  def pause = process.pause

  def resume = process.resume

  def running? = process.running?
end
