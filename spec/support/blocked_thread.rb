# frozen_string_literal: true

require "timeout"

# Interrupts threads that wait in a native call.
module BlockedThread
  # Raised in other threads.
  class Poke < StandardError; end

  # How long an interrupt may take. Generous: it takes a millisecond.
  PROMPT = 1

  module_function

  # Runs the block in a thread; returns when that thread waits.
  #
  # @return [Thread]
  def blocked(&block)
    thread = Thread.new(&block)
    thread.report_on_exception = false
    Eventually.eventually("a wait in the native call") { asleep?(thread) }
    thread
  end

  # Runs the block once the given thread waits.
  #
  # @return [Thread]
  def once_blocked(thread)
    Thread.new do
      Eventually.eventually("a wait in the native call") { asleep?(thread) }
      yield
    end
  end

  # Raises unless the block is done soon.
  #
  # @return [Object] what the block returns
  def promptly(within: PROMPT)
    start = Eventually.now
    result = yield
    took = Eventually.now - start
    raise format("it took %.2f s", took) if took > within

    result
  end

  # Every way to interrupt a thread in a native call. Each raises unless it was prompt and had the effect it should have.
  INTERRUPTS = {
    "Thread#kill" => lambda { |call|
      thread = blocked(&call)
      promptly { thread.kill.join(10) || raise("it goes on") }
      raise "it has ended by itself" unless thread.value.nil?
    },
    "Thread#raise" => lambda { |call|
      thread = blocked(&call)
      thread.raise(Poke)
      promptly { expect_poke { thread.join(10) || raise("it goes on") } }
    },
    "Timeout" => lambda { |call|
      promptly(within: PROMPT + 0.1) { expect_poke { Timeout.timeout(0.1, Poke) { call.call } } }
    },
    "a signal whose trap raises" => lambda { |call|
      signalled(-> { raise Poke }) { expect_poke(&call) }
    }
  }.freeze

  # Sends this process a signal once the calling thread, which has to be the main one, waits in the block. Raises unless
  # the trap runs soon.
  #
  # @param trap [Proc]
  # @return [Object] what the block returns
  def signalled(trap)
    trapped = nil
    before = Signal.trap("USR2") do
      trapped = Eventually.now
      trap.call
    end
    sender = once_blocked(Thread.current) do
      sent = Eventually.now
      Process.kill("USR2", Process.pid)
      Eventually.eventually("the trap") { trapped } - sent
    end
    result = yield
    raise "the trap took long" if sender.value > PROMPT

    result
  ensure
    Signal.trap("USR2", before)
  end

  # A thread that waits for the GVL or a lock is asleep too, but it is not after a moment.
  def asleep?(thread)
    raise "the call has ended by itself: #{thread.value.inspect}" unless thread.alive?

    thread.status == "sleep"
  end

  def expect_poke
    yield
  rescue Poke
    nil
  else
    raise "nothing was raised"
  end
end
