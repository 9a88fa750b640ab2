//! Due jobs: claimed in Sidekiq's place, and pushed (docs/protocol.md, "Due jobs").
//!
//! Between its set and its queue a job is in the hash `due` of the instance that pushes it, under a token that says where it
//! came from. What that instance does not push goes back there.

use crate::entry;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::keys::Keys;
use crate::link::{Call, Link};
use crate::payload::{self, Place};
use crate::scripts::{script, Answer, Fenced, Script};
use crate::settings::Timestamps;
use crate::shared::Shared;
use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

script!(CLAIM, "lease", "claim_due");
script!(SETTLE, "lease", "settle_due");
script!(RETURN, "lease", "return_due");

pub(crate) static SCRIPTS: [&Script; 3] = [&CLAIM, &SETTLE, &RETURN];

/// How many jobs are claimed, or put back, by one call at the most.
const PIECE: usize = 200;

/// How long an answer may take. A step may be shorter, and longer than a shutdown should wait.
const LEAST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(2);

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
    /// The fields that none has: what Sidekiq's client takes out again (`TRANSIENT_ATTRIBUTES`).
    pub transient: Vec<String>,
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
    /// Whether the instance has a lease. Without one nothing is claimed: what is due is then for others to push.
    pub leased: bool,
}

/// The scheduler's side of an engine: one call at a time.
pub(crate) struct Due {
    link: Link,
    timeout: Duration,
    /// The number of the last claim. It goes on under a new identity.
    call: u64,
    identity: String,
    /// What is claimed and not yet settled.
    held: HashSet<Vec<u8>>,
    /// Redis may have more under this identity than is held: an answer was lost.
    unsure: bool,
    /// The last call has got no answer.
    away: bool,
    /// The last claim has: no copy of it can come late.
    answered: bool,
    /// That answer said that there may be more.
    more: bool,
}

#[derive(PartialEq)]
enum Claim {
    Stale,
    Done {
        before: u64,
        more: bool,
        jobs: Vec<(Vec<u8>, Vec<u8>)>,
        /// Its number is, so that it is not to be had again.
        noted: bool,
    },
}

impl Due {
    pub fn new(shared: &Shared) -> Self {
        let timeout = shared.settings.pace().step.clamp(LEAST, MOST);
        Self {
            link: Link::new(shared.settings.redis.clone(), timeout),
            timeout,
            call: 0,
            identity: String::new(),
            held: HashSet::new(),
            unsure: false,
            away: false,
            answered: true,
            more: false,
        }
    }

    /// Makes a call, and once more where the connection broke at once: it may have been dead for long. Sidekiq waits for its
    /// poller when it shuts down, so a Redis that does not answer is not waited for twice.
    fn twice<T>(&mut self, mut call: impl FnMut(&mut Self) -> Result<T>) -> Result<T> {
        let began = Instant::now();
        let answer = match call(self) {
            Err(Error::Connection(_)) if began.elapsed() < self.timeout / 2 => call(self),
            answer => answer,
        };
        self.away = matches!(answer, Err(Error::Connection(_)));
        answer
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
        if !self.may_have(set, until)? {
            return Ok(Claimed {
                leased: true,
                ..Claimed::default()
            });
        }
        // What a first copy may have claimed is put back first.
        let claim = self.twice(|due| due.try_claim(shared, set, until))?;
        let (before, more, jobs) = match claim {
            Fenced::Lost => return Ok(Claimed::default()),
            Fenced::Alive(Claim::Stale) => (0, false, Vec::new()),
            Fenced::Alive(Claim::Done { before, more, jobs, .. }) => (before, more, jobs),
        };
        // A copy that came late has taken jobs that nobody holds.
        self.unsure |= before > self.held.len() as u64;
        self.held.extend(jobs.iter().map(|(token, _)| token.clone()));
        match straight {
            Some(straight) => self.push_straight(shared, straight, jobs, more),
            None => Ok(Claimed {
                jobs,
                pushed: 0,
                more,
                leased: true,
            }),
        }
    }

