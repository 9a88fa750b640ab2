# frozen_string_literal: true

require "json"

# A Ruby process that has the gem and the jobs of the specs, with its output in a file.
class AppProcess
  LIB = File.expand_path("../../lib", __dir__)

  # What the processes of the specs are set to, in seconds, unless a spec says otherwise.
  INTERVAL = 0.4
  TTL = 2
  # The pace of the lease clock that follows from both (docs/protocol.md).
  STEP = [INTERVAL, TTL / 5.0].min

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

    # Waits for a file (see Gate) and says what it does on its standard output: it needs no Redis.
    class GatedJob
      include Sidekiq::Job
      include Sidekiq::ProcessingTracker::Worker

      def perform(gate, *)
        $stdout.write("job started \#{jid}\n")
        sleep 0.02 until [gate, "\#{gate}.\#{Process.pid}"].any? { |file| File.exist?(file) }
        $stdout.write("job done \#{jid}\n")
      end
    end
  RUBY

  # @return [OwnProcess]
  attr_reader :process

  # @param redis [RedisServer]
  # @param app [String] Ruby code after {PRELUDE}
  # @param interval [Numeric] heartbeat_interval, seconds
  # @param ttl [Integer] heartbeat_ttl, seconds
  # @param bundle [Symbol, nil] the gems to use, see {Bundle}
  # @param env [Hash{String => String, nil}]
  # @yieldparam file [String] where the code is
  # @yieldparam gems [Bundle]
  # @yieldreturn [Array<String>] the command
  def initialize(redis, app, interval: INTERVAL, ttl: TTL, bundle: nil, env: {})
    folder = Scratch.folder
    file = File.join(folder, "app.rb")
    File.write(file, self.class::PRELUDE + LeastUser.code + app)
    settings = {"REDIS_URL" => redis.url, "HEARTBEAT_INTERVAL" => interval.to_s, "HEARTBEAT_TTL" => ttl.to_s,
                "RACK_ENV" => "test", "RAILS_ENV" => nil, "DYNO" => nil}
    gems = Bundle[bundle]
    @process = OwnProcess.new(*yield(file, gems), log: File.join(folder, "app.log"),
      env: settings.merge(gems.environment, env), chdir: folder)
  end

  # Returns when the engine has registered, and the launcher has said what it has chosen. Each is told by a thread of its own.
  #
  # @return [self]
  def up(within: 30)
    wait_for_log(/ProcessingTracker started: identity=/, within: within).wait_for_log(/ProcessingTracker scheduler: /, within: within)
  end

  # @return [String, nil] as the newest boot line names it
  def identity
    identities.last
  end

  # @return [Array<String>] as the boot lines name them, an embedded Sidekiq may have several
  def identities
    log.scan(/ProcessingTracker started: identity=(\S+)/).flatten
  end

  # @return [self]
  def wait_for_log(pattern, within: 30)
    Eventually.eventually("#{pattern.inspect} in the log of the process", within: within) do
      raise "The process ended without #{pattern.inspect} in its log:\n#{log}" unless log.match?(pattern) || process.running?

      log.match?(pattern)
    end
    self
  end

  # @return [String]
  def log = process.output

  # @return [Array<String>] the jids of the GatedJobs that this process has begun
  def started = log.scan(/^job started (\S+)$/).flatten

  # @return [Array<String>] the jids of the GatedJobs that this process has done
  def done = log.scan(/^job done (\S+)$/).flatten

  # Returns when these GatedJobs have begun in this process.
  #
  # @param jids [Array<String>]
  # @return [self]
  def runs(*jids, within: 30)
    Eventually.eventually("the start of #{jids.join(", ")}", within: within) { (jids - started).empty? }
    self
  end

  def pid = process.pid

  # kill -9
  def kill = process.kill

  # @param name [Symbol] like :TSTP
  # @return [self]
  def signal(name)
    process.signal(name)
    self
  end

  # SIGSTOP, see {OwnProcess#pause}.
  #
  # @return [self]
  def pause
    process.pause
    self
  end

  # @return [self]
  def resume = signal(:CONT)

  def running? = process.running?
end
