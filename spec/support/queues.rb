# frozen_string_literal: true

require "json"
require "securerandom"

# What the specs do with Sidekiq's and the tracker's keys, by plain Redis commands.
module Queues
  module_function

  # @param fields [Hash] further fields of the payload, like "processing" => true
  # @return [String] a payload as a client would push it
  def payload(job_class, *args, **fields)
    JSON.generate({"class" => job_class, "args" => args, "jid" => SecureRandom.hex(12), "queue" => "default",
                   "retry" => true, "created_at" => Time.now.to_f, "enqueued_at" => Time.now.to_f}.merge(fields.transform_keys(&:to_s)))
  end

  # Pushes raw bytes, as they are.
  #
  # @return [String] the payload
  def push(redis, payload, queue: "default")
    redis.call("SADD", "queues", queue)
    redis.call("LPUSH", "queue:#{queue}", payload)
    payload
  end

  # @return [Array<String>] payloads, the next to be fetched first
  def queued(redis, queue: "default")
    redis.call("LRANGE", "queue:#{queue}", 0, -1).reverse
  end

  # @return [Array<Array>] what the jobs have noted: jid, pid, args
  def notes(redis, list)
    redis.call("LRANGE", list, 0, -1).map { |line| JSON.parse(line) }
  end

  # @return [Hash{String => Array<String>}] identity => payloads in flight
  def in_flight(redis, namespace: "sidekiq_processing")
    identities(redis, namespace: namespace).to_h do |identity|
      fields = redis.call("HGETALL", "#{namespace}:inflight:#{identity}")
      [identity, fields.except("call").values]
    end
  end

  # @return [Array<String>] every instance that may have jobs in flight
  def identities(redis, namespace: "sidekiq_processing")
    redis.call("ZRANGE", "#{namespace}:instances", 0, -1)
  end
end
