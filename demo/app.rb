# frozen_string_literal: true

# The application of the demo. Its workers load it with the tracker or without, and so does bin/demo to enqueue.
# Everything else is the same on both sides.

require "sidekiq"

if ENV["DEMO_TRACKER"] == "yes"
  require "sidekiq-processing-tracker"

  Sidekiq::ProcessingTracker.configure do |config|
    # So that nobody waits long. The defaults are 5 and 30.
    config.heartbeat_interval = 1
    config.heartbeat_ttl = 5
  end
end

# Reports to Redis when it starts and when it ends: all that the demo counts is counted from these reports.
class DemoJob
  include Sidekiq::Job
  include Sidekiq::ProcessingTracker::Worker if defined?(Sidekiq::ProcessingTracker::Worker)

  REPORTS = "demo:reports"

  def perform(seconds)
    report("started")
    sleep seconds # the work
    report("finished")
  end

  private

  # CLOCK_MONOTONIC is the same in all processes of a machine.
  def report(event)
    line = [event, jid, Process.pid, Process.clock_gettime(Process::CLOCK_MONOTONIC)].join(" ")
    Sidekiq.redis { |conn| conn.rpush(REPORTS, line) }
  end
end
