# frozen_string_literal: true

# The `sidekiq` command of whichever bundle this process has.
load Gem.bin_path("sidekiq", "sidekiq")
