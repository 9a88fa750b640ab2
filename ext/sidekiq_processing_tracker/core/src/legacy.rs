//! What the pure-Ruby 1.0 gem has left in Redis: its orphans are recovered, and its keys removed with them.
//!
//! Such an instance has no lease of its own, only a string with a TTL, its heartbeat. Where that is missing, the instance
//! gets a lease here, under the identity `1.0 <instance>`; if it is still missing when the lease has run out, the instance
//! is dead.

use crate::dead_set::{self, Death};
use crate::decision::{End, Reason};
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::events::{Event, Settled};
use crate::failpoint;
use crate::identity;
use crate::keys::Keys;
use crate::link::{Call, Link};
use crate::payload::{self, Facts};
use crate::recovery::{Progress, Reaper, Report};
use crate::scripts::{bytes, lock_of, script, whole, Answer, Script};
use crate::settings::Pace;
use redis::Value;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

script!(LOOK, "legacy_look");
script!(LIST, "clock", "legacy_standing", "legacy_list");
script!(REAP, "clock", "legacy_standing", "legacy_reap");
script!(PEEK, "legacy_peek");
script!(
    MOVE,
    "clock",
    "requeue",
    "unique_locks",
    "dead_set",
    "legacy_standing",
    "legacy_move"
);

pub(crate) static SCRIPTS: [&Script; 5] = [&LOOK, &LIST, &REAP, &PEEK, &MOVE];

/// What the identity of a 1.0 instance begins with. No instance of ours does: a label holds no spaces.
const PREFIX: &[u8] = b"1.0 ";

/// The queue of a job that names none, as for Sidekiq.
const DEFAULT_QUEUE: &[u8] = b"default";

/// How many keys Redis looks at in one step of a search: well under a millisecond.
const SCANNED_AT_ONCE: u64 = 1000;

/// How many instances are listed, or jobs settled, by one call at the most.
const PIECE: usize = 100;

/// The 1.0 instance that an identity stands for, `None` for one of ours.
#[must_use]
pub fn instance(identity: &[u8]) -> Option<&[u8]> {
    identity.strip_prefix(PREFIX)
}

fn identity_of(instance: &[u8]) -> Vec<u8> {
    [PREFIX, instance].concat()
}

impl Keys {
    /// What a 1.0 instance runs: a set of job ids.
    fn legacy_jobs(&self, instance: &[u8]) -> Vec<u8> {
        [self.key("jobs:").as_bytes(), instance].concat()
    }

    /// The heartbeat of a 1.0 instance: a string with a TTL.
    fn legacy_heartbeat(&self, instance: &[u8]) -> Vec<u8> {
        [self.key("instance:").as_bytes(), instance].concat()
    }

    /// A job of a 1.0 instance: its payload.
    fn legacy_job(&self, id: &[u8]) -> Vec<u8> {
        [self.key("job:").as_bytes(), id].concat()
    }
}

/// A walk through all keys of the database, for the sets of 1.0 instances.
#[derive(Debug, Default)]
pub struct Search {
    /// Where Redis goes on; `None` before the first step.
    cursor: Option<Vec<u8>>,
    /// Instances found and not yet listed.
    found: Vec<Vec<u8>>,
    report: Found,
}

/// What a search has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// 1.0 instances that live.
    pub alive: u64,
    /// 1.0 instances that have a lease here now.
    pub dead: u64,
}

impl Search {
    /// Makes the next call, which keeps Redis for a moment only. Answers what was found when it was the last one. A call
    /// that failed may be made again.
    ///
    /// # Errors
    /// As for every script.
    pub fn step(
        &mut self,
        link: &mut Link,
        keys: &Keys,
        pace: Pace,
        warn: impl FnMut(&[u8], String),
    ) -> Result<Option<Found>> {
        if self.found.is_empty() {
            self.scan(link, keys)?;
        } else {
            self.list(link, keys, pace, warn)?;
        }
        let is_over = self.found.is_empty() && self.cursor.as_deref() == Some(b"0");
        Ok(is_over.then_some(self.report))
    }

