//! Due jobs: claimed in Sidekiq's place, and pushed (docs/protocol.md, "Due jobs").
//!
//! Between its set and its queue a job is in the hash `due` of the instance that pushes it, under a token that says where it
//! came from. What that instance does not push goes back there.

use crate::entry;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::keys::{self, Keys};
use crate::link::{Call, Link};
use crate::payload::{self, Place};
use crate::scripts::{script, Answer, Fenced, Script};
use crate::settings::Timestamps;
use crate::shared::Shared;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

script!(CLAIM, "claim_due");
script!(SETTLE, "settle_due");
script!(RETURN, "return_due");

pub(crate) static SCRIPTS: [&Script; 3] = [&CLAIM, &SETTLE, &RETURN];

/// How many jobs are claimed, or put back, by one call at the most.
const PIECE: usize = 200;

/// A due job's name: `<call>-<i> <score> <set>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DueToken {
    bytes: Vec<u8>,
    score_at: usize,
    set_at: usize,
}

impl DueToken {
    /// Reads a field of a `due` hash; `None` for one that is no token.
    #[must_use]
    pub fn read(bytes: Vec<u8>) -> Option<Self> {
        let mut parts = bytes.splitn(3, |byte| *byte == b' ');
        let (name, score, set) = (parts.next()?, parts.next()?, parts.next()?);
        let dash = name.iter().position(|byte| *byte == b'-')?;
        entry::number(&name[..dash])?;
        entry::number(&name[dash + 1..])?;
        std::str::from_utf8(score).ok()?.parse::<f64>().ok()?;
        Some(Self {
            score_at: name.len() + 1,
            set_at: bytes.len() - set.len(),
            bytes,
        })
    }

    /// The token as it stands in Redis.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The score that the job had, as Redis wrote it.
    #[must_use]
    pub fn score(&self) -> &[u8] {
        &self.bytes[self.score_at..self.set_at - 1]
    }

    /// The set that it was taken from.
    #[must_use]
    pub fn set(&self) -> &[u8] {
        &self.bytes[self.set_at..]
    }
}

/// What becomes of a due job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Push {
    /// It goes into a queue.
    Queue(Vec<u8>, Vec<u8>),
    /// It is scheduled anew: the set, the score, the payload.
    Set(Vec<u8>, Vec<u8>, Vec<u8>),
    /// It goes nowhere: client middleware has refused it.
    Nowhere,
}

/// How a due job may go to its queue without Ruby: where there is no client middleware, and the payload has all that Sidekiq's
/// client would add.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Straight {
    /// The fields that each payload has: Sidekiq's `default_job_options`.
    pub defaults: Vec<String>,
    /// How the installed Sidekiq writes times.
    pub milliseconds: bool,
}

/// Due jobs that are claimed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claimed {
    /// Token and payload of each that is to be pushed by the caller.
    pub jobs: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many have gone straight to their queues.
    pub pushed: u64,
    /// Whether there may be more.
    pub more: bool,
}

/// The scheduler's side of an engine: one call at a time.
pub(crate) struct Due {
    link: Link,
    /// The number of the last claim. It goes on under a new identity.
    call: u64,
    identity: String,
    /// What is claimed and not yet settled.
    held: HashMap<Vec<u8>, ()>,
    /// Redis may have more under this identity than is held: an answer was lost.
    unsure: bool,
}

#[derive(PartialEq)]
enum Claim {
    Stale,
    Done { before: u64, more: bool, jobs: Vec<(Vec<u8>, Vec<u8>)> },
}

impl Due {
    pub fn new(shared: &Shared) -> Self {
        let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
        Self {
            link: Link::new(shared.settings.redis.clone(), timeout),
            call: 0,
            identity: String::new(),
            held: HashMap::new(),
            unsure: false,
        }
    }

    /// Claims jobs of a set that are due at `until`, as it would be written to Redis.
    pub fn claim(&mut self, shared: &Shared, set: &[u8], until: &[u8], straight: Option<&Straight>) -> Result<Claimed> {
        let Some(identity) = Self::leased(shared) else {
            return Ok(Claimed::default());
        };
        if identity != self.identity {
            // What an identity before this one had is others' to put back.
            self.identity = identity;
            self.held.clear();
            self.unsure = false;
        }
        let claim = match self.try_claim(shared, set, until) {
            // A connection that has broken while nobody used it. What the first copy may have claimed is put back first.
            Err(Error::Connection(_)) => self.try_claim(shared, set, until)?,
            claim => claim?,
        };
        let Fenced::Alive(Claim::Done { before, more, jobs }) = claim else {
            return Ok(Claimed::default());
        };
        // A copy that came late has taken jobs that nobody holds.
        self.unsure |= before > self.held.len() as u64;
        self.held.extend(jobs.iter().map(|(token, _)| (token.clone(), ())));
        match straight {
            Some(straight) => self.push_straight(shared, straight, jobs, more),
            None => Ok(Claimed { jobs, pushed: 0, more }),
        }
    }

