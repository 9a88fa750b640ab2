# frozen_string_literal: true

# Due jobs in native calls: interrupted, in a forked child, and with what they are not made for.
RSpec.describe "due jobs in native calls" do
  let(:redis) { RedisServer.new }

  def schedule(*payloads) = payloads.each_with_index { |payload, i| redis.call("ZADD", "schedule", i, payload) }

  def scheduled = redis.call("ZRANGE", "schedule", 0, -1)

  BlockedThread::INTERRUPTS.each do |name, interrupt|
    it "go back to their set when #{name} ends Engine#claim_due" do
      engine = Engines.start_engine(redis)
      schedule("one", "two")
      engine.claim_due("nothing", "5", nil, [], false)
      redis.pause
      interrupt.call(-> { engine.claim_due("schedule", "5", nil, [], false) })
      redis.resume
      # It waits for the call that goes on without its caller.
      engine.end_due
      expect(scheduled).to eq(%w[one two])
      expect(engine.claim_due("schedule", "5", nil, [], false).last.map(&:last)).to eq(%w[one two])
    end

    it "are pushed once when #{name} ends Engine#settle_due" do
      engine = Engines.start_engine(redis)
      schedule("one", "two")
      _, _, jobs = engine.claim_due("schedule", "5", nil, [], false)
      pushes = jobs.map { |token, payload| [token, "queue", "work", "", payload] }
      redis.pause
      interrupt.call(-> { engine.settle_due(pushes) })
      redis.resume
      engine.settle_due(pushes)
      engine.end_due
      expect([Queues.queued(redis, queue: "work"), scheduled]).to eq([%w[one two], []])
    end
  end

  it "are nothing to a forked child" do
    answers = EngineProcess.new(redis, <<~RUBY).values(within: 40).first
      engine = start_engine
      reader, writer = IO.pipe
      in_child do
        writer.puts JSON.generate([engine.claim_due("schedule", "5", ["queue"], [], true), engine.settle_due([["1-1 1 s", "", "", "", ""]]), engine.end_due])
      end
      puts reader.gets
    RUBY
    expect(answers).to eq([nil, 0, nil])
  end

  it "refuse what is no push" do
    engine = Engines.start_engine(redis)
    [nil, 5, [5], [["token"]], [[1, 2, 3, 4, 5]]].each { |pushes| expect { engine.settle_due(pushes) }.to raise_error(TypeError) }
    expect { engine.claim_due("schedule", "5", [5], [], false) }.to raise_error(TypeError)
    expect { engine.claim_due("schedule", "soon", nil, [], false) }.to raise_error(Sidekiq::ProcessingTracker::Error, /float/)
    expect(engine.settle_due([])).to eq(0)
  end
end