    fn scan(&mut self, link: &mut Link, keys: &Keys) -> Result<()> {
        let prefix = keys.legacy_jobs(b"");
        let mut command = redis::cmd("SCAN");
        command
            .arg(self.cursor.as_deref().unwrap_or(b"0"))
            .arg("MATCH")
            .arg([&escaped(&prefix), &b"*"[..]].concat())
            .arg("COUNT")
            .arg(SCANNED_AT_ONCE);
        let mut answer = Answer::to("SCAN", link.command(&command)?)?;
        let cursor = answer.bytes()?;
        for key in answer.list()?.rest() {
            let key = bytes("SCAN", key)?;
            self.found.extend(key.strip_prefix(&prefix[..]).map(<[u8]>::to_vec));
        }
        self.cursor = Some(cursor);
        Ok(())
    }

    fn list(&mut self, link: &mut Link, keys: &Keys, pace: Pace, mut warn: impl FnMut(&[u8], String)) -> Result<()> {
        let instances = &self.found[self.found.len().saturating_sub(PIECE)..];
        let mut call = Call::new([keys.clock().into_bytes(), keys.instances().into_bytes()]);
        call.millis(pace.step).millis(pace.ttl);
        for instance in instances {
            call.also(keys.legacy_jobs(instance))
                .also(keys.legacy_heartbeat(instance));
            call.arg(identity_of(instance));
        }
        let standings: Vec<_> = Answer::to("legacy_list", link.run(&LIST, &call)?)?.rest().collect();
        for (instance, standing) in instances.iter().zip(standings) {
            match &bytes("legacy_list", standing)?[..] {
                b"alive" => self.report.alive += 1,
                b"dead" => self.report.dead += 1,
                b"overwritten" => warn(&identity_of(instance), overwritten(keys, instance)),
                _ => {}
            }
        }
        self.found.truncate(self.found.len().saturating_sub(PIECE));
        Ok(())
    }
}

/// Stands for itself in a pattern of SCAN.
fn escaped(text: &[u8]) -> Vec<u8> {
    let mut pattern = Vec::with_capacity(text.len());
    for byte in text {
        if b"*?[]\\^-".contains(byte) {
            pattern.push(b'\\');
        }
        pattern.push(*byte);
    }
    pattern
}

/// From the end of one search to the next.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// The same while a 1.0 process lives: whoever ends the last one will not wait for an hour.
const EVERY_WHILE_ALIVE: Duration = Duration::from_secs(10 * 60);
/// A search that nobody has gone on with for so long is over; and this soon after one a process that boots does without.
const TURN: Duration = Duration::from_secs(60);
/// So often the one who searches says that he still does.
const RENEWAL: Duration = Duration::from_secs(20);
/// Between two steps of a search, so that Redis has other things to do.
const PAUSE: Duration = Duration::from_millis(5);

/// When the control thread looks for 1.0 keys: at boot and once an hour, unless another process has just done so.
#[derive(Debug)]
pub(crate) struct Lookout {
    /// When to make the next call.
    pub at: Instant,
    /// Nobody has been asked for the turn since the boot.
    boots: bool,
    search: Option<Search>,
    renewed: Instant,
}

impl Lookout {
    pub fn new() -> Self {
        Self {
            at: Instant::now(),
            boots: true,
            search: None,
            renewed: Instant::now(),
        }
    }

