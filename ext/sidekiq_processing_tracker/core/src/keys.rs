//! The names of the keys in Redis.

/// Builds the keys of one namespace. The table in docs/protocol.md says what each holds.
#[derive(Debug, Clone)]
pub struct Keys {
    namespace: String,
}

/// Puts a key under a namespace: `namespaced("ns", "key")` is `ns:key`.
#[must_use]
pub fn namespaced(namespace: &str, key: &str) -> String {
    format!("{namespace}:{key}")
}

/// Sidekiq's set of queue names.
pub(crate) const QUEUES: &str = "queues";

/// Sidekiq's dead set.
pub(crate) const DEAD: &str = "dead";

/// Sidekiq's set of processes.
pub(crate) const PROCESSES: &str = "processes";

/// The index of sidekiq-unique-jobs of locks that are held.
pub(crate) const DIGESTS: &str = "uniquejobs:digests";

/// Its index of locks that expire.
pub(crate) const EXPIRING_DIGESTS: &str = "uniquejobs:expiring_digests";

/// The keys of a lock of sidekiq-unique-jobs, and of its runtime lock, in the order that `lua/unique_locks.lua` expects.
pub(crate) fn lock(digest: &str) -> impl Iterator<Item = Vec<u8>> + '_ {
    ["", ":RUN"].into_iter().flat_map(move |runtime| {
        ["", ":QUEUED", ":PRIMED", ":LOCKED", ":INFO"]
            .into_iter()
            .map(move |part| format!("{digest}{runtime}{part}").into_bytes())
    })
}

/// The key of a queue of Sidekiq's.
pub(crate) fn queue(name: &[u8]) -> Vec<u8> {
    [b"queue:", name].concat()
}

impl Keys {
    /// The keys of `namespace`.
    #[must_use]
    pub fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
        }
    }

    /// Any key below the namespace.
    pub(crate) fn key(&self, key: &str) -> String {
        namespaced(&self.namespace, key)
    }

    /// The lease clock.
    #[must_use]
    pub fn clock(&self) -> String {
        namespaced(&self.namespace, "clock")
    }

    /// Every instance that may have jobs in flight, by lease end.
    #[must_use]
    pub fn instances(&self) -> String {
        namespaced(&self.namespace, "instances")
    }

    /// What an instance has in flight, and the number of its last turn.
    #[must_use]
    pub fn inflight(&self, identity: &str) -> String {
        namespaced(&self.namespace, &format!("inflight:{identity}"))
    }

    /// What people, and recovery, want to know of an instance.
    #[must_use]
    pub fn info(&self, identity: &str) -> String {
        namespaced(&self.namespace, &format!("info:{identity}"))
    }

    /// The same as `inflight`, of an identity as it stands in Redis.
    #[must_use]
    pub fn inflight_of(&self, identity: &[u8]) -> Vec<u8> {
        [self.inflight("").as_bytes(), identity].concat()
    }

    /// The same as `info`, of an identity as it stands in Redis.
    #[must_use]
    pub fn info_of(&self, identity: &[u8]) -> Vec<u8> {
        [self.info("").as_bytes(), identity].concat()
    }

    /// What an instance's scheduler has taken and not yet pushed.
    #[must_use]
    pub fn due(&self, identity: &str) -> String {
        namespaced(&self.namespace, &format!("due:{identity}"))
    }

    /// The same as `due`, of an identity as it stands in Redis.
    #[must_use]
    pub fn due_of(&self, identity: &[u8]) -> Vec<u8> {
        [self.due("").as_bytes(), identity].concat()
    }

    /// The instances on one host, `place` as `host::Process` names it.
    #[must_use]
    pub fn host(&self, place: &str) -> String {
        namespaced(&self.namespace, &format!("host:{place}"))
    }

    /// The instances under one label, of those to whom it is promised to be theirs alone.
    #[must_use]
    pub fn label(&self, label: &str) -> String {
        namespaced(&self.namespace, &format!("label:{label}"))
    }

    /// Totals by outcome.
    #[must_use]
    pub fn stats(&self) -> String {
        namespaced(&self.namespace, "stats")
    }

    /// Whether any job's recoveries are counted.
    #[must_use]
    pub fn counted(&self) -> String {
        namespaced(&self.namespace, "recoveries")
    }

    /// How often a job was orphaned; `name` as `payload::counted_as` gives it.
    #[must_use]
    pub fn recoveries(&self, name: &str) -> String {
        namespaced(&self.namespace, &format!("recoveries:{name}"))
    }

    /// The stream of recoveries.
    #[must_use]
    pub fn journal(&self) -> String {
        namespaced(&self.namespace, "journal")
    }
}
