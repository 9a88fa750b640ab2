# frozen_string_literal: true

module Bench
  # A `sidekiq` process of a contender.
  class Worker
    APP = File.expand_path("../app", __dir__)

    # @return [OwnProcess]
    attr_reader :process
    # @return [String] path of the file with the lines that its jobs write
    attr_reader :marks_file

    # @param redis [RedisServer]
    # @param contender [Contender]
    # @param queues [Array<String>] as for `sidekiq -q`, like "low,1"
    # @param every [Integer] how many jobs a mark stands for
    # @param gate [String, nil] a file it waits for before it begins
    # @param app [String] a file in bench/app
    # @param timeout [Integer] seconds for which it waits for its jobs when it ends
    # @param env [Hash{String => String, nil}]
    def initialize(redis, contender, threads: 10, queues: ["default"], every: 100, gate: nil, app: "boot.rb", timeout: 25, env: {})
      folder = Scratch.folder
      @contender = contender
      @marks_file = File.join(folder, "marks")
      @position = 0
      @lines = []
      settings = {"REDIS_URL" => redis.url, "REDIS_PROVIDER" => nil, "BENCH_CONTENDER" => contender.file,
                  "BENCH_MARKS" => marks_file, "BENCH_MARK_EVERY" => every.to_s, "PROCESSING_NS" => nil, "PROCESSING_TRACK" => nil,
                  "PROCESSING_FETCH" => nil, "BENCH_GATE" => gate, "RAILS_ENV" => nil, "RACK_ENV" => nil,
                  "DYNO" => nil}.merge(env)
      @process = OwnProcess.new(Gem.ruby, "-rbundler/setup", "-I", contender.lib, File.join(APP, "sidekiq.rb"), "-r", File.join(APP, app),
        "-e", "production", "-c", threads.to_s, "-t", timeout.to_s, *queues.flat_map { |queue| ["-q", queue] },
        log: File.join(folder, "sidekiq.log"), env: settings.merge(contender.bundle.environment), chdir: folder)
    end

    def pid = process.pid

    def kill = process.kill

    # @return [Array<String>] the lines its jobs have written so far
    def lines
      raise "#{@contender.name} has ended:\n#{process.output}" unless process.running?
      return @lines unless File.exist?(marks_file)

      text = File.binread(marks_file, nil, @position)
      whole = text[/\A.*\n/m].to_s
      @position += whole.bytesize
      @lines.concat(whole.lines(chomp: true))
    end

    # @return [Array<Array(Integer, Float)>] how many jobs were done, and when
    def marks
      lines.map { |line|
        count, time = line.split
        [Integer(count), Float(time)]
      }.sort
    end

    # @return [Integer] how many jobs were done, as far as marks tell
    def done
      # Threads that write at once may do so out of order.
      lines.last(100).map(&:to_i).max || 0
    end

    # What the processes of a contender have on record as running.
    #
    # @param client [RedisClient]
    # @return [Integer]
    def self.in_flight(client, contender)
      return 0 unless contender.records

      # Without our lists of large payloads, which the hash counts too.
      client.call("KEYS", contender.records).grep_v(/:inflight:.*:\d+-\d+\z/).sum do |key|
        case client.call("TYPE", key)
        when "list" then client.call("LLEN", key)
        when "set" then client.call("SCARD", key)
        when "hash" then [client.call("HLEN", key) - 1, 0].max
        else 0
        end
      end
    end

    # Returns when so many processes have told Redis of themselves.
    #
    # @param client [RedisClient]
    def self.wait_for_boot(client, contender, count)
      Eventually.eventually("the boot of #{count} x #{contender.name}", within: 120) { client.call("SCARD", "processes") >= count }
    end
  end
end
