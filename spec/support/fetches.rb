# frozen_string_literal: true

# Groups of examples whose processes fetch in one way, or in both ways, one after the other: the option `fetch` of
# every process that they start.
module Fetches
  # @param fetch [Symbol] what `config.fetch` says
  # @return [void]
  def with_fetch(fetch, &examples)
    context("with fetch = :#{fetch}") do
      let(:fetch) { fetch }

      around { |example| with_environment("PROCESSING_FETCH" => fetch.to_s) { example.run } }

      class_exec(&examples)
    end
  end

  # What must hold under Sidekiq's own fetch and under the native one.
  #
  # @return [void]
  def with_each_fetch(&examples)
    %i[native sidekiq].each { |fetch| with_fetch(fetch, &examples) }
  end
end
