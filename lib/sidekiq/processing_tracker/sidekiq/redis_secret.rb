# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A password: a String, or something that is asked for it before each login. Shows neither.
    #
    # @api private
    class RedisSecret
      # @param value [String, #call, nil]
      # @param username [String, nil] whom the login is for; redis-client passes it to a Proc
      # @return [RedisSecret, nil] nil where there is no password
      def self.of(value, username = nil)
        new(value, username) unless value.nil?
      end

      # @param value [String, #call]
      # @param username [String, nil]
      def initialize(value, username)
        @value = value
        @username = username || RedisSettings::DEFAULT_USERNAME
      end

      # @return [Boolean] whether it is the same for ever
      def fixed?
        !@value.respond_to?(:call)
      end

      # @return [String, nil] what it is now
      # @raise [ConfigurationError] when a Proc gives something else
      def ask
        return @value if fixed?

        # A lambda that does not want the user name is no mistake.
        secret = (@value.respond_to?(:arity) && @value.arity.zero?) ? @value.call : @value.call(@username)
        return secret if secret.nil? || secret.is_a?(String)

        raise ConfigurationError, "redis_options: password is a Proc that gave a #{secret.class}: allowed is a String"
      end

      # @param passwords [Passwords, nil] who answers for passwords that may change; nil: it is asked now, once
      # @return [String, Integer, nil] for the native library
      def to_native(passwords)
        (fixed? || passwords.nil?) ? ask : passwords.add(self)
      end

      # @return [String]
      def inspect
        "#<#{self.class}>"
      end
      alias_method :to_s, :inspect
    end
  end
end
