# frozen_string_literal: true

module Bench
  # Dead instances with their orphans, written as docs/protocol.md has them.
  class Graveyard
    NAMESPACE = "sidekiq_processing"
    QUEUE = "default"

    # @param client [RedisClient]
    # @param orphans [Integer] of each instance
    # @param bytes [Integer] about as many in a payload
    def initialize(client, orphans:, bytes: 200)
      @client = client
      @orphans = orphans
      @bytes = bytes
    end

    # The lease clock, as it is after some time.
    def start_clock
      now = @client.call("TIME").first.to_i * 1000
      @client.call("HSET", "#{NAMESPACE}:clock", "now", now, "seen", now, "step", 5_000, "ttl", 30_000)
    end

    # @param instances [Integer]
    # @return [Integer] how many orphans
    def bury(instances)
      instances.times.each_slice(50) do |part|
        @client.pipelined { |pipeline| part.each { |number| bury_one(pipeline, number) } }
      end
      instances * @orphans
    end

    # @return [Integer] orphans that are back in their queue
    def requeued = @client.call("LLEN", "queue:#{QUEUE}")

    private

    def bury_one(pipeline, number)
      identity = "dead:#{number}:#{SecureRandom.hex(16)}"
      fields = (1..@orphans).flat_map { |i| ["1-#{i} 1700000000000 #{QUEUE}", payload] }
      pipeline.call("HSET", "#{NAMESPACE}:inflight:#{identity}", "call", 1, *fields)
      pipeline.call("HSET", "#{NAMESPACE}:info:#{identity}", "hostname", "dead", "pid", number, "track", "marked")
      pipeline.call("ZADD", "#{NAMESPACE}:instances", 1, identity)
    end

    def payload = Queues.payload("NoopJob", "x" * [@bytes - 200, 0].max, processing: true)
  end
end
