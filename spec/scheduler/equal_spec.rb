# frozen_string_literal: true

# What the tracker's scheduler pushes is what Sidekiq's own would have pushed.
RSpec.describe "the scheduler beside Sidekiq's own" do
  let(:redis) { RedisServer.new }

  def job(jid, **fields)
    {"retry" => true, "queue" => "default", "class" => "QuickJob", "args" => [1, "zwei", 3.0, nil, {"a" => [1e20, "ü"]}], "jid" => jid,
     "created_at" => 1_732_570_000.25}.merge(fields.transform_keys(&:to_s))
  end

  # Jobs as Sidekiq schedules and retries them, and as others might.
  def ordinary
    [
      job("plain"), job("tags", tags: %w[a b]), job("retried", error_class: "X", error_message: "y\u2028", failed_at: 1.5, retry_count: 2),
      job("again", enqueued_at: 17.5), job("wrapped", wrapped: "AnyJob"), job("low", queue: "low"), job("no-retry", retry: 3, retry_for: 60)
    ]
  end

  def entries
    odd = [
      job("no-queue").except("queue"), job("no-created").except("created_at"), job("at", at: 4_000_000_000.5), job("x").except("jid"),
      job("no-retry-field").except("retry"), job("null-queue", queue: nil), job("float", retry_for: 60.7),
      job("transient", client_class: "X")
    ]
    texts = (ordinary + odd).map { |entry| JSON.generate(entry) }
    texts << %({ "class":"QuickJob" , "args":[1e2, "\\u00fc\\/"],"jid":"spaces","queue":"default","retry":true,"created_at":1 } )
    texts.each_with_index.map { |text, i| [100 + i, text] }
  end

  # All but what differs from run to run.
  def comparable(outcome)
    queues = outcome.fetch("queues").transform_values { |jobs| jobs.map { |text| plain(text) } }
    [queues, outcome.fetch("schedule").map { |text| plain(text) }]
  end

  def plain(text)
    job = JSON.parse(text)
    %w[enqueued_at created_at].each { |field| job[field] = [job[field].class, job[field].to_f.round(-13)] if job.key?(field) }
    job["jid"] = "drawn" if job["jid"].to_s.size == 24
    job
  end

  middleware = lambda do |body|
    <<~RUBY
      class SpecMiddleware
        def call(job_class, job, queue, redis_pool)
          #{body}
        end
      end
      hook = ->(config) { config.client_middleware { |chain| chain.add(SpecMiddleware) } }
      Sidekiq.configure_client(&hook)
    RUBY
  end

  cases = {
    "without client middleware" => "",
    # What Sidekiq.transactional_push! does, which needs ActiveRecord.
    "with a client of its own among the default options" => <<~RUBY,
      require "sidekiq/client"
      Sidekiq.default_job_options["client_class"] = Sidekiq::Client
      Sidekiq::JobUtil::TRANSIENT_ATTRIBUTES << "client_class"
    RUBY
    "with middleware that adds to jobs" => middleware.call('job["seen"] = [job_class.to_s, queue]; yield'),
    "with middleware that refuses jobs" => middleware.call('yield unless job["jid"] =~ /plain|low/'),
    "with middleware that sends jobs elsewhere" => middleware.call('job["queue"] = "high" if job["jid"] == "plain"; yield'),
    "with middleware that puts jobs off" => middleware.call('job["at"] = 4_000_000_000.0 if job["jid"] == "tags"; yield')
  }

  {nil => "of the specs", :unique_jobs_7 => "6.5"}.each do |bundle, version|
    context("with Sidekiq #{version}", bundle: bundle) do
      cases.each do |name, app|
        it "pushes the same #{name}" do
          result = SchedulerScript.run(redis, entries, app: app, bundle: bundle)
          stock, ours = result.values_at("stock", "ours")
          queues, scheduled = comparable(ours)
          # Sidekiq's own loses what its client refuses to push.
          refused, kept = scheduled.partition { |left| left["jid"] == "null-queue" }
          expect(refused.size).to eq(1)
          expect([queues, kept]).to eq(comparable(stock))
        end
      end

      cases.first(2).each do |name, app|
        it "does so without Ruby #{name}" do
          given = ordinary.each_with_index.map { |entry, i| [100 + i, JSON.generate(entry)] } << [200, JSON.generate(job("no-queue").except("queue"))]
          polls = SchedulerScript.run(redis, given, app: app, stock: false, bundle: bundle).fetch("ours").fetch("polls")
          expect(polls.map { |poll| poll.fetch("passed") }).to eq([["no-queue"]])
        end
      end

      it "keeps what cannot be pushed, and lets nothing wait for it" do
        bad = ["not json", "null", "[1]", "{}", JSON.generate(job("bad", args: "none")), JSON.generate(job("raises"))]
        given = (bad + [JSON.generate(job("good"))]).each_with_index.map { |text, i| [100 + i, text] }
        app = middleware.call('raise "no" if job["jid"] == "raises"; yield')
        ours = SchedulerScript.run(redis, given, app: app, stock: false, bundle: bundle).fetch("ours")
        expect(ours.fetch("schedule")).to eq(bad)
        expect(ours.fetch("queues").fetch("default").map { |text| Queues.jid(text) }).to eq(["good"])
      end

      it "tells no arguments of what cannot be pushed" do
        bad = ["no json \"secret\"", JSON.generate("args" => ["secret"]), JSON.generate(job("hash", args: {"secret" => 1})),
          JSON.generate(job("symbol", args: []))]
        app = middleware.call('job["args"] = [:secret] if job["jid"] == "symbol"; yield') + "Sidekiq.strict_args!\n"
        messages = [bad.first(2), bad.last(2)].flat_map do |payloads|
          given = payloads.each_with_index.map { |text, i| [100 + i, text] }
          SchedulerScript.run(redis, given, app: app, stock: false, bundle: bundle).dig("ours", "polls", 0, "told").map { |told| told[1].lines.first.chomp }
        end
        expect(messages).to eq([
          "its payload is no JSON that can be read (JSON::ParserError)", "Job must be a Hash with 'class' and 'args' keys",
          "Job args must be an Array", "Job arguments to QuickJob must be native JSON types"
        ])
      end

      # A middleware whose database is away, say.
      it "tells Sidekiq's error handlers of few where all fail, and ends the poll" do
        given = Array.new(250) { |i| [100 + i, JSON.generate(job("bad-#{i}"))] }
        run = SchedulerScript.start(redis, given, app: middleware.call('raise IOError, "no database"'), polls: 3, stock: false, bundle: bundle)
        ours = JSON.parse(run.log.lines.last).fetch("ours")
        told = ["IOError", "no database", "ProcessingTracker could not push a due job; it stays scheduled"]
        expect(ours.fetch("polls").map { |poll| poll.fetch("told") }).to eq([[told] * 3] * 3)
        expect(ours.fetch("polls").map { |poll| poll.fetch("passed").size }).to eq([10, 20, 40])
        expect(ours.fetch("schedule")).to eq(given.map(&:last))
      end

      it "comes to what is due behind many that cannot be pushed" do
        given = Array.new(25) { |i| [100 + i, JSON.generate(job("bad-#{i}"))] } << [200, JSON.generate(job("good"))]
        app = middleware.call('raise IOError, "no" if job["jid"].start_with?("bad"); yield')
        ours = SchedulerScript.run(redis, given, app: app, polls: 3, stock: false, bundle: bundle).fetch("ours")
        expect(ours.fetch("polls").map { |poll| poll.fetch("passed").size }).to eq([10, 20, 26])
        expect(ours.fetch("queues").fetch("default").map { |text| Queues.jid(text) }).to eq(["good"])
        expect(ours.fetch("schedule").size).to eq(25)
      end
    end
  end
end
