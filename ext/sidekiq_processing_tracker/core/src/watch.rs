//! What people and exporters look at: instances, jobs in flight, totals, the journal.
//!
//! Reads only, and in pages: no call answers more than Redis and this process can bear, however much there is.

use crate::decision::End;
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::identity;
use crate::keys::Keys;
use crate::link::Link;
use crate::payload::{self, Facts};
use crate::scripts::{self, Answer, Clock, Sight};
use redis::Value;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// How many instances one call looks at.
const INSTANCES: usize = 100;
/// How many jobs one call reads: at first, and at most.
const FIRST_JOBS: usize = 10;
const MOST_JOBS: usize = 1000;
/// How many bytes of payloads one call should read.
const BYTES: usize = 1 << 20;
/// How many payloads that have lists of their own to read at once.
const AT_ONCE: usize = 10;
/// How many entries of the journal one call reads. An entry has up to 200 jobs.
const ENTRIES: usize = 20;

/// What the totals are kept by.
pub const OUTCOMES: [&str; 5] = ["requeued", "dead", "discarded", "superseded", "expired"];

const INFO: [&str; 7] = [
    "hostname",
    "pid",
    "started_at",
    "progress",
    "queues",
    "concurrency",
    "sidekiq_identity",
];

/// How an instance is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has its lease.
    Running,
    /// It has its lease and has not beaten for longer than that lasts: the lease clock stands, since Redis was away or
    /// nobody is left to move it.
    Silent,
    /// It has none any more and nobody recovers its jobs at this moment.
    Dead,
    /// Somebody recovers its jobs.
    Recovering,
}

/// An instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    /// Its identity as it stands in Redis.
    pub identity: Vec<u8>,
    /// The label that a person gave it.
    pub instance_id: Vec<u8>,
    /// Its machine.
    pub hostname: Option<Vec<u8>>,
    /// Its process.
    pub pid: Option<u32>,
    /// When it was registered, in ms since the epoch.
    pub started_at_ms: Option<u64>,
    /// When it beat for the last time, in ms since the epoch. It may have been longer ago: time in which the lease clock
    /// stood is not seen.
    pub last_beat_at_ms: Option<u64>,
    /// How it is doing.
    pub state: State,
    /// How many jobs it has in flight; `None` where somebody has overwritten its hash.
    pub in_flight: Option<u64>,
    /// Its queues, separated by commas.
    pub queues: Option<Vec<u8>>,
    /// How many jobs it can run at once.
    pub concurrency: Option<u64>,
    /// What Sidekiq calls the process.
    pub sidekiq_identity: Option<Vec<u8>>,
}

/// Every instance.
///
/// # Errors
/// As for every script.
pub fn instances(link: &mut Link, keys: &Keys) -> Result<Vec<Instance>> {
    let identities: Vec<_> = identities(link, keys)?;
    let mut instances = Vec::new();
    for page in identities.chunks(INSTANCES) {
        let survey = scripts::survey(link, keys, page, &INFO)?;
        let seen = page.iter().zip(survey.instances);
        instances.extend(
            seen.filter_map(|(identity, sight)| Some(instance(identity, &sight?, survey.clock, survey.server))),
        );
    }
    Ok(instances)
}

/// The identity of every instance.
///
/// # Errors
/// As for every script.
pub fn identities(link: &mut Link, keys: &Keys) -> Result<Vec<Vec<u8>>> {
    let instances = scripts::instances(link, keys).map_err(|error| name(error, &keys.instances(), "zset"))?;
    Ok(instances.into_iter().map(|(identity, _)| identity).collect())
}

fn instance(identity: &[u8], sight: &Sight, clock: Option<Clock>, server: f64) -> Instance {
    let told = |field: &str| {
        let position = INFO.iter().position(|name| *name == field)?;
        sight.info.get(position)?.clone()
    };
    let number = |field: &str| std::str::from_utf8(&told(field)?).ok()?.parse::<u64>().ok();
    let parts = identity::parts(identity);
    // The lease began with the last beat, by the lease clock; by the server's time that was as long before the clock was
    // last looked at.
    let beat = clock.map(|clock| clock.seen - (clock.now - (sight.lease_end - clock.ttl)));
    Instance {
        identity: identity.to_vec(),
        instance_id: parts.map_or(identity, |(label, _)| label).to_vec(),
        hostname: told("hostname"),
        pid: number("pid")
            .and_then(|pid| pid.try_into().ok())
            .or(parts.map(|(_, pid)| pid)),
        started_at_ms: number("started_at"),
        last_beat_at_ms: if sight.leased {
            beat.and_then(whole)
        } else {
            number("progress")
        },
        state: state(sight, clock, beat, server),
        in_flight: sight.in_flight,
        queues: told("queues"),
        concurrency: number("concurrency"),
        sidekiq_identity: told("sidekiq_identity"),
    }
}

