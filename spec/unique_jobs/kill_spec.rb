# frozen_string_literal: true

# kill -9 inside perform, with the real sidekiq-unique-jobs. docs/unique-jobs.md has the table.
# On Ruby 3.1 both at once, as gems beside those of the specs; from 3.2 on what goes with the Sidekiq of the specs.
sets =
  if RUBY_VERSION.to_f < 3.2
    {unique_jobs_7: "sidekiq-unique-jobs 7.1 on Sidekiq 6.5", unique_jobs_8: "sidekiq-unique-jobs 8.1 on Sidekiq 7.3"}
  elsif Sidekiq::VERSION.to_f < 8
    {unique_jobs_8: "sidekiq-unique-jobs 8.1 on Sidekiq 7.3"}
  elsif Sidekiq::VERSION.to_f < 8.1
    {unique_jobs_8_sidekiq_8_0: "sidekiq-unique-jobs 8.1 on Sidekiq 8.0"}
  else
    {unique_jobs_8_sidekiq_8: "sidekiq-unique-jobs 8.1 on Sidekiq 8.1", unique_jobs_9: "sidekiq-unique-jobs 9 alpha on Sidekiq 8.1"}
  end

sets.each do |bundle, versions|
  RSpec.describe "unique jobs of a killed process, #{versions}", (RUBY_VERSION.to_f < 3.2) ? :bundle : :bundle_beside => bundle do
    let(:redis) { RedisServer.new }
    let(:gate) { Gate.new }
    let(:app) { UniqueApp.new(redis, bundle) }
    # The jids of some cells' jobs, by cell and by their part in it.
    let(:jids) { Hash.new { |all, one| all[one] = {} } }
    let(:digests) { {} }

    # A job that is killed, and what is to come of it. With `limit` 2 another job, in a process that lives, holds the same
    # lock. `duplicate`: what becomes of a push while both run. `runs`: who runs in the end. `held`, `held_running`: who
    # holds the lock and the runtime lock while the recovered job is in its queue. `left`, `left_running`: when it has run.
    cell = Struct.new(:lock, :limit, :duplicate, :outcome, :settled, :runs, :held, :held_running, :left, :left_running, keyword_init: true) do
      def to_s = "#{lock}#{", limit 2 and another holder" if limit == 2}#{", a duplicate #{duplicate}" if duplicate}"

      # Whether another push is refused while the recovered job is in its queue. (With a limit of 2 there may be room.)
      def unique_in_queue? = limit == 1 && held == %i[own] && !duplicate
    end
    same = {outcome: "requeued", settled: "", runs: %i[own]}
    cells = [
      {lock: "until_executed", limit: 1, held: %i[own]},
      {lock: "until_executed", limit: 1, duplicate: :refused, held: %i[own]},
      {lock: "until_executed", limit: 2, duplicate: :refused, held: %i[own other], left: %i[other]},
      {lock: "until_expired", limit: 1, held: %i[own], left: %i[own]},
      {lock: "until_expired", limit: 1, duplicate: :refused, held: %i[own], left: %i[own]},
      {lock: "until_expired", limit: 2, duplicate: :refused, held: %i[own other], left: %i[own other]},
      {lock: "while_executing", limit: 1, held_running: %i[own]},
      {lock: "while_executing", limit: 1, duplicate: :queued, held_running: %i[own]},
      {lock: "while_executing", limit: 2, held_running: %i[own other], left_running: %i[other]},
      {lock: "while_executing", limit: 2, duplicate: :queued, held_running: %i[own other], left_running: %i[other]},
      {lock: "until_executing", limit: 1},
      {lock: "until_executing", limit: 1, duplicate: :queued, runs: %i[own duplicate], held: %i[duplicate]},
      {lock: "until_and_while_executing", limit: 1, settled: "taken", held: %i[own], held_running: %i[own]},
      {lock: "until_and_while_executing", limit: 1, duplicate: :queued, outcome: "superseded", settled: "given up", runs: %i[duplicate],
       held: %i[duplicate]},
      {lock: "until_and_while_executing", limit: 2, settled: "taken", held: %i[own], held_running: %i[own other], left_running: %i[other]},
      {lock: "until_and_while_executing", limit: 2, duplicate: :queued, settled: "taken", held: %i[own duplicate], held_running: %i[own other],
       left_running: %i[other]}
    ].map { |row| cell.new(**same, **row) }

    # @return [Array<String, nil>] the jids; nil where a lock has refused it
    def push(cells, part, undying: false, filler: "", **fields)
      jobs = cells.map { |one| [UniqueApp.job_class(one.lock, limit: one.limit, undying: undying), gate.path, one.to_s, filler] }
      app.push(jobs, **fields).each_with_index { |jid, i| jids[cells[i]][part] = jid }
    end

    # A process for each part, full up with its jobs, so that it takes no other.
    #
    # @return [SidekiqProcess]
    def employ(cells, part, env: {}, **options)
      worker = app.worker(concurrency: cells.size, env: env).up
      push(cells, part, **options)
      worker.runs(*cells.map { |one| jids[one][part] })
      Queues.in_flight(redis).fetch(worker.identity).map { |payload| JSON.parse(payload) }.each do |job|
        one = cells.find { |candidate| jids[candidate][part] == job["jid"] }
        digests[one] = job.fetch("lock_digest").delete_prefix("uniquejobs:").delete_suffix(":RUN")
      end
      worker
    end

    def push_duplicates(cells, **options)
      some = cells.select(&:duplicate)
      push(some, :duplicate, **options)
      some.each { |one| expect([one.to_s, jids[one][:duplicate] ? :queued : :refused]).to eq([one.to_s, one.duplicate]) }
      expect(queued).to match_array(some.filter_map { |one| jids[one][:duplicate] })
    end

    # @return [Array<String>] the jobs of which Sidekiq's death handlers were told
    def deaths = Queues.notes(redis, "deaths").map(&:first)

    def queued = Queues.queued(redis).map { |payload| Queues.jid(payload) }

    # @return [Hash{String => Array<String>}] as {UniqueApp#held} answers
    def holders(cells, lock, runtime)
      cells.flat_map { |one| [[digests[one], one[lock]], ["#{digests[one]}:RUN", one[runtime]]].map { |digest, parts| [one, digest, parts] } }
        .select { |_, _, parts| parts }
        .to_h { |one, digest, parts| [digest, jids[one].values_at(*parts).sort] }
    end

    def expect_settled(cells, from:)
      journal = Queues.journal(redis).to_h { |line| [line["jid"], line] }
      expect(journal.keys).to match_array(cells.map { |one| jids[one][:own] })
      cells.each do |one|
        expect(journal[jids[one][:own]].slice("from", "outcome", "lock")).to eq("from" => from, "outcome" => one.outcome, "lock" => one.settled), one.to_s
      end
      expect(Queues.journal(redis).size).to eq(cells.size)
    end

    # Runs what is in the queue, and sees to it that these run and no others.
    def expect_runs(cells, runs)
      runner = app.worker(concurrency: 2 * cells.size).up.runs(*runs)
      eventually("the end of the duplicates") { queued.empty? && Queues.in_flight(redis)[runner.identity].size == runs.size }
      gate.open(runner)
      eventually("the end of the jobs") { (runs - runner.done).empty? && Queues.in_flight(redis)[runner.identity].empty? }
      expect(runner.started).to match_array(runs)
      expect(redis.call("ZCARD", "retry") + redis.call("ZCARD", "dead")).to eq(0)
    end

    # From the end of a recovery on.
    def expect_story(cells, from:, reaped: false, **options)
      expect_settled(cells, from: from)
      expected = holders(cells, :held, :held_running)
      held = app.held
      # That gem's reaper knows no job that waits for a runtime lock; it takes it again.
      [held, expected].each { |all| all.reject! { |digest, _| digest.end_with?(":RUN") } } if reaped
      expect(held).to eq(expected)
      push(cells.select(&:unique_in_queue?), :late, **options)
      expect(cells.select(&:unique_in_queue?).map { |one| jids[one][:late] }.compact).to be_empty
      expect_runs(cells, cells.flat_map { |one| jids[one].values_at(*one.runs) })
      eventually("the release of the locks") { app.held == holders(cells, :left, :left_running) }
    end

    def expect_end_of(alive, cells)
      gate.open
      eventually("the end of the living one's jobs") { alive.done.size == cells.count { |one| one.limit == 2 } }
      eventually("no lock, but for those that expire") { app.held == holders(cells, :left, :left_running).slice(*expiring(cells)) }
      app.held.each_key { |digest| expect(redis.call("TTL", "uniquejobs:#{digest}:LOCKED")).to be_between(1, 600) }
    end

    def expiring(cells) = cells.select { |one| one.lock == "until_expired" }.map { |one| digests[one] }

    it "run again at once, stay unique while they wait, and nobody else's lock is touched" do |example|
      alive = employ(cells.select { |one| one.limit == 2 }, :other)
      victim = employ(cells, :own)
      push_duplicates(cells)
      victim.kill
      eventually("the recovery") { Queues.identities(redis) == [alive.identity] }
      eventually("the callbacks") { Queues.notes(redis, "heard").size >= cells.size }
      expect(Queues.notes(redis, "heard")).to match_array(cells.map { |one| [(one.outcome == "requeued") ? "recovered" : one.outcome, jids[one][:own]] })
      expect(cells.map(&:outcome)).to include("superseded")
      expect_story(cells, from: victim.identity)
      expect_end_of(alive, cells)
      cells.each { |one| example.reporter.message("  #{one}: #{one.outcome}, lock: #{one.settled.empty? ? "kept" : one.settled}, then runs: #{one.runs.join(", ")}") }
    end

    it "fare the same when the gem's own reaper runs before and after the recovery" do
      old = {created_at: Time.now.to_f - 3600}
      app.hold_reaper
      alive = employ(cells.select { |one| one.limit == 2 }, :other, env: {"REAPS" => "1"}, **old)
      victim = employ(cells, :own, **old)
      push_duplicates(cells)
      held = app.held
      # What it takes for the work of living processes is what Sidekiq has told with its last beat.
      eventually("the beats of Sidekiq") { app.known_work.size >= cells.size + cells.count { |one| one.limit == 2 } }
      app.reap
      expect(app.held).to eq(held)
      victim.kill
      eventually("the recovery") { Queues.identities(redis) == [alive.identity] }
      app.reap
      app.hold_reaper
      expect_story(cells, from: victim.identity, reaped: true)
      expect_end_of(alive, cells)
    end

    it "fare the same when the one who recovers is killed in the middle of it" do |example|
      some = cells.select { |one| one.limit == 1 }
      # A piece of a recovery is 1 MB.
      big = {filler: "x" * 600_000}
      victim = employ(some, :own, **big)
      push_duplicates(some, **big)
      # Suspects leave last, and one by one, 2 s from each to the next: so there is a middle in which to kill. That they have been
      # orphaned before changes nothing in what becomes of their locks.
      suspects = some.last(3)
      suspects.each { |one| redis.call("SET", "sidekiq_processing:recoveries:#{jids[one][:own]}", 1, "EX", 600) }
      expect(suspects.map(&:settled)).to include("taken", "given up")
      victim.kill
      in_flight = "sidekiq_processing:inflight:#{victim.identity}"
      reaper = app.worker(queues: ["later"]).up
      redis.with do |client|
        deadline = now + 20
        # One more than the jobs: that it is not fenced.
        while client.call("HLEN", in_flight) >= some.size
          raise "nothing was recovered" if now > deadline
        end
        reaper.kill
      end
      left = redis.call("HLEN", in_flight)
      expect(left).to be_between(1, some.size - 1)
      expect(Queues.journal(redis).size).to eq(some.size - left)
      example.reporter.message("  in flight after the kill: #{left} of #{some.size}")
      last = app.worker(queues: ["later"]).up
      eventually("the rest of the recovery") { Queues.identities(redis) == [last.identity] }
      expect_story(some, from: victim.identity, **big)
    end

    it "give up what they hold, and no more, when they go to the dead set or nowhere" do
      some = cells.reject(&:duplicate)
      others = employ(some.select { |one| one.limit == 2 }, :other, env: {"MAX_RECOVERIES" => "0"})
      held = app.held
      # Of a poison pill Sidekiq's death handlers are told, also where it may not go to the dead set; of the others they are not.
      dying = []
      told = []
      ends = [["dead", "unmarked", {processing: false}], ["discarded", "unmarked", {processing: false, undying: true}],
        ["discarded", "poison_pill", {undying: true}], ["dead", "poison_pill", {}]]
      ends.each do |outcome, reason, options|
        victim = employ(some, :own, **options)
        victim.kill
        eventually("the recovery") { Queues.identities(redis) == [others.identity] }
        own = Queues.journal(redis).select { |line| line["from"] == victim.identity }
        expect(own.map { |line| line.values_at("jid", "outcome", "reason") }).to match_array(some.map { |one| [jids[one][:own], outcome, reason] })
        told.concat(some.map { |one| [outcome, jids[one][:own]] })
        eventually("the callbacks") { Queues.notes(redis, "heard").size >= told.size }
        expect(Queues.notes(redis, "heard")).to match_array(told)
        dying.concat(some.map { |one| jids[one][:own] }) if reason == "poison_pill"
        eventually("the death handlers") { deaths.size >= dying.size }
        expect(deaths).to match_array(dying)
        # That gem's own removes the whole lock, as of every job that dies. (Of the undying ones nobody else holds it: they are of
        # other classes.) The 9 alpha leaves the second lock of until_and_while_executing, which the payload does not name and another holds.
        second = some.select { |one| one.lock == "until_and_while_executing" && bundle == :unique_jobs_9 }.map { |one| jids[one][:other] }
        still = ([outcome, reason] == %w[dead poison_pill]) ? held.select { |_, holders| (holders & second).any? } : held
        eventually("the locks after #{outcome}, #{reason}") { app.held == still }
      end
      free = some.select { |one| one.limit == 1 }
      push(free, :late)
      expect(free.map { |one| jids[one][:late] }).to all(be_a(String))

      # And what is held of a job that waits is free when a person says so.
      one = free.find { |candidate| candidate.lock == "until_executed" }
      expect(push([one], :refused)).to eq([nil])
      waiting = Queues.queued(redis).find { |payload| Queues.jid(payload) == jids[one][:late] }
      output, = RubyProcess.run_ruby("p Sidekiq::ProcessingTracker.clear_unique_jobs_lock(JSON.parse(ARGV.first))",
        env: {"REDIS_URL" => redis.url}, arguments: [waiting])
      expect(output).to end_with("true\n")
      expect(push([one], :last)).to all(be_a(String))
    end
  end
end
