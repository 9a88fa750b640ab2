# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Who hears of an event: callbacks, subscribers of ActiveSupport::Notifications, and Sidekiq's death handlers. Each once
    # at most, and none can keep the others from hearing of it.
    #
    # @api private
    module Listeners
      # What comes after the kind in the name of a notification.
      NOTIFICATION = "sidekiq_processing_tracker"

      @lock = Mutex.new
      @callbacks = {}.freeze

      class << self
        # @param kinds [Array<Symbol>]
        # @param callback [#call]
        # @return [void]
        # @raise [ArgumentError] for an unknown kind
        def add(kinds, callback)
          unknown = kinds - Event::KINDS
          unless unknown.empty? && kinds.any?
            raise ArgumentError, "unknown event #{unknown.map(&:inspect).join(", ")}: allowed are #{Event::KINDS.map(&:inspect).join(", ")}"
          end

          @lock.synchronize do
            @callbacks = kinds.uniq.each_with_object(@callbacks.dup) { |kind, all| all[kind] = [*all[kind], callback].freeze }.freeze
          end
          nil
        end

        # Forgets all callbacks.
        #
        # @return [void]
        def clear
          @lock.synchronize { @callbacks = {}.freeze }
          nil
        end

        # Whether anybody may want to hear of an event.
        #
        # @param event [Hash{String => Object}] as {Native::Engine#next_event} gives it
        # @return [Boolean]
        def hear?(event)
          return true if defined?(::ActiveSupport::Notifications) || event["reason"] == "poison_pill"

          callbacks = @callbacks
          !callbacks.empty? && callbacks.key?(event["kind"].to_s.to_sym)
        end

        # Tells an event to everybody who wants to hear of it. Raises nothing of theirs.
        #
        # @param event [Event]
        # @return [void]
        def tell(event)
          @callbacks.fetch(event.kind, []).each { |callback| guard("a callback", event) { callback.call(event) } }
          notify(event)
          report_death(event) if event.reason == :poison_pill
          nil
        end

        private

        # Subscribers are known to log what they are given, so the payload is not among it, only within the event.
        def notify(event)
          return unless defined?(::ActiveSupport::Notifications)

          guard("a subscriber", event) do
            ::ActiveSupport::Notifications.instrument("#{event.kind}.#{NOTIFICATION}", **event.to_h.except(:payload), event: event)
          end
        end

        # As Sidekiq does for a job whose retries are exhausted, also where `dead: false` keeps it out of the dead set.
        def report_death(event)
          handlers = DeadSetLimits.death_handlers
          return if handlers.empty?

          job = job_of(event)
          return Log.write(:warn, "runs no death handlers for job #{Log.plain(event.jid)}: its payload is not at hand") unless job

          error = PoisonPill.new("orphaned #{event.recoveries} times, the last time by #{event.from}")
          job = with_error(job, error, event)
          handlers.each { |handler| guard("a death handler", event) { handler.call(job, error) } }
        end

        # What Sidekiq has set in a job when its handlers get it.
        def with_error(job, error, event)
          job.merge("queue" => job["queue"] || event.queue, "error_class" => error.class.name, "error_message" => error.message,
            "failed_at" => DeadSetLimits.timestamp(event.at))
        end

        # @return [Hash{String => Object}, nil]
        def job_of(event)
          job = ::Sidekiq.load_json(event.payload) if event.payload
          job if job.is_a?(Hash)
        rescue
          nil
        end

        # Whatever they raise, `exit` and errors that are no StandardErrors too: it would end the thread that tells events, or
        # keep the others from hearing of this one. A thread that is killed ends all the same. A signal that Ruby has
        # raised in the main thread (Ctrl-C in a console) is not theirs.
        #
        # The message may hold arguments of the job (JSON::ParserError quotes what it cannot read), so it is not for
        # everybody.
        def guard(who, event)
          yield
        rescue Exception => error # rubocop:disable Lint/RescueException
          raise if error.is_a?(SignalException) && Thread.current == Thread.main

          place = error.backtrace&.first
          Log.write(:error, "#{who} failed on the event #{event.kind} of job #{Log.plain(event.jid)}: #{error.class}#{" at #{place}" if place}")
          Log.write(:debug, "#{who} failed: #{message_of(error)}")
        end

        # It is their code, too.
        def message_of(error)
          error.message
        rescue Exception => another # rubocop:disable Lint/RescueException
          "(its message raises #{another.class})"
        end
      end
    end
  end
end
