# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Where Redis is and how to get in, found out once: from `redis_options` or from the connections that Sidekiq makes.
    # The native library and a Ruby client can both be made from it. It shows no password.
    #
    # @api private
    class RedisSettings
      DEFAULT_HOST = "localhost"
      DEFAULT_PORT = 6379
      DEFAULT_SENTINEL_PORT = 26_379
      # redis-client's word for "no user name".
      DEFAULT_USERNAME = "default"
      # Seconds. Sidekiq's, where nobody says anything.
      DEFAULT_TIMEOUT = 3

      # One sentinel.
      class Sentinel
        # @return [String]
        attr_reader :host
        # @return [Integer]
        attr_reader :port
        # @return [String, nil]
        attr_reader :username
        # @return [RedisSecret, nil]
        attr_reader :secret
        # @return [RedisTls, nil]
        attr_reader :tls

        def initialize(host:, port:, username:, secret:, tls:)
          @host = host
          @port = port
          @username = username
          @secret = secret
          @tls = tls
        end

        # @param passwords [Passwords, nil] see {RedisSettings#to_native}
        # @return [Hash{Symbol => Object}] for the native library
        def to_native(passwords)
          {host: @host, port: @port, username: @username, password: @secret&.to_native(passwords), tls: @tls&.to_native}
        end
      end

      class << self
        # @param options [String, Hash] a URL, or a Hash as Sidekiq takes it, with String or Symbol keys
        # @return [RedisSettings]
        # @raise [ConfigurationError] naming the part that cannot be used, never a password
        def from_options(options)
          RedisOptions.new(options).settings
        end

        # Reads the settings off a connection of Sidekiq's own pool. Connects to nothing.
        #
        # @return [RedisSettings]
        # @raise [ConfigurationError] when Sidekiq uses what the native library cannot
        def from_sidekiq
          SidekiqsRedis.connection { |conn| SidekiqsRedis.settings(conn) }
        end

        # @param options [String, Hash] redis_options, right or wrong
        # @return [String] for people, without any password
        def describe(options)
          from_options(options).server
        rescue ConfigurationError
          "(unusable)"
        end
      end

      # @return [String, nil] nil for a unix socket, and with Sentinels
      attr_reader :host
      # @return [Integer, nil] nil for a unix socket, and with Sentinels
      attr_reader :port
      # @return [String, nil] of a unix socket
      attr_reader :path
      # @return [Integer]
      attr_reader :db
      # @return [String, nil]
      attr_reader :username
      # @return [RedisTls, nil] nil for a connection that is not encrypted
      attr_reader :tls
      # @return [String, nil] the name by which Sentinels know the master
      attr_reader :master
      # @return [Array<Sentinel>, nil]
      attr_reader :sentinels
      # @return [Numeric, nil] seconds
      attr_reader :connect_timeout, :read_timeout

      def initialize(host: nil, port: nil, path: nil, db: nil, username: nil, password: nil, tls: nil, master: nil,
        sentinels: nil, connect_timeout: nil, read_timeout: nil, client: {})
        @path = path
        @master = master
        @sentinels = sentinels
        unless path || sentinels
          @host = host || DEFAULT_HOST
          @port = port || DEFAULT_PORT
        end
        @db = db || 0
        # redis-client says "default" even where nobody logs in.
        @username = username if password && username != DEFAULT_USERNAME
        @secret = RedisSecret.of(password, @username)
        @tls = tls
        @connect_timeout = connect_timeout
        @read_timeout = read_timeout
        @client = client
        freeze
      end

      # @return [String, nil] a Proc is asked anew each time
      # @raise [ConfigurationError] when the Proc gives something else
      def password
        @secret&.ask
      end

      # @return [String] where it leads, without credentials
      def server
        return "unix:#{@path} db #{@db}" if @path

        scheme = @tls ? "rediss" : "redis"
        return "#{scheme}://#{@master}/#{@db} (Sentinel)" if @sentinels

        "#{scheme}://#{@host.include?(":") ? "[#{@host}]" : @host}:#{@port}/#{@db}"
      end

      # @return [Array<String>] what people should be warned of, if anything
      def weaknesses
        [@tls, *(@sentinels || []).map(&:tls)].compact.filter_map(&:weakness).uniq
      end

      # @param passwords [Passwords, nil] who answers for passwords that may change; nil: they are asked now, once
      # @return [Hash{Symbol => Object}] for the native library
      def to_native(passwords = nil)
        {
          host: @host, port: @port, path: @path, db: @db, username: @username, password: @secret&.to_native(passwords),
          tls: @tls&.to_native, master: @master, sentinels: @sentinels&.map { |sentinel| sentinel.to_native(passwords) },
          connect_timeout_ms: milliseconds(@connect_timeout), read_timeout_ms: milliseconds(@read_timeout),
          passwords: passwords&.native
        }
      end

      # @return [ConnectionPool] of Sidekiq's own client
      def new_pool
        ::Sidekiq::RedisConnection.create(client_options)
      end

      # @return [String]
      def inspect
        "#<#{self.class} #{server}#{" with password" if @secret}>"
      end
      alias_method :to_s, :inspect

      private

      # Always with a URL, else Sidekiq would fill in what REDIS_URL says; never with the password in it, since 6.5
      # logs it.
      def client_options
        options = {url: client_url, path: @path, db: @db, username: @username, password: client_password(@secret),
                   connect_timeout: @connect_timeout, read_timeout: @read_timeout, **client_tls, **client_sentinels}
        @client.merge(options.compact)
      end

      def client_url
        return "redis://#{DEFAULT_HOST}" if @path

        @sentinels ? "redis://#{@master}" : server
      end

      def client_tls
        @tls ? {ssl: true, ssl_params: @tls.params} : {}
      end

      # redis-rb reads the credentials of each sentinel, redis-client those of all.
      def client_sentinels
        return {} unless @sentinels

        first = @sentinels.first
        nodes = @sentinels.map { |sentinel| {host: sentinel.host, port: sentinel.port} }
        return {role: :master, sentinels: nodes, name: @master, sentinel_username: first.username, sentinel_password: client_password(first.secret)} unless redis_rb?

        nodes.zip(@sentinels) { |node, sentinel| node.merge!({username: sentinel.username, password: sentinel.secret&.ask}.compact) }
        {role: :master, sentinels: nodes}
      end

      # redis-client asks a Proc anew with each connection since 0.23, so that secrets may change. Older ones, and the
      # redis-rb of Sidekiq 6.5, take a String only.
      def client_password(secret)
        return secret&.ask if secret.nil? || secret.fixed?

        asks = !redis_rb? && Gem::Version.new(::RedisClient::VERSION) >= Gem::Version.new("0.23")
        asks ? ->(_username) { secret.ask } : secret.ask
      end

      # The one with adapters, 6.5, has redis-rb by default.
      def redis_rb?
        ::Sidekiq::RedisConnection.respond_to?(:adapter)
      end

      def milliseconds(seconds)
        [((seconds || DEFAULT_TIMEOUT) * 1000).round, 1].max
      end
    end
  end
end
