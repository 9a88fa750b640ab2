# frozen_string_literal: true

require "uri"

module Sidekiq
  module ProcessingTracker
    # Where Redis is and how to get in, found out once: from `redis_options` or from the connections that Sidekiq makes.
    # The native library and a Ruby client can both be made from it. It shows no password.
    #
    # @api private
    class RedisSettings
      # What redis_options may say about the server, ...
      SERVER_KEYS = %i[url host port path db username password].freeze
      # ... how long to wait (seconds), ...
      TIMEOUT_KEYS = %i[timeout network_timeout connect_timeout read_timeout write_timeout].freeze
      # ... and what concerns the Ruby client only. The native library has no use for it.
      CLIENT_KEYS = %i[driver size pool_timeout pool_name id reconnect_attempts].freeze
      # Named by what they ask for, since both are likely to be met.
      TLS_KEYS = %i[ssl ssl_params].freeze
      SENTINEL_KEYS = %i[sentinels name master_name role sentinel_username sentinel_password].freeze

      DEFAULT_HOST = "localhost"
      DEFAULT_PORT = 6379
      # redis-client's word for "no user name".
      DEFAULT_USERNAME = "default"
      PORTS = (1..65_535)
      # Seconds. Sidekiq's, where nobody says anything.
      DEFAULT_TIMEOUT = 3

      NO_TLS = "TLS (rediss://, ssl) is not supported by this version of the tracker"
      NO_SENTINEL = "Redis Sentinel is not supported by this version of the tracker"
      NO_CLUSTER = "Redis Cluster is not supported: Sidekiq itself is not safe on it"

      private_constant :NO_TLS, :NO_SENTINEL, :NO_CLUSTER

      class << self
        # @param options [String, Hash] a URL, or a Hash as Sidekiq takes it, with String or Symbol keys
        # @return [RedisSettings]
        # @raise [ConfigurationError] naming the part that cannot be used, never a password
        def from_options(options)
          Options.new(options).settings
        end

        # Reads the settings off a connection of Sidekiq's own pool. Connects to nothing.
        #
        # @return [RedisSettings]
        # @raise [ConfigurationError] when Sidekiq uses what the tracker does not support
        def from_sidekiq
          ::Sidekiq.redis { |conn| from_connection(conn) }
        end

        # @param options [String, Hash] redis_options, right or wrong
        # @return [String] for people, without any password
        def describe(options)
          from_options(options).server
        rescue ConfigurationError
          "(unusable)"
        end

        private

        # redis-rb keeps a Hash of options behind its inner client, redis-client a config object. redis-rb also
        # answers `config`, which is a Redis command there, so the inner client is looked for first.
        def from_connection(conn)
          if conn.respond_to?(:namespace)
            raise ConfigurationError,
              "Sidekiq's Redis uses redis-namespace, which is not supported: the queues would be looked for under other names"
          end
          client = conn.respond_to?(:_client) ? conn._client : conn
          client.respond_to?(:options) ? from_redis_rb(client.options) : from_redis_client(client.config)
        end

        def from_redis_rb(options)
          refuse_sidekiqs(NO_SENTINEL) if options[:sentinels]
          refuse_sidekiqs(NO_TLS) if options[:ssl] || options[:scheme] == "rediss"
          new(**options.slice(:host, :port, :path, :db, :username, :password, :connect_timeout, :read_timeout))
        end

        # A Sentinel config looks up host and port over the network, so that question comes first. The user name is
        # taken as it is: Sidekiq sends just this one, although redis-client leaves it percent-encoded.
        def from_redis_client(config)
          refuse_sidekiqs(NO_CLUSTER) unless config.respond_to?(:sentinel?)
          refuse_sidekiqs(NO_SENTINEL) if config.sentinel?
          refuse_sidekiqs(NO_TLS) if config.ssl?
          new(host: config.host, port: config.port, path: config.path, db: config.db, username: config.username,
            password: config.password, connect_timeout: config.connect_timeout, read_timeout: config.read_timeout)
        end

        def refuse_sidekiqs(reason)
          raise ConfigurationError, "Sidekiq's Redis settings: #{reason}"
        end
      end

      # @return [String, nil] nil for a unix socket
      attr_reader :host
      # @return [Integer, nil] nil for a unix socket
      attr_reader :port
      # @return [String, nil] of a unix socket
      attr_reader :path
      # @return [Integer]
      attr_reader :db
      # @return [String, nil]
      attr_reader :username
      # @return [Numeric, nil] seconds
      attr_reader :connect_timeout, :read_timeout

      def initialize(host: nil, port: nil, path: nil, db: nil, username: nil, password: nil,
        connect_timeout: nil, read_timeout: nil, client: {})
        @path = path
        @host = host || DEFAULT_HOST unless path
        @port = port || DEFAULT_PORT unless path
        @db = db || 0
        @password = password
        # redis-client says "default" even where nobody logs in.
        @username = username if password && username != DEFAULT_USERNAME
        @connect_timeout = connect_timeout
        @read_timeout = read_timeout
        @client = client
        freeze
      end

      # @return [String, nil] a Proc is asked anew each time
      # @raise [ConfigurationError] when the Proc gives something else
      def password
        secret = @password
        return secret unless secret.respond_to?(:call)

        # redis-client passes the user name; a lambda that does not want it is no mistake.
        secret = (secret.respond_to?(:arity) && secret.arity.zero?) ? secret.call : secret.call(@username || DEFAULT_USERNAME)
        return secret if secret.nil? || secret.is_a?(String)

        raise ConfigurationError, "redis_options: password is a Proc that gave a #{secret.class}: allowed is a String"
      end

      # @return [String] where it leads, without credentials
      def server
        return "unix:#{@path} db #{@db}" if @path

        "redis://#{@host.include?(":") ? "[#{@host}]" : @host}:#{@port}/#{@db}"
      end

      # @return [Hash{Symbol => Object}] for the native library
      def to_native
        {
          host: @host, port: @port, path: @path, db: @db, username: @username, password: password,
          connect_timeout_ms: milliseconds(@connect_timeout), read_timeout_ms: milliseconds(@read_timeout)
        }
      end

      # @return [ConnectionPool] of Sidekiq's own client
      def new_pool
        ::Sidekiq::RedisConnection.create(client_options)
      end

      # @return [String]
      def inspect
        "#<#{self.class} #{server}#{" with password" if @password}>"
      end
      alias_method :to_s, :inspect

      private

      # Always with a URL, else Sidekiq would fill in what REDIS_URL says; never with the password in it, since 6.5
      # logs it.
      def client_options
        options = {url: @path ? "redis://#{DEFAULT_HOST}" : server, path: @path, db: @db, username: @username,
                   password: client_password, connect_timeout: @connect_timeout, read_timeout: @read_timeout}
        @client.merge(options.compact)
      end

      # redis-client asks a Proc anew with each connection since 0.23, so that secrets may change. Older ones, and the
      # redis-rb of Sidekiq 6.5 (the one with adapters), take a String only.
      def client_password
        return password unless @password.respond_to?(:call)

        asks = !::Sidekiq::RedisConnection.respond_to?(:adapter) &&
          Gem::Version.new(::RedisClient::VERSION) >= Gem::Version.new("0.23")
        asks ? ->(_username) { password } : password
      end

      def milliseconds(seconds)
        [((seconds || DEFAULT_TIMEOUT) * 1000).round, 1].max
      end

      # Reads redis_options. Every complaint names the part and never shows a value that may be secret.
      class Options
        # What to call a URL's parts in a message.
        HIDDEN = "(not shown)"

        # @param options [String, Hash]
        def initialize(options)
          options = {url: options} if options.is_a?(String)
          @options = options.transform_keys { |key| key.to_s.to_sym }.compact
        end

        # @return [RedisSettings]
        # @raise [ConfigurationError]
        def settings
          refuse_unsupported
          refuse_unknown
          parts = url_parts.merge(@options.slice(*SERVER_KEYS).except(:url))
          RedisSettings.new(**address(parts), db: db(parts[:db]), **credentials(parts), **timeouts,
            client: @options.slice(*CLIENT_KEYS, *TIMEOUT_KEYS))
        end

        private

        def refuse_unsupported
          complain("#{TLS_KEYS.find { |key| @options[key] }}: #{NO_TLS}") if TLS_KEYS.any? { |key| @options[key] }
          sentinel = SENTINEL_KEYS.find { |key| @options.key?(key) }
          complain("#{sentinel}: #{NO_SENTINEL}") if sentinel
          complain("nodes: #{NO_CLUSTER}") if @options.key?(:nodes)
        end

        def refuse_unknown
          known = SERVER_KEYS + TIMEOUT_KEYS + CLIENT_KEYS
          unknown = @options.keys - known - TLS_KEYS
          return if unknown.empty?

          complain("unknown #{unknown.join(", ")}: allowed are #{known.join(", ")}")
        end

        # As Sidekiq does: where no server is named, the environment names it.
        def url_parts
          url = @options[:url]
          url ||= ENV[ENV["REDIS_PROVIDER"].to_s] || ENV["REDIS_URL"] unless @options.key?(:host) || @options.key?(:path)
          return {} if url.nil?
          complain("url is a #{url.class}: allowed is a String") unless url.is_a?(String)
          return {path: url} if url.start_with?("/")

          parse(url)
        end

        def parse(url)
          uri = URI.parse(url)
          case uri.scheme
          when "redis" then {host: uri_host(uri), port: uri.port, db: uri_db(uri), **uri_credentials(uri)}.compact
          when "unix" then {path: File.join(*[uri.host, uri.path].compact), db: query_db(uri), **uri_credentials(uri)}.compact
          when "rediss" then complain("url: #{NO_TLS}")
          else complain("url has the scheme #{uri.scheme.inspect}: allowed are redis:// and unix://")
          end
        rescue URI::Error, ArgumentError
          # Their messages repeat what they were given.
          complain("url cannot be read #{HIDDEN}: allowed are URLs like redis://host:6379/0 and unix:///path/to/socket; " \
            "special characters in user name and password are percent-encoded")
        end

        def uri_host(uri)
          uri.host.delete_prefix("[").delete_suffix("]") unless uri.host.nil? || uri.host.empty?
        end

        def uri_db(uri)
          path = uri.path.to_s.delete_prefix("/")
          path.empty? ? query_db(uri) : path
        end

        def query_db(uri)
          URI.decode_www_form(uri.query.to_s).assoc("db")&.last
        rescue ArgumentError
          nil
        end

        # redis://secret@host is a password without a user, as redis-client reads it.
        def uri_credentials(uri)
          user, password = [uri.user, uri.password].map { |part| part && URI.decode_www_form_component(part) }
          return {password: user} if password.nil?

          {username: (user unless user.to_s.empty?), password: password}
        end

        def address(parts)
          return {path: string(:path, parts[:path])} if parts[:path]

          {host: parts[:host] && string(:host, parts[:host]), port: parts[:port] && port(parts[:port])}
        end

        def string(name, value)
          return value if value.is_a?(String) && !value.empty?

          complain("#{name} is #{value.inspect}: allowed is a String that is not empty")
        end

        def port(value)
          number = integer(value)
          return number if number && PORTS.cover?(number)

          complain("port is #{value.inspect}: allowed is a number from #{PORTS.min} to #{PORTS.max}")
        end

        def db(value)
          number = value.nil? ? 0 : integer(value)
          return number if number && !number.negative?

          complain("db is #{value.inspect}: allowed is a number, 0 or more")
        end

        def integer(value)
          value.is_a?(String) ? Integer(value, 10, exception: false) : (value if value.is_a?(Integer))
        end

        def credentials(parts)
          username, password = parts.values_at(:username, :password)
          complain("username is a #{username.class}: allowed is a String") unless username.nil? || username.is_a?(String)
          unless password.nil? || password.is_a?(String) || password.respond_to?(:call)
            complain("password is a #{password.class} #{HIDDEN}: allowed is a String or a Proc")
          end
          {username: username, password: password}
        end

        # network_timeout is Sidekiq's older word for timeout.
        def timeouts
          TIMEOUT_KEYS.each { |key| timeout(key) }
          all = @options[:network_timeout] || @options[:timeout]
          {connect_timeout: @options[:connect_timeout] || all, read_timeout: @options[:read_timeout] || all}
        end

        def timeout(key)
          value = @options[key]
          return if value.nil? || (value.is_a?(Numeric) && value.positive?)

          complain("#{key} is #{value.inspect}: allowed is a number of seconds above 0")
        end

        def complain(text)
          raise ConfigurationError, "redis_options: #{text}"
        end
      end
      private_constant :Options
    end
  end
end
