# frozen_string_literal: true

module Bench
  # How the results of a benchmark are shown: which columns, which plots.
  class View
    # Of one metric: its values, or its ratios to the baseline.
    Column = Struct.new(:title, :metric, :kind, :digits, :factor) do
      # @return [String, nil] the median of the rounds, and the least and the greatest
      def text(results, scenario, contender)
        values = (kind == :ratio) ? results.ratios(scenario, contender, metric) : results.values(scenario, contender, metric)
        return "" if values.empty?

        values = values.map { |value| value * factor }
        unit = "×" if kind == :ratio
        return "#{number(Figures.median(values))}#{unit}" if kind == :plain || values.one?

        "#{number(Figures.median(values))}#{unit} (#{number(values.min)}–#{number(values.max)})"
      end

      private

      def number(value)
        text = format("%.#{digits}f", value)
        text.sub(/\A-?\d+/) { |whole| whole.gsub(/(?<=\d)(?=(\d{3})+\z)/, ",") }
      end
    end

    # A plot: of one column's figures, in these scenarios (nil: all).
    Plot = Struct.new(:file, :title, :note, :column, :scenarios, :reference)

    def self.value(title, metric, digits: 0, factor: 1) = Column.new(title, metric, :value, digits, factor)

    def self.ratio(title, metric) = Column.new(title, metric, :ratio, 2, 1)

    # Only the median: where the spread says nothing.
    def self.plain(title, metric, digits: 0, factor: 1) = Column.new(title, metric, :plain, digits, factor)

    SPEED = [
      value("jobs/s", :rate), ratio("to stock", :rate),
      value("Redis CPU, µs/job", :redis_cpu, digits: 1, factor: 1e6), ratio("to stock", :redis_cpu),
      plain("requests/job", :requests, digits: 2), plain("commands/job", :commands, digits: 2),
      plain("process CPU, µs/job", :process_cpu, factor: 1e6), plain("RSS, MB", :rss, digits: 1),
      plain("connections", :connections)
    ].freeze

    COLUMNS = {
      "throughput" => SPEED,
      "peers" => SPEED,
      "latency" => [
        value("p50, µs", :p50, factor: 1e6), ratio("to stock", :p50),
        value("p99, µs", :p99, factor: 1e6), ratio("to stock", :p99)
      ],
      "idle" => [
        value("Redis requests/s", :requests, digits: 2), value("commands/s", :commands, digits: 2),
        value("Redis CPU, %", :redis_cpu, digits: 2, factor: 100), value("process CPU, %", :process_cpu, digits: 2, factor: 100),
        plain("RSS, MB", :rss, digits: 1), plain("connections", :connections)
      ],
      "recovery" => [
        value("seconds", :seconds, digits: 2), value("jobs/s", :rate), value("Redis CPU, s", :redis_cpu, digits: 2),
        value("RSS growth, MB", :growth, digits: 1)
      ],
      "scheduler" => [
        value("jobs/s", :rate), ratio("to stock", :rate),
        value("Redis CPU, µs/job", :redis_cpu, digits: 1, factor: 1e6), ratio("to stock", :redis_cpu),
        plain("requests/job", :requests, digits: 3), plain("commands/job", :commands, digits: 2),
        value("process CPU, µs/job", :process_cpu, digits: 1, factor: 1e6)
      ],
      "chaos" => [
        plain("jobs", :jobs), plain("kill -9", :kills), plain("TERM", :terms), plain("SIGSTOP", :stops), plain("Redis troubles", :troubles),
        plain("lost", :lost), plain("poison pills", :pills), plain("in flight at kills", :orphans_killed),
        plain("at lost leases", :orphans_stopped), plain("at TERM", :orphans_ended), plain("dropped by threads", :orphans_dropped),
        plain("put back at TERM", :put_back), plain("started again", :again), plain("ended twice", :twice), plain("unexplained", :wrongs)
      ],
      "wire" => [value("bytes to Redis a job", :bytes_in), value("bytes from Redis a job", :bytes_out)],
      "fleet" => [
        value("share of a Redis core, %", :share, digits: 2, factor: 100), value("beats/s", :beats),
        value("Redis CPU a beat, µs", :beat_cpu, digits: 1, factor: 1e6),
        value("a death with 10 jobs, µs", :reap_cpu, factor: 1e6), plain("connections alone, %", :idle, digits: 2, factor: 100)
      ]
    }.freeze

    PLOTS = {
      "throughput" => [
        Plot.new("throughput", "No-op jobs a second", "Sidekiq 7.3, one queue, 10 threads. Median, least and greatest of the rounds.",
          value("jobs/s", :rate), ["one queue"], nil),
        Plot.new("throughput-scenarios", "Jobs a second, as a multiple of stock Sidekiq",
          "Sidekiq 7.3. Median, least and greatest ratio of the rounds.", ratio("to stock", :rate), nil, 1.0)
      ],
      "peers" => [
        Plot.new("peers", "No-op jobs a second, as a multiple of stock Sidekiq of the same version",
          "One queue, 10 threads. Median, least and greatest ratio of the rounds.", ratio("to stock", :rate), nil, 1.0)
      ],
      "latency" => [
        Plot.new("latency", "From the push to the job's start, idle processes: p50 in µs", "Median, least and greatest of the rounds.",
          value("p50", :p50, factor: 1e6), nil, nil)
      ],
      "recovery" => [
        Plot.new("recovery", "100,000 orphans of 1,000 dead processes: seconds until all are back", "By one process. Median, least and greatest of the rounds.",
          value("seconds", :seconds, digits: 2), nil, nil)
      ]
    }.freeze

    # @param results [Results]
    # @return [View]
    def self.for(results)
      new(results, COLUMNS.fetch(results.name), PLOTS.fetch(results.name, []))
    end

    def initialize(results, columns, plots)
      @results = results
      @columns = columns
      @plots = plots
    end

    # To the terminal, a table for each scenario.
    def print
      @results.scenarios.each do |scenario|
        rows = [["", *@columns.map(&:title)], *rows_of(scenario)]
        widths = rows.transpose.map { |cells| cells.map(&:size).max }
        puts "", scenario
        rows.each { |first, *others| puts [first.ljust(widths[0]), *others.zip(widths.drop(1)).map { |cell, width| cell.rjust(width) }].join("  ").rstrip }
      end
    end

    # @param only [String, nil] a scenario
    # @return [String] one table in Markdown
    def markdown(only = nil)
      lines = [["", "", *@columns.map(&:title)], ["---", "---", *@columns.map { "---:" }]]
      @results.scenarios.select { |scenario| only.nil? || scenario == only }.each do |scenario|
        rows_of(scenario).each_with_index { |row, i| lines << [i.zero? ? scenario : "", *row] }
      end
      lines.map { |cells| "| #{cells.join(" | ")} |\n" }.join
    end

    # @return [Hash{String => String}] file name without ending => SVG
    def charts
      @plots.to_h { |plot| [plot.file, chart(plot)] }.compact
    end

    private

    def rows_of(scenario)
      @results.contenders(scenario).map do |contender|
        [contender.name, *@columns.map { |column| column.text(@results, scenario, contender) }]
      end
    end

    def chart(plot)
      groups = (plot.scenarios || @results.scenarios).filter_map do |scenario|
        next unless @results.scenarios.include?(scenario)

        bars = bars_of(scenario, plot.column)
        Chart::Group.new((scenario unless @results.scenarios.one? || plot.scenarios&.one?), bars) if bars.any?
      end
      Chart.new(plot.title, plot.note, groups, reference: plot.reference).to_svg if groups.any?
    end

    def bars_of(scenario, column)
      @results.contenders(scenario).filter_map do |contender|
        ratio = column.kind == :ratio
        # The baseline is the line.
        next if ratio && contender.key == contender.baseline

        values = ratio ? @results.ratios(scenario, contender, column.metric) : @results.values(scenario, contender, column.metric)
        figures = Figures.summary(values.map { |value| value * column.factor })
        next unless figures[:median]

        label = ratio ? format("%.2f×", figures[:median]) : format("%.#{column.digits}f", figures[:median]).gsub(/(?<=\d)(?=(\d{3})+\z)/, ",")
        Chart::Bar.new(contender.name, *figures.values, label, contender.key.to_s[/\A[a-z]+/].to_sym)
      end
    end
  end
end
