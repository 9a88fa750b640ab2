//! The courier: where Sidekiq's queues lie in another Redis than the tracker's keys, what goes to them is put down in the
//! outbox first, by the same scripts as ever, and delivered from there.
//!
//! No script reaches two servers. So it is pushed there, then removed here: one who dies in between leaves it to be pushed
//! once more (docs/protocol.md, "Two Redises").

use crate::dead_set;
use crate::decision::End;
use crate::error::{Error, Result};
use crate::events::{Event, Settled};
use crate::failpoint;
use crate::keys::Keys;
use crate::link::{Call, Link};
use crate::payload::{self, Facts};
use crate::recovery::Report;
use crate::scripts::{self, Answer};
use crate::settings::Policy;
use crate::target::Target;
use redis::Value;
use std::sync::Arc;
use std::time::Duration;

/// How many are delivered by one call.
const PIECE: isize = 10;
/// How long another waits for one who delivers and is not heard of.
const HOLD: Duration = Duration::from_secs(10);

/// Brings what lies in the outbox to Sidekiq's Redis.
pub(crate) struct Courier {
    there: Link,
    /// What is left to look at of what the last look has found.
    places: Vec<Place>,
    found: bool,
}

/// Where things wait in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Queue(Vec<u8>),
    /// Those that go to the other end of their queue.
    Last(Vec<u8>),
    Dead,
}

/// Whom a job is from that was superseded at its delivery: who held it when it was orphaned is not known there.
const FROM: &str = "outbox";

/// What a person should know of a delivery.
#[derive(Debug)]
pub(crate) enum News {
    /// Something that lasts, and is not to be repeated: about what, and a text.
    Warning { about: String, text: String },
    /// Something that has happened.
    Event(Event),
}

impl News {
    fn warning(about: &str, text: String) -> Self {
        Self::Warning {
            about: about.to_owned(),
            text,
        }
    }
}

/// A job that is delivered, or need not be.
struct Delivered {
    payload: Vec<u8>,
    /// Others hold its lock. What else is known of it.
    superseded: Option<Facts>,
}

/// How far a delivery is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// There is something to deliver.
    Found,
    /// Something was delivered, and there may be more.
    More,
    /// Nothing is left but what cannot be delivered.
    Done,
    /// Another delivers.
    Busy,
}

impl Courier {
    /// One who delivers there.
    pub fn new(there: Target, timeout: Duration) -> Self {
        Self {
            there: Link::new(there, timeout),
            places: Vec::new(),
            found: false,
        }
    }

    /// Throws its connection away.
    pub fn discard(&mut self) {
        self.there.discard();
        self.places.clear();
        self.found = false;
    }

    /// Delivers some more. Tells what a person should know.
    ///
    /// # Errors
    /// As for every script.
    pub fn step(
        &mut self,
        here: &mut Link,
        keys: &Keys,
        by: &str,
        policy: &Policy,
        tell: impl FnMut(News),
    ) -> Result<Delivery> {
        let Some(place) = self.places.last().cloned() else {
            if std::mem::take(&mut self.found) {
                self.look(here, keys, by, Duration::ZERO)?;
                return Ok(Delivery::Done);
            }
            if !self.look(here, keys, by, HOLD)? {
                return Ok(Delivery::Busy);
            }
            self.found = !self.places.is_empty();
            return Ok(if self.found { Delivery::Found } else { Delivery::Done });
        };
        if self.deliver(&place, here, keys, by, policy, tell)? {
            self.places.pop();
        }
        Ok(Delivery::More)
    }

    /// Looks what there is, and holds it, or lets it go. Answers false where another does.
    fn look(&mut self, here: &mut Link, keys: &Keys, by: &str, hold: Duration) -> Result<bool> {
        let mut call = Call::new([keys.key("outbox:courier").into_bytes(), keys.queues(), keys.dead()]);
        call.arg(by).millis(hold);
        let mut answer = Answer::to("outbox_look", here.run(&scripts::OUTBOX_LOOK, &call)?)?;
        if answer.is_empty() {
            return Ok(true);
        }
        match answer.number()? {
            0 => {}
            1 => self.places.push(Place::Dead),
            _ => return Ok(false),
        }
        for queue in answer.rest() {
            let queue = scripts::bytes("outbox_look", queue)?;
            self.places.push(Place::Last(queue.clone()));
            self.places.push(Place::Queue(queue));
        }
        Ok(true)
    }

