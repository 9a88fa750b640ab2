# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Reads the settings of Sidekiq's Redis off one of its connections, whichever client that is of. Connects to nothing.
    #
    # @api private
    module SidekiqsRedis
      NO_CLUSTER = "Redis Cluster is not supported: Sidekiq itself is not safe on it"
      WAY_OUT = "set redis_options to the same server and database"

      class << self
        # As Sidekiq.redis. But what a client says of a URL that it cannot read quotes a part of that, which may be the password.
        #
        # @yieldparam conn [Object] what `Sidekiq.redis` yields
        # @return [Object] what the block returns
        # @raise [ConfigurationError] when Sidekiq's client can make nothing of its settings
        def connection(&block)
          ::Sidekiq.redis(&block)
        rescue ArgumentError, URI::Error => error
          refuse("they cannot be read (#{error.class}, whose message may quote a password): special characters in user name and password are percent-encoded")
        end

        # redis-rb keeps a Hash of options behind its inner client, redis-client a config object. redis-rb also
        # answers `config`, which is a Redis command there, so the inner client is looked for first.
        #
        # @param conn [Object] what `Sidekiq.redis` yields
        # @return [RedisSettings]
        # @raise [ConfigurationError] naming what the native library cannot use, and the way out
        def settings(conn)
          if conn.respond_to?(:namespace)
            refuse("it uses redis-namespace, which is not supported: the queues would be looked for under other names")
          end
          client = conn.respond_to?(:_client) ? conn._client : conn
          return of_redis_rb(client, client.options) if client.respond_to?(:options)
          return of_redis_client(client.config) if client.respond_to?(:config)

          refuse("its connections are of the class #{conn.class}, from which settings cannot be read: #{WAY_OUT}")
        end

        private

        def of_redis_rb(client, options)
          more = options[:sentinels] ? redis_rb_sentinels(client, options) : options.slice(:host, :port)
          refuse_urls(more)
          RedisSettings.new(**options.slice(:path, :db, :username, :password, :connect_timeout, :read_timeout), **more,
            tls: redis_rb_tls(options))
        end

        def redis_rb_tls(options)
          tls(options[:ssl_params]) if options[:ssl] || options[:scheme] == "rediss"
        end

        # The url's host is the master's name, which the connector keeps: once the client has connected, its own host is the
        # master's address. Sentinels are asked with what they themselves are given.
        def redis_rb_sentinels(client, options)
          refuse_replicas(options[:role])
          sentinels = options[:sentinels].map do |sentinel|
            sentinel = sentinel.transform_keys(&:to_sym)
            sentinel(sentinel[:host], Integer(sentinel[:port] || RedisSettings::DEFAULT_SENTINEL_PORT), sentinel[:username],
              sentinel[:password], redis_rb_tls(options))
          end
          master = client.instance_variable_get(:@connector)&.instance_variable_get(:@master)
          {master: master || options[:host], sentinels: sentinels}
        end

        # Host and port of a config with sentinels are looked up over the network, so that question comes first. The user name
        # is taken as it is: Sidekiq sends just this one, although redis-client leaves it percent-encoded.
        def of_redis_client(config)
          refuse(NO_CLUSTER) unless config.respond_to?(:sentinel?)
          refuse_middlewares(config)
          more = config.sentinel? ? redis_client_sentinels(config) : {host: config.host, port: config.port, path: config.path}
          refuse_urls(more)
          RedisSettings.new(**more, db: config.db, username: config.username, password: redis_client_password(config),
            tls: redis_client_tls(config), connect_timeout: config.connect_timeout, read_timeout: config.read_timeout)
        end

        # Sidekiq makes a Proc of every password, so all are asked again: one cannot tell which of them may change.
        def redis_client_password(config)
          ->(_username) { config.password } if config.password
        end

        def redis_client_tls(config)
          tls(config.ssl_params) if config.ssl?
        end

        def redis_client_sentinels(config)
          refuse_replicas(config.instance_variable_get(:@role))
          sentinels = config.sentinels.map do |one|
            sentinel(one.host, one.port, one.username, redis_client_password(one), redis_client_tls(one))
          end
          {master: config.name, sentinels: sentinels}
        end

        def sentinel(host, port, username, password, tls)
          username = nil if password.nil? || username == RedisSettings::DEFAULT_USERNAME
          RedisSettings::Sentinel.new(host: host, port: port, username: username,
            secret: RedisSecret.of(password, username), tls: tls)
        end

        # One may rename keys, as those do that bring namespaces back. Nobody can see what it does.
        def refuse_middlewares(config)
          return unless config.respond_to?(:middlewares_stack)

          own = config.middlewares_stack.ancestors - ::RedisClient::Middlewares.ancestors - [config.middlewares_stack]
          own.reject! { |middleware| middleware.name.to_s.start_with?("RedisClient::") }
          refuse("middleware of redis-client (#{own.join(", ")}) may change what is sent, and the native library cannot run it: #{WAY_OUT}") if own.any?
        end

        # A URL in the place of a name leads nowhere, and would be shown with its password.
        def refuse_urls(address)
          [address[:host], address[:master], *address[:sentinels]&.map(&:host)].each do |name|
            refuse("a host, or the name of the master, has a / or @ in it, as URLs have: a URL belongs into url") unless RedisOptions.name?(name)
          end
        end

        def refuse_replicas(role)
          return if role.nil? || role.to_s == "master"

          refuse("role: #{role} leads to replicas, which take no writes")
        end

        def tls(params)
          RedisTls.new(params)
        rescue ConfigurationError => error
          refuse(error.message)
        end

        def refuse(reason)
          raise ConfigurationError, "Sidekiq's Redis settings: #{reason}", cause: nil
        end
      end
    end
  end
end
