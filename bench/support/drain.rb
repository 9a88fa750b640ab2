# frozen_string_literal: true

module Bench
  # One run of one contender: so many jobs wait when its processes start, and it is measured how fast they are done.
  class Drain
    # What the jobs are, and under which circumstances they run.
    Scenario = Struct.new(:title, :job, :args, :jobs, :queues, :shares, :threads, :processes, :every, keyword_init: true) do
      def initialize(job: "NoopJob", args: [], jobs: 60_000, queues: ["default"], shares: [1], threads: 10, processes: 1, every: 100, **rest)
        super
      end

      # @return [Array<String>] names without weights
      def names = queues.map { |queue| queue.split(",").first }
    end

    # How much of the jobs is done before the clock starts: by then all is loaded and connected.
    WARM_UP = 0.15
    SLICE = 500
    # So many jobs that some are seen while they run.
    ENOUGH = 2_000
    # Seconds.
    PAUSE = 0.01
    PATIENCE = 180

    # @param redis [RedisServer]
    # @param contender [Contender]
    # @param scenario [Scenario]
    # @param jobs [Integer]
    def initialize(redis, contender, scenario, jobs:)
      @redis = redis
      @contender = contender
      @scenario = scenario
      @jobs = jobs
      @every = (jobs / 40 / scenario.processes).clamp(1, scenario.every)
      @records = 0
      @connections = 0
    end

    # @return [Hash{Symbol => Numeric}] jobs a second; what a job costs; memory and connections
    def measure
      @redis.with(timeout: 60) do |client|
        client.call("FLUSHALL")
        fill(client)
        start
        # In between nothing is asked of Redis: what it does is the contender's.
        wait_for(@jobs * WARM_UP) { look(client) }
        before, done_before = meter(client)
        wait_for([@jobs * 0.97, most].min)
        after, done_after = meter(client)
        memory = @workers.sum { |worker| Meter.memory(worker.pid) }
        wait_for(most)
        check
        per_job(after.since(before), done_after - done_before).merge(rate: rate, rss: memory, connections: @connections)
      end
    ensure
      @workers&.each(&:kill)
    end

    private

    # Several processes wait for each other.
    def start
      gate = File.join(Scratch.folder, "gate") if @scenario.processes > 1
      @workers = Array.new(@scenario.processes) do
        Worker.new(@redis, @contender, threads: @scenario.threads, queues: @scenario.queues, every: @every, gate: gate)
      end
      return unless gate

      Eventually.eventually("the boot of #{@contender.name}", within: PATIENCE) { @workers.none? { |worker| worker.lines.empty? } }
      FileUtils.touch(gate)
    end

    # @return [Integer] as many jobs as marks are sure to tell of
    def most = @jobs - @scenario.processes * (@every - 1)

    def fill(client)
      total = Float(@scenario.shares.sum)
      sizes = @scenario.shares.map { |share| (@jobs * share / total).floor }
      sizes[0] += @jobs - sizes.sum
      @scenario.names.zip(sizes).each do |queue, size|
        client.call("SADD", "queues", queue)
        slice = [SLICE, 8_000_000 / payload(queue).bytesize].min
        (1..size).each_slice(slice) { |part| client.call("LPUSH", "queue:#{queue}", *part.map { payload(queue) }) }
      end
    end

    def payload(queue)
      Queues.payload(@scenario.job, *@scenario.args, queue: queue, processing: true, assured_jobs: true)
    end

    def wait_for(jobs)
      Eventually.eventually("#{jobs.round} jobs (#{@contender.name})", within: PATIENCE) do
        yield if block_given?
        @workers.sum(&:done) >= jobs || (sleep(PAUSE) && false)
      end
    end

    def look(client)
      @records = [@records, Worker.in_flight(client, @contender)].max
      @connections = [@connections, client.call("CLIENT", "LIST").lines.size - 1].max
    end

    # The jobs done are those of the middle of the call.
    def meter(client)
      before = @workers.sum(&:done)
      meter = Meter.new(client, @workers.map(&:pid))
      [meter, (before + @workers.sum(&:done)) / 2.0]
    end

    def per_job(used, jobs)
      return {} unless jobs.positive? # in a quick run all may be done before the first look

      used.slice(:redis_cpu, :requests, :commands, :process_cpu).transform_values { |value| value / jobs }
    end

    # A contender that does not keep what it runs would win. A few jobs may be over before anybody looks.
    def check
      return if @jobs < ENOUGH || @records.positive? != @contender.records.nil?

      raise "#{@contender.name} has kept #{@records} jobs at most: it does not do what it is measured for"
    end

    # From the moment when all processes are warm to the moment when the first of them has no more to do.
    #
    # @return [Float] jobs a second
    def rate
      marks = @workers.map(&:marks)
      share = @jobs * WARM_UP / @workers.size
      first = marks.map { |list| (list.find { |count, _| count >= share } || list.last).last }.max
      last = marks.map { |list| list.last.last }.min
      done = marks.sum { |list| done_at(list, last) - done_at(list, first) }
      done / (last - first)
    end

    # Between two marks as many as the time between them tells.
    def done_at(list, time)
      after = list.index { |_, at| at >= time } || list.size - 1
      count, at = list[after]
      return count.to_f if after.zero? || at <= time

      count_before, at_before = list[after - 1]
      count_before + (count - count_before) * (time - at_before) / (at - at_before)
    end
  end
end
