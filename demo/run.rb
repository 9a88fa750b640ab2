# frozen_string_literal: true

# Plays the demo. Started by bin/demo, which does the set-up first; with the gems in place, `bundle exec ruby
# demo/run.rb` does too.

$stdout.sync = true
$LOAD_PATH.unshift(File.expand_path("../lib", __dir__))
ENV["DEMO_TRACKER"] = "yes" # for the class's mark in the jobs: both sides get the same ones

require_relative "app"
require_relative "side"

# Both sides, from the first job to the table.
class Demo
  # Seconds for everything until the kill, and from the kill to the end.
  PATIENCE = 60
  PAUSE = 0.02

  # @return [Boolean] whether it has shown what it claims
  def run
    @began = Eventually.now
    redis = RedisServer.new
    say("redis-server is up, on a socket of its own")
    @sides = [
      @plain = Side.new("plain Sidekiq", tracker: false, redis: redis, db: 0, say: method(:say)),
      @tracked = Side.new("with the tracker", tracker: true, redis: redis, db: 1, say: method(:say))
    ]
    @sides.each(&:start)
    play("the kill") { @sides.all?(&:killed_at) } || raise("no side got half way\n#{@sides.map(&:logs).join("\n")}")
    complete = play("the end") { @sides.all?(&:settled?) }
    say(complete ? "nothing is left to wait for: the workers are stopped" : "not all has ended within #{PATIENCE} s")
    @sides.each(&:stop)
    show_table
    verdict
  end

  private

  def say(text)
    puts format("%5.1f s  %s", Eventually.now - @began, text)
  end

  # @return [Boolean] false when the time was up
  def play(what)
    deadline = Eventually.now + PATIENCE
    until yield
      return false if Eventually.now > deadline

      @sides.each(&:tick)
      sleep PAUSE
    end
    true
  end

  def show_table
    rows = [["", "enqueued", "finished", "lost", "ran twice", "seconds from kill to re-run"]]
    rows += @sides.map { |side|
      [side.name, side.enqueued, side.finished, side.lost, side.ran_twice, seconds(side.seconds_to_rerun)].map(&:to_s)
    }
    widths = rows.transpose.map { |column| column.map(&:size).max }
    puts
    rows.each do |first, *others|
      puts [first.ljust(widths[0]), *others.zip(widths.drop(1)).map { |cell, width| cell.rjust(width) }].join("  ")
    end
  end

  def seconds(values)
    return "never" if values.empty?

    values.minmax.map { |value| format("%.1f", value) }.uniq.join(" to ")
  end

  def verdict
    shown = @plain.lost.positive? && @tracked.cut_off.positive? && @tracked.finished == @tracked.enqueued
    puts
    if shown
      puts "kill -9 cut off #{@plain.cut_off} jobs on the one side and #{@tracked.cut_off} on the other.",
        "Plain Sidekiq has lost #{@plain.lost}: they are in no queue and in no retry, scheduled or dead set.",
        "With the tracker #{@tracked.ran_twice} were run again, so #{@tracked.lost} are lost " \
        "(and #{@tracked.finished_twice} ran to their end twice).",
        "The other worker is on the same host, so it sees with its next heartbeat that the process has ended. Where nobody can see it, " \
        "a process counts as dead after 5 s here without a heartbeat, and its jobs are back within 6 s. By default: 30 and 35."
    else
      puts "This demo did NOT show what it should: nothing lost with the tracker, something lost without."
      puts "The last lines of the workers with the tracker:", @tracked.logs
    end
    shown
  end
end

begin
  shown = Demo.new.run
rescue SignalException => error
  interrupted = error.signo
rescue => error
  puts "", "The demo has failed: #{error.message}"
ensure
  # Nothing may cut the cleaning up short.
  %w[INT TERM HUP].each { |signal| trap(signal, "IGNORE") }
  Scratch.close
end

if interrupted
  puts "", "Interrupted. Everything that the demo had started is gone."
  exit 128 + interrupted
end
exit(shown ? 0 : 1)
