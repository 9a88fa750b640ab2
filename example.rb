# frozen_string_literal: true

# A job whose worker is killed with kill -9, and that comes back: everything an application needs, in one file.
#
#   bin/setup           # once
#   ruby example.rb     # with a redis-server of its own; with REDIS_URL set, with that one
#
# The first half is the application, and the workers load it too. The second half plays the accident.

ENV["BUNDLE_GEMFILE"] ||= File.expand_path("Gemfile", __dir__)
require "bundler/setup"
$LOAD_PATH.unshift(File.expand_path("lib", __dir__))
require "fileutils"
require "tmpdir"
require "sidekiq"
require "sidekiq-processing-tracker"

# --- The application -------------------------------------------------------------------------------------------

Sidekiq::ProcessingTracker.configure do |config|
  config.namespace = "example_app_processing"
  # So that nobody waits long here. By default it is every 5 s, and 30 s until a process counts as dead.
  config.heartbeat_interval = 0.5
  config.heartbeat_ttl = 3
end

class ExampleJob
  include Sidekiq::Job
  include Sidekiq::ProcessingTracker::Worker # marks the class: its jobs are tracked

  sidekiq_options queue: "example_app"

  def perform
    report("started")
    sleep 1 # the work
    report("finished")
  end

  private

  def report(what)
    key = Sidekiq::ProcessingTracker.namespaced_key(what)
    Sidekiq.redis { |conn| conn.rpush(key, Process.pid) }
  end
end

# --- The accident ----------------------------------------------------------------------------------------------

module Example
  TRACKER = Sidekiq::ProcessingTracker

  class << self
    def run
      @folder = Dir.mktmpdir("example-")
      @children = []
      ENV.update("REDIS_URL" => "unix://#{start_redis}", "REDIS_PROVIDER" => nil) unless ENV["REDIS_URL"]
      wait_for("an answer from Redis", within: 5) { answers? }
      show_redis
      show_recovery
    rescue SignalException => error
      exit 128 + error.signo
    ensure
      clean_up
    end

    private

    def show_redis
      key = TRACKER.namespaced_key("demo_key")
      TRACKER.redis_sync do |conn|
        puts "Redis connection: #{conn.ping}"
        conn.set(key, "demo_value")
        puts "Namespace test: #{key} = #{conn.get(key)}"
      end
    end

    def show_recovery
      forget
      jid = ExampleJob.perform_async
      first = start_worker("first")
      wait_for("the start of the job") { reports("started").any? }
      puts "Job #{jid} runs in process #{first}. kill -9 #{first}"
      killed_at = now
      kill(first)

      second = start_worker("second")
      puts "Process #{second} is started. The tracker waits until the dead process's lease has run out ..."
      wait_for("the job's second start") { reports("started").include?(second.to_s) }
      seconds = now - killed_at
      wait_for("the end of the job") { reports("finished").any? }
      puts format("Job %s came back after %.1f s and ran to its end in process %s.", jid, seconds, reports("finished").join(", "))
    end

    def start_redis
      socket = File.join(@folder, "redis.sock")
      @redis = start("redis-server", "--port", "0", "--unixsocket", socket, "--dir", @folder, "--save", "", log: "redis")
      socket
    rescue Errno::ENOENT
      abort "There is no redis-server on this machine. Install it, or set REDIS_URL."
    end

    def start_worker(name)
      start(Gem.ruby, Gem.bin_path("sidekiq", "sidekiq"), "-r", File.expand_path(__FILE__), "-q", "example_app", "-c", "1", log: name)
    end

    # In a process group of its own: Ctrl-C is for this script, which then ends the others.
    def start(*command, log:)
      output = File.join(@folder, "#{log}.log")
      pid = Process.spawn(*command, in: File::NULL, out: output, err: %i[child out], pgroup: true)
      @children << pid
      pid
    end

    def kill(pid)
      Process.kill(:KILL, pid)
      Process.wait(pid)
      @children.delete(pid)
    end

    def answers?
      Sidekiq.redis(&:ping).tap { @last_error = nil }
    rescue => error
      @last_error = error.message
      nil
    end

    def reports(what)
      Sidekiq.redis { |conn| conn.lrange(TRACKER.namespaced_key(what), 0, -1) }
    end

    # Everything of this example is in keys of its own, so it may run on a Redis that others use too.
    def forget
      Sidekiq.redis do |conn|
        dead = conn.zrange(TRACKER.namespaced_key("instances"), 0, -1).flat_map { |name| ["inflight:#{name}", "info:#{name}"] }
        keys = dead + %w[demo_key started finished clock instances stats journal]
        conn.del("queue:example_app", *keys.map { |key| TRACKER.namespaced_key(key) })
        conn.srem("queues", ["example_app"])
      end
    end

    def wait_for(what, within: 30)
      deadline = now + within
      until yield
        abort "#{what} did not come within #{within} s. #{@last_error}\n#{logs}" if now > deadline

        sleep 0.02
      end
    end

    def logs
      Dir[File.join(@folder, "*.log")].sort.map { |file| "#{File.basename(file)}:\n#{File.read(file)}" }.join("\n")
    end

    def now
      Process.clock_gettime(Process::CLOCK_MONOTONIC)
    end

    # The workers say goodbye to Redis, then the server goes. A second Ctrl-C must not cut this short.
    def clean_up
      %w[INT TERM].each { |signal| trap(signal, "IGNORE") }
      workers = @children - [@redis]
      workers.each { |pid| Process.kill(:TERM, pid) }
      workers.each { |pid| Process.wait(pid) }
      forget if answers?
      kill(@redis) if @redis
      FileUtils.remove_entry(@folder)
    end
  end
end

if $PROGRAM_NAME == __FILE__
  $stdout.sync = true
  Sidekiq.logger.level = Logger::WARN
  Example.run
end
