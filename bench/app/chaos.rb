# frozen_string_literal: true

# The application of bench/chaos: jobs that note when they begin and how they end.

require_relative "boot"

# Notes each run of a job, around all that Sidekiq does with it: the beginning before the job can have done anything, the end
# before the acknowledgement or the retry can have been sent. So a kill between a note and what follows it shows
# as one run too many and never as one too few.
class ChaosNotes
  def call(instance, job, _queue)
    number = job["args"].first
    instance.attempt = job["retry_count"] ? job["retry_count"] + 1 : 0
    # A job may run twice at once in one process: that lost its lease with the first run and has claimed it again.
    run = instance.object_id
    Marks.note("begin #{number} #{run} #{Marks.clock}")
    outcome = "cut"
    result = yield
    outcome = "end"
    result
  rescue ChaosJob::Failure
    outcome = "fail"
    raise
  ensure
    Marks.note("#{outcome} #{number} #{run} #{Marks.clock}")
  end
end

# Sleeps, fails as often as it is told, then succeeds.
class ChaosJob
  include Sidekiq::Job

  # So that the log tells it from a real error.
  Failure = Class.new(StandardError)

  sidekiq_options MARKED
  sidekiq_retry_in { 1 }

  # @return [Integer] how often it has failed before
  attr_accessor :attempt

  # @param number [Integer] of the job
  # @param seconds [Numeric]
  # @param failures [Integer] how many there are before it succeeds
  # @param _filler [String] what makes the payload large
  def perform(_number, seconds = 0, failures = 0, _filler = nil)
    sleep seconds if seconds.positive?
    raise Failure, "as it was told" if attempt < failures
  end
end

# Moves due retries to their queues, each in one script. Sidekiq's own takes a job out with one command and pushes it with the next:
# a process that is killed in between loses the job, whoever fetches. That loss is Sidekiq's and would hide
# what is looked for here.
class WholeMoves
  SCRIPT = <<~LUA
    local due = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, 100)
    for _, payload in ipairs(due) do
      local queue = cjson.decode(payload).queue
      redis.call('SADD', 'queues', queue)
      redis.call('LPUSH', 'queue:' .. queue, payload)
      redis.call('ZREM', KEYS[1], payload)
    end
    return #due
  LUA

  # Sidekiq spreads retries over up to twenty seconds. Nobody wants to wait for that at the end.
  AHEAD = 16

  def initialize(_config)
  end

  def enqueue_jobs
    Sidekiq.redis { |conn| conn.call("EVAL", SCRIPT, 1, "retry", (Time.now.to_f + AHEAD).to_s) }
  end

  def terminate
  end
end

Sidekiq.configure_server do |config|
  config.server_middleware { |chain| chain.add ChaosNotes }
  config[:scheduled_enq] = WholeMoves unless ENV["CHAOS_POLLER"] == "sidekiq"
  # Seconds.
  config[:poll_interval_average] = 0.5
  config.on(:startup) { Marks.note("up") }
end
