# frozen_string_literal: true

module Bench
  # Dead instances with their orphans, written as docs/protocol.md has them.
  class Graveyard
    NAMESPACE = "sidekiq_processing"
    QUEUE = "default"

    # @param client [RedisClient]
    # @param orphans [Integer] of each instance
    # @param bytes [Integer] about as many in a payload
    # @param lists [Boolean] whether each payload has a list of its own, as that of a job that was claimed without a script
    def initialize(client, orphans:, bytes: 200, lists: false)
      @client = client
      @orphans = orphans
      @bytes = bytes
      @lists = lists
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
      inflight = "#{NAMESPACE}:inflight:#{identity}"
      fields = (1..@orphans).flat_map { |i| ["1-#{i}#{"+" if @lists} 1700000000000 #{QUEUE}", @lists ? "" : payload] }
      pipeline.call("HSET", inflight, "call", 1, *fields)
      (1..@orphans).each { |i| pipeline.call("RPUSH", "#{inflight}:1-#{i}", payload) } if @lists
      pipeline.call("HSET", "#{NAMESPACE}:info:#{identity}", "hostname", "dead", "pid", number, "track", "marked")
      pipeline.call("ZADD", "#{NAMESPACE}:instances", 1, identity)
    end

    def payload = Queues.payload("NoopJob", "x" * [@bytes - 200, 0].max, processing: true)
  end
end
