//! The scripts: what they are given and what they answer. What they do stands in `lua/`, one file each.

use crate::decision::{Decision, End, Reason};
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::host;
use crate::keys::{self, Keys};
use crate::link::{Call, Link};
use crate::payload::{Facts, LockKind};
use crate::server;
use crate::settings::{Pace, Policy};
use redis::Value;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// A script and its hash.
pub struct Script {
    pub(crate) source: &'static str,
    pub(crate) hash: LazyLock<String>,
}

impl Script {
    /// The text.
    #[must_use]
    pub fn source(&self) -> &str {
        self.source
    }

    /// The SHA1 of the text, by which Redis knows a script.
    #[must_use]
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// A script put together of files in `lua/`.
macro_rules! script {
    ($visibility:vis $name:ident, $($file:literal),+) => {
        $visibility static $name: Script = {
            const SOURCE: &str = concat!($(include_str!(concat!("lua/", $file, ".lua"))),+);
            Script {
                source: SOURCE,
                hash: LazyLock::new(|| redis::Script::new(SOURCE).get_hash().to_owned()),
            }
        };
    };
}

pub(crate) use script;

script!(REGISTER, "clock", "index", "register");
script!(ENLIST, "index", "enlist");
script!(BEAT, "clock", "beat");
script!(TURN, "requeue", "turn");
script!(REAP, "clock", "reap");
script!(PEEK, "peek");
script!(RECOVER, "clock", "requeue", "unique_locks", "dead_set", "recover");
script!(CLEAR_LOCK, "unique_locks", "clear_lock");
script!(LEAVE, "requeue", "leave");
script!(SURVEY, "survey");
script!(RIGHTS, "rights");
script!(pub(crate) OUTBOX_LOOK, "outbox_look");
script!(pub(crate) OUTBOX_REMOVE, "outbox_remove");
script!(pub(crate) DELIVER, "requeue", "unique_locks", "dead_set", "deliver");

/// Computes what is computed once. To be called before a thread runs that may be in the middle of it when the process
/// forks: the child would wait for it for ever.
pub fn prepare() {
    let scripts = [
        &REGISTER,
        &ENLIST,
        &BEAT,
        &TURN,
        &REAP,
        &PEEK,
        &RECOVER,
        &CLEAR_LOCK,
        &LEAVE,
        &SURVEY,
        &RIGHTS,
        &OUTBOX_LOOK,
        &OUTBOX_REMOVE,
        &DELIVER,
    ];
    for script in scripts
        .into_iter()
        .chain(crate::legacy::SCRIPTS)
        .chain(crate::due::SCRIPTS)
    {
        LazyLock::force(&script.hash);
    }
}

/// What an instance is told when it has no lease any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced<T> {
    /// It has its lease, and this is the answer.
    Alive(T),
    /// It has lost its lease, whole and for good.
    Lost,
}

/// Begins an instance. Answers the pace that holds from now on.
///
/// # Errors
/// As for every script: `Error::Connection` without a proper answer, `Error::Protocol` with one that makes no sense.
pub fn register(link: &mut Link, keys: &Keys, identity: &str, pace: Pace, info: &[(String, String)]) -> Result<Pace> {
    let mut call = Call::new([
        keys.clock(),
        keys.instances(),
        keys.inflight(identity),
        keys.info(identity),
    ]);
    call.arg(identity).millis(pace.step).millis(pace.ttl);
    for (field, value) in info {
        call.arg(field.as_str()).arg(value.as_str());
    }
    let info = info
        .iter()
        .map(|(field, value)| (field.clone().into_bytes(), value.clone().into_bytes()));
    for index in host::indexes(keys, &info.collect()) {
        call.also(index);
    }
    let mut answer = Answer::to("register", link.run(&REGISTER, &call)?)?;
    answer.pace()
}

/// The answer to a beat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// The pace that holds from now on.
    pub pace: Pace,
    /// How many instances are on its host, where that was asked.
    pub hosted: Option<u64>,
    /// When this beat moved the clock: how many instances there are, and one whose lease has run out.
    pub seen: Option<(u64, Option<Vec<u8>>)>,
}

