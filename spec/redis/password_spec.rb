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

  def app(password)
    %i[configure_server configure_client].map { |side|
      "Sidekiq.#{side} { |config| config.redis = {path: #{redis.socket.inspect}, password: #{password}} }\n"
    }.join
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
      Sidekiq.configure_client { |config| config.redis = {path: #{redis.socket.inspect}, password: -> { "secret-one" }} }
      puts Sidekiq::ProcessingTracker.reenqueue_orphans!.fetch(:requeued)
      puts Sidekiq::ProcessingTracker.instances.size
      puts Thread.list.map(&:name).compact.grep(/processing_tracker/).size
    RUBY
    output, = RubyProcess.run_ruby(code, env: {"REDIS_URL" => nil})
    expect(output.lines.last(3).map(&:to_i)).to eq([0, 0, 0])
  end
end
