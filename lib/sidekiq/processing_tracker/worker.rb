# frozen_string_literal: true

require "sidekiq/job"

module Sidekiq
  module ProcessingTracker
    # Marks a job class as tracked: the same as `sidekiq_options processing: true`.
    #
    # Works in a Sidekiq job, before or after `include Sidekiq::Job`, in an ActiveJob class, and for subclasses.
    # A class that says `sidekiq_options processing: false` itself is not tracked.
    #
    #   class PaymentJob
    #     include Sidekiq::Job
    #     include Sidekiq::ProcessingTracker::Worker
    #   end
    module Worker
      # The option's name, in a class and in a payload.
      OPTION = "processing"

      # @api private
      def self.included(base)
        super
        # Rails includes the options into ActiveJob by itself; without it they may still be missing.
        base.include(::Sidekiq::Job::Options) if !base.respond_to?(:sidekiq_options) && active_job?(base)

        if base.respond_to?(:sidekiq_options)
          base.sidekiq_options(OPTION => true)
        else
          # Sidekiq::Job comes later and will reset the class's options, so nothing can be stored in them yet.
          base.singleton_class.prepend(DefaultOption)
        end
      end

      def self.active_job?(base)
        defined?(::ActiveJob::Base) && base <= ::ActiveJob::Base
      end
      private_class_method :active_job?

      # Adds the option to what the class says itself.
      #
      # @api private
      module DefaultOption
        # @return [Hash{String => Object}]
        def get_sidekiq_options
          options = super
          options.key?(OPTION) ? options : options.merge(OPTION => true)
        end
      end
    end
  end
end
