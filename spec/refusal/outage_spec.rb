# frozen_string_literal: true

require "fileutils"

# A Redis that refuses the tracker while it runs. Sidekiq goes on working, the log says once why nothing is tracked, and
# the tracker is back by itself when the cause is mended.
RSpec.describe "a Redis that begins to refuse", :own_user do
  let(:redis) { RedisServer.new }
  let(:sidekiq) { SidekiqProcess.new(redis, app: <<~RUBY, concurrency: 3) }
    Sidekiq::ProcessingTracker.configure do |config|
      config.redis_options = {path: #{redis.socket.inspect}, username: "tracker", password: "s3cret"}
    end
  RUBY
  let(:gate) { Gate.new }
  let(:key) { ->(name) { "sidekiq_processing:#{name}" } }

  before do
    redis.call("ACL", "SETUSER", "tracker", "on", ">s3cret", "~*", "&*", "+@all")
    sidekiq.up
  end

  def push(class_name = "GatedJob", path = gate.path)
    JSON.parse(Queues.push(redis, Queues.payload(class_name, path, "s3cret argument", processing: true)))["jid"]
  end

  def held
    Queues.in_flight(redis).values.flatten.map { |payload| JSON.parse(payload)["jid"] }
  end

  # How often Redis has answered with this error.
  def refusals(code)
    redis.call("INFO", "errorstats")[/errorstat_#{code}:count=(\d+)/, 1].to_i
  end

  def outages = sidekiq.log.scan(/^.*ERROR.*ProcessingTracker (.*)$/).flatten

  def ends = sidekiq.log.scan(/INFO.*ProcessingTracker can use Redis again/).size

  # One outage, from its beginning to its end.
  #
  # @param message [Regexp] what the log says of it
  # @param code [String] what Redis answers meanwhile
  # @param ruins [Proc]
  # @param mends [Proc]
  # @yield what is to be seen while it lasts
  def outage(message, code, ruins:, mends:)
    told, over = outages.size, ends
    ruins.call
    eventually("a line about it") { outages.size > told }
    before = refusals(code)
    yield
    eventually("more refusals") { refusals(code) >= before + 5 }
    mends.call
    eventually("the line about its end") { ends > over }
    expect(outages.drop(told)).to match([message])
    expect(ends).to eq(over + 1)
    expect(sidekiq.log).not_to include("s3cret")
  end

  # A job begins and one ends, though nothing can be recorded.
  def works_on
    early = push("QuickJob")
    late = push
    sidekiq.runs(late)
    eventually("the quick job") { Queues.notes(redis, "done").any? { |jid, _| jid == early } }
    late
  end

  # Ends all jobs. Each has run once, and nothing is left.
  def expect_good_end(*jids)
    gate.open
    eventually("the ends of the jobs") { (jids - sidekiq.done).empty? && held.empty? }
    expect(sidekiq.started.tally.values.uniq).to eq([1])
    expect(sidekiq.stop).to be_success
    expect([Queues.queued(redis), Queues.identities(redis), redis.call("ZCARD", "retry")]).to eq([[], [], 0])
  end

  def tracked_job
    jid = push
    eventually("the record") { held == [jid] }
    sidekiq.runs(jid)
    jid
  end

  with_fetch(:sidekiq) do
    it "the tracker's password, then its rights" do
      first = tracked_job
      jobs = []
      outage(/Redis refused the username or password/, "WRONGPASS",
        ruins: -> { redis.call("ACL", "SETUSER", "tracker", "resetpass", ">n3w") && redis.call("CLIENT", "KILL", "USER", "tracker") },
        mends: -> { redis.call("ACL", "SETUSER", "tracker", "resetpass", ">s3cret") }) { jobs << works_on }
      eventually("the record of what began meanwhile") { held.sort == [first, *jobs].sort }
      outage(/NOPERM/, "NOPERM",
        ruins: -> { redis.call("ACL", "SETUSER", "tracker", "-@all") },
        mends: -> { redis.call("ACL", "SETUSER", "tracker", "+@all") }) { jobs << works_on }
      eventually("the record of what began meanwhile") { held.sort == [first, *jobs].sort }
      expect_good_end(first, *jobs)
    end
  end

  with_fetch(:native) do
    it "the tracker's rights: nothing but what it waits for already is taken until it has them again, and what runs goes on" do
      first = tracked_job
      waiting = nil
      outage(/NOPERM/, "NOPERM",
        ruins: -> { redis.call("ACL", "SETUSER", "tracker", "-@all") },
        mends: -> { redis.call("ACL", "SETUSER", "tracker", "+@all") }) do
        waiting = Array.new(10) { push }
        gate.open
        eventually("the end of the job") { sidekiq.done.include?(first) }
        # A Redis older than 7.2 does not ask again for the rights of a claim that waits. There may be two.
        expect(sidekiq.started.size).to be <= 3
      end
      sidekiq.runs(*waiting)
      expect_good_end(first, *waiting)
    end
  end

  with_each_fetch do
    it "every write, since it is a replica now" do
      first = tracked_job
      outage(/this server (is|has become) a replica/, "READONLY",
        ruins: -> { redis.call("REPLICAOF", "127.0.0.1", 1) }, mends: -> { redis.call("REPLICAOF", "NO", "ONE") }) do
        # Sidekiq cannot fetch either. What runs, runs on.
        gate.open
        eventually("the end of the job") { sidekiq.done == [first] }
      end
      expect_good_end(first)
    end

    it "every write, since it cannot save" do
      folder = redis.call("CONFIG", "GET", "dir").fetch("dir")
      FileUtils.mkdir(File.join(folder, "dump.rdb"))
      first = tracked_job
      outage(/MISCONF/, "MISCONF",
        ruins: lambda {
          redis.call("BGSAVE")
          eventually("a save that fails") { redis.call("INFO", "persistence").include?("rdb_last_bgsave_status:err") }
          redis.config_set(save: "3600 1")
        },
        mends: -> { redis.config_set(save: "") }) do
        gate.open
        eventually("the end of the job") { sidekiq.done == [first] }
      end
      expect_good_end(first)
    end

    it "to take more memory: the tracker does not need more" do
      other = Gate.new
      first = tracked_job
      fillers = Array.new(2) { push("GatedJob", other.path) }
      sidekiq.runs(*fillers)
      waiting = push
      eventually("three records") { held.sort == [first, *fillers].sort }
      redis.config_set(maxmemory: 1, "maxmemory-policy": "noeviction")
      expect { redis.call("SET", "key", "value") }.to raise_error(/OOM/)
      other.open
      sidekiq.runs(waiting)
      eventually("acks and a record") { held.sort == [first, waiting].sort }
      gate.open
      eventually("acks") { held.empty? && sidekiq.done.size == 4 }
      lease_end = redis.call("ZSCORE", key["instances"], sidekiq.identity)
      eventually("beats") { redis.call("ZSCORE", key["instances"], sidekiq.identity) > lease_end }
      expect(outages).to be_empty
      redis.config_set(maxmemory: 0)
      expect_good_end(first, waiting, *fillers)
    end

    it "since the keys of the tracker hold something else: the clock, the list of instances" do
      first = tracked_job
      jobs = %w[clock instances].map do |name|
        job = nil
        outage(/#{key[name]} holds a string/, "WRONGTYPE",
          ruins: -> { redis.call("DEL", key[name]) && redis.call("SET", key[name], "something else") },
          mends: -> { redis.call("DEL", key[name]) }) { job = works_on }
        job
      end
      eventually("all records") { held.sort == [first, *jobs].sort }
      eventually("the instance is listed again") { Queues.identities(redis) == [sidekiq.identity] }
      expect_good_end(first, *jobs)
    end

    it "since its in-flight hash holds something else" do
      first = tracked_job
      before = sidekiq.identity
      name = key["inflight:#{before}"]
      # In a hand it would go back to its queue, and be run again.
      eventually("its token") { redis.call("HLEN", name) > 1 }
      redis.call("DEL", name)
      redis.call("SET", name, "something else")
      sidekiq.wait_for_log(/WARN.*lost the lease of #{before}, goes on as \S+\. .*#{first}/)
      sidekiq.wait_for_log(/WARN.*#{name} of the dead instance .* holds something that is no hash/)
      redis.call("DEL", name)
      job = works_on
      eventually("the record of what began afterwards") { held == [job] }
      eventually("the end of the identity before") { !Queues.identities(redis).include?(before) }
      expect_good_end(first, job)
    end

    it "since its info holds something else: the lease is renewed all the same, and the log says so no more than once" do
      first = tracked_job
      name = key["info:#{sidekiq.identity}"]
      redis.call("DEL", name)
      redis.call("SET", name, "something else")
      before = refusals("WRONGTYPE")
      eventually("two stamps that were refused", within: 20) { refusals("WRONGTYPE") >= before + 2 }
      expect(works_on).to be_a(String)
      expect(outages.size).to be <= 1
      redis.call("DEL", name)
      expect_good_end(first)
    end

    it "since the journal and the totals hold something else: orphans come back all the same" do
      %w[journal stats].each { |name| redis.call("SET", key[name], "something else") }
      redis.call("HSET", key["inflight:dead:1:aa"], "call", 1, "1-1 1700000000000 default", Queues.payload("QuickJob", "s3cret"))
      redis.call("ZADD", key["instances"], 1, "dead:1:aa")
      eventually("the orphan") { redis.call("LLEN", "done") == 1 }
      sidekiq.wait_for_log(/recovered job: .*from=dead:1:aa outcome=requeued/)
      expect([outages, sidekiq.log.include?("s3cret")]).to eq([[], false])
    end
  end
end
