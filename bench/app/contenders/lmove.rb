# frozen_string_literal: true

require "securerandom"
require "socket"

# A reliable fetch in Ruby, as the better known ones are made, with Redis's own commands: LMOVE takes a job into a list
# of this process, LREM removes it when it is done. Without what recovery needs (heartbeats, a look for dead processes):
# it costs next to nothing.
class LmoveFetch
  include Sidekiq::Component

  TIMEOUT = 2
  # Seconds between two looks at several empty queues: Redis can block on one list only.
  PAUSE = 1
  IDENTITY = "#{Socket.gethostname}:#{Process.pid}:#{SecureRandom.hex(6)}"

  UnitOfWork = Struct.new(:queue, :job, :config) do
    def queue_name
      queue.delete_prefix("queue:")
    end

    def acknowledge
      config.redis { |conn| conn.call("LREM", working, 1, job) }
    end

    def requeue
      config.redis do |conn|
        conn.multi do |transaction|
          transaction.call("RPUSH", queue, job)
          transaction.call("LREM", working, 1, job)
        end
      end
    end

    def working
      LmoveFetch.working(queue)
    end
  end

  class << self
    def working(queue)
      "bench:working:#{queue}:#{IDENTITY}"
    end
  end

  def initialize(capsule)
    @config = capsule
    @strict = capsule.mode == :strict
    @queues = capsule.queues.map { |queue| "queue:#{queue}" }
    @queues.uniq! if @strict
  end

  def retrieve_work
    queues = @strict ? @queues : @queues.shuffle.uniq
    return wait_on(queues.first) if queues.one?

    queues.each do |queue|
      job = redis { |conn| conn.call("LMOVE", queue, self.class.working(queue), "RIGHT", "LEFT") }
      return UnitOfWork.new(queue, job, @config) if job
    end
    sleep PAUSE
    nil
  end

  def bulk_requeue(units)
    units.each(&:requeue)
  end

  private

  def wait_on(queue)
    job = redis { |conn| conn.blocking_call(TIMEOUT, "BLMOVE", queue, self.class.working(queue), "RIGHT", "LEFT", TIMEOUT) }
    job && UnitOfWork.new(queue, job, @config)
  end
end

Sidekiq.configure_server { |config| config[:fetch_class] = LmoveFetch }
