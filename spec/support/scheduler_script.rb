# frozen_string_literal: true

require "json"

# Has jobs of the set `schedule` pushed by Sidekiq's own scheduler, and the same jobs by the tracker's, in one process.
class SchedulerScript
  CODE = <<~'RUBY'
    require "sidekiq/scheduled"
    Tracker = Sidekiq::ProcessingTracker
    CONFIG = Sidekiq.respond_to?(:default_configuration) ? Sidekiq.default_configuration : Sidekiq
    ENTRIES = JSON.parse(File.read(ENV.fetch("ENTRIES"), encoding: "UTF-8"))
    Sidekiq.logger.level = Logger::FATAL

    def enqueuer = (Sidekiq::VERSION < "7") ? Sidekiq::Scheduled::Enq.new : Sidekiq::Scheduled::Enq.new(CONFIG)

    # What lies in queues and in the set after a poll. The poller goes on when a job could not be pushed.
    def outcome(enqueuer)
      Sidekiq.redis do |conn|
        conn.smembers("queues").each { |queue| conn.del("queue:#{queue}") }
        conn.del("schedule")
        ENTRIES.each { |score, payload| conn.zadd("schedule", score, payload) }
      end
      polls = 0
      begin
        polls += 1
        enqueuer.enqueue_jobs
      rescue StandardError
        retry if polls < 50
      end
      Sidekiq.redis do |conn|
        queues = conn.smembers("queues").sort.to_h { |queue| [queue, conn.lrange("queue:#{queue}", 0, -1).reverse] }
        {queues: queues.reject { |_, jobs| jobs.empty? }, schedule: conn.zrange("schedule", 0, -1)}
      end
    end

    places = Tracker::Settings.places(Tracker.config)
    engine = Tracker::Native::Engine.start(Tracker::Settings.build(Tracker.config, places: places, passwords: Tracker::Passwords.new))
    raise "no engine" unless engine.next_event(10_000)["kind"] == "started"

    ours = enqueuer
    Tracker::Scheduler.attach(ours, engine, CONFIG)
    puts(JSON.generate(stock: outcome(enqueuer), ours: outcome(ours)))
    engine.leave(5_000)
  RUBY

  # @param redis [RedisServer]
  # @param entries [Array<Array(Numeric, String)>] score and payload
  # @param app [String] Ruby code that comes first: client middleware
  # @param bundle [Symbol, nil] as for {AppProcess}
  # @return [Hash{String => Hash}] "stock" and "ours": "queues", which are payloads by queue, and "schedule"
  def self.run(redis, entries, app: "", bundle: nil)
    file = File.join(Scratch.folder, "entries.json")
    File.write(file, JSON.generate(entries))
    script = ScriptProcess.new(redis, app + CODE, bundle: bundle, env: {"ENTRIES" => file})
    status = script.process.wait(within: 60)
    raise "the script ended with #{status}: #{script.log}" unless status.success?

    JSON.parse(script.log.lines.last)
  end
end