    /// Answers whether nothing is left there, but for what cannot be delivered.
    fn deliver(
        &mut self,
        place: &Place,
        here: &mut Link,
        keys: &Keys,
        by: &str,
        policy: &Policy,
        mut tell: impl FnMut(News),
    ) -> Result<bool> {
        let waiting = place.read(here, keys)?;
        let (whereto, queue) = match place {
            Place::Queue(queue) => ("requeue", &queue[..]),
            Place::Last(queue) => ("requeue_last", &queue[..]),
            Place::Dead => ("dead", &b""[..]),
        };
        let theirs = Keys::new("");
        let mut call = Call::new([
            theirs.queue(queue),
            theirs.queues(),
            theirs.dead(),
            theirs.digests(),
            theirs.expiring_digests(),
        ]);
        call.arg(whereto)
            .arg(queue)
            .millis(policy.dead_timeout)
            .number(policy.dead_max_jobs);
        for (payload, score) in &waiting {
            let facts = payload::read(payload);
            call.arg(&payload[..])
                .arg(facts.jid.as_deref().unwrap_or_default())
                .arg(&score[..]);
            scripts::lock_of(&mut call, &theirs, &facts);
        }
        let mut stuck = false;
        let mut delivered = Vec::new();
        if !waiting.is_empty() {
            failpoint::reach("before_deliver");
            let mut answer = Answer::to("deliver", self.there.run(&scripts::DELIVER, &call)?)?;
            let trimmed = answer.number()?;
            let outcomes = answer.rest();
            failpoint::reach("after_deliver");
            if let Some(warning) = dead_set::trimmed(trimmed) {
                // Each time is another one, and named by what was added.
                let jid = waiting.first().and_then(|(payload, _)| payload::read(payload).jid);
                tell(News::warning(&format!("the dead set, {jid:?}"), warning));
            }
            if outcomes.len() != waiting.len() {
                return Err(Error::protocol("deliver", "another number of outcomes than of jobs"));
            }
            for (outcome, (payload, _)) in outcomes.zip(waiting) {
                let mut superseded = None;
                match &scripts::bytes("deliver", outcome)?[..] {
                    b"stuck" => {
                        stuck = true;
                        let key = String::from_utf8_lossy(&[&b"queue:"[..], queue].concat()).into_owned();
                        let key = if *place == Place::Dead { "dead".to_owned() } else { key };
                        tell(News::warning(&key, format!("The key {key} of Sidekiq's Redis holds something else: what was recovered for it waits in the outbox")));
                        continue;
                    }
                    b"superseded" => superseded = Some(payload::read(&payload)),
                    _ => {}
                }
                delivered.push(Delivered { payload, superseded });
            }
        }
        let left = delivered.len() == usize::try_from(PIECE).unwrap_or(0);
        place.remove(here, keys, by, delivered, tell)?;
        Ok(stuck || !left)
    }
}

impl Place {
    /// What lies there, in the order in which it is to be delivered, with the score of an entry of the dead set.
    fn read(&self, here: &mut Link, keys: &Keys) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut command;
        match self {
            Self::Queue(queue) => {
                command = redis::cmd("LRANGE");
                command.arg(keys.queue(queue)).arg(0).arg(PIECE - 1);
            }
            Self::Last(queue) => {
                command = redis::cmd("LRANGE");
                command.arg(keys.queue_last(queue)).arg(-PIECE).arg(-1);
            }
            Self::Dead => {
                command = redis::cmd("ZRANGE");
                command.arg(keys.dead()).arg(0).arg(PIECE - 1).arg("WITHSCORES");
            }
        }
        let mut answer = Answer::to("LRANGE", here.command(&command)?)?;
        let mut waiting = Vec::new();
        while !answer.is_empty() {
            let payload = answer.bytes()?;
            let score = match self {
                Self::Dead => match answer.next()? {
                    Value::Double(score) => score.to_string().into_bytes(),
                    score => scripts::bytes("ZRANGE", score)?,
                },
                _ => Vec::new(),
            };
            waiting.push((payload, score));
        }
        if matches!(self, Self::Last(_)) {
            waiting.reverse();
        }
        Ok(waiting)
    }

    /// Takes out what is delivered, and tells of what was superseded: whoever takes it out does, so each is told of once.
    fn remove(
        &self,
        here: &mut Link,
        keys: &Keys,
        by: &str,
        delivered: Vec<Delivered>,
        mut tell: impl FnMut(News),
    ) -> Result<()> {
        let (queue, list) = match self {
            Self::Dead => {
                let mut call = Call::new([keys.dead()]);
                for entry in delivered {
                    call.arg(entry.payload);
                }
                return here.run(&scripts::OUTBOX_REMOVE, &call).map(|_| ());
            }
            Self::Queue(queue) => (queue, "1"),
            Self::Last(queue) => (queue, "2"),
        };
        let mut call = Call::new([keys.queue(queue), keys.queue_last(queue), keys.queues()]);
        call.also(keys.stats().into_bytes()).also(keys.journal().into_bytes());
        call.arg(by).arg(&queue[..]).arg(list);
        for job in &delivered {
            let facts = job.superseded.as_ref();
            call.arg(&job.payload[..])
                .arg(facts.map_or("", |_| End::Superseded.name()))
                .arg(facts.and_then(|facts| facts.jid.as_deref()).unwrap_or_default())
                .arg(facts.and_then(|facts| facts.class.as_deref()).unwrap_or_default());
        }
        let mut answer = Answer::to("outbox_remove", here.run(&scripts::OUTBOX_REMOVE, &call)?)?;
        let report = Report {
            unnoted: answer.text()? != "noted",
            ..Report::default()
        };
        let at_ms = answer.number()?;
        for job in delivered {
            let was_there = answer.number()? == 1;
            let Some(facts) = job.superseded.filter(|_| was_there) else {
                continue;
            };
            tell(News::Event(Event::Settled(Settled {
                end: End::Superseded,
                reason: None,
                jid: facts.jid,
                class: facts.class,
                queue: queue.clone(),
                from: FROM.to_owned(),
                by: by.to_owned(),
                recoveries: 0,
                at_ms,
                payload: Some(Arc::from(job.payload)),
            })));
        }
        if let Some(unnoted) = report.unnoted(keys) {
            tell(News::warning("unnoted", unnoted));
        }
        Ok(())
    }
}
