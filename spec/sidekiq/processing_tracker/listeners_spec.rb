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
    expect(job).to eq(JSON.parse(payload))
    expect(error).to be_a(Sidekiq::ProcessingTracker::PoisonPill).and have_attributes(message: "orphaned 4 times, the last time by a:1:x")
    expect(output.string).to match(/^ERROR ProcessingTracker a death handler failed on the event dead of job \h+: RuntimeError at .*listeners_spec/)
    expect(output.string.lines.grep_v(/\ADEBUG/).join).not_to include("secret")
  end

  it "runs no death handlers for other deaths, nor where there is no job to give them" do
    called = []
    SidekiqConfig.current.death_handlers << ->(*arguments) { called << arguments }
    [{"reason" => "unmarked"}, {"reason" => "unreadable"}, {"kind" => "discarded"}, {"payload" => "not json"}, {"payload" => nil},
      {"payload" => "[1]"}].each { |change| report(dead.merge(change)) }
    expect(called).to be_empty
    expect(output.string.scan("runs no death handlers for job").size).to eq(3)
  end

  it "survives an event that makes no sense" do
    expect { report("kind" => "lease_lost") }.not_to raise_error
    expect { report("kind" => nil) }.not_to raise_error
  end
end
