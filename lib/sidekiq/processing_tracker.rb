# frozen_string_literal: true

require "sidekiq"
require_relative "processing_tracker/version"
require_relative "processing_tracker/errors"
require_relative "processing_tracker/loader"
require_relative "processing_tracker/configuration"
require_relative "processing_tracker/log"
require_relative "processing_tracker/settings"
require_relative "processing_tracker/events"
require_relative "processing_tracker/instance"
require_relative "processing_tracker/worker"
require_relative "processing_tracker/sidekiq/redis_settings"
require_relative "processing_tracker/sidekiq/unit_of_work"
require_relative "processing_tracker/sidekiq/claimed_job"
require_relative "processing_tracker/sidekiq/job_source"
require_relative "processing_tracker/sidekiq/fetch"
require_relative "processing_tracker/sidekiq/native_fetch"
require_relative "processing_tracker/sidekiq/throttled_fetch"
require_relative "processing_tracker/sidekiq/fetch_choice"
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
      def identity = Instance.current&.identity

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

        redis_options.nil? ? ::Sidekiq.redis(&block) : redis_pool.with(&block)
      end

      # Recovers the jobs of every process whose lease has run out, and of those whose lease runs out meanwhile.
      # Returns once every process that was listed at the call was recovered or has renewed its lease, which takes
      # up to `heartbeat_ttl` and a step. Works from any process that has the gem, so from a console too. Logs a line for
      # each job that comes back, and one for the sum.
      #
      # @return [Hash{Symbol => Integer}] how many jobs are back in their queues, and how many cannot be put back
      #   (docs/operations.md, *Stuck jobs*): `{requeued: 3, stuck: 0}`
      # @raise [ConfigurationError] when a setting cannot be used
      # @raise [ConnectionError] when Redis cannot be reached
      def reenqueue_orphans!
        result = Native.reenqueue_orphans(Settings.build(config))
        result.fetch("events").each { |event| Events.log(event) }
        counts = {requeued: result.fetch("requeued"), stuck: result.fetch("stuck")}
        Log.write(:info, "reenqueue_orphans!: #{counts.map { |outcome, count| "#{outcome}=#{count}" }.join(" ")}")
        counts
      end

      private

      # A pool belongs to the process and the options it was made for.
      def redis_pool
        @pool_lock.synchronize do
          key = [Process.pid, redis_options]
          @pool = [key, RedisSettings.from_options(redis_options).new_pool] unless @pool&.first == key
          @pool.last
        end
      end
    end
  end
end

Sidekiq.configure_server { |config| Sidekiq::ProcessingTracker::Lifecycle.install(config) }
