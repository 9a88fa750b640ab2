# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Frees the locks of sidekiq-unique-jobs that a job holds. The gem itself need not be there: its keys tell.
    #
    # @api private
    module UniqueLock
      # Where the digest stands in a payload: since version 7, and before.
      DIGESTS = %w[lock_digest unique_digest].freeze

      class << self
        # Raises nothing.
        #
        # @param job [Hash] a payload with String or Symbol keys
        # @return [Boolean] whether anything was freed
        def clear(job)
          digest, jid = facts(job)
          return false unless digest
          return skip(digest) if jid == :unusable

          freed = free(digest, jid)
          Log.write(:debug, freed ? "cleared #{label(digest, jid)}" : "skipped #{label(digest, jid)}: nothing is held")
          freed
        rescue => error
          Log.write(:warn, "failed to clear #{label(digest, jid)}: #{error.message} (#{error.class})")
          false
        end

        private

        # Without a jid the whole lock goes, so a jid that is there and cannot be used must not count as none.
        def skip(digest)
          Log.write(:warn, "skipped unique-jobs lock: digest=#{Log.plain(digest)}: the jid is empty, or is none")
          false
        end

        # @return [Array(String, (String, Symbol, nil)), nil] the jid: nil where there is none, :unusable where it cannot be one
        def facts(job)
          return unless job.respond_to?(:to_h)

          job = job.to_h.transform_keys(&:to_s)
          digest = text(job.values_at(*DIGESTS).find { |value| text(value) })
          [digest, jid_of(job["jid"])] if digest
        rescue TypeError, NoMethodError
          # Something that is no payload.
        end

        def jid_of(value)
          case value
          when nil then nil
          when String, Symbol, Integer then text(value.to_s) || :unusable
          else :unusable
          end
        end

        def text(value)
          value if value.is_a?(String) && !value.empty?
        end

        def free(digest, jid)
          redis = Settings.queues(ProcessingTracker.config)
          freed = Native.clear_unique_lock(redis, digest, jid, redis.fetch(:read_timeout_ms))
          freed.is_a?(Integer) ? freed.positive? : freed == true
        end

        def label(digest, jid)
          "unique-jobs lock: digest=#{Log.plain(digest)} jid=#{Log.plain(jid)}"
        end
      end
    end
  end
end
