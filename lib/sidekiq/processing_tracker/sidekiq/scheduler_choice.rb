# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Who moves due jobs into their queues: the engine, or what Sidekiq or the app does it with.
    #
    # Decided once, when Sidekiq starts, and by the rule of {FetchChoice}: the engine stands aside for whatever else has its hand in it.
    #
    # @api private
    class SchedulerChoice
      # Methods of Sidekiq's scheduler whose replacement means that somebody wants due jobs to be moved in another way.
      METHODS = %i[enqueue_jobs zpopbyscore].freeze

      private_constant :METHODS

      # @param option [Symbol] what `config.scheduler` says
      # @param poller [Sidekiq::Scheduled::Poller]
      # @param queues [RedisSettings, nil] where Sidekiq's queues are, if that is another Redis than the tracker's
      def initialize(option, poller, queues = nil)
        @option = option
        @queues = queues
        # It is made with the poller, by whatever class the app has named, and nothing gives it out.
        @enqueuer = poller.instance_variable_get(:@enq)
      end

      # @return [Boolean]
      def native?
        @option == :auto && obstacles.empty?
      end

      # @return [Array(Symbol, String)] level and text of the one line that says what was decided
      def line
        return [:info, "scheduler: Sidekiq's (as configured)"] if @option == :sidekiq
        return [:info, "scheduler: native"] if native?

        [:info, "scheduler: stands aside, since #{obstacles.join(", and ")}"]
      end

      # Puts the decision into effect.
      #
      # @param engine [Native::Engine]
      # @param config [Sidekiq::Config, Module]
      # @return [void]
      def apply(engine, config)
        native? ? Scheduler.attach(@enqueuer, engine, config) : Scheduler.detach(@enqueuer)
      end

      private

      def obstacles
        @obstacles ||= [elsewhere, pro, enqueuer, client, *extensions].compact
      end

      def elsewhere
        "redis_options leads to another Redis than Sidekiq's queues (#{@queues.server})" if @queues
      end

      # Its client keeps jobs back while Redis is away, and sends them later.
      def pro
        "Sidekiq Pro is loaded" if defined?(::Sidekiq::Pro)
      end

      def enqueuer
        stock = ::Sidekiq::Scheduled::Enq
        return "the app schedules with #{@enqueuer.class} (scheduled_enq)" unless @enqueuer.instance_of?(stock)

        first = stock.ancestors.first
        return "#{first} is put before Sidekiq's scheduler" unless first == stock

        # A version to come may do without the private one.
        changed = METHODS.find { |name| (stock.method_defined?(name) || stock.private_method_defined?(name)) && !Stock.own?(stock, name) }
        "#{stock}##{changed} is not Sidekiq's own" if changed
      end

      # Where jobs go is the engine's business then.
      def client
        changed = %i[push raw_push atomic_push].find { |name| !Stock.client?(name) }
        return "#{::Sidekiq::Client}##{changed} is not Sidekiq's own" if changed

        # The scheduler of 6.5 pushes by this one.
        "#{::Sidekiq::Client}.push is not Sidekiq's own" unless ::Sidekiq.respond_to?(:default_configuration) || Stock.client_class?(:push)
      end

      # Somebody may have extended the very object.
      def extensions
        foreign = @enqueuer.singleton_class.included_modules - @enqueuer.class.included_modules - [Scheduler]
        changed = METHODS & @enqueuer.singleton_class.then { |own| own.instance_methods(false) + own.private_instance_methods(false) }
        foreign.map { |extension| "#{extension} extends Sidekiq's scheduler" } +
          changed.map { |name| "#{name} of Sidekiq's scheduler is not its own" }
      end
    end
  end
end
