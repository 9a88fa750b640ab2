//! What native threads have to tell Ruby: one queue, read by one Ruby thread.

use crate::decision::{End, Reason};
use crate::parker::{lock, Parker};
use crate::payload::{self, Facts};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Something that people should hear of.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The instance is registered for the first time.
    Started {
        /// Its identity.
        identity: String,
        /// The server, without credentials.
        server: String,
        /// The prefix of its keys.
        namespace: String,
        /// Its `heartbeat_interval`.
        interval: Duration,
        /// Its `heartbeat_ttl`.
        ttl: Duration,
    },
    /// An orphan is settled: it is back in its queue, or how else it ended.
    Settled(Settled),
    /// Redis does not answer, or refuses.
    Outage {
        /// What went wrong first.
        error: String,
    },
    /// Redis answers again.
    OutageOver {
        /// How long it did not.
        lasted: Duration,
    },
    /// The instance was away for longer than its lease.
    LeaseLost {
        /// Who it was.
        identity: String,
        /// Who it is now.
        new_identity: String,
        /// The jobs that run on here though somebody else has them.
        jobs: Vec<LostJob>,
    },
    /// Something that is as it should be.
    Note(String),
    /// Something that a person should look at.
    Warning(String),
    /// So many events did not fit.
    Dropped(u64),
}

/// A job that runs on though its record is somebody else's now.
#[derive(Clone, PartialEq, Eq)]
pub struct LostJob {
    /// The queue it was taken from.
    pub queue: Vec<u8>,
    /// The job itself.
    pub payload: Arc<[u8]>,
}

impl LostJob {
    /// What its payload tells.
    #[must_use]
    pub fn facts(&self) -> Facts {
        payload::read(&self.payload)
    }
}

/// Without the payload, whose arguments may be secret.
impl fmt::Debug for LostJob {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "LostJob({:?})", self.facts())
    }
}

/// An orphan that is settled.
#[derive(Clone, PartialEq, Eq)]
pub struct Settled {
    /// How it ended.
    pub end: End,
    /// Why, where it is not back in its queue.
    pub reason: Option<Reason>,
    /// The job's id.
    pub jid: Option<String>,
    /// Its class.
    pub class: Option<String>,
    /// Its queue.
    pub queue: Vec<u8>,
    /// The dead instance.
    pub from: String,
    /// The instance that settled it.
    pub by: String,
    /// How often the job was orphaned, this time included. 0 where that was not counted.
    pub recoveries: u64,
    /// When, in ms since the epoch by Redis' clock.
    pub at_ms: u64,
    /// The job as it was in flight. `None` where too many events wait to be read.
    pub payload: Option<Arc<[u8]>>,
}

/// Without the payload, whose arguments may be secret.
impl fmt::Debug for Settled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Settled")
            .field("end", &self.end)
            .field("reason", &self.reason)
            .field("jid", &self.jid)
            .field("class", &self.class)
            .field("queue", &String::from_utf8_lossy(&self.queue))
            .field("from", &self.from)
            .field("by", &self.by)
            .field("recoveries", &self.recoveries)
            .field("at_ms", &self.at_ms)
            .finish_non_exhaustive()
    }
}

/// The queue. It holds so many events, and so many bytes of payloads, and drops what comes after: a Ruby that does not read
/// must not fill the memory.
#[derive(Debug, Default)]
pub struct Events {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    queue: VecDeque<Event>,
    /// How many bytes of payloads wait.
    payloads: usize,
    dropped: u64,
    closed: bool,
    reader: Option<Arc<Parker>>,
}

const MOST: usize = 10_000;
const MOST_PAYLOADS: usize = 8 << 20;

/// What a reader gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// An event.
    Event(Event),
    /// None yet: wait on the parker, then ask again.
    Wait(Arc<Parker>),
    /// None, and none will come.
    Closed,
}

impl Inner {
    fn push(&mut self, mut event: Event) {
        if self.queue.len() >= MOST {
            self.dropped += 1;
            return;
        }
        let bytes = self.payloads + event.payload_size();
        if bytes <= MOST_PAYLOADS {
            self.payloads = bytes;
        } else if let Event::Settled(settled) = &mut event {
            settled.payload = None;
        }
        self.queue.push_back(event);
    }
}

impl Event {
    fn payload_size(&self) -> usize {
        match self {
            Self::Settled(settled) => settled.payload.as_ref().map_or(0, |payload| payload.len()),
            _ => 0,
        }
    }
}

impl PartialEq for Parker {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Events {
    pub(crate) fn push(&self, event: Event) {
        self.push_all([event]);
    }

    /// The reader is woken once for all of them.
    pub(crate) fn push_all(&self, events: impl IntoIterator<Item = Event>) {
        let mut inner = lock(&self.inner);
        let mut any = false;
        for event in events {
            inner.push(event);
            any = true;
        }
        let reader = inner.reader.take_if(|_| any);
        drop(inner);
        if let Some(reader) = reader {
            reader.unpark();
        }
    }

    /// Whether so many wait that soon none will fit.
    pub(crate) fn is_crowded(&self) -> bool {
        lock(&self.inner).queue.len() > MOST / 2
    }

    pub(crate) fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        if let Some(reader) = inner.reader.take() {
            reader.unpark();
        }
    }

    /// The next event.
    pub fn next(&self) -> Next {
        let mut inner = lock(&self.inner);
        if let Some(event) = inner.queue.pop_front() {
            inner.payloads -= event.payload_size();
            return Next::Event(event);
        }
        if inner.dropped > 0 {
            return Next::Event(Event::Dropped(std::mem::take(&mut inner.dropped)));
        }
        if inner.closed {
            return Next::Closed;
        }
        let parker = Parker::new();
        inner.reader = Some(parker.clone());
        Next::Wait(parker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_what_nobody_reads_and_says_so() {
        let events = Events::default();
        for _ in 0..MOST + 3 {
            events.push(Event::Warning("w".into()));
        }
        events.close();
        for _ in 0..MOST {
            assert_eq!(events.next(), Next::Event(Event::Warning("w".into())));
        }
        assert_eq!(events.next(), Next::Event(Event::Dropped(3)));
        assert_eq!(events.next(), Next::Closed);
    }

    #[test]
    fn shows_no_payload() {
        let settled = Settled {
            end: End::Requeued,
            reason: None,
            jid: Some("jid".into()),
            class: None,
            queue: b"work".to_vec(),
            from: "a".into(),
            by: "b".into(),
            recoveries: 1,
            at_ms: 1,
            payload: Some(b"7".as_slice().into()),
        };
        let shown = format!("{:?}", Event::Settled(settled));
        assert!(
            shown.contains("\"jid\"") && !shown.contains("payload") && !shown.contains("55"),
            "{shown}"
        );
    }

    #[test]
    fn wakes_its_reader() {
        let events = Events::default();
        let Next::Wait(parker) = events.next() else {
            panic!("an event came from nowhere")
        };
        events.push(Event::Warning("w".into()));
        assert!(parker.is_done());
    }
}
