# frozen_string_literal: true

require "sidekiq/job"

module Sidekiq
  module ProcessingTracker
    # Marks a job class as tracked: the same as `sidekiq_options processing: true`.
    #
    # Works in a Sidekiq job, before or after `include Sidekiq::Job`, in an ActiveJob class, and for subclasses. In a
    # module it marks every class that includes the module, since applications keep what their jobs share in one.
    # A class that says `sidekiq_options processing: false` itself is not tracked.
    #
    #   class PaymentJob
    #     include Sidekiq::Job
    #     include Sidekiq::ProcessingTracker::Worker
    #   end
    module Worker
      # The option's name, in a class and in a payload.
      OPTION = "processing"

      class << self
        # @api private
        def included(base)
          super
          base.is_a?(Class) ? mark(base) : base.singleton_class.prepend(Passing)
        end

        # @api private
        # @raise [ArgumentError] always: an extended class would not be marked
        def extended(base)
          refuse("extend", base)
        end

        # @api private
        # @raise [ArgumentError] always: a class that prepends it would not be marked
        def prepended(base)
          refuse("prepend", base)
        end

        private

        def mark(base)
          # Rails includes the options into ActiveJob by itself; without it they may still be missing.
          base.include(::Sidekiq::Job::Options) if !base.respond_to?(:sidekiq_options) && active_job?(base)
          base.sidekiq_options(OPTION => true) if base.respond_to?(:sidekiq_options)
          # Sidekiq::Job resets the options of a class that includes it later, and of a subclass that includes it again.
          base.singleton_class.prepend(DefaultOption)
        end

        def active_job?(base)
          defined?(::ActiveJob::Base) && base <= ::ActiveJob::Base
        end

        def refuse(verb, base)
          raise ArgumentError, "#{verb} #{name} marks nothing: use `include #{name}` in #{base.is_a?(Module) ? base : base.class}"
        end
      end

      # Adds the option to what the class says itself.
      #
      # @api private
      module DefaultOption
        # @return [Hash{String => Object}]
        def get_sidekiq_options
          options = defined?(super) ? super : {}
          options.key?(OPTION) ? options : options.merge(OPTION => true)
        end
      end

      # Prepended to the singleton class of a module that includes Worker: hands the mark on. Beside the module's own
      # `included`, whatever that is (a Concern's takes no class and a block).
      #
      # @api private
      module Passing
        private

        def included(base = nil, &block)
          super
          Worker.included(base) if base
        end
      end
    end
  end
end
