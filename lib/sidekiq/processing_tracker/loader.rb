# frozen_string_literal: true

# A precompiled gem carries one library per minor version of Ruby; a gem built on this machine has one.
begin
  per_version = "sidekiq/processing_tracker/#{RUBY_VERSION[/\d+\.\d+/]}/native"
  require per_version
rescue LoadError => error
  # Only a missing file is no error: one that is there and cannot be loaded has to say why.
  raise unless error.path == per_version

  require "sidekiq/processing_tracker/native"
end
