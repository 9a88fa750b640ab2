# frozen_string_literal: true

require "json"

# What others raise into a job's thread, and what goes wrong in the tracker itself.
RSpec.describe Sidekiq::ProcessingTracker::Middleware do
  let(:redis) { RedisServer.new }

  # One marked job in the middleware, with an engine of its own, as the processor would run it.
  let(:code) do
    <<~RUBY
      require "json"
      require "logger"
      require "sidekiq/fetch"

      Poke = Class.new(StandardError)
      TRACKER = Sidekiq::ProcessingTracker
      TRACKER.config.logger = Logger.new($stdout, formatter: ->(severity, _, _, text) { "\#{severity} \#{text}\\n" })
      REDIS_PID = #{redis.process.pid}
      INSTANCE = TRACKER::Runtime.enter({}, false, TRACKER::Settings.places(TRACKER.config))
      sleep 0.02 until Sidekiq.redis { |conn| conn.exists("sidekiq_processing:clock") }.positive?

      def run_job
        payload = JSON.generate("class" => "Object", "args" => [], "jid" => "j1", "processing" => true)
        unit = TRACKER::UnitOfWork.new(Sidekiq::BasicFetch::UnitOfWork.new("queue:default", payload, nil))
        unit.job_hash = JSON.parse(payload)
        TRACKER::UnitOfWork.during(unit) do
          TRACKER::Middleware.new.call(Object.new, unit.job_hash, "default") { puts "job runs" }
        end
      end

      # Returns when the job's thread waits for a record that cannot be made.
      def waiting
        Process.kill("STOP", REDIS_PID)
        thread = Thread.new { run_job }
        thread.report_on_exception = false
        sleep 0.01 until thread.status == "sleep" || !thread.alive?
        thread.alive? ? thread : raise("it does not wait")
      end
    RUBY
  end

  def run(more)
    RubyProcess.run_ruby(code + more, env: {"REDIS_URL" => redis.url}).first
  end

  it "lets pass what others raise into the thread while the job waits for its record, and the job does not run" do
    output = run(<<~RUBY)
      thread = waiting
      thread.raise(Poke, "from outside")
      begin
        thread.value
      rescue Poke => error
        puts "passed: \#{error.message}"
      end
      Process.kill("CONT", REDIS_PID)
      INSTANCE.leave
    RUBY
    expect(output).to include("passed: from outside\n")
    expect(output).not_to match(/job runs|failed to/)
  end

  it "ends a thread that is killed while the job waits for its record, and the job does not run" do
    output = run(<<~RUBY)
      thread = waiting
      thread.kill
      puts "killed: \#{thread.value.inspect}"
      Process.kill("CONT", REDIS_PID)
      INSTANCE.leave
    RUBY
    expect(output).to include("killed: nil\n")
    expect(output).not_to match(/job runs|failed to/)
  end

  it "runs the job when the tracker itself fails, and says so" do
    output = run(<<~RUBY)
      # A payload that the native library refuses.
      unit = TRACKER::UnitOfWork.new(Sidekiq::BasicFetch::UnitOfWork.new("queue:default", nil, nil))
      unit.job_hash = {"jid" => "j1", "processing" => true}
      TRACKER::UnitOfWork.during(unit) do
        TRACKER::Middleware.new.call(Object.new, unit.job_hash, "default") { puts "job runs" }
      end
      INSTANCE.leave
    RUBY
    expect(output).to match(/^ERROR ProcessingTracker failed to track a job: .* \(TypeError\)$/).and match(/^job runs$/)
  end
end
