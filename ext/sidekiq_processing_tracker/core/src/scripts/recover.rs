//! What it takes to put the jobs of a dead instance back: to find one, to look at its jobs, to settle them.

use super::answer::{bytes, whole, Answer};
use super::{CLEAR_LOCK, PEEK, REAP, RECOVER};
use crate::decision::{Decision, End, Reason};
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::keys::{self, Keys};
use crate::link::{Asked, Call, Link};
use crate::payload::{Facts, LockKind};
use crate::settings::{Pace, Policy};
use redis::Value;
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

/// What became of an instance whose lease may have run out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reaped {
    /// It is not there (any more).
    Gone,
    /// Its lease runs.
    Runs,
    /// It is fenced.
    Fenced(Found),
    /// Its lease has run out, but its in-flight hash is none: somebody has overwritten it.
    Overwritten,
}

/// What a reaper finds. Times are on the lease clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Now.
    pub now: Duration,
    /// When the instance was fenced.
    pub fenced_at: Duration,
    /// When the last suspect left, if one did.
    pub released_at: Option<Duration>,
    /// What the instance told about itself.
    pub info: Info,
    /// The fields of its in-flight hash.
    pub fields: Vec<Vec<u8>>,
    /// What they hold, as `peek` reads it. Empty where that is too much for one answer.
    pub payloads: Vec<Option<Vec<u8>>>,
    /// Whether its scheduler has left anything.
    pub scheduled: bool,
    /// The server's time in ms since the epoch.
    pub at_ms: u64,
}

/// An instance's info, by field.
pub type Info = HashMap<Vec<u8>, Vec<u8>>;

/// Why an instance is dead for certain though its lease runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The lease end as it was read before the proof. Where it is another now, the proof is void.
    pub lease_end: Vec<u8>,
    /// That its process has ended: then Sidekiq's entries of that process may go with it.
    pub process_ended: bool,
    /// How it is known, for the log.
    pub told: String,
}

/// Fences an instance whose lease has run out and holds it for the reaper `by`, for `hold` at most. The reaper may ask
/// again while it holds it. One that is dead for certain, by the `proof`, is fenced at once.
///
/// # Errors
/// As for `register`.
pub fn reap(
    link: &mut Link,
    keys: &Keys,
    pace: Pace,
    identity: &[u8],
    by: &str,
    hold: Duration,
    proof: Option<&Proof>,
) -> Result<Reaped> {
    reaped(reaping(keys, pace, identity, by, hold, proof).run(link)?)
}

/// The call of `reap`.
pub(crate) fn reaping(
    keys: &Keys,
    pace: Pace,
    identity: &[u8],
    by: &str,
    hold: Duration,
    proof: Option<&Proof>,
) -> Asked {
    let mut call = Call::new([
        keys.clock().into_bytes(),
        keys.instances().into_bytes(),
        keys.inflight_of(identity),
        keys.info_of(identity),
        keys.due_of(identity),
        keys.hands_of(identity),
        keys.queues(),
    ]);
    call.millis(pace.step)
        .millis(pace.ttl)
        .arg(identity)
        .millis(hold)
        .arg(proof.map_or(&b""[..], |proof| &proof.lease_end))
        .arg(by)
        .arg(if proof.is_some_and(|proof| proof.process_ended) {
            "1"
        } else {
            ""
        })
        .arg(keys.queue(b""));
    Asked { script: &REAP, call }
}

/// The answer to `reap`.
pub(crate) fn reaped(answer: Value) -> Result<Reaped> {
    let mut answer = Answer::to("reap", answer)?;
    match answer.text()?.as_str() {
        "gone" => Ok(Reaped::Gone),
        "runs" => Ok(Reaped::Runs),
        "overwritten" => Ok(Reaped::Overwritten),
        _ => Ok(Reaped::Fenced(Found {
            now: Duration::from_millis(answer.number()?),
            fenced_at: Duration::from_millis(answer.number()?),
            released_at: match answer.next()? {
                Value::Int(released_at) => Some(Duration::from_millis(u64::try_from(released_at).unwrap_or(0))),
                _ => None,
            },
            info: info_of(answer.list()?)?,
            fields: answer.list()?.all_bytes()?,
            payloads: payloads("reap", answer.list()?)?,
            scheduled: answer.number()? == 1,
            at_ms: answer.number()?,
        })),
    }
}

