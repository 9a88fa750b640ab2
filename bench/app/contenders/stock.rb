# frozen_string_literal: true

# Sidekiq's own BasicFetch and nothing else.
