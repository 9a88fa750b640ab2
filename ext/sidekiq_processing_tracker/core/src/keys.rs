//! The names of the keys in Redis.

/// Builds the keys of one namespace. The table in docs/protocol.md says what each holds.
#[derive(Debug, Clone)]
pub struct Keys {
    namespace: String,
    /// Sidekiq's keys lie in another Redis: what goes to them is put down in the outbox.
    outbox: bool,
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
            outbox: false,
        }
    }

    /// The keys of `namespace`, in a Redis in which Sidekiq's keys are not.
    #[must_use]
    pub fn with_outbox(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            outbox: true,
        }
    }

    /// Whether Sidekiq's keys lie in another Redis.
    pub(crate) fn has_outbox(&self) -> bool {
        self.outbox
    }

    fn sidekiqs(&self, key: &[u8]) -> Vec<u8> {
        if self.outbox {
            [self.key("outbox:").as_bytes(), key].concat()
        } else {
            key.to_vec()
        }
    }

    /// The key of a queue of Sidekiq's.
    pub(crate) fn queue(&self, name: &[u8]) -> Vec<u8> {
        self.sidekiqs(&queue(name))
    }

    /// Where jobs are pushed that go to the other end of a queue. In the outbox they are kept apart.
    pub(crate) fn queue_last(&self, name: &[u8]) -> Vec<u8> {
        if self.outbox {
            self.sidekiqs(&[b"last:", name].concat())
        } else {
            self.queue(name)
        }
    }

    /// Sidekiq's set of queue names.
    pub(crate) fn queues(&self) -> Vec<u8> {
        self.sidekiqs(QUEUES.as_bytes())
    }

    /// Sidekiq's dead set.
    pub(crate) fn dead(&self) -> Vec<u8> {
        self.sidekiqs(DEAD.as_bytes())
    }

    /// Sidekiq's set of processes.
    pub(crate) fn processes(&self) -> Vec<u8> {
        self.sidekiqs(PROCESSES.as_bytes())
    }

    /// The index of sidekiq-unique-jobs of locks that are held.
    pub(crate) fn digests(&self) -> Vec<u8> {
        self.sidekiqs(DIGESTS.as_bytes())
    }

    /// Its index of locks that expire.
    pub(crate) fn expiring_digests(&self) -> Vec<u8> {
        self.sidekiqs(EXPIRING_DIGESTS.as_bytes())
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

    /// The numbers of an instance's hands (docs/protocol.md, "Blocking claims"), and the queue of each.
    #[must_use]
    pub fn hands(&self, identity: &str) -> String {
        namespaced(&self.namespace, &format!("hands:{identity}"))
    }

    /// The same, of an identity as it stands in Redis.
    #[must_use]
    pub fn hands_of(&self, identity: &[u8]) -> Vec<u8> {
        [self.hands("").as_bytes(), identity].concat()
    }

    /// What a blocking claim has brought and what is not recorded yet, in the hand with this number.
    #[must_use]
    pub fn hand(&self, identity: &str, number: u64) -> String {
        format!("{}:{number}", self.hands(identity))
    }

    /// The list with the payload of the job with this number (`Token::order`), where it has one of its own.
    #[must_use]
    pub fn payload(&self, identity: &[u8], (call, index): (u64, u64)) -> Vec<u8> {
        [&self.inflight_of(identity), format!(":{call}-{index}").as_bytes()].concat()
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