/// What an instance tells about itself. Nothing where somebody has overwritten that.
///
/// # Errors
/// As for `register`.
pub fn info(link: &mut Link, keys: &Keys, identity: &str) -> Result<Info> {
    let mut command = redis::cmd("HGETALL");
    match link.command(command.arg(keys.info(identity))) {
        Err(Error::Refused(text)) if text.contains("WRONGTYPE") => Ok(Info::new()),
        answer => info_of(Answer::to("HGETALL", answer?)?),
    }
}

fn info_of(mut fields: Answer) -> Result<Info> {
    let mut info = Info::new();
    while !fields.is_empty() {
        info.insert(fields.bytes()?, fields.bytes()?);
    }
    Ok(info)
}

/// Moves the clock and names instances whose leases have run out: not all of them at once.
///
/// # Errors
/// As for `register`.
pub fn due(link: &mut Link, keys: &Keys, pace: Pace) -> Result<Vec<Vec<u8>>> {
    let mut call = Call::new([keys.clock(), keys.instances()]);
    call.millis(pace.step).millis(pace.ttl).arg("");
    let mut answer = Answer::to("reap", link.run(&REAP, &call)?)?;
    answer.text()?;
    answer.all_bytes()
}

/// Reads what `tokens` hold. Answers the server's time in ms since the epoch, and for as many as fit one answer the
/// payload, `None` for one that is gone.
///
/// # Errors
/// As for `register`.
pub fn peek(link: &mut Link, keys: &Keys, identity: &[u8], tokens: &[Token]) -> Result<(u64, Vec<Option<Vec<u8>>>)> {
    peeked(peeking(keys, identity, tokens.iter()).run(link)?)
}

/// The call of `peek`.
pub(crate) fn peeking<'a>(keys: &Keys, identity: &[u8], tokens: impl Iterator<Item = &'a Token>) -> Asked {
    let mut call = Call::new([keys.inflight_of(identity)]);
    for token in tokens {
        call.arg(token.as_bytes());
    }
    Asked { script: &PEEK, call }
}

/// The answer to `peek`.
pub(crate) fn peeked(answer: Value) -> Result<(u64, Vec<Option<Vec<u8>>>)> {
    let mut answer = Answer::to("peek", answer)?;
    Ok((answer.number()?, payloads("peek", answer)?))
}

fn payloads(call: &'static str, answer: Answer) -> Result<Vec<Option<Vec<u8>>>> {
    answer
        .rest()
        .map(|payload| match payload {
            Value::Nil => Ok(None),
            payload => bytes(call, payload).map(Some),
        })
        .collect()
}

/// An orphan and what recovery has decided for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Orphan {
    /// Its name in the in-flight hash.
    pub token: Token,
    /// What its payload tells.
    pub facts: Facts,
    /// The name under which its recoveries are counted.
    pub counted_as: String,
    /// How often it was orphaned before, as far as the decision knows. `None` where this time does not count.
    pub count: Option<u64>,
    /// What is to become of it.
    pub decision: Decision,
    /// The entry of the dead set, for one that dies.
    pub entry: Vec<u8>,
}

/// Without the entry, whose arguments may be secret.
impl fmt::Debug for Orphan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "Orphan({:?}, {:?}, {:?} before: {:?})",
            self.token, self.facts, self.count, self.decision
        )
    }
}

