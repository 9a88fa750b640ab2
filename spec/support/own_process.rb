# frozen_string_literal: true

# A process that an example has started, with its output in a file. It does not outlive the example.
class OwnProcess
  # @return [Integer, nil] nil once it has ended
  attr_reader :pid
  # @return [Process::Status, nil] once it has ended
  attr_reader :status

  # @param command [Array<String>]
  # @param log [String] path of the file for stdout and stderr
  # @param env [Hash{String => String, nil}]
  # @param chdir [String]
  def initialize(*command, log:, env: {}, chdir: Dir.pwd)
    @log = log
    @pid = Process.spawn(env, *Scratch.bound(*command), out: [log, "a"], err: %i[child out], in: File::NULL, chdir: chdir)
    Scratch.undo { finish }
  end

  # @param name [Symbol, String] like :TERM
  # @return [self]
  def signal(name)
    Process.kill(name, pid) if pid
    self
  end

  # kill -9, and no trace of it in the process table.
  #
  # @return [Process::Status]
  def kill
    signal(:KILL)
    wait
  end

  # SIGSTOP. Returns when it stands still: on a busy machine its threads go on for some milliseconds, and take a job or
  # answer a command meanwhile.
  #
  # @return [self]
  def pause
    signal(:STOP)
    Eventually.eventually("the stop of process #{pid}") { reap(Process::WUNTRACED) } if pid
    self
  end

  # @return [self]
  def resume = signal(:CONT)

  def running? = !reap

  # @param within [Numeric] seconds
  # @return [Process::Status]
  def wait(within: 30)
    Eventually.eventually("the end of process #{pid}", within: within) { reap }
  end

  # @return [String] all output so far
  def output
    File.exist?(@log) ? File.read(@log, encoding: "UTF-8").scrub : ""
  end

  private

  def reap(flags = 0)
    return status unless pid
    return unless Process.wait(pid, Process::WNOHANG | flags)
    return $? if $?.stopped?

    @status = $?
    @pid = nil
    status
  end

  def finish
    kill if running?
  end
end