    fn try_claim(&mut self, shared: &Shared, set: &[u8], until: &[u8]) -> Result<Fenced<Claim>> {
        if self.unsure {
            self.put_back(shared)?;
        }
        self.call += 1;
        self.unsure = true;
        failpoint::reach("before_claim_due");
        let claim = claim(&mut self.link, &shared.keys, &self.identity, self.call, set, until)?;
        failpoint::reach("after_claim_due");
        self.unsure = false;
        if claim == Fenced::Lost {
            shared.lose(&self.identity);
        }
        Ok(claim)
    }

    /// Pushes what needs no Ruby.
    fn push_straight(
        &mut self,
        shared: &Shared,
        straight: &Straight,
        jobs: Vec<(Vec<u8>, Vec<u8>)>,
        more: bool,
    ) -> Result<Claimed> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (mut pushes, mut others) = (Vec::new(), Vec::new());
        for (token, job) in jobs {
            match enqueued(&job, straight, now) {
                Some((queue, payload)) => pushes.push((token, Push::Queue(queue, payload))),
                None => others.push((token, job)),
            }
        }
        let pushed = self.settle(shared, &pushes)?;
        Ok(Claimed {
            jobs: others,
            pushed,
            more,
        })
    }

    /// What has become of claimed jobs. Answers how many were still this instance's, and have gone where they should.
    pub fn settle(&mut self, shared: &Shared, pushes: &[(Vec<u8>, Push)]) -> Result<u64> {
        let mut done = 0;
        for piece in pushes.chunks(PIECE) {
            if !Self::leased(shared).is_some_and(|identity| identity == self.identity) {
                return Ok(done);
            }
            failpoint::reach("before_settle_due");
            let settled = match settle(&mut self.link, &shared.keys, &self.identity, piece) {
                // By its tokens a repetition finds what the first copy has left.
                Err(Error::Connection(_)) => settle(&mut self.link, &shared.keys, &self.identity, piece),
                settled => settled,
            };
            failpoint::reach("after_settle_due");
            let Fenced::Alive(outcomes) = settled.inspect_err(|_| self.unsure = true)? else {
                shared.lose(&self.identity);
                return Ok(done);
            };
            for ((token, push), outcome) in piece.iter().zip(outcomes) {
                done += u64::from(outcome == 1);
                if outcome >= 0 {
                    self.held.remove(token);
                } else if let Push::Queue(name, _) | Push::Set(name, ..) = push {
                    let name = String::from_utf8_lossy(name);
                    shared.warn_once(
                        &format!("due {name}"),
                        format!("Due jobs can't be pushed to {name}: its key holds something else. They stay scheduled"),
                    );
                }
            }
        }
        Ok(done)
    }

    /// A poll is over: what is not pushed goes back, and the connection with it.
    pub fn end(&mut self, shared: &Shared) -> Result<()> {
        let ended = if self.held.is_empty() && !self.unsure {
            Ok(())
        } else if Self::leased(shared).is_some_and(|identity| identity == self.identity) {
            self.put_back(shared)
        } else {
            Ok(())
        };
        self.link.discard();
        ended
    }

    fn put_back(&mut self, shared: &Shared) -> Result<()> {
        let mut returning = Returning::own(&self.identity);
        // Once more, as with every call.
        let mut failed = false;
        loop {
            match returning.step(&mut self.link, &shared.keys) {
                Ok(None) => failed = false,
                Ok(Some(_)) => break,
                Err(Error::Connection(_)) if !failed => failed = true,
                Err(error) => {
                    self.unsure = true;
                    return Err(error);
                }
            }
        }
        self.held.clear();
        self.unsure = false;
        Ok(())
    }

    fn leased(shared: &Shared) -> Option<String> {
        let state = shared.state();
        state.registered.then(|| state.identity.clone())
    }
}

/// The payload as Sidekiq's client would push it, and the queue. `None` for one of which it would change anything but
/// `enqueued_at`, or that it would refuse: that is for the client itself.
fn enqueued(job: &[u8], straight: &Straight, now: Duration) -> Option<(Vec<u8>, Vec<u8>)> {
    let place = payload::place_of_enqueued_at(job, &straight.defaults)?;
    let timestamps = if straight.milliseconds {
        Timestamps::Milliseconds
    } else {
        Timestamps::Seconds
    };
    let time = timestamps.text(now);
    let (range, text) = match place.enqueued_at {
        Place::At(range) => (range, time),
        Place::Missing(end) => (end..end, format!(",\"enqueued_at\":{time}")),
    };
    let mut payload = Vec::with_capacity(job.len() + text.len());
    payload.extend_from_slice(&job[..range.start]);
    payload.extend_from_slice(text.as_bytes());
    payload.extend_from_slice(&job[range.end..]);
    Some((place.queue.into_bytes(), payload))
}

