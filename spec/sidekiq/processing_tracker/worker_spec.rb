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

  it "marks a subclass that includes Sidekiq::Job again, which resets its options" do
    [[Sidekiq::Job, described_class], [described_class, Sidekiq::Job]].each do |modules|
      parent = Class.new { modules.each { |mod| include mod } }
      child = Class.new(parent) do
        include Sidekiq::Job

        sidekiq_options queue: "low"
      end
      expect(child.get_sidekiq_options).to include("processing" => true, "queue" => "low")
      expect(payload(child)).to include("processing" => true)
      expect(option(Class.new(child) { sidekiq_options processing: false })).to be(false)
    end
  end

  it "marks every class that includes a module with it, whatever that module does itself" do
    seen = []
    plain = Module.new { include Sidekiq::ProcessingTracker::Worker }
    telling = Module.new do
      include Sidekiq::ProcessingTracker::Worker

      define_singleton_method(:included) { |base| seen << base }
    end
    # As those of ActiveSupport::Concern: with a block it is a declaration.
    declaring = Module.new do
      include Sidekiq::ProcessingTracker::Worker

      define_singleton_method(:included) { |base = nil, &block| block ? seen << block : super(base) }
      included { nil }
    end
    nested = Module.new { include plain }

    [plain, telling, declaring, nested].each do |mod|
      [[Sidekiq::Job, mod], [mod, Sidekiq::Job]].each do |modules|
        job_class = Class.new { modules.each { |one| include one } }
        expect(option(job_class)).to be(true)
        expect(payload(job_class)).to include("processing" => true)
      end
      expect(mod).not_to respond_to(:get_sidekiq_options)
    end
    expect(seen).to match([Proc, Class, Class])
  end

  it "marks a class that includes a Concern with it" do
    begin
      require "active_support/concern"
    rescue LoadError
      skip "activesupport is not installed"
    end

    concern = Module.new do
      extend ActiveSupport::Concern

      include Sidekiq::ProcessingTracker::Worker

      included do
        include Sidekiq::Job

        sidekiq_options queue: "low"
      end
    end
    outer = Module.new do
      extend ActiveSupport::Concern

      include concern
    end
    [concern, outer].each do |mod|
      job_class = Class.new { include mod }
      expect(job_class.get_sidekiq_options).to include("processing" => true, "queue" => "low")
    end
  end

  it "is refused where it would mark nothing" do
    expect { Class.new { extend Sidekiq::ProcessingTracker::Worker } }
      .to raise_error(ArgumentError, /\Aextend Sidekiq::ProcessingTracker::Worker marks nothing: use `include /)
    expect { Class.new { prepend Sidekiq::ProcessingTracker::Worker } }.to raise_error(ArgumentError, /\Aprepend .* marks nothing/)
  end

  it "breaks no class that is no job" do
    expect(Class.new { include Sidekiq::ProcessingTracker::Worker }.get_sidekiq_options).to eq("processing" => true)
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
