# frozen_string_literal: true

# A poison pill in Sidekiq's own hands: its death handlers, its API, its pages.
RSpec.describe "a poison pill" do
  let(:redis) { RedisServer.new }
  let(:payload) { Queues.marked("PaymentJob", "secret") }
  let(:jid) { Queues.jid(payload) }
  let(:env) { {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE, "MAX_RECOVERIES" => "0"} }

  def ruby(code, before: "")
    output, status = RubyProcess.run_ruby(code, env: env, before: before)
    expect(status).to be_success, output
    output
  end

  def entries = redis.call("ZRANGE", "dead", 0, -1)

  it "is told once, runs the death handlers, and shows and retries by the DeadSet API" do
    dead = Engines.orphan(redis, payload)
    unreadable = Engines.orphan(redis, "not json")
    output = ruby(<<~RUBY)
      require "sidekiq/api"
      Sidekiq.logger.level = Logger::WARN
      Sidekiq.configure_client { |config| config } # as an initializer does
      config = Sidekiq.respond_to?(:default_configuration) ? Sidekiq.default_configuration : Sidekiq
      config.death_handlers << ->(_, _) { raise "secret" }
      config.death_handlers << ->(job, error) { puts "died|\#{job["jid"]}|\#{job["args"].size}|\#{error.class}" }
      Sidekiq::ProcessingTracker.on(:dead) { |event| puts "told|\#{event.jid}|\#{event.reason}|\#{event.recoveries}|\#{event.from}" }
      p Sidekiq::ProcessingTracker.reenqueue_orphans!
      Sidekiq::DeadSet.new.each { |job| puts "dead|\#{job.jid}|\#{job["error_class"]}|\#{job.display_class}|\#{job.queue}" if job.jid == "#{jid}" }
    RUBY
    expect(output.lines(chomp: true).grep(/\|/)).to include(
      "died|#{jid}|1|Sidekiq::ProcessingTracker::PoisonPill", "told|#{jid}|poison_pill|1|#{dead}",
      "dead|#{jid}|Sidekiq::ProcessingTracker::PoisonPill|PaymentJob|default"
    )
    expect(output.scan(/^died/).size).to eq(1)
    expect(output.scan(/^told\|#{jid}/).size).to eq(1)
    expect(output).to match(/WARN.*moved job to the dead set: jid=#{jid} class=PaymentJob queue=default from=#{dead} reason=poison_pill/)
    expect(output).to match(/ERROR.*a death handler failed .*RuntimeError/).and(not_include("secret"))
    expect(output).to include(unreadable)
    tracker = Watching.watch(redis)
    expect(tracker.stats[:totals]).to include(requeued: 0, dead: 2)
    expect(tracker.journal).to include(have_attributes(kind: :dead, reason: :poison_pill, jid: jid, recoveries: 1, from: dead))

    ruby('require "sidekiq/api"; Sidekiq::DeadSet.new.find_job(ARGV.first || "' + jid + '").retry')
    expect(Queues.queued(redis).map { |job| JSON.parse(job).slice("jid", "class", "args") })
      .to eq([{"jid" => jid, "class" => "PaymentJob", "args" => ["secret"]}])
    expect(entries.grep(/#{jid}/)).to be_empty
  end

  # Where configure_server has said more than the default, a console does not know of it.
  it "costs no other entry outside of a server, and those beyond the limits in one" do
    limits = "(Sidekiq.respond_to?(:default_configuration) ? Sidekiq.default_configuration : Sidekiq)" \
      ".then { |config| config[:dead_max_jobs] = 2; config[:dead_timeout_in_seconds] = 60 }\n"
    old = Array.new(3) { |i| Queues.payload("OldJob", i) }
    old.each_with_index { |job, i| redis.call("ZADD", "dead", i + 1, job) }
    Engines.orphan(redis, payload)
    ruby("#{limits}Sidekiq::ProcessingTracker.reenqueue_orphans!")
    expect(entries.size).to eq(4)
    expect(entries.take(3)).to eq(old)

    Engines.orphan(redis, Queues.marked("PaymentJob"))
    SidekiqProcess.new(redis, app: limits, env: env.except("REDIS_URL")).up
    eventually("the recovery by a server") { entries.grep(/PoisonPill/).size == 2 }
    expect(entries.size).to eq(2)
  end

  it "shows and retries on Sidekiq's own pages" do
    Engines.orphan(redis, payload)
    ruby("Sidekiq::ProcessingTracker.reenqueue_orphans!")
    output = ruby(<<~RUBY)
      require "rack"
      require "sidekiq/web"
      session = {}
      web = Rack::MockRequest.new(->(env) { Sidekiq::Web.call(env.merge("rack.session" => session)) })
      page = web.get("/morgue")
      puts page.status, page.body[/PoisonPill/]
      path = page.body[%r{/morgue/[\\d.]+-#{jid}}]
      puts path
      one = web.get(path)
      puts one.status, one.body[/It may be what kills the processes/]
      token = one.body[/name=.authenticity_token.[^>]*value=.([^"']+)/, 1].to_s
      puts web.post(path, params: {"retry" => "1", "authenticity_token" => token}, "HTTP_SEC_FETCH_SITE" => "same-origin").status
    RUBY
    status, error_class, path, one, message, posted = output.lines(chomp: true).last(6)
    expect([status, error_class, message, one, posted]).to eq(["200", "PoisonPill", "It may be what kills the processes", "200", "302"]), output
    expect(path).to end_with(jid)
    expect(Queues.queued(redis).map { |job| Queues.jid(job) }).to eq([jid])
    expect(entries).to be_empty
  end
end
