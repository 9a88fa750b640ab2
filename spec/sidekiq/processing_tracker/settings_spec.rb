# frozen_string_literal: true

RSpec.describe Sidekiq::ProcessingTracker::Settings do
  let(:config) { Sidekiq::ProcessingTracker::Configuration.new }
  let(:sidekiq) { SidekiqConfig.current }

  # Nothing is there, which is not refused: it may be away for a moment only.
  def built
    places = described_class::Places.new(Sidekiq::ProcessingTracker::RedisSettings.from_options("redis://127.0.0.1:1"), nil)
    described_class.build(config, places: places, passwords: Sidekiq::ProcessingTracker::Passwords.new)
  end

  after { sidekiq.merge!(dead_max_jobs: 10_000, dead_timeout_in_seconds: 15_552_000) }

  it "has what decides on orphans, and Sidekiq's limits of the dead set" do
    expect(built).to include(track_all: false, max_recoveries: 3, recovery_window_ms: 259_200_000, dead_max_jobs: 10_000,
      dead_timeout_ms: 15_552_000_000, timestamps: (Sidekiq::VERSION.to_i < 8) ? "seconds" : "milliseconds")
    config.track = :all
    config.max_recoveries = nil
    config.recovery_window = 60
    sidekiq.merge!(dead_max_jobs: 5, dead_timeout_in_seconds: 1.5)
    expect(built).to include(track_all: true, max_recoveries: nil, recovery_window_ms: 60_000, dead_max_jobs: 5, dead_timeout_ms: 1500)
  end

  ["5", nil, -1, Float::INFINITY].each do |value|
    it "refuses #{value.inspect} as Sidekiq's limit" do
      sidekiq[:dead_max_jobs] = value
      expect { built }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /\ASidekiq's dead_max_jobs is #{Regexp.escape(value.inspect)}: allowed is/)
    end
  end
end
