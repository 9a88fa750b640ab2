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

        # @param name [Symbol] a method of the class of Sidekiq's client itself
        # @return [Boolean]
        def client_class?(name)
          method = ::Sidekiq::Client.method(name)
          method.owner == ::Sidekiq::Client.singleton_class && sidekiqs?(method, "Sidekiq::Client")
        end

        # A method is Sidekiq's where its class, or the module that it comes from, was first defined, in a file of Sidekiq's:
        # other gems define modules of that name too.
        #
        # @param owner [Class]
        # @param name [Symbol]
        # @return [Boolean]
        def own?(owner, name)
          method = owner.instance_method(name)
          owner_name = method.owner.name
          owner_name&.start_with?("Sidekiq::") ? sidekiqs?(method, owner_name) : false
        end

        private

        def sidekiqs?(method, owner_name)
          file = method.source_location&.first
          file == Object.const_source_location(owner_name).first && file.start_with?(folder)
        end

        def folder
          File.join(File.dirname(Object.const_source_location("Sidekiq::VERSION").first), "")
        end
      end
    end
  end
end