fn state(sight: &Sight, clock: Option<Clock>, beat: Option<f64>, server: f64) -> State {
    // What the clock would say if somebody moved it now.
    let now = clock.map(|clock| clock.now + (server - clock.seen).max(0.0).min(clock.step));
    let runs = now.is_none_or(|now| sight.lease_end > now);
    match (sight.leased, runs) {
        (false, true) => State::Recovering,
        (_, false) => State::Dead,
        (true, true) => match (beat, clock) {
            (Some(beat), Some(clock)) if server - beat <= clock.ttl => State::Running,
            _ => State::Silent,
        },
    }
}

/// A time in ms, of a number that others may have written.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(ms: f64) -> Option<u64> {
    (0.0..1e15).contains(&ms).then_some(ms as u64)
}

/// A job in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// What its payload tells.
    pub facts: Facts,
    /// The queue it was taken from.
    pub queue: Vec<u8>,
    /// When it was taken, in ms since the epoch.
    pub since_ms: u64,
}

/// Where to read on. As text it goes through Ruby, which does not look into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    cursor: u64,
    count: usize,
}

impl fmt::Display for Page {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.cursor, self.count)
    }
}

impl FromStr for Page {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let page = text.split_once(' ').and_then(|(cursor, count)| {
            Some(Self {
                cursor: cursor.parse().ok()?,
                count: count.parse().ok()?,
            })
        });
        page.ok_or_else(|| Error::Internal(format!("no page: {text:?}")))
    }
}

/// Some of the jobs that an instance has in flight, and where to read on; without a page the first ones.
///
/// # Errors
/// As for every command. An instance that is gone, or whose hash somebody has overwritten, has none.
pub fn in_flight(
    link: &mut Link,
    keys: &Keys,
    identity: &[u8],
    page: Option<Page>,
) -> Result<(Vec<Job>, Option<Page>)> {
    let page = page.unwrap_or(Page {
        cursor: 0,
        count: FIRST_JOBS,
    });
    let mut command = redis::cmd("HSCAN");
    command
        .arg(keys.inflight_of(identity))
        .arg(page.cursor)
        .arg("COUNT")
        .arg(page.count);
    let value = match link.command(&command) {
        Err(error) if is_wrong_type(&error) => return Ok((Vec::new(), None)),
        answer => answer?,
    };
    let mut answer = Answer::to("HSCAN", value)?;
    let cursor = answer
        .text()?
        .parse()
        .map_err(|_| Error::protocol("HSCAN", "a cursor was expected"))?;
    let mut fields = answer.list()?;
    let (mut jobs, mut found, mut bytes, mut read) = (Vec::new(), Vec::new(), 0, 0);
    while !fields.is_empty() {
        let (field, payload) = (fields.bytes()?, fields.bytes()?);
        read += 1;
        match Token::read(field) {
            Some(token) => found.push((token, payload)),
            None => bytes += payload.len(),
        }
    }
    while !found.is_empty() {
        let mut some = found.split_off(found.len().saturating_sub(AT_ONCE));
        scripts::read_lists(link, keys, identity, &mut some, HashMap::new())?;
        for (token, payload) in some {
            bytes += payload.len();
            jobs.push(Job {
                facts: payload::read(&payload),
                queue: token.queue().to_vec(),
                since_ms: token.taken_at_ms(),
            });
        }
    }
    // As many as make up a reply of the size that it should have, if the next ones are like these.
    let count = match bytes {
        0 => page.count,
        _ => (read * BYTES / bytes).min(page.count * 4).clamp(1, MOST_JOBS),
    };
    Ok((jobs, (cursor != 0).then_some(Page { cursor, count })))
}

