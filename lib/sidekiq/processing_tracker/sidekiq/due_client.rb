# frozen_string_literal: true

require "sidekiq/client"

module Sidekiq
  module ProcessingTracker
    # Sidekiq's client, all of it but for the last step: instead of sending a job to Redis it says where it would go, so that
    # the engine can send it there and take it off the record in one.
    #
    # Errors of Sidekiq's own quote the job. They go to the error handlers, and so into the log, where no arguments may be.
    #
    # @api private
    class DueClient < ::Sidekiq::Client
      # What Sidekiq's client asks of Redis in order to push, noted down.
      class Note
        # @return [Array(String, String, String, String), nil] "queue", its name, nothing, the payload; or "set", its key, the
        #   score, the payload
        attr_reader :target

        # Which queues there are: the engine sees to that.
        def sadd(*) = nil

        def lpush(key, payloads)
          queue = key.delete_prefix("queue:")
          raise ArgumentError, "a job needs the name of a queue, and client middleware has left it none" if queue.empty?

          @target = ["queue", queue, "", Array(payloads).first]
        end

        def zadd(key, pairs)
          score, payload = pairs.flatten
          @target = ["set", key, score.to_s, payload]
        end
      end

      # Errors of Redis' clients that mean that it is away, by name: which of them are loaded differs.
      AWAY = %w[RedisClient::ConnectionError Redis::BaseConnectionError].freeze

      private_constant :AWAY

      class << self
        # @param config [Sidekiq::Config, Module] 6.5 has the module only
        # @return [DueClient]
        def for(config)
          config.respond_to?(:capsules) ? new(config: config) : new
        end

        # @return [Boolean] whether the installed Sidekiq writes times in milliseconds
        def milliseconds?
          DeadSetLimits.timestamps == "milliseconds"
        end

        # @param payload [String]
        # @return [Object] what Sidekiq's JSON reads in it
        # @raise [ArgumentError]
        def read(payload)
          ::Sidekiq.load_json(payload)
        rescue => error
          raise ArgumentError, "its payload is no JSON that can be read (#{error.class})", cause: nil
        end

        # @param error [StandardError]
        # @return [Boolean] whether it makes no sense to go on with the next job
        def away?(error)
          error.is_a?(ConnectionError) || error.class.ancestors.any? { |ancestor| AWAY.include?(ancestor.name) }
        end
      end

      # Runs the client middleware.
      #
      # @param item [Hash] a payload
      # @return [Array(String, String, String, String)] see {Note#target}; or "", "", "", "" where middleware refuses the job
      # @raise [StandardError] what Sidekiq's client or a middleware raises
      def target(item)
        @note = Note.new
        push(item)
        @note.target || ["", "", "", ""]
      end

      # @param item [Object]
      # @return [void]
      # @raise [ArgumentError] as Sidekiq's, without the job
      def validate(item)
        super
      rescue ArgumentError => error
        raise ArgumentError, error.message.partition(": `").first, cause: nil
      end

      # @param item [Hash]
      # @return [void]
      # @raise [ArgumentError] as Sidekiq's, without the argument
      def verify_json(item)
        super
      rescue ArgumentError
        raise ArgumentError, "Job arguments to #{item["wrapped"] || item["class"]} must be native JSON types", cause: nil
      end

      private

      # One job at a time: a second one would take the place of the first without a word.
      def raw_push(payloads)
        raise ArgumentError, "Sidekiq's client pushes #{payloads.size} jobs where one is due" if payloads.size != 1 || @note.target

        atomic_push(@note, payloads)
        true
      end
    end
  end
end
