# shellcheck shell=bash
# What a report of tests sums up to, as "passed failed skipped", and what failed in it. Sourced by bin/test and matrix/run.

# The sum over cargo's lines "test result: ok. 1 passed; 0 failed; 0 ignored; …; 0 filtered out": passed, failed, and what
# was ignored or left out by name.
cargo_sums() {
  sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored;.* \([0-9]*\) filtered out.*/\1 \2 \3 \4/p' "$1" |
    awk '{p += $1; f += $2; i += $3 + $4} END {print p + 0, f + 0, i + 0}'
}

# The same of an RSpec report; an error outside of the examples counts as a failure.
rspec_sums() {
  ruby -rjson -e '
    sums = JSON.parse(File.read(ARGV[0])).fetch("summary")
    failed = sums["failure_count"]
    pending = sums["pending_count"]
    puts [sums["example_count"] - failed - pending, failed + sums["errors_outside_of_examples_count"], pending].join(" ")
  ' "$1" 2>/dev/null
}

# The names of the tests that failed, a line each.
cargo_failed() { sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$1"; }

# The ids of the examples that failed, a line each. Nothing where there were errors outside of examples.
rspec_failed() {
  ruby -rjson -e '
    report = JSON.parse(File.read(ARGV[0]).scrub)
    exit if report.fetch("summary")["errors_outside_of_examples_count"].to_i > 0
    report.fetch("examples").each { |example| puts example.fetch("id") if example["status"] == "failed" }
  ' "$1" 2>/dev/null
}

# Each test that failed, by its file and name, with the first lines of what it printed. Nothing where none did: a build that
# broke, say, whose last lines it is then.
cargo_failures() {
  ruby -EUTF-8 -e '
    file = nil
    failed = Hash.new { |all, name| all[name] = [] }
    said = nil
    lines = File.readlines(ARGV[0], chomp: true).map(&:scrub)
    lines.each do |line|
      case line
      when /^ +Running (?:unittests )?(\S+) \(/, /^ +(Doc-tests \S+)/ then file, said = $1, nil
      when /^test (.+) \.\.\. FAILED/ then failed["#{file}: #{$1}"]
      when /^---- (.+) stdout ----$/ then said = failed["#{file}: #{$1}"]
      when /^failures:$/ then said = nil
      else said&.push(line)
      end
    end
    failed.each do |name, text|
      puts name, text.reject { |line| line.strip.empty? }.first(6).map { |line| "    #{line[0, 240]}" }
    end
    puts lines.reject { |line| line.strip.empty? }.last(6) if failed.empty?
  ' "$1" 2>/dev/null || echo "no report"
}

# The same of an RSpec report: also where in the specs it failed, and errors outside of the examples.
rspec_failures() {
  ruby -EUTF-8 -rjson -e '
    report = JSON.parse(File.read(ARGV[0]).scrub)
    lines = ->(text) { text.to_s.gsub(/\e\[[\d;]*m/, "").lines(chomp: true).reject { |line| line.strip.empty? }.first(8).map { |line| "    #{line[0, 240]}" } }
    report.fetch("examples").select { |example| example["status"] == "failed" }.each do |example|
      error = example["exception"] || {}
      here = Array(error["backtrace"]).map { |frame| frame[%r{spec/.+?:\d+}] }.compact
      puts "#{example["file_path"]}:#{example["line_number"]}  #{example["full_description"]}",
        lines.call("#{error["class"]}: #{error["message"].to_s.strip}"), *("    at #{here.uniq.first(4).join(", ")}" if here.any?)
    end
    errors = report.fetch("summary")["errors_outside_of_examples_count"].to_i
    puts Array(report["messages"]).flat_map { |message| lines.call(message) } if errors > 0
    puts "    (with --seed #{report["seed"]})" if report["seed"]
  ' "$1" 2>/dev/null || echo "no report: the run broke off"
}
