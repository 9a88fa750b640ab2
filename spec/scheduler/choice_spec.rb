# frozen_string_literal: true

# Who moves due jobs: decided once, at the start, and told in one line. The tracker stands aside for whatever else has its
# hand in it.
RSpec.describe "the choice of the scheduler" do
  let(:redis) { RedisServer.new }

  def lines(app, bundle)
    SidekiqProcess.new(redis, app: "require 'sidekiq/scheduled'\nrequire 'sidekiq/client'\n#{app}", bundle: bundle).up
      .wait_for_log(/ProcessingTracker scheduler: .*$/).log.scan(/ProcessingTracker (scheduler: .*)$/).flatten
  end

  # @param change [String] what another gem does to the enqueuer of each poller
  extended = lambda do |change|
    <<~RUBY
      require "sidekiq/launcher"
      Leash = Module.new
      Sidekiq::Launcher.prepend(Module.new do
        def run(...)
          enqueuer = poller.instance_variable_get(:@enq)
          #{change}
          super
        end
      end)
    RUBY
  end

  changed = lambda do |owner, name|
    <<~RUBY
      #{owner}.class_eval do
        alias_method :own_#{name}, :#{name}
        define_method(:#{name}) { |*args, **options| own_#{name}(*args, **options) }
      end
    RUBY
  end

  obstacles = {
    "Sidekiq::Client#push is not Sidekiq's own" => changed.call("Sidekiq::Client", "push"),
    "Sidekiq::Client#raw_push is not Sidekiq's own" => "Sidekiq::Client.prepend(Module.new { def raw_push(payloads) = super })",
    "Sidekiq::Client#atomic_push is not Sidekiq's own" => changed.call("Sidekiq::Client", "atomic_push"),
    "Sidekiq Pro is loaded" => "module Sidekiq::Pro; end",
    "Leash is put before Sidekiq's scheduler" => "Leash = Module.new\nSidekiq::Scheduled::Enq.prepend(Leash)",
    "Sidekiq::Scheduled::Enq#enqueue_jobs is not Sidekiq's own" => changed.call("Sidekiq::Scheduled::Enq", "enqueue_jobs"),
    "Sidekiq::Scheduled::Enq#zpopbyscore is not Sidekiq's own" => changed.call("Sidekiq::Scheduled::Enq", "zpopbyscore"),
    "Leash extends Sidekiq's scheduler" => extended.call("enqueuer.extend(Leash)"),
    "enqueue_jobs of Sidekiq's scheduler is not its own" => extended.call("def enqueuer.enqueue_jobs(...) = super")
  }

  {nil => "of the specs", :unique_jobs_7 => "6.5"}.each do |bundle, version|
    context("with Sidekiq #{version}", bundle: bundle) do
      obstacles.each do |obstacle, app|
        it "is Sidekiq's where #{obstacle}" do
          expect(lines(app, bundle)).to eq(["scheduler: stands aside, since #{obstacle}"])
        end
      end

      it "is Sidekiq's where its queues are elsewhere", :own_user do
        app = "Sidekiq::ProcessingTracker.config.redis_options = #{redis.url(db: 2).inspect}"
        expect(lines(app, bundle)).to match([/\Ascheduler: stands aside, since redis_options leads to another Redis than Sidekiq's queues \(unix:\S+ db 0\)\z/])
      end

      it "names all reasons in that one line" do
        app = ["Sidekiq::Client#push is not Sidekiq's own", "Sidekiq Pro is loaded"].map { |obstacle| obstacles.fetch(obstacle) }.join
        expect(lines(app, bundle)).to eq(["scheduler: stands aside, since Sidekiq Pro is loaded, and Sidekiq::Client#push is not Sidekiq's own"])
      end

      # Only 6.5 pushes due jobs by this method.
      it "minds the client's class method where Sidekiq's scheduler uses it" do
        app = "Sidekiq::Client.singleton_class.prepend(Module.new { def push(item) = super })"
        stands_aside = (bundle || Sidekiq::VERSION < "7") ? "stands aside, since Sidekiq::Client.push is not Sidekiq's own" : "native"
        expect(lines(app, bundle)).to eq(["scheduler: #{stands_aside}"])
      end

      it "is not moved by what has nothing to do with scheduling" do
        app = <<~RUBY
          def Sidekiq.load_json(string) = JSON.parse(string)
          Sidekiq::Client.class_eval { def harmless = nil }
          Sidekiq::Client.define_singleton_method(:harmless) { nil }
          Sidekiq::Scheduled::Poller.prepend(Module.new { def enqueue = super })
        RUBY
        expect(lines(app, bundle)).to eq(["scheduler: native"])
      end
    end
  end
end
