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
      # How often they are compared before they count as two servers: a failover may forget the key. Seconds between.
      PROBES = 3
      PROBE_PAUSE = 0.25

      class << self
        # @param config [Configuration]
        # @param places [Places] see {places}
        # @param passwords [Passwords] who answers for passwords that may change
        # @param info [Hash{String => String}] what people may want to know of this process
        # @param native [Boolean] whether the engine fetches jobs
        # @param server [Boolean] whether this is a process that runs jobs, in which all of `configure_server` has been run
        # @return [Hash{Symbol => Object}] settings for {Native::Engine.start} and {Native::Orphans.start}
        # @raise [ConfigurationError] when an option cannot be used, or this Redis cannot
        def build(config, places:, passwords:, info: {}, native: false, server: true)
          dead_set = DeadSetLimits.to_native(known: server)
          examine_all(places, config.namespace)
          {
            namespace: config.namespace,
            instance_id: config.instance_id,
            exclusive: config.exclusive_instance_id,
            interval_ms: milliseconds(config.heartbeat_interval),
            ttl_ms: milliseconds(config.heartbeat_ttl),
            hold_ms: milliseconds(config.recovery_lock_ttl),
            fetch: native ? "native" : "sidekiq",
            polls: config.polling,
            track_all: config.track == :all,
            max_recoveries: config.max_recoveries,
            recovery_window_ms: milliseconds(config.recovery_window),
            dead_max_jobs: dead_set[:dead_max_jobs],
            dead_timeout_ms: dead_set[:dead_timeout_ms],
            timestamps: dead_set[:timestamps],
            redis: places.own.to_native(passwords),
            queues: places.queues&.to_native(passwords),
            info: info
          }
        end

        # Where the tracker's keys are, and where Sidekiq's queues, if that is another server or database.
        #
        # @param config [Configuration]
        # @param probes [Integer] how often the two are compared before they count as two
        # @return [Places]
        # @raise [ConfigurationError] when an option cannot be used
        # @raise [ConnectionError] when `redis_options` leads to a Redis that cannot be asked
        def places(config, probes: PROBES)
          options = config.redis_options
          return Places.new(RedisSettings.from_sidekiq, nil) if options.nil?

          own = RedisSettings.from_options(options)
          Places.new(own, same_database?(config, own, probes) ? nil : RedisSettings.from_sidekiq)
        end

        # Where Sidekiq's queues are, and the locks of their jobs.
        #
        # @param config [Configuration]
        # @return [Hash{Symbol => Object}] for {Native.clear_unique_lock}
        # @raise [ConfigurationError] when an option cannot be used
        # @raise [ConnectionError] when `redis_options` leads to a Redis that cannot be asked
        def queues(config)
          # Once will do: should it be the same after all, Sidekiq's settings lead there too.
          places = places(config, probes: 1)
          (places.queues || places.own).to_native
        end

        # Where to read what people want to see. Unlike {places} it asks nothing of Redis, since an exporter may come often.
        #
        # @param config [Configuration]
        # @return [Hash{Symbol => Object}] for {Native::Watch.new}
        # @raise [ConfigurationError] when an option cannot be used
        def target(config)
          options = config.redis_options
          (options ? RedisSettings.from_options(options) : RedisSettings.from_sidekiq).to_native
        end

        private

        # A tiny interval must not become none.
        def milliseconds(seconds)
          [(seconds * 1000).round, 1].max
        end

        def examine_all(places, namespace)
          [places.own, places.queues].compact.each do |settings|
            settings.weaknesses.each { |weakness| Log.write(:warn, "connects to Redis (#{settings.server}), but #{weakness}") }
          end
          queues = places.queues
          examine { Native.examine(places.own.to_native, namespace, !queues.nil?, PROBE_TIMEOUT) }
          examine { Native.examine_queues(queues.to_native, PROBE_TIMEOUT) } if queues
        end

        def examine
          yield
        rescue ConnectionError
          # It may be away for a moment only.
        end

        # Addresses prove nothing (a name and its alias, a proxy, a socket): a key written by one and read by the
        # other does. That it is not there proves less, so it is tried again.
        def same_database?(config, own, probes)
          probes.times.any? do |probes_before|
            sleep(PROBE_PAUSE) if probes_before.positive?
            finds_probe?(config, own)
          end
        end

        def finds_probe?(config, own)
          key = Native.namespaced_key(config.namespace, "probe:#{SecureRandom.hex(16)}")
          value = SecureRandom.hex(16)
          write_through_sidekiq(key, value)
          read_through(own, key) == value
        end

        def write_through_sidekiq(key, value)
          SidekiqsRedis.connection { |conn| conn.set(key, value, px: PROBE_TTL) }
        rescue ConfigurationError
          raise
        rescue => error
          raise ConnectionError, "Sidekiq's Redis cannot be compared with redis_options: #{error.message} (#{error.class})"
        end

        def read_through(own, key)
          Native.read_key(own.to_native, key, PROBE_TIMEOUT)
        rescue ConnectionError => error
          raise ConnectionError, "redis_options (#{own.server}) cannot be compared with Sidekiq's Redis: #{error.message}"
        end
      end

      # Where the tracker's keys are, and where Sidekiq's queues.
      class Places
        # @return [RedisSettings] where the tracker's keys are
        attr_reader :own
        # @return [RedisSettings, nil] where Sidekiq's queues are; nil where that is the same
        attr_reader :queues

        def initialize(own, queues)
          @own = own
          @queues = queues
        end
      end
    end
  end
end
