# frozen_string_literal: true

# Every way in which Sidekiq is done with a job is an ack, and nothing else is.
RSpec.describe "a job's end" do
  let(:redis) { RedisServer.new }

  let(:app) do
    <<~'RUBY'
      # What Redis has in flight of this process while the block's job runs.
      module InFlight
        def note_in_flight(list)
          hash, hands = %w[inflight hands].map { |kind| "sidekiq_processing:#{kind}:#{Sidekiq::ProcessingTracker.identity}" }
          payloads = Sidekiq.redis do |conn|
            # A job goes from a hand into the hash.
            in_hands = conn.hkeys(hands).flat_map { |number| conn.lrange("#{hands}:#{number}", 0, -1) }
            in_hands + conn.hgetall(hash).except("call").filter_map do |token, payload|
              number = token[/\A(\d+-\d+)\+ /, 1]
              number ? conn.lindex("#{hash}:#{number}", 0) : payload
            end
          end
          note(list, [jid, payloads.map { |payload| JSON.parse(payload)["jid"] }.uniq].to_json)
        end
      end

      class EndingJob
        include Sidekiq::Job
        include InFlight

        def perform(how = nil)
          note_in_flight("in_flight")
          raise "as told" if how == "fail"
        end
      end

      class SkippingMiddleware
        def call(instance, job, _queue)
          yield
          raise Sidekiq::JobRetry::Skip if job["args"] == ["skip"]
        end
      end

      # perform_inline of Sidekiq 6.5 needs this of ActiveSupport.
      String.class_eval { def constantize = Object.const_get(self) } unless String.method_defined?(:constantize)

      class InnerJob
        include Sidekiq::Job
        include Sidekiq::ProcessingTracker::Worker
        include InFlight

        def perform
          note_in_flight("inner")
        end
      end

      class OuterJob
        include Sidekiq::Job
        include InFlight

        def perform
          InnerJob.perform_inline
          note_in_flight("in_flight")
        end
      end

      Sidekiq.configure_server do |config|
        config.server_middleware { |chain| chain.add(SkippingMiddleware) }
        config.death_handlers << ->(job, _error) { note("deaths", job["jid"]) }
      end
    RUBY
  end

  let(:worker) { SidekiqProcess.new(redis, app: app, concurrency: 1).up }

  def push(job_class, *args, **fields)
    Queues.jid(Queues.push(redis, Queues.marked(job_class, *args, **fields)))
  end

  def set(name)
    redis.call("ZRANGE", name, 0, -1).map { |payload| Queues.jid(payload) }
  end

  # It was recorded when it ran, and nothing of it is left.
  def expect_settled(*jids)
    eventually("the records' end") { Queues.everywhere(redis).empty? }
    expect(Queues.notes(redis, "in_flight")).to match_array(jids.map { |jid| [jid, [jid]] })
  end

  with_each_fetch do
    it "is an ack when its retry is written" do
      worker
      jid = push("EndingJob", "fail", retry: true)
      eventually("the retry") { set("retry") == [jid] }
      expect_settled(jid)
      expect(set("retry")).to eq([jid])
    end

    it "is an ack when it dies" do
      worker
      jid = push("EndingJob", "fail", retry: 0)
      eventually("the dead set") { set("dead") == [jid] }
      expect_settled(jid)
      expect(redis.call("LRANGE", "deaths", 0, -1)).to eq([jid])
    end

    it "is an ack when it fails with retry: false" do
      worker
      jid = push("EndingJob", "fail", retry: false)
      eventually("its run") { Queues.notes(redis, "in_flight").any? }
      expect_settled(jid)
      expect(set("retry") + set("dead")).to be_empty
    end

    it "is an ack when a middleware skips it" do
      worker
      jid = push("EndingJob", "skip")
      eventually("its run") { Queues.notes(redis, "in_flight").any? }
      expect_settled(jid)
      expect(set("retry") + set("dead")).to be_empty
    end

    it "is not that of a job that it runs inline, which has no record of its own" do
      worker
      jid = push("OuterJob")
      eventually("its run") { Queues.notes(redis, "in_flight").any? }
      expect(Queues.notes(redis, "inner").map(&:last)).to eq([[jid]])
      expect_settled(jid)
    end

    it "is final: nothing is recovered when the worker dies later" do
      worker
      jids = [push("EndingJob", "fail", retry: true), push("EndingJob", "fail", retry: 0), push("EndingJob", "skip"), push("EndingJob")]
      eventually("the runs") { Queues.notes(redis, "in_flight").size == jids.size }
      expect_settled(*jids)
      worker.kill
      other = SidekiqProcess.new(redis, queues: ["later"]).up
      eventually("the end of the dead one") { Queues.identities(redis) == [other.identity] }
      expect(Queues.journal(redis)).to be_empty
      expect(Queues.queued(redis)).to be_empty
      expect([set("retry"), set("dead")]).to eq([jids.take(1), [jids[1]]])
    end
  end
end
