# frozen_string_literal: true

# What this process has done, for the driver to read: a file, so that it costs no Redis.
module Marks
  EVERY = Integer(ENV.fetch("BENCH_MARK_EVERY", 100))
  FILE = File.open(ENV.fetch("BENCH_MARKS", File::NULL), "ab")

  @count = 0

  class << self
    # Counts a job. A line for each {EVERY}th: how many there were, and when.
    def done
      count = (@count += 1)
      FILE.syswrite("#{count} #{clock}\n") if (count % EVERY).zero?
    end

    # A line with one number.
    def note(value)
      FILE.syswrite("#{value}\n")
    end

    # Says that this process is here, and returns when the file is.
    def wait_for(gate)
      note("0 #{clock}")
      sleep 0.002 until File.exist?(gate)
    end

    # The same for all processes of a machine.
    def clock
      Process.clock_gettime(Process::CLOCK_MONOTONIC)
    end
  end
end
