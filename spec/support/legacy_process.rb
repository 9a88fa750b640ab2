# frozen_string_literal: true

# A stand-in for a Sidekiq process with the pure-Ruby 1.0 gem: its keys, as that gem wrote and read them. It has nothing
# of the gem that is tested here.
class LegacyProcess < AppProcess
  NAMESPACE = "sidekiq_processing"

  PRELUDE = <<~RUBY
    # frozen_string_literal: true
    $stdout.sync = true
    require "json"
    require "sidekiq"

    module Legacy
      INSTANCE = ENV.fetch("PROCESSING_INSTANCE_ID")
      INTERVAL = Float(ENV.fetch("HEARTBEAT_INTERVAL"))
      TTL = Integer(ENV.fetch("HEARTBEAT_TTL"))

      class << self
        def key(name) = "#{NAMESPACE}:\#{name}"

        def beat
          Sidekiq.redis { |conn| conn.setex(key("instance:\#{INSTANCE}"), TTL, Time.now.to_f.to_s) }
        end

        def start
          beat
          Thread.new { loop { sleep INTERVAL; beat } }
          reenqueue_orphans
          $stdout.write("1.0 started\n")
        end

        def stop
          Sidekiq.redis { |conn| conn.del(key("instance:\#{INSTANCE}")) }
        end

        # As 1.0 did it at boot: each job is pushed anew.
        def reenqueue_orphans
          Sidekiq.redis { |conn| conn.keys(key("jobs:*")) }.each do |set|
            next if Sidekiq.redis { |conn| conn.get(set.sub("jobs:", "instance:")) }

            Sidekiq.redis { |conn| conn.smembers(set) }.each { |jid| reenqueue(key("job:\#{jid}")) }
            Sidekiq.redis { |conn| conn.del(set) }
          end
        end

        def reenqueue(job_key)
          payload = Sidekiq.redis { |conn| conn.get(job_key) } or return
          Sidekiq::Client.push(JSON.parse(payload))
          Sidekiq.redis { |conn| conn.del(job_key) }
          $stdout.write("1.0 recovered \#{JSON.parse(payload).fetch("jid")}\n")
        end
      end

      class Middleware
        def call(_worker, job, _queue)
          return yield unless job["processing"]

          jid = job.fetch("jid")
          Sidekiq.redis do |conn|
            conn.set(Legacy.key("job:\#{jid}"), JSON.generate(job))
            conn.sadd(Legacy.key("jobs:\#{INSTANCE}"), [jid])
          end
          begin
            yield
          ensure
            Sidekiq.redis do |conn|
              conn.srem(Legacy.key("jobs:\#{INSTANCE}"), [jid])
              conn.del(Legacy.key("job:\#{jid}"))
            end
          end
        end
      end
    end

    Sidekiq.configure_server do |config|
      config.server_middleware { |chain| chain.add(Legacy::Middleware) }
      config.on(:startup) { Legacy.start }
      config.on(:shutdown) { Legacy.stop }
    end

    # See AppProcess.
    class GatedJob
      include Sidekiq::Job
      sidekiq_options processing: true

      def perform(gate, *)
        $stdout.write("job started \#{jid}\n")
        sleep 0.02 until [gate, "\#{gate}.\#{Process.pid}"].any? { |file| File.exist?(file) }
        $stdout.write("job done \#{jid}\n")
      end
    end
  RUBY

  # @return [String] how it is called in its keys
  attr_reader :instance

  # @param redis [RedisServer]
  # @param instance [String] PROCESSING_INSTANCE_ID
  # @param timeout [Integer] seconds Sidekiq waits for its jobs when it ends
  def initialize(redis, instance: "web:1", concurrency: 2, queues: ["default"], timeout: 5)
    @redis = redis
    @instance = instance
    super(redis, "", env: {"PROCESSING_INSTANCE_ID" => instance}) do |file|
      [Gem.ruby, Gem.bin_path("sidekiq", "sidekiq"), "-r", file, "-c", concurrency.to_s, "-t", timeout.to_s,
        *queues.flat_map { |queue| ["-q", queue] }]
    end
  end

  # Returns when it beats and has looked for orphans.
  #
  # @return [self]
  def up(within: 30) = wait_for_log(/^1\.0 started/, within: within)

  # @return [Hash{String => String}] jid => payload, of the jobs that it has on record
  def recorded
    @redis.call("SMEMBERS", "#{NAMESPACE}:jobs:#{instance}").to_h { |jid| [jid, @redis.call("GET", "#{NAMESPACE}:job:#{jid}")] }
  end

  # @return [Array<String>] the jids of the jobs that it has recovered
  def recovered = log.scan(/^1\.0 recovered (\S+)$/).flatten

  # @return [Array<String>] all keys of 1.0, of all processes
  def self.keys(redis)
    %w[jobs:* job:* instance:*].flat_map { |pattern| redis.call("KEYS", "#{NAMESPACE}:#{pattern}") }.sort
  end
end
