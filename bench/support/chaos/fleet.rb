# frozen_string_literal: true

module Bench
  module Chaos
    # The Sidekiq processes: so many slots, and a new process in a slot when the one before has ended.
    class Fleet
      # Seconds: of a heartbeat, and of a lease.
      INTERVAL = 0.5
      TTL = 4
      PACE = {"HEARTBEAT_INTERVAL" => INTERVAL.to_s, "HEARTBEAT_TTL" => TTL.to_s}.freeze
      THREADS = 10
      # Seconds that Sidekiq waits for its jobs when it ends: some are longer and go back.
      TIMEOUT = 2
      # Seconds.
      PATIENCE = 120

      # @return [Array<Life>] all there were
      attr_reader :lives

      # @param redis [RedisServer]
      # @param contender [Contender]
      # @param slots [Integer]
      # @param env [Hash{String => String}] of the processes
      # @yieldparam life [Life] one that has ended
      def initialize(redis, contender, slots, env: {}, &on_end)
        @redis = redis
        @contender = contender
        @slots = slots
        @env = env
        @on_end = on_end
        @lives = []
        @current = []
        @closing = false
      end

      def start
        @slots.times { |slot| launch(slot) }
        Eventually.eventually("the boot of #{@slots} x #{@contender.name}", within: PATIENCE) do
          look
          @current.all?(&:up?)
        end
      end

      # Notices who has ended, and puts another in the place.
      def look
        @current.each { |life| look_at(life) }
      end

      # @param slot [Integer]
      # @return [Life] of the slot, or of the next one in which a process is at work
      def at_work(slot) = @current.rotate(slot).find(&:at_work?) || @current[slot]

      # @return [Integer] how many run now
      def running = @current.count { |life| !life.ended? }

      # @return [Integer] how many were there when all was over
      def running_at_end = @current.size

      # @return [Boolean] whether all have booted and none is about to end
      def steady? = @current.all?(&:at_work?)

      # Ends all of them as an administrator would.
      #
      # @return [Array<Life>] those that did not end well
      def close
        @closing = true
        @current.each(&:term)
        Eventually.eventually("the end of all processes", within: PATIENCE) do
          @current.each { |life| look_at(life) }
          @current.all?(&:ended?)
        end
        @current.reject { |life| life.status.success? }
      end

      # @return [Integer] grows with each note of any job
      def noted = @lives.sum(&:noted)

      # @return [Life, nil] whose identity it is
      def of(identity) = by_label[identity[/\Achaos-\d+/]]

      private

      def launch(slot)
        label = "chaos-#{@lives.size}"
        # One takes from its queues in a strict order.
        queues = Jobs::QUEUES.map { |name, weight| slot.zero? ? name : "#{name},#{weight}" }
        env = PACE.merge("PROCESSING_INSTANCE_ID" => label)
        worker = Worker.new(@redis, @contender, threads: THREADS, queues: queues, app: "chaos.rb", timeout: TIMEOUT, env: env.merge(@env))
        @lives << (@current[slot] = Life.new(label, slot, worker))
      end

      def look_at(life)
        return if life.ended? && @closing

        life.look
        return unless life.ended?

        @on_end.call(life)
        launch(life.slot) unless @closing
      end

      def by_label
        @by_label = lives.to_h { |life| [life.label, life] } if @by_label&.size != lives.size
        @by_label
      end
    end
  end
end
