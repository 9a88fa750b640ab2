# frozen_string_literal: true

require "logger"
require "stringio"

RSpec.describe Sidekiq::ProcessingTracker::Events do
  # Gives out the events of an example, as the native engine does, and then says that it has stopped.
  engine = Class.new do
    def initialize(events)
      @events = events
    end

    def next_event(_timeout)
      event = @events.shift || :stopped
      event.is_a?(Exception) ? raise(event) : event
    end

    def touch
    end
  end

  let(:output) { StringIO.new }
  let(:logger) { Logger.new(output, formatter: ->(severity, _, _, text) { "#{severity} #{text}\n" }) }

  after { Sidekiq::ProcessingTracker.config.logger = nil }

  define_method(:logged) do |*events, to: logger|
    Sidekiq::ProcessingTracker.config.logger = to
    described_class.new(engine.new(events)).start.join(5)
    output.string
  end

  it "writes one line at boot" do
    event = {"kind" => "started", "identity" => "pod:1:ab", "server" => "unix:/r.sock db 0", "namespace" => "ns",
             "interval_ms" => 2500, "ttl_ms" => 30_000}
    expect(logged(event))
      .to eq("INFO ProcessingTracker started: identity=pod:1:ab namespace=ns interval=2.5s ttl=30.0s redis=unix:/r.sock db 0\n")
  end

  it "writes one line per recovered job, without arguments" do
    event = {"kind" => "recovered", "jid" => "j1", "job_class" => "PaymentJob", "queue" => "default", "from" => "a:1:x",
             "by" => "b:2:y", "recoveries" => 1, "payload" => "secret"}
    expect(logged(event))
      .to eq("INFO ProcessingTracker recovered job: jid=j1 class=PaymentJob queue=default from=a:1:x outcome=requeued\n")
  end

  it "keeps on one line what a payload says" do
    event = {"kind" => "recovered", "jid" => nil, "job_class" => "A\nFATAL fake", "queue" => "q\xff", "from" => "a"}
    expect(logged(event)).to eq(
      "INFO ProcessingTracker recovered job: jid=- class=\"A\\nFATAL fake\" queue=q\uFFFD from=a outcome=requeued\n"
    )
  end

  it "writes outages, lost leases, warnings and what was dropped" do
    lines = logged(
      {"kind" => "outage", "error" => "connection refused"}, {"kind" => "outage_over", "seconds" => 12.345},
      {"kind" => "lease_lost", "identity" => "a:1:x", "new_identity" => "a:1:y",
       "jobs" => [{"jid" => "j1", "job_class" => "A", "queue" => "q", "payload" => "{}"}, {"jid" => nil, "queue" => "q"}]},
      {"kind" => "lease_lost", "identity" => "a:1:y", "new_identity" => "a:1:z", "jobs" => []},
      {"kind" => "warning", "message" => "maxmemory-policy is allkeys-lru"}, {"kind" => "dropped", "count" => 3}, nil
    ).lines(chomp: true)
    expect(lines).to match([
      /\AERROR .*cannot use Redis: connection refused/, /\AINFO .*can use Redis again after 12\.3 s/,
      /\AWARN .*lost the lease of a:1:x, goes on as a:1:y.* j1, -\z/, /\AWARN .*: none\z/,
      /\AWARN ProcessingTracker maxmemory-policy is allkeys-lru\z/, /\AWARN .*could not tell 3 events/
    ])
  end

  it "writes and tells what somebody wants, and nothing else" do
    heard = []
    Sidekiq::ProcessingTracker.on(:recovered) { |event| heard << event.jid }
    logger.level = Logger::WARN
    events = %w[recovered superseded dead].map { |kind| {"kind" => kind, "jid" => kind, "queue" => "q", "from" => "a:1:x", "at" => 1} }
    expect(logged(*events)).to match(/\AWARN .*moved job to the dead set: jid=dead .*\n\z/)
    expect(heard).to eq(["recovered"])
  ensure
    Sidekiq::ProcessingTracker::Listeners.clear
  end

  it "writes to a logger that does not tell its level" do
    lines = []
    plain = Object.new
    %i[debug info warn error].each { |level| plain.define_singleton_method(level) { |text| lines << text } }
    logged({"kind" => "outage_over", "seconds" => 1.0}, to: plain)
    expect(lines).to eq(["ProcessingTracker can use Redis again after 1.0 s"])
  end

  it "survives a logger that raises and an event that makes no sense" do
    raising = Class.new(Logger) do
      def info(*)
        raise "disk full"
      end
    end
    lines = logged({"kind" => "outage_over", "seconds" => 1.0}, {"kind" => "lease_lost"}, {"kind" => "warning", "message" => "next"},
      to: raising.new(output))
    expect(lines).to include("ProcessingTracker next")
  end

  it "survives a logger that raises what is no StandardError, as it raises at every line" do
    raising = Class.new(Logger) do
      def info(*)
        raise Class.new(Exception), "disk full" # rubocop:disable Lint/InheritException
      end
    end
    lines = logged({"kind" => "outage_over", "seconds" => 1.0}, {"kind" => "warning", "message" => "next"}, to: raising.new(output))
    expect(lines).to include("ProcessingTracker next")
  end

  it "lets nothing out of its thread, whatever the engine raises" do
    expect(logged(Class.new(Exception).new("broken"))).to match(/reports no more events: broken/) # rubocop:disable Lint/InheritException
    expect(logged(SystemExit.new(3, "exit"))).to match(/reports no more events: exit \(SystemExit\)/)
  end

  it "says so when the engine itself fails, and ends" do
    expect(logged(Sidekiq::ProcessingTracker::InternalError.new("broken"), {"kind" => "warning", "message" => "never"}))
      .to match(/\AERROR ProcessingTracker reports no more events: broken .*InternalError.*\n\z/)
  end
end
