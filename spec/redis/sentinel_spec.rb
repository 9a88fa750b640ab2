# frozen_string_literal: true

# Sidekiq's own settings name Sentinels; nothing else says where Redis is.
RSpec.describe "Redis by Sentinels" do
  it "follows a failover with the jobs that run, and brings them back from the new master" do
    sentinels = Sentinels.new
    app = %i[configure_server configure_client].map { |side| "Sidekiq.#{side} { |config| config.redis = #{sentinels.configuration} }\n" }.join
    gate = Gate.new
    push = ->(redis) { Queues.jid(Queues.push(redis, Queues.marked("GatedJob", gate.path))) }
    victim = SidekiqProcess.new(sentinels.first, app: app, env: {"REDIS_URL" => nil}).up
    before = push.call(sentinels.first)
    victim.runs(before)
    eventually("the record of the job, on the replica") { Queues.in_flight(sentinels.second).values.flatten.size == 1 }

    sentinels.fail_over
    after = push.call(sentinels.second)
    victim.runs(after, within: 60)
    eventually("the records, on the new master") { Queues.in_flight(sentinels.second).values.flatten.size == 2 }
    expect(victim.identities.size).to eq(1)
    # The tracker's and Sidekiq's client both say what they are, which they need not be allowed.
    refused = sentinels.sentinel.call("ACL", "LOG").map { |entry| entry["object"] }.uniq
    expect(refused - ["client|setinfo"]).to be_empty
    expect(victim.log).not_to match(/lost the lease|#{Sentinels::PASSWORD}|#{Sentinels::SENTINEL_PASSWORD}/o)

    victim.kill
    heir = SidekiqProcess.new(sentinels.second, app: app, env: {"REDIS_URL" => nil}).up.runs(before, after)
    gate.open
    eventually("the end of the jobs") { heir.done.sort == [before, after].sort }
    heir.wait_for_log(/(recovered job.*){2}/m)
    expect(heir.log.scan("recovered job").size).to eq(2)
    expect(heir.log).to match(%r{started: .*redis=redis://main/0 \(Sentinel\)})
    expect(heir.stop).to be_success
    expect(Queues.identities(sentinels.second)).to be_empty
  end
end
