# frozen_string_literal: true

# Bytes in, bytes out: whatever this Ruby's JSON can read goes back as it was pushed, and runs as it would have.
# (What no Ruby can read is orphaned by the tests of the core.)
RSpec.describe "payloads after kill -9" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      # Says what it was given. Hexadecimal, since not everything that can be read can be written.
      class EchoJob
        include Sidekiq::Job

        def perform(gate, *args)
          sleep 0.02 until File.exist?(gate)
          note("echo", [jid, args.inspect.unpack1("H*")].to_json)
        end
      end
    RUBY
  end

  let(:arguments) do
    {
      "plain" => '1,"two",null,true',
      "big integers" => "123456789012345678901234567890,-99999999999999999999999999999999999999999",
      "numbers beyond a float" => "1e400,-1e400,1e-400,0.1000000000000000055511151231257827,-0.0,1E+2,10000000000000000.0",
      "escapes" => '"\u0041\/\b\f\n\r\t\"\\\\","\ud83d\ude00","\u0000","\u2028"',
      "a lone surrogate" => '"\ud800"',
      "text beyond ASCII" => '"größe 漢字 😀","e\u0301"',
      "bytes that are no UTF-8" => "\"\xff\xfe\"".b,
      "duplicate keys" => '{"a":1,"a":2}',
      "depth" => "#{"[" * 90}#{"]" * 90}",
      "white space" => " [ 1 ,\t2 ]\n,\r\n{ }  ",
      "1 MB" => "\"#{"x" * (1 << 20)}\"",
      "no arguments" => nil
    }
  end

  let(:payloads) do
    arguments.to_h do |name, json|
      jid = name.tr(" ", "-")
      args = [gate.path.to_json, json].compact.join(",").b
      ["{\"retry\":true , \"queue\":\"default\",\"processing\":true,\"class\":\"EchoJob\",\"args\":[".b +
        args + "],\"jid\":\"#{jid}\",\"created_at\":1700000000.1234567,\"zz\":1.10}".b, jid]
    end
  end

  def readable?(payload)
    JSON.parse(payload)
    true
  rescue JSON::ParserError
    false
  end

  def bytes(payloads)
    payloads.map(&:b)
  end

  with_each_fetch do
    it "go back to their queue byte for byte, and run with the same arguments" do |example|
      read, unread = payloads.partition { |payload, _| readable?(payload) }.map(&:to_h)
      example.reporter.message("  not readable with json #{JSON::VERSION}, so never in perform: #{unread.values.join(", ")}") if unread.any?
      expect(read.values).to include("plain", "big-integers", "numbers-beyond-a-float", "escapes", "depth", "white-space", "1-MB", "no-arguments")

      victim = SidekiqProcess.new(redis, app: app, concurrency: read.size).up
      read.each_key { |payload| Queues.push(redis, payload) }
      eventually("the records") { Queues.in_flight(redis)[victim.identity].size == read.size }
      expect(bytes(Queues.in_flight(redis)[victim.identity])).to match_array(read.keys)
      victim.kill

      SidekiqProcess.new(redis, queues: ["later"]).up
      eventually("the recovery") { Queues.queued(redis).size == read.size }
      expect(bytes(Queues.everywhere(redis))).to match_array(read.keys)

      gate.open
      SidekiqProcess.new(redis, app: app)
      eventually("the second runs") { redis.call("LLEN", "echo") == read.size }
      echo = redis.call("LRANGE", "echo", 0, -1).to_h { |line| JSON.parse(line) }
      expected = read.to_h { |payload, jid| [jid, JSON.parse(payload)["args"].drop(1).inspect.unpack1("H*")] }
      expect(echo).to eq(expected)
      eventually("the acks") { Queues.everywhere(redis).empty? }
    end

    it "that cannot be read go where Sidekiq puts them, and nothing of them stays" do
      worker = SidekiqProcess.new(redis, app: app).up
      broken = ["not json", "{\"class\":\"EchoJob\"", "\xff".b]
      broken.each { |payload| Queues.push(redis, payload) }
      eventually("the dead set") { redis.call("ZCARD", "dead") == broken.size }
      expect(bytes(redis.call("ZRANGE", "dead", 0, -1))).to match_array(bytes(broken))
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(worker).to be_running
    end
  end
end
