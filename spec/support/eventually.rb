# frozen_string_literal: true

# Waits for something that other processes do. A wait has a deadline and says what it waited for.
module Eventually
  PAUSE = 0.02

  module_function

  # @param what [String] for the message
  # @param within [Numeric] seconds
  # @yieldreturn [Object] truthy when it is there
  # @return [Object] what the block returned
  # @raise [RuntimeError] when the deadline has passed
  def eventually(what = "it", within: 15)
    deadline = now + within
    loop do
      result = yield
      return result if result
      raise "#{what} did not happen within #{within} s" if now > deadline

      sleep PAUSE
    end
  end

  # Lets time pass, where the time itself is what an example is about. Never to wait for something: see {eventually}.
  #
  # @param seconds [Numeric]
  # @return [void]
  def let_pass(seconds)
    sleep(seconds)
  end

  # @return [Float] seconds on a clock that only goes forward
  def now
    Process.clock_gettime(Process::CLOCK_MONOTONIC)
  end
end
