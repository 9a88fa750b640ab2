# frozen_string_literal: true

module Bench
  module Chaos
    # One Sidekiq process, from its start to its end.
    class Life
      # What it is called in its identities.
      attr_reader :label
      # @return [Integer]
      attr_reader :slot
      # @return [Integer]
      attr_reader :pid
      # @return [Float]
      attr_reader :born_at
      # @return [Float, nil] when it was sent a TERM
      attr_reader :term_at
      # @return [Float, nil] when it was found to have ended
      attr_reader :ended_at
      # @return [Process::Status, nil]
      attr_reader :status
      # @return [Float, nil] when it was killed
      attr_reader :killed_at
      # @return [Boolean] whether it was up when it was killed
      attr_reader :killed_at_work
      # @return [Array<Array(Float, Float)>] from when it stood still, and for how long
      attr_reader :stops
      # @return [Hash{String => Array<Integer>}, nil] identity => numbers of the jobs that Redis had on record for it right
      #   after its end
      attr_accessor :in_flight

      # @param worker [Worker]
      def initialize(label, slot, worker)
        @label = label
        @slot = slot
        @worker = worker
        @pid = worker.pid
        @born_at = Eventually.now
        @stops = []
        @stopped = @killed_at_work = false
      end

      # @return [Boolean] whether it has booted
      def up? = !!File.size?(@worker.marks_file)

      # @return [Boolean] whether something can happen to it that tells something
      def at_work? = up? && !ended? && !@stopped && !term_at && !killed?

      # @return [Boolean] whether it has ended, as far as {#look} has found out
      def ended? = !ended_at.nil?

      # Finds out whether it has ended.
      def look
        return if ended? || @worker.process.running?

        @status = @worker.process.status
        @ended_at = Eventually.now
      end

      def kill
        @killed_at_work = at_work?
        @killed_at ||= Eventually.now
        @worker.process.signal(:KILL)
      end

      def term
        @term_at ||= Eventually.now
        @worker.process.signal(:TERM)
      end

      def quiet
        @worker.process.signal(:TSTP)
      end

      # @param seconds [Float] for how long it is going to stand still
      def stop(seconds)
        @stopped = true
        @stops << [Eventually.now, seconds]
        @worker.process.pause
      end

      def continue
        @stopped = false
        @worker.process.resume
      end

      def killed? = !killed_at.nil?

      # @return [Boolean] whether it stood still at any moment between these
      def stopped_between?(from, to) = @stops.any? { |at, seconds| at < to && at + seconds > from }

      # @return [Float] seconds of the longest time that it stood still
      def longest_stop = @stops.map(&:last).max || 0.0

      # @return [Boolean] whether Sidekiq has raised an error instead of becoming quiet or stopping, and ended without waiting for
      #   anything. It does so when its poller has met a Redis that was away at the wrong moment, long before.
      def failed_stop? = ended? && !killed? && status.exitstatus == 1 && log.lines.last(3).join.include?("safe_thread")

      # @return [String] its log
      def log = @worker.process.output

      # @return [Enumerator<String>] what its jobs have noted
      def notes = File.exist?(@worker.marks_file) ? File.foreach(@worker.marks_file, chomp: true) : [].each

      # @return [Integer] grows with each note
      def noted = File.size?(@worker.marks_file).to_i

      def to_s = "#{label} (slot #{slot}, pid #{pid})"
    end
  end
end
