# frozen_string_literal: true

# kill -9 inside perform, with the real sidekiq-unique-jobs: docs/unique-jobs.md has what is seen here as a table.
{unique_jobs_7: "sidekiq-unique-jobs 7.1 on Sidekiq 6.5", unique_jobs_8: "sidekiq-unique-jobs 8.1 on Sidekiq 7.3"}.each do |bundle, versions|
  RSpec.describe "unique jobs of a killed process, #{versions}", bundle: bundle do
    let(:redis) { RedisServer.new }
    let(:gate) { Gate.new }
    let(:app) { UniqueApp.new(redis, bundle) }

    # A job of the process that is killed, and what comes of it.
    let(:cases) do
      [
        # lock, limit, a duplicate is pushed while it runs → refused or queued; outcome, its lock; who runs at last
        ["until_executed", 1, false],
        ["until_executed", 1, true, :refused],
        ["until_executed", 2, true, :refused],
        ["until_expired", 1, false],
        ["until_expired", 1, true, :refused],
        ["until_expired", 2, true, :refused],
        ["while_executing", 1, false],
        ["while_executing", 1, true, :queued],
        ["while_executing", 2, false],
        ["while_executing", 2, true, :queued],
        ["until_executing", 1, false],
        ["until_executing", 1, true, :queued],
        ["until_and_while_executing", 1, false],
        ["until_and_while_executing", 1, true, :queued],
        ["until_and_while_executing", 2, false],
        ["until_and_while_executing", 2, true, :queued]
      ]
    end

    def job(lock, limit, duplicate, *) = [UniqueApp.job_class(lock, limit: limit), gate.path, "#{lock} #{limit} #{duplicate}"]

    it "experiment" do |example|
      t = now
      say = ->(text) { example.reporter.message("  #{(now - t).round(1)} #{text}") }
      shared = cases.select { |one| one[1] == 2 }
      alive = app.worker(concurrency: shared.size).up
      holders = app.push(shared.map { |one| job(*one) })
      alive.runs(*holders)
      say.call("holders run")
      victim = app.worker(concurrency: cases.size).up
      owns = app.push(cases.map { |one| job(*one) })
      victim.runs(*owns)
      say.call("victim runs")
      dups = app.push(cases.select { |one| one[2] }.map { |one| job(*one) })
      dup_of = cases.select { |one| one[2] }.zip(dups).to_h
      puts app.held.inspect
      queued = Queues.queued(redis).map { |p| Queues.jid(p) }
      expect(queued).to match_array(dups.compact)
      victim.kill
      eventually("recovery") { Queues.identities(redis) == [alive.identity] }
      say.call("recovered")
      journal = Queues.journal(redis).to_h { |j| [j["jid"], j] }
      puts app.held.inspect
      late = app.push(cases.map { |one| job(*one) })
      runner = app.worker(concurrency: 40).up
      eventually("all taken") { Queues.queued(redis).empty? }
      let_pass(3)
      started = runner.started
      puts app.held.inspect
      gate.open(runner)
      eventually("done") { (started - runner.done).empty? }
      let_pass(1)
      say.call("done")
      cases.zip(owns, late) do |one, own, l|
        dup = dup_of[one]
        puts [one.inspect, journal[own]&.values_at("outcome", "lock").inspect, "own ran #{started.include?(own)}", "dup #{dup ? "queued" : "refused"} ran #{started.include?(dup)}", "late #{l ? "queued" : "refused"} ran #{started.include?(l)}"].join(" | ")
      end
      say.call("left #{app.held.inspect}")
      gate.open
      eventually("end of the living one") { alive.done.size == shared.size }
      let_pass(1)
      say.call("left #{app.held.inspect}, digests #{redis.call("ZRANGE", "uniquejobs:digests", 0, -1)}, #{redis.call("KEYS", "uniquejobs:*")}, retry #{redis.call("ZCARD", "retry")}")
      puts runner.log.lines.grep(/WARN|ERROR|fail/i).first(10)
      puts victim.log.lines.first(20)
    end
  end
end
