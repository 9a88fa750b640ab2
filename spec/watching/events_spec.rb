# frozen_string_literal: true

# What `on` and ActiveSupport::Notifications tell, in real processes.
RSpec.describe "events" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # Every process notes what it hears.
  let(:app) do
    <<~RUBY
      tracker = Sidekiq::ProcessingTracker
      tracker.on(:recovered, :lease_lost) { raise NotImplementedError, "secret" }
      tracker.on(*tracker::Event::KINDS) do |event|
        note("heard", [event.kind, event.jid, event.job_class, event.queue, event.from, event.by, event.payload, Process.pid, event.inspect].to_json)
      end
      tracker.on(:recovered) { |event| JSON.parse(event.payload.to_s + "secret") }
    RUBY
  end

  def heard = Queues.notes(redis, "heard")

  it "tells each orphan once, in the process that recovered it, whatever callbacks raise" do
    victim = SidekiqProcess.new(redis, concurrency: 6, app: app).up
    payloads = Array.new(6) { |i| Queues.push(redis, Queues.marked("GatedJob", gate.path, i, "secret")) }
    jids = payloads.map { |payload| Queues.jid(payload) }
    victim.runs(*jids)
    others = Array.new(2) { SidekiqProcess.new(redis, queues: ["later"], app: app).up }
    by = others.to_h { |process| [process.pid, process.identity] }
    victim.kill
    eventually("the events") { heard.size >= 6 }
    gate.open
    runner = SidekiqProcess.new(redis, concurrency: 6, app: app).up
    eventually("the end of the jobs") { runner.done.size == 6 }
    [*others, runner].each(&:stop)

    expect(heard.map { |note| note[1] }).to match_array(jids)
    expect(heard).to all(match(["recovered", String, "GatedJob", "default", victim.identity, satisfy { |who| by.value?(who) }, satisfy { |bytes| payloads.include?(bytes) }, Integer, String]))
    heard.each { |note| expect(by[note[7]]).to eq(note[5]) }
    expect(heard.map(&:last).join).not_to include("secret")
    logs = others.map(&:log).join
    expect(logs.scan(/ERROR.*a callback failed on the event recovered of job \h{24}: NotImplementedError at .*app\.rb:\d+/).size).to eq(6)
    expect(logs.scan(/ERROR.*a callback failed on .*JSON::ParserError/).size).to eq(6)
    expect(logs).not_to include("secret")
  end

  it "goes on telling, and ends well at a TERM, when callbacks exit or raise what is no StandardError" do
    raising = <<~RUBY
      Fatal = Class.new(Exception)
      tracker = Sidekiq::ProcessingTracker
      tracker.on(:recovered) { raise Fatal }
      tracker.on(:recovered) { exit(3) }
      tracker.on(:recovered) { |event| note("heard", [event.jid].to_json) }
    RUBY
    payloads = Array.new(2) { Queues.push(redis, Queues.marked("GatedJob", gate.path)) }
    jids = payloads.map { |payload| Queues.jid(payload) }
    victim = SidekiqProcess.new(redis).up.runs(*jids)
    reaper = SidekiqProcess.new(redis, queues: ["later"], app: raising).up
    victim.kill
    eventually("both events") { heard.size >= 2 }
    expect(heard.flatten).to match_array(jids)
    expect(reaper.stop).to have_attributes(exitstatus: 0)
    expect(reaper.log.scan(/ERROR.*a callback failed on the event recovered of job \h{24}: (\w+) at .*app\.rb/).flatten.tally)
      .to eq("Fatal" => 2, "SystemExit" => 2)
    expect(Queues.identities(redis)).to be_empty
  end

  it "tells of a lost lease, an event for each job that still runs" do
    sleeper = SidekiqProcess.new(redis, app: app).up
    payloads = Array.new(2) { Queues.push(redis, Queues.marked("GatedJob", gate.path, "secret")) }
    jids = payloads.map { |payload| Queues.jid(payload) }
    sleeper.runs(*jids)
    old = sleeper.identity
    other = SidekiqProcess.new(redis, queues: ["later"]).up
    sleeper.pause
    other.wait_for_log(/recovered job: .*recovered job: /m)
    sleeper.resume
    sleeper.wait_for_log(/lost the lease of #{old}/)
    eventually("the events") { heard.size >= 2 }
    renewed = sleeper.log[/lost the lease of #{old}, goes on as (\S+)\. /, 1]
    expect(heard.map { |note| note.take(8) }).to match_array(jids.zip(payloads).map { |jid, payload|
      ["lease_lost", jid, "GatedJob", "default", old, renewed, payload, sleeper.pid]
    })
    expect(sleeper.log).not_to include("secret")
  end

  it "tells the subscribers of ActiveSupport::Notifications, without the payload" do
    payload = Queues.marked("PaymentJob", "secret")
    dead = Engines.orphan(redis, payload)
    output, = RubyProcess.run_ruby(<<~RUBY, env: {"REDIS_URL" => redis.url, "PROCESSING_NS" => Engines::NAMESPACE}, before: 'require "active_support"')
      require "active_support/notifications"
      Sidekiq.logger.level = Logger::ERROR
      ActiveSupport::Notifications.subscribe(/sidekiq_processing_tracker\\z/) { raise "secret" }
      ActiveSupport::Notifications.subscribe(/sidekiq_processing_tracker\\z/) do |name, _, _, _, told|
        puts [name, told.inspect, told[:kind], told[:jid], told[:from], told[:event].payload == '#{payload}'].join("|")
      end
      Sidekiq::ProcessingTracker.on(:recovered) { |event| puts "callback \#{event.jid}" }
      Sidekiq::ProcessingTracker.reenqueue_orphans!
    RUBY
    lines = output.lines(chomp: true)
    name, shown, *told = lines.grep(/\|/).first.to_s.split("|")
    expect([name, *told]).to eq(["recovered.sidekiq_processing_tracker", "recovered", Queues.jid(payload), dead, "true"])
    expect(shown).not_to include("secret")
    expect(lines.grep(/callback/)).to eq(["callback #{Queues.jid(payload)}"])
    expect(lines.grep(/ERROR/)).to contain_exactly(a_string_matching(/a subscriber failed on the event recovered of job #{Queues.jid(payload)}: /))
  end

  it "refuses kinds that it does not know, and a missing block" do
    tracker = Sidekiq::ProcessingTracker
    expect { tracker.on(:finished) {} }.to raise_error(ArgumentError, /unknown event :finished: allowed are :recovered, :dead/)
    expect { tracker.on {} }.to raise_error(ArgumentError)
    expect { tracker.on(:dead) }.to raise_error(ArgumentError, /needs a block/)
  end
end
