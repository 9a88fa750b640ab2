# frozen_string_literal: true

# Who fetches: decided once, at the start, and told in one line. The native fetch stands aside for whatever else has its
# hand in fetching, unless it is told not to.
RSpec.describe "the choice of the fetch" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # For the option of 6.5, which is an object, and that of later versions, which is a class.
  let(:use) do
    <<~RUBY
      require "sidekiq/fetch"

      def use(fetch_class)
        Sidekiq.configure_server do |config|
          Sidekiq::VERSION < "7" ? config[:fetch] = fetch_class.new(config) : config[:fetch_class] = fetch_class
        end
      end
    RUBY
  end

  def start(fetch, queue, app)
    SidekiqProcess.new(redis, app: use + app, queues: [queue], concurrency: 1, env: {"PROCESSING_FETCH" => fetch})
  end

  # What the log says of it: level and text.
  def lines(worker)
    worker.log.scan(/(INFO|WARN|ERROR).*?: ProcessingTracker (fetch: .*)$/)
  end

  # Whether a job that nothing marks is on record while it runs, as each is under the native fetch.
  def records_all?(worker, queue)
    jid = Queues.jid(Queues.push(redis, Queues.payload("GatedJob", gate.path, queue: queue, processing: false), queue: queue))
    worker.runs(jid)
    Queues.in_flight(redis).fetch(worker.identity).any? { |payload| Queues.jid(payload) == jid }
  end

  def expect_native(worker, queue, line)
    expect(lines(worker)).to eq([line])
    expect(records_all?(worker, queue)).to be(true)
    expect(redis.call("HGET", "sidekiq_processing:info:#{worker.identity}", "fetch")).to eq("native")
  end

  def expect_middleware(worker, queue, line)
    expect(lines(worker)).to eq([line])
    expect(records_all?(worker, queue)).to be(false)
    expect(redis.call("HGET", "sidekiq_processing:info:#{worker.identity}", "fetch")).to eq("sidekiq")
  end

  # The same app with auto and with native, side by side.
  def expect_obstacle(app, obstacle)
    auto, native = %w[auto native].map { |fetch| start(fetch, fetch, app) }.each(&:up)
    aggregate_failures do
      expect_middleware(auto, "auto", ["INFO", "fetch: stands aside, since #{obstacle}; jobs are recorded by the middleware"])
      expect_native(native, "native", ["WARN", "fetch: native, as configured, though #{obstacle}: the native fetch replaces that"])
    end
    gate.open
    eventually("the acks") { Queues.in_flight(redis).values.flatten.empty? }
    [auto, native]
  end

  it "is the native one where only Sidekiq's own is in use, and Sidekiq's where that is asked for" do
    workers = %w[auto native sidekiq].to_h { |fetch| [fetch, start(fetch, fetch, "")] }
    workers.each_value(&:up)
    aggregate_failures do
      %w[auto native].each { |fetch| expect_native(workers[fetch], fetch, ["INFO", "fetch: native"]) }
      expect_middleware(workers["sidekiq"], "sidekiq", ["INFO", "fetch: Sidekiq's (as configured); jobs are recorded by the middleware"])
    end
    gate.open
    eventually("the acks") { Queues.in_flight(redis).values.flatten.empty? }
  end

  it "says what value it does not know" do
    worker = start("native!", "default", "")
    expect(worker.process.wait).not_to be_success
    expect(worker.log).to match(/fetch \(from PROCESSING_FETCH\) is "native!": allowed is :auto, :native or :sidekiq/)
  end

  it "is not the native one where the app has a fetch of its own" do
    expect_obstacle(<<~RUBY, "the app fetches with OwnFetch")
      OwnFetch = Class.new(Sidekiq::BasicFetch)
      use(OwnFetch)
    RUBY
  end

  it "is not the native one where something is put before Sidekiq's fetch" do
    expect_obstacle(<<~RUBY, "Leash is put before Sidekiq's fetch")
      module Leash
        def retrieve_work
          super
        end
      end
      Sidekiq::BasicFetch.prepend(Leash)
    RUBY
  end

  it "is not the native one where a method of Sidekiq's fetch is not Sidekiq's own" do
    expect_obstacle(<<~RUBY, "Sidekiq::BasicFetch#queues_cmd is not Sidekiq's own")
      class Sidekiq::BasicFetch
        alias_method :own_queues_cmd, :queues_cmd
        def queues_cmd = own_queues_cmd
      end
    RUBY
  end

  it "is not the native one where somebody has extended the fetcher itself" do
    expect_obstacle(<<~RUBY, "Leash extends Sidekiq's fetcher")
      require "sidekiq/launcher"

      module Leash
        def retrieve_work
          super
        end
      end

      # Another gem that starts with the launcher.
      Sidekiq::Launcher.prepend(Module.new do
        def run(...)
          fetchers = config.respond_to?(:capsules) ? config.capsules.values.map(&:fetcher) : [config[:fetch]]
          fetchers.each { |fetcher| fetcher.extend(Leash) }
          super
        end
      end)
    RUBY
  end

  it "is not the native one with Sidekiq Pro" do
    expect_obstacle("module Sidekiq::Pro; end", "Sidekiq Pro is loaded")
  end

  # It is for newer versions of Ruby than the oldest, so here only its name is real.
  it "is not the native one with the reliable fetch of sidekiq-unique-jobs 9, where that is in use" do
    app = <<~RUBY
      module SidekiqUniqueJobs
        module Fetch
          Reliable = Class.new(Sidekiq::BasicFetch)
        end
      end
    RUBY
    loaded = start("auto", "loaded", app).up
    expect_native(loaded, "loaded", ["INFO", "fetch: native"])
    expect_obstacle("#{app}use(SidekiqUniqueJobs::Fetch::Reliable)", "the app fetches with SidekiqUniqueJobs::Fetch::Reliable")
  end

  it "names all reasons in that one line" do
    worker = start("auto", "default", <<~RUBY).up
      module Sidekiq::Pro; end
      Leash = Module.new
      Sidekiq::BasicFetch.prepend(Leash)
    RUBY
    expect(lines(worker)).to eq([["INFO", "fetch: stands aside, since Sidekiq Pro is loaded, and Leash is put before Sidekiq's fetch; " \
      "jobs are recorded by the middleware"]])
  end

  it "is not moved by what has nothing to do with fetching" do
    worker = start("auto", "default", <<~RUBY).up
      # As apps do that parse with another library.
      def Sidekiq.load_json(string) = JSON.parse(string)

      # A method that the fetch has from elsewhere.
      module Sidekiq::Component
        def harmless = nil
      end
    RUBY
    expect_native(worker, "default", ["INFO", "fetch: native"])
  end
end
