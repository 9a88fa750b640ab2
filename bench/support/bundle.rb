# frozen_string_literal: true

module Bench
  # The gems of a contender: those of the driver, or a set of its own where it needs another Sidekiq.
  class Bundle
    GEMFILES = File.expand_path("../gemfiles", __dir__)
    GEMS = File.expand_path("../../tmp/bench/gems", __dir__)

    # @param name [String, nil] a file in bench/gemfiles; nil: the driver's own gems
    def initialize(name = nil)
      @name = name
      @ready = nil
    end

    # @return [Hash{String => String, nil}]
    def environment
      return {} if @name.nil? || ENV["BUNDLE_GEMFILE"] == gemfile

      {"BUNDLE_GEMFILE" => gemfile, "BUNDLE_PATH" => ENV.fetch("BENCH_BUNDLE_PATH", GEMS)}
    end

    # Installs what is missing.
    #
    # @return [Boolean] whether it can be used
    def ready?
      return true if environment.empty?

      @ready = %w[check install].any? { |command| bundle(command) } if @ready.nil?
      @ready
    end

    private

    def gemfile
      File.join(GEMFILES, "#{@name}.gemfile")
    end

    def bundle(command)
      system(environment.merge("RUBYOPT" => nil, "RUBYLIB" => nil), "bundle", command, out: File::NULL, err: File::NULL)
    end
  end
end
