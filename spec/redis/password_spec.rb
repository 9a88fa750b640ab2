# frozen_string_literal: true

# Passwords that are Procs, of a real server that changes its password.
RSpec.describe "a Redis whose password changes" do
  let(:redis) { RedisServer.new }
  let(:file) { File.join(Scratch.folder, "password") }

  def change_to(password)
    File.write(file, password)
    redis.call("CONFIG", "SET", "requirepass", password)
    redis.log_in(password: password)
  end

  def cut
    redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    redis.call("CLIENT", "KILL", "TYPE", "pubsub")
  end

  # What Sidekiq and the tracker are told of the server. Before 7.3 Sidekiq takes no Proc: there it comes in as a user of its own, whose
  # password stays, and the tracker has the Proc from redis_options.
  def app(password)
    settings = ->(sidekiqs) { %w[server client].map { |side| "Sidekiq.configure_#{side} { |config| config.redis = #{sidekiqs} }\n" }.join }
    trackers = "{path: #{redis.socket.inspect}, password: #{password}}"
    return settings.call(trackers) unless Sidekiq::VERSION < "7.3"

    redis.call("ACL", "SETUSER", "sidekiq", "on", ">of-its-own", "~*", "&*", "+@all")
    settings.call({path: redis.socket, username: "sidekiq", password: "of-its-own"}) +
      "Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{trackers} }\n"
  end

  it "is asked for it before each login" do
    change_to("secret-one")
    gate = Gate.new
    push = -> { Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path))) }
    # Exits where it cannot tell, but not in Sidekiq's own threads, which would end the process.
    asked = "->(_user) { File.read(#{file.inspect}) rescue (Thread.current.name == 'processing_tracker.passwords') ? exit(3) : raise }"
    sidekiq = SidekiqProcess.new(redis, app: app(asked), env: {"REDIS_URL" => nil}).up
    jids = [push.call]
    sidekiq.runs(*jids)
    change_to("secret-two")
    cut
    jids << push.call
    sidekiq.runs(*jids, within: 60)
    eventually("the record of the job") { Queues.in_flight(redis).values.flatten.size == 2 }

    # One who cannot tell: what it was is tried.
    File.delete(file)
    File.symlink("/nowhere", file)
    cut
    sidekiq.wait_for_log(/could not ask for the password of Redis \(SystemExit\), tries what it was/)
    gate.open
    eventually("the acks") { Queues.in_flight(redis).values.flatten.empty? }
    expect(sidekiq.identities.size).to eq(1)
    expect(sidekiq.log).not_to match(/lost the lease|secret-/)
  end

  it "lets a console wait with it" do
    change_to("secret-one")
    victim = SidekiqProcess.new(redis, app: app('"secret-one"'), env: {"REDIS_URL" => nil}).up
    victim.kill
    code = <<~RUBY
      Sidekiq.logger.level = Logger::FATAL
      Sidekiq::ProcessingTracker.configure { |config| config.heartbeat_ttl = 1 }
      #{app('->(_user) { "secret-one" }')}
      left = [Sidekiq::ProcessingTracker.reenqueue_orphans!.fetch(:requeued), Sidekiq::ProcessingTracker.instances.size]
      p [:left, *left, Thread.list.map(&:name).compact.grep(/processing_tracker/)]
    RUBY
    output, = RubyProcess.run_ruby(code, env: {"REDIS_URL" => nil})
    expect(output).to end_with("[:left, 0, 0, []]\n")
  end
end