fn claim(link: &mut Link, keys: &Keys, identity: &str, number: u64, set: &[u8], until: &[u8]) -> Result<Fenced<Claim>> {
    let own = [keys.inflight(identity), keys.due(identity)].map(String::into_bytes);
    let mut call = Call::new(own.into_iter().chain([set.to_vec()]));
    call.number(number).arg(until).count(PIECE).arg(set);
    let mut answer = Answer::to("claim_due", link.run(&CLAIM, &call)?)?;
    match answer.text()?.as_str() {
        "lost" => return Ok(Fenced::Lost),
        "stale" => return Ok(Fenced::Alive(Claim::Stale)),
        _ => {}
    }
    let (before, more) = (answer.number()?, answer.number()? == 1);
    let mut jobs = Vec::new();
    while !answer.is_empty() {
        jobs.push((answer.bytes()?, answer.bytes()?));
    }
    Ok(Fenced::Alive(Claim::Done { before, more, jobs }))
}

fn settle(link: &mut Link, keys: &Keys, identity: &str, pushes: &[(Vec<u8>, Push)]) -> Result<Fenced<Vec<i64>>> {
    let mut call = Call::new([keys.inflight(identity), keys.due(identity), keys::QUEUES.to_owned()]);
    for (token, push) in pushes {
        call.arg(&token[..]);
        match push {
            Push::Queue(queue, payload) => call.arg("queue").key(keys::queue(queue)).arg(&queue[..]).arg(&payload[..]),
            Push::Set(set, score, payload) => call.arg("set").key(set.clone()).arg(&score[..]).arg(&payload[..]),
            Push::Nowhere => call.arg("").arg("0").arg("").arg(""),
        };
    }
    let mut answer = Answer::to("settle_due", link.run(&SETTLE, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let mut outcomes = Vec::with_capacity(pushes.len());
    while !answer.is_empty() {
        outcomes.push(answer.integer()?);
    }
    if outcomes.len() != pushes.len() {
        return Err(Error::protocol("settle_due", "another number of outcomes than of jobs"));
    }
    Ok(Fenced::Alive(outcomes))
}

/// Due jobs go back to the sets they were taken from, piece by piece.
#[derive(Debug)]
pub(crate) struct Returning {
    of: Vec<u8>,
    own: bool,
    tokens: Option<Vec<DueToken>>,
    returned: Returned,
    /// The number of the last claim is to be removed.
    bury: bool,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Returned {
    /// How many are back.
    pub back: u64,
    /// How many stay, since something else lies under their set's key, or since they are no jobs.
    pub stuck: u64,
}

impl Returning {
    /// Those of an instance that is fenced.
    pub fn of(identity: &[u8]) -> Self {
        Self {
            of: identity.to_vec(),
            own: false,
            tokens: None,
            returned: Returned::default(),
            bury: true,
        }
    }

    /// Those of an instance that has its lease, by itself.
    pub fn own(identity: &str) -> Self {
        Self {
            own: true,
            bury: false,
            ..Self::of(identity.as_bytes())
        }
    }

    /// Makes the next call; one that failed may be made again. `Some` when it is over.
    pub fn step(&mut self, link: &mut Link, keys: &Keys) -> Result<Option<Returned>> {
        let due = keys.due_of(&self.of);
        let Some(tokens) = &mut self.tokens else {
            let fields = match link.command(redis::cmd("HKEYS").arg(&due[..])) {
                // Somebody has overwritten it.
                Err(Error::Refused(text)) if text.contains("WRONGTYPE") => {
                    self.returned.stuck += 1;
                    return Ok(Some(self.returned));
                }
                fields => Answer::to("HKEYS", fields?)?.all_bytes()?,
            };
            let count = fields.iter().filter(|field| *field != b"call").count();
            let tokens: Vec<DueToken> = fields.into_iter().filter_map(DueToken::read).collect();
            self.returned.stuck += (count - tokens.len()) as u64;
            self.tokens = Some(tokens);
            return Ok(None);
        };
        if tokens.is_empty() && !self.bury {
            return Ok(Some(self.returned));
        }
        let piece = &tokens[tokens.len().saturating_sub(PIECE)..];
        let mut call = Call::new([keys.inflight_of(&self.of), due]);
        call.arg(if self.own { "1" } else { "" });
        for token in piece {
            call.arg(token.as_bytes()).key(token.set().to_vec()).arg(token.score());
        }
        let left = tokens.len() - piece.len();
        let mut answer = Answer::to("return_due", link.run(&RETURN, &call)?)?;
        failpoint::reach("after_return_due");
        if answer.text()? != "ok" {
            return Ok(Some(self.returned));
        }
        self.returned.back += answer.number()?;
        self.returned.stuck += answer.number()?;
        tokens.truncate(left);
        self.bury &= left > 0;
        Ok((left == 0).then_some(self.returned))
    }
}
