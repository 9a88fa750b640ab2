# frozen_string_literal: true

# A Redis that refuses the tracker when Sidekiq boots: Sidekiq says why, and does not run with jobs that nobody tracks.
# (Settings that cannot be used at all are in spec/sidekiq/processing_tracker/boot_spec.rb.)
RSpec.describe "booting Sidekiq with a Redis that refuses the tracker", :own_user do
  let(:redis) { RedisServer.new }

  def boot(options)
    app = "Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{options.inspect} }"
    sidekiq = SidekiqProcess.new(redis, app: app)
    expect(sidekiq.process.wait.exitstatus).to eq(1)
    expect(Queues.identities(redis)).to be_empty
    expect(sidekiq.log).not_to include("s3cret")
    sidekiq.log
  end

  it "names a password that is refused, and does not show it" do
    redis.call("ACL", "SETUSER", "tracker", "on", ">another", "~*", "+@all")
    expect(boot({path: redis.socket, username: "tracker", password: "s3cret"})).to match(
      /redis_options \(unix:#{redis.socket} db 0\) cannot be compared with Sidekiq's Redis: unix:.* db 0: Redis refused the username or password/
    )
  end

  it "names a right that is missing" do
    redis.call("ACL", "SETUSER", "tracker", "on", ">s3cret", "~*")
    expect(boot({path: redis.socket, username: "tracker", password: "s3cret"})).to match(
      /redis_options \(unix:#{redis.socket} db 0\) cannot be compared with Sidekiq's Redis: .*NOPERM/
    )
  end

  it "names a database that is none" do
    expect(boot({path: redis.socket, db: 99})).to match(
      /redis_options \(unix:#{redis.socket} db 99\) cannot be compared with Sidekiq's Redis: .*DB index is out of range/
    )
  end

  it "names a server that is not there" do
    expect(boot({host: "127.0.0.1", port: 1, password: "s3cret"})).to match(
      %r{redis_options \(redis://127.0.0.1:1/0\) cannot be compared with Sidekiq's Redis: .*refused}
    )
  end
end
