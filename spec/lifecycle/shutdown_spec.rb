# frozen_string_literal: true

# TERM and TSTP. Timeouts are 3 s at least: below that an idle thread of stock Sidekiq may pop what was just put back,
# and lose it.
RSpec.describe "a worker that is told to end" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  def push(*args, **fields)
    Queues.push(redis, Queues.marked("GatedJob", gate.path, *args, **fields))
  end

  def expect_gone(worker)
    expect(Queues.keys_of_instances(redis)).to be_empty
    expect(Queues.journal(redis)).to be_empty
    expect(worker.log).not_to match(/could not leave|were left in|lost the lease/)
  end

  with_each_fetch do
    it "puts jobs that take too long back into their queues, each once, and is gone" do
      worker = SidekiqProcess.new(redis, concurrency: 4, timeout: 3).up
      tracked = Array.new(2) { |i| push(i) }
      plain = Queues.push(redis, Queues.payload("PlainJob"))
      worker.runs(*tracked.map { |payload| Queues.jid(payload) })
      eventually("the plain job") { Queues.notes(redis, "started").size == 1 }
      expect(worker.stop).to be_success

      expect(Queues.queued(redis)).to contain_exactly(*tracked, plain)
      expect_gone(worker)
      # Sidekiq's own fetch puts back what the tracker has not recorded.
      expect(worker.log).to include("ProcessingTracker put #{(fetch == :native) ? 3 : 2} jobs back into their queues")
      expect(redis.call("ZCARD", "retry")).to eq(0)

      gate.open
      redis.call("SET", "go", 1)
      other = SidekiqProcess.new(redis).up
      eventually("the jobs") { other.done.size == 2 && Queues.notes(redis, "done").size == 1 }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(other.started.size).to eq(2)
    end

    it "keeps its jobs through the drain, longer than a lease, and is gone when they are done" do
      worker = SidekiqProcess.new(redis, timeout: 20).up
      other = SidekiqProcess.new(redis, queues: ["later"]).up
      payloads = Array.new(2) { |i| push(i) }
      worker.runs(*payloads.map { |payload| Queues.jid(payload) })
      worker.signal(:TERM).wait_for_log(/Pausing to allow jobs to finish/)
      let_pass(AppProcess::TTL + 2 * AppProcess::STEP)
      expect(Queues.in_flight(redis)[worker.identity]).to match_array(payloads)
      gate.open
      expect(worker.process.wait).to be_success
      expect(worker.done.size).to eq(2)
      expect(Queues.everywhere(redis)).to be_empty
      expect(Queues.identities(redis)).to eq([other.identity])
      expect(Queues.journal(redis)).to be_empty
      expect(other.log).not_to include("recovered job")
    end

    it "keeps its jobs after TSTP, takes no new ones, and is gone after TERM" do
      worker = SidekiqProcess.new(redis, timeout: 3).up
      other = SidekiqProcess.new(redis, queues: ["later"]).up
      ending, staying = Gate.new, gate
      payloads = [ending, staying].map { |one| Queues.push(redis, Queues.marked("GatedJob", one.path)) }
      worker.runs(*payloads.map { |payload| Queues.jid(payload) })
      worker.signal(:TSTP).wait_for_log(/no longer accepting new work/)
      let_pass(AppProcess::TTL + 2 * AppProcess::STEP)
      ending.open
      eventually("the ack") { Queues.everywhere(redis) == payloads.drop(1) }
      late = push("late")
      expect(worker.stop).to be_success
      expect(Queues.queued(redis)).to contain_exactly(late, payloads.last)
      expect(Queues.identities(redis)).to eq([other.identity])
      expect(Queues.journal(redis)).to be_empty
    end

    it "leaves when it is idle, and no thread of it has to be killed" do
      # Shorter than the time that a thread waits for a job.
      worker = SidekiqProcess.new(redis, timeout: 3).up
      expect(worker.stop).to be_success
      expect(worker.log).not_to match(/Terminating \d+ busy/)
      expect_gone(worker)
    end

    it "ends all the same when Redis does not answer, and its job comes back once" do
      worker = SidekiqProcess.new(redis, timeout: 3, concurrency: 1).up
      payload = push
      worker.runs(Queues.jid(payload))
      eventually("the record") { Queues.everywhere(redis) == [payload] }
      redis.pause
      begun = now
      worker.signal(:TERM).process.wait
      # The timeout, Sidekiq's own clean-up, and the seconds that the tracker allows itself.
      expect(now - begun).to be < 20
      # What the worker still sent arrives only now, when it is long gone.
      redis.resume
      other = SidekiqProcess.new(redis).up.runs(Queues.jid(payload))
      expect(Queues.everywhere(redis)).to eq([payload])
      gate.open
      eventually("the ack") { other.done == [Queues.jid(payload)] && Queues.everywhere(redis).empty? }
      eventually("the end of the dead one") { Queues.identities(redis) == [other.identity] }
      expect(other.started.size).to eq(1)
    end

    it "says what stays on record when Redis does not answer in time, and not that it was put back" do
      worker = SidekiqProcess.new(redis, timeout: 3, concurrency: 1).up
      payload = push
      worker.runs(Queues.jid(payload))
      eventually("the record") { Queues.everywhere(redis) == [payload] }
      # Before that line Sidekiq needs Redis to end its poller.
      worker.signal(:TERM).wait_for_log(/Pausing to allow jobs to finish/)
      redis.pause
      worker.process.wait
      redis.resume
      expect(worker.log).to include("ProcessingTracker 1 jobs stay recorded: they come back when the lease has run out")
        .and(not_include("jobs back into their queues"))
      other = SidekiqProcess.new(redis).up.runs(Queues.jid(payload))
      expect(Queues.everywhere(redis)).to eq([payload])
      gate.open
      eventually("the ack") { other.done == [Queues.jid(payload)] && Queues.everywhere(redis).empty? }
    end
  end
end