/// Renews the lease. `host`: the place by which the instance is known on its host, to be told how many are there.
///
/// # Errors
/// As for `register`.
pub fn beat(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    pace: Pace,
    progress: bool,
    host: Option<&str>,
) -> Result<Fenced<Beat>> {
    let mut call = Call::new([
        keys.clock(),
        keys.instances(),
        keys.inflight(identity),
        keys.info(identity),
    ]);
    call.arg(identity)
        .millis(pace.step)
        .millis(pace.ttl)
        .number(u8::from(progress));
    if let Some(host) = host {
        call.also(keys.host(host).into_bytes());
    }
    let mut answer = Answer::to("beat", link.run(&BEAT, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let (pace, hosted) = (answer.pace()?, u64::try_from(answer.integer()?).ok());
    let seen = if answer.is_empty() {
        None
    } else {
        Some((answer.number()?, Some(answer.bytes()?).filter(|due| !due.is_empty())))
    };
    Ok(Fenced::Alive(Beat { pace, hosted, seen }))
}

/// A job that goes back to its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requeue {
    /// One that has a record.
    Recorded(Token),
    /// One that has none: it is with this process alone.
    Unrecorded {
        /// The queue's name.
        queue: Vec<u8>,
        /// The job.
        payload: Arc<[u8]>,
    },
}

/// One turn: all that an instance wants done with jobs. It is sent until it is answered, unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turn {
    /// Its number.
    pub call: u64,
    /// Jobs that are done.
    pub acks: Vec<Token>,
    /// Jobs that go back.
    pub requeues: Vec<Requeue>,
    /// Classes whose jobs are marked though their payloads do not say so.
    pub marks: Vec<String>,
    /// Jobs that another fetcher has popped, queue and payload.
    pub records: Vec<(Vec<u8>, Arc<[u8]>)>,
    /// Jobs that threads wait for.
    pub claims: Vec<Claim>,
    /// Payloads are known to be small, so that many may be claimed at once.
    pub bulk: bool,
    /// The names of the counters of jobs that are done (`Keys::recoveries`).
    pub counters: Vec<String>,
}

/// Jobs that are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// For how many threads.
    pub threads: usize,
    /// One order of queues for all threads, or one for each: a thread gets a job of the first queue that has one. All
    /// orders begin with the same queue.
    pub orders: Vec<Vec<Arc<[u8]>>>,
}

/// The answer to a turn that was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// The positions of the requeues that could not be done: something else lies under the queue's key.
    pub undone: Vec<usize>,
    /// The tokens of the records.
    pub recorded: Vec<Token>,
    /// The claimed jobs.
    pub claimed: Vec<(Token, Vec<u8>)>,
    /// The queues that nothing can be taken from.
    pub refused: Vec<Vec<u8>>,
    /// Whether there are jobs that were orphaned before: then an ack clears the job's counter.
    pub counted: bool,
}

/// What became of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turned {
    /// It is done, by this call or by an earlier copy of it.
    Done(Done),
    /// The instance has no lease.
    Lost,
    /// A later turn has been done: somebody else lives under this identity.
    Stale,
}

