# frozen_string_literal: true

# ActiveJob through Sidekiq's own adapter.
RSpec.describe "ActiveJob" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  let(:tasks) do
    <<~RUBY
      class MarkedTask < ActiveJob::Base
        include Sidekiq::ProcessingTracker::Worker

        def perform(gate, *)
          GatedJob.new.tap { |job| job.jid = provider_job_id }.perform(gate)
        end
      end

      class UnmarkedTask < MarkedTask
        sidekiq_options processing: false
      end

      # Its first attempt fails, and ActiveJob makes another job of it.
      class StubbornTask < ActiveJob::Base
        include Sidekiq::Job::Options unless respond_to?(:sidekiq_options) # Rails does that by itself
        sidekiq_options processing: true
        retry_on RuntimeError, wait: 0, attempts: 5

        def perform(gate)
          raise "as told" if executions == 1

          GatedJob.new.tap { |job| job.jid = provider_job_id }.perform(gate)
        end
      end
    RUBY
  end

  let(:without_rails) do
    <<~RUBY
      require "active_job"

      begin
        require "sidekiq/rails"
      rescue LoadError, NameError
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
      #{tasks}
    RUBY
  end

  # In the order of Sidekiq's command, which loads Rails before the application. The jobs are loaded when they are needed, and
  # again when their files have changed.
  let(:with_rails) do
    <<~RUBY
      require "fileutils"
      require "rails"
      require "sidekiq/rails"
      require "active_job/railtie"

      FileUtils.mkdir_p("app/jobs")
      DATA_OF_JOBS = #{tasks.dump}
      DATA_OF_JOBS.split(/^(?=class |# Its)/).grep(/^class (\\w+)/) do |code|
        name = code[/^class (\\w+)/, 1]
        File.write("app/jobs/\#{name.gsub(/(?<=.)([A-Z])/, "_\\\\1").downcase}.rb", code)
      end

      class TrialApplication < Rails::Application
        config.root = Dir.pwd
        config.eager_load = false
        config.enable_reloading = true
        config.logger = Logger.new($stdout)
        config.active_job.queue_adapter = :sidekiq
        config.autoload_paths << ENV["MORE_JOBS"] if ENV["MORE_JOBS"]
      end
      Rails.application.initialize!
    RUBY
  end

  # bin/setup leaves it out where there are only the distribution's gems.
  before do
    skip "activejob is not in this bundle" if Gem::Specification.find_all_by_name("activejob").empty?
  end

  # @return [void]
  def self.with_each_application(&examples)
    context("without Rails") do
      let(:app) { without_rails }

      class_exec(&examples)
    end

    context("with a Rails application") do
      before { skip "railties is not in this bundle" if Gem::Specification.find_all_by_name("railties").empty? }

      let(:app) { with_rails }

      class_exec(&examples)
    end
  end

  def push(code)
    client = ScriptProcess.new(redis, "#{app}\n#{code}")
    expect(client.process.wait).to be_success, client.log
  end

  with_each_application do
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
        expect(Queues.journal(redis).map { |job| job.values_at("class", "outcome") }).to contain_exactly(%w[MarkedTask requeued], *unmarked_too)
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

      it "recovers what retry_on has made of a job" do
        push("StubbornTask.perform_later(#{gate.path.inspect})")
        first = Queues.jid(Queues.queued(redis).first)
        worker = SidekiqProcess.new(redis, app: app).up
        eventually("the second attempt") { worker.started.any? }
        second = worker.started.last
        expect(second).not_to eq(first)
        eventually("its record") { Queues.in_flight(redis)[worker.identity].map { |payload| Queues.jid(payload) } == [second] }
        worker.kill
        other = SidekiqProcess.new(redis, app: app).up.runs(second)
        gate.open
        eventually("the end") { other.done == [second] }
        eventually("the ack") { Queues.everywhere(redis).empty? }
        expect(Queues.journal(redis).map { |job| job.values_at("class", "jid", "outcome") }).to eq([["StubbornTask", second, "requeued"]])
      end
    end
  end

  context("with a Rails application whose code changes") do
    before { skip "railties is not in this bundle" if Gem::Specification.find_all_by_name("railties").empty? }

    let(:app) { with_rails }
    let(:folder) { Scratch.folder }

    def write(version)
      File.write(File.join(folder, "changing_task.rb"), <<~RUBY)
        class ChangingTask < ActiveJob::Base
          include Sidekiq::ProcessingTracker::Worker

          def perform
            $stdout.write("version #{version}, executor: \#{Rails.application.executor.active?}\\n")
          end
        end
      RUBY
    end

    with_each_fetch do
      it "leaves the reloader and the executor to do their work" do
        write(1)
        push("require #{File.join(folder, "changing_task").dump}; 2.times { ChangingTask.perform_later }")
        second, first = redis.call("LRANGE", "queue:default", 0, -1)
        redis.call("LPOP", "queue:default")
        worker = SidekiqProcess.new(redis, app: app, env: {"MORE_JOBS" => folder}).up
        worker.wait_for_log(/^version 1, executor: true$/)
        eventually("the ack") { Queues.everywhere(redis).empty? }
        write(2)
        expect(first).not_to eq(second)
        Queues.push(redis, second)
        worker.wait_for_log(/^version 2, executor: true$/)
        expect(worker.stop).to be_success
      end
    end
  end
end
