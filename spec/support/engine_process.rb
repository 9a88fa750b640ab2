# frozen_string_literal: true

require "json"

# A Ruby process with the native library and a Redis to use, for what ends a process or forks it.
class EngineProcess
  # What every script begins with.
  PRELUDE = <<~RUBY
    # frozen_string_literal: true
    $stdout.sync = true
    require "json"
    require "sidekiq-processing-tracker"
    Native = Sidekiq::ProcessingTracker::Native
    SETTINGS = JSON.parse(ENV.fetch("SETTINGS"), symbolize_names: true)
    SETTINGS[:info] = {"pid" => Process.pid.to_s}

    def start_engine
      engine = Native::Engine.start(SETTINGS)
      # A busy machine may not connect in time, with the first attempt: an outage.
      loop { return engine if (engine.next_event(10_000) || raise("not started"))["kind"] == "started" }
    end

    def recorded(engine, payload)
      engine.track("default", payload, nil).tap { |handle| engine.await(handle, 10_000) || raise("no record") }
    end

    def pause_redis = Process.kill("STOP", Integer(ENV.fetch("REDIS_PID")))

    def clock = Process.clock_gettime(Process::CLOCK_MONOTONIC)

    # Returns when the thread waits in the block.
    def blocked(&block)
      thread = Thread.new(&block)
      sleep 0.01 until thread.status == "sleep" || !thread.alive?
      thread.alive? ? thread : raise("the call has ended by itself")
    end

    def in_child
      pid = fork { yield }
      Process.wait(pid)
      $?.success? || raise("the child ended with \#{$?}")
    end
  RUBY

  # @return [OwnProcess]
  attr_reader :process

  # @param redis [RedisServer]
  # @param code [String] Ruby code after {PRELUDE}
  # @param settings [Hash] see {Engines.settings}
  def initialize(redis, code, **settings)
    folder = Scratch.folder
    file = File.join(folder, "script.rb")
    File.write(file, PRELUDE + code)
    env = {"SETTINGS" => JSON.generate(Engines.settings(redis, **settings)), "REDIS_PID" => redis.process.pid.to_s,
           "REDIS_URL" => redis.url}
    @process = OwnProcess.new(Gem.ruby, "-I", SidekiqProcess::LIB, file, log: File.join(folder, "log"), env: env)
  end

  # Waits for the end and sees to it that it was a good one.
  #
  # @return [Array<Object>] what the script has written, a line of JSON each
  def values(within: 20)
    status = process.wait(within: within)
    raise "the process ended with #{status}: #{process.output}" unless status.success?

    written
  end

  # @return [Array<Object>] what the script has written so far
  def written
    process.output.lines.select { |line| line.end_with?("\n") }.map { |line| JSON.parse(line) }
  rescue JSON::ParserError
    raise "unexpected output: #{process.output}"
  end

  # @return [Object] the value, when it is there
  def value(index = 0)
    Eventually.eventually("line #{index} of the process") do
      raise "the process ended: #{process.output}" unless written.size > index || process.running?

      written.size > index
    end
    written[index]
  end
end
