# frozen_string_literal: true

# Points the tracker in the process of the specs at a Redis, as a console or an exporter would have it.
module Watching
  module_function

  # @param redis [RedisServer]
  # @param namespace [String]
  # @return [Module] the tracker
  def watch(redis, namespace: Engines::NAMESPACE)
    tracker = Sidekiq::ProcessingTracker
    tracker.configure do |config|
      config.redis_options = {url: redis.url, **LeastUser.credentials}
      config.namespace = namespace
    end
    Scratch.undo do
      tracker.configure { |config| config.redis_options = config.namespace = nil }
    end
    tracker
  end
end
