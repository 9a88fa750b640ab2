# frozen_string_literal: true

require "open3"

RSpec.describe "in_flight" do
  let(:redis) { RedisServer.new }

  # How much the resident memory of the process that lists has grown at most, in kB, since before the first job.
  let(:script) do
    <<~RUBY
      def memory = File.read("/proc/self/status")[/VmRSS:\\s+(\\d+)/, 1].to_i
      Sidekiq::ProcessingTracker.stats # connects
      jids, listed, begun, most = {}, 0, memory, 0
      Sidekiq::ProcessingTracker.in_flight.each do |job|
        jids[job.jid.hash] = true
        listed += 1
        most = [most, memory].max if (jids.size % 5_000).zero?
      end
      p listed, jids.size, most - begun
    RUBY
  end

  # By a pipe, as for a mass insertion: one command at a time would take long.
  def load_jobs(count, identity, filler)
    Open3.popen2("redis-cli", "-s", redis.socket, "--pipe") do |stdin, stdout, thread|
      count.times do |i|
        payload = JSON.generate("jid" => format("%024x", i), "class" => "PaymentJob", "args" => [filler], "queue" => "default")
        parts = ["HSET", "native:inflight:#{identity}", "#{i + 1}-1 1700000000000 default", payload]
        stdin << "*4\r\n" << parts.map { |part| "$#{part.bytesize}\r\n#{part}\r\n" }.join
      end
      stdin.close
      raise "the insertion has failed: #{stdout.read}" unless thread.value.success?
    end
  end

  it "lists 100 000 jobs in flat memory, each once" do |example|
    skip "needs /proc" unless File.exist?("/proc/self/status")
    dead = Engines.orphan(redis)
    load_jobs(100_000, dead, "x" * 400)
    begun = now
    output, = RubyProcess.run_ruby(script, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE})
    listed, different, growth = output.lines.last(3).map(&:to_i)
    example.reporter.message("  100 000 jobs in #{(now - begun).round(1)} s, #{growth} kB more than before")
    expect([listed, different]).to eq([100_000, 100_000])
    # The jids alone that the script keeps take some; the payloads would take 45 MB, the jobs as objects as much.
    expect(growth).to be < 20_000
  end

  it "reads big payloads a few at a time" do |example|
    tracker = Watching.watch(redis)
    payloads = Array.new(60) { Queues.payload("PaymentJob", "x" * 1_000_000) }
    Engines.orphan(redis, *payloads)
    before = redis.call("INFO", "commandstats")[/cmdstat_hscan:calls=(\d+)/, 1].to_i
    expect(tracker.in_flight.map(&:jid).to_a).to match_array(payloads.map { |payload| Queues.jid(payload) })
    calls = redis.call("INFO", "commandstats")[/cmdstat_hscan:calls=(\d+)/, 1].to_i - before
    example.reporter.message("  60 jobs of 1 MB in #{calls} pages")
    # Valkey gives some 8 at a time: a bucket of its tables has that many.
    expect(calls).to be > 5
  end

  it "tells each job's id, class, queue and owner, and the moment" do
    tracker = Watching.watch(redis)
    wrapped = Queues.payload("Sidekiq::ActiveJob::Wrapper", wrapped: "MailJob")
    one = Engines.orphan(redis, wrapped, "not json", queue: "a b:c")
    two = Engines.orphan(redis, Queues.payload("PaymentJob"), identity: "pod:x:1:#{SecureRandom.hex(16)}")
    redis.call("HSET", "native:inflight:#{two}", "no token", "{}")
    expect(tracker.in_flight.to_a).to contain_exactly(
      have_attributes(jid: Queues.jid(wrapped), job_class: "MailJob", queue: "a b:c", since: Time.at(1_700_000_000), identity: one),
      have_attributes(jid: nil, job_class: nil, queue: "a b:c", identity: one),
      have_attributes(job_class: "PaymentJob", queue: "default", identity: two)
    )
  end

  it "is lazy, reads anew each time, and passes over a key that somebody has overwritten" do
    tracker = Watching.watch(redis)
    jobs = tracker.in_flight
    expect(jobs).to be_a(Enumerator::Lazy)
    expect(jobs.count).to eq(0)
    redis.call("SET", "native:inflight:#{Engines.orphan(redis, "{}")}", "x")
    Engines.orphan(redis, "{}")
    expect(jobs.count).to eq(1)
    expect(jobs.select { |job| job.queue == "default" }.first(1).size).to eq(1)
  end

  it "may be read in a forked child and in an outer loop" do
    tracker = Watching.watch(redis)
    Engines.orphan(redis, *Array.new(30) { Queues.payload("PaymentJob", "x" * 2000) })
    jobs = Enumerator.new { |all| tracker.in_flight.each { |job| all << job } }
    jobs.next
    status = Process.wait2(fork { exit!(tracker.in_flight.count == 30) }).last
    expect(status).to be_success
    expect(Array.new(29) { jobs.next }.size).to eq(29)
    expect { jobs.next }.to raise_error(StopIteration)
  end
end
