# frozen_string_literal: true

# reenqueue_orphans!, as from a console, with what it took on standard output as JSON.

require "json"
require "sidekiq"
require "sidekiq-processing-tracker"

# A line a job would be most of the work.
Sidekiq.logger.level = Logger::WARN

def memory(field)
  Integer(File.read("/proc/self/status")[/^#{field}:\s+(\d+)/, 1]) / 1024.0
end

# So that the first use of the connection is not part of it.
Sidekiq.redis { |conn| conn.call("PING") }
before = memory("VmRSS")
began = Process.clock_gettime(Process::CLOCK_MONOTONIC)
counts = Sidekiq::ProcessingTracker.reenqueue_orphans!
seconds = Process.clock_gettime(Process::CLOCK_MONOTONIC) - began
puts JSON.generate({"seconds" => seconds, "growth" => memory("VmHWM") - before, "requeued" => counts.fetch(:requeued)})