    /// Whether a claim may be worth while: most polls find nothing, and a look is a single command. (It brings a payload: a count
    /// would be another right.) After a claim without an answer comes another, whatever there is: only that keeps a late copy of
    /// the first out.
    fn may_have(&mut self, set: &[u8], until: &[u8]) -> Result<bool> {
        if self.more || self.unsure || !self.answered {
            return Ok(true);
        }
        self.twice(|due| {
            let mut look = redis::cmd("ZRANGEBYSCORE");
            look.arg(set).arg("-inf").arg(until).arg("LIMIT").arg(0).arg(1);
            Answer::to("ZRANGEBYSCORE", due.link.command(&look)?).map(|found| !found.is_empty())
        })
    }

    fn try_claim(&mut self, shared: &Shared, set: &[u8], until: &[u8]) -> Result<Fenced<Claim>> {
        if self.unsure {
            self.put_back(shared)?;
        }
        self.call += 1;
        (self.unsure, self.answered) = (true, false);
        failpoint::reach("before_claim_due");
        let claim = claim(&mut self.link, &shared.keys, &self.identity, self.call, set, until)?;
        failpoint::reach("after_claim_due");
        (self.unsure, self.answered) = (false, true);
        self.more = matches!(claim, Fenced::Alive(Claim::Done { more: true, .. }));
        if matches!(claim, Fenced::Alive(Claim::Done { noted: false, .. })) {
            // There can be no copy of it that comes late.
            self.call -= 1;
        }
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
        // From the first on that is for Ruby to push all are, so that they keep their order.
        let (mut pushes, mut jobs) = (Vec::new(), jobs.into_iter().peekable());
        while let Some((token, job)) = jobs.peek() {
            let Some((queue, payload)) = enqueued(job, straight, now) else {
                break;
            };
            pushes.push((token.clone(), Push::Queue(queue, payload)));
            jobs.next();
        }
        let pushed = self.settle(shared, &pushes)?;
        Ok(Claimed {
            jobs: jobs.collect(),
            pushed,
            more,
            leased: true,
        })
    }

    /// What has become of claimed jobs. Answers how many were still this instance's, and have gone where they should.
    pub fn settle(&mut self, shared: &Shared, pushes: &[(Vec<u8>, Push)]) -> Result<u64> {
        let mut done = 0;
        for piece in pushes.chunks(PIECE) {
            if Self::leased(shared).is_none_or(|identity| identity != self.identity) {
                return Ok(done);
            }
            failpoint::reach("before_settle_due");
            // By its tokens a repetition finds what the first copy has left.
            let settled = self.twice(|due| settle(&mut due.link, &shared.keys, &due.identity, piece));
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
                        format!(
                            "Due jobs can't be pushed to {name}: its key holds something else. They stay scheduled"
                        ),
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
        } else if std::mem::take(&mut self.away) {
            // That is told already. It goes back with the next claim, or when this instance has left.
            self.unsure = true;
            Ok(())
        } else if Self::leased(shared).is_some_and(|identity| identity == self.identity) {
            self.twice(|due| due.put_back(shared))
        } else {
            Ok(())
        };
        self.link.discard();
        ended
    }

