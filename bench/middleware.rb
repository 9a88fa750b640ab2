# frozen_string_literal: true

# What tracking costs: jobs that do nothing, so that nothing but Sidekiq and the tracking is measured.
#
#   bundle exec ruby bench/middleware.rb     # JOBS=20000 ROUNDS=5 THREADS=10
#
# Three contenders: stock Sidekiq; this gem in middleware mode, with every job marked; and the same tracking in Ruby as
# the 1.0 gem did it. Each run is a fresh `sidekiq` process that is warm before the clock starts. The contenders take
# turns, so that a slow minute of the machine hits all of them. Prints a table and writes tmp/bench-middleware.json.

$stdout.sync = true

require "etc"
require "fileutils"
require "json"
require "socket"
require "sidekiq"
require_relative "../spec/support/eventually"
require_relative "../spec/support/own_process"
require_relative "../spec/support/queues"
require_relative "../spec/support/redis_server"
require_relative "../spec/support/scratch"

# One run of one contender.
class Run
  LIB = File.expand_path("../lib", __dir__)
  APP = File.expand_path("app.rb", __dir__)
  WARM_UP = 2_000
  # Where the jobs wait. To rename it to the queue's name starts all of them at once.
  DEPOT = "bench:depot"
  QUEUE = "queue:default"

  # @param redis [RedisServer]
  # @param contender [Symbol] :stock, :tracker or :ruby
  def initialize(redis, contender, threads:)
    @redis = redis
    @contender = contender
    @threads = threads
    @most_records = 0
  end

  # @return [Float] jobs a second
  def measure(jobs)
    @redis.with(timeout: 30) do |client|
      client.call("FLUSHALL")
      start
      drain(client, WARM_UP)
      @most_records = 0
      rate = jobs / drain(client, jobs)
      # A contender that does not track would win.
      raise "#{@contender}: #{@most_records} records seen" unless @most_records.positive? == (@contender != :stock)

      rate
    end
  ensure
    @process&.kill
  end

  private

  def start
    folder = Scratch.folder
    command = [Gem.ruby, "-I", LIB, Gem.bin_path("sidekiq", "sidekiq"), "-r", APP, "-e", "production", "-c", @threads.to_s]
    settings = {"REDIS_URL" => @redis.url, "REDIS_PROVIDER" => nil, "BENCH_CONTENDER" => @contender.to_s,
                "PROCESSING_NS" => nil, "PROCESSING_TRACK" => nil}
    @process = OwnProcess.new(*command, log: File.join(folder, "sidekiq.log"), env: settings, chdir: folder)
  end

  # @return [Float] seconds from the first job to the last
  def drain(client, jobs)
    deposit(client, jobs)
    began = Eventually.now
    client.call("RENAME", DEPOT, QUEUE)
    Eventually.eventually("the end of #{jobs} jobs (#{@contender})", within: 120) do
      raise "sidekiq has ended:\n#{@process.output}" unless @process.running?

      @most_records = [@most_records, records(client)].max
      client.call("LLEN", QUEUE).zero?
    end
    Eventually.now - began
  end

  def deposit(client, jobs)
    jobs.times.each_slice(1_000) do |slice|
      client.call("LPUSH", DEPOT, *slice.map { Queues.payload("NoopJob", processing: true) })
    end
  end

  # @return [Integer] jobs that are on record as running
  def records(client)
    identities = client.call("ZRANGE", "sidekiq_processing:instances", 0, -1)
    fields = identities.sum { |identity| client.call("HLEN", "sidekiq_processing:inflight:#{identity}") - 1 }
    fields + client.call("SCARD", "sidekiq_processing:jobs:#{Socket.gethostname}")
  end
end

# All runs, and what is made of them.
class Comparison
  CONTENDERS = {
    stock: "stock Sidekiq",
    tracker: "this gem, middleware mode",
    ruby: "the same tracking in Ruby"
  }.freeze
  FILE = File.expand_path("../tmp/bench-middleware.json", __dir__)

  def initialize(jobs:, rounds:, threads:)
    @jobs = jobs
    @rounds = rounds
    @threads = threads
    @rates = CONTENDERS.transform_values { [] }
  end

  def run
    redis = RedisServer.new
    @environment = environment(redis)
    puts @environment.map { |name, value| "#{name} #{value}" }.join(", ")
    @rounds.times { |round| play(redis, round) }
    table = rows
    show(table)
    write(table)
  end

  private

  # Each round begins with another contender.
  def play(redis, round)
    CONTENDERS.keys.rotate(round).each do |contender|
      print "round #{round + 1} of #{@rounds}  #{CONTENDERS[contender].ljust(26)} ... "
      rate = Run.new(redis, contender, threads: @threads).measure(@jobs)
      @rates[contender] << rate
      puts "#{rate.round} jobs/s (#{(@jobs / rate).round(1)} s)"
    end
  end

  # The ratio is that of the two runs of one round, and then the median of the rounds.
  def rows
    CONTENDERS.map do |contender, name|
      rates = @rates[contender]
      ratios = rates.zip(@rates[:stock]).map { |rate, stock| rate / stock }
      {
        contender: contender, name: name, jobs_per_second: rates.map(&:round),
        median: median(rates).round, spread: rates.minmax.map(&:round),
        ratio: median(ratios).round(3), ratio_spread: ratios.minmax.map { |ratio| ratio.round(3) },
        added_microseconds_per_job: ((1 / median(rates) - 1 / median(@rates[:stock])) * 1_000_000).round(1)
      }
    end
  end

  def show(table)
    puts "", format("%-26s  %14s  %16s  %14s  %15s  %12s", "no-op jobs, #{@threads} threads", "median jobs/s", "spread", "ratio to stock",
      "spread", "added a job")
    table.each do |row|
      puts format("%-26s  %14d  %16s  %14.2f  %15s  %9.1f us", row[:name], row[:median], row[:spread].join(" - "), row[:ratio],
        row[:ratio_spread].map { |ratio| format("%.2f", ratio) }.join(" - "), row[:added_microseconds_per_job])
    end
  end

  def write(table)
    FileUtils.mkdir_p(File.dirname(FILE))
    result = {at: Time.now.utc.round, environment: @environment, jobs: @jobs, rounds: @rounds, threads: @threads, contenders: table}
    File.write(FILE, JSON.pretty_generate(result))
    puts "", "Written to tmp/#{File.basename(FILE)}"
  end

  def environment(redis)
    {
      "Ruby" => RUBY_VERSION,
      "Sidekiq" => Sidekiq::VERSION,
      "Redis" => redis.call("INFO", "server")[/redis_version:(\S+)/, 1],
      "cores" => Etc.nprocessors,
      "load" => File.exist?("/proc/loadavg") ? Float(File.read("/proc/loadavg").split.first) : nil
    }.compact
  end

  def median(values)
    sorted = values.sort
    middle = sorted.size / 2
    sorted.size.odd? ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
  end
end

begin
  Comparison.new(jobs: Integer(ENV.fetch("JOBS", 20_000)), rounds: Integer(ENV.fetch("ROUNDS", 5)),
    threads: Integer(ENV.fetch("THREADS", 10))).run
rescue Interrupt
  abort "\ninterrupted"
end
