# frozen_string_literal: true

require "sidekiq-power-fetch"