    fn put_back(&mut self, shared: &Shared) -> Result<()> {
        self.unsure = true;
        let mut returning = Returning::own(&self.identity);
        while returning.step(&mut self.link, &shared.keys)?.is_none() {}
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
    let place = payload::place_of_enqueued_at(job, &straight.defaults, &straight.transient)?;
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
    let noted = match answer.text()?.as_str() {
        "lost" => return Ok(Fenced::Lost),
        "stale" => return Ok(Fenced::Alive(Claim::Stale)),
        word => word != "idle",
    };
    let (before, more) = (answer.number()?, answer.number()? == 1);
    let mut jobs = Vec::new();
    while !answer.is_empty() {
        jobs.push((answer.bytes()?, answer.bytes()?));
    }
    Ok(Fenced::Alive(Claim::Done {
        before,
        more,
        jobs,
        noted,
    }))
}

fn settle(link: &mut Link, keys: &Keys, identity: &str, pushes: &[(Vec<u8>, Push)]) -> Result<Fenced<Vec<i64>>> {
    let own = [keys.inflight(identity), keys.due(identity)].map(String::into_bytes);
    let mut call = Call::new(own.into_iter().chain([keys.queues()]));
    for (token, push) in pushes {
        call.arg(&token[..]);
        match push {
            Push::Queue(queue, payload) => call
                .arg("queue")
                .key(keys.queue(queue))
                .arg(&queue[..])
                .arg(&payload[..]),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_claim_due_writes() {
        let token = DueToken::read(b"12-3 1732570000.1234567 sche dule".to_vec()).unwrap();
        assert_eq!(
            (token.score(), token.set()),
            (&b"1732570000.1234567"[..], &b"sche dule"[..])
        );
        assert_eq!(token.as_bytes(), b"12-3 1732570000.1234567 sche dule");
        for field in ["call", "", "1-1", "1-1 5", "x-1 5 s", "1-1 x s", "1 5 s"] {
            assert_eq!(DueToken::read(field.into()), None, "{field}");
        }
    }

    fn pushed(job: &str, milliseconds: bool) -> Option<(String, String)> {
        let straight = Straight {
            defaults: vec!["retry".into(), "queue".into()],
            transient: vec!["client_class".into()],
            milliseconds,
        };
        let (queue, payload) = enqueued(job.as_bytes(), &straight, Duration::from_micros(1_732_570_000_123_456))?;
        Some((String::from_utf8(queue).unwrap(), String::from_utf8(payload).unwrap()))
    }

    const JOB: &str = r#"{"retry":true,"queue":"low","class":"A","args":[1e2,{"at":5}],"jid":"j","created_at":1}"#;

    #[test]
    fn says_when_it_is_enqueued_and_changes_nothing_else() {
        let added = |time: &str| {
            let job = &JOB[..JOB.len() - 1];
            Some(("low".to_owned(), format!(r#"{job},"enqueued_at":{time}}}"#)))
        };
        assert_eq!(pushed(JOB, false), added("1732570000.123456"));
        assert_eq!(pushed(JOB, true), added("1732570000123"));
        let again = JOB.replace(r#""jid""#, r#""enqueued_at" : 17.25 , "jid""#);
        assert_eq!(pushed(&again, true).unwrap().1, again.replace("17.25", "1732570000123"));
    }

    #[test]
    fn leaves_to_the_client_what_that_would_see_otherwise() {
        let without = |field: &str| JOB.replace(field, "");
        let with = |field: &str| format!("{},{field}}}", &JOB[..JOB.len() - 1]);
        for regular in [
            with(r#""tags":["a"]"#),
            with(r#""retry_for":60"#),
            with(r#""tags":null"#),
        ] {
            assert!(pushed(&regular, true).is_some(), "{regular}");
        }
        for other in [
            without(r#""retry":true,"#),
            without(r#""queue":"low","#),
            without(r#""class":"A","#),
            without(r#""args":[1e2,{"at":5}],"#),
            without(r#""jid":"j","#),
            without(r#","created_at":1"#),
            JOB.replace(r#""low""#, r#""""#),
            JOB.replace(r#""low""#, "null"),
            JOB.replace(r#""A""#, "5"),
            JOB.replace(r#"[1e2,{"at":5}]"#, "{}"),
            JOB.replace("1e2", "1e400"),
            JOB.replace("1e2", r#""\ud800""#),
            with(r#""at":12.5"#),
            with(r#""client_class":null"#),
            with(r#""queue":"high""#),
            with(r#""tags":"a""#),
            with(r#""retry_for":2000000000"#),
            with(r#""retry_for":1.5"#),
            format!("[{JOB}]"),
            "null".into(),
            "not json".into(),
            String::new(),
        ] {
            assert_eq!(pushed(&other, true), None, "{other}");
        }
        assert_eq!(
            enqueued(b"{\"class\":\"\xff\"}", &Straight::default(), Duration::ZERO),
            None
        );
    }
}
