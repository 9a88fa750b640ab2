# frozen_string_literal: true

require "securerandom"

module Sidekiq
  module ProcessingTracker
    # What the native library is told: the options, checked and in its units, and the Redis to talk to.
    #
    # @api private
    module Settings
      # How long the key lives by which two connections are compared, and how long its reader waits. Milliseconds.
      PROBE_TTL = 10_000
      PROBE_TIMEOUT = 3_000

      class << self
        # @param config [Configuration]
        # @param info [Hash{String => String}] what people may want to know of this process
        # @param native [Boolean] whether the engine fetches jobs
        # @param passwords [Passwords] who answers for passwords that may change
        # @return [Hash{Symbol => Object}] settings for {Native::Engine.start} and {Native.reenqueue_orphans}
        # @raise [ConfigurationError] when an option cannot be used, or this Redis cannot
        # @raise [ConnectionError] when `redis_options` leads to a Redis that cannot be asked
        def build(config, passwords:, info: {}, native: false)
          {
            namespace: config.namespace,
            instance_id: config.instance_id,
            interval_ms: milliseconds(config.heartbeat_interval),
            ttl_ms: milliseconds(config.heartbeat_ttl),
            hold_ms: milliseconds(config.recovery_lock_ttl),
            fetch: native ? "native" : "sidekiq",
            polls: config.polling,
            track_all: config.track == :all,
            max_recoveries: config.max_recoveries,
            recovery_window_ms: milliseconds(config.recovery_window),
            **DeadSetLimits.to_native,
            redis: examined(redis(config), config.namespace, passwords),
            info: info
          }
        end

        # Where to read what people want to see. Unlike {build} it asks nothing of Redis, since an exporter may come often.
        #
        # @param config [Configuration]
        # @return [Hash{Symbol => Object}] for {Native::Watch.new} and {Native.clear_unique_lock}
        # @raise [ConfigurationError] when an option cannot be used
        def target(config)
          own_or_sidekiqs(config).to_native
        end

        private

        def own_or_sidekiqs(config)
          config.redis_options.nil? ? RedisSettings.from_sidekiq : RedisSettings.from_options(config.redis_options)
        end

        # A Redis that is away, or busy with itself, is no reason not to start: the engine goes on trying.
        def examined(settings, namespace, passwords)
          settings.weaknesses.each { |weakness| Log.write(:warn, "connects to Redis (#{settings.server}), but #{weakness}") }
          examine(settings.to_native, namespace)
          settings.to_native(passwords)
        end

        def examine(target, namespace)
          Native.examine(target, namespace, PROBE_TIMEOUT)
        rescue ConnectionError
          # It may be away for a moment only.
        end

        # A tiny interval must not become none.
        def milliseconds(seconds)
          [(seconds * 1000).round, 1].max
        end

        def redis(config)
          return RedisSettings.from_sidekiq if config.redis_options.nil?

          RedisSettings.from_options(config.redis_options).tap { |own| check_same_database(config, own) }
        end

        # Addresses prove nothing (a name and its alias, a proxy, a socket): a key written by one and read by the
        # other does.
        def check_same_database(config, own)
          key = Native.namespaced_key(config.namespace, "probe:#{SecureRandom.hex(16)}")
          value = SecureRandom.hex(16)
          write_through_sidekiq(key, value)
          return if read_through(own, key) == value

          raise ConfigurationError,
            "redis_options (#{own.server}) is not the server and database that Sidekiq uses (#{sidekiqs_server}). " \
            "Recovered jobs are pushed to Sidekiq's queues, so both must lead to the same one: leave redis_options " \
            "unset, or give both the same server and db"
        end

        def write_through_sidekiq(key, value)
          ::Sidekiq.redis { |conn| conn.set(key, value, px: PROBE_TTL) }
        rescue => error
          raise ConnectionError, "Sidekiq's Redis cannot be compared with redis_options: #{error.message} (#{error.class})"
        end

        def read_through(own, key)
          Native.read_key(own.to_native, key, PROBE_TIMEOUT)
        rescue ConnectionError => error
          raise ConnectionError, "redis_options (#{own.server}) cannot be compared with Sidekiq's Redis: #{error.message}"
        end

        # redis_options may be set just because Sidekiq's own settings are of a kind that is not supported.
        def sidekiqs_server
          RedisSettings.from_sidekiq.server
        rescue ConfigurationError
          "another"
        end
      end
    end
  end
end