    /// Makes the next call.
    pub fn step(&mut self, link: &mut Link, keys: &Keys, pace: Pace, warn: impl FnMut(&[u8], String)) -> Result<()> {
        let Some(search) = &mut self.search else {
            return self.begin(link, keys);
        };
        let mut next = PAUSE;
        if self.renewed.elapsed() > RENEWAL {
            look(link, keys, Duration::ZERO, TURN)?;
            self.renewed = Instant::now();
        } else if let Some(found) = search.step(link, keys, pace, warn)? {
            failpoint::reach("before_legacy_found");
            next = if found.alive > 0 { EVERY_WHILE_ALIVE } else { EVERY };
            look(link, keys, Duration::ZERO, next)?;
            self.search = None;
        }
        self.at = Instant::now() + next;
        Ok(())
    }

    fn begin(&mut self, link: &mut Link, keys: &Keys) -> Result<()> {
        let least = if self.boots { TURN } else { EVERY };
        self.at = Instant::now();
        match look(link, keys, least, TURN)? {
            Some(wait) => self.at += wait + Duration::from_secs_f64(identity::jitter()),
            None => {
                self.search = Some(Search::default());
                self.renewed = self.at;
            }
        }
        self.boots = false;
        Ok(())
    }

    /// Does without, until the next time.
    pub fn give_up(&mut self) {
        self.search = None;
        self.boots = false;
        self.at = Instant::now() + EVERY;
    }
}

/// Takes the turn to search, where nobody has had it for `least`, or for as long as he has set. The next one may have it
/// after `next`. Answers how long to wait if it is not the caller's.
///
/// # Errors
/// As for every script.
pub fn look(link: &mut Link, keys: &Keys, least: Duration, next: Duration) -> Result<Option<Duration>> {
    let mut call = Call::new([keys.clock()]);
    call.millis(least).millis(next);
    let wait = whole("legacy_look", link.run(&LOOK, &call)?)?;
    Ok((wait > 0).then_some(Duration::from_millis(wait)))
}

/// The recovery of one 1.0 instance.
#[derive(Debug)]
pub(crate) struct Recovery {
    identity: Vec<u8>,
    instance: Vec<u8>,
    /// Until when the instance is held, as Redis said it, and the jobs that are left; the last comes first. `None` before
    /// it is reaped.
    held: Option<(Vec<u8>, Vec<Vec<u8>>)>,
    /// What is being settled, and the name of that call. It stays until the call was answered.
    piece: Option<(String, Vec<Orphan>)>,
    expired: Vec<String>,
    report: Report,
}

/// A job and what was decided for it.
struct Orphan {
    id: Vec<u8>,
    decision: &'static str,
    queue: Vec<u8>,
    facts: Facts,
    payload: Option<Arc<[u8]>>,
    /// The entry of the dead set, for one that dies.
    entry: Vec<u8>,
}

/// Without the payload, whose arguments may be secret.
impl fmt::Debug for Orphan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Orphan({:?}: {})", self.facts, self.decision)
    }
}

impl Orphan {
    fn new(id: Vec<u8>, payload: Option<Arc<[u8]>>) -> Self {
        let mut orphan = Self {
            // The script finds out what is under its key: nothing, or something else.
            decision: "leave",
            queue: DEFAULT_QUEUE.into(),
            facts: Facts::default(),
            entry: Vec::new(),
            id,
            payload,
        };
        if let Some(payload) = &orphan.payload {
            orphan.facts = payload::read(payload);
            // What has no class is no job: Sidekiq would drop it.
            orphan.decision = match orphan.facts.runs {
                Some(_) => "requeue",
                None if orphan.facts.undying => "discarded",
                None => "dead",
            };
            if let Some(queue) = queue_of(payload) {
                orphan.queue = queue.into_bytes();
            }
        }
        if orphan.facts.jid.is_none() {
            // Not the payload's: no lock is held under it.
            orphan.facts.lock = None;
            orphan.facts.jid = Some(String::from_utf8_lossy(&orphan.id).into_owned());
        }
        orphan
    }