/// What became of an orphan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It ended so.
    Ended(End),
    /// It ended so by an earlier copy of the same call, whose answer was lost.
    EndedBefore(End),
    /// It was orphaned so many times before, other than the decision knew: decide again.
    Again(u64),
    /// Somebody settled it before.
    Gone,
    /// It cannot go back, since something else lies under its queue's key, or the dead set's. It stays in flight.
    Stuck,
}

/// Whose orphans a `recover` settles, and for whom.
pub struct Settlement<'a> {
    /// The instance: a fenced one, or with `own` one that has its lease.
    pub from: &'a [u8],
    /// The reaper.
    pub by: &'a str,
    /// The reaper's pace, for a clock that is missing.
    pub pace: Pace,
    /// The most that the reaper may hold the instance.
    pub hold: Duration,
    /// The name that this call and its repetitions share.
    pub piece: &'a str,
    /// The instance settles jobs of its own, which no thread runs any more.
    pub own: bool,
    /// Only orphans that wait are left: when the first of them is due.
    pub rest: Option<Duration>,
    /// How long recoveries are counted, and how much the dead set may hold.
    pub policy: &'a Policy,
    /// The identity by which Sidekiq knows the instance's process.
    pub sidekiq_identity: Option<&'a [u8]>,
    /// The indexes in which the instance stands.
    pub indexes: &'a [Vec<u8>],
}

/// What became of orphans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// An outcome for each.
    pub outcomes: Vec<Outcome>,
    /// Whether the journal and the totals have it. Not when somebody has overwritten them.
    pub noted: bool,
    /// When, in ms since the epoch by Redis' clock.
    pub at_ms: u64,
    /// How many entries the dead set lost, since it was full or they were old.
    pub trimmed: u64,
    /// How many unique locks could not be settled, since something else lies under their keys.
    pub unsettled_locks: u64,
}

/// Settles orphans. Answers an outcome for each, or `None` when the instance is not fenced (with `own`: when it is).
///
/// # Errors
/// As for `register`.
pub fn recover(link: &mut Link, keys: &Keys, settlement: &Settlement, orphans: &[Orphan]) -> Result<Option<Settled>> {
    recovered(recovering(keys, settlement, orphans).run(link)?, orphans.len())
}

/// The call of `recover`.
pub(crate) fn recovering(keys: &Keys, settlement: &Settlement, orphans: &[Orphan]) -> Asked {
    let (from, policy) = (settlement.from, settlement.policy);
    let mut call = Call::new([
        keys.clock().into_bytes(),
        keys.instances().into_bytes(),
        keys.inflight_of(from),
        keys.info_of(from),
        keys.stats().into_bytes(),
        keys.journal().into_bytes(),
        keys.counted().into_bytes(),
        keys.queues(),
        keys.dead(),
        keys.processes(),
        keys.digests(),
        keys.expiring_digests(),
    ]);
    call.arg(from).arg(settlement.by);
    call.millis(settlement.pace.step)
        .millis(settlement.pace.ttl)
        .millis(settlement.hold)
        .arg(settlement.piece)
        .arg(if settlement.own { "1" } else { "" });
    match settlement.rest {
        Some(rest) => call.millis(rest),
        None => call.arg(""),
    };
    call.millis(policy.recovery_window)
        .millis(policy.dead_timeout)
        .number(policy.dead_max_jobs);
    match settlement.sidekiq_identity.filter(|_| !keys.has_outbox()) {
        Some(name) => call.keys([name.to_vec(), [name, b":work"].concat()]).arg(name),
        None => call.arg("0").arg(""),
    };
    call.key(keys.due_of(from)).count(settlement.indexes.len());
    call.keys(settlement.indexes.iter().cloned());
    for orphan in orphans {
        let queue = orphan.token.queue();
        let decision = match orphan.decision {
            Decision::Requeue => "requeue",
            Decision::RequeueLast => "requeue_last",
            Decision::Kill(_) => "dead",
            Decision::Discard(_) => "discarded",
        };
        call.arg(orphan.token.as_bytes()).arg(decision);
        match orphan.count {
            Some(count) => call.number(count),
            None => call.arg(""),
        };
        call.key(keys.recoveries(&orphan.counted_as).into_bytes())
            .key(match orphan.decision {
                Decision::RequeueLast => keys.queue_last(queue),
                _ => keys.queue(queue),
            })
            .arg(queue)
            .arg(orphan.facts.jid.as_deref().unwrap_or_default())
            .arg(orphan.facts.class.as_deref().unwrap_or_default())
            .arg(orphan.decision.reason().map_or("", Reason::name))
            .arg(&orphan.entry[..]);
        lock_of(&mut call, keys, &orphan.facts);
    }
    Asked { script: &RECOVER, call }
}

