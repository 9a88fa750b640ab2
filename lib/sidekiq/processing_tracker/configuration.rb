# frozen_string_literal: true

require "socket"

module Sidekiq
  module ProcessingTracker
    # The options of the tracker. A value set in code beats the environment, which beats the default.
    #
    # A value is checked when it is read, so that one bad option is reported where it matters and by its own name.
    # While the engine runs every option keeps the value it started with, and setting one raises.
    class Configuration
      # Option => environment variable.
      ENVIRONMENT = {
        namespace: "PROCESSING_NS",
        instance_id: "PROCESSING_INSTANCE_ID",
        exclusive_instance_id: "PROCESSING_EXCLUSIVE_INSTANCE_ID",
        heartbeat_interval: "HEARTBEAT_INTERVAL",
        heartbeat_ttl: "HEARTBEAT_TTL",
        recovery_lock_ttl: "RECOVERY_LOCK_TTL",
        track: "PROCESSING_TRACK",
        fetch: "PROCESSING_FETCH",
        scheduler: "PROCESSING_SCHEDULER",
        polling: "PROCESSING_POLLING",
        max_recoveries: "MAX_RECOVERIES",
        recovery_window: "RECOVERY_WINDOW"
      }.freeze

      # Every option, in the order in which {#inspect} shows them.
      OPTIONS = [*ENVIRONMENT.keys, :redis_options, :logger].freeze

      # Prefix of every key.
      DEFAULT_NAMESPACE = "sidekiq_processing"
      # Seconds.
      DEFAULT_HEARTBEAT_INTERVAL = 5
      # Seconds. The least; see {TTL_IN_INTERVALS}.
      DEFAULT_HEARTBEAT_TTL = 30
      # Seconds.
      DEFAULT_RECOVERY_LOCK_TTL = 300

      # How often.
      DEFAULT_MAX_RECOVERIES = 3
      # Seconds: three days.
      DEFAULT_RECOVERY_WINDOW = 259_200

      # How the option `max_recoveries` says "no limit" where nil cannot be said: in the environment.
      UNLIMITED = %w[unlimited none].freeze

      # Seconds. More beats than these cost Redis more than they gain.
      SHORTEST_HEARTBEAT_INTERVAL = 0.05

      # The lease has to outlive some heartbeats, so its default follows the interval.
      TTL_IN_INTERVALS = 6

      # A year. Longer is surely a mistake, and the sum of two still fits every number on the way to Redis.
      LONGEST = 31_536_000

      # What the option `track` may be.
      TRACK = %i[marked all].freeze
      # What the option `fetch` may be.
      FETCH = %i[auto native sidekiq].freeze
      # What the option `scheduler` may be.
      SCHEDULER = %i[auto sidekiq].freeze

      # Labels become parts of Redis keys that are also used in patterns: no spaces, control or glob characters.
      UNUSABLE_IN_LABEL = /[[:cntrl:]]|[[:space:]]|[*?\[\]\\]/
      NUMBER = /\A[+-]?(\d+(\.\d+)?|\.\d+)([eE][+-]?\d+)?\z/

      private_constant :UNUSABLE_IN_LABEL, :NUMBER

      def initialize
        @values = {}
        @fixed = nil
        @fixed_by = nil
      end

      # @param value [String, Symbol, nil] prefix of every key; nil: PROCESSING_NS, else "sidekiq_processing"
      def namespace=(value)
        set(:namespace, value)
      end

      # @return [String]
      # @raise [ConfigurationError]
      def namespace
        fixed(:namespace) { label(:namespace) { DEFAULT_NAMESPACE } }
      end

      # @param value [String, Symbol, nil] label of this machine or pod; nil: PROCESSING_INSTANCE_ID, else the hostname
      def instance_id=(value)
        set(:instance_id, value)
      end

      # @return [String]
      # @raise [ConfigurationError]
      def instance_id
        fixed(:instance_id) { label(:instance_id) { Socket.gethostname } }
      end

      # @param value [Boolean, String, nil] true or false; nil: PROCESSING_EXCLUSIVE_INSTANCE_ID, else false
      def exclusive_instance_id=(value)
        set(:exclusive_instance_id, value)
      end

      # A promise: no two processes ever live under one instance_id at a time, as with the pods of a StatefulSet. Then one that
      # starts takes over the jobs of the one before at once.
      #
      # @return [Boolean]
      # @raise [ConfigurationError]
      def exclusive_instance_id
        fixed(:exclusive_instance_id) { choice(:exclusive_instance_id, [false, true], "true or false") }
      end

      # @param value [Numeric, String, nil] seconds, from 0.05, fractions allowed; nil: HEARTBEAT_INTERVAL,
      #   else 5
      def heartbeat_interval=(value)
        set(:heartbeat_interval, value)
      end

      # @return [Integer, Float] seconds
      # @raise [ConfigurationError]
      def heartbeat_interval
        fixed(:heartbeat_interval) do
          allowed = "a number of seconds from #{SHORTEST_HEARTBEAT_INTERVAL} to #{LONGEST}, fractions allowed"
          number(:heartbeat_interval, allowed) { |value| value >= SHORTEST_HEARTBEAT_INTERVAL } || DEFAULT_HEARTBEAT_INTERVAL
        end
      end

      # @param value [Numeric, String, nil] whole seconds; nil: HEARTBEAT_TTL, else the greater of 30 and 6 intervals
      def heartbeat_ttl=(value)
        set(:heartbeat_ttl, value)
      end

      # @return [Integer] seconds
      # @raise [ConfigurationError]
      def heartbeat_ttl
        fixed(:heartbeat_ttl) do
          whole_seconds(:heartbeat_ttl) || [DEFAULT_HEARTBEAT_TTL, (heartbeat_interval * TTL_IN_INTERVALS).ceil].max
        end
      end

      # @param value [Numeric, String, nil] whole seconds; nil: RECOVERY_LOCK_TTL, else 300
      def recovery_lock_ttl=(value)
        set(:recovery_lock_ttl, value)
      end

      # @return [Integer] seconds
      # @raise [ConfigurationError]
      def recovery_lock_ttl
        fixed(:recovery_lock_ttl) { whole_seconds(:recovery_lock_ttl) || DEFAULT_RECOVERY_LOCK_TTL }
      end

      # @param value [Symbol, String, nil] :marked or :all; nil: PROCESSING_TRACK, else :marked
      def track=(value)
        set(:track, value)
      end

      # @return [Symbol] :marked or :all
      # @raise [ConfigurationError]
      def track
        fixed(:track) { choice(:track, TRACK, ":marked or :all") }
      end

      # @param value [Symbol, String, nil] :auto, :native or :sidekiq; nil: PROCESSING_FETCH, else :auto
      def fetch=(value)
        set(:fetch, value)
      end

      # Who takes jobs from the queues. :native: the engine's own threads. :sidekiq: the app's own fetcher, whatever it is, and
      # the tracker records jobs before they run. :auto: native, unless something else has its hand in fetching.
      #
      # @return [Symbol] :auto, :native or :sidekiq
      # @raise [ConfigurationError]
      def fetch
        fixed(:fetch) { choice(:fetch, FETCH, ":auto, :native or :sidekiq") }
      end

      # @param value [Symbol, String, nil] :auto or :sidekiq; nil: PROCESSING_SCHEDULER, else :auto
      def scheduler=(value)
        set(:scheduler, value)
      end

      # Who moves due jobs from Sidekiq's sets `schedule` and `retry` into their queues. :auto: the engine, so that none is ever
      # out of Redis' sight, unless something else has its hand in that. :sidekiq: whatever does it without the tracker.
      #
      # @return [Symbol] :auto or :sidekiq
      # @raise [ConfigurationError]
      def scheduler
        fixed(:scheduler) { choice(:scheduler, SCHEDULER, ":auto or :sidekiq") }
      end

      # @param value [Boolean, String, nil] true or false; nil: PROCESSING_POLLING, else false
      def polling=(value)
        set(:polling, value)
      end

      # How the native fetch waits for work. false: Redis hands it jobs as they come, or tells of them, where it can. true: it looks from
      # time to time.
      #
      # @return [Boolean]
      # @raise [ConfigurationError]
      def polling
        fixed(:polling) { choice(:polling, [false, true], "true or false") }
      end

      # Unlike for every other option, nil is a value here. Set `:default` to go back to MAX_RECOVERIES, else 3.
      #
      # @param value [Integer, String, Symbol, nil] how often a job is put back into its queue before it goes to the dead
      #   set, from 0; nil or :unlimited: always; :default: MAX_RECOVERIES, else 3
      def max_recoveries=(value)
        set(:max_recoveries, value.nil? ? :unlimited : (value unless value == :default))
      end

      # @return [Integer, nil] nil: no limit
      # @raise [ConfigurationError]
      def max_recoveries
        fixed(:max_recoveries) do
          value, = lookup(:max_recoveries)
          next DEFAULT_MAX_RECOVERIES if value.nil?
          next if UNLIMITED.include?(value.to_s)

          number(:max_recoveries, "a whole number from 0, or unlimited (in code also nil)") { |count| count >= 0 && (count % 1).zero? }
        end
      end

      # @param value [Numeric, String, nil] whole seconds; nil: RECOVERY_WINDOW, else 259200 (three days)
      def recovery_window=(value)
        set(:recovery_window, value)
      end

      # @return [Integer] seconds
      # @raise [ConfigurationError]
      def recovery_window
        fixed(:recovery_window) { whole_seconds(:recovery_window) || DEFAULT_RECOVERY_WINDOW }
      end

      # @param value [String, Hash, nil] a Redis URL, or a Hash as Sidekiq takes it; nil: Sidekiq's own settings
      def redis_options=(value)
        set(:redis_options, frozen_copy(value))
      end

      # @return [String, Hash, nil] a frozen copy of what was set; {RedisSettings.from_options} checks what is in it
      # @raise [ConfigurationError] when it is neither a String nor a Hash
      def redis_options
        fixed(:redis_options) do
          value = @values[:redis_options]
          next value if value.nil? || value.is_a?(String) || value.is_a?(Hash)

          # The class only: an object that holds a password may show it.
          raise ConfigurationError,
            "redis_options is a #{value.class}: allowed is a Redis URL, a Hash like {url: \"redis://...\"}, or nil " \
            "for Sidekiq's own settings"
        end
      end

      # @param value [Logger, nil] nil: Sidekiq.logger
      def logger=(value)
        set(:logger, value)
      end

      # @return [Logger]
      # @raise [ConfigurationError]
      def logger
        value = @values[:logger]
        return ::Sidekiq.logger if value.nil?
        return value if %i[debug info warn error].all? { |level| value.respond_to?(level) }

        raise ConfigurationError,
          "logger is a #{value.class}: allowed is an object with debug, info, warn and error, or nil for Sidekiq's logger"
      end

      # Keeps every option as it is now, in this process, until {#release}. A forked child is free to set its own.
      #
      # @api private
      # @return [void]
      # @raise [ConfigurationError] when an option cannot be used
      def fix
        values = (OPTIONS - [:logger]).to_h { |option| [option, public_send(option)] }
        logger
        @fixed = values.freeze
        @fixed_by = ::Process.pid
      end

      # Lets the options be set again.
      #
      # @api private
      # @return [void]
      def release
        @fixed = nil
      end

      # @return [String] every option that was set in code or by the environment, without passwords
      def inspect
        shown = OPTIONS.filter_map { |option|
          value = @values.fetch(option) { ENV[ENVIRONMENT[option]] if ENVIRONMENT.key?(option) }
          next if value.nil?

          "#{option}=#{show(option, value)}"
        }
        "#<#{[self.class, *shown].join(" ")}>"
      end
      alias_method :to_s, :inspect

      private

      def fixed?
        @fixed && @fixed_by == ::Process.pid
      end

      def fixed(option)
        fixed? ? @fixed.fetch(option) : yield
      end

      def set(option, value)
        if fixed?
          raise ConfigurationError,
            "#{option} cannot be changed while the engine runs (it stays #{show(option, public_send(option))}): " \
            "set it before Sidekiq starts"
        end
        @values[option] = value
      end

      # What its giver changes later must change nothing here. A Proc stays what it is, as does what cannot be used.
      def frozen_copy(value)
        case value
        when String then value.dup.freeze
        when Array then value.map { |part| frozen_copy(part) }.freeze
        when Hash then value.to_h { |key, part| [frozen_copy(key), frozen_copy(part)] }.freeze
        else value
        end
      end

      # @return [Array(Object, String)] the value, and what to call it in a message
      def lookup(option)
        value = @values[option]
        return [value, option.to_s] unless value.nil?

        variable = ENVIRONMENT.fetch(option)
        [ENV[variable], "#{option} (from #{variable})"]
      end

      # @return [Symbol] one of the choices; the first when the option is not set
      def choice(option, choices, allowed)
        value, source = lookup(option)
        return choices.first if value.nil?

        # false is a choice too.
        index = choices.index { |name| name.to_s == value.to_s } || refuse(source, value, allowed)
        choices[index]
      end

      def label(option)
        value, source = lookup(option)
        value = yield if value.nil?
        text = value.is_a?(Symbol) ? value.to_s : value
        text = utf8(text) if text.is_a?(String)
        allowed = "a String that is not empty, without spaces, control characters and * ? [ ] \\"
        refuse(source, value, allowed) unless text.is_a?(String) && text.valid_encoding? && !text.empty?
        refuse(source, value, allowed) if text.match?(UNUSABLE_IN_LABEL)
        text.dup.freeze
      end

      # Where no locale is set, as in many containers, Ruby takes the environment for bytes.
      def utf8(text)
        return text.dup.force_encoding(Encoding::UTF_8) if [Encoding::BINARY, Encoding::US_ASCII].include?(text.encoding)

        text.encode(Encoding::UTF_8)
      rescue EncodingError
        text
      end

      def whole_seconds(option)
        number(option, "a whole number of seconds from 1 to #{LONGEST}") { |value| value >= 1 && (value % 1).zero? }
      end

      # @return [Integer, Float, nil] nil where nothing is set
      def number(option, allowed)
        value, source = lookup(option)
        return if value.nil?

        number = value.is_a?(String) ? parse(value) : value
        # is_a? and not ===: ActiveSupport's 5.seconds answers the first only.
        refuse(source, value, allowed) unless number.is_a?(Numeric) && number.real? && number.to_f.finite?
        refuse(source, value, allowed) unless yield(number.to_f) && number.to_f <= LONGEST
        (number % 1).zero? ? number.to_i : number.to_f
      end

      def parse(text)
        Float(text) if text.match?(NUMBER)
      end

      def refuse(source, value, allowed)
        raise ConfigurationError, "#{source} is #{value.inspect}: allowed is #{allowed}"
      end

      def show(option, value)
        case option
        when :redis_options then value.nil? ? "nil" : RedisSettings.describe(value)
        when :logger then value.class.to_s
        else value.inspect
        end
      end
    end
  end
end
