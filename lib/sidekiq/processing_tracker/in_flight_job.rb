# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # A job that is on record as running. See {ProcessingTracker.in_flight}.
    #
    # - `jid`, `job_class`: nil where the payload does not tell
    # - `queue`: that it was taken from
    # - `since`: a Time: when it was put on record
    # - `identity`: who has it
    #
    # Frozen. Two are equal when all of that is.
    InFlightJob = Struct.new(:jid, :job_class, :queue, :since, :identity, keyword_init: true) do
      include Value
    end
  end
end
