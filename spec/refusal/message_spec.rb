# frozen_string_literal: true

# Where a key of the tracker holds something else, a person has to be told which.
RSpec.describe "the message about a key that holds something else" do
  let(:redis) { RedisServer.new }
  let(:engine) { Engines.start_engine(redis, **Engines.fast) }

  def ruin(name)
    key = "#{Engines::NAMESPACE}:#{name}"
    redis.call("DEL", key)
    redis.call("SET", key, "something else")
    key
  end

  # What the engine has to tell, up to this kind of event.
  def event(kind)
    eventually("an event of the kind #{kind}", within: 5) do
      event = engine.next_event(200)
      event if event && event["kind"] == kind
    end
  end

  it "names the clock" do
    engine
    key = ruin("clock")
    expect(event("outage")["error"]).to include(key)
  end

  it "names the list of instances" do
    engine
    key = ruin("instances")
    expect(event("outage")["error"]).to include(key)
  end

  it "needs none for the in-flight hash: its lease is lost, and the instance goes on under another identity" do
    before = engine.identity
    ruin("inflight:#{before}")
    expect(event("lease_lost")).to include("identity" => before)
    expect(engine.await(engine.track("default", "job", nil), 5_000)).to be(true)
  end

  it "needs none for the info: it is written anew with the mark of a class" do
    key = ruin("info:#{engine.identity}")
    expect(engine.await(engine.track("default", "job", "Marked"), 5_000)).to be(true)
    expect(redis.call("HGET", key, "marked:Marked")).to eq("1")
  end

  %w[journal stats].each do |name|
    it "names the #{name}, where an orphan is put back that it does not tell of" do
      engine
      key = ruin(name)
      Engines.orphan(redis, JSON.generate("jid" => "j1", "class" => "A"))
      expect(event("warning")["message"]).to include(key)
    end
  end

  it "says nothing of scripts and their lines" do
    engine
    ruin("clock")
    expect(event("outage")["error"]).not_to match(/user_script|\h{40}/)
  end
end
