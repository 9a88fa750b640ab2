# frozen_string_literal: true

# All jobs bear the marks of this gem and of sidekiq-assured-jobs, so that every contender runs the same ones.
MARKED = {processing: true, assured_jobs: true}.freeze

# Does nothing, so that nothing but Sidekiq and its fetcher is measured.
class NoopJob
  include Sidekiq::Job

  sidekiq_options MARKED

  def perform(*)
    Marks.done
  end
end

# Waits, as for a database.
class SleepJob
  include Sidekiq::Job

  sidekiq_options MARKED

  def perform(seconds)
    sleep seconds
    Marks.done
  end
end

# Computes in Ruby. Turns and not time: a contender that takes the processor away must not shorten the work.
class SpinJob
  include Sidekiq::Job

  sidekiq_options MARKED

  def self.spin(turns)
    sum = 0
    turns.times { |i| sum += i & 7 }
    sum
  end

  def perform(turns)
    self.class.spin(turns)
    Marks.done
  end
end

# Notes how long it took from the push to here.
class LatencyJob
  include Sidekiq::Job

  sidekiq_options MARKED

  def perform(pushed_at)
    Marks.note(Marks.clock - pushed_at)
  end
end
