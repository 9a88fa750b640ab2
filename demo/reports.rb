# frozen_string_literal: true

# What the jobs of one side have reported so far.
class Reports
  # One report of a job.
  Report = Struct.new(:event, :jid, :pid, :time)

  # @param lines [Array<String>] as {DemoJob} writes them
  def initialize(lines)
    @by_jid = lines.map { |line| read(line) }.group_by(&:jid)
  end

  # @return [Array<String>] those of the jobs that ran to their end
  def finished(jids) = jids.select { |jid| times("finished", jid).any? }

  # @return [Array<String>] those that ran to their end more than once
  def finished_again(jids) = jids.select { |jid| times("finished", jid).size > 1 }

  # @return [Array<String>] those that started more than once
  def started_again(jids) = jids.select { |jid| times("started", jid).size > 1 }

  # @return [Array<Float>] when those that started more than once did so for the second time
  def second_starts(jids) = started_again(jids).map { |jid| times("started", jid)[1] }

  # Jobs whose last report is a start, with its time. Those of a worker that was killed look as if they ran.
  #
  # @param pids [Array<Integer>, nil] of these workers only
  # @return [Hash{String => Float}]
  def running(pids: nil)
    last = @by_jid.transform_values(&:last)
    last.select! { |_jid, report| report.event == "started" && (pids.nil? || pids.include?(report.pid)) }
    last.transform_values(&:time)
  end

  private

  def read(line)
    event, jid, pid, time = line.split
    Report.new(event, jid, Integer(pid), Float(time))
  end

  def times(event, jid)
    @by_jid.fetch(jid, []).filter_map { |report| report.time if report.event == event }
  end
end
