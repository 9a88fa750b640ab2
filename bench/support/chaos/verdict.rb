# frozen_string_literal: true

require "set"

module Bench
  module Chaos
    # What became of each job, from what the jobs noted and what the tracker journalled; and what should not have happened.
    class Verdict
      # One run of a job, from its beginning to its end if it had one. `outcome`: end, fail, cut.
      Execution = Struct.new(:life, :began_at, :ended_at, :outcome)

      # Keys of the tracker that remain (docs/protocol.md, promise 7). Counters and closed hands must have an end.
      REMAINS = /\A#{Run::NAMESPACE}:(clock|journal|stats|recoveries(:.+)?|hands:[^:]+:\d+:\h+:\d+)\z/
      ENDS = /\A#{Run::NAMESPACE}:(recoveries|hands)/
      # Keys of Sidekiq's and the benchmark's own that say that something is left.
      LEFT_OVER = /\A(queue:.+|retry|schedule)\z/
      # A job that ends so shortly before Sidekiq's time is up may be put back all the same.
      CLOSE = 0.5
      # Sidekiq gives up a retry that it could not write in so many seconds.
      RETRY = 5
      # An ack is late after so many seconds, however loaded the machine is.
      LATE = 2
      # What a process says of itself that it must not.
      ALARMS = /reports no more events|InternalError|panicked|failed to \w+ a job/
      PILL = "Sidekiq::ProcessingTracker::PoisonPill"

      # @return [Array<String>] the jobs that never came to an end
      attr_reader :losses
      # @return [Array<String>] what else should not have happened
      attr_reader :wrongs
      # @return [Hash{Symbol => Integer}]
      attr_reader :figures

      # @param run [Run] one that is over
      # @param recorded [Boolean] whether the tracker kept records
      def initialize(run, recorded:)
        @run = run
        @lives = run.fleet.lives
        @wrongs = []
        @executions = Hash.new { |all, number| all[number] = [] }
        @lives.each { |life| read(life) }
        @journal = recorded ? run.journal : []
        @moved = @journal.group_by { |line| Jobs.number(line.fetch("jid")) }
        @origins = @journal.group_by { |line| origin(line) }
        @lost = find_lost
        @losses = @lost.map { |number| "job #{number} is lost: #{story(number)}" }
        check_run
        check_jobs
        check_lives
        check_records if recorded
        @figures = count
      end

      private

      def read(life)
        open = {}
        life.notes.each do |line|
          what, number, run, at = line.split
          next if what == "up"

          number = Integer(number)
          if what == "begin"
            @executions[number] << (open[run] = Execution.new(life, Float(at)))
          else
            execution = open.delete(run)
            execution.outcome = what
            execution.ended_at = Float(at)
          end
        end
      end

      # Why a job was recovered: its process was killed, stood still for longer than its lease, was ended, or lives on and its thread has
      # dropped it.
      def origin(line)
        life = @run.fleet.of(line.fetch("from"))
        if life.nil? then :unknown
        elsif line["from"] == line["by"] then :dropped
        elsif forfeited(life).include?(line["from"]) then :stopped
        elsif !life.in_flight.to_h.key?(line["from"]) && life.longest_stop > Fleet::TTL / 2 then :stopped
        elsif life.killed? then :killed
        elsif life.ended? then :ended
        else :alive
        end
      end

      # The identities whose leases a process has lost. What such a one had in flight may still wait there, as a suspect, when
      # the process is killed under its next.
      def forfeited(life)
        @forfeited ||= {}
        @forfeited[life] ||= life.log.lines.filter_map { |told| told[/lost the lease of (\S+),/, 1] }
      end

      def find_lost
        poisoned = pills.to_set { |job| Jobs.number(job.fetch("jid")) }
        (1..@run.jobs.count).reject { |number| poisoned.include?(number) || ended(number).any? }
      end

      # @return [Array<Hash>] jobs that were orphaned too often
      def pills = @run.dead.select { |job| job["error_class"] == PILL }

      def count
        numbers = 1..@run.jobs.count
        {
          jobs: @run.jobs.count, lost: @losses.size, wrongs: @wrongs.size, pills: pills.size,
          again: numbers.sum { |number| again(number) }, twice: numbers.sum { |number| [ended(number).size - 1, 0].max },
          orphans_killed: orphans(:killed), orphans_stopped: orphans(:stopped), orphans_ended: orphans(:ended),
          orphans_dropped: orphans(:dropped), put_back: numbers.sum { |number| put_back(number) },
          kills: @lives.count(&:killed_at_work), boot_kills: @lives.count { |life| life.killed? && !life.killed_at_work },
          terms: @lives.count { |life| life.term_at && !life.killed? } - @run.fleet.running_at_end,
          stops: @lives.sum { |life| life.stops.size }, troubles: @run.troubles.size
        }
      end

      def orphans(origin) = @origins.fetch(origin, []).size

      def ended(number) = @executions[number].select { |execution| execution.outcome == "end" }

      # @return [Integer] how often a job began more often than it would have if nothing had happened
      def again(number) = [@executions[number].size - 1 - @run.jobs.failures(number), 0].max

      # @return [Integer] how often a job began for each reason there was to begin it again but a failure
      def reasons(number) = @moved.fetch(number, []).count { |line| line["outcome"] == "requeued" } + put_back(number)

      # @return [Integer] how many runs of a job Sidekiq may have cut off and put back, as its time was up
      def put_back(number)
        @executions[number].count do |execution|
          term_at = execution.life.term_at
          term_at && (execution.ended_at.nil? || execution.outcome == "cut" || execution.ended_at > term_at + Fleet::TIMEOUT - CLOSE)
        end
      end

      def check_run
        wrong("not everything came to an end: #{@run.state}") unless @run.settled
        @run.bad_ends.reject(&:failed_stop?).each { |life| wrong("#{life} did not end well (#{life.status}):\n#{life.log.lines.last(10).join}") }
      end

      def check_jobs
        @executions.each_key do |number|
          failed = @executions[number].count { |execution| execution.outcome == "fail" }
          next if @executions[number].size <= 1 + failed + reasons(number)

          wrong("job #{number} began more often than there was a reason to: #{story(number)}")
        end
        (@executions.keys - (1..@run.jobs.count).to_a).each { |number| wrong("job #{number} was never pushed: #{story(number)}") }
      end

      def check_lives
        @lives.each do |life|
          if life.ended? && !life.killed? && !life.term_at && !refused_boot?(life)
            wrong("#{life} has ended by itself (#{life.status}):\n#{life.log.lines.last(10).join}")
          end
          lost = life.log.lines.grep(/lost the lease/)
          wrong("#{life} was robbed though it lived:\n#{lost.join}") if lost.any? && life.longest_stop < Fleet::TTL / 2
          alarms = life.log.lines.grep(ALARMS)
          wrong("#{life} says:\n#{alarms.first(5).join}") if alarms.any?
        end
      end

      # Sidekiq does not boot while Redis is away.
      def refused_boot?(life)
        life.notes.none? { |line| line.start_with?("begin") } &&
          troubled?(life.born_at, life.ended_at)
      end

      # @return [Boolean] whether something was the matter with Redis at any moment between these
      def troubled?(from, to) = @run.troubles.any? { |begun, over| begun < to && over > from }

      def check_records
        %i[unknown alive].each do |origin|
          @origins.fetch(origin, []).each { |line| wrong("a job was taken from a process that lives: #{line}") }
        end
        check_dropped
        check_left
        check_acks
        check_orphans
        check_totals
        check_keys
      end

      # A thread may drop a job whose retry it could not write, or when Sidekiq ends without waiting for it.
      def check_dropped
        @origins.fetch(:dropped, []).each do |line|
          life = @run.fleet.of(line.fetch("from"))
          next if life.failed_stop?

          number = Jobs.number(line.fetch("jid"))
          excused = runs_in(life, number).any? do |execution|
            execution.outcome == "fail" && troubled?(execution.ended_at, execution.ended_at + RETRY)
          end
          wrong("a thread has dropped job #{number}, nobody knows why: #{story(number)}") unless excused
        end
      end

      # A process that ends well leaves nothing behind, where it can tell Redis.
      def check_left
        @origins.fetch(:ended, []).each do |line|
          life = @run.fleet.of(line.fetch("from"))
          next if life.failed_stop? || troubled?(life.term_at || life.born_at, life.ended_at)

          number = Jobs.number(line.fetch("jid"))
          wrong("#{life} has left job #{number} behind, though Redis was there: #{story(number)}")
        end
      end

      # What has ended is not on record for long. (Of a job that fails, it may be the retry that was on record, not yet begun.)
      def check_acks
        @origins.fetch(:killed, []).each do |line|
          life = @run.fleet.of(line.fetch("from"))
          number = Jobs.number(line.fetch("jid"))
          from = runs_in(life, number).last&.ended_at unless @run.jobs.failures(number).positive?
          next if from.nil? || life.killed_at - from < LATE || troubled?(from, life.killed_at) || life.stopped_between?(from, life.killed_at)

          wrong("job #{number} was not acked though it had ended: #{story(number)}")
        end
      end

      def runs_in(life, number) = @executions[number].select { |execution| execution.life.equal?(life) }

      # All that a process had on record when it was dead has been recovered.
      def check_orphans
        recovered = @journal.group_by { |line| line.fetch("from") }
        @lives.select(&:killed?).flat_map { |life| life.in_flight.to_a }.each do |identity, numbers|
          found = recovered.fetch(identity, []).map { |line| Jobs.number(line.fetch("jid")) }
          missing = numbers.tally.reject { |number, times| found.count(number) >= times }.keys
          wrong("not recovered from #{identity}: jobs #{missing.join(", ")}") if missing.any?
        end
      end

      def check_totals
        journalled = @journal.map { |line| line.fetch("outcome") }.tally
        wrong("the totals are #{@run.totals}, the journal has #{journalled}") if @run.totals != journalled
        (@run.dead - pills).each { |job| wrong("job #{job["jid"]} is in the dead set for #{job["error_class"]}: #{job["error_message"]}") }
      end

      def check_keys
        @run.keys.each do |key, ttl|
          ours = key.start_with?(Run::NAMESPACE)
          wrong("the key #{key} is left") if key.match?(LEFT_OVER) || (ours && !key.match?(REMAINS))
          wrong("the key #{key} would stay for ever") if key.match?(ENDS) && ttl.negative?
        end
      end

      def wrong(text)
        @wrongs << text
      end

      def story(number)
        runs = @executions[number].sort_by(&:began_at).map do |execution|
          life = execution.life
          end_of_life = "killed" if life.killed?
          end_of_life ||= "ended by TERM" if life.term_at
          format("began %.3f in %s, %s%s", execution.began_at, life,
            execution.ended_at ? format("%s %.3f", execution.outcome, execution.ended_at) : "no end",
            end_of_life ? format(" (%s, gone %.3f)", end_of_life, life.ended_at) : "")
        end
        moves = @moved.fetch(number, []).map { |line| "#{line["outcome"]} from #{line["from"][0, 20]} by #{line["by"][0, 20]}" }
        "#{@run.jobs.failures(number)} failures planned; #{(runs + moves).join("; ")}"
      end
    end
  end
end
