# frozen_string_literal: true

require "sidekiq"
require_relative "processing_tracker/version"
require_relative "processing_tracker/errors"
require_relative "processing_tracker/loader"
require_relative "processing_tracker/configuration"
require_relative "processing_tracker/log"
require_relative "processing_tracker/settings"
require_relative "processing_tracker/passwords"
require_relative "processing_tracker/value"
require_relative "processing_tracker/event"
require_relative "processing_tracker/instance"
require_relative "processing_tracker/in_flight_job"
require_relative "processing_tracker/listeners"
require_relative "processing_tracker/events"
require_relative "processing_tracker/orphans"
require_relative "processing_tracker/watch"
require_relative "processing_tracker/unique_lock"
require_relative "processing_tracker/runtime"
require_relative "processing_tracker/worker"
require_relative "processing_tracker/sidekiq/redis_settings"
require_relative "processing_tracker/sidekiq/redis_secret"
require_relative "processing_tracker/sidekiq/redis_tls"
require_relative "processing_tracker/sidekiq/redis_options"
require_relative "processing_tracker/sidekiq/sidekiqs_redis"
require_relative "processing_tracker/sidekiq/dead_set_limits"
require_relative "processing_tracker/sidekiq/unit_of_work"
require_relative "processing_tracker/sidekiq/claimed_job"
require_relative "processing_tracker/sidekiq/job_source"
require_relative "processing_tracker/sidekiq/fetch"
require_relative "processing_tracker/sidekiq/native_fetch"
require_relative "processing_tracker/sidekiq/throttled_fetch"
require_relative "processing_tracker/sidekiq/fetch_choice"
require_relative "processing_tracker/sidekiq/stock"
require_relative "processing_tracker/sidekiq/due_client"
require_relative "processing_tracker/sidekiq/due_failures"
require_relative "processing_tracker/sidekiq/scheduler"
require_relative "processing_tracker/sidekiq/scheduler_choice"
require_relative "processing_tracker/sidekiq/processor"
require_relative "processing_tracker/sidekiq/mark"
require_relative "processing_tracker/sidekiq/middleware"
require_relative "processing_tracker/sidekiq/lifecycle"

