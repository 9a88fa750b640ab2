# frozen_string_literal: true

RSpec.describe Sidekiq::ProcessingTracker::Worker do
  def option(job_class)
    job_class.get_sidekiq_options["processing"]
  end

  # What a client would push.
  def payload(job_class)
    Sidekiq::Client.new(pool: Sidekiq.redis_pool).send(:normalize_item, {"class" => job_class, "args" => []})
  rescue ArgumentError
    # 6.5 takes the pool as it is.
    Sidekiq::Client.new(Sidekiq.redis_pool).send(:normalize_item, {"class" => job_class, "args" => []})
  end

  it "marks a class that includes it after Sidekiq::Job" do
    job_class = Class.new do
      include Sidekiq::Job
      include Sidekiq::ProcessingTracker::Worker
    end
    expect(option(job_class)).to be(true)
    expect(job_class.sidekiq_options_hash).to include("processing" => true)
    expect(payload(job_class)).to include("processing" => true)
  end

  it "marks a class that includes it before Sidekiq::Job" do
    job_class = Class.new do
      include Sidekiq::ProcessingTracker::Worker
      include Sidekiq::Job
    end
    expect(option(job_class)).to be(true)
    expect(payload(job_class)).to include("processing" => true)
  end

  it "keeps the class's other options, wherever they are set" do
    before = Class.new do
      include Sidekiq::ProcessingTracker::Worker
      include Sidekiq::Job

      sidekiq_options queue: "critical"
    end
    after = Class.new do
      include Sidekiq::Job

      sidekiq_options queue: "critical", retry: 3
      include Sidekiq::ProcessingTracker::Worker
    end
    expect(before.get_sidekiq_options).to include("queue" => "critical", "processing" => true)
    expect(after.get_sidekiq_options).to include("queue" => "critical", "retry" => 3, "processing" => true)
  end

  it "marks subclasses, which may say no" do
    [[Sidekiq::Job, described_class], [described_class, Sidekiq::Job]].each do |modules|
      parent = Class.new { modules.each { |mod| include mod } }
      child = Class.new(parent)
      configured = Class.new(parent) { sidekiq_options queue: "low" }
      refusing = Class.new(parent) { sidekiq_options processing: false }
      expect([child, configured, refusing].map { |job_class| option(job_class) }).to eq([true, true, false])
      expect(option(parent)).to be(true)
    end
  end

  it "marks no other class" do
    Class.new do
      include Sidekiq::Job
      include Sidekiq::ProcessingTracker::Worker
    end
    expect(option(Class.new { include Sidekiq::Job })).to be_nil
  end

  it "marks an ActiveJob class, with or without Sidekiq's options in it" do
    begin
      require "active_job"
    rescue LoadError
      skip "activejob is not installed"
    end

    plain = Class.new(ActiveJob::Base) { include Sidekiq::ProcessingTracker::Worker }
    configured = Class.new(ActiveJob::Base) do
      include Sidekiq::Job::Options

      sidekiq_options retry: 2
      include Sidekiq::ProcessingTracker::Worker
    end
    expect(option(plain)).to be(true)
    expect(configured.get_sidekiq_options).to include("retry" => 2, "processing" => true)
    expect(option(Class.new(plain))).to be(true)
  end
end