/// Sends a turn.
///
/// # Errors
/// As for `register`.
pub fn turn(link: &mut Link, keys: &Keys, identity: &str, turn: &Turn) -> Result<Turned> {
    let mut call = Call::new([
        keys.inflight(identity).into_bytes(),
        keys.info(identity).into_bytes(),
        keys.queues(),
        keys.counted().into_bytes(),
    ]);
    call.number(turn.call).count(turn.marks.len());
    for class in &turn.marks {
        call.arg(class.as_str());
    }
    call.count(turn.acks.len());
    for token in &turn.acks {
        call.arg(token.as_bytes());
    }
    call.count(turn.counters.len());
    for name in &turn.counters {
        call.key(keys.recoveries(name).into_bytes());
    }
    call.count(turn.requeues.len());
    for requeue in &turn.requeues {
        match requeue {
            Requeue::Recorded(token) => {
                let queue = token.queue();
                call.arg(token.as_bytes()).key(keys.queue(queue)).arg(queue).arg("");
            }
            Requeue::Unrecorded { queue, payload } => {
                call.arg("").key(keys.queue(queue)).arg(&queue[..]).arg(&payload[..]);
            }
        }
    }
    call.count(turn.records.len());
    for (queue, payload) in &turn.records {
        call.arg(&queue[..]).arg(&payload[..]);
    }
    call.number(u8::from(turn.bulk)).count(turn.claims.len());
    for claim in &turn.claims {
        call.count(claim.threads).count(claim.orders.len());
        for order in &claim.orders {
            let indexes: Vec<String> = order
                .iter()
                .map(|queue| call.index_of(keys.queue(queue)).to_string())
                .collect();
            call.arg(indexes.join(" "));
        }
    }

    let mut answer = Answer::to("turn", link.run(&TURN, &call)?)?;
    match answer.text()?.as_str() {
        "lost" => return Ok(Turned::Lost),
        "stale" => return Ok(Turned::Stale),
        _ => {}
    }
    let mut done = Done::default();
    for position in answer.list()?.rest() {
        let position = whole("turn", position)?;
        done.undone
            .push(usize::try_from(position.saturating_sub(1)).unwrap_or(usize::MAX));
    }
    for token in answer.list()?.rest() {
        done.recorded.push(token_of("turn", bytes("turn", token)?)?);
    }
    let mut claimed = answer.list()?;
    while !claimed.is_empty() {
        done.claimed
            .push((token_of("turn", claimed.bytes()?)?, claimed.bytes()?));
    }
    for queue in answer.list()?.rest() {
        done.refused.push(bytes("turn", queue)?);
    }
    done.counted = answer.number()? == 1;
    Ok(Turned::Done(done))
}

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
    /// Whether its scheduler has left anything.
    pub scheduled: bool,
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
    let mut call = Call::new([
        keys.clock().into_bytes(),
        keys.instances().into_bytes(),
        keys.inflight_of(identity),
        keys.info_of(identity),
        keys.due_of(identity),
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
        });
    let mut answer = Answer::to("reap", link.run(&REAP, &call)?)?;
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
            scheduled: answer.number()? == 1,
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

/// Moves the clock and names an instance whose lease has run out.
///
/// # Errors
/// As for `register`.
pub fn due(link: &mut Link, keys: &Keys, pace: Pace) -> Result<Option<Vec<u8>>> {
    let mut call = Call::new([keys.clock(), keys.instances()]);
    call.millis(pace.step).millis(pace.ttl).arg("");
    let mut answer = Answer::to("reap", link.run(&REAP, &call)?)?;
    answer.text()?;
    Ok(Some(answer.bytes()?).filter(|due| !due.is_empty()))
}

