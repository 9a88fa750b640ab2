# frozen_string_literal: true

# What ends a thread, or wants to, while it waits in a call that needs no engine.
RSpec.describe "an interrupt in a call of Native" do
  native = Sidekiq::ProcessingTracker::Native

  let(:redis) { RedisServer.new }
  let(:patient) { Engines.target(redis, connect_timeout_ms: 60_000, read_timeout_ms: 60_000) }
  let(:fast) { Engines.settings(redis, **Engines.fast) }

  BlockedThread::INTERRUPTS.each do |name, interrupt|
    describe name do
      it "ends read_key" do
        redis.call("SET", "key", "value")
        redis.pause
        interrupt.call(-> { native.read_key(patient, "key", 60_000) })
        redis.resume
        expect(native.read_key(Engines.target(redis), "key", 5_000)).to eq("value")
      end

      it "ends reenqueue_orphans, with Redis stopped" do
        Engines.orphan(redis, "job")
        redis.pause
        interrupt.call(-> { Sidekiq::ProcessingTracker::Orphans.recover(fast.merge(redis: patient)) })
        redis.resume
        # The call that nobody waits for may be the one that does it, the next one does it else.
        Sidekiq::ProcessingTracker::Orphans.recover(fast)
        expect(eventually("the job in its queue") { Queues.queued(redis).first }).to eq("job")
      end

      it "ends reenqueue_orphans, which waits for an instance that never settles" do
        living = Engines.orphan(redis, "job", lease_end: 10**14)
        interrupt.call(-> { Sidekiq::ProcessingTracker::Orphans.recover(fast) })
        expect(Queues.queued(redis)).to be_empty
        redis.call("ZADD", "#{Engines::NAMESPACE}:instances", 1, living)
        expect(Sidekiq::ProcessingTracker::Orphans.recover(fast)).to include("requeued" => 1)
        expect(Queues.queued(redis)).to eq(["job"])
      end
    end
  end
end
