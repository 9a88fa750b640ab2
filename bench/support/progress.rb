# frozen_string_literal: true

module Bench
  # Tells where a benchmark is: on a terminal one line that changes, elsewhere a line for each step.
  class Progress
    CLEAR = "\r\e[K"

    def initialize(out = $stderr)
      @out = out
      @began = Eventually.now
    end

    # @param text [String] what is done now
    def step(text)
      line = format("%<seconds>6.1f s  %<text>s", seconds: Eventually.now - @began, text: text)
      @out.tty? ? @out.print(CLEAR, line[0, width]) : @out.puts(line)
    end

    # Ends the line that changes.
    def clear
      @out.print(CLEAR) if @out.tty?
    end

    private

    def width
      require "io/console"
      (@out.winsize[1] - 1).clamp(20, 200)
    rescue LoadError, SystemCallError
      79
    end
  end
end
