# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Who fetches jobs: the engine (native), or the app's own fetcher (the tracker then records by middleware).
    #
    # Decided once, when Sidekiq starts. The native fetch stands aside for whatever else has its hand in fetching: what
    # another gem does there would be lost without a word.
    #
    # @api private
    class FetchChoice
      # Methods of Sidekiq's fetch whose replacement means that somebody wants jobs to be fetched in another way.
      METHODS = %i[retrieve_work queues_cmd bulk_requeue].freeze

      private_constant :METHODS

      # @param option [Symbol] what `config.fetch` says
      # @param fetchers [Array<Object>] what Sidekiq would fetch with
      # @param queues [RedisSettings, nil] where Sidekiq's queues are, if that is another Redis than the tracker's
      # @raise [ConfigurationError] when the engine is to fetch from a Redis where it cannot
      def initialize(option, fetchers, queues = nil)
        @option = option
        @fetchers = fetchers
        @queues = queues
        return unless option == :native && queues

        raise ConfigurationError, "fetch is :native, but redis_options leads to another server or database than Sidekiq's " \
          "(#{queues.server}): the native fetch needs both in one. Leave redis_options unset, or fetch at :auto"
      end

      # @return [Boolean]
      def native?
        @option == :native || (@option == :auto && obstacles.empty?)
      end

      # @return [Array(Symbol, String)] level and text of the one line that says what was decided
      def line
        case [@option, native?]
        when [:sidekiq, false] then [:info, "fetch: Sidekiq's (as configured); jobs are recorded by the middleware"]
        when [:auto, false]
          [:info, "fetch: stands aside, since #{obstacles.join(", and ")}; jobs are recorded by the middleware"]
        else
          return [:info, "fetch: native"] if obstacles.empty?

          [:warn, "fetch: native, as configured, though #{obstacles.join(", and ")}: the native fetch replaces that"]
        end
      end

      private

      def obstacles
        @obstacles ||= elsewhere + pro + @fetchers.map(&:class).uniq.filter_map { |fetcher_class| obstacle(fetcher_class) } +
          extensions
      end

      def elsewhere
        @queues ? ["redis_options leads to another Redis than Sidekiq's queues (#{@queues.server})"] : []
      end

      def pro
        defined?(::Sidekiq::Pro) ? ["Sidekiq Pro is loaded"] : []
      end

      def obstacle(fetcher_class)
        stock = ::Sidekiq::BasicFetch
        return "the app fetches with #{fetcher_class}" unless fetcher_class == stock

        first = stock.ancestors.first
        return "#{first} is put before Sidekiq's fetch" unless first == stock

        changed = METHODS.find { |name| !Stock.own?(stock, name) }
        "#{stock}##{changed} is not Sidekiq's own" if changed
      end

      # Somebody may have extended the very object. The tracker's own modules are there from a start before this one.
      def extensions
        foreign = @fetchers.flat_map { |fetcher| fetcher.singleton_class.included_modules - fetcher.class.included_modules }
        (foreign.uniq - [Fetch, NativeFetch, ThrottledFetch]).map { |extension| "#{extension} extends Sidekiq's fetcher" }
      end
    end
  end
end
