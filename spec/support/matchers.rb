# frozen_string_literal: true

# For what a log must not tell: `not_include("lost the lease").and(not_include("recovered job"))`.
RSpec::Matchers.define_negated_matcher :not_include, :include
