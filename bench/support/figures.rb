# frozen_string_literal: true

module Bench
  # What is made of the values of several rounds.
  module Figures
    module_function

    # @param values [Array<Numeric>]
    # @param share [Float] 0.5 for the median
    # @return [Float, nil] between the two nearest values
    def percentile(values, share)
      return if values.empty?

      sorted = values.sort
      place = (sorted.size - 1) * share
      low = sorted[place.floor]
      low + (sorted[place.ceil] - low) * (place - place.floor)
    end

    # @return [Float, nil]
    def median(values)
      percentile(values, 0.5)
    end

    # @return [Hash{Symbol => Float, nil}]
    def summary(values)
      {median: median(values), min: values.min, max: values.max}
    end
  end
end
