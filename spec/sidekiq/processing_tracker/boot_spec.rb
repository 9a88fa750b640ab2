# frozen_string_literal: true

# A real Sidekiq that is given settings which cannot be used: it says which, and does not boot.
RSpec.describe "booting Sidekiq with a bad setting" do
  let(:redis) { RedisServer.new }

  def boot(app: "", env: {}, **options)
    sidekiq = SidekiqProcess.new(redis, app: app, env: env, **options)
    expect(sidekiq.process.wait).not_to be_success
    expect(Queues.identities(redis)).to be_empty
    sidekiq.log
  end

  {
    {"PROCESSING_NS" => "a b"} => /namespace \(from PROCESSING_NS\) is "a b": allowed is/,
    {"PROCESSING_INSTANCE_ID" => "a*"} => /instance_id \(from PROCESSING_INSTANCE_ID\) is "a\*": allowed is/,
    {"HEARTBEAT_INTERVAL" => "soon"} => /heartbeat_interval \(from HEARTBEAT_INTERVAL\) is "soon": allowed is/,
    {"HEARTBEAT_TTL" => "0.5"} => /heartbeat_ttl \(from HEARTBEAT_TTL\) is "0.5": allowed is/,
    {"RECOVERY_LOCK_TTL" => "-1"} => /recovery_lock_ttl \(from RECOVERY_LOCK_TTL\) is "-1": allowed is/,
    {"PROCESSING_TRACK" => "none"} => /track \(from PROCESSING_TRACK\) is "none": allowed is :marked or :all/
  }.each do |env, message|
    it "refuses #{env}" do
      expect(boot(env: env)).to match(message)
    end
  end

  it "refuses a logger that is none" do
    expect(boot(app: "Sidekiq::ProcessingTracker.config.logger = 5")).to match(/logger is a Integer: allowed is/)
  end

  it "refuses redis_options that cannot be used, and shows no password" do
    log = boot(app: "Sidekiq::ProcessingTracker.config.redis_options = {url: 'redis://:secret@host', sentinels: []}")
    expect(log).to match(/redis_options: sentinels is a Array: allowed is a list/)
    expect(log).not_to include("secret")
  end

  it "refuses the native fetch where redis_options lead to another database" do
    log = boot(app: "Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{redis.url(db: 1).inspect} and config.fetch = :native }")
    expect(log).to match(/fetch is :native, but redis_options leads to another server or database than Sidekiq's/)
  end

  # Sidekiq 6.5 takes a pool that the application has made, of whatever connections.
  describe "a pool of the application's own", bundle: :unique_jobs_7, if: RUBY_VERSION.to_f < 3.2 do
    # Passes everything on to a client of redis-rb, and does not say so.
    def boot_with(more)
      boot(app: <<~RUBY, bundle: :unique_jobs_7)
        class WrappedRedis
          def initialize(redis) = @redis = redis
          def method_missing(...) = @redis.public_send(...)
          #{more}
        end

        Sidekiq.redis = ConnectionPool.new(size: 15) { WrappedRedis.new(Redis.new(path: #{redis.socket.inspect})) }
      RUBY
    end

    it "refuses connections from which no settings can be read, and names the way out" do
      expect(boot_with("")).to match(
        /Sidekiq's Redis settings: its connections are of the class WrappedRedis, from which settings cannot be read: set redis_options to the same server and database/
      )
    end

    # Redis::Namespace answers this, and passes the rest on under other names.
    it "refuses those of redis-namespace" do
      expect(boot_with("def namespace = 'shop'")).to match(/Sidekiq's Redis settings: it uses redis-namespace, which is not supported/)
    end
  end
end
