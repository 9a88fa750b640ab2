# frozen_string_literal: true

require "shellwords"

# What 1.x and an outbox have left where redis_options led to a database of their own: nobody finds it who has lost them.
RSpec.describe "redis_options that go" do
  let(:redis) { RedisServer.new }
  let(:env) { {"REDIS_URL" => redis.url, "HEARTBEAT_INTERVAL" => AppProcess::INTERVAL.to_s, "HEARTBEAT_TTL" => AppProcess::TTL.to_s} }
  let(:payload) { Queues.marked("PaymentJob", 1) }

  # @return [Array<String>] what the documents' commands on this key print, run as they stand there, but for the way to the server and the database
  def documented(file, key, db:)
    text = File.read(File.expand_path("../../docs/#{file}", __dir__))
    commands = text.scan(/^ *(redis-cli .*#{Regexp.escape(key)}'?) *(?:#.*)?$/).flatten
    expect(commands).not_to be_empty
    commands.flat_map do |command|
      program, *words = Shellwords.split(command)
      words[words.index("-n") + 1] = db.to_s if words.include?("-n")
      output, status = Open3.capture2e(program, "-s", redis.socket, *words)
      expect(status).to be_success, output
      output.lines(chomp: true)
    end
  end

  def reenqueue_orphans(options)
    output, = RubyProcess.run_ruby(<<~RUBY, env: env)
      Sidekiq::ProcessingTracker.configure { |config| config.redis_options = #{options.inspect} }
      puts Sidekiq::ProcessingTracker.reenqueue_orphans!.fetch(:requeued)
    RUBY
    output.lines(chomp: true).last
  end

  it "leave the jobs of 1.x where they are, and the documented commands show it, until reenqueue_orphans! is called with them" do
    jid = Queues.jid(payload)
    redis.with(db: 2) do |client|
      client.call("SET", "sidekiq_processing:job:#{jid}", payload)
      client.call("SADD", "sidekiq_processing:jobs:web:1", jid)
    end
    left = ["sidekiq_processing:job:#{jid}", "sidekiq_processing:jobs:web:1"]
    expect(reenqueue_orphans(nil)).to eq("0")
    %w[upgrading.md operations.md].each { |file| expect(documented(file, "sidekiq_processing:job*", db: 2)).to match_array(left) }

    expect(reenqueue_orphans(url: redis.url(db: 2))).to eq("1")
    expect(Queues.queued(redis)).to eq([payload])
    %w[upgrading.md operations.md].each { |file| expect(documented(file, "sidekiq_processing:job*", db: 2)).to be_empty }
    expect(documented("operations.md", "sidekiq_processing:outbox:*", db: 2)).to be_empty
    expect(documented("operations.md", "ZCARD sidekiq_processing:instances", db: 2)).to eq(["0"])
  end
end
