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

  it "says at debug what it has skipped for want of a digest" do
    output = clear('[{"jid" => "a"}, nil, "text"].each { |job| tracker.clear_unique_jobs_lock(job) }')
    expect(output.lines(chomp: true)).to eq(%w[a - -].map { |jid| "DEBUG ProcessingTracker skipped unique-jobs lock: digest=- jid=#{jid}: there is no digest" })
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
      jids = ["", :"", [], {}, 1.5, false, "\xff"]
      output = clear("#{jids}.each { |jid| p tracker.clear_unique_jobs_lock('lock_digest' => 'uniquejobs:d', 'jid' => jid) }", env: env)
      shown = ['""', '""', "[]", "{}", "1.5", "false", "\uFFFD"]
      expect(output.lines(chomp: true)).to eq(shown.flat_map { |jid|
        ["DEBUG ProcessingTracker skipped unique-jobs lock: digest=uniquejobs:d jid=#{jid}: the jid is empty, or is none", "false"]
      })
      expect(redis.call("HKEYS", "uniquejobs:d:LOCKED")).to contain_exactly("j1", "j2")
    end

    it "takes a digest in any encoding that is text, and skips one that is not" do
      lock("uniquejobs:\u00fc", "j1", "j2")
      output = clear(<<~'RUBY', env: env)
        digest = "uniquejobs:\u00fc"
        [[digest.b, "j1"], [digest.encode("UTF-16LE"), "j2".b], ["\xff", "j2"], ["\xff".b, "j\xff"], ["\x00\xd8".dup.force_encoding("UTF-16LE"), "j2"]].each do |one, jid|
          p tracker.clear_unique_jobs_lock("lock_digest" => one, "jid" => jid)
        end
      RUBY
      lines = output.lines(chomp: true)
      expect(lines.values_at(1, 3, 5, 7, 9)).to eq(%w[true true false false false])
      expect(lines.values_at(4, 6, 8)).to all(match(/\ADEBUG ProcessingTracker skipped unique-jobs lock: digest=\S+ jid=\S+: the digest is no UTF-8\z/))
      expect(redis.call("KEYS", "uniquejobs:*")).to be_empty
    end

    it "removes the whole lock where there is no jid" do
      lock("uniquejobs:d", "j1", "j2")
      expect(clear('p tracker.clear_unique_jobs_lock(unique_digest: "uniquejobs:d")', env: env)).to end_with("true\n")
      expect(redis.call("KEYS", "uniquejobs:*")).to be_empty
    end
  end
end
