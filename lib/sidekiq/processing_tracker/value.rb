# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What {Event}, {Instance} and {InFlightJob} share: they have named parts (MEMBERS), are frozen, can be compared and matched
    # (`case event in {kind: :dead}`), and show nothing that is not for logs.
    module Value
      # @param parts [Hash{Symbol => Object}] the others are nil
      # @raise [ArgumentError] for a part that there is not
      def initialize(**parts)
        unknown = parts.keys - self.class::MEMBERS
        raise ArgumentError, "unknown #{unknown.join(", ")}: allowed are #{self.class::MEMBERS.join(", ")}" if unknown.any?

        self.class::MEMBERS.each { |name| instance_variable_set(:"@#{name}", parts[name]) }
        freeze
      end

      # @return [Hash{Symbol => Object}] every part, an event's payload too
      def to_h
        self.class::MEMBERS.to_h { |name| [name, public_send(name)] }
      end

      # For pattern matching.
      #
      # @param _names [Array<Symbol>, nil]
      # @return [Hash{Symbol => Object}]
      def deconstruct_keys(_names)
        to_h
      end

      # @param other [Object]
      # @return [Boolean] whether it is of the same class and all parts are equal
      def ==(other)
        other.instance_of?(self.class) && to_h == other.to_h
      end

      # As `==`, for use as a key.
      #
      # @param other [Object]
      # @return [Boolean]
      def eql?(other)
        self == other
      end

      # @return [Integer]
      def hash
        [self.class, to_h].hash
      end

      # @return [String] without what may be secret
      def inspect
        "#<#{[self.class, *shown.compact.map { |name, part| "#{name}=#{part.inspect}" }].join(" ")}>"
      end
      alias_method :to_s, :inspect

      # What ActiveSupport makes JSON of, so what loggers write: no part that may be secret.
      #
      # @param _options [Array<Object>] as ActiveSupport gives them
      # @return [Hash{Symbol => Object}]
      def as_json(*_options)
        # A queue's name may be any bytes.
        shown.transform_values { |part| part.is_a?(String) ? part.scrub : part }
      end

      # The same as JSON.
      #
      # @param options [Array<Object>] as JSON and ActiveSupport give them
      # @return [String]
      def to_json(*options)
        as_json.to_json(*options)
      end

      # @param printer [PP]
      # @return [void]
      def pretty_print(printer)
        printer.text(inspect)
      end

      private

      def shown
        hidden = self.class.const_defined?(:HIDDEN, false) ? self.class.const_get(:HIDDEN, false) : []
        to_h.except(*hidden)
      end
    end
  end
end
