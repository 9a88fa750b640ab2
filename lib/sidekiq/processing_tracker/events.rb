# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # The one Ruby thread that does what the engine's native threads cannot: it writes their news to the log, and tells
    # those who listen. It waits without the GVL, and one bad event costs one line, not the thread.
    #
    # @api private
    class Events
      # How long one wait for an event lasts, at most. Milliseconds. Between two waits the thread stamps that Ruby
      # still runs, for people who look at a process that beats but does nothing.
      WAIT = 1_000

      # How loud each kind of event is in the log.
      LEVELS = {
        "started" => :info, "recovered" => :info, "superseded" => :info, "dead" => :warn, "discarded" => :warn, "outage" => :error,
        "outage_over" => :info, "lease_lost" => :warn, "note" => :info, "warning" => :warn, "dropped" => :warn
      }.freeze

      private_constant :LEVELS

      class << self
        # Writes one event to the log and tells whoever listens. Raises nothing of theirs. A recovery may tell of a hundred thousand jobs, so nothing
        # is made that nobody gets to see.
        #
        # @param event [Hash{String => Object}] as {Native::Engine#next_event} gives it
        # @return [void]
        def report(event)
          log(event)
          return unless Listeners.hear?(event)

          events_of(event).each { |told| Listeners.tell(told) }
        end

        # Writes one event to the log. Raises nothing.
        #
        # @param event [Hash{String => Object}] as {Native::Engine#next_event} gives it
        # @return [void]
        def log(event)
          level = LEVELS.fetch(event["kind"], :debug)
          Log.write(level, line_for(event)) if Log.writes?(level)
        rescue => error
          Log.failure("log a #{event["kind"]} event", error)
        end

        private

        def events_of(event)
          Event.from_native(event)
        rescue => error
          Log.failure("tell of a #{event["kind"]} event", error)
          []
        end

        def line_for(event)
          case event["kind"]
          when "started" then started(event)
          when "recovered" then settled("recovered job", event, "outcome" => "requeued")
          when "superseded" then settled("superseded job", event)
          when "dead" then settled("moved job to the dead set", event)
          when "discarded" then settled("discarded job", event)
          when "outage"
            "cannot use Redis: #{event["error"].chomp(".")}. Jobs run on, and are recorded as soon as it is back"
          when "outage_over" then "can use Redis again after #{format("%.1f", event["seconds"])} s"
          when "lease_lost" then lease_lost(event)
          when "note", "warning" then event["message"]
          when "dropped" then "could not tell #{event["count"]} events: too many at once"
          else "event #{event["kind"]}"
          end
        end

        def started(event)
          "started: identity=#{event["identity"]} namespace=#{event["namespace"]} " \
            "interval=#{event["interval_ms"] / 1000.0}s ttl=#{event["ttl_ms"] / 1000.0}s redis=#{event["server"]}"
        end

        # Never the arguments: they may hold what does not belong into a log.
        def settled(what, event, more = {})
          facts = {"jid" => event["jid"], "class" => event["job_class"], "queue" => event["queue"], "from" => event["from"], **more}
          facts["reason"] = event["reason"] if event["reason"]
          # The first time is the ordinary one.
          facts["recoveries"] = event["recoveries"] if event["recoveries"].to_i > 1
          "#{what}: #{facts.map { |name, value| "#{name}=#{Log.plain(value)}" }.join(" ")}"
        end

        def lease_lost(event)
          jids = event["jobs"].map { |job| Log.plain(job["jid"]) }
          "lost the lease of #{event["identity"]}, goes on as #{event["new_identity"]}. " \
            "Jobs running here that may run again elsewhere: #{jids.empty? ? "none" : jids.join(", ")}"
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
        self
      end

      # Waits for the thread to log what is left, after the engine has stopped. Raises nothing of the thread's: it has let
      # nothing out.
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
          report(event) if event
        end
      rescue Exception => error # rubocop:disable Lint/RescueException
        # It comes from the engine itself and would come again at once. Nothing may leave the thread: {#join} would raise
        # it in the midst of Sidekiq's shutdown.
        Log.write(:error, "reports no more events: #{error.message} (#{error.class})")
      end

      # What is raised here is a logger's, or meant for somebody else (`Thread#raise`). It costs this event.
      def report(event)
        Events.report(event)
      rescue Exception => error # rubocop:disable Lint/RescueException
        Log.failure("report a #{event["kind"]} event", error)
      end
    end
  end
end
