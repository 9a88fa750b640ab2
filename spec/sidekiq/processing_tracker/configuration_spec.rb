# frozen_string_literal: true

require "logger"
require "socket"

RSpec.describe Sidekiq::ProcessingTracker::Configuration do
  subject(:config) { described_class.new }

  around do |example|
    with_environment(described_class::ENVIRONMENT.values.to_h { |name| [name, nil] }) { example.run }
  end

  # Each bad value has an error of its own that says which option, which value and what is allowed.
  def refuse(option, value, allowed)
    raise_error(Sidekiq::ProcessingTracker::ConfigurationError) { |error|
      expect(error.message).to start_with(option.to_s).and include("is #{value.inspect}").and include("allowed is #{allowed}")
    }
  end

  describe "defaults" do
    it "has those of the table in the README" do
      expect(config).to have_attributes(
        namespace: "sidekiq_processing", instance_id: Socket.gethostname, heartbeat_interval: 5, heartbeat_ttl: 30,
        recovery_lock_ttl: 300, track: :marked, scheduler: :auto, exclusive_instance_id: false, polling: false,
        max_recoveries: 3, recovery_window: 259_200, redis_options: nil, logger: Sidekiq.logger
      )
    end

    it "makes the ttl six intervals where that is more than 30 s" do
      config.heartbeat_interval = 10
      expect(config.heartbeat_ttl).to eq(60)
      config.heartbeat_interval = 5.3
      expect(config.heartbeat_ttl).to eq(32)
      config.heartbeat_interval = 0.5
      expect(config.heartbeat_ttl).to eq(30)
    end
  end

  describe "the environment" do
    {
      namespace: ["shop", "shop"], instance_id: ["pod-1:blue", "pod-1:blue"], heartbeat_interval: ["0.25", 0.25],
      heartbeat_ttl: ["45", 45], recovery_lock_ttl: ["60", 60], track: ["all", :all], recovery_window: ["3600", 3600],
      scheduler: ["sidekiq", :sidekiq], exclusive_instance_id: ["true", true], polling: ["false", false]
    }.each do |option, (text, value)|
      variable = described_class::ENVIRONMENT.fetch(option)

      it "gives #{option} by #{variable}, and code beats it" do
        with_environment(variable => text) do
          expect(config.public_send(option)).to eq(value)
          code = {track: :marked, namespace: "code", instance_id: "code", scheduler: :auto, exclusive_instance_id: false,
                  polling: true}.fetch(option, 77)
          config.public_send("#{option}=", code)
          expect(config.public_send(option)).to eq(code)
          config.public_send("#{option}=", nil)
          expect(config.public_send(option)).to eq(value)
        end
      end
    end

    it "refuses what is no number, and does not take it as 0" do
      ["abc", "", "5s", "1,5", "0x10", "1_000", " ", "NaN", "Infinity", "5 5"].each do |text|
        with_environment("HEARTBEAT_INTERVAL" => text) do
          expect { config.heartbeat_interval }
            .to refuse("heartbeat_interval (from HEARTBEAT_INTERVAL)", text, "a number of seconds from 0.05")
        end
        with_environment("HEARTBEAT_TTL" => text) do
          expect { config.heartbeat_ttl }.to refuse("heartbeat_ttl (from HEARTBEAT_TTL)", text, "a whole number of seconds")
        end
        with_environment("RECOVERY_LOCK_TTL" => text) do
          expect { config.recovery_lock_ttl }
            .to refuse("recovery_lock_ttl (from RECOVERY_LOCK_TTL)", text, "a whole number of seconds")
        end
      end
    end

    it "names the variable of a bad namespace, instance_id, track, scheduler or exclusive_instance_id" do
      with_environment("PROCESSING_NS" => "a b", "PROCESSING_INSTANCE_ID" => "", "PROCESSING_TRACK" => "some",
        "PROCESSING_SCHEDULER" => "native", "PROCESSING_EXCLUSIVE_INSTANCE_ID" => "yes") do
        expect { config.scheduler }.to refuse("scheduler (from PROCESSING_SCHEDULER)", "native", ":auto or :sidekiq")
        expect { config.exclusive_instance_id }
          .to refuse("exclusive_instance_id (from PROCESSING_EXCLUSIVE_INSTANCE_ID)", "yes", "true or false")
        expect { config.namespace }.to refuse("namespace (from PROCESSING_NS)", "a b", "a String")
        expect { config.instance_id }.to refuse("instance_id (from PROCESSING_INSTANCE_ID)", "", "a String")
        expect { config.track }.to refuse("track (from PROCESSING_TRACK)", "some", ":marked or :all")
      end
    end
  end

  describe "labels" do
    bad = ["", " ", "a b", "a\tb", "a\nb", "a\0b", "a\e", "a\u00a0b", "a\u3000b", "a*", "a?", "[a", "a]", "a\\b", "a\xff", 5, :"a b", ["a"]]

    bad.each do |value|
      it "refuses #{value.inspect}" do
        config.namespace = value
        config.instance_id = value
        expect { config.namespace }.to refuse(:namespace, value, "a String that is not empty")
        expect { config.instance_id }.to refuse(:instance_id, value, "a String that is not empty")
      end
    end

    ["a", "a:b", "app_{1}", "web-1.example.com", "größe", "^a-z"].each do |value|
      it "takes #{value.inspect}" do
        config.namespace = value
        config.instance_id = value
        expect([config.namespace, config.instance_id]).to eq([value, value])
      end
    end

    it "takes a Symbol" do
      config.namespace = :shop
      expect(config.namespace).to eq("shop")
    end
  end

  describe "numbers" do
    [0, -1, 0.0, -0.1, 0.049, Rational(1, 21), "0.01", Float::NAN, Float::INFINITY, 1e12, Complex(1, 1), "0", "x", :five, true, [5]].each do |value|
      it "refuses #{value.inspect} as the interval" do
        config.heartbeat_interval = value
        expect { config.heartbeat_interval }.to refuse(:heartbeat_interval, value, "a number of seconds from 0.05")
      end
    end

    [0, 0.5, -1, 1.5, "0.5", "-3", Float::INFINITY, 1e12, :ten, false].each do |value|
      it "refuses #{value.inspect} as a ttl" do
        config.heartbeat_ttl = value
        config.recovery_lock_ttl = value
        expect { config.heartbeat_ttl }.to refuse(:heartbeat_ttl, value, "a whole number of seconds from 1")
        expect { config.recovery_lock_ttl }.to refuse(:recovery_lock_ttl, value, "a whole number of seconds from 1")
      end
    end

    it "takes fractions, Rationals and text" do
      {0.05 => 0.05, 2.5 => 2.5, 5.0 => 5, Rational(1, 4) => 0.25, "1.5" => 1.5, "2" => 2, ".5" => 0.5}.each do |value, read|
        config.heartbeat_interval = value
        expect(config.heartbeat_interval).to eql(read)
      end
    end

    it "takes a ttl of one second" do
      config.heartbeat_ttl = 1
      expect(config.heartbeat_ttl).to be(1)
    end

    it "takes an interval above a fifth of the ttl, as 1.0 deployments have it" do
      config.heartbeat_interval = 30
      config.heartbeat_ttl = 90
      expect([config.heartbeat_interval, config.heartbeat_ttl]).to eq([30, 90])
    end
  end

  describe "track" do
    it "takes names as Symbol and String" do
      [:marked, "marked", :all, "all"].each do |value|
        config.track = value
        expect(config.track).to be(value.to_sym)
      end
    end

    [:some, "ALL", "", true, 1].each do |value|
      it "refuses #{value.inspect}" do
        config.track = value
        expect { config.track }.to refuse(:track, value, ":marked or :all")
      end
    end
  end

  describe "max_recoveries" do
    it "takes whole numbers from 0, and nil for no limit" do
      {0 => 0, 5 => 5, "7" => 7, 2.0 => 2, nil => nil, :unlimited => nil, "unlimited" => nil, :none => nil}.each do |value, read|
        config.max_recoveries = value
        expect(config.max_recoveries).to eql(read)
      end
    end

    it "takes the environment's, which code beats, with nil too" do
      {"0" => 0, "5" => 5, "unlimited" => nil, "none" => nil}.each do |text, read|
        with_environment("MAX_RECOVERIES" => text) do
          config.max_recoveries = :default
          expect(config.max_recoveries).to eql(read)
          config.max_recoveries = 9
          expect(config.max_recoveries).to be(9)
          config.max_recoveries = nil
          expect(config.max_recoveries).to be_nil
        end
      end
      config.max_recoveries = :default
      expect(config.max_recoveries).to be(3)
    end

    [-1, 1.5, "", "x", "-1", true, [3], :many, Float::INFINITY].each do |value|
      it "refuses #{value.inspect}" do
        config.max_recoveries = value
        expect { config.max_recoveries }.to refuse(:max_recoveries, value, "a whole number from 0, or unlimited")
      end
    end

    it "names the variable, and stays while the engine runs" do
      with_environment("MAX_RECOVERIES" => "nil") do
        expect { config.max_recoveries }.to refuse("max_recoveries (from MAX_RECOVERIES)", "nil", "a whole number from 0")
      end
      config.max_recoveries = nil
      config.fix
      expect { config.max_recoveries = 3 }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /it stays nil/)
      expect(config.max_recoveries).to be_nil
    end
  end

  describe "recovery_window" do
    [0, 0.5, -1, "x", Float::INFINITY].each do |value|
      it "refuses #{value.inspect}" do
        config.recovery_window = value
        expect { config.recovery_window }.to refuse(:recovery_window, value, "a whole number of seconds from 1")
      end
    end
  end

  describe "logger" do
    it "takes what has the methods of a logger" do
      logger = Logger.new(IO::NULL)
      config.logger = logger
      expect(config.logger).to be(logger)
    end

    it "refuses anything else" do
      config.logger = "log/tracker.log"
      expect { config.logger }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /\Alogger is a String: allowed is /)
    end
  end

  describe "redis_options" do
    it "refuses what is neither a URL nor a Hash, without showing it" do
      config.redis_options = ["redis://:secret@host"]
      expect { config.redis_options }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError) { |error|
        expect(error.message).to match(/\Aredis_options is a Array: allowed is a Redis URL/)
        expect(error.message).not_to include("secret")
      }
    end
  end

  describe "redis_options that are changed later" do
    let(:options) { {:url => +"redis://host", "sentinels" => [{host: +"one"}], :password => -> { "secret" }} }

    it "stay what they were when they were set" do
      config.redis_options = options
      options[:url].replace("redis://other")
      options["sentinels"].first[:host] << "more"
      options["sentinels"] << {host: "two"}
      options[:db] = 5
      expect(config.redis_options).to eq(:url => "redis://host", "sentinels" => [{host: "one"}], :password => options[:password])

      url = +"redis://host"
      config.redis_options = url
      url << "/5"
      expect(config.redis_options).to eq("redis://host")
    end

    it "cannot be changed by way of the reader either" do
      config.redis_options = options
      read = config.redis_options
      expect([read, read[:url], read["sentinels"], *read["sentinels"], read["sentinels"].first[:host]]).to all(be_frozen)
      expect(options.values_at(:url, "sentinels")).to all(satisfy { |part| !part.frozen? })
    end
  end

  describe "#fix" do
    before { config.namespace = "before" }

    it "refuses later changes of every option and says why" do
      config.fix
      described_class::OPTIONS.each do |option|
        expect { config.public_send("#{option}=", nil) }
          .to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /\A#{option} cannot be changed while the engine runs/)
      end
      expect(config.namespace).to eq("before")
    end

    it "keeps what the environment said at the start" do
      with_environment("HEARTBEAT_TTL" => "40") { config.fix }
      expect(config.heartbeat_ttl).to eq(40)
    end

    it "shows no password in the complaint" do
      config.redis_options = "redis://:secret@host"
      config.fix
      expect { config.redis_options = nil }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError) { |error|
        expect(error.message).to include("redis://host:6379/0")
        expect(error.message).not_to include("secret")
      }
    end

    it "names the logger that stays" do
      config.fix
      expect { config.logger = Logger.new(IO::NULL) }
        .to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /\(it stays #{Sidekiq.logger.class}\)/)
      config.release
      config.logger = Class.new(Logger).new(IO::NULL)
      config.fix
      expect { config.logger = nil }.to raise_error(Sidekiq::ProcessingTracker::ConfigurationError, /\(it stays #<Class/)
    end

    it "holds until #release" do
      config.fix
      config.release
      config.namespace = "after"
      expect(config.namespace).to eq("after")
    end

    it "does not bind a forked child" do
      config.fix
      status = Process.wait2(fork { exit!((config.instance_id = "child") && config.instance_id == "child") }).last
      expect(status).to be_success
    end
  end

  describe "#inspect" do
    it "shows what was set, and no password" do
      config.namespace = "shop"
      ["redis://user:secret@host/1", {url: "redis://host/1", password: "secret"}, "redis://secret@host/1",
        {"host" => "host", "db" => 1, "password" => -> { "secret" }}].each do |options|
        config.redis_options = options
        expect(config.inspect).to include("namespace=\"shop\"").and include("redis_options=redis://host:6379/1")
        expect([config.inspect, config.to_s].join).not_to include("secret")
      end
    end

    it "shows no password of options that cannot be used" do
      config.redis_options = "redis://:se cret@ho st"
      expect(config.inspect).to include("redis_options=(unusable)")
    end
  end
end
