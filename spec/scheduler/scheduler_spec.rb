# frozen_string_literal: true

# Due jobs in real Sidekiq processes.
RSpec.describe "the scheduler of a Sidekiq process" do
  let(:redis) { RedisServer.new }

  # Sidekiq's first poll comes within 5 s, the others often.
  polls = <<~RUBY
    Sidekiq.configure_server do |config|
      (config.respond_to?(:capsules) ? config : Sidekiq)[:poll_interval_average] = 0.3
    end
  RUBY

  def schedule(payload, set: "schedule", at: Time.now.to_f - 10)
    redis.call("ZADD", set, at.to_s, payload)
    Queues.jid(payload)
  end

  def quick(...) = Queues.payload("QuickJob", ...)

  def done = Queues.notes(redis, "done").map(&:first)

  def taken
    redis.call("KEYS", "sidekiq_processing:due:*").sum { |key| redis.call("HLEN", key) - redis.call("HEXISTS", key, "call") }
  end

  {nil => "of the specs", :unique_jobs_7 => "6.5"}.each do |bundle, version|
    context("with Sidekiq #{version}", bundle: bundle) do
      it "pushes what is due, from both sets, and leaves the rest" do
        jids = Array.new(250) { |i| schedule(quick(i)) } << schedule(quick("retried"), set: "retry")
        later = schedule(quick("later"), at: Time.now.to_f + 3600)
        process = SidekiqProcess.new(redis, app: polls, bundle: bundle).up.wait_for_log(/scheduler: native/)
        eventually("all jobs are done", within: 30) { (jids - done).empty? }
        expect(done).to match_array(jids)
        expect(redis.call("ZRANGE", "schedule", 0, -1).map { |payload| Queues.jid(payload) }).to eq([later])
        expect(process.stop).to be_success
        expect(Queues.keys_of_instances(redis) + redis.call("KEYS", "sidekiq_processing:due:*") + redis.call("KEYS", "sidekiq_processing:host:*")).to be_empty
      end

      it "loses and doubles nothing when it is killed in the middle of a push" do
        blocks = <<~RUBY
          class Blocking
            def call(_job_class, job, _queue, _pool)
              note("passed", job["jid"])
              sleep if job["args"] == ["block"] && ENV["BLOCK"]
              yield
            end
          end
          Sidekiq.configure_server { |config| config.client_middleware { |chain| chain.add(Blocking) } }
        RUBY
        jids = Array.new(11) { |i| schedule(quick((i == 5) ? "block" : i), at: 100 + i) }
        # The lease is long: it is the next process that knows of the death.
        victim = SidekiqProcess.new(redis, app: polls + blocks, bundle: bundle, ttl: 60, queues: ["none"], env: {"BLOCK" => "1"}).up
        eventually("it is in the middle of a push", within: 30) { redis.call("LLEN", "passed") >= 6 }
        expect(taken).to be >= 6
        victim.kill
        expect(redis.call("ZCARD", "schedule") + redis.call("LLEN", "queue:default") + taken).to eq(11)
        SidekiqProcess.new(redis, app: polls + blocks, bundle: bundle, ttl: 60).up.wait_for_log(/put \d+ due jobs of .* back/)
        eventually("all jobs are done", within: 30) { (jids - done).empty? }
        expect(done).to match_array(jids)
        expect([taken, redis.call("ZCARD", "schedule")]).to eq([0, 0])
      end

      it "stands aside for the app's own, and says so" do
        own = <<~RUBY
          class OwnEnq < Sidekiq::Scheduled::Enq
            def enqueue_jobs(*sets)
              note("own", "poll")
              super
            end
          end
          Sidekiq.configure_server { |config| (config.respond_to?(:capsules) ? config : Sidekiq)[:scheduled_enq] = OwnEnq }
        RUBY
        jid = schedule(quick)
        process = SidekiqProcess.new(redis, app: "require 'sidekiq/scheduled'\n" + polls + own, bundle: bundle).up
        eventually("the job is done", within: 30) { done == [jid] }
        expect(process.log.scan(/scheduler: .*$/)).to eq(["scheduler: stands aside, since the app schedules with OwnEnq (scheduled_enq)"])
        expect(redis.call("LLEN", "own")).to be_positive
        expect(redis.call("KEYS", "sidekiq_processing:due:*")).to be_empty
      end
    end
  end

  it "leaves all to Sidekiq where it is told so" do
    jid = schedule(quick)
    process = SidekiqProcess.new(redis, app: polls, env: {"PROCESSING_SCHEDULER" => "sidekiq"}).up
    eventually("the job is done", within: 30) { done == [jid] }
    expect(process.log.scan(/scheduler: .*$/)).to eq(["scheduler: Sidekiq's (as configured)"])
    expect(redis.call("KEYS", "sidekiq_processing:due:*")).to be_empty
  end

  it "leaves due jobs to Sidekiq while Redis refuses the process its lease" do
    redis.call("SET", "sidekiq_processing:instances", "no set")
    first = schedule(quick)
    process = SidekiqProcess.new(redis, app: polls, env: {"PROCESSING_FETCH" => "sidekiq"})
    eventually("the job is done", within: 30) { done == [first] }
    redis.call("DEL", "sidekiq_processing:instances")
    process.up.wait_for_log(/scheduler: native again/)
    second = schedule(quick)
    eventually("both are done", within: 30) { done == [first, second] }
    expect(process.log.scan(/scheduler: ([^.\n]*)/).flatten).to eq(
      ["native", "Sidekiq's own, until this process has a lease (see the lines about Redis)", "native again"]
    )
  end

  # A program may embed several Sidekiqs. They share what the tracker has in a process.
  it "pushes each job once where two Sidekiqs in one process poll", if: Sidekiq.respond_to?(:configure_embed) do
    jids = Array.new(10) { |i| schedule(quick((i == 5) ? "block" : i), at: 100 + i) }
    program = ScriptProcess.new(redis, <<~RUBY)
      require "sidekiq/scheduled"
      class Blocking
        def call(_job_class, job, _queue, _pool)
          note("passed", job["jid"])
          wait_for_key("go") if job["args"] == ["block"]
          yield
        end
      end
      Sidekiq::Scheduled::Poller.prepend(Module.new do
        def enqueue
          super
          note("polled", object_id)
        end
      end)
      sidekiqs = Array.new(2) do
        Sidekiq.configure_embed do |config|
          config.concurrency = 1
          config[:poll_interval_average] = 0.3
          config.client_middleware { |chain| chain.add(Blocking) }
        end
      end
      sidekiqs.each(&:run)
      wait_for_key("end")
      sidekiqs.each(&:stop)
    RUBY
    program.up
    eventually("one is in the middle", within: 30) { redis.call("LLEN", "passed") >= 6 }
    before = redis.call("LLEN", "polled")
    eventually("the other polls", within: 30) { redis.call("LLEN", "polled") >= before + 5 }
    redis.call("SET", "go", 1)
    eventually("all jobs are done", within: 30) { (jids - done).empty? }
    expect([done, redis.call("LRANGE", "passed", 0, -1)]).to match([match_array(jids), match_array(jids)])
    redis.call("SET", "end", 1)
    expect(program.process.wait).to be_success
  end

  it "goes on when Redis was away" do
    SidekiqProcess.new(redis, app: polls, ttl: 60).up.wait_for_log(/scheduler: native/)
    first = schedule(quick)
    eventually("the job is done", within: 30) { done == [first] }
    redis.pause
    sleep 1 # Time that has to pass: polls meet a Redis that does not answer.
    redis.resume
    jids = Array.new(20) { |i| schedule(quick(i)) }
    eventually("all jobs are done", within: 30) { (jids - done).empty? }
    expect(done).to contain_exactly(first, *jids)
  end

  context "with sidekiq-cron and sidekiq-scheduler", bundle: :schedulers do
    it "works beside both" do
      app = <<~RUBY
        require "sidekiq-cron"
        require "sidekiq-scheduler"
        #{polls}
        Sidekiq.configure_server do |config|
          config[:cron_poll_interval] = 1
          Sidekiq.schedule = {"every" => {"every" => "1s", "class" => "QuickJob", "args" => ["scheduler"]}}
          config.on(:startup) { Sidekiq::Cron::Job.create(name: "cron", cron: "* * * * * *", class: "QuickJob", args: ["cron"]) }
        end
      RUBY
      jid = schedule(quick("due"))
      process = SidekiqProcess.new(redis, app: app, bundle: :schedulers).up.wait_for_log(/scheduler: native/)
      kinds = -> { Queues.notes(redis, "done").map(&:last) }
      eventually("a job of each kind", within: 60) { (%w[scheduler cron due] - kinds.call).empty? }
      expect(done.count(jid)).to eq(1)
      expect(process.stop).to be_success
    end
  end

  {unique_jobs_8: "8 on Sidekiq 7.3", unique_jobs_7: "7 on Sidekiq 6.5"}.each do |bundle, version|
    context("with sidekiq-unique-jobs #{version}", bundle: bundle) do
      it "asks for the lock with each push" do
        app = <<~RUBY
          require "sidekiq-unique-jobs"
          #{polls}
          Sidekiq.configure_server do |config|
            config.client_middleware { |chain| chain.add(SidekiqUniqueJobs::Middleware::Client) }
            config.server_middleware { |chain| chain.add(SidekiqUniqueJobs::Middleware::Server) }
            SidekiqUniqueJobs::Server.configure(config)
          end
          class UniqueJob
            include Sidekiq::Job
            sidekiq_options lock: :until_executed
            def perform(*args) = note("done", [jid, Process.pid, *args].to_json)
          end
        RUBY
        # Both want the lock of the same arguments; the first to be pushed gets it, and the queue is nobody's here.
        fields = {lock: "until_executed", lock_args: [1], queue: "nobody"}
        first, second = Array.new(2) { |i| schedule(Queues.payload("UniqueJob", 1, **fields), at: 100 + i) }
        SidekiqProcess.new(redis, app: app, bundle: bundle).up.wait_for_log(/scheduler: native/)
        eventually("both are decided", within: 30) { redis.call("ZCARD", "schedule").zero? && taken.zero? }
        expect(Queues.queued(redis, queue: "nobody").map { |payload| Queues.jid(payload) }).to eq([first])
        expect(second).not_to eq(first)
      end
    end
  end
end
