# frozen_string_literal: true

# The public surface is written down: in signatures, in docstrings, and under one version number.
RSpec.describe "the public API" do
  root = File.expand_path("../..", __dir__)
  tracker = Sidekiq::ProcessingTracker

  # A tool that is not installed cannot look.
  def tool(name)
    require name
  rescue LoadError
    skip "#{name} is not installed"
  end

  def modules_in(mod)
    mod.constants.map { |name| mod.const_get(name) }.grep(Module)
      .select { |inner| inner.name.start_with?("#{mod.name}::") }.flat_map { |inner| [inner, *modules_in(inner)] }
  end

  def methods_of(mod)
    mod.public_instance_methods(false).map { |name| [:instance, mod, mod.instance_method(name)] } +
      mod.singleton_methods(false).map { |name| [:singleton, mod, mod.singleton_class.instance_method(name)] }
  end

  # The fewest and the most positional arguments, nil for any number.
  def counts(parameters)
    kinds = parameters.map(&:first)
    required = kinds.count(:req)
    [required, (required + kinds.count(:opt) unless kinds.include?(:rest))]
  end

  describe "signatures" do
    let(:builder) do
      loader = RBS::EnvironmentLoader.new
      loader.add(path: Pathname(File.join(root, "sig")))
      RBS::DefinitionBuilder.new(env: RBS::Environment.from_loader(loader).resolve_type_names)
    end

    before { tool("rbs") }

    def signature(side, mod, name)
      type = RBS::TypeName.parse("::#{mod.name}")
      definition = (side == :instance) ? builder.build_instance(type) : builder.build_singleton(type)
      definition.methods[name]
    end

    it "exist in the very module for every public method, with the same arguments" do
      wrong = [tracker, *modules_in(tracker)].flat_map { |mod| methods_of(mod) }.filter_map do |side, mod, method|
        label = "#{mod.name}#{(side == :instance) ? "#" : "."}#{method.name}"
        found = signature(side, mod, method.name)
        next "#{label} has none" unless found&.defs&.any? { |one| one.implemented_in.to_s == "::#{mod.name}" }

        ours = counts(method.parameters)
        theirs = found.method_types.map { |type|
          function = type.type
          required = function.required_positionals.size + function.trailing_positionals.size
          [required, (required + function.optional_positionals.size unless function.rest_positionals)]
        }
        "#{label} takes #{ours}, its signature #{theirs}" unless theirs.include?(ours)
      end
      expect(wrong).to be_empty
    end

    it "say that a forked child gets nil where an engine has something" do
      %i[identity track].each do |name|
        returns = signature(:instance, tracker::Native::Engine, name).method_types.map { |type| type.type.return_type.to_s }
        expect(returns).to all(end_with("?")), "Engine##{name} answers #{returns}"
      end
    end

    it "are not there for what is not in the code" do
      gone = [tracker, *modules_in(tracker)].flat_map do |mod|
        type = RBS::TypeName.parse("::#{mod.name}")
        {instance: builder.build_instance(type), singleton: builder.build_singleton(type)}.flat_map do |side, definition|
          owner = (side == :instance) ? mod : mod.singleton_class
          definition.methods.filter_map do |name, found|
            next unless found.defs.any? { |one| one.implemented_in.to_s == "::#{mod.name}" }

            "#{mod.name} #{side} #{name}" unless owner.method_defined?(name) || owner.private_method_defined?(name)
          end
        end
      end
      expect(gone).to be_empty
    end
  end

  describe "docstrings" do
    let(:documented) do
      YARD::Logger.instance.level = YARD::Logger::ERROR
      YARD::Registry.clear
      YARD.parse(Dir[File.join(root, "lib/**/*.rb")], [], YARD::Logger::ERROR)
      YARD::Registry.all(:module, :class, :method, :constant)
    end

    before { tool("yard") }

    after { YARD::Registry.clear if defined?(YARD) }

    def public?(object)
      object.visibility == :public && object.path.start_with?("Sidekiq::ProcessingTracker")
    end

    def private_api?(object)
      [object, *ancestors_of(object)].any? { |one| one.tag(:api)&.text == "private" }
    end

    def ancestors_of(object)
      object.namespace.root? ? [] : [object.namespace, *ancestors_of(object.namespace)]
    end

    it "are there for every public module, constant and method" do
      bare = documented.select { |object| public?(object) && object.docstring.to_s.empty? && object.tags.empty? }
      # A constant that is not for users may speak for itself, and a constructor without arguments.
      bare.reject! { |object| (object.type == :constant) ? private_api?(object) : object.name == :initialize }
      expect(bare.map(&:path)).to be_empty
    end

    it "name arguments that exist, and say what is returned" do
      methods = documented.select { |object| object.type == :method && public?(object) }
      wrong = methods.flat_map do |method|
        names = method.parameters.map { |name, _| name.delete("*&:") }
        unknown = method.tags(:param).map(&:name).compact - names
        silent = !private_api?(method) && !method.has_tag?(:return) && !method.name.end_with?("=") && method.name != :initialize
        unknown.map { |name| "#{method.path}: @param #{name}" } + (silent ? ["#{method.path}: no @return"] : [])
      end
      expect(wrong).to be_empty
    end

    it "are there in the Rust source for every method of the native library" do
      source = Dir[File.join(root, "ext/sidekiq_processing_tracker/ffi/src/*.rs")].map { |file| File.read(file, encoding: "UTF-8") }.join
      native = tracker::Native
      expected = native.singleton_methods.map { |name| "/// `Native.#{name}(" } +
        native::Engine.public_instance_methods(false).map { |name| "/// `##{name}" } + ["/// `Engine.start("]
      expect(expected.reject { |text| source.include?(text) }).to be_empty
    end
  end

  it "has one version, in Ruby, in Rust, in the workspace, in its lock file and in the change log" do
    workspace = File.read(File.join(root, "Cargo.toml"), encoding: "UTF-8")[/^\[workspace\.package\].*?^version = "([^"]+)"/m, 1]
    locked = File.read(File.join(root, "Cargo.lock"), encoding: "UTF-8").scan(/^name = "(?:sidekiq_processing_tracker|processing-tracker-core)"\nversion = "([^"]+)"/).flatten
    change_log = File.read(File.join(root, "CHANGELOG.md"), encoding: "UTF-8")[/^## \[([^\]]+)\]/, 1]
    expect([tracker::Native::VERSION, workspace, change_log, *locked]).to all(eq(tracker::VERSION))
    expect(locked.size).to eq(2)
  end
end
