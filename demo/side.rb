# frozen_string_literal: true

require_relative "../spec/support/eventually"
require_relative "../spec/support/own_process"
require_relative "../spec/support/redis_server"
require_relative "../spec/support/scratch"
require_relative "reports"

# One of the two sides of the demo: a database with jobs, workers that run them, and what becomes of both. {#tick} looks
# at what has happened and does what is next, so that one thread can play both sides at the same time.
class Side
  WORKERS = 2
  VICTIMS = 1 # the others live on
  THREADS = 10
  JOBS = 100
  JOB_SECONDS = 1.0
  # The kill comes when all threads of the victims are well inside of their jobs. Between two jobs there is a fraction of a millisecond
  # in which a job has left its queue and has no record yet (README, "Guarantees and their limits"). That is not
  # what is shown here.
  MIDDLE = (0.1..0.7)

  LIB = File.expand_path("../lib", __dir__)
  APP = File.expand_path("app.rb", __dir__)

  # @return [String]
  attr_reader :name
  # @return [Float, nil] when the workers were killed
  attr_reader :killed_at

  # @param name [String]
  # @param tracker [Boolean]
  # @param redis [RedisServer]
  # @param db [Integer]
  # @param say [#call] takes a line for people
  def initialize(name, tracker:, redis:, db:, say:)
    @name = name
    @tracker = tracker
    @url = redis.url(db: db)
    @client = RedisClient.new(path: redis.socket, db: db)
    @say = say
    @workers = []
    @stage = :before_kill
  end

  # @return [void]
  def start
    pool = Sidekiq::RedisConnection.create(url: @url, size: 1)
    @jids = Sidekiq::Client.new(pool: pool).push_bulk("class" => DemoJob, "args" => Array.new(JOBS) { [JOB_SECONDS] })
    start_workers
    say("#{@jids.size} jobs enqueued, #{WORKERS} workers with #{THREADS} threads each started")
  end

  # @return [void]
  def tick
    check_workers
    case @stage
    when :before_kill then kill_workers if half_way?
    when :after_kill then watch_return
    end
  end

  # Whether nothing is left to wait for: every job is done, or those that are not are nowhere any more.
  def settled?
    @stage != :before_kill && (unfinished.empty? || (!@tracker && left_behind.zero? && running.empty?))
  end

  # Ends the workers in the orderly way, so that what they still run is counted too.
  #
  # @return [void]
  def stop
    @workers.each { |worker| worker.signal(:TERM) }.each(&:wait)
    @workers = []
  end

  def enqueued = @jids.size

  def finished = enqueued - unfinished.size

  # Jobs that have not finished and that Sidekiq has nowhere any more.
  def lost = unfinished.size - left_behind

  def ran_twice = reports.started_again(@jids).size

  def finished_twice = reports.finished_again(@jids).size

  # @return [Integer] jobs that the kill cut off
  def cut_off = @cut_off.size

  # @return [Array<Float>] seconds from the kill to the second start, a job each
  def seconds_to_rerun
    reports.second_starts(@jids).map { |time| time - killed_at }
  end

  # @return [Integer] jobs in any of Sidekiq's queues and sets
  def left_behind
    @client.call("LLEN", "queue:default") + %w[retry schedule dead].sum { |set| @client.call("ZCARD", set) }
  end

  # @return [String] what the workers have said last
  def logs
    @workers.map { |worker| worker.output.lines.last(15).join }.join("\n")
  end

  private

  def say(text) = @say.call(format("%-16s  %s", name, text))

  def reports
    Reports.new(@client.call("LRANGE", DemoJob::REPORTS, 0, -1))
  end

  def start_workers
    folder = Scratch.folder
    @workers = Array.new(WORKERS) { |number|
      command = [Gem.ruby, "-I", LIB, Gem.bin_path("sidekiq", "sidekiq"), "-r", APP, "-c", THREADS.to_s]
      settings = {"REDIS_URL" => @url, "REDIS_PROVIDER" => nil, "DEMO_TRACKER" => @tracker ? "yes" : "no"}
      OwnProcess.new(*command, log: File.join(folder, "#{number}.log"), env: settings, chdir: folder)
    }
  end

  def check_workers
    return if @workers.all?(&:running?)

    raise "#{name}: a worker has ended by itself\n#{logs}"
  end

  def half_way?
    reports = self.reports
    victims, others = [@workers.first(VICTIMS), @workers.drop(VICTIMS)].map { |workers|
      reports.running(pids: workers.map(&:pid))
    }
    return false if reports.finished(@jids).size < @jids.size / 2 || victims.size < VICTIMS * THREADS || others.empty?

    victims.values.all? { |since| MIDDLE.cover?(Eventually.now - since) }
  end

  def kill_workers
    victims = @workers.first(VICTIMS)
    pids = victims.map(&:pid)
    victims.each { |worker| worker.signal(:KILL) }
    @killed_at = Eventually.now
    victims.each(&:wait)
    @workers -= victims
    @cut_off = reports.running(pids: pids).keys
    say("#{finished} jobs finished; kill -9 of a worker that was running #{cut_off}")
    @stage = :after_kill
  end

  def watch_return
    if left_behind.zero? && !@queue_empty
      @queue_empty = true
      say("the other worker has emptied the queue")
    end
    again = ran_twice
    return if again.zero? || (@tracker && again < cut_off)

    say(format("%d jobs that were cut off run again, %.1f s after the kill", again, seconds_to_rerun.max))
    @stage = :came_back
  end

  def unfinished = @jids - reports.finished(@jids)

  # What runs in the workers that live.
  def running = reports.running(pids: @workers.map(&:pid))
end
