//! `Sidekiq::ProcessingTracker::Native`: the Ruby binding of processing-tracker-core, and nothing else.
//!
//! README.md beside this crate explains threads, GVL and fork.

mod engine;
mod errors;
mod events;
mod gvl;
mod orphans;
mod passwords;
mod settings;
mod watch;

use magnus::{function, method, value::ReprValue, Class, Error, Module, Object, RHash, Ruby, Value};
use processing_tracker_core as core;
use processing_tracker_core::link::Link;
use std::time::Duration;

/// Called by Ruby when the library is loaded: defines the module.
#[magnus::init(name = "native")]
fn init(ruby: &Ruby) -> Result<(), Error> {
    let native = ruby
        .define_module("Sidekiq")?
        .define_module("ProcessingTracker")?
        .define_module("Native")?;
    native.const_set("VERSION", env!("CARGO_PKG_VERSION"))?;
    native.define_module_function("namespaced_key", function!(namespaced_key, 2))?;
    native.define_module_function("read_key", function!(read_key, 3))?;
    native.define_module_function("examine", function!(examine, 4))?;
    native.define_module_function("examine_queues", function!(examine_queues, 2))?;
    native.define_module_function("clear_unique_lock", function!(clear_unique_lock, 4))?;
    let class = native.define_class("Engine", ruby.class_object())?;
    class.undef_default_alloc_func();
    class.define_singleton_method("start", function!(engine::Engine::start, 1))?;
    class.define_method("identity", method!(engine::Engine::identity, 0))?;
    class.define_method("add_crew", method!(engine::Engine::add_crew, 2))?;
    class.define_method("next_job", method!(engine::Engine::next_job, 3))?;
    class.define_method("quiet", method!(engine::Engine::quiet, 2))?;
    class.define_method("mark", method!(engine::Engine::mark, 2))?;
    class.define_method("track", method!(engine::Engine::track, 3))?;
    class.define_method("await", method!(engine::Engine::await_record, 2))?;
    class.define_method("ack", method!(engine::Engine::ack, 1))?;
    class.define_method("release", method!(engine::Engine::release, 1))?;
    class.define_method("requeue", method!(engine::Engine::requeue, 2))?;
    class.define_method("claim_due", method!(engine::Engine::claim_due, 5))?;
    class.define_method("settle_due", method!(engine::Engine::settle_due, 1))?;
    class.define_method("end_due", method!(engine::Engine::end_due, 0))?;
    class.define_method("next_event", method!(engine::Engine::next_event, 1))?;
    class.define_method("touch", method!(engine::Engine::touch, 0))?;
    class.define_method("leave", method!(engine::Engine::leave, 1))?;
    let class = native.define_class("Orphans", ruby.class_object())?;
    class.undef_default_alloc_func();
    class.define_singleton_method("start", function!(orphans::Orphans::start, 1))?;
    class.define_method("next_event", method!(orphans::Orphans::next_event, 1))?;
    class.define_method("counts", method!(orphans::Orphans::counts, 0))?;
    class.define_method("cancel", method!(orphans::Orphans::cancel, 0))?;
    let class = native.define_class("Passwords", ruby.class_object())?;
    class.undef_default_alloc_func();
    class.define_singleton_method("new", function!(passwords::Passwords::new, 0))?;
    class.define_method("add", method!(passwords::Passwords::add, 1))?;
    class.define_method("wait", method!(passwords::Passwords::wait, 1))?;
    class.define_method("answer", method!(passwords::Passwords::answer, 3))?;
    class.define_method("keep", method!(passwords::Passwords::keep, 2))?;
    class.define_method("close", method!(passwords::Passwords::close, 0))?;
    let class = native.define_class("Watch", ruby.class_object())?;
    class.undef_default_alloc_func();
    class.define_singleton_method("new", function!(watch::Watch::new, 2))?;
    class.define_method("instances", method!(watch::Watch::instances, 0))?;
    class.define_method("identities", method!(watch::Watch::identities, 0))?;
    class.define_method("in_flight", method!(watch::Watch::in_flight, 2))?;
    class.define_method("journal", method!(watch::Watch::journal, 1))?;
    class.define_method("totals", method!(watch::Watch::totals, 0))?;
    Ok(())
}

/// `Native.namespaced_key(namespace, key)`.
fn namespaced_key(ruby: &Ruby, namespace: String, key: Value) -> Result<String, Error> {
    errors::guard(ruby, || {
        let key = key.to_r_string()?.to_string()?;
        Ok(core::keys::namespaced(&namespace, &key))
    })
}

/// `Native.read_key(redis, key, timeout_ms)`: what a key holds, read through a native connection; nil for none.
fn read_key(ruby: &Ruby, redis: RHash, key: String, timeout_ms: u64) -> Result<Option<String>, Error> {
    errors::guard(ruby, || {
        let target = settings::target(ruby, redis)?;
        gvl::run(ruby, move |_| {
            Link::new(target, Duration::from_millis(timeout_ms.max(1))).read(&key)
        })
    })
}

/// `Native.examine(redis, namespace, outbox, timeout_ms)`: raises a `ConfigurationError` where this server, or this user there,
/// cannot do what is needed. `outbox`: Sidekiq's queues are in another Redis.
fn examine(ruby: &Ruby, redis: RHash, namespace: String, outbox: bool, timeout_ms: u64) -> Result<(), Error> {
    errors::guard(ruby, || {
        let target = settings::target(ruby, redis)?;
        let keys = if outbox {
            core::keys::Keys::with_outbox(&namespace)
        } else {
            core::keys::Keys::new(&namespace)
        };
        gvl::run(ruby, move |_| {
            core::server::examine(&target, &keys, Duration::from_millis(timeout_ms.max(1)))
        })
    })
}

/// `Native.examine_queues(redis, timeout_ms)`: the same of the Redis of Sidekiq's queues, where that is another one.
fn examine_queues(ruby: &Ruby, redis: RHash, timeout_ms: u64) -> Result<(), Error> {
    errors::guard(ruby, || {
        let target = settings::target(ruby, redis)?;
        gvl::run(ruby, move |_| {
            core::server::examine_queues(&target, Duration::from_millis(timeout_ms.max(1)))
        })
    })
}

/// `Native.clear_unique_lock(redis, digest, jid_or_nil, timeout_ms)`: frees what the job holds of a lock of
/// sidekiq-unique-jobs, or without a jid the whole lock; whether there was anything to free.
fn clear_unique_lock(
    ruby: &Ruby,
    redis: RHash,
    digest: String,
    jid: Option<String>,
    timeout_ms: u64,
) -> Result<bool, Error> {
    errors::guard(ruby, || {
        let target = settings::target(ruby, redis)?;
        gvl::run(ruby, move |_| {
            let mut link = Link::new(target, Duration::from_millis(timeout_ms.max(1)));
            core::scripts::clear_unique_lock(&mut link, &digest, jid.as_deref())
        })
    })
}
