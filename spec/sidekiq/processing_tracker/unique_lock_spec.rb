# frozen_string_literal: true

RSpec.describe "clear_unique_jobs_lock" do
  let(:nowhere) { {"REDIS_URL" => "redis://127.0.0.1:1/0"} }

  def clear(code, env: nowhere, level: "DEBUG")
    output, status = RubyProcess.run_ruby(<<~RUBY, env: env)
      require "logger"
      Sidekiq.logger.level = Logger::FATAL
      Sidekiq::ProcessingTracker.config.logger =
        Logger.new($stdout, level: Logger::#{level}, formatter: ->(severity, _, _, text) { "\#{severity} \#{text}\n" })
      tracker = Sidekiq::ProcessingTracker
      #{code}
    RUBY
    expect(status).to be_success
    output
  end

  it "raises nothing without Redis and without sidekiq-unique-jobs, also by send" do
    output, status = RubyProcess.run_ruby("Sidekiq::ProcessingTracker.send(:clear_unique_jobs_lock, {'unique_digest' => 'test'})", env: nowhere)
    expect([status.success?, output]).to match([true, a_string_matching(/WARN.*failed to clear unique-jobs lock: digest=test jid=-/)])
  end

  it "does nothing for what has no digest, without a word above debug" do
    output = clear('p [{}, {"jid" => "a"}, {lock_digest: ""}, {"lock_digest" => 5}, nil, "text", 5, [1]].map { |job| tracker.clear_unique_jobs_lock(job) }',
      level: "INFO")
    expect(output).to eq("#{[false] * 8}\n")
  end

  describe "with Redis" do
    let(:redis) { RedisServer.new }
    let(:env) { {"REDIS_URL" => redis.url} }

    # As versions 7 and 8 of sidekiq-unique-jobs leave it.
    def lock(digest, *jids)
      jids.each { |jid| redis.call("HSET", "#{digest}:LOCKED", jid, "1700000000") }
      redis.call("SET", digest, jids.first)
      redis.call("ZADD", "uniquejobs:digests", 1, digest)
    end

    it "frees what the jid holds, says so at debug, and leaves what others hold" do
      lock("uniquejobs:d", "j1", "j2")
      lock("uniquejobs:d:RUN", "j1")
      output = clear('2.times { p tracker.clear_unique_jobs_lock("lock_digest" => "uniquejobs:d", "jid" => "j1") }', env: env)
      expect(output.lines(chomp: true)).to eq([
        "DEBUG ProcessingTracker cleared unique-jobs lock: digest=uniquejobs:d jid=j1", "true",
        "DEBUG ProcessingTracker skipped unique-jobs lock: digest=uniquejobs:d jid=j1: nothing is held", "false"
      ])
      expect(redis.call("HKEYS", "uniquejobs:d:LOCKED")).to eq(["j2"])
      expect(redis.call("EXISTS", "uniquejobs:d:RUN:LOCKED")).to eq(0)
      expect(redis.call("ZRANGE", "uniquejobs:digests", 0, -1)).to eq(["uniquejobs:d"])
    end

    it "takes a Symbol or an Integer for the jid that it spells" do
      lock("uniquejobs:d", "j1", "7", "j2")
      output = clear('[:j1, 7, "none"].each { |jid| p tracker.clear_unique_jobs_lock("lock_digest" => "uniquejobs:d", "jid" => jid) }', env: env, level: "INFO")
      expect(output.lines(chomp: true)).to eq(%w[true true false])
      expect(redis.call("HKEYS", "uniquejobs:d:LOCKED")).to eq(["j2"])
    end

    it "touches nothing where there is a jid that is none" do
      lock("uniquejobs:d", "j1", "j2")
      output = clear('["", :"", [], {}, 1.5, false].each { |jid| p tracker.clear_unique_jobs_lock("lock_digest" => "uniquejobs:d", "jid" => jid) }', env: env)
      expect(output.lines(chomp: true)).to match([a_string_starting_with("WARN ProcessingTracker skipped unique-jobs lock: digest=uniquejobs:d: the jid"), "false"] * 6)
      expect(redis.call("HKEYS", "uniquejobs:d:LOCKED")).to contain_exactly("j1", "j2")
    end

    it "removes the whole lock where there is no jid" do
      lock("uniquejobs:d", "j1", "j2")
      expect(clear('p tracker.clear_unique_jobs_lock(unique_digest: "uniquejobs:d")', env: env)).to end_with("true\n")
      expect(redis.call("KEYS", "uniquejobs:*")).to be_empty
    end
  end
end
