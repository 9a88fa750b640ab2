# frozen_string_literal: true

# Every public method of the gem has a signature in sig/.
RSpec.describe "sig" do
  sig = File.expand_path("../sig", __dir__)

  let(:definitions) do
    require "rbs"
    loader = RBS::EnvironmentLoader.new
    loader.add(path: Pathname(sig))
    RBS::DefinitionBuilder.new(env: RBS::Environment.from_loader(loader).resolve_type_names)
  rescue LoadError
    skip "rbs is not installed"
  end

  def modules_of(mod)
    mod.constants.map { |name| mod.const_get(name) }.grep(Module)
      .select { |inner| inner.name.start_with?(mod.name) }.flat_map { |inner| [inner, *modules_of(inner)] }
  end

  def type_name(mod)
    RBS::TypeName.parse("::#{mod.name}")
  end

  # What its own signature says. What Object has, say, is not it.
  def own(definition, mod)
    definition.methods.select { |_name, method| method.defined_in == type_name(mod) }.keys
  end

  it "has every public method" do
    tracker = Sidekiq::ProcessingTracker
    missing = [tracker, *modules_of(tracker)].flat_map do |mod|
      instance = own(definitions.build_instance(type_name(mod)), mod)
      singleton = own(definitions.build_singleton(type_name(mod)), mod)
      (mod.public_instance_methods(false) - instance).map { |name| "#{mod}##{name}" } +
        (mod.singleton_class.public_instance_methods(false) - singleton).map { |name| "#{mod}.#{name}" }
    end
    expect(missing).to be_empty
  end
end
