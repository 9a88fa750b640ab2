# frozen_string_literal: true

require "open3"

# Runs Ruby code in a process of its own that has the gem, for what must not touch the process of the specs.
module RubyProcess
  module_function

  # @param code [String]
  # @param env [Hash{String => String, nil}]
  # @param before [String] code that runs before the gem is loaded
  # @return [Array(String, Process::Status)] all output, and the status
  def run_ruby(code, env: {}, before: "", arguments: [])
    script = "#{before}\nrequire \"sidekiq-processing-tracker\"\n#{LeastUser.code}#{code}"
    output, status = Open3.capture2e(env, *Scratch.bound(Gem.ruby, "-I", SidekiqProcess::LIB, "-e", script, *arguments))
    [output.force_encoding(Encoding::UTF_8), status]
  end
end
