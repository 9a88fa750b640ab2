# frozen_string_literal: true

require "json"
require "socket"

# What the middleware of the pure-Ruby 1.0 gem did with each marked job, for comparison: four commands, each with a round
# trip of its own, on connections from Sidekiq's pool. Heartbeats and recovery are left out; they cost next to nothing.
class TrackingInRuby
  NAMESPACE = "sidekiq_processing"
  INSTANCE_ID = Socket.gethostname

  def call(worker, job, _queue)
    return yield unless worker.class.get_sidekiq_options["processing"]

    jid = job["jid"]
    begin
      Sidekiq.redis do |conn|
        conn.set("#{NAMESPACE}:job:#{jid}", job.to_json)
        conn.sadd("#{NAMESPACE}:jobs:#{INSTANCE_ID}", jid)
      end
      yield
    ensure
      Sidekiq.redis do |conn|
        conn.srem("#{NAMESPACE}:jobs:#{INSTANCE_ID}", jid)
        conn.del("#{NAMESPACE}:job:#{jid}")
      end
    end
  end
end

Sidekiq.configure_server do |config|
  config.server_middleware { |chain| chain.prepend(TrackingInRuby) }
end
