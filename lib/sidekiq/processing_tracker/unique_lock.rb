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
          digest, given = facts(job)
          return skip(digest, given, "there is no digest") unless digest

          key = utf8(digest)
          jid = jid_of(given)
          return skip(digest, given, "the digest is no UTF-8") unless key
          return skip(digest, given, "the jid is empty, or is none") if jid == :unusable

          redis = Settings.queues(ProcessingTracker.config)
          return skip(digest, jid, "nothing is held") unless Native.clear_unique_lock(redis, key, jid, redis.fetch(:read_timeout_ms))

          Log.write(:debug, "cleared #{label(digest, jid)}")
          true
        rescue => error
          Log.write(:warn, "failed to clear #{label(digest, given)}: #{error.message.scrub} (#{error.class})")
          false
        end

        private

        def skip(digest, jid, reason)
          Log.write(:debug, "skipped #{label(digest, jid)}: #{reason}")
          false
        end

        # @return [Array(String, Object)] both as they stand there; nil where there is none
        def facts(job)
          job = job.to_h.transform_keys(&:to_s)
          [job.values_at(*DIGESTS).find { |value| value.is_a?(String) && !value.empty? }, job["jid"]]
        rescue TypeError, NoMethodError
          # Something that is no payload.
        end

        # Without a jid the whole lock goes, so a jid that is there and cannot be used must not count as none.
        #
        # @return [String, Symbol, nil] nil where there is none, :unusable where it cannot be one
        def jid_of(value)
          case value
          when nil then nil
          when String, Symbol, Integer then utf8(value.to_s) || :unusable
          else :unusable
          end
        end

        # No payload has anything else, since it is JSON; but what came by way of Redis may say that it is binary.
        #
        # @return [String, nil] nil where it is no text
        def utf8(text)
          text = (text.encoding == Encoding::BINARY) ? text.dup.force_encoding(Encoding::UTF_8) : text.encode(Encoding::UTF_8)
          text if text.valid_encoding? && !text.empty?
        rescue EncodingError
          nil
        end

        def label(digest, jid)
          "unique-jobs lock: digest=#{Log.plain(digest)} jid=#{Log.plain(jid)}"
        end
      end
    end
  end
end
