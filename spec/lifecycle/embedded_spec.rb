# frozen_string_literal: true

# Sidekiq embedded in another program, which may start and stop it as it likes.
RSpec.describe "an embedded Sidekiq" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # A program that does what it is told through the list "orders".
  let(:program) do
    ScriptProcess.new(redis, <<~RUBY)
      sidekiq = Sidekiq.configure_embed do |config|
        config.queues = %w[default]
        config.concurrency = 2
        config[:timeout] = 3
      end
      orders = Sidekiq::RedisConnection.create(size: 1)
      loop do
        _, order = orders.with { |conn| conn.blocking_call(false, "blpop", "orders", 0) }
        order == "start" ? sidekiq.run : sidekiq.stop
        $stdout.write("order done: \#{order}\\n")
      end
    RUBY
  end

  def order(what)
    before = program.log.scan("order done: #{what}").size
    redis.call("RPUSH", "orders", what)
    eventually("#{what} of the embedded Sidekiq", within: 30) { program.log.scan("order done: #{what}").size > before }
  end

  def push
    Queues.push(redis, Queues.marked("GatedJob", gate.path))
  end

  it "tracks again after each start, and leaves nothing after each stop" do
    order("start")
    cut_off = push
    program.runs(Queues.jid(cut_off))
    eventually("the record") { Queues.in_flight(redis) == {program.identity => [cut_off]} }
    order("stop")
    expect(Queues.everywhere(redis)).to eq([cut_off])
    expect(Queues.queued(redis)).to eq([cut_off])
    expect(Queues.keys_of_instances(redis)).to be_empty

    order("start")
    eventually("another lease") { program.identities.uniq.size == 2 }
    payload = push
    program.runs(Queues.jid(payload))
    eventually("the records") { Queues.in_flight(redis)[program.identity].sort == [cut_off, payload].sort }
    gate.open
    order("stop")
    expect(program.done).to contain_exactly(Queues.jid(cut_off), Queues.jid(payload))
    expect(Queues.everywhere(redis)).to be_empty
    expect(Queues.keys_of_instances(redis)).to be_empty
    expect(Queues.journal(redis)).to be_empty
  end

  it "is recovered after kill -9" do
    order("start")
    payload = push
    program.runs(Queues.jid(payload))
    program.kill
    other = SidekiqProcess.new(redis).up.runs(Queues.jid(payload))
    expect(Queues.journal(redis).map { |job| job.values_at("from", "by") }).to eq([[program.identity, other.identity]])
    eventually("the record") { Queues.in_flight(redis) == {other.identity => [payload]} }
  end
end
