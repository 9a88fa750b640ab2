# frozen_string_literal: true

# A master, a replica and a sentinel that watches them, all real, each with a password.
class Sentinels
  NAME = "main"
  # What the servers want.
  PASSWORD = "of-the-servers"
  # What the sentinel wants, of a user who may do what docs/operations.md says that he must.
  SENTINEL_USER = "asks"
  SENTINEL_PASSWORD = "of-the-sentinel"

  # @return [RedisServer] the first master, and the one that follows
  attr_reader :first, :second
  # @return [RedisServer]
  attr_reader :sentinel

  def initialize
    secrets = {requirepass: PASSWORD, masterauth: PASSWORD}
    @first = RedisServer.new(tcp: true, **secrets).log_in(password: PASSWORD)
    @second = RedisServer.new(tcp: true, replicaof: "127.0.0.1 #{first.port}", "repl-diskless-sync-delay": 0, **secrets).log_in(password: PASSWORD)
    @sentinel = RedisServer.new(tcp: true, sentinel: {
      "monitor" => "#{NAME} 127.0.0.1 #{first.port} 1", "auth-pass" => "#{NAME} #{PASSWORD}",
      "down-after-milliseconds" => "#{NAME} 2000", "failover-timeout" => "#{NAME} 3000"
    }, requirepass: PASSWORD).log_in(password: PASSWORD)
    sentinel.call("ACL", "SETUSER", SENTINEL_USER, "on", ">#{SENTINEL_PASSWORD}", *rights)
    Eventually.eventually("the sentinel knows the replica") { sentinel.call("SENTINEL", "MASTER", NAME)["num-slaves"] == "1" }
    Eventually.eventually("the replica follows") { second.call("INFO", "replication").include?("master_link_status:up") }
  end

  # @return [String] Ruby code: what Sidekiq is to be told of its Redis. The redis-rb of 6.5 has the password with each
  #   sentinel, and no Procs
  def configuration
    node = "host: \"127.0.0.1\", port: #{sentinel.port}"
    user = "username: \"#{SENTINEL_USER}\""
    sentinels =
      if Sidekiq::VERSION < "7"
        "[{#{node}, #{user}, password: \"#{SENTINEL_PASSWORD}\"}]"
      else
        "[{#{node}}], sentinel_#{user}, sentinel_password: ->(_user) { \"#{SENTINEL_PASSWORD}\" }"
      end
    "{url: \"redis://#{NAME}/0\", role: :master, password: \"#{PASSWORD}\", sentinels: #{sentinels}}"
  end

  # Kills the master. Returns when the other server is it.
  #
  # @return [void]
  def fail_over
    first.kill
    Eventually.eventually("the failover", within: 60) do
      sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1] == second.port.to_s && second.call("ROLE").first == "master"
    end
  end

  private

  def rights
    docs = File.read(File.expand_path("../../docs/operations.md", __dir__), encoding: "UTF-8")
    docs[/^- Sentinels: (.*)$/, 1].scan(/`(\+\S+)`/).flatten
  end
end
