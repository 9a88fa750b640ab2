# frozen_string_literal: true

require "fileutils"
require "tmpdir"

# What an example has started or written, undone in the reverse order when it ends, and when the whole run ends.
module Scratch
  @undo = []

  class << self
    # @return [String] a folder of one's own, gone with the example
    def folder
      path = Dir.mktmpdir("spt-")
      undo { FileUtils.remove_entry(path, true) }
      path
    end

    # @yield how to undo what was done just now
    def undo(&block)
      @undo << block
    end

    def close
      @undo.pop.call until @undo.empty?
    end

    # Wraps a command so that it dies with this process, however this process ends.
    #
    # @param command [Array<String>]
    # @return [Array<String>]
    def bound(*command)
      setpriv? ? ["setpriv", "--pdeathsig", "KILL", *command] : command
    end

    private

    def setpriv?
      @setpriv = system("setpriv", "--pdeathsig", "KILL", "true", out: File::NULL, err: File::NULL) if @setpriv.nil?
      @setpriv
    end
  end

  at_exit { close }
end
