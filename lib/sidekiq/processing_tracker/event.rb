# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What has become of a job. See {ProcessingTracker.on} and {ProcessingTracker.journal}.
    class Event
      include Value

      # In the order in which {#inspect} shows them.
      MEMBERS = %i[kind reason jid job_class queue from by recoveries at payload].freeze

      # What may happen to a job whose process has died, or was taken for dead:
      #
      # - :recovered: it is back in its queue
      # - :dead: it is in the dead set
      # - :discarded: it would be dead, but its class has `dead: false`
      # - :superseded: another job holds its unique lock, so it is not put back. As a rule that is a queued duplicate, which runs instead
      # - :lease_lost: this process was away for longer than its lease; the job runs on here and may run again elsewhere
      KINDS = %i[recovered dead discarded superseded lease_lost].freeze

      # By outcome, as recovery counts and journals them.
      OUTCOMES = {"requeued" => :recovered, "dead" => :dead, "discarded" => :discarded, "superseded" => :superseded}.freeze

      # Its arguments may be secret.
      HIDDEN = %i[payload].freeze

      private_constant :OUTCOMES, :HIDDEN

      # @return [Symbol] one of {KINDS}
      attr_reader :kind

      # @return [Symbol, nil] why the job is dead or discarded: :poison_pill, :unmarked, :unreadable
      attr_reader :reason

      # @return [String, nil] nil where the payload does not tell
      attr_reader :jid

      # @return [String, nil] nil where the payload does not tell; of a job of ActiveJob the class that Sidekiq's wrapper wraps
      attr_reader :job_class

      # @return [String] the queue that it was taken from
      attr_reader :queue

      # @return [String] the identity that it was taken from; `outbox` where it was superseded on its way to another Redis
      attr_reader :from

      # @return [String] the identity that settled it; of a lost lease, who this process is now
      attr_reader :by

      # @return [Integer, nil] how often the job was orphaned, this time included; nil where nobody has counted
      attr_reader :recoveries

      # @return [Time] when
      attr_reader :at

      # @return [String, nil] the job's bytes as they were taken from the queue, with its arguments, which {#inspect} and {#to_json} do not show; nil in
      #   the journal, and where so many events wait to be told that there is no room for them
      attr_reader :payload

      class << self
        # @api private
        # @param event [Hash{String => Object}] as {Native::Engine#next_event} gives it
        # @return [Array<Event>] none for what concerns no job, one for each job of a lost lease
        def from_native(event)
          kind = event["kind"].to_s.to_sym
          return [] unless KINDS.include?(kind)
          return lost(event) if kind == :lease_lost

          [new(kind: kind, reason: present(event["reason"])&.to_sym, from: event["from"], by: event["by"],
            recoveries: count(event["recoveries"]), at: time(event["at"]), **job(event))]
        end

        # @api private
        # @param line [Hash{String => Object}] as {Native::Watch#journal} gives it
        # @return [Event, nil] nil for an outcome that is not known here
        def from_journal(line)
          kind = OUTCOMES[line["outcome"]]
          return unless kind

          job = {"jid" => line["jid"], "job_class" => line["class"], "queue" => line["queue"]}
          new(kind: kind, reason: present(line["reason"])&.scrub&.to_sym, from: line["from"], by: line["by"],
            recoveries: count(line["recoveries"].to_i), at: time(line["at"]), **job(job))
        end

        private

        def lost(event)
          at = Time.now
          event["jobs"].map { |lost| new(kind: :lease_lost, from: event["identity"], by: event["new_identity"], at: at, **job(lost)) }
        end

        def job(job)
          {jid: present(job["jid"]), job_class: present(job["job_class"]), queue: job["queue"], payload: job["payload"]}
        end

        def present(text)
          text unless text.nil? || text.empty?
        end

        # 0: nobody has counted.
        def count(recoveries)
          recoveries unless recoveries.nil? || recoveries.zero?
        end

        def time(milliseconds)
          milliseconds ? Time.at(0, milliseconds, :millisecond) : Time.now
        end
      end
    end
  end
end
