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
          own?(::Sidekiq::Client, name, "client.rb", "job_util.rb")
        end

        # @param owner [Class]
        # @param name [Symbol]
        # @param files [Array<String>] where Sidekiq has it
        # @return [Boolean]
        def own?(owner, name, *files)
          location = owner.instance_method(name).source_location&.first
          files.any? { |file| location == "#{folder}/#{file}" }
        end

        # @return [String] where Sidekiq's own files are
        def folder
          ::Sidekiq.method(:load_json).source_location.first.delete_suffix(".rb")
        end
      end
    end
  end
end
