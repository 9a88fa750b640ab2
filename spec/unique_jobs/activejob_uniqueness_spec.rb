# frozen_string_literal: true

# What docs/unique-jobs.md says of activejob-uniqueness, whose locks recovery leaves alone: they do not tell whose they are.
RSpec.describe "activejob-uniqueness after kill -9", bundle: :activejob_uniqueness do
  let(:redis) { RedisServer.new(tcp: true) } # redlock takes no unix socket from an URL
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      require "active_job"

      # Without Rails: the class that the adapter needs.
      module Sidekiq::ActiveJob
        class Wrapper
          include Sidekiq::Job

          def perform(job_data)
            ::ActiveJob::Base.execute(job_data.merge("provider_job_id" => jid))
          end
        end
      end
      require "activejob/uniqueness"
      ActiveJob::Base.queue_adapter = :sidekiq
      ActiveJob::Base.logger = Sidekiq.logger

      #{strategies}.each do |strategy|
        task = Class.new(ActiveJob::Base) do
          include Sidekiq::ProcessingTracker::Worker
          unique strategy.to_sym, lock_ttl: 600

          def perform(gate, *)
            GatedJob.new.tap { |job| job.jid = provider_job_id }.perform(gate)
          end
        end
        Object.const_set(strategy.split("_").map(&:capitalize).join + "Task", task)
      end
    RUBY
  end

  let(:strategies) { %w[until_executed until_executing until_expired while_executing until_and_while_executing] }

  def classes = strategies.map { |strategy| "#{strategy.split("_").map(&:capitalize).join}Task" }

  def run(code)
    client = ScriptProcess.new(redis, "#{app}\n#{code}", bundle: :activejob_uniqueness)
    expect(client.process.wait).to be_success, client.log
    client.log
  end

  def class_of(payload) = JSON.parse(payload).fetch("wrapped")

  def locks = redis.call("KEYS", "activejob_uniqueness:*").to_h { |key| [key[/:(.*?):/, 1], key.end_with?(":runtime") ? :runtime : :lock] }

  it "each runs again at once, but for those with a lock of the run: they wait for its end" do
    run("#{classes}.each { |name| Object.const_get(name).perform_later('#{gate.path}') }")
    payloads = Queues.queued(redis)
    jids = payloads.to_h { |payload| [class_of(payload), Queues.jid(payload)] }
    expect(jids.keys).to match_array(classes)
    victim = SidekiqProcess.new(redis, app: app, bundle: :activejob_uniqueness, concurrency: 5).up.runs(*jids.values)
    held = {"until_executed_task" => :lock, "until_expired_task" => :lock, "while_executing_task" => :lock, "until_and_while_executing_task" => :runtime}
    expect(locks).to eq(held)
    # Nothing in a payload is the name of a lock.
    names = redis.call("KEYS", "activejob_uniqueness:*").map { |key| key.delete_suffix(":runtime").split(":").last }
    expect(payloads.select { |payload| names.any? { |name| payload.include?(name) } }).to be_empty
    victim.kill

    runner = SidekiqProcess.new(redis, app: app, bundle: :activejob_uniqueness, concurrency: 5).up
    blocked, free = jids.partition { |name, _| %w[WhileExecutingTask UntilAndWhileExecutingTask].include?(name) }.map(&:to_h)
    runner.runs(*free.values)
    eventually("the conflicts") { redis.call("ZCARD", "retry") == blocked.size }
    expect(locks).to eq(held)
    retries = redis.call("ZRANGE", "retry", 0, -1).map { |job| JSON.parse(job).values_at("wrapped", "jid", "error_class") }
    expect(retries).to match_array(blocked.map { |name, jid| [name, jid, "ActiveJob::Uniqueness::JobNotUnique"] })

    # What a person can do. The lock's end does the same.
    run("#{blocked.keys}.each { |name| Object.const_get(name).unlock!('#{gate.path}') }\nrequire 'sidekiq/api'\nSidekiq::RetrySet.new.retry_all")
    runner.runs(*blocked.values)
    gate.open
    eventually("the ends") { runner.done.size == 5 }
    eventually("the locks' ends") { locks == {"until_expired_task" => :lock} }
  end
end
