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

/// Sidekiq's set of dead jobs.
pub(crate) const DEAD: &str = "dead";

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

    /// Totals by outcome.
    #[must_use]
    pub fn stats(&self) -> String {
        namespaced(&self.namespace, "stats")
    }

    /// The stream of recoveries.
    #[must_use]
    pub fn journal(&self) -> String {
        namespaced(&self.namespace, "journal")
    }
}