/// The answer to `recover` for so many orphans.
pub(crate) fn recovered(answer: Value, orphans: usize) -> Result<Option<Settled>> {
    let mut answer = Answer::to("recover", answer)?;
    if answer.text()? != "done" {
        return Ok(None);
    }
    let noted = answer.text()? == "noted";
    let (at_ms, trimmed, unsettled_locks) = (answer.number()?, answer.number()?, answer.number()?);
    let mut outcomes = Vec::with_capacity(orphans);
    while !answer.is_empty() {
        outcomes.push(outcome(&answer.text()?, answer.number()?)?);
    }
    if outcomes.len() != orphans {
        return Err(Error::protocol("recover", "another number of outcomes than of orphans"));
    }
    Ok(Some(Settled {
        outcomes,
        noted,
        at_ms,
        trimmed,
        unsettled_locks,
    }))
}

/// Adds the lock of sidekiq-unique-jobs that a job may hold. Locks are where the queues are: with an outbox, whoever
/// delivers settles them.
pub(crate) fn lock_of(call: &mut Call, keys: &Keys, facts: &Facts) {
    match &facts.lock {
        // Without an id it cannot hold one.
        Some(lock) if facts.jid.is_some() && !keys.has_outbox() => call
            .arg(match lock.kind {
                LockKind::UntilAndWhileExecuting => "taken",
                LockKind::UntilExecuted => "checked",
                LockKind::Other => "held",
            })
            .keys(keys::lock(&lock.digest))
            .number(lock.limit)
            .millis(lock.ttl.unwrap_or_default()),
        _ => call.arg("").arg("0").arg("0").arg("0"),
    };
}

fn outcome(name: &str, count: u64) -> Result<Outcome> {
    match name {
        "again" => return Ok(Outcome::Again(count)),
        "gone" => return Ok(Outcome::Gone),
        "stuck" => return Ok(Outcome::Stuck),
        _ => {}
    }
    let (end, before) = match name.strip_suffix("_before") {
        Some(end) => (end, true),
        None => (name, false),
    };
    match End::ALL.into_iter().find(|known| known.name() == end) {
        Some(end) if before => Ok(Outcome::EndedBefore(end)),
        Some(end) => Ok(Outcome::Ended(end)),
        None => Err(Error::protocol("recover", "an unknown outcome")),
    }
}

/// Frees what the job `jid` holds of a lock of sidekiq-unique-jobs; without a `jid` the whole lock, whoever holds it.
/// Answers whether there was anything to free. Other gems' keys: it needs none of ours.
///
/// # Errors
/// As for `register`; `Error::Refused` too when something else lies under the lock's keys.
pub fn clear_unique_lock(link: &mut Link, digest: &str, jid: Option<&str>) -> Result<bool> {
    let digest = digest.strip_suffix(":RUN").unwrap_or(digest);
    let indexes = [keys::DIGESTS, keys::EXPIRING_DIGESTS].map(|key| key.as_bytes().to_vec());
    let mut call = Call::new(indexes.into_iter().chain(keys::lock(digest)));
    call.arg(jid.unwrap_or_default());
    whole("clear_lock", link.run(&CLEAR_LOCK, &call)?).map(|freed| freed > 0)
}
