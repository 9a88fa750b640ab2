# frozen_string_literal: true

# An application whose process moves due jobs into a queue that it does not work on.

require_relative "boot"

# Client middleware as many applications have some: it looks at the job and lets it pass.
class NoteMiddleware
  def call(_job_class, job, queue, _redis_pool)
    job["noted"] = queue
    yield
  end
end

Sidekiq.configure_server do |config|
  # Sidekiq 6.5 keeps its options in the module.
  (config.respond_to?(:capsules) ? config : Sidekiq)[:poll_interval_average] = 1
  config.client_middleware { |chain| chain.add(NoteMiddleware) } if ENV["BENCH_CLIENT_MIDDLEWARE"]
end
