# frozen_string_literal: true

require "fileutils"

# What a GatedJob waits for: a file, which is there for every process alike and needs no Redis.
class Gate
  # @return [String] the job's first argument
  attr_reader :path

  def initialize
    @path = File.join(Scratch.folder, "gate")
  end

  # Lets all jobs end that wait for this gate, or those in one process only.
  #
  # @param process [AppProcess, nil]
  # @return [self]
  def open(process = nil)
    FileUtils.touch([path, process&.pid].compact.join("."))
    self
  end
end
