# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A job that is on record as running. See {ProcessingTracker.in_flight}.
    class InFlightJob
      include Value

      # In the order in which {#inspect} shows them.
      MEMBERS = %i[jid job_class queue since identity].freeze

      # @return [String, nil] nil where the payload does not tell
      attr_reader :jid

      # @return [String, nil] nil where the payload does not tell
      attr_reader :job_class

      # @return [String] the queue that it was taken from
      attr_reader :queue

      # @return [Time] when it was put on record
      attr_reader :since

      # @return [String] who has it
      attr_reader :identity
    end
  end
end
