# frozen_string_literal: true

# A live instance is never robbed: whatever makes it look dead for a while, its jobs stay its own.
RSpec.describe "a worker that lives" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }
  let(:ttl) { AppProcess::TTL }

  def start(count, redis)
    Array.new(count) { SidekiqProcess.new(redis, concurrency: 1) }
  end

  # Gives each worker one job.
  def employ(workers, redis)
    workers.each(&:up)
    jids = workers.map { |_| Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path))) }
    eventually("the start of all jobs") { workers.flat_map(&:started).sort == jids.sort }
    jids
  end

  def lease_ends(workers, redis)
    workers.map { |worker| Queues.lease_end(redis, worker.identity).to_f }
  end

  # Nobody has lost anything, and the jobs run to their end where they are.
  def expect_unharmed(workers, jids, redis)
    before = lease_ends(workers, redis)
    eventually("the next beats") { lease_ends(workers, redis).zip(before).all? { |after, old| after > old } }
    gate.open
    eventually("the end of the jobs") { workers.flat_map(&:done).sort == jids.sort }
    eventually("the acks") { Queues.everywhere(redis).empty? }
    expect(workers.flat_map(&:started)).to match_array(jids)
    expect(Queues.journal(redis)).to be_empty
    expect(workers.map(&:log)).to all(not_include("lost the lease").and(not_include("recovered job")))
    expect(Queues.identities(redis)).to match_array(workers.map(&:identity))
  end

  with_each_fetch do
    it "keeps its jobs while one of them holds the GVL for two leases" do
      app = <<~RUBY
        require "fiddle"

        # Notes how long its one call took, and for how long no other Ruby thread could run meanwhile.
        class HoldingJob
          include Sidekiq::Job

          def perform(seconds)
            sleep_in_c = Fiddle::Function.new(Fiddle::Handle::DEFAULT["usleep"], [Fiddle::TYPE_INT], Fiddle::TYPE_INT, need_gvl: true)
            ticks = [now]
            ticker = Thread.new { loop { sleep(0.01).then { ticks << now } } }
            Thread.pass until ticks.size > 1
            note("holding", Process.pid)
            begun = now
            sleep_in_c.call(Integer(seconds * 1_000_000))
            took = now - begun
            sleep 0.02 until ticks.last > begun + took
            ticker.kill
            note("held", [took, ticks.each_cons(2).map { |a, b| b - a }.max].to_json)
          end

          def now = Process.clock_gettime(Process::CLOCK_MONOTONIC)
        end
      RUBY
      holder = SidekiqProcess.new(redis, app: app).up
      other = SidekiqProcess.new(redis, queues: ["later"]).up
      waiting = Queues.push(redis, Queues.marked("GatedJob", gate.path))
      holder.runs(Queues.jid(waiting))
      Queues.push(redis, Queues.marked("HoldingJob", 2 * ttl))
      eventually("the held GVL") { redis.call("LLEN", "holding") == 1 }
      leases = []
      eventually("the end of it") { leases.push(*lease_ends([holder], redis)) && redis.call("LLEN", "held") == 1 }
      took, gap = JSON.parse(redis.call("LINDEX", "held", 0))
      # Less would be no proof: the call was cut short, or other threads ran.
      expect([took, gap]).to all(be >= 2 * ttl)
      expect(leases.uniq.size).to be > 4
      eventually("the ack") { Queues.everywhere(redis) == [waiting] }
      gate.open
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(Queues.journal(redis)).to be_empty
      expect([holder, other].map(&:log)).to all(not_include("lost the lease").and(not_include("recovered job")))
      expect(holder.started.size).to eq(1)
    end

    # Three servers and their workers side by side, since most of it is waiting.
    it "keeps its jobs while Redis is stopped, shut down or refuses writes for three leases" do
      troubles = {
        "stopped" => [:pause.to_proc, :resume.to_proc],
        "shut down" => [:stop.to_proc, :start.to_proc],
        "refusing writes" => [1, 0].map { |count| ->(server) { server.config_set(min_replicas_to_write: count) } }
      }
      servers = troubles.keys.map { RedisServer.new(appendonly: "yes") }
      fleets = servers.map { |server| start(3, server) }
      jids = fleets.zip(servers).map { |workers, server| employ(workers, server) }
      troubles.values.zip(servers) { |(begins, _), server| begins.call(server) }
      let_pass(3 * ttl)
      troubles.values.zip(servers) { |(_, ends), server| ends.call(server) }

      troubles.keys.zip(servers, fleets, jids) do |trouble, server, workers, own|
        aggregate_failures(trouble) do
          expect_unharmed(workers, own, server)
          workers.each do |worker|
            worker.wait_for_log(/INFO.*can use Redis again after/)
            expect(worker.log.scan(/ERROR.*cannot use Redis/).size).to eq(1)
          end
        end
      end
    end

    it "keeps its jobs, takes new ones and is done with them while Redis is full for three leases", :own_user do
      jids = employ(workers = start(2, redis), redis)
      redis.call("LPUSH", "queue:full", *Array.new(4) { |i| Queues.marked("GatedJob", gate.path, i, queue: "full") })
      redis.config_set(maxmemory: 1)
      expect { redis.call("SET", "a", "b") }.to raise_error(RedisClient::CommandError, /OOM/)
      late = SidekiqProcess.new(redis, queues: ["full"]).up
      let_pass(3 * ttl)
      expect(Queues.in_flight(redis)[late.identity].size).to eq(2)
      gate.open
      eventually("all jobs") { late.done.size == 4 && workers.flat_map(&:done).sort == jids.sort }
      eventually("the acks") { Queues.everywhere(redis).empty? }
      redis.config_set(maxmemory: 0)
      expect_unharmed(workers + [late], jids + late.started, redis)
    end

    it "loses its lease when it was stopped for too long, and works on under a new identity" do
      sleeper = SidekiqProcess.new(redis).up
      ending, running = Gate.new, gate
      payloads = [ending, running].map { |one| Queues.push(redis, Queues.marked("GatedJob", one.path)) }
      jids = payloads.map { |payload| Queues.jid(payload) }
      sleeper.runs(*jids)
      other = SidekiqProcess.new(redis).up
      old = sleeper.identity
      sleeper.pause

      other.runs(*jids)
      expect(Queues.journal(redis).map { |job| job.values_at("from", "by") }).to eq([[old, other.identity]] * 2)
      expect(Queues.journal(redis).map { |job| job["jid"] }).to match_array(jids)
      eventually("the new owner's records") { Queues.in_flight(redis)[other.identity].sort == payloads.sort }

      # One job ends as soon as it can, before the process can know of its loss or just after; one runs on.
      ending.open(sleeper)
      sleeper.resume
      eventually("the late end of a job") { sleeper.done == jids.take(1) }
      sleeper.wait_for_log(/lost the lease of #{old}.*Jobs running here that may run again elsewhere: .*#{jids.last}/)
      renewed = sleeper.log[/lost the lease of #{old}, goes on as (\S+)\. /, 1]
      expect(renewed).to start_with(old[/.*:/]).and(not_include(old))

      # Its late acks take nothing away, and its new jobs are tracked as before.
      running.open(sleeper)
      eventually("the late end of the other job") { sleeper.done == jids }
      last = Gate.new
      again = Queues.push(redis, Queues.marked("GatedJob", last.path))
      sleeper.runs(Queues.jid(again))
      expect(Queues.in_flight(redis).transform_values(&:sort)).to eq(renewed => [again], other.identity => payloads.sort)
      [last, ending, running].each(&:open)
      eventually("the acks") { Queues.everywhere(redis).empty? }
      expect(other.done).to match_array(jids)
      expect(Queues.journal(redis).size).to eq(2)
    end
  end
end
