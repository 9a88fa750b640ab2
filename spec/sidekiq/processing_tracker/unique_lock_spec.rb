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
end
