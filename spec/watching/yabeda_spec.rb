# frozen_string_literal: true

require "open3"

# The recipe for Prometheus in docs/operations.md, run as it stands there, with the real gem.
RSpec.describe "the recipe for yabeda", bundle: :yabeda do
  let(:redis) { RedisServer.new }

  def recipe
    docs = File.read(File.expand_path("../../docs/operations.md", __dir__))
    docs[/^### Prometheus, by yabeda\n\n```ruby\n(.*?)^```/m, 1]
  end

  # @return [Hash{String => Object}] what was measured, after another collection each time
  def measure(code, url: redis.url)
    gems = Bundle[:yabeda]
    script = <<~RUBY
      require "json"
      require "sidekiq-processing-tracker"
      require "yabeda"
      Sidekiq.logger.level = Logger::FATAL
      #{recipe}
      Yabeda.configure!
      def look
        Yabeda.collect!
        puts JSON.generate(Yabeda.processing_tracker.then { |group| %i[orphans_settled instances in_flight orphans leases_lost].to_h { |name|
          [name, group.public_send(name).values.to_h { |tags, atom| [tags.values.join, atom.value] }]
        } })
      end
      #{code}
    RUBY
    output, status = Open3.capture2e(gems.environment.merge("REDIS_URL" => url, "PROCESSING_NS" => Engines::NAMESPACE, "RUBYOPT" => nil), *gems.ruby, "-e", script)
    expect(status).to be_success, output
    output.lines.map { |line| JSON.parse(line) }
  end

  it "tells what stats tells, and the leases that this process has lost" do
    Engines.orphan(redis, *Array.new(2) { |i| Queues.marked("PaymentJob", i) })
    before, after = measure(<<~RUBY)
      look
      Sidekiq::ProcessingTracker.reenqueue_orphans!
      tracker = Sidekiq::ProcessingTracker
      tracker::Listeners.tell(tracker::Event.new(kind: :lease_lost, jid: "a"))
      look
    RUBY
    none = {"dead" => 0, "discarded" => 0, "superseded" => 0, "expired" => 0}
    expect(before).to include("orphans_settled" => {"requeued" => 0, **none}, "in_flight" => {"" => be_an(Integer)}, "leases_lost" => {})
    expect(before["orphans"][""] + before["in_flight"][""]).to eq(2)
    expect(before["instances"].keys).to match_array(%w[running silent dead recovering])
    expect(after).to include("orphans_settled" => {"requeued" => 2, **none}, "in_flight" => {"" => 0}, "orphans" => {"" => 0}, "leases_lost" => {"" => 1})
    expect(after["instances"].values.sum).to eq(0)
  end

  it "has no numbers while Redis is away, and raises nothing" do
    expect(measure("look", url: "redis://127.0.0.1:1/0").first.values).to all(be_empty)
  end
end
