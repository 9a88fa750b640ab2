# frozen_string_literal: true

# Fork after load, as Sidekiq Enterprise's swarm does it: a parent loads the application and forks children that each run
# Sidekiq.
RSpec.describe "children of a parent that has loaded everything" do
  let(:redis) { RedisServer.new }
  let(:gate) { Gate.new }

  # Sidekiq's command comes first, as it is with its configure_server. The parent has used Redis and the library before it forks:
  # its children share none of that.
  let(:swarm) do
    ScriptProcess.new(redis, <<~RUBY, env: {"RUBYOPT" => [ENV["RUBYOPT"], "-rsidekiq/cli"].compact.join(" ")})
      Sidekiq::ProcessingTracker.stats
      Sidekiq::ProcessingTracker.in_flight.to_a
      Sidekiq.redis { |conn| conn.get("nothing") }
      File.write("no_more.rb", "")
      parent = Process.pid
      3.times do
        fork do
          Thread.new do
            sleep 0.05 while Process.ppid == parent
            exit!
          end
          cli = Sidekiq::CLI.instance
          cli.parse(%w[sidekiq -r ./no_more.rb -c 2 -t 5 -q default])
          cli.run
        end
      end
      pids = Process.waitall.map { |pid, status| [pid, status.termsig || status.exitstatus].join(" ") }
      $stdout.write("ended: \#{pids.join(", ")}\\n")
    RUBY
  end

  def pid(identity) = Integer(identity[/:(\d+):\h{32}\z/, 1])

  # identity => payloads, of those that have some
  def holders = Queues.in_flight(redis).reject { |_, payloads| payloads.empty? }

  with_each_fetch do
    it "have an engine each, and recover each other" do
      swarm
      eventually("three engines", within: 60) { Queues.identities(redis).size == 3 }
      children = Queues.identities(redis).to_h { |identity| [identity, pid(identity)] }
      expect(children.values.uniq.size).to eq(3)
      expect(children.values).not_to include(swarm.pid)

      payload = Queues.push(redis, Queues.marked("GatedJob", gate.path))
      swarm.runs(Queues.jid(payload))
      eventually("the record") { holders.values == [[payload]] }
      victim = holders.keys.first
      Process.kill(:KILL, children.fetch(victim))
      heirs = {}
      eventually("another's record") { (heirs = holders).values == [[payload]] && heirs.keys != [victim] }
      expect(children).to include(heirs.keys.first)
      gate.open
      eventually("the ack") { Queues.everywhere(redis).empty? }
      expect(Queues.journal(redis).map { |job| job.values_at("from", "outcome") }).to eq([[victim, "requeued"]])

      children.except(victim).each_value { |child| Process.kill(:TERM, child) }
      swarm.wait_for_log(/^ended: /)
      expect(swarm.log[/^ended: (.*)$/, 1].split(", "))
        .to match_array(children.map { |identity, child| "#{child} #{(identity == victim) ? 9 : 0}" })
      expect(Queues.keys_of_instances(redis)).to be_empty
    end
  end
end
