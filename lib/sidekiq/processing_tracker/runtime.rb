# frozen_string_literal: true

require "socket"

module Sidekiq
  module ProcessingTracker
    # What runs in this process: the engine, the thread that tells its events, and how many launchers use them.
    #
    # There is at most one in a process. A forked child inherits the object but not its threads, so there it counts
    # as absent: the child touches nothing of its parent, and gets a runtime of its own when it starts a launcher.
    #
    # @api private
    class Runtime
      # How long {#leave} may take: jobs are safe either way, and the process is about to end. Milliseconds.
      LEAVE_TIMEOUT = 2_000

      # How long the last events may take to be told. Seconds.
      LOG_TIMEOUT = 1

      @lock = Mutex.new
      @current = nil

      class << self
        # @return [Runtime, nil] nil where no engine runs in this very process
        def current
          runtime = @current
          runtime if runtime&.here?
        end

        # Starts the engine, or joins the one that another launcher of this process has started.
        #
        # @param info [Hash{String => String}] see {Settings.build}
        # @param native [Boolean] whether the engine fetches jobs
        # @param places [Settings::Places]
        # @return [Runtime]
        # @raise [ConfigurationError] when an option cannot be used
        def enter(info, native, places)
          @lock.synchronize do
            @current = new(ProcessingTracker.config, info, native, places) unless current
            @current.users += 1
            @current
          end
        end

        # The opposite of {enter}. The last launcher to leave takes the engine with it.
        #
        # @param runtime [Runtime] as {enter} returned it
        # @return [void]
        def leave(runtime)
          @lock.synchronize do
            return unless runtime.equal?(current)

            runtime.users -= 1
            return unless runtime.users.zero?

            @current = nil
            runtime.leave
          end
        end
      end

      # @return [Native::Engine]
      attr_reader :engine

      # @return [Integer] how many launchers run
      attr_accessor :users

      def initialize(config, info, native, places)
        @config = config
        @pid = ::Process.pid
        @users = 0
        @elsewhere = !places.queues.nil?
        @passwords = Passwords.new
        settings = Settings.build(config, places: places, passwords: @passwords, info: info, native: native)
        config.fix
        @engine = start(settings)
        @passwords.start
        @events = Events.new(@engine).start
      end

      # @return [Boolean] false in a forked child
      def here?
        @pid == ::Process.pid
      end

      # @return [Boolean] whether Sidekiq's queues are in another Redis than the tracker's keys
      def elsewhere? = @elsewhere

      # @return [String]
      def identity
        @engine.identity
      end

      # Clean exit: what is acked or requeued leaves Redis, then this process does.
      #
      # @return [void]
      def leave
        clean = @engine.leave(LEAVE_TIMEOUT)
        return if clean

        Log.write(:warn, "could not leave in time: Redis keeps this process until its lease runs out")
      rescue => error
        Log.failure("leave", error)
      ensure
        @config.release
        @passwords.stop
        @events.join(LOG_TIMEOUT)
      end

      private

      def start(settings)
        Native::Engine.start(settings)
      rescue
        @config.release
        raise
      end
    end
  end
end