/// Reads what `tokens` hold. Answers the server's time in ms since the epoch, and for as many as fit one answer the
/// payload, `None` for one that is gone.
///
/// # Errors
/// As for `register`.
pub fn peek(link: &mut Link, keys: &Keys, identity: &[u8], tokens: &[Token]) -> Result<(u64, Vec<Option<Vec<u8>>>)> {
    let mut call = Call::new([keys.inflight_of(identity)]);
    for token in tokens {
        call.arg(token.as_bytes());
    }
    let mut answer = Answer::to("peek", link.run(&PEEK, &call)?)?;
    let at_ms = answer.number()?;
    let payloads = answer
        .rest()
        .map(|payload| match payload {
            Value::Nil => Ok(None),
            payload => bytes("peek", payload).map(Some),
        })
        .collect::<Result<_>>()?;
    Ok((at_ms, payloads))
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
    let mut answer = Answer::to("recover", link.run(&RECOVER, &call)?)?;
    if answer.text()? != "done" {
        return Ok(None);
    }
    let noted = answer.text()? == "noted";
    let (at_ms, trimmed, unsettled_locks) = (answer.number()?, answer.number()?, answer.number()?);
    let mut outcomes = Vec::with_capacity(orphans.len());
    while !answer.is_empty() {
        outcomes.push(outcome(&answer.text()?, answer.number()?)?);
    }
    if outcomes.len() != orphans.len() {
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

/// Leaves for good: acks, puts `requeues` back, gives up the lease, and leaves the indexes in which it stands. Answers how
/// many jobs stay for the next reaper.
///
/// # Errors
/// As for `register`.
pub fn leave(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    indexes: &[Vec<u8>],
    acks: &[Token],
    requeues: &[Token],
) -> Result<Fenced<u64>> {
    let mut call = Call::new([
        keys.instances().into_bytes(),
        keys.inflight(identity).into_bytes(),
        keys.info(identity).into_bytes(),
        keys.queues(),
        keys.due(identity).into_bytes(),
    ]);
    for index in indexes {
        call.also(index.clone());
    }
    call.arg(identity).count(indexes.len()).count(acks.len());
    for token in acks {
        call.arg(token.as_bytes());
    }
    call.count(requeues.len());
    for token in requeues {
        call.arg(token.as_bytes())
            .key(keys.queue(token.queue()))
            .arg(token.queue());
    }
    let mut answer = Answer::to("leave", link.run(&LEAVE, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    Ok(Fenced::Alive(answer.number()?))
}

/// Which of these commands the user may not do, each on a key, and by the number that was given with it. None before Redis
/// 7.0, which does not tell.
///
/// # Errors
/// As for `register`.
pub(crate) fn forbidden<'a>(
    link: &mut Link,
    wanted: impl Iterator<Item = (&'a str, &'a str, usize)>,
) -> Result<Vec<(String, usize)>> {
    let mut call = Call::default();
    for (command, key, number) in wanted {
        call.arg(command).arg(key).count(number);
    }
    let mut answer = Answer::to("rights", link.run(&RIGHTS, &call)?)?;
    let mut forbidden = Vec::new();
    while !answer.is_empty() {
        let (command, number) = (answer.text()?, answer.text()?);
        let number = number
            .parse()
            .map_err(|_| Error::protocol("rights", "a number was expected"))?;
        forbidden.push((command, number));
    }
    Ok(forbidden)
}

/// What stands in an index: how many instances (`None` where somebody has overwritten it), and of some of them the identity and the entry.
pub type Index = (Option<u64>, Vec<(Vec<u8>, Vec<u8>)>);

/// Keeps an instance in the indexes in which others look for it, for as long as `lives` from now on. Answers for each what
/// stands there, `most` instances at most and its own.
///
/// # Errors
/// As for `register`.
pub fn enlist(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    indexes: &[String],
    lives: Duration,
    most: usize,
) -> Result<Fenced<Vec<Index>>> {
    let own = [keys.inflight(identity), keys.info(identity)];
    let mut call = Call::new(own.iter().chain(indexes).map(String::as_str));
    call.arg(identity).millis(lives).count(most);
    let mut answer = Answer::to("enlist", link.run(&ENLIST, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let mut found = Vec::with_capacity(indexes.len());
    while !answer.is_empty() {
        let (count, mut pairs) = (u64::try_from(answer.integer()?).ok(), answer.list()?);
        let mut entries = Vec::new();
        while !pairs.is_empty() {
            entries.push((pairs.bytes()?, pairs.bytes()?));
        }
        found.push((count, entries));
    }
    Ok(Fenced::Alive(found))
}

/// When an instance's lease ends, as Redis writes it. `None` for one that is not listed.
///
/// # Errors
/// As for `register`.
pub fn lease_end(link: &mut Link, keys: &Keys, identity: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut command = redis::cmd("ZSCORE");
    match link.command(command.arg(keys.instances()).arg(identity))? {
        Value::Nil => Ok(None),
        score => bytes("ZSCORE", score).map(Some),
    }
}

/// All fields of an instance's in-flight hash, or `Lost` when it has no lease.
///
/// # Errors
/// As for `register`.
pub fn fields(link: &mut Link, keys: &Keys, identity: &str) -> Result<Fenced<Vec<Vec<u8>>>> {
    let mut command = redis::cmd("HKEYS");
    command.arg(keys.inflight(identity));
    let fields: Vec<Vec<u8>> = Answer::to("HKEYS", link.command(&command)?)?
        .rest()
        .map(|field| bytes("HKEYS", field))
        .collect::<Result<_>>()?;
    if fields.iter().any(|field| field == b"call") {
        Ok(Fenced::Alive(fields))
    } else {
        Ok(Fenced::Lost)
    }
}

/// The error, naming the key where Redis only says that some key holds something else.
#[must_use]
pub fn explain(link: &mut Link, keys: &Keys, identity: &str, error: &Error) -> Error {
    if let Some(explained) = server::explain(link, keys, error) {
        return explained;
    }
    if !matches!(error, Error::Refused(text) if text.contains("WRONGTYPE")) {
        return error.clone();
    }
    let expected = [
        (keys.clock(), "hash"),
        (keys.instances(), "zset"),
        (keys.inflight(identity), "hash"),
        (keys.info(identity), "hash"),
    ];
    for (key, expected) in expected {
        let mut command = redis::cmd("TYPE");
        match link.command(command.arg(&key)).and_then(|kind| bytes("TYPE", kind)) {
            Ok(kind) if kind != expected.as_bytes() && kind != b"none" => {
                let kind = String::from_utf8_lossy(&kind);
                return Error::Refused(format!(
                    "the key {key} holds a {kind}, not a {expected}: somebody has overwritten it. Remove it (DEL)"
                ));
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    error.clone()
}

/// The lease clock as it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clock {
    /// When it was last moved, by itself.
    pub now: f64,
    /// When it was last looked at, by the server's time.
    pub seen: f64,
    /// How far it may move at once.
    pub step: f64,
    /// The lease.
    pub ttl: f64,
}

/// What a survey sees of one instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Sight {
    /// When its lease ends, or the hold of its reaper.
    pub lease_end: f64,
    /// Whether it has its lease.
    pub leased: bool,
    /// How many jobs it has in flight; `None` where somebody has overwritten its hash.
    pub in_flight: Option<u64>,
    /// The fields of its info that were asked for; all `None` where somebody has overwritten that.
    pub info: Vec<Option<Vec<u8>>>,
}

/// What a survey sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// The server's time, in ms since the epoch.
    pub server: f64,
    /// `None` where there is none that can be read.
    pub clock: Option<Clock>,
    /// One for each identity asked about; `None` for one that has gone.
    pub instances: Vec<Option<Sight>>,
}

/// Looks at instances. Changes nothing.
///
/// # Errors
/// As for `register`.
pub fn survey(link: &mut Link, keys: &Keys, identities: &[Vec<u8>], fields: &[&str]) -> Result<Survey> {
    let each = identities
        .iter()
        .flat_map(|identity| [keys.inflight_of(identity), keys.info_of(identity)]);
    let mut call = Call::new(
        [keys.clock().into_bytes(), keys.instances().into_bytes()]
            .into_iter()
            .chain(each),
    );
    call.count(fields.len());
    for field in fields {
        call.arg(*field);
    }
    for identity in identities {
        call.arg(&identity[..]);
    }
    let mut answer = Answer::to("survey", link.run(&SURVEY, &call)?)?;
    let server = answer.score()?;
    let mut clock = answer.list()?;
    let mut next = || clock.next().ok().and_then(|value| bytes("survey", value).ok());
    let mut number = || std::str::from_utf8(&next()?).ok()?.parse().ok();
    let clock = match (number(), number(), number(), number()) {
        (Some(now), Some(seen), Some(step), Some(ttl)) => Some(Clock { now, seen, step, ttl }),
        _ => None,
    };
    let mut instances = Vec::new();
    for instance in answer.rest() {
        let mut instance = Answer::to("survey", instance)?;
        if instance.is_empty() {
            instances.push(None);
            continue;
        }
        instances.push(Some(Sight {
            lease_end: instance.score()?,
            leased: instance.text()? == "leased",
            in_flight: u64::try_from(instance.integer()?).ok(),
            info: instance.rest().map(|value| bytes("survey", value).ok()).collect(),
        }));
    }
    if instances.len() == identities.len() {
        Ok(Survey {
            server,
            clock,
            instances,
        })
    } else {
        Err(Error::protocol(
            "survey",
            "another number of instances than of identities",
        ))
    }
}

/// Every instance and its lease end.
///
/// # Errors
/// As for `register`.
pub fn instances(link: &mut Link, keys: &Keys) -> Result<Vec<(Vec<u8>, f64)>> {
    let mut command = redis::cmd("ZRANGE");
    command.arg(keys.instances()).arg(0).arg(-1).arg("WITHSCORES");
    let mut answer = Answer::to("ZRANGE", link.command(&command)?)?;
    let mut instances = Vec::new();
    while !answer.is_empty() {
        instances.push((answer.bytes()?, answer.score()?));
    }
    Ok(instances)
}

/// Whether an instance has its lease, which is: the field `call`.
///
/// # Errors
/// As for `register`.
pub fn is_alive(link: &mut Link, keys: &Keys, identity: &[u8]) -> Result<bool> {
    let mut command = redis::cmd("HEXISTS");
    command.arg(keys.inflight_of(identity)).arg("call");
    match link.command(&command) {
        // A hash that somebody has overwritten holds no lease any more.
        Err(Error::Refused(text)) if text.contains("WRONGTYPE") => Ok(false),
        answer => Ok(whole("HEXISTS", answer?)? == 1),
    }
}

/// A reply, taken apart from front to back.
pub(crate) struct Answer {
    call: &'static str,
    values: std::vec::IntoIter<Value>,
}

impl Answer {
    pub fn to(call: &'static str, value: Value) -> Result<Self> {
        match value {
            Value::Array(values) => Ok(Self {
                call,
                values: values.into_iter(),
            }),
            _ => Err(Error::protocol(call, "it is not a list")),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.as_slice().is_empty()
    }

    pub(crate) fn next(&mut self) -> Result<Value> {
        self.values
            .next()
            .ok_or_else(|| Error::protocol(self.call, "it is too short"))
    }

    pub fn rest(self) -> std::vec::IntoIter<Value> {
        self.values
    }

    pub fn all_bytes(self) -> Result<Vec<Vec<u8>>> {
        let call = self.call;
        self.values.map(|value| bytes(call, value)).collect()
    }

    pub fn list(&mut self) -> Result<Self> {
        Self::to(self.call, self.next()?)
    }

    pub fn bytes(&mut self) -> Result<Vec<u8>> {
        let value = self.next()?;
        bytes(self.call, value)
    }

    pub fn text(&mut self) -> Result<String> {
        let bytes = self.bytes()?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn integer(&mut self) -> Result<i64> {
        match self.next()? {
            Value::Int(number) => Ok(number),
            _ => Err(Error::protocol(self.call, "a number was expected")),
        }
    }

    pub fn number(&mut self) -> Result<u64> {
        let value = self.next()?;
        whole(self.call, value)
    }

    fn score(&mut self) -> Result<f64> {
        match self.next()? {
            Value::Double(score) => Ok(score),
            value => String::from_utf8_lossy(&bytes(self.call, value)?)
                .parse()
                .map_err(|_| Error::protocol(self.call, "a score is not a number")),
        }
    }

    fn pace(&mut self) -> Result<Pace> {
        let (step, ttl) = (
            Duration::from_millis(self.number()?),
            Duration::from_millis(self.number()?),
        );
        if step.is_zero() || ttl.is_zero() {
            return Err(Error::protocol(self.call, "step and ttl must be more than 0"));
        }
        Ok(Pace { step, ttl })
    }
}

pub(crate) fn bytes(call: &'static str, value: Value) -> Result<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        Value::SimpleString(text) => Ok(text.into_bytes()),
        _ => Err(Error::protocol(call, "a text was expected")),
    }
}

pub(crate) fn whole(call: &'static str, value: Value) -> Result<u64> {
    match value {
        Value::Int(number) => u64::try_from(number).map_err(|_| Error::protocol(call, "a number is negative")),
        _ => Err(Error::protocol(call, "a number was expected")),
    }
}

fn token_of(call: &'static str, bytes: Vec<u8>) -> Result<Token> {
    Token::read(bytes).ok_or_else(|| Error::protocol(call, "a token was expected"))
}
