# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # What {Event}, {Instance} and {InFlightJob} share: they are frozen, and show nothing that is not for logs.
    #
    # @api private
    module Value
      # @api private
      def self.included(struct)
        super
        struct.members.each { |member| struct.send(:undef_method, :"#{member}=") }
      end

      # @param parts [Hash{Symbol => Object}]
      def initialize(**parts)
        super
        freeze
      end

      # @return [String] without what may be secret
      def inspect
        hidden = self.class.const_defined?(:HIDDEN, false) ? self.class.const_get(:HIDDEN, false) : []
        shown = members.reject { |member| hidden.include?(member) || self[member].nil? }
        "#<#{[self.class, *shown.map { |member| "#{member}=#{self[member].inspect}" }].join(" ")}>"
      end
      alias_method :to_s, :inspect

      # @param printer [PP]
      # @return [void]
      def pretty_print(printer)
        printer.text(inspect)
      end
    end
  end
end
