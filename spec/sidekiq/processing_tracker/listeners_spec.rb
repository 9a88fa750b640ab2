# frozen_string_literal: true

require "pp"

RSpec.describe Sidekiq::ProcessingTracker::Listeners do
  let(:tracker) { Sidekiq::ProcessingTracker }
  let(:output) { StringIO.new }
  let(:payload) { Queues.marked("PaymentJob", "secret") }
  let(:dead) do
    {"kind" => "dead", "reason" => "poison_pill", "jid" => Queues.jid(payload), "job_class" => "PaymentJob", "queue" => "default",
     "from" => "a:1:x", "by" => "b:2:y", "recoveries" => 4, "at" => 1_700_000_000_123, "payload" => payload}
  end

  before { tracker.config.logger = Logger.new(output, formatter: ->(severity, _, _, text) { "#{severity} #{text}\n" }) }

  after do
    tracker.config.logger = nil
    described_class.clear
    SidekiqConfig.current.death_handlers.clear
  end

  def report(event) = Sidekiq::ProcessingTracker::Events.report(event)

  it "gives an event all of its parts" do
    heard = []
    tracker.on(:dead) { |event| heard << event }
    report(dead)
    expect(heard).to eq([tracker::Event.new(kind: :dead, reason: :poison_pill, jid: Queues.jid(payload), job_class: "PaymentJob", queue: "default",
      from: "a:1:x", by: "b:2:y", recoveries: 4, at: Time.at(1_700_000_000, 123, :millisecond), payload: payload)])
    expect(output.string).to eq("WARN ProcessingTracker moved job to the dead set: jid=#{Queues.jid(payload)} class=PaymentJob queue=default " \
      "from=a:1:x reason=poison_pill recoveries=4\n")
  end

  it "shows no payload of an event" do
    event = tracker::Event.from_native(dead).first
    shown = [event.inspect, event.to_s, event.pretty_inspect, PP.pp(event, +"")]
    expect(shown).to all(include("poison_pill").and(not_include("secret")))
    expect(event.payload).to include("secret")
    expect(event).to be_frozen
  end

  it "shows no payload of an event as JSON" do
    event = tracker::Event.from_native(dead.merge("queue" => "q\xff")).first
    shown = [event.to_json, JSON.generate(event), JSON.generate([event]), JSON.generate(event.as_json(only: [:jid]))]
    expect(shown).to all(include("poison_pill", Queues.jid(payload)).and(not_include("secret")))
    expect(JSON.parse(event.to_json).keys).to match_array((tracker::Event::MEMBERS - [:payload]).map(&:to_s))
  end

  it "shows none either where ActiveSupport makes the JSON" do
    output, status = RubyProcess.run_ruby(<<~RUBY, before: 'require "active_support"')
      require "active_support/json"
      event = Sidekiq::ProcessingTracker::Event.new(kind: :dead, jid: "j1", at: Time.at(0), payload: "secret")
      puts event.to_json, [event].to_json, {event: event}.to_json, ActiveSupport::JSON.encode(event), JSON.generate(event)
    RUBY
    expect(status).to be_success
    expect(output.lines).to have_attributes(size: 5).and all(include('"kind":"dead"', '"jid":"j1"').and(not_include("secret")))
  end

  it "survives callbacks and death handlers that raise what is no StandardError, and errors that cannot say what they are" do
    heard = []
    fatal = Class.new(Exception) # rubocop:disable Lint/InheritException
    mute = Class.new(StandardError) do
      def message = raise(NoMemoryError)
    end
    [-> { raise fatal, "secret" }, -> { exit(3) }, -> { raise NoMemoryError }, -> { raise mute }, -> { raise Interrupt }].each do |raising|
      tracker.on(:dead) { raising.call }
      SidekiqConfig.current.death_handlers << ->(_, _) { raising.call }
    end
    tracker.on(:dead) { heard << :callback }
    SidekiqConfig.current.death_handlers << ->(_, _) { heard << :handler }
    # Not in the main thread, where an Interrupt is the user's.
    Thread.new { report(dead) }.join
    expect(heard).to eq(%i[callback handler])
    expect(output.string.scan(/^ERROR ProcessingTracker a (?:callback|death handler) failed on the event dead of job/).size).to eq(10)
    expect(output.string).to include("SystemExit at ", "its message raises NoMemoryError")
    expect(output.string.lines.grep_v(/\ADEBUG/).join).not_to include("secret")
  end

  it "leaves Ctrl-C to the user in the main thread" do
    tracker.on(:dead) { raise Interrupt }
    expect { report(dead) }.to raise_error(Interrupt)
  end

  it "logs discarded and superseded jobs, and calls only whom it concerns" do
    heard = []
    tracker.on(:discarded, :superseded) { |event| heard << [event.kind, event.reason] }
    tracker.on(:recovered) { heard << :never }
    report(dead.merge("kind" => "discarded", "reason" => "unmarked", "recoveries" => 1))
    report(dead.merge("kind" => "superseded", "reason" => nil, "payload" => nil))
    report("kind" => "outage_over", "seconds" => 1.0)
    expect(heard).to eq([%i[discarded unmarked], [:superseded, nil]])
    expect(output.string.lines).to match([
      /\AWARN ProcessingTracker discarded job: jid=.* reason=unmarked$/, /\AINFO ProcessingTracker superseded job: jid=.* recoveries=4$/, /\AINFO /
    ])
    expect(output.string).not_to include("secret")
  end

  it "runs Sidekiq's death handlers for a poison pill, each whatever the others raise" do
    called = []
    SidekiqConfig.current.death_handlers << ->(_, _) { raise "secret" } << ->(job, error) { called << [job, error] }
    report(dead)
    expect(called.size).to eq(1)
    job, error = called.first
    expect(job.except("failed_at")).to eq(JSON.parse(payload).merge("error_class" => "Sidekiq::ProcessingTracker::PoisonPill", "error_message" => error.message))
    # Whole milliseconds since Sidekiq 8.0, as it writes them itself.
    expect(job["failed_at"]).to eql((Sidekiq::VERSION.to_i >= 8) ? 1_700_000_000_123 : 1_700_000_000.123)
    expect(error).to be_a(Sidekiq::ProcessingTracker::PoisonPill).and have_attributes(message: "orphaned 4 times, the last time by a:1:x")
    expect(output.string).to match(/^ERROR ProcessingTracker a death handler failed on the event dead of job \h+: RuntimeError at .*listeners_spec/)
    expect(output.string.lines.grep_v(/\ADEBUG/).join).not_to include("secret")
  end

  it "runs them as Sidekiq does for a poison pill that may not go to the dead set" do
    called = []
    SidekiqConfig.current.death_handlers << ->(job, error) { called << [job["jid"], job["queue"], error.class] }
    undying = JSON.parse(payload).merge("dead" => false).except("queue")
    report(dead.merge("kind" => "discarded", "queue" => "slow", "payload" => JSON.generate(undying)))
    expect(called).to eq([[Queues.jid(payload), "slow", Sidekiq::ProcessingTracker::PoisonPill]])
  end

  it "runs no death handlers for other deaths, nor where there is no job to give them" do
    called = []
    SidekiqConfig.current.death_handlers << ->(*arguments) { called << arguments }
    [{"reason" => "unmarked"}, {"reason" => "unreadable"}, {"kind" => "discarded", "reason" => "unmarked"}, {"payload" => "not json"}, {"payload" => nil},
      {"payload" => "[1]"}].each { |change| report(dead.merge(change)) }
    expect(called).to be_empty
    expect(output.string.scan("runs no death handlers for job").size).to eq(3)
  end

  it "survives an event that makes no sense" do
    expect { report("kind" => "lease_lost") }.not_to raise_error
    expect { report("kind" => nil) }.not_to raise_error
  end
end
