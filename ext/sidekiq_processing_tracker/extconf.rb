# frozen_string_literal: true

require "mkmf"
require "rb_sys/mkmf"

create_rust_makefile("sidekiq/processing_tracker/native") do |config|
  config.ext_dir = "ffi"
end
