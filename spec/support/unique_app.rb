# frozen_string_literal: true

require "json"

# Processes with the real sidekiq-unique-jobs: a job class for each of its locks, and a client that pushes them through
# that gem's middleware. All in a bundle of their own.
class UniqueApp
  LOCKS = %w[until_executed until_expired while_executing until_executing until_and_while_executing].freeze
  # A limit of 1 is the default; with 2 another may hold the lock too.
  LIMITS = [1, 2].freeze

  APP = <<~RUBY
    require "sidekiq-unique-jobs"

    Sidekiq.configure_client { |config| config.client_middleware { |chain| chain.add SidekiqUniqueJobs::Middleware::Client } }
    Sidekiq.configure_server do |config|
      config.client_middleware { |chain| chain.add SidekiqUniqueJobs::Middleware::Client }
      config.server_middleware { |chain| chain.add SidekiqUniqueJobs::Middleware::Server }
      SidekiqUniqueJobs::Server.configure(config)
      config.death_handlers << ->(job, _) { note("deaths", [job["jid"]].to_json) }
    end
    SidekiqUniqueJobs.configure do |config|
      config.reaper = ENV["REAPS"] ? :ruby : :none
      config.reaper_interval = 1
    end

    tracker = Sidekiq::ProcessingTracker
    tracker.on(*tracker::Event::KINDS) { |event| note("heard", [event.kind, event.jid].to_json) }

    #{LOCKS.product(LIMITS)}.each do |lock, limit|
      name = lock.split("_").map(&:capitalize).join + limit.to_s
      options = {lock: lock.to_sym, lock_limit: limit}
      options[:lock_ttl] = 600 if lock == "until_expired"
      Object.const_set(name, Class.new(GatedJob) { sidekiq_options(options) })
      Object.const_set(name + "Undying", Class.new(GatedJob) { sidekiq_options(options.merge(dead: false)) })
    end
  RUBY

  CLIENT = <<~RUBY
    loop do
      request = Sidekiq.redis { |conn| conn.lpop("requests") }
      next sleep(0.01) unless request

      id, name, args, fields = JSON.parse(request)
      note("answers", [id, Object.const_get(name).set(fields).perform_async(*args)].to_json)
    end
  RUBY

  # @param redis [RedisServer]
  # @param bundle [Symbol] see {Bundle}
  def initialize(redis, bundle)
    @redis = redis
    @bundle = bundle
    @client = ScriptProcess.new(redis, APP + CLIENT, bundle: bundle)
    @requests = 0
  end

  # @param options [Hash] as for {SidekiqProcess}
  # @return [SidekiqProcess]
  def worker(**options)
    SidekiqProcess.new(@redis, app: APP, bundle: @bundle, **options)
  end

  # @return [String] the name of the class
  def self.job_class(lock, limit: 1, undying: false)
    "#{lock.split("_").map(&:capitalize).join}#{limit}#{"Undying" if undying}"
  end

  # Pushes jobs as an application would.
  #
  # @param jobs [Array<Array>] the class's name and the arguments of each
  # @param fields [Hash] further fields of the payloads
  # @return [Array<String, nil>] their jids; nil where a lock has refused it
  def push(jobs, **fields)
    first = @requests
    @requests += jobs.size
    requests = jobs.each_with_index.map { |(name, *args), i| JSON.generate([first + i, name, args, fields]) }
    @redis.call("RPUSH", "requests", *requests)
    Eventually.eventually("the pushes", within: 60) do
      raise "the client has ended:\n#{@client.log}" unless @client.running?

      @redis.call("LLEN", "answers") == @requests
    end
    Queues.notes(@redis, "answers").drop(first).map(&:last)
  end

  # @return [Hash{String => Array<String>}] what is held: digest => jids, without "uniquejobs:"
  def held
    @redis.call("KEYS", "uniquejobs:*:LOCKED").sort.to_h do |key|
      [key.delete_prefix("uniquejobs:").delete_suffix(":LOCKED"), @redis.call("HKEYS", key).sort]
    end
  end

  # @return [Array<String>] the jobs that Sidekiq's processes have told of with their last beats
  def known_work
    @redis.call("KEYS", "*:work").flat_map { |key| @redis.call("HVALS", key) }
  end

  # That gem's reaper does nothing while more than 1000 jobs are queued.
  #
  # @return [void]
  def hold_reaper
    @redis.call("SADD", "queues", "full")
    @redis.call("RPUSH", "queue:full", *Array.new(1001) { "{}" })
  end

  # Lets that gem's reaper judge every lock there is. It spares the young ones, so they are made to look old. It has done
  # so when it has removed one that is nobody's.
  #
  # @return [void]
  def reap
    # That of the 9 alpha removes a digest only once nobody holds its lock.
    @redis.call("HSET", "uniquejobs:of-nobody:LOCKED", "nobody", 1) unless @bundle == :unique_jobs_9
    @redis.call("ZADD", "uniquejobs:digests", 1, "uniquejobs:of-nobody")
    @redis.call("ZRANGE", "uniquejobs:digests", 0, -1).each { |digest| @redis.call("ZADD", "uniquejobs:digests", 1, digest) }
    @redis.call("DEL", "queue:full")
    Eventually.eventually("a run of the gem's own reaper", within: 30) { @redis.call("ZSCORE", "uniquejobs:digests", "uniquejobs:of-nobody").nil? }
  end
end
