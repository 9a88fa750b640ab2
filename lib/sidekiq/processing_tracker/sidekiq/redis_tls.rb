# frozen_string_literal: true

require "openssl"

module Sidekiq
  module ProcessingTracker
    # How a connection is encrypted: what `ssl_params` says to Ruby's clients, for the native library, which has OpenSSL
    # neither in it nor needs it.
    #
    # @api private
    class RedisTls
      # What `ssl_params` may hold.
      KEYS = %i[ca_file ca_path cert key extra_chain_cert verify_mode verify_hostname min_version].freeze
      # The native library speaks TLS 1.2 and 1.3 in any case.
      MIN_VERSIONS = [nil, :TLS1, :TLS1_1, :TLS1_2, OpenSSL::SSL::TLS1_VERSION, OpenSSL::SSL::TLS1_1_VERSION,
        OpenSSL::SSL::TLS1_2_VERSION].freeze

      # @return [Hash] as given
      attr_reader :params

      # @param params [Hash, nil] ssl_params
      # @raise [ConfigurationError] naming what cannot be used, with the way out
      def initialize(params)
        complain("a #{params.class}", "allowed is a Hash") unless params.nil? || params.is_a?(Hash)
        @params = (params || {}).transform_keys { |key| key.to_s.to_sym }.compact.freeze
        @native = read.freeze
        freeze
      end

      # @return [Hash{Symbol => String, nil}] for the native library
      def to_native = @native

      # @return [String, nil] a warning for people: what is not verified
      def weakness
        case @native[:verify]
        when "none" then "its certificate is not verified (verify_mode: VERIFY_NONE)"
        when "chain" then "the host name in its certificate is not verified (verify_hostname: false)"
        end
      end

      # @return [String]
      def inspect
        "#<#{self.class} verify=#{@native[:verify]}>"
      end
      alias_method :to_s, :inspect

      private

      def read
        unknown = @params.keys - KEYS
        complain(unknown.join(", "), "the native library knows #{KEYS.join(", ")} only. Set redis_options to the same server with those") if unknown.any?
        complain("min_version", "TLS 1.2 and 1.3 are spoken in any case, and no other minimum can be set") unless MIN_VERSIONS.include?(@params[:min_version])
        cert, key = cert_chain, private_key
        complain(cert ? "cert without key" : "key without cert", "a client has both or none") if cert.nil? != key.nil?
        {ca_file: path(:ca_file), ca_path: path(:ca_path), cert: cert, key: key, verify: verify}
      end

      def verify
        mode = @params.fetch(:verify_mode, OpenSSL::SSL::VERIFY_PEER)
        complain("verify_mode", "allowed are OpenSSL's VERIFY_PEER and VERIFY_NONE") unless mode.is_a?(Integer)
        return "none" if mode == OpenSSL::SSL::VERIFY_NONE

        (@params[:verify_hostname] == false) ? "chain" : "full"
      end

      def path(name)
        value = @params[name]
        return if value.nil?
        return value.to_s if value.is_a?(String) || value.respond_to?(:to_path)

        complain("#{name} is a #{value.class}", "allowed is a path")
      end

      # A path stays one: the file is read for each connection.
      def cert_chain
        cert = @params[:cert]
        chain = Array(@params[:extra_chain_cert])
        return path(:cert) if chain.empty? && !cert.respond_to?(:to_pem)

        unless [cert, *chain].all? { |one| one.respond_to?(:to_pem) }
          complain("extra_chain_cert", "allowed are certificates of OpenSSL beside a cert that is one; or put all into the file of cert")
        end
        [cert, *chain].map(&:to_pem).join
      end

      def private_key
        key = @params[:key]
        return path(:key) unless key.is_a?(OpenSSL::PKey::PKey)
        return key.private_to_pem if key.private?

        complain("key", "it has no private part")
      end

      def complain(what, allowed)
        raise ConfigurationError, "ssl_params: #{what}: #{allowed}"
      end
    end
  end
end
