# frozen_string_literal: true

require "uri"

module Sidekiq
  module ProcessingTracker
    # Reads redis_options. Every complaint names the part and never shows a value that may be secret.
    #
    # @api private
    class RedisOptions
      # What redis_options may say about the server, ...
      SERVER_KEYS = %i[url host port path db username password].freeze
      # ... how the connection is encrypted, ...
      TLS_KEYS = %i[ssl ssl_params].freeze
      # ... who names the server, ...
      SENTINEL_KEYS = %i[sentinels name master_name role sentinel_username sentinel_password].freeze
      # ... how long to wait (seconds), ...
      TIMEOUT_KEYS = %i[timeout network_timeout connect_timeout read_timeout write_timeout].freeze
      # ... and what concerns the Ruby client only. The native library has no use for it.
      CLIENT_KEYS = %i[driver size pool_timeout pool_name id reconnect_attempts].freeze

      PORTS = (1..65_535)
      MASTER_ROLES = [nil, "master"].freeze

      # What to call a value in a message that may be a secret.
      HIDDEN = "(not shown)"
      # What only a piece of a URL has in it, and that may be the piece with the password.
      PIECE_OF_URL = %r{[@:/]}

      # @param options [String, Hash]
      def initialize(options)
        options = {url: options} if options.is_a?(String)
        @options = options.transform_keys { |key| key.to_s.to_sym }.compact
      end

      # @param name [String, nil] of a host, or of a master that Sentinels know
      # @return [Boolean] whether it can be one: a URL in its place would be shown, with the password in it
      def self.name?(name)
        name.nil? || !name.match?(%r{[@/]})
      end

      # @return [String] the class and no value
      def inspect
        "#<#{self.class}>"
      end
      alias_method :to_s, :inspect

      # @return [RedisSettings]
      # @raise [ConfigurationError]
      def settings
        refuse_unsupported
        refuse_unknown
        parts = url_parts.merge(@options.slice(*SERVER_KEYS).except(:url))
        RedisSettings.new(**address(parts), db: db(parts[:db]), **credentials(parts), tls: tls(parts[:tls]), **timeouts,
          client: @options.slice(*CLIENT_KEYS, *TIMEOUT_KEYS))
      end

      private

      def refuse_unsupported
        complain("nodes: #{SidekiqsRedis::NO_CLUSTER}") if @options.key?(:nodes)
        complain("role is #{@options[:role]}: a replica takes no writes") unless MASTER_ROLES.include?(@options[:role]&.to_s)
      end

      def refuse_unknown
        known = SERVER_KEYS + TLS_KEYS + SENTINEL_KEYS + TIMEOUT_KEYS + CLIENT_KEYS
        unknown = @options.keys - known
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
        complain(unreadable_url) if astray?(uri)
        case uri.scheme
        when "redis", "rediss"
          {host: uri_host(uri), port: uri.port, db: uri_db(uri), tls: uri.scheme == "rediss", **uri_credentials(uri)}.compact
        when "unix" then {path: File.join(*[uri.host, uri.path].compact), db: query_db(uri), **uri_credentials(uri)}.compact
        else complain("url has the scheme #{uri.scheme.inspect}: allowed are redis://, rediss:// and unix://")
        end
      rescue URI::Error, ArgumentError
        # Their messages repeat what they were given.
        complain(unreadable_url)
      end

      def unreadable_url
        "url cannot be read #{HIDDEN}: allowed are URLs like redis://host:6379/0 and unix:///path/to/socket; " \
          "special characters in user name and password are percent-encoded"
      end

      # An / ? or # of a password that is not encoded ends the host for URI, and the rest of the password becomes the path.
      # (A socket's path may well have an @ in it, but nothing stands before it.)
      def astray?(uri)
        return false unless %w[redis rediss unix].include?(uri.scheme)

        rest = [uri.path, uri.query, uri.fragment].join
        !uri.opaque.nil? || (rest.include?("@") && (uri.scheme != "unix" || !uri.host.to_s.empty?))
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
        return {path: path(parts[:path])} if parts[:path]
        return sentinels(parts) if @options.key?(:sentinels)

        {host: parts[:host] && host(:host, parts[:host]), port: parts[:port] && port(parts[:port])}
      end

      # As redis-client: the host of the url is the name, and what the url says of a login is the master's.
      def sentinels(parts)
        list = @options[:sentinels]
        complain("sentinels is a #{list.class}: allowed is a list of Hashes and URLs that is not empty") unless list.is_a?(Array) && list.any?
        name = @options[:name] || @options[:master_name] || parts[:host]
        complain("sentinels need a name: name, or the host of the url, is that of the master") unless name.is_a?(String) && !name.empty?
        complain("the name of the master is #{HIDDEN}: allowed is a name without / and @") unless self.class.name?(name)
        {master: name, sentinels: list.map { |sentinel| sentinel(sentinel) }}
      end

      def sentinel(given)
        complain("sentinels has a #{given.class}: allowed are Hashes and URLs") unless given.is_a?(Hash) || given.is_a?(String)
        given = given.is_a?(String) ? {url: given} : given.transform_keys { |key| key.to_s.to_sym }
        unknown = given.keys - %i[url host port username password]
        complain("sentinels: unknown #{unknown.join(", ")}: allowed are url, host, port, username, password") if unknown.any?
        parts = given[:url] ? parse(given[:url].to_s) : {}
        parts = {host: RedisSettings::DEFAULT_HOST, port: RedisSettings::DEFAULT_SENTINEL_PORT}.merge(parts, given.except(:url).compact)
        login = credentials({username: @options[:sentinel_username], password: @options[:sentinel_password]}.merge(parts.slice(:username, :password)))
        username = login[:username] unless login[:username] == RedisSettings::DEFAULT_USERNAME
        # Those of rediss:// are the master's: sentinels are asked so where ssl says it, or their own URL.
        RedisSettings::Sentinel.new(host: host("sentinels: host", parts[:host]), port: port(parts[:port]), username: username,
          secret: RedisSecret.of(login[:password], username), tls: tls(parts[:tls]))
      end

      def tls(by_url)
        wanted = @options.fetch(:ssl, by_url)
        RedisTls.new(@options[:ssl_params]) if wanted
      rescue ConfigurationError => error
        complain(error.message)
      end

      def path(value)
        return string(:path, value) unless value.to_s.include?("://")

        complain("path is #{HIDDEN}: allowed is the path of a socket; a URL belongs into url")
      end

      def host(name, value)
        return string(name, value) if self.class.name?(value.to_s)

        complain("#{name} is #{HIDDEN}: allowed is a name or an address, without / and @; a URL belongs into url")
      end

      def string(name, value)
        return value if value.is_a?(String) && !value.empty?

        complain("#{name} is #{shown(value)}: allowed is a String that is not empty")
      end

      def shown(value)
        value.to_s.match?(PIECE_OF_URL) ? HIDDEN : value.inspect
      end

      def port(value)
        number = integer(value)
        return number if number && PORTS.cover?(number)

        complain("port is #{shown(value)}: allowed is a number from #{PORTS.min} to #{PORTS.max}")
      end

      def db(value)
        number = value.nil? ? 0 : integer(value)
        return number if number && !number.negative?

        complain("db is #{shown(value)}: allowed is a number, 0 or more")
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

        complain("#{key} is #{shown(value)}: allowed is a number of seconds above 0")
      end

      # Without what led to it, which is shown with an error and may repeat what was given.
      def complain(text)
        raise ConfigurationError, "redis_options: #{text}", cause: nil
      end
    end
  end
end
