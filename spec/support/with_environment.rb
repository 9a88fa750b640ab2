# frozen_string_literal: true

# Sets environment variables for the length of a block. nil unsets one.
module WithEnvironment
  # @param variables [Hash{String => String, nil}]
  def with_environment(variables)
    before = variables.keys.to_h { |name| [name, ENV[name]] }
    ENV.update(variables)
    yield
  ensure
    ENV.update(before)
  end
end
