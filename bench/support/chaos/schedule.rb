# frozen_string_literal: true

module Bench
  module Chaos
    # What happens when, all of it from the seed.
    class Schedule
      # One thing that happens. `slot`: to which process. `seconds`: for how long.
      Event = Struct.new(:at, :kind, :slot, :seconds, keyword_init: true) do
        def to_s
          format("%<at>6.1f s  %<what>s", at: at, what: [kind, ("slot #{slot}" if slot), (format("%.1f s", seconds) if seconds)].compact.join(", "))
        end
      end

      # Jobs that are pushed at once.
      Batch = Struct.new(:at, :number, :jobs, :storm, keyword_init: true)

      # How often each kind comes for a dozen kills; how long it lasts, in seconds.
      DECK = {
        kill: [12, nil], term: [4, nil], quiet: [1, 0.2..1.0], stop: [2, 0.2..1.5], stop_long: [1, nil],
        redis_kill: [2, 0.0..1.2], redis_restart: [1, 0.0..1.2], redis_stall: [2, 0.3..1.8], cut: [2, nil], script_flush: [1, nil]
      }.freeze
      # Those that happen to a process.
      PROCESS = %i[kill term quiet stop stop_long].freeze
      # Those after which a full queue tells the most.
      STORMY = %i[kill term redis_kill redis_restart redis_stall cut].freeze
      # Seconds between two events, at least; the gaps beyond that are as long as they are on average.
      LEAST_GAP = 0.2
      # Seconds between two batches of the steady stream, and how many jobs one has.
      STREAM = [0.25, 8..40].freeze
      # How many jobs a storm has, and how many seconds before its event it comes.
      STORM = [300..1_500, 0.0..0.15].freeze

      # @return [Array<Event>] the earliest first
      attr_reader :events
      # @return [Array<Batch>] the earliest first
      attr_reader :batches

      # @param seed [Integer]
      # @param kills [Integer] how many there are to be
      # @param slots [Integer] how many processes there are
      # @param ttl [Numeric] seconds of a lease: a long stop is longer
      # @param gap [Numeric] seconds from one event to the next, on average
      # @param scale [Numeric] what the numbers of jobs are multiplied by
      def initialize(seed, kills:, slots:, ttl:, gap: 1.5, scale: 1)
        @dice = Random.new(seed)
        @slots = slots
        @ttl = ttl
        @gap = gap
        @scale = scale
        @events = draw_events(kills)
        @batches = draw_batches
      end

      # @return [Integer] jobs in all
      def jobs = batches.sum(&:jobs)

      # @return [Hash{Symbol => Integer}]
      def kinds = DECK.keys.to_h { |kind| [kind, events.count { |event| event.kind == kind }] }

      private

      def draw_events(kills)
        at = 1.0
        events = []
        until events.count { |event| event.kind == :kill } >= kills
          deck = DECK.flat_map { |kind, (count, _)| [kind] * count }.shuffle(random: @dice)
          events.concat(deck.map { |kind| draw(kind, at += pause) })
        end
        last = events.select { |event| event.kind == :kill }[kills - 1]
        events.take_while { |event| event.at <= last.at }
      end

      def draw(kind, at)
        Event.new(at: at, kind: kind, slot: (@dice.rand(@slots) if PROCESS.include?(kind)), seconds: seconds(kind))
      end

      def seconds(kind)
        return @ttl * 1.5 + @dice.rand(2.0) if kind == :stop_long

        range = DECK.fetch(kind).last
        range && @dice.rand(range)
      end

      # As events come that know nothing of each other.
      def pause = LEAST_GAP - (@gap - LEAST_GAP) * Math.log(1 - @dice.rand)

      def draw_batches
        stream = (0..(events.last.at / STREAM.first)).map { |i| [i * STREAM.first, @dice.rand(STREAM.last), false] }
        storms = events.select { |event| STORMY.include?(event.kind) && @dice.rand < 0.6 }
          .map { |event| [event.at - @dice.rand(STORM.last), @dice.rand(STORM.first), true] }
        (stream + storms).sort_by(&:first).each_with_index.map do |(at, jobs, storm), number|
          Batch.new(at: at, number: number, jobs: (jobs * @scale).ceil, storm: storm)
        end
      end
    end
  end
end
