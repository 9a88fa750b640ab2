# frozen_string_literal: true

require "erb"

module Bench
  # A bar chart as SVG. It brings its own ground, so that its text can be read wherever it is shown, and follows the
  # reader's choice of light or dark.
  class Chart
    # Its contender's name; the figures; what is written at its end; the contender, for the colour.
    Bar = Struct.new(:name, :value, :min, :max, :label, :key)
    # Bars under a heading (nil: none).
    Group = Struct.new(:title, :bars)

    WIDTH = 820
    MARGIN = 24
    NAMES = 225
    LABELS = 92
    ROW = 26
    BAR = 16
    TOP = 76
    HEADING = 30
    # This gem stands out.
    COLOURS = {native: "own", middleware: "own2", stock: "stock"}.freeze

    TEMPLATE = ERB.new(<<~SVG, trim_mode: "-")
      <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 <%= WIDTH %> <%= height %>" width="<%= WIDTH %>" height="<%= height %>" role="img" aria-label="<%= h(@title) %>">
        <style>
          text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
          .ground { fill: #ffffff; stroke: #d1d9e0 }
          .value { paint-order: stroke; stroke: #ffffff; stroke-width: 4 }
          .title { font-size: 17px; font-weight: 600 }
          .heading { font-weight: 600 }
          .note { font-size: 12px; fill: #59636e }
          .other { fill: #8c959f } .stock { fill: #6e7781 } .own { fill: #bf3989 } .own2 { fill: #d98cb9 }
          .whisker { stroke: #1f2328; stroke-width: 1.2 }
          .reference { stroke: #59636e; stroke-dasharray: 3 3 }
          @media (prefers-color-scheme: dark) {
            text { fill: #f0f6fc }
            .ground { fill: #0d1117; stroke: #3d444d }
            .value { stroke: #0d1117 }
            .note { fill: #9198a1 }
            .other { fill: #656c76 } .stock { fill: #8b949e } .own { fill: #db61a2 } .own2 { fill: #8f4a72 }
            .whisker { stroke: #f0f6fc }
            .reference { stroke: #9198a1 }
          }
        </style>
        <rect class="ground" x="0.5" y="0.5" width="<%= WIDTH - 1 %>" height="<%= height - 1 %>" rx="8"/>
        <text class="title" x="<%= MARGIN %>" y="34"><%= h(@title) %></text>
        <text class="note" x="<%= MARGIN %>" y="55"><%= h(@note) %></text>
      <%- if @reference -%>
        <line class="reference" x1="<%= at(@reference) %>" x2="<%= at(@reference) %>" y1="<%= TOP - 4 %>" y2="<%= height - 34 %>"/>
        <text class="note" x="<%= at(@reference) %>" y="<%= height - 16 %>" text-anchor="middle">stock = 1</text>
      <%- end -%>
      <%- each_row do |kind, y, item| -%>
      <%- if kind == :heading -%>
        <text class="heading" x="<%= MARGIN %>" y="<%= y + 19 %>"><%= h(item) %></text>
      <%- else -%>
        <text x="<%= left - 10 %>" y="<%= y + 15 %>" text-anchor="end"><%= h(item.name) %></text>
        <rect class="<%= COLOURS.fetch(item.key, "other") %>" x="<%= left %>" y="<%= y + 2 %>" width="<%= (at(item.value) - left).round(1) %>" height="<%= BAR %>" rx="2"/>
        <path class="whisker" fill="none" d="M<%= at(item.min) %> <%= y + 10 %>H<%= at(item.max) %>M<%= at(item.min) %> <%= y + 6 %>v8M<%= at(item.max) %> <%= y + 6 %>v8"/>
        <text class="value" x="<%= at(item.max) + 8 %>" y="<%= y + 15 %>"><%= h(item.label) %></text>
      <%- end -%>
      <%- end -%>
      </svg>
    SVG

    # @param groups [Array<Group>]
    # @param reference [Float, nil] where to draw a line
    def initialize(title, note, groups, reference: nil)
      @title = title
      @note = note
      @groups = groups
      @reference = reference
    end

    # @return [String]
    def to_svg
      TEMPLATE.result(binding)
    end

    private

    def h(text) = ERB::Util.html_escape(text)

    def left = MARGIN + NAMES

    def height
      rows = @groups.sum { |group| (group.title ? HEADING : 0) + group.bars.size * ROW }
      TOP + rows + (@reference ? 40 : 20)
    end

    # @return [Float] the place of a value
    def at(value)
      greatest = [@reference, *@groups.flat_map(&:bars).map(&:max)].compact.max
      (left + (WIDTH - left - MARGIN - LABELS) * value / greatest.to_f).round(1)
    end

    def each_row
      y = TOP
      @groups.each do |group|
        if group.title
          yield :heading, y, group.title
          y += HEADING
        end
        group.bars.each do |bar|
          yield :bar, y, bar
          y += ROW
        end
      end
    end
  end
end