    fn bury(&mut self, reaper: &Reaper, from: &[u8], at_ms: u64) {
        // When 1.0 took it, nobody knows.
        let token = Token::read([b"0-0 0 ", &self.queue[..]].concat());
        if let (Some(payload), Some(token)) = (&self.payload, &token) {
            let death = Death {
                reason: Reason::Unreadable,
                token,
                from,
                recoveries: 0,
                at_ms,
            };
            self.entry = death.entry(payload, &reaper.policy);
        }
    }
}

/// The queue that a job names, `None` where it names none.
fn queue_of(payload: &[u8]) -> Option<String> {
    struct Queue;

    impl<'de> Visitor<'de> for Queue {
        type Value = Option<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a job")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut queue = None;
            while let Some(key) = map.next_key::<String>()? {
                if key == "queue" {
                    queue = serde_json::from_str(map.next_value::<&RawValue>()?.get()).ok();
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(queue)
        }
    }

    let queue = serde_json::Deserializer::from_slice(payload)
        .deserialize_map(Queue)
        .ok()?;
    queue.filter(|queue| !queue.is_empty())
}

impl Recovery {
    /// The recovery of the 1.0 instance that `identity` stands for, `None` when that is one of ours.
    pub fn of(identity: &[u8]) -> Option<Self> {
        Some(Self {
            instance: instance(identity)?.to_vec(),
            identity: identity.to_vec(),
            held: None,
            piece: None,
            expired: Vec::new(),
            report: Report::default(),
        })
    }

    /// Makes the next call. One that failed may be made again: nothing is done twice, and nothing is reported twice.
    pub fn step(&mut self, link: &mut Link, reaper: &Reaper, mut tell: impl FnMut(Event)) -> Result<Progress> {
        let is_over = match (&self.held, &self.piece) {
            (None, _) => self.reap(link, reaper, &mut tell)?,
            (Some(_), None) => self.peek(link, reaper)?,
            (Some(_), Some(_)) => self.settle(link, reaper, &mut tell)?,
        };
        if !is_over {
            return Ok(Progress::More);
        }
        self.tell_of_the_expired(&mut tell);
        Ok(Progress::Done(std::mem::take(&mut self.report)))
    }

    fn reap(&mut self, link: &mut Link, reaper: &Reaper, tell: &mut impl FnMut(Event)) -> Result<bool> {
        let mut call = self.call(&reaper.keys);
        call.millis(reaper.pace.step)
            .millis(reaper.pace.ttl)
            .arg(&self.identity[..])
            .millis(reaper.hold);
        let mut answer = Answer::to("legacy_reap", link.run(&REAP, &call)?)?;
        failpoint::reach("after_legacy_reap");
        match answer.text()?.as_str() {
            "reaped" => {
                let held_until = answer.bytes()?;
                let ids = answer
                    .rest()
                    .map(|id| bytes("legacy_reap", id))
                    .collect::<Result<_>>()?;
                self.held = Some((held_until, ids));
                return Ok(false);
            }
            "runs" => self.report.idle = true,
            "overwritten" => tell(Event::Warning(overwritten(&reaper.keys, &self.instance))),
            _ => {}
        }
        Ok(true)
    }

    fn peek(&mut self, link: &mut Link, reaper: &Reaper) -> Result<bool> {
        let Some((_, ids)) = &self.held else {
            return Ok(true);
        };
        let ids = ids.iter().rev().take(PIECE);
        let call = Call::new(ids.clone().map(|id| reaper.keys.legacy_job(id)));
        let mut answer = Answer::to("legacy_peek", link.run(&PEEK, &call)?)?;
        let at_ms = answer.number()?;
        let orphans: Vec<Orphan> = ids
            .cloned()
            .zip(answer.rest())
            .map(|(id, value)| {
                let payload = match value {
                    Value::Nil | Value::Int(_) => None,
                    value => Some(bytes("legacy_peek", value)?.into()),
                };
                let mut orphan = Orphan::new(id, payload);
                if orphan.decision == "dead" {
                    orphan.bury(reaper, &self.identity, at_ms);
                }
                Ok(orphan)
            })
            .collect::<Result<_>>()?;
        if orphans.is_empty() {
            return Err(Error::protocol("legacy_peek", "it has no jobs"));
        }
        self.piece = Some((identity::nonce()?, orphans));
        Ok(false)
    }

    fn settle(&mut self, link: &mut Link, reaper: &Reaper, tell: &mut impl FnMut(Event)) -> Result<bool> {
        let (Some((piece, orphans)), Some((held_until, ids))) = (&self.piece, &mut self.held) else {
            return Ok(true);
        };
        let keys = &reaper.keys;
        let left = ids.len().saturating_sub(orphans.len());
        let mut call = Call::new([
            keys.clock().into_bytes(),
            keys.instances().into_bytes(),
            keys.legacy_jobs(&self.instance),
            keys.legacy_heartbeat(&self.instance),
            keys.stats().into_bytes(),
            keys.journal().into_bytes(),
            keys.queues(),
            keys.dead(),
            keys.digests(),
            keys.expiring_digests(),
        ]);
        call.arg(&self.identity[..])
            .arg(reaper.by.as_str())
            .millis(reaper.pace.step)
            .millis(reaper.pace.ttl)
            .millis(reaper.hold)
            .arg(piece.as_str())
            .arg(&held_until[..])
            .number(u8::from(left == 0))
            .millis(reaper.policy.dead_timeout)
            .number(reaper.policy.dead_max_jobs);
        for orphan in orphans {
            call.arg(&orphan.id[..])
                .key(keys.legacy_job(&orphan.id))
                .arg(orphan.decision)
                .key(keys.queue(&orphan.queue))
                .arg(&orphan.queue[..])
                .arg(orphan.facts.jid.as_deref().unwrap_or_default())
                .arg(orphan.facts.class.as_deref().unwrap_or_default())
                .arg(if matches!(orphan.decision, "dead" | "discarded") {
                    Reason::Unreadable.name()
                } else {
                    ""
                })
                .arg(&orphan.entry[..]);
            lock_of(&mut call, keys, &orphan.facts);
        }
        failpoint::reach("before_legacy_move");
        let mut answer = Answer::to("legacy_move", link.run(&MOVE, &call)?)?;
        failpoint::reach("after_legacy_move");
        let is_held = answer.text()? == "held";
        let is_noted = answer.text()? == "noted";
        let next_hold = answer.bytes()?;
        let (at_ms, unsettled_locks, trimmed) = (answer.number()?, answer.number()?, answer.number()?);
        let outcomes = answer
            .rest()
            .map(|outcome| bytes("legacy_move", outcome))
            .collect::<Result<Vec<_>>>()?;
        if outcomes.len() != orphans.len() {
            return Err(Error::protocol(
                "legacy_move",
                "another number of outcomes than of jobs",
            ));
        }
        self.report.unnoted |= !is_noted;
        self.report.unsettled_locks += unsettled_locks;
        if let Some(warning) = dead_set::trimmed(trimmed) {
            tell(Event::Warning(warning));
        }
        for (orphan, outcome) in orphans.iter().zip(outcomes) {
            match &outcome[..] {
                b"expired" => self.expired.push(orphan.facts.jid.clone().unwrap_or_default()),
                b"stuck" => self.report.stuck += 1,
                b"overwritten" => self.report.unreadable += 1,
                _ => {}
            }
            let Some(end) = End::ALL.into_iter().find(|end| end.name().as_bytes() == outcome) else {
                continue;
            };
            *self.report.total(end) += 1;
            tell(Event::Settled(Settled {
                end,
                reason: matches!(end, End::Dead | End::Discarded).then_some(Reason::Unreadable),
                queue: orphan.queue.clone(),
                jid: orphan.facts.jid.clone(),
                class: orphan.facts.class.clone(),
                from: String::from_utf8_lossy(&self.identity).into_owned(),
                by: reaper.by.clone(),
                recoveries: 0,
                at_ms,
                payload: orphan.payload.clone(),
            }));
        }
        ids.truncate(left);
        *held_until = next_hold;
        self.piece = None;
        Ok(!is_held || left == 0)
    }

    fn call(&self, keys: &Keys) -> Call {
        Call::new([
            keys.clock().into_bytes(),
            keys.instances().into_bytes(),
            keys.legacy_jobs(&self.instance),
            keys.legacy_heartbeat(&self.instance),
        ])
    }

    /// One line for all of them: there may be many.
    fn tell_of_the_expired(&mut self, tell: &mut impl FnMut(Event)) {
        if self.expired.is_empty() {
            return;
        }
        tell(Event::Warning(format!(
            "Jobs were on record without a payload and cannot be recovered: it had expired, or they were just done \
             (instance {}): {}",
            String::from_utf8_lossy(&self.identity),
            named(&self.expired)
        )));
        self.expired.clear();
    }
}

/// The first of many.
fn named(jids: &[String]) -> String {
    const MOST: usize = 10;
    let shown = jids.iter().take(MOST).map(|jid| format!("{jid:?}")).collect::<Vec<_>>();
    let rest = jids.len().saturating_sub(MOST);
    if rest > 0 {
        format!("{}, and {rest} more", shown.join(", "))
    } else {
        shown.join(", ")
    }
}

/// What stays behind of a 1.0 instance and needs a person, if anything does.
pub(crate) fn leftovers(keys: &Keys, instance: &[u8], report: &Report) -> Option<String> {
    (report.stuck > 0 || report.unreadable > 0).then(|| {
        format!(
            "{} names what cannot be recovered of a dead instance of the 1.0 gem: jobs whose queue's key holds no list: {}, \
             jobs whose own key ({}...) holds no string: {}. It is tried again within an hour",
            String::from_utf8_lossy(&keys.legacy_jobs(instance)),
            report.stuck,
            String::from_utf8_lossy(&keys.legacy_job(b"")),
            report.unreadable
        )
    })
}

/// What is to be said when Redis does not let this process search.
pub(crate) fn cannot_search(error: &Error) -> String {
    format!("Cannot look for what the 1.0 gem has left: {error}. Without it this is no loss; else let this user SCAN")
}

fn overwritten(keys: &Keys, instance: &[u8]) -> String {
    format!(
        "An instance of the 1.0 gem cannot be recovered: {} should hold a set, and {} a string or nothing. Somebody has \
         overwritten one of them. It is looked at again within an hour",
        String::from_utf8_lossy(&keys.legacy_jobs(instance)),
        String::from_utf8_lossy(&keys.legacy_heartbeat(instance))
    )
}

#[cfg(test)]
mod tests {
    use super::{escaped, instance, named, queue_of};

    #[test]
    fn tells_instances_of_1_0_from_ours() {
        assert_eq!(instance(b"1.0 web:1"), Some(&b"web:1"[..]));
        assert_eq!(instance(b"1.0:1:abc"), None);
    }

    #[test]
    fn reads_the_queue_as_ruby_does() {
        assert_eq!(
            queue_of(br#"{"queue":"a","args":[1e400],"queue":"b\u0031"}"#).as_deref(),
            Some("b1")
        );
        for payload in [&br#"{"queue":""}"#[..], br#"{"queue":5}"#, b"{}", b"[]", b"no json"] {
            assert_eq!(queue_of(payload), None);
        }
    }

    #[test]
    fn escapes_what_a_pattern_would_read() {
        assert_eq!(escaped(b"a*b[c]?\\:"), b"a\\*b\\[c\\]\\?\\\\:");
    }

    #[test]
    fn names_the_first_of_many() {
        let jids: Vec<String> = (0..12).map(|i| i.to_string()).collect();
        assert!(named(&jids).ends_with("\"9\", and 2 more"));
        assert_eq!(named(&jids[..1]), "\"0\"");
    }
}
