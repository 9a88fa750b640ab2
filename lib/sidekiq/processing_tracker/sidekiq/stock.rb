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

        # A method is Sidekiq's where its class, or the module that it comes from, was first defined, in a file of Sidekiq's:
        # other gems define modules of that name too.
        #
        # @param owner [Class]
        # @param name [Symbol]
        # @return [Boolean]
        def own?(owner, name)
          method = owner.instance_method(name)
          return false unless method.owner.name&.start_with?("Sidekiq::")

          file = method.source_location&.first
          file == Object.const_source_location(method.owner.name).first && file.start_with?(folder)
        end

        private

        def folder
          File.join(File.dirname(Object.const_source_location("Sidekiq::VERSION").first), "")
        end
      end
    end
  end
end
