# frozen_string_literal: true

# Sidekiq's configuration in the process of the specs.
module SidekiqConfig
  # @return [Sidekiq::Config, Module] 6.5 keeps it in the module
  def self.current
    Sidekiq.respond_to?(:default_configuration) ? Sidekiq.default_configuration : Sidekiq
  end
end
