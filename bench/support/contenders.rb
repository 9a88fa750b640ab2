# frozen_string_literal: true

module Bench
  # One way to fetch jobs.
  class Contender
    LIB = File.expand_path("../../lib", __dir__)
    # Another checkout of this gem, built, to be compared with this one.
    OTHER = ENV["BENCH_OTHER"] && File.expand_path("lib", ENV["BENCH_OTHER"])

    # Asks the gem itself, in a process of its own.
    PROBE = <<~RUBY
      require "sidekiq-processing-tracker"
      exit ARGV.all? { |setter| Sidekiq::ProcessingTracker::Configuration.method_defined?(setter) }
    RUBY

    @told = []

    class << self
      # @param keys [Array<Symbol>]
      # @return [Array<Contender>] those that can run; of the others a line tells why not, once
      def usable(keys)
        wanted = ALL.fetch_values(*keys)
        wanted.select(&:missing).each do |contender|
          warn "   without #{contender.name}: #{contender.missing}" unless @told.include?(contender)
          @told |= [contender]
        end
        wanted.reject(&:missing)
      end
    end

    # @return [Symbol]
    attr_reader :key
    # @return [String] for people
    attr_reader :name
    # @return [Bundle]
    attr_reader :bundle
    # @return [String, nil] pattern of the keys in which it keeps what it has in flight
    attr_reader :records
    # @return [Symbol] what it is compared with: stock Sidekiq of the same version
    attr_reader :baseline

    # @return [Float] the share of a scenario's jobs that it runs: the slow ones run fewer, or they would take most of the time
    attr_reader :share

    # @param needs [Array<String>, nil] setters that this gem must have; nil where the gem is not used at all
    def initialize(key, name, file: key, bundle: OWN, records: nil, baseline: :stock, share: 1.0, needs: nil, lib: LIB)
      @key = key
      @name = name
      @file = file
      @bundle = bundle
      @records = records
      @baseline = baseline
      @share = share
      @needs = needs
      @lib = lib
    end

    # @return [String] the name of its file in bench/app/contenders
    def file = @file.to_s

    # @return [String, nil] the folder from which it loads this gem
    attr_reader :lib

    # @return [String, nil] why it cannot run here
    def missing
      return @missing if defined?(@missing)

      @missing = if lib.nil? then "BENCH_OTHER does not say where it is"
      elsif !bundle.ready? then "its gems cannot be installed here"
      elsif !probe then "this gem is not built here, or does not have it"
      end
    end

    private

    def probe
      return true unless @needs

      system(bundle.environment, Gem.ruby, "-rbundler/setup", "-I", lib, "-e", PROBE, *@needs, out: File::NULL, err: File::NULL)
    end

    OWN = Bundle.new
    SIX = Bundle.new("sidekiq_6")
    SEVEN = Bundle.new("sidekiq_7")
    EIGHT = Bundle.new("sidekiq_8")
    OURS = "sidekiq_processing:inflight:*"

    ALL = [
      new(:stock, "stock Sidekiq"),
      new(:native, "this gem, native fetch", records: OURS, needs: ["fetch="]),
      new(:middleware, "this gem, middleware mode", records: OURS, share: 0.5, needs: []),
      new(:other, "another build of this gem, native fetch", file: :native, records: OURS, needs: ["fetch="], lib: OTHER),
      new(:other_middleware, "another build of this gem, middleware mode", file: :middleware, records: OURS, share: 0.5, needs: ["fetch="], lib: OTHER),
      new(:lmove, "LMOVE/LREM fetch in Ruby", records: "bench:working:*", share: 0.7),
      new(:ruby, "tracking middleware in Ruby", records: "sidekiq_processing:jobs:*", share: 0.4),
      new(:stock_6, "stock Sidekiq 6.5", file: :stock, bundle: SIX, baseline: :stock_6),
      new(:native_6, "this gem, native fetch (6.5)", file: :native, bundle: SIX, baseline: :stock_6, records: OURS, needs: ["fetch="]),
      new(:gitlab, "gitlab-sidekiq-fetcher (6.5)", bundle: SIX, baseline: :stock_6, records: "working:queue:*", share: 0.7),
      new(:assured, "sidekiq-assured-jobs (6.5)", bundle: SIX, baseline: :stock_6, records: "sidekiq_assured_jobs:jobs:*", share: 0.3),
      new(:stock_7, "stock Sidekiq 7.3", file: :stock, bundle: SEVEN, baseline: :stock_7),
      new(:native_7, "this gem, native fetch (7.3)", file: :native, bundle: SEVEN, baseline: :stock_7, records: OURS, needs: ["fetch="]),
      new(:power, "sidekiq-power-fetch (7.3)", bundle: SEVEN, baseline: :stock_7, records: "working:queue:*", share: 0.7),
      new(:solid, "sidekiq_solid_fetch (7.3)", bundle: SEVEN, baseline: :stock_7, records: "sidekiq_solid_fetch:processing:*", share: 0.5),
      new(:stock_8, "stock Sidekiq 8.1", file: :stock, bundle: EIGHT, baseline: :stock_8),
      new(:native_8, "this gem, native fetch (8.1)", file: :native, bundle: EIGHT, baseline: :stock_8, records: OURS, needs: ["fetch="]),
      new(:unique_jobs, "sidekiq-unique-jobs 9 fetch (8.1)", bundle: EIGHT, baseline: :stock_8, records: "uniquejobs:working:*", share: 0.5)
    ].to_h { |contender| [contender.key, contender] }.freeze
  end
end
