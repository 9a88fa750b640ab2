# frozen_string_literal: true

require "etc"
require "fileutils"
require "json"
require "socket"
require "time"

module Bench
  # What a benchmark has measured: for each scenario and contender a list of values of each metric, one a round.
  class Results
    # @return [String]
    attr_reader :name
    # @return [Hash]
    attr_reader :environment, :settings
    # @return [String] when, in ISO 8601
    attr_reader :at

    # @param file [String] a JSON file that {#write} has written
    # @return [Results]
    def self.read(file)
      data = JSON.parse(File.read(file), symbolize_names: true)
      new(data[:bench], settings: data[:settings], environment: data[:environment], at: data[:at]).tap do |results|
        data[:scenarios].each do |scenario|
          scenario[:contenders].each do |contender|
            contender[:rounds].each { |round| results.add(scenario[:title], contender[:key].to_sym, round) }
          end
        end
      end
    end

    def initialize(name, settings:, environment: Results.environment, at: Time.now.utc.round.iso8601)
      @name = name
      @settings = settings
      @environment = environment
      @at = at
      @rounds = {}
    end

    # @param scenario [String] its title
    # @param contender [Symbol]
    # @param round [Hash{Symbol => Numeric}]
    def add(scenario, contender, round)
      ((@rounds[scenario] ||= {})[contender] ||= []) << round
    end

    # @return [Array<String>]
    def scenarios = @rounds.keys

    # @return [Array<Contender>]
    def contenders(scenario)
      Contender::ALL.values_at(*@rounds.fetch(scenario).keys)
    end

    # @return [Array<Numeric>] one a round
    def values(scenario, contender, metric)
      @rounds.fetch(scenario).fetch(contender.key, []).filter_map { |round| round[metric] }
    end

    # The ratio to the baseline's run of the same round.
    #
    # @return [Array<Float>] one a round
    def ratios(scenario, contender, metric)
      baseline = Contender::ALL.fetch(contender.baseline)
      values(scenario, contender, metric).zip(values(scenario, baseline, metric)).filter_map do |value, base|
        value / Float(base) if base&.nonzero?
      end
    end

    # Takes over the figures of scenarios that were not measured this time, from the file of an earlier run.
    #
    # @param folder [String]
    # @return [void]
    def complete(folder)
      json = File.join(folder, "#{name}.json")
      @rounds = Results.read(json).rounds.merge(@rounds) if File.exist?(json)
    end

    # @param folder [String]
    # @return [Array<String>] the files
    def write(folder)
      FileUtils.mkdir_p(folder)
      json = File.join(folder, "#{name}.json")
      File.write(json, "#{JSON.pretty_generate(to_h)}\n")
      charts = View.for(self).charts.map do |file, svg|
        File.join(folder, "#{file}.svg").tap { |path| File.write(path, svg) }
      end
      [json, *charts]
    end

    # @return [Hash]
    def to_h
      {
        bench: name, at: @at, environment: environment, settings: settings,
        scenarios: @rounds.map do |title, contenders|
          {title: title, contenders: contenders.map { |key, rounds| {key: key, name: Contender::ALL.fetch(key).name, rounds: rounds} }}
        end
      }
    end

    # @return [Hash{String => Hash}] of each scenario, by its title
    attr_reader :rounds
    protected :rounds

    # @return [Hash{Symbol => Object}] what the figures depend on
    def self.environment
      {
        Ruby: RUBY_VERSION,
        Sidekiq: Gem.loaded_specs["sidekiq"]&.version.to_s,
        Redis: `redis-server --version`[/v=(\S+)/, 1],
        cores: Etc.nprocessors,
        processor: (File.read("/proc/cpuinfo")[/^model name\s*:\s*(.+)$/, 1] if File.exist?("/proc/cpuinfo")),
        load: (Float(File.read("/proc/loadavg").split.first) if File.exist?("/proc/loadavg"))
      }.compact
    end
  end
end
