# frozen_string_literal: true

# ActiveJob through Sidekiq's own adapter.
RSpec.describe "ActiveJob" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:app) do
    <<~RUBY
      require "active_job"

      begin
        require "sidekiq/rails"
      rescue LoadError
        # Without Rails: the class from that file which the adapter needs.
        module Sidekiq::ActiveJob
          class Wrapper
            include Sidekiq::Job

            def perform(job_data)
              ::ActiveJob::Base.execute(job_data.merge("provider_job_id" => jid))
            end
          end
        end
      end
      ActiveJob::Base.queue_adapter = :sidekiq
      ActiveJob::Base.logger = Sidekiq.logger

      class MarkedTask < ActiveJob::Base
        include Sidekiq::ProcessingTracker::Worker

        def perform(gate, *)
          GatedJob.new.tap { |job| job.jid = provider_job_id }.perform(gate)
        end
      end

      class UnmarkedTask < MarkedTask
        sidekiq_options processing: false
      end
    RUBY
  end

  # bin/setup leaves it out where there are only the distribution's gems.
  before do
    skip "activejob is not in this bundle" if Gem::Specification.find_all_by_name("activejob").empty?
  end

  def push(code)
    client = ScriptProcess.new(redis, "#{app}\n#{code}")
    expect(client.process.wait).to be_success, client.log
  end

  with_each_fetch do
    it "recovers a marked job after kill -9, and no other runs again" do
      push("MarkedTask.perform_later(#{gate.path.inspect}); UnmarkedTask.perform_later(#{gate.path.inspect})")
      payloads = Queues.queued(redis)
      marked, unmarked = payloads.partition { |payload| JSON.parse(payload)["wrapped"] == "MarkedTask" }.map(&:first)
      expect([marked, unmarked].map { |payload| JSON.parse(payload)["processing"] }).to eq([true, false])
      worker = SidekiqProcess.new(redis, app: app).up.runs(*payloads.map { |payload| Queues.jid(payload) })
      expect(Queues.in_flight(redis)[worker.identity]).to match_array((fetch == :native) ? payloads : [marked])
      worker.kill
      other = SidekiqProcess.new(redis, app: app).up.runs(Queues.jid(marked))
      gate.open
      eventually("the end") { other.done == [Queues.jid(marked)] }
      eventually("the ack") { Queues.everywhere(redis).empty? }
      # What nobody has on record is not there to be told of.
      unmarked_too = (fetch == :native) ? [%w[UnmarkedTask dead]] : []
      expect(Queues.journal(redis).map { |job| job.values_at("class", "outcome") }).to match_array([%w[MarkedTask requeued], *unmarked_too])
    end

    it "recovers a job that only its wrapped class marks" do
      push("MarkedTask.perform_later(#{gate.path.inspect})")
      payload = Queues.queued(redis).first.sub(%("processing":true,), "")
      expect(JSON.parse(payload)).not_to have_key("processing")
      redis.call("DEL", "queue:default")
      Queues.push(redis, payload)
      worker = SidekiqProcess.new(redis, app: app).up.runs(Queues.jid(payload))
      expect(Queues.in_flight(redis)).to eq(worker.identity => [payload])
      expect(redis.call("HGET", "sidekiq_processing:info:#{worker.identity}", "marked:MarkedTask")).to eq("1")
      worker.kill
      SidekiqProcess.new(redis, app: app).up.runs(Queues.jid(payload))
    end
  end
end
