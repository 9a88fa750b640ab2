# shellcheck shell=bash
# What a report of tests sums up to, as "passed failed skipped". Sourced by bin/test and matrix/run.

# The sum over cargo's lines "test result: ok. 1 passed; 0 failed; 0 ignored; …": passed, failed, ignored.
cargo_sums() {
  sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored;.*/\1 \2 \3/p' "$1" |
    awk '{p += $1; f += $2; i += $3} END {print p + 0, f + 0, i + 0}'
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
