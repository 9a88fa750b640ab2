# frozen_string_literal: true

require "redis-client"
require "socket"
require_relative "least_user"

# A redis-server of one's own: on a unix socket in a folder of its own, or on a free port of this machine. It dies
# with the example. The only way in which the specs start Redis.
class RedisServer
  # Another server that speaks Redis, where a cell of the matrix names one.
  COMMAND = ENV.fetch("REDIS_SERVER", "redis-server")

  @all = []

  # @return [Array<RedisServer>] those of the example
  def self.all = @all

  # @return [String, nil] path of the socket
  attr_reader :socket
  # @return [Integer, nil]
  attr_reader :port
  # @return [Integer, nil] where it speaks TLS
  attr_reader :tls_port
  # @return [OwnProcess]
  attr_reader :process

  # @param tcp [Boolean] listen on a port of 127.0.0.1 instead of a socket
  # @param tls [Hash{Symbol => String}, nil] see {Certificates#directives}: also listen on a port on which it speaks TLS
  # @param sentinel [Hash{String => String}, nil] directives of a sentinel, without that word: then it is one
  # @param env [Hash{String => String}] of the server process, for example for libfaketime
  # @param options [Hash] further directives of redis.conf, like appendonly: "yes"
  def initialize(tcp: false, tls: nil, sentinel: nil, env: {}, **options)
    @folder = Scratch.folder
    tcp ? @port = free_port : @socket = File.join(@folder, "redis.sock")
    options = {"tls-port": @tls_port = free_port, **tls, **options} if tls
    @env = env
    @sentinel = sentinel
    @options = {:save => "", :appendonly => "no", "appendfsync" => "always", :loglevel => "warning"}.merge(options)
    start
    RedisServer.all << self
    Scratch.undo { RedisServer.all.delete(self) }
  end

  # @return [self]
  def start
    command = @sentinel ? [COMMAND, sentinel_file, "--sentinel"] : [COMMAND, *arguments]
    @process = OwnProcess.new(*command, log: File.join(@folder, "redis.log"), env: @env, chdir: @folder)
    eventually_up
    self
  end

  # Ends the server as an administrator would. What is in its append only file comes back with {#start}.
  #
  # @return [self]
  def stop
    @process.resume.signal(:TERM).wait
    self
  end

  # kill -9.
  #
  # @return [self]
  def kill
    @process.kill
    self
  end

  # @return [self]
  def restart = stop.start

  # SIGSTOP: connections stay open and nothing answers.
  #
  # @return [self]
  def pause
    @process.pause
    self
  end

  # @return [self]
  def resume
    @process.resume
    self
  end

  # @return [Object] the server's reply. Over a connection of its own each time, so it works after {#restart} too.
  def call(*command)
    with(&->(client) { client.call(*command) })
  end

  # @yieldparam client [RedisClient]
  def with(db: 0, timeout: 5)
    client = RedisClient.new(**address, db: db, username: @username, password: @password, timeout: timeout)
    yield client
  ensure
    client&.close
  end

  # @param settings [Hash] like maxmemory: "1mb"
  # @return [self]
  def config_set(**settings)
    call("CONFIG", "SET", *settings.flat_map { |name, value| [name.to_s.tr("_", "-"), value.to_s] })
    self
  end

  # Log in with these from now on (after a change of requirepass or of the ACL).
  #
  # @return [self]
  def log_in(password:, username: nil)
    @username = username
    @password = password
    self
  end

  # @return [String]
  def url(db: 0)
    socket ? "unix://#{socket}?db=#{db}" : "redis://127.0.0.1:#{port}/#{db}"
  end

  private

  def address
    socket ? {path: socket} : {host: "127.0.0.1", port: port}
  end

  def arguments
    place = socket ? {port: 0, unixsocket: socket} : {port: port, bind: "127.0.0.1"}
    all = place.merge(dir: @folder, daemonize: "no", **LeastUser.directives).merge(@options)
    all.flat_map { |name, value| ["--#{name}", *Array(value).map(&:to_s)] }
  end

  # A sentinel writes down what it learns, so it wants a file.
  def sentinel_file
    file = File.join(@folder, "sentinel.conf")
    lines = {port: port, bind: "127.0.0.1", dir: @folder, requirepass: @options[:requirepass]}.compact.map { |name, value| "#{name} #{value}" }
    # The master comes before what is said of it.
    File.write(file, [*lines, *@sentinel.map { |name, value| "sentinel #{name} #{value}" }].join("\n")) unless File.exist?(file)
    file
  end

  def free_port
    TCPServer.open("127.0.0.1", 0) { |server| server.addr[1] }
  end

  def eventually_up
    Eventually.eventually("redis-server's start") do
      raise "redis-server ended: #{@process.output}" unless @process.running?

      answers?
    end
  end

  # Asking for a password is an answer too. LOADING is none yet.
  def answers?
    call("PING")
  rescue RedisClient::CommandError => error
    !error.message.start_with?("LOADING")
  rescue RedisClient::Error
    false
  end
end
