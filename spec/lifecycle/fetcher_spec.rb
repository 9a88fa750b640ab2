# frozen_string_literal: true

# Fetchers other than Sidekiq's own: some keep jobs in a place of their own while they run.
RSpec.describe "a fetcher of the application's" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # How reliable fetchers work: a job moves to a private list, and leaves it when it is acknowledged.
  let(:app) do
    <<~RUBY
      require "sidekiq/component"

      class ListFetch
        include Sidekiq::Component

        LIST = "private"

        UnitOfWork = Struct.new(:queue, :job, :fetcher) do
          def queue_name = queue.delete_prefix("queue:")
          def acknowledge = fetcher.forget(self)
          def requeue = fetcher.put_back(self)
        end

        def initialize(config)
          @config = config
        end

        def retrieve_work
          job = redis { |conn| conn.lmove("queue:default", LIST, "RIGHT", "LEFT") }
          return UnitOfWork.new("queue:default", job, self) if job

          sleep 0.05
          nil
        end

        def bulk_requeue(units, *)
          units.each(&:requeue)
        end

        def forget(unit)
          redis { |conn| conn.lrem(LIST, 1, unit.job) }
        end

        def put_back(unit)
          redis do |conn|
            conn.multi do |transaction|
              transaction.rpush(unit.queue, unit.job)
              transaction.lrem(LIST, 1, unit.job)
            end
          end
        end
      end

      Sidekiq.configure_server do |config|
        Sidekiq::VERSION < "7" ? config[:fetch] = ListFetch.new(config) : config[:fetch_class] = ListFetch
      end
    RUBY
  end

  def push
    Queues.push(redis, Queues.marked("GatedJob", gate.path))
  end

  # The queue, the tracker's records, and the fetcher's list.
  def everywhere
    Queues.everywhere(redis) + redis.call("LRANGE", "private", 0, -1)
  end

  def warnings(worker)
    worker.log.scan(/ProcessingTracker (\S+) may keep jobs of its own: after a kill -9 both it and the tracker bring them back/).flatten
  end

  it "that has a list of its own puts its jobs back by itself, and each is there once" do
    worker = SidekiqProcess.new(redis, app: app, timeout: 3).up
    payloads = Array.new(2) { push }
    worker.runs(*payloads.map { |payload| Queues.jid(payload) })
    eventually("the records") { everywhere.tally == payloads.to_h { |payload| [payload, 2] } }
    expect(worker.stop).to be_success
    expect(everywhere).to match_array(payloads)
    expect(Queues.queued(redis)).to match_array(payloads)
    expect(Queues.keys_of_instances(redis)).to be_empty
    expect(worker.log).not_to match(/jobs back into their queues|stay recorded/)

    gate.open
    other = SidekiqProcess.new(redis, app: app).up
    eventually("the jobs") { other.done.size == 2 && everywhere.empty? }
    expect(other.started.size).to eq(2)
  end

  it "that has a list of its own is named at boot, once" do
    worker = SidekiqProcess.new(redis, app: app).up
    expect(warnings(worker)).to eq(["ListFetch"])
  end

  it "is not named where its units are Sidekiq's own, and its jobs go back by the tracker" do
    subclass = <<~RUBY
      require "sidekiq/fetch"

      # As gems do that leave some jobs in their queues for a while.
      Sidekiq::BasicFetch.prepend(Module.new do
        def retrieve_work
          super
        end
      end)

      class OtherFetch < Sidekiq::BasicFetch
        def queues_cmd
          super
        end
      end

      Sidekiq.configure_server do |config|
        Sidekiq::VERSION < "7" ? config[:fetch] = OtherFetch.new(config) : config[:fetch_class] = OtherFetch
      end
    RUBY
    worker = SidekiqProcess.new(redis, app: subclass, timeout: 3).up
    payload = push
    worker.runs(Queues.jid(payload))
    eventually("the record") { Queues.in_flight(redis) == {worker.identity => [payload]} }
    expect(worker.stop).to be_success
    expect(everywhere).to eq([payload])
    expect(warnings(worker)).to be_empty
    expect(worker.log).to include("ProcessingTracker put 1 jobs back into their queues")
  end
end