# Sidekiq's own namespace.
module Sidekiq
  # Keeps every marked job in Redis while it runs, so that it is run again elsewhere when its process dies.
  #
  # Requiring the gem registers hooks and nothing more: no thread, no connection. The engine starts with
  # Sidekiq's launcher and leaves with it.
  #
  #   Sidekiq::ProcessingTracker.configure do |config|
  #     config.namespace = "shop_processing"
  #   end
  #
  #   class PaymentJob
  #     include Sidekiq::Job
  #     include Sidekiq::ProcessingTracker::Worker
  #   end
  module ProcessingTracker
    @config = Configuration.new
    @pool = nil
    @pool_lock = Mutex.new

    class << self
      # Yields the configuration, to set its options.
      #
      # @yieldparam config [Configuration]
      # @return [Configuration]
      # @raise [ConfigurationError] when an option is set while the engine runs
      def configure
        yield config if block_given?
        config
      end

      # The one configuration of this process.
      #
      # @return [Configuration]
      attr_reader :config

      # The label of this machine or pod: the first part of {identity}.
      #
      # @return [String]
      # @raise [ConfigurationError] when the value cannot be used
      def instance_id = config.instance_id

      # The name under which this process holds its jobs: `instance_id:pid:nonce`. It changes when a lease was lost.
      #
      # @return [String, nil] nil where no engine runs: a console, a web process, a forked child
      def identity = Runtime.current&.identity

      # The prefix of every key of the tracker in Redis.
      #
      # @return [String]
      # @raise [ConfigurationError] when the value cannot be used
      def namespace = config.namespace

      # Seconds between two heartbeats.
      #
      # @return [Integer, Float]
      # @raise [ConfigurationError] when the value cannot be used
      def heartbeat_interval = config.heartbeat_interval

      # Seconds a process counts as alive without a heartbeat.
      #
      # @return [Integer]
      # @raise [ConfigurationError] when the value cannot be used
      def heartbeat_ttl = config.heartbeat_ttl

      # Seconds a recovering process may hold a dead one, at most.
      #
      # @return [Integer]
      # @raise [ConfigurationError] when the value cannot be used
      def recovery_lock_ttl = config.recovery_lock_ttl

      # Which jobs are tracked.
      #
      # @return [Symbol] :marked or :all
      # @raise [ConfigurationError] when the value cannot be used
      def track = config.track

      # Who takes jobs from the queues.
      #
      # @return [Symbol] :auto, :native or :sidekiq
      # @raise [ConfigurationError] when the value cannot be used
      def fetch = config.fetch

      # Who moves due jobs into their queues.
      #
      # @return [Symbol] :auto or :sidekiq
      # @raise [ConfigurationError] when the value cannot be used
      def scheduler = config.scheduler

      # Whether no two processes ever live under one instance_id.
      #
      # @return [Boolean]
      # @raise [ConfigurationError] when the value cannot be used
      def exclusive_instance_id = config.exclusive_instance_id

      # How the native fetch waits for work.
      #
      # @return [Boolean] true: it looks from time to time; false: Redis tells it
      # @raise [ConfigurationError] when the value cannot be used
      def polling = config.polling

      # How often a job is put back into its queue before it goes to the dead set.
      #
      # @return [Integer, nil] nil: always
      # @raise [ConfigurationError] when the value cannot be used
      def max_recoveries = config.max_recoveries

      # Seconds for which it is remembered how often a job was put back, from the last time on: each time begins them anew.
      #
      # @return [Integer]
      # @raise [ConfigurationError] when the value cannot be used
      def recovery_window = config.recovery_window

      # The Redis to use instead of Sidekiq's own settings.
      #
      # @return [String, Hash, nil]
      # @raise [ConfigurationError] when the value is neither
      def redis_options = config.redis_options

      # Where the tracker logs.
      #
      # @return [Logger]
      # @raise [ConfigurationError] when the value is no logger
      def logger = config.logger

      # A key of the tracker: the namespace, a colon, the key. Needs no Redis.
      #
      # @param key [String, Symbol]
      # @return [String]
      # @raise [ConfigurationError] when the namespace cannot be used
      def namespaced_key(key)
        Native.namespaced_key(namespace, key.to_s)
      end

      # Yields a connection of Sidekiq's own client type: to `redis_options` if set, else from Sidekiq's pool.
      #
      # @yieldparam conn [Object] what `Sidekiq.redis` yields on this version of Sidekiq
      # @return [Object] what the block returns
      # @raise [ConfigurationError] when `redis_options` cannot be used
      def redis_sync(&block)
        raise ArgumentError, "redis_sync needs a block" unless block

        options = redis_options
        options ? redis_pool(options).with(&block) : ::Sidekiq.redis(&block)
      end

      # Recovers the jobs of every process whose lease has run out, and of those whose lease runs out meanwhile.
      # Returns once every process that was listed at the call was recovered or has renewed its lease, which takes
      # up to `heartbeat_ttl` and a step. Jobs that were orphaned before go back one by one, and it waits for these too: up to
      # five minutes more (docs/protocol.md, *Suspects*). Works from any process that has the gem, so from a console too. As it
      # goes it logs a line for each job and calls in this process what is to be called ({on}, notifications, Sidekiq's death
      # handlers); so it has told what it did when it raises, or is interrupted. At the end it logs a line for the sum.
      #
      # Sidekiq runs the blocks of `configure_server` in its servers only. In a console no death handler that is registered
      # there is called, and no option of the tracker that is set there is known: namespace, track, max_recoveries. Nor are
      # the limits of the dead set, so it is not trimmed: a server does that when a job dies there.
      #
      # @return [Hash{Symbol => Integer}] how many jobs there were of each outcome, `stuck` being those that cannot be put
      #   back (docs/operations.md, *Stuck jobs*): `{requeued: 3, stuck: 0, …}`
      # @raise [ConfigurationError] when a setting cannot be used
      # @raise [ConnectionError] when Redis cannot be reached
      def reenqueue_orphans!
        passwords = Passwords.new
        settings = Settings.build(config, places: Settings.places(config), passwords: passwords, server: !Runtime.current.nil?)
        passwords.start
        counts = Orphans.recover(settings).transform_keys(&:to_sym)
        Log.write(:info, "reenqueue_orphans!: #{counts.map { |outcome, count| "#{outcome}=#{count}" }.join(" ")}")
        counts
      ensure
        passwords&.stop
      end

      # Has a block called with each event of some kinds, in the process that recovered the job (of a lost lease, in the
      # one that lost it), on the thread that logs, or in a caller of {reenqueue_orphans!}. At most once: an event whose
      # process dies meanwhile is in the {journal} only. So a block should be quick; what it raises is logged, `exit` too. For as long
      # as it takes, no other event is told. It may be given at any time, and stays.
      #
      #   Sidekiq::ProcessingTracker.on(:dead) { |event| Pager.alert("#{event.job_class} #{event.jid}: #{event.reason}") }
      #
      # The same events are sent to ActiveSupport::Notifications where that is loaded, as
      # `recovered.sidekiq_processing_tracker` and so on. What is sent has the parts of the {Event} but for the payload, and
      # `event:`, the Event itself.
      #
      # @param kinds [Array<Symbol>] some of {Event::KINDS}
      # @yieldparam event [Event]
      # @return [void]
      # @raise [ArgumentError] for an unknown kind, or without a block
      def on(*kinds, &block)
        raise ArgumentError, "on needs a block" unless block

        Listeners.add(kinds, block)
      end

      # Every process that may have jobs in flight, the dead ones too.
      #
      # @return [Array<Instance>]
      # @raise [ConfigurationError] when a setting cannot be used
      # @raise [ConnectionError] when Redis cannot be reached, or a key of the tracker holds something else
      def instances = Watch.new(config).instances

      # The jobs that are on record as running, of dead processes too. They are read from Redis as the Enumerator is
      # used, in pages of 1 MB or so, and anew each time. A job that comes or goes meanwhile may be missing or be there, as may
      # one that has begun less than a millisecond ago, and one may come twice while Redis makes its table smaller.
      #
      #   Sidekiq::ProcessingTracker.in_flight.select { |job| job.since < Time.now - 3600 }.first(10)
      #
      # @return [Enumerator::Lazy<InFlightJob>] it raises what {instances} raises when it is used
      def in_flight
        Enumerator.new { |jobs| Watch.new(config).each_in_flight { |job| jobs << job } }.lazy
      end

      # Numbers for an exporter:
      #
      # - `totals`: orphans by outcome since ever, for the whole namespace: requeued, dead, discarded, superseded, and
      #   expired (the 1.0 gem had them on record without a payload; the {journal} leaves these out)
      # - `instances`: how many there are now, by {Instance::STATES state}
      # - `in_flight`: jobs on record as running, of the instances that have their lease
      # - `orphans`: jobs on record of the others, which wait to be recovered
      #
      # @return [Hash{Symbol => Object}] `{totals: {requeued: 3, …}, instances: {running: 2, …}, in_flight: 7, orphans: 0}`
      # @raise [ConfigurationError] when a setting cannot be used
      # @raise [ConnectionError] when Redis cannot be reached, or a key of the tracker holds something else
      def stats = Watch.new(config).stats

      # What became of the last orphans, the newest first, whichever process recovered them. The journal keeps the last
      # 10 000 recoveries or so. It has no payloads and no lost leases.
      #
      # @param count [Integer] how many, at most
      # @return [Array<Event>]
      # @raise [ArgumentError] when count is no number from 0
      # @raise [ConfigurationError] when a setting cannot be used
      # @raise [ConnectionError] when Redis cannot be reached, or the journal's key holds something else
      def journal(count: 100)
        raise ArgumentError, "count is #{count.inspect}: allowed is a whole number from 0" unless count.is_a?(Integer) && count >= 0

        Watch.new(config).journal(count)
      end

      # Frees the locks of sidekiq-unique-jobs that a job holds: those that carry its jid, whatever state the job is
      # in. Given a digest without a jid (no such key, or nil), removes the whole lock, whoever holds it. Recovery does what is needed by itself;
      # this is for a person who knows that the job will not run again. Raises nothing: what goes wrong is logged
      # as a warning, all else at debug.
      #
      # @param job [Hash] a payload: "lock_digest" (or "unique_digest") and "jid"
      # @return [Boolean] whether anything was freed
      def clear_unique_jobs_lock(job) = UniqueLock.clear(job)

      private

      # A pool belongs to the process and the options it was made for.
      def redis_pool(options)
        @pool_lock.synchronize do
          key = [::Process.pid, options]
          @pool = [key, RedisSettings.from_options(options).new_pool] unless @pool&.first == key
          @pool.last
        end
      end
    end
  end
end

Sidekiq.configure_server { |config| Sidekiq::ProcessingTracker::Lifecycle.install(config) }
