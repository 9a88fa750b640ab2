# frozen_string_literal: true

require "optparse"

module Bench
  # What a benchmark is told on its command line.
  class Arguments
    # @return [Array<String>] which scenarios to run
    attr_reader :scenarios
    # @return [Integer]
    attr_reader :rounds
    # @return [Float] what numbers of jobs are multiplied by
    attr_reader :scale
    # @param name [String] of the benchmark
    # @param known [Hash] what there is to choose from. `options`: adds those of this benchmark alone to an OptionParser
    # @return [Arguments]
    def self.parse(name, **known)
      new(name, **known).tap { |arguments| arguments.send(:parse, ARGV.dup) }
    rescue OptionParser::ParseError => error
      abort "#{name}: #{error.message}. #{name} --help lists what there is."
    end

    def initialize(name, scenarios:, contenders:, rounds: 5, options: nil)
      @name = name
      @known = @scenarios = scenarios
      @contenders = contenders
      @chosen = false
      @rounds = rounds
      @options = options
      @scale = 1.0
      @quick = false
      @out = nil
    end

    # @return [String] folder for the JSON file and the plot: what a quick run writes must not replace real figures
    def out
      @out || File.expand_path(quick? ? "../../tmp/bench/quick" : "../../tmp/bench", __dir__)
    end

    # @return [Boolean] whether it is only to be seen that everything runs
    def quick? = @quick

    # @return [Boolean] whether there are other scenarios, whose figures of an earlier run are to stay
    def partial? = @scenarios != @known

    # @param usual [Array<Symbol>] those of the scenario
    # @return [Array<Contender>] those that can run, of those that were asked for
    def contenders(usual = @contenders)
      keys = @chosen ? @contenders : usual
      Contender.usable(keys)
    end

    # @param jobs [Integer] of a scenario
    # @param contender [Contender]
    # @return [Integer] as many as are to be run, a multiple of a hundred
    def jobs(jobs, contender)
      [(jobs * @scale * contender.share / 100).round, 1].max * 100
    end

    # @return [Hash]
    def to_h
      {rounds: rounds, scale: scale, quick: quick?, scenarios: scenarios}
    end

    private

    def parse(words)
      parser.parse!(words)
      raise OptionParser::InvalidArgument, words.join(" ") if words.any?
      return unless quick?

      @rounds = 1
      @scale = 0.01
    end

    def parser
      OptionParser.new do |options|
        options.banner = "Usage: bench/#{@name} [options]"
        options.on("--scenarios LIST", Array, "of: #{@known.join(",")}; the others keep their figures") { |list| @scenarios = among(@known, list) }
        options.on("--contenders LIST", Array, "of: #{Contender::ALL.keys.join(",")}") do |list|
          @contenders = among(Contender::ALL.keys.map(&:to_s), list).map(&:to_sym)
          @chosen = true
        end
        options.on("--rounds N", Integer, "default #{@rounds}") { |rounds| @rounds = [rounds, 1].max }
        options.on("--scale FACTOR", Float, "of the numbers of jobs, default 1.0") { |factor| @scale = factor }
        options.on("--quick", "a few seconds, to see that it runs: its figures mean nothing") { @quick = true }
        options.on("--out FOLDER", "default tmp/bench") { |folder| @out = File.expand_path(folder) }
        @options&.call(options)
      end
    end

    def among(known, list)
      unknown = list - known
      raise OptionParser::InvalidArgument, unknown.join(",") if unknown.any?

      list
    end
  end
end
