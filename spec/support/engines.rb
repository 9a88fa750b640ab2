# frozen_string_literal: true

# Native engines in the process of the specs, and what they need.
module Engines
  NAMESPACE = "native"

  module_function

  # @param redis [RedisServer]
  # @return [Hash{Symbol => Object}] as Native.read_key takes it
  def target(redis, **more)
    {host: ("127.0.0.1" if redis.port), port: redis.port, path: redis.socket, db: 0, username: nil, password: nil,
     connect_timeout_ms: 3_000, read_timeout_ms: 3_000}.merge(LeastUser.credentials, more)
  end

  # The defaults of the gem: with them one stopped reply is no outage for 5 s.
  #
  # @param redis [RedisServer]
  # @return [Hash{Symbol => Object}] as Native::Engine.start takes it
  def settings(redis, **more)
    {namespace: NAMESPACE, instance_id: "spec", interval_ms: 5_000, ttl_ms: 30_000, hold_ms: 300_000,
     redis: target(redis), info: {"pid" => Process.pid.to_s}}.merge(more)
  end

  # A heart that beats fast, for specs in which a lease runs out.
  #
  # @return [Hash{Symbol => Integer}]
  def fast = {interval_ms: 100, ttl_ms: 500}

  # Returns when the engine has registered.
  #
  # @return [Sidekiq::ProcessingTracker::Native::Engine]
  def start_engine(redis, **more)
    engine = Sidekiq::ProcessingTracker::Native::Engine.start(settings(redis, **more))
    Scratch.undo { engine.leave(0) }
    # A busy machine may not connect in time, with the first attempt: an outage.
    loop { return engine if (engine.next_event(10_000) || raise("the engine has not started"))["kind"] == "started" }
  end

  # Returns when Redis has the record.
  #
  # @return [Integer] the handle
  def recorded(engine, payload, queue: "default")
    handle = engine.track(queue, payload, nil)
    raise "no record" unless engine.await(handle, 10_000)

    handle
  end

  # @return [Array<String>] payloads in flight under this engine's identity
  def held(redis, engine)
    redis.call("HGETALL", "#{NAMESPACE}:inflight:#{engine.identity}").except("call").values
  end

  # @return [Array<String>] fields of the in-flight hash of an identity
  def fields(redis, identity)
    redis.call("HKEYS", "#{NAMESPACE}:inflight:#{identity}").sort
  end

  # A dead instance with these jobs: its lease has run out.
  #
  # @return [String] its identity
  def orphan(redis, *payloads, identity: "dead:1:#{SecureRandom.hex(16)}", lease_end: 1, queue: "default")
    start_clock(redis)
    fields = payloads.each_with_index.flat_map { |payload, i| ["1-#{i + 1} 1700000000000 #{queue}", payload] }
    redis.call("HSET", "#{NAMESPACE}:inflight:#{identity}", "call", 1, *fields)
    redis.call("ZADD", "#{NAMESPACE}:instances", lease_end, identity)
    identity
  end

  # A clock that is missing would begin with every lease anew.
  def start_clock(redis)
    return if redis.call("EXISTS", "#{NAMESPACE}:clock") == 1

    time = redis.call("TIME").first.to_i * 1000
    redis.call("HSET", "#{NAMESPACE}:clock", "now", time, "seen", time, "step", 5_000, "ttl", 30_000)
  end
end
