# frozen_string_literal: true

# What every cell of the matrix needs beside its Sidekiq (docs/development.md).
gemspec path: ".."

gem "rake", ">= 13.0", require: false
gem "rake-compiler", "~> 1.2", require: false
gem "rspec", "~> 3.12", require: false
# The specs' own client, whatever Sidekiq's is.
gem "redis-client", ">= 0.22", require: false
