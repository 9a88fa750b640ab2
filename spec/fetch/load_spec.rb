# frozen_string_literal: true

# What the native fetch takes from Redis, and what it asks of it: no more than it has threads for, and nothing while it idles.
RSpec.describe "the native fetch" do
  around { |example| with_environment("PROCESSING_FETCH" => "native") { example.run } }

  let(:gate) { Gate.new }

  describe "with other processes beside it" do
    let(:redis) { RedisServer.new }

    def push(*args)
      Queues.push(redis, Queues.marked("GatedJob", gate.path, *args))
    end

    it "takes no job for which it has no thread: another process has it at once" do
      busy = SidekiqProcess.new(redis, concurrency: 3).up
      payloads = Array.new(5) { push }
      eventually("all threads") { busy.started.size == 3 }
      expect(Queues.in_flight(redis)[busy.identity].size).to eq(3)
      expect(Queues.queued(redis)).to eq(payloads.last(2))
      idle = SidekiqProcess.new(redis, concurrency: 3).up
      idle.runs(*payloads.last(2).map { |payload| Queues.jid(payload) })
      expect(Queues.in_flight(redis).transform_values(&:size)).to eq(busy.identity => 3, idle.identity => 2)
      gate.open
      eventually("the acks") { Queues.everywhere(redis).empty? }
    end

    it "never has more jobs in flight than threads, under load, and the jobs are spread" do |example|
      app = <<~RUBY
        class ShortJob
          include Sidekiq::Job

          def perform(number)
            sleep(number % 10 / 1_000.0)
            note("done", [number, Process.pid].to_json)
          end
        end
      RUBY
      workers = Array.new(3) { SidekiqProcess.new(redis, app: app, concurrency: 4) }.each(&:up)
      payloads = (1..2_000).map { |number| Queues.payload("ShortJob", number) }
      most = Hash.new(0)
      samples = 0
      redis.with do |client|
        payloads.each_slice(100) { |some| client.call("LPUSH", "queue:default", *some) }
        deadline = Eventually.now + 120
        until client.call("LLEN", "done") == 2_000
          # Without a pause, so that no moment is missed.
          raise "2000 jobs are not done within 120 s" if Eventually.now > deadline

          workers.each do |worker|
            size = client.call("HLEN", "sidekiq_processing:inflight:#{worker.identity}") - 1
            most[worker.pid] = [most[worker.pid], size].max
          end
          samples += 1
        end
      end
      runs = Queues.notes(redis, "done")
      shares = runs.map(&:last).tally
      example.reporter.message("  #{samples} looks: #{most.values.join(", ")} in flight at most; #{shares.values.join(", ")} jobs each")
      expect(runs.map(&:first)).to match_array((1..2_000).to_a)
      expect(most.values).to all(be_between(1, 4))
      # No process sat on them while others idled.
      expect(shares.values).to all(be > 200)
      eventually("the acks") { Queues.in_flight(redis).values.flatten.empty? }
    end
  end

  describe "while it idles" do
    let(:redis) { RedisServer.new }

    # What is asked of Redis meanwhile, a line each.
    def commands(seconds)
      monitor = OwnProcess.new("redis-cli", "-s", redis.socket, "monitor", log: File.join(Scratch.folder, "monitor.log"))
      eventually("the monitor") { monitor.output.start_with?("OK") }
      let_pass(seconds)
      monitor.kill
      # Not what scripts do.
      monitor.output.lines.drop(1).grep_v(/ lua\] /)
    end

    it "asks for nothing beyond its beats and a claim that waits for each queue, twenty seconds at a time" do |example|
      seconds = 12
      # Who looks for due jobs does so when Sidekiq's poller says.
      env = {"PROCESSING_SCHEDULER" => "sidekiq"}
      worker = SidekiqProcess.new(redis, concurrency: 10, queues: %w[default other], interval: 5, ttl: 30, env: env).up
      quick = Queues.push(redis, Queues.marked("QuickJob"))
      eventually("a job") { Queues.notes(redis, "done").map(&:first) == [Queues.jid(quick)] }
      let_pass(1)
      lines = commands(seconds)
      ours = lines.grep(/sidekiq_processing:|"queue:|"CLIENT"|"client"/i)
      beats, others = ours.partition { |line| line.match?(/"sidekiq_processing:clock"/) }
      claims, rest = others.partition { |line| line.match?(/"blmove" "queue:|"sidekiq_processing:aside:/i) }
      example.reporter.message("  in #{seconds} s: #{beats.size} beats, #{claims.size} commands that claim, of #{lines.size} with Sidekiq's own")
      expect(rest).to be_empty
      expect(beats.size).to be_between(2, 4)
      # Two for each of the two queues.
      expect(claims.size).to be <= 4
      # And it is awake all the same.
      again = Queues.push(redis, Queues.marked("QuickJob"), queue: "other")
      eventually("another job") { Queues.notes(redis, "done").map(&:first).include?(Queues.jid(again)) }
      expect(worker).to be_running
    end
  end
end
