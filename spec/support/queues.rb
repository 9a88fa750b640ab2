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

  # @return [String] the payload of a job that says itself that it is marked
  def marked(job_class, *args, **fields)
    payload(job_class, *args, **fields, processing: true)
  end

  # @return [String] the jid in a payload
  def jid(payload)
    JSON.parse(payload).fetch("jid")
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
      [identity, redis.with { |client| held(client, "#{namespace}:inflight:#{identity}") }]
    end
  end

  # @param client [RedisClient]
  # @param key [String] of an in-flight hash
  # @return [Array<String>] payloads. A large one lies in a list beside the hash, one that has just begun in a hand (docs/protocol.md)
  def held(client, key)
    client.call("EVAL", "#{HELD} return held(KEYS[1])", 1, key)
  end

  # What an in-flight hash and the hands beside it hold, for scripts: they read it in one instant.
  HELD = <<~LUA
    local function held(key)
      local payloads, fields = {}, redis.call('HGETALL', key)
      for i = 1, #fields, 2 do
        local number = string.match(fields[i], '^(%d+%-%d+)%+ ')
        -- A claim that found nothing has a token without a list, for a moment.
        local payload = fields[i + 1]
        if number then payload = redis.call('LINDEX', key .. ':' .. number, 0) end
        if fields[i] ~= 'call' and payload then payloads[#payloads + 1] = payload end
      end
      local hands = string.gsub(key, ':inflight:', ':hands:', 1)
      for _, number in ipairs(redis.call('HKEYS', hands)) do
        local hand = hands .. ':' .. number
        local held = redis.call('TYPE', hand).ok == 'list' and redis.call('LRANGE', hand, 0, -1) or {}
        for _, payload in ipairs(held) do payloads[#payloads + 1] = payload end
      end
      return payloads
    end
  LUA

  # @return [Array<String>] what queues and instances hold, read in one instant: no payload may be in here twice
  def everywhere(redis, queue: "default", namespace: "sidekiq_processing")
    redis.call("EVAL", <<~LUA, 2, "queue:#{queue}", "#{namespace}:instances", namespace)
      #{HELD}
      local payloads = redis.call('LRANGE', KEYS[1], 0, -1)
      for _, identity in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
        for _, payload in ipairs(held(ARGV[1] .. ':inflight:' .. identity)) do payloads[#payloads + 1] = payload end
      end
      return payloads
    LUA
  end

  # @return [Float, nil] when an instance's lease ends, on the lease clock
  def lease_end(redis, identity, namespace: "sidekiq_processing")
    redis.call("ZSCORE", "#{namespace}:instances", identity)
  end

  # @return [Array<Hash>] what was recovered, a job each: "from", "by", "jid", "class", "queue", "outcome",
  #   "reason", "recoveries", "lock", and "at", in ms of the server's clock
  def journal(redis, namespace: "sidekiq_processing")
    redis.call("XRANGE", "#{namespace}:journal", "-", "+").flat_map do |id, fields|
      fields = fields.flatten
      fields.drop(8).each_slice(14).map { |job| Hash["at", id.to_i, *fields.take(4), *job] }
    end
  end

  # @return [Array<String>] the tracker's keys that belong to a single instance
  def keys_of_instances(redis, namespace: "sidekiq_processing")
    redis.call("KEYS", "#{namespace}:in*").sort
  end

  # @return [Array<String>] every instance that may have jobs in flight
  def identities(redis, namespace: "sidekiq_processing")
    redis.call("ZRANGE", "#{namespace}:instances", 0, -1)
  end
end
