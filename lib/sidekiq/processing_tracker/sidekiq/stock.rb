# frozen_string_literal: true

module Sidekiq
  module ProcessingTracker
    # Whether a part of Sidekiq is as it came, or somebody has had a hand in it.
    #
    # @api private
    module Stock
      class << self
        # @param name [Symbol] a method of Sidekiq's client
        # @return [Boolean]
        def client?(name)
          own?(::Sidekiq::Client, name)
        end

        # A method is Sidekiq's where its class, or the module that it comes from, was first defined.
        #
        # @param owner [Class]
        # @param name [Symbol]
        # @return [Boolean]
        def own?(owner, name)
          method = owner.instance_method(name)
          return false unless method.owner.name&.start_with?("Sidekiq::")

          method.source_location&.first == Object.const_source_location(method.owner.name).first
        end
      end
    end
  end
end