/// What became of an orphan, as the journal has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// When, in ms since the epoch.
    pub at_ms: u64,
    /// The dead instance.
    pub from: Vec<u8>,
    /// The reaper.
    pub by: Vec<u8>,
    /// The rest, by name: "jid", "class", "queue", "outcome" and what else there is.
    pub told: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What became of the last orphans, the newest first: `count` at most. What is no entry of ours is left out.
///
/// # Errors
/// As for every command; `Error::Refused` when somebody has overwritten the journal.
pub fn journal(link: &mut Link, keys: &Keys, count: usize) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut before = b"+".to_vec();
    while lines.len() < count {
        let mut command = redis::cmd("XREVRANGE");
        command
            .arg(keys.journal())
            .arg(&before[..])
            .arg("-")
            .arg("COUNT")
            .arg(ENTRIES);
        let value = link
            .command(&command)
            .map_err(|error| name(error, &keys.journal(), "stream"))?;
        let entries = Answer::to("XREVRANGE", value)?.rest();
        let mut last = None;
        for entry in entries {
            let mut entry = Answer::to("XREVRANGE", entry)?;
            let id = entry.bytes()?;
            let fields = entry.list()?.rest();
            let fields = fields
                .map(|field| scripts::bytes("XREVRANGE", field))
                .collect::<Result<Vec<_>>>()?;
            lines.extend(read_entry(&id, &fields));
            last = Some(id);
        }
        let Some(id) = last else { break };
        before = [b"(", &id[..]].concat();
    }
    lines.truncate(count);
    Ok(lines)
}

/// An entry: fields of the call, then those of each job, beginning with its jid. The last of a call was settled last.
fn read_entry(id: &[u8], fields: &[Vec<u8>]) -> Vec<Line> {
    let at_ms = id.split(|byte| *byte == b'-').next();
    let at_ms = at_ms
        .and_then(|ms| std::str::from_utf8(ms).ok()?.parse().ok())
        .unwrap_or_default();
    let mut head = Line {
        at_ms,
        ..Line::default()
    };
    let mut lines: Vec<Line> = Vec::new();
    for pair in fields.chunks_exact(2) {
        let (name, value) = (&pair[0], pair[1].clone());
        if name == b"jid" {
            lines.push(head.clone());
        }
        match (lines.last_mut(), &name[..]) {
            (Some(line), _) => line.told.push((name.clone(), value)),
            (None, b"from") => head.from = value,
            (None, b"by") => head.by = value,
            (None, _) => {}
        }
    }
    // Before any are counted: what has expired was no job any more, and what is unknown is another version's.
    let is_end = |(name, value): &(Vec<u8>, Vec<u8>)| {
        name == b"outcome" && End::ALL.into_iter().any(|end| end.name().as_bytes() == value)
    };
    lines.retain(|line| !line.from.is_empty() && line.told.iter().any(is_end));
    lines.reverse();
    lines
}

/// How many orphans had each outcome, since ever, in the order of `OUTCOMES`.
///
/// # Errors
/// As for every command; `Error::Refused` when somebody has overwritten the totals.
pub fn totals(link: &mut Link, keys: &Keys) -> Result<Vec<u64>> {
    let mut command = redis::cmd("HMGET");
    command.arg(keys.stats()).arg(&OUTCOMES);
    let value = link
        .command(&command)
        .map_err(|error| name(error, &keys.stats(), "hash"))?;
    let number = |value: Value| {
        std::str::from_utf8(&scripts::bytes("HMGET", value).ok()?)
            .ok()?
            .parse()
            .ok()
    };
    Ok(Answer::to("HMGET", value)?
        .rest()
        .map(|value| number(value).unwrap_or_default())
        .collect())
}

fn is_wrong_type(error: &Error) -> bool {
    matches!(error, Error::Refused(text) if text.contains("WRONGTYPE"))
}

/// The error, naming the key where Redis only says that some key holds something else.
fn name(error: Error, key: &str, expected: &str) -> Error {
    if !is_wrong_type(&error) {
        return error;
    }
    Error::Refused(format!(
        "the key {key} holds something that is no {expected}: somebody has overwritten it. Remove it (DEL)"
    ))
}
