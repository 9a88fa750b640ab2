# frozen_string_literal: true

# redis_options that lead to another database than Sidekiq's, as the README of 1.0 had it.
RSpec.describe "redis_options that lead to another Redis" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def own
    redis.with(db: 2) { |client| yield client }
  end

  def sidekiq(env: {}, **options)
    SidekiqProcess.new(redis, app: "Sidekiq::ProcessingTracker.config.redis_options = #{redis.url(db: 2).inspect}", env: env, **options)
  end

  def push = Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path)))

  it "brings the jobs of a killed worker back into Sidekiq's queues" do
    victim = sidekiq.up
    jids = [push, push]
    victim.runs(*jids)
    expect(victim.log).to match(/fetch: stands aside, since redis_options leads to another Redis than Sidekiq's queues \(unix:\S+ db 0\)/)
    victim.kill
    heir = sidekiq.up.runs(*jids)
    gate.open
    eventually("the end of the jobs") { heir.done.sort == jids.sort }
    expect(heir.stop).to be_success
    expect(redis.call("KEYS", "sidekiq_processing:*").grep_v(/:probe:/)).to be_empty
    rest = %w[clock journal stats].map { |key| "sidekiq_processing:#{key}" }
    left = own { |client| client.call("KEYS", "*") }.grep_v(/:recoveries/)
    expect(left).to match_array(rest)
  end

  it "is not taken for another one when Redis forgets the key by which they are compared, as a failover may" do
    # The password is asked before each login, so between the write and the read.
    places = lambda do |forgotten|
      output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url})
        left = #{forgotten}
        forget = lambda do |*|
          (left -= 1) >= 0 && Sidekiq.redis { |conn| conn.del(*conn.keys("*:probe:*")) }
          "password"
        end
        tracker = Sidekiq::ProcessingTracker
        tracker.config.redis_options = {path: #{redis.socket.inspect}, password: forget}
        p tracker::Settings.places(tracker.config).queues&.server
      RUBY
      output.lines.last
    end
    expect(places.call(2)).to eq("nil\n")
    expect(places.call(3)).to include(redis.socket)
  end

  it "leaves to Sidekiq's fetcher what still runs when its time is up" do
    # Not below 3 s, as in spec/lifecycle/shutdown_spec.rb: an idle thread of stock Sidekiq, which waits for 2 s, pops what was just
    # put back, and loses it.
    worker = sidekiq(timeout: 3).up
    jid = push
    worker.runs(jid)
    expect(worker.stop).to be_success
    expect(Queues.queued(redis).size).to eq(1), worker.log
    expect(own { |client| client.call("ZCARD", "sidekiq_processing:instances") + client.call("EXISTS", "sidekiq_processing:outbox:queues") }).to eq(0)
  end
end
