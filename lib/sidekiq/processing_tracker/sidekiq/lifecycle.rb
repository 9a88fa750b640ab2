# frozen_string_literal: true

require "socket"

module Sidekiq
  module ProcessingTracker
    # Prepended to Sidekiq::Launcher: the engine comes before the first job and goes after the last.
    #
    # The launcher and not Sidekiq's events: `:shutdown` is the start of the drain, `:exit` exists in newer versions
    # only, and an embedded Sidekiq that is started again fires neither.
    #
    # @api private
    module Lifecycle
      class << self
        # Hooks into Sidekiq. Starts nothing. May be called again: configure_embed replays configure_server's blocks.
        #
        # @param config [Sidekiq::Config, Module] what configure_server yields
        # @return [void]
        def install(config)
          require "sidekiq/launcher"
          require "sidekiq/processor"
          require "sidekiq/scheduled"
          ::Sidekiq::Launcher.prepend(self)
          ::Sidekiq::Processor.prepend(Processor)
        end

        # Lets the engine fetch jobs, or record those that the app's own fetchers fetch.
        #
        # @param sources [Array<Array(Object, JobSource)>] see {JobSource.all}
        # @param native [Boolean]
        # @param runtime [Runtime]
        # @return [void]
        def attach(sources, native, runtime)
          warn_of_reliable_fetchers(sources.map(&:first)) unless native
          sources.each do |fetcher, source|
            next NativeFetch.attach(fetcher, runtime.engine, source) if native

            NativeFetch.detach(fetcher)
            Fetch.decorate(fetcher)
          end
        end

        # @param fetchers [Array<Object>]
        # @return [void]
        def warn_of_reliable_fetchers(fetchers)
          fetchers.map(&:class).uniq.select { |fetcher_class| Fetch.may_keep_jobs?(fetcher_class) }.each do |fetcher_class|
            Log.write(:warn, "#{fetcher_class} may keep jobs of its own: after a kill -9 both it and the tracker bring them " \
              "back; see docs/operations.md")
          end
        end

        # @param launcher [Sidekiq::Launcher]
        # @return [Boolean] whether any processor runs
        def busy?(launcher)
          managers = launcher.respond_to?(:managers) ? launcher.managers : [launcher.manager]
          managers.any? { |manager| manager.workers.to_a.any? { |processor| processor.thread&.alive? } }
        end

        # Gems that were loaded after this one may have put themselves before its middleware. Up to 8.0 every capsule
        # has a copy of the chain.
        #
        # @param config [Sidekiq::Config, Module]
        # @return [Array<Sidekiq::Middleware::Chain>]
        def chains(config)
          [config, *capsules(config)].map(&:server_middleware)
        end

        # @param launcher [Sidekiq::Launcher]
        # @return [Hash{String => String}] what people may want to know of this process
        def info(launcher)
          config = launcher.config
          capsules = capsules(config)
          {
            "hostname" => Socket.gethostname,
            "pid" => ::Process.pid.to_s,
            "version" => VERSION,
            "sidekiq_version" => ::Sidekiq::VERSION,
            "ruby_version" => RUBY_VERSION,
            "sidekiq_identity" => launcher.identity,
            "queues" => (capsules ? capsules.flat_map(&:queues) : config[:queues]).uniq.join(","),
            "concurrency" => (capsules ? capsules.sum(&:concurrency) : config[:concurrency]).to_s
          }
        end

        private

        # @return [Array<Sidekiq::Capsule>, nil] nil in 6.5, which has none
        def capsules(config)
          config.capsules.values if config.respond_to?(:capsules)
        end
      end

      # @raise [ConfigurationError] so that Sidekiq does not boot with settings that track nothing
      def run(...)
        running = false
        sources = JobSource.all(config)
        places = Settings.places(ProcessingTracker.config)
        choice = FetchChoice.new(ProcessingTracker.fetch, sources.map(&:first), places.queues)
        # In a forked child the launcher may have been its parent's.
        @processing_tracker = Runtime.enter(Lifecycle.info(self), choice.native?, places) unless @processing_tracker&.here?
        level, text = choice.line
        Log.write(level, text)
        Lifecycle.attach(sources, choice.native?, @processing_tracker)
        scheduler = SchedulerChoice.new(ProcessingTracker.scheduler, poller, places.queues)
        level, text = scheduler.line
        Log.write(level, text)
        scheduler.apply(@processing_tracker.engine, config)
        @processing_tracker_fetchers = sources.map(&:first)
        Lifecycle.chains(config).each { |chain| choice.native? ? Middleware.absent(chain) : Middleware.outermost(chain) }
        super.tap { running = true }
      ensure
        leave_processing_tracker unless running || Lifecycle.busy?(self)
      end

      # Sidekiq takes no more jobs. None is claimed from here on, and its threads need not end their waits to see that.
      def quiet(...)
        NativeFetch.quiet(@processing_tracker_fetchers || [], false)
        super
      ensure
        NativeFetch.quiet(@processing_tracker_fetchers || [], true)
      end

      # Returns when the drain is over, so only then nothing is left to track. When it raises, the processors may still
      # run (with Redis away it does so before it has told them to end), and the engine stays as long as they do.
      def stop
        stopped = false
        # Sidekiq 6.5 tells its threads to end without this.
        quiet
        super.tap { stopped = true }
      ensure
        if stopped || !Lifecycle.busy?(self)
          leave_processing_tracker
        else
          Log.write(:warn, "goes on: Sidekiq has failed to stop, and its threads may still run jobs. The next stop ends the tracker; " \
            "if the process ends instead, its jobs come back when the lease has run out")
        end
      end

      private

      def leave_processing_tracker
        runtime, @processing_tracker = @processing_tracker, nil
        Runtime.leave(runtime) if runtime
      end
    end
  end
end
