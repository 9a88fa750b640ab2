# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # The one Ruby thread that does what the engine's native threads cannot: it writes their news to the log.
    # It waits without the GVL, and one bad event costs one line, not the thread.
    #
    # @api private
    class Events
      # How long one wait for an event lasts, at most. Milliseconds. Between two waits the thread stamps that Ruby
      # still runs, for people who look at a process that beats but does nothing.
      WAIT = 1_000

      class << self
        # Writes one event to the log. Raises nothing.
        #
        # @param event [Hash{String => Object}] as {Native::Engine#next_event} gives it
        # @return [void]
        def log(event)
          level, line = line_for(event)
          Log.write(level, line)
        rescue => error
          Log.failure("log a #{event["kind"]} event", error)
        end

        private

        def line_for(event)
          case event["kind"]
          when "started" then [:info, started(event)]
          when "recovered" then [:info, recovered(event)]
          when "outage"
            [:error, "cannot use Redis: #{event["error"].chomp(".")}. Jobs run on, and are recorded as soon as it is back"]
          when "outage_over"
            [:info, "can use Redis again after #{format("%.1f", event["seconds"])} s"]
          when "lease_lost" then [:warn, lease_lost(event)]
          when "warning" then [:warn, event["message"]]
          when "dropped" then [:warn, "could not log #{event["count"]} events: too many at once"]
          else [:debug, "event #{event["kind"]}"]
          end
        end

        def started(event)
          "started: identity=#{event["identity"]} namespace=#{event["namespace"]} " \
            "interval=#{event["interval_ms"] / 1000.0}s ttl=#{event["ttl_ms"] / 1000.0}s redis=#{event["server"]}"
        end

        # Never the arguments: they may hold what does not belong into a log.
        def recovered(event)
          "recovered job: jid=#{plain(event["jid"])} class=#{plain(event["job_class"])} queue=#{plain(event["queue"])} " \
            "from=#{plain(event["from"])} outcome=#{plain(event["outcome"])}"
        end

        def lease_lost(event)
          jids = event["jids"].map { |jid| plain(jid) }
          "lost the lease of #{event["identity"]}, goes on as #{event["new_identity"]}. " \
            "Jobs running here that may run again elsewhere: #{jids.empty? ? "none" : jids.join(", ")}"
        end

        # These come from a payload: whatever is in them must stay on one line.
        def plain(value)
          return "-" if value.nil?

          text = value.to_s.scrub
          text.match?(/\A[[:graph:]]+\z/) ? text : text.inspect
        end
      end

      # @param engine [Native::Engine]
      def initialize(engine)
        @engine = engine
      end

      # @return [self]
      def start
        @thread = Thread.new { run }
        @thread.name = "processing_tracker.events"
        @thread.report_on_exception = false
        self
      end

      # Waits for the thread to log what is left, after the engine has stopped.
      #
      # @param seconds [Numeric] at most
      # @return [void]
      def join(seconds)
        @thread&.join(seconds)
      end

      private

      def run
        loop do
          event = @engine.next_event(WAIT)
          break if event == :stopped

          @engine.touch
          Events.log(event) if event
        end
      rescue => error
        # It comes from the engine itself and would come again at once.
        Log.write(:error, "reports no more events: #{error.message} (#{error.class})")
      end
    end
  end
end
