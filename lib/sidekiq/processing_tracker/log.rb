# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Writes to the configured logger. Logging is never worth a job: a logger that raises is survived in silence.
    #
    # @api private
    module Log
      # Seconds between two lines about failures of the tracker itself, since every job may meet the same one.
      FAILURE_PAUSE = 60

      @failure_at = nil

      class << self
        # @param level [Symbol] :debug, :info, :warn or :error
        # @param text [String]
        # @return [void]
        def write(level, text)
          ProcessingTracker.logger.public_send(level, "ProcessingTracker #{text}")
        rescue Exception => error # rubocop:disable Lint/RescueException
          # There is no better place to report that the log cannot be written. A signal that Ruby has raised in the main
          # thread is not the logger's.
          raise if error.is_a?(SignalException) && Thread.current == Thread.main
        end

        # Whether what is written at this level goes anywhere, as far as the logger tells.
        #
        # @param level [Symbol]
        # @return [Boolean]
        def writes?(level)
          logger = ProcessingTracker.logger
          question = :"#{level}?"
          !logger.respond_to?(question) || !!logger.public_send(question)
        rescue Exception => error # rubocop:disable Lint/RescueException
          raise if error.is_a?(SignalException) && Thread.current == Thread.main

          true
        end

        # What comes from a payload: whatever is in it must stay on one line.
        #
        # @param value [Object, nil]
        # @return [String]
        def plain(value)
          return "-" if value.nil?

          text = value.to_s
          text = text.encode(Encoding::UTF_8, invalid: :replace, undef: :replace) unless text.encoding.ascii_compatible?
          text = text.scrub
          text.match?(/\A[[:graph:]]+\z/) ? text : text.inspect
        end

        # One line a minute at most.
        #
        # @param doing [String] what was about to be done
        # @param error [Exception]
        # @return [void]
        def failure(doing, error)
          now = ::Process.clock_gettime(::Process::CLOCK_MONOTONIC)
          return if @failure_at && now - @failure_at < FAILURE_PAUSE

          @failure_at = now
          write(:error, "failed to #{doing}: #{error.message} (#{error.class})")
        end
      end
    end
  end
end
