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

    # What Sidekiq's error handlers are told.
    TOLD = []
    CONFIG.error_handlers << ->(error, context, _config = nil) { TOLD << [error.class.name, error.message, context[:context]] }
    # The jids of jobs that have passed the tracker's client.
    PASSED = []
    Tracker::DueClient.prepend(Module.new do
      def target(item)
        PASSED << (item["jid"] if item.is_a?(Hash))
        super
      end
    end)

    def enqueuer = (Sidekiq::VERSION < "7") ? Sidekiq::Scheduled::Enq.new : Sidekiq::Scheduled::Enq.new(CONFIG)

    def schedule
      Sidekiq.redis do |conn|
        conn.smembers("queues").each { |queue| conn.del("queue:#{queue}") }
        conn.del("schedule")
        ENTRIES.each { |score, payload| conn.zadd("schedule", score, payload) }
      end
    end

    # What lies in queues and in the set.
    def outcome
      Sidekiq.redis do |conn|
        queues = conn.smembers("queues").sort.to_h { |queue| [queue, conn.lrange("queue:#{queue}", 0, -1).reverse] }
        {queues: queues.reject { |_, jobs| jobs.empty? }, schedule: conn.zrange("schedule", 0, -1)}
      end
    end

    # Sidekiq's poller goes on when a job could not be pushed.
    def stock
      schedule
      enqueuer = self.enqueuer
      polls = 0
      begin
        polls += 1
        enqueuer.enqueue_jobs
      rescue StandardError
        retry if polls < 50
      end
      outcome
    end

    def poll(enqueuer)
      [TOLD, PASSED].each(&:clear)
      enqueuer.enqueue_jobs
      {told: TOLD.dup, passed: PASSED.dup}
    end

    def ours(engine, polls)
      schedule
      enqueuer = self.enqueuer
      Tracker::Scheduler.attach(enqueuer, engine, CONFIG)
      polls = Array.new(polls) { poll(enqueuer) }
      outcome.merge(polls: polls)
    end

    places = Tracker::Settings.places(Tracker.config)
    engine = Tracker::Native::Engine.start(Tracker::Settings.build(Tracker.config, places: places, passwords: Tracker::Passwords.new))
    raise "no engine" unless engine.next_event(10_000)["kind"] == "started"

    result = {stock: (stock if ENV["STOCK"]), ours: ours(engine, Integer(ENV.fetch("POLLS")))}
    puts("", JSON.generate(result))
    engine.leave(5_000)
  RUBY

  # @param redis [RedisServer]
  # @param entries [Array<Array(Numeric, String)>] score and payload
  # @param app [String] Ruby code that comes first: client middleware
  # @param polls [Integer] how often the tracker's polls
  # @param stock [Boolean] whether Sidekiq's own does too
  # @param bundle [Symbol, nil] as for {AppProcess}
  # @return [Hash{String => Hash}] "stock" and "ours": "queues", which are payloads by queue, and "schedule"; of ours also
  #   "polls", for each "told" (class, message and context of each error that Sidekiq's handlers heard of) and "passed" (the
  #   jids of jobs that have passed Ruby)
  def self.run(redis, entries, app: "", polls: 1, stock: true, bundle: nil)
    JSON.parse(start(redis, entries, app: app, polls: polls, stock: stock, bundle: bundle).log.lines.last)
  end

  # The same, for what is in the log.
  #
  # @return [ScriptProcess] that has ended
  def self.start(redis, entries, app: "", polls: 1, stock: true, bundle: nil)
    file = File.join(Scratch.folder, "entries.json")
    File.write(file, JSON.generate(entries))
    env = {"ENTRIES" => file, "POLLS" => polls.to_s, "STOCK" => ("1" if stock)}
    script = ScriptProcess.new(redis, app + CODE, bundle: bundle, env: env)
    status = script.process.wait(within: 60)
    raise "the script ended with #{status}: #{script.log}" unless status.success?

    script
  end
end
