# frozen_string_literal: true

module Bench
  module Chaos
    # One run: jobs are pushed, and things happen to processes and to Redis, as the schedule says; then all is left alone until
    # nothing is left to do.
    class Run
      NAMESPACE = Graveyard::NAMESPACE
      FED = "chaos:fed"
      # Pushes the jobs of a call once, however often the call is made: its answer may be lost.
      FEED = <<~LUA
        if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then return 0 end
        for i = 2, #ARGV, 2 do
          redis.call('SADD', 'queues', ARGV[i])
          redis.call('LPUSH', 'queue:' .. ARGV[i], ARGV[i + 1])
        end
        return redis.call('SET', KEYS[1], ARGV[1])
      LUA
      SLICE = 200
      # Seconds.
      PAUSE = 0.01
      # For the last suspect to leave: at most 300, and then it must run.
      PATIENCE = 420
      # Where nobody keeps records: jobs that run have written nothing for so long, the longest sleeping less.
      SILENCE = 4
      # For how long processes have to do with a trouble after it is over.
      AFTERMATH = 2
      # From one line about the end to the next.
      TALK = 5

      # What Redis holds.
      State = Struct.new(:queued, :retries, :in_flight, :instances, keyword_init: true) do
        def to_s = "#{queued} queued, #{retries} to be retried, #{in_flight} in flight in #{instances} instances"
      end

      # @return [Fleet]
      attr_reader :fleet
      # @return [Jobs]
      attr_reader :jobs
      # @return [Boolean] whether everything came to an end
      attr_reader :settled
      # @return [State] in the end
      attr_reader :state
      # @return [Array<Life>] those that did not end well when all was over
      attr_reader :bad_ends
      # @return [Array<Array(Float, Float)>] from when to when something was the matter with Redis
      attr_reader :troubles

      # @param contender [Contender]
      # @param schedule [Schedule]
      # @param seed [Integer]
      # @param progress [Progress]
      # @param env [Hash{String => String}] of the processes
      def initialize(contender, schedule, seed, slots:, progress:, env: {})
        @contender = contender
        @schedule = schedule
        @progress = progress
        @redis = RedisServer.new(appendonly: "yes")
        @jobs = Jobs.new(seed)
        @feeder = Clerk.new(@redis)
        @looker = Clerk.new(@redis)
        @fleet = Fleet.new(@redis, contender, slots, env: env) { |life| ended(life) }
        @slices = 0
        @agenda = []
        @settled = false
        @down = false
        @troubles = []
      end

      # @return [self]
      def play
        @fleet.start
        @began = Eventually.now
        events = @schedule.events.map { |event| [event.at, -> { happen(event) }] }
        batches = @schedule.batches.map { |batch| [batch.at, -> { feed(batch) }] }
        @agenda = (events + batches).sort_by(&:first)
        play_agenda
        settle
        @bad_ends = @fleet.close
        tidy if @contender.records
        @looker.close
        @feeder.close
        self
      end

      # @return [Array<Hash>] as {Queues.journal}
      def journal = Queues.journal(@redis, namespace: NAMESPACE)

      # @return [Hash{String => Integer}] totals by outcome
      def totals = @redis.call("HGETALL", "#{NAMESPACE}:stats").transform_values { |value| Integer(value) }

      # @return [Array<Hash>] payloads in the dead set
      def dead = @redis.call("ZRANGE", "dead", 0, -1).map { |payload| JSON.parse(payload) }

      # @return [Hash{String => Integer}] every key => its remaining life in seconds, -1 for one without an end
      def keys = @redis.with { |client| client.call("KEYS", "*").to_h { |key| [key, client.call("TTL", key)] } }

      def close
        @fleet.lives.each { |life| life.kill unless life.ended? }
        @redis.kill
      end

      private

      def play_agenda
        until @agenda.empty? && @feeder.idle? && @looker.idle? && !@down && @fleet.steady?
          now = Eventually.now - @began
          @agenda.shift.last.call while @agenda.any? && @agenda.first.first <= now
          @fleet.look
          sleep PAUSE
        end
      end

      # @yield what happens in so many seconds
      def later(seconds, &block)
        at = Eventually.now - @began + seconds
        @agenda.insert(@agenda.index { |other, _| other > at } || -1, [at, block])
      end

      def happen(event)
        return happen_to_process(event) if Schedule::PROCESS.include?(event.kind)

        # One trouble at a time: what is down cannot go down.
        return later(0.2) { happen(event) } if @down

        @troubles << [Eventually.now, Eventually.now + event.seconds.to_f + AFTERMATH]
        say(event)
        send(event.kind, event)
      end

      def happen_to_process(event)
        life = @fleet.at_work(event.slot)
        say(event, life)
        case event.kind
        when :kill then life.kill
        when :term then life.term
        when :quiet
          life.quiet
          later(event.seconds) { life.term }
        else
          life.stop(event.seconds)
          later(event.seconds) { life.continue unless life.ended? }
        end
      end

      def redis_kill(event)
        @redis.kill
        down_for(event.seconds) { @redis.start }
      end

      def redis_restart(event)
        @redis.stop
        down_for(event.seconds) { @redis.start }
      end

      def redis_stall(event)
        @redis.pause
        down_for(event.seconds) { @redis.resume }
      end

      def cut(_event)
        @looker.send_for do |client|
          client.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
          client.call("CLIENT", "KILL", "TYPE", "pubsub")
        end
      end

      def script_flush(_event)
        @looker.send_for { |client| client.call("SCRIPT", "FLUSH") }
      end

      def down_for(seconds)
        @down = true
        later(seconds) do
          yield
          @troubles.last[1] = Eventually.now + AFTERMATH
          @down = false
        end
      end

      def feed(batch)
        @jobs.draw(batch).each_slice(SLICE) do |slice|
          number = (@slices += 1)
          @feeder.send_for { |client| client.call("EVAL", FEED, 1, FED, number, *slice.flatten) }
        end
      end

      # What a process that has ended had on record, before anybody can have put it back. The second look sees all that it had sent
      # before its end: the first one may have been answered before that was read.
      def ended(life)
        say("#{life} has ended by itself, #{life.status}") unless life.killed? || life.term_at
        return unless @contender.records

        @looker.send_for do |client|
          life.in_flight = 2.times.map {
            identities(client).grep(/\A#{life.label}:/).to_h { |identity| [identity, in_flight(client, identity)] }
          }.last
        end
      end

      def identities(client) = client.call("ZRANGE", "#{NAMESPACE}:instances", 0, -1)

      # @return [Array<Integer>] the numbers of the jobs
      def in_flight(client, identity)
        Queues.held(client, "#{NAMESPACE}:inflight:#{identity}").map { |payload| Jobs.number(Queues.jid(payload)) }
      end

      def settle
        deadline = Eventually.now + PATIENCE
        noted, silent_since, said_at = nil
        until @settled || Eventually.now > deadline
          @fleet.look
          now = Eventually.now
          noted, silent_since = @fleet.noted, now if @fleet.noted != noted
          @state = observe
          @settled = nothing_left? && (@contender.records || now - silent_since > SILENCE)
          if @settled || said_at.nil? || now - said_at > TALK
            said_at = now
            say(@state)
          end
          sleep 0.2
        end
      end

      # A process whose stop Sidekiq has failed leaves its lease behind, for the next one to find. Here there is none any more.
      def tidy
        return if observe.instances.zero?

        say("a console recovers what is left")
        folder = Scratch.folder
        console = OwnProcess.new(Gem.ruby, "-rbundler/setup", "-I", Contender::LIB, File.join(Worker::APP, "reenqueue.rb"),
          log: File.join(folder, "log"), env: Fleet::PACE.merge("REDIS_URL" => @redis.url), chdir: folder)
        raise "reenqueue_orphans! has failed: #{console.output}" unless console.wait(within: PATIENCE).success?
      end

      def nothing_left?
        state.queued + state.retries + state.in_flight == 0 && (@contender.records.nil? || state.instances == @fleet.running)
      end

      def observe
        @redis.with do |client|
          State.new(queued: Jobs::QUEUES.keys.sum { |queue| client.call("LLEN", "queue:#{queue}") },
            retries: client.call("ZCARD", "retry"), in_flight: identities(client).sum { |identity| in_flight(client, identity).size },
            instances: identities(client).size)
        end
      end

      def say(what, life = nil)
        @progress.step("#{@contender.name}: #{what}#{" -> #{life}#{" (not at work)" unless life.at_work?}" if life}")
      end
    end
  end
end
