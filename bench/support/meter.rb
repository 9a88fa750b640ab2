# frozen_string_literal: true

require "etc"

module Bench
  # What a Redis server and processes have used up to a moment. The difference of two moments is what happened between.
  class Meter
    # Hertz of the times in /proc.
    # Commands of the driver itself.
    OWN = %w[info].freeze

    # @return [Hash{Symbol => Numeric}]
    attr_reader :values

    # @param client [RedisClient]
    # @param pids [Array<Integer>]
    def initialize(client, pids = [])
      info = client.call("INFO", "all")
      @values = {
        at: Eventually.now,
        redis_cpu: field(info, "used_cpu_user") + field(info, "used_cpu_sys"),
        requests: field(info, "total_reads_processed"),
        commands: commands(info),
        bytes_in: field(info, "total_net_input_bytes"),
        bytes_out: field(info, "total_net_output_bytes"),
        process_cpu: pids.sum { |pid| Meter.cpu(pid) }
      }
    end

    # @param earlier [Meter]
    # @return [Hash{Symbol => Numeric}]
    def since(earlier)
      values.to_h { |name, value| [name, value - earlier.values.fetch(name)] }
    end

    class << self
      # By the process's own clock, which Linux counts in nanoseconds: an idle process uses less than a tick in ten seconds.
      #
      # @return [Float] seconds of processor time, of all threads that are or were
      def cpu(pid)
        ::Process.clock_gettime((~pid << 3) | 2)
      rescue SystemCallError
        0.0
      end

      # @param field [String] VmRSS, or VmHWM for the most there ever was
      # @return [Float] MB
      def memory(pid, field = "VmRSS")
        Integer(File.read("/proc/#{pid}/status")[/^#{field}:\s+(\d+)/, 1]) / 1024.0
      rescue SystemCallError
        0.0
      end
    end

    private

    def field(info, name)
      Float(info[/^#{name}:(\S+)/, 1] || 0)
    end

    # Those in scripts are among them.
    def commands(info)
      info.scan(/^cmdstat_([^:]+):calls=(\d+)/).to_h.except(*OWN).sum { |_, calls| Integer(calls) }
    end
  end
end
