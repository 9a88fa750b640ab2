# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Answers the native threads when they ask for a password, before each login: for passwords that are Procs, since those
    # may change. It has a Ruby thread of its own for that, which waits without the GVL, and none where all are Strings.
    #
    # While Ruby is held up nobody answers, and what the password was is tried.
    #
    # @api private
    class Passwords
      # How long one wait for a question lasts, at most. Milliseconds.
      WAIT = 60_000

      # @return [Native::Passwords, nil] nil where there is nothing to ask
      attr_reader :native

      def initialize
        @secrets = []
      end

      # @param secret [RedisSecret] one that may change
      # @return [Integer] what the native library calls it
      # @raise [ConfigurationError] when it cannot be used as it is now
      def add(secret)
        @native ||= Native::Passwords.new
        name = @native.add(secret.ask)
        @secrets[name] = secret
        name
      end

      # @return [self]
      def start
        @thread ||= Thread.new { run }.tap { |thread| thread.name = "processing_tracker.passwords" } if @native
        self
      end

      # The opposite of {start}. Whoever still asks gets what the password was.
      #
      # @return [void]
      def stop
        @native&.close
        @thread&.join(Runtime::LOG_TIMEOUT)
      end

      private

      def run
        loop do
          name, number = @native.wait(WAIT)
          case name
          when nil then next
          when :closed then break
          else answer(name, number)
          end
        end
      end

      def answer(name, number)
        @native.answer(name, number, @secrets.fetch(name).ask)
      rescue Exception => error # rubocop:disable Lint/RescueException
        # Whatever a Proc raises: without this thread nobody would answer any more, and {#stop} would raise it.
        @native.keep(name, number)
        # The message may have the password in it.
        Log.write(:error, "could not ask for the password of Redis (#{error.class}), tries what it was")
      end
    end
  end
end
