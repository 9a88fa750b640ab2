# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Where the threads of a capsule take jobs from, and in which form.
    #
    # @api private
    class JobSource
      class << self
        # @param config [Sidekiq::Config, Module]
        # @return [Array<Array(Object, JobSource)>] each fetcher and its source. Since 7.0 each capsule has a fetcher, made
        #   by whoever asks first: here that is one thread. 6.5 has one
        def all(config)
          return config.capsules.values.map { |capsule| [capsule.fetcher, of_capsule(capsule)] } if config.respond_to?(:capsules)

          [[config[:fetch], of_6_5(config)]]
        end

        private

        # Sidekiq's own client gives a payload as UTF-8, or binary where it is none.
        def of_capsule(capsule)
          new(queues: capsule.queues, strict: capsule.mode == :strict, config: capsule, encoding: nil)
        end

        # redis-rb gives it in the default encoding, whatever it is.
        def of_6_5(config)
          new(queues: config[:queues], strict: !!config[:strict], config: config, encoding: Encoding.default_external)
        end
      end

      # @return [Array<String>] names of queues. Where the order is drawn, one of weight n is there n times
      attr_reader :queues
      # @return [Boolean] whether the order is always the same
      attr_reader :strict
      # @return [Object] what Sidekiq's own fetch gives its units of work
      attr_reader :config
      # @return [Encoding, nil] of payloads; nil for UTF-8, or binary where that is not valid
      attr_reader :encoding

      # @param queues [Array<String>]
      # @param strict [Boolean]
      # @param config [Object]
      # @param encoding [Encoding, nil]
      def initialize(queues:, strict:, config:, encoding:)
        @queues = queues.map(&:to_s).freeze
        @strict = strict
        @config = config
        @encoding = encoding
      end
    end
  end
end
