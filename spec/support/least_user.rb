# frozen_string_literal: true

# The user of docs/operations.md, with the rights that the tracker needs and no others. With LEAST_USER in the environment
# (a cell of the matrix) every server of the specs knows it, and every tracker uses it; Sidekiq and the specs do not.
# After each example its servers have refused it nothing, and know no tracker by another name.
# Examples with `:own_user`, which are about redis_options, or in which they change something, are not run then.
module LeastUser
  NAME = "tracker"
  PASSWORD = "password"
  # Those of the specs, beside the tracker's own.
  NAMESPACES = %w[native shop blog].freeze

  module_function

  # @return [Boolean]
  def on? = ENV.key?("LEAST_USER")

  # @param user [String] as the documentation calls it
  # @return [Array<String>] rules of ACL SETUSER
  def rules(user = NAME)
    docs = File.read(File.expand_path("../../docs/operations.md", __dir__), encoding: "UTF-8")
    docs[/^ACL SETUSER #{user} (.*?)\n```/m, 1].gsub("\\\n", " ").split
  end

  # @return [Hash{Symbol => Array<String>}] of a server. As the documentation says, another namespace takes a pattern more.
  def directives = on? ? {user: [NAME, *rules, *NAMESPACES.map { |namespace| "~#{namespace}:*" }]} : {}

  # @return [Hash{Symbol => String}] of a connection
  def credentials = on? ? {username: NAME, password: PASSWORD} : {}

  # @return [String] Ruby code that comes after the gem
  def code
    return "" unless on?

    <<~RUBY
      if ENV.key?("REDIS_URL") && Sidekiq::ProcessingTracker.respond_to?(:config) # 1.0 has nothing like it
        Sidekiq::ProcessingTracker.config.redis_options = {url: ENV["REDIS_URL"], **#{credentials.inspect}}
      end
    RUBY
  end

  # @param redis [RedisServer]
  # @return [Array<String>] what it has refused the user of the tracker, and connections of trackers that are not that user's.
  #   Nothing where it does not answer
  def trouble(redis)
    redis.with(timeout: 1) do |client|
      refused = client.call("ACL", "LOG").map { |entry| entry.is_a?(Hash) ? entry : entry.each_slice(2).to_h }
      refused = refused.select { |entry| entry["username"] == NAME }.map { |entry| "#{entry["context"]} #{entry["object"]}" }
      # By this every connection says what it is, where it may: it may not, and nothing but an entry comes of it.
      others = client.call("CLIENT", "LIST").lines(chomp: true).grep(/lib-name=sidekiq-processing-tracker/)
      refused - ["toplevel client|setinfo"] + others
    end
  rescue RedisClient::Error
    []
  end
end

if LeastUser.on?
  RSpec.configure do |config|
    config.filter_run_excluding own_user: true
    config.after { expect(RedisServer.all.flat_map { |redis| LeastUser.trouble(redis) }).to be_empty }
  end
end
