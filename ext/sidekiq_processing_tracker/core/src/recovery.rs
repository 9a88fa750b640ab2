//! Recovery: the jobs of a dead instance are settled, in pieces, each one script.

use crate::dead_set::{self, Death};
use crate::decision::{self, Decision, End, Source, Suspect, Timetable};
use crate::due::Returning;
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::events::{Event, Settled};
use crate::failpoint;
use crate::host;
use crate::identity;
use crate::keys::Keys;
use crate::legacy;
use crate::link::{Asked, Link};
use crate::payload;
use crate::scripts::{self, Found, Orphan, Outcome, Proof, Reaped, Settlement};
use crate::settings::{Pace, Policy};
use redis::Value;
use std::collections::HashMap;
use std::iter;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most tokens that one call settles.
const PIECE: usize = 200;

/// Who recovers, and how.
#[derive(Debug, Clone)]
pub struct Reaper {
    /// The keys.
    pub keys: Keys,
    /// The reaper's name in the journal.
    pub by: String,
    /// The pace, for a clock that is missing.
    pub pace: Pace,
    /// The most that it may hold a dead instance.
    pub hold: Duration,
    /// What is to become of orphans.
    pub policy: Policy,
}

/// The recovery of one instance.
#[derive(Debug)]
pub struct Recovery {
    /// The identity as it stands in Redis.
    from: Vec<u8>,
    /// It is dead for certain, and how that is known.
    certain: Option<Proof>,
    /// What an instance with its lease settles itself, by token. `None` for the recovery of a dead one.
    own: Option<HashMap<Token, Dropped>>,
    /// What is known of the instance. `None` before it is reaped.
    instance: Option<Instance>,
    /// What its scheduler has left goes back to where it was.
    returning: Option<Returning>,
    /// The tokens that are to be settled now; the last comes first.
    tokens: Vec<Token>,
    /// How often those were orphaned that are known to have been.
    counts: HashMap<Token, u64>,
    /// Those that may be what kills the processes. They leave one at a time.
    suspects: Vec<Suspect>,
    /// What is being settled. It stays until the call was answered.
    piece: Option<Piece>,
    report: Report,
    /// The recovery of an instance of the 1.0 gem, which goes another way.
    legacy: Option<legacy::Recovery>,
}

/// A job that an instance with its lease holds though no thread of it runs it any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Its name in the in-flight hash.
    pub token: Token,
    /// Whether it can have been run, in part. One that never reached Ruby just goes back: that is not counted.
    pub ran: bool,
    /// Whether it has waited for as long as a recovery before this one has told.
    pub waited: bool,
}

#[derive(Debug)]
struct Instance {
    source: Source,
    timetable: Timetable,
    /// When it was found so.
    at: Instant,
    /// Nothing was in flight: it is only to be removed.
    empty: bool,
    /// The indexes in which it stands.
    indexes: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Piece {
    /// The name that the call and its repetitions share.
    name: String,
    orphans: Vec<Orphan>,
    /// Their payloads, for the events.
    payloads: Vec<Option<Arc<[u8]>>>,
    /// When the first of those is due that wait; this call settles none.
    rest: Option<Duration>,
}

/// What a recovery has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Jobs that are back in their queues.
    pub requeued: u64,
    /// Jobs that are in the dead set.
    pub dead: u64,
    /// Jobs that would be in the dead set if they did not forbid it.
    pub discarded: u64,
    /// Jobs whose unique locks others hold.
    pub superseded: u64,
    /// Jobs that stay in flight, since something else lies under their queues' keys.
    pub stuck: u64,
    /// Due jobs of its scheduler that stay where they are, since something else lies under their set's key.
    pub stuck_due: u64,
    /// Fields that are no tokens.
    pub unreadable: u64,
    /// Whether something else lies under the key of the instance's in-flight hash.
    pub overwritten: bool,
    /// Whether the journal or the totals could not be written.
    pub unnoted: bool,
    /// Unique locks that could not be settled.
    pub unsettled_locks: u64,
    /// Whether there was nothing to recover: somebody else has done it, or the instance lives. For jobs of its own: whether
    /// the instance has lost its lease.
    pub idle: bool,
    /// When the first of the jobs is due that stay in flight to wait, from now.
    pub rest: Option<Duration>,
    /// Jobs of its own that stay in flight to wait, and for how long from now.
    pub waiting: Vec<(Token, Duration)>,
}

/// How far a recovery is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do.
    More,
    /// It is over.
    Done(Report),
}

impl Recovery {
    /// The recovery of the instance `from`.
    #[must_use]
    pub fn new(from: Vec<u8>) -> Self {
        Self {
            legacy: legacy::Recovery::of(&from),
            from,
            certain: None,
            own: None,
            instance: None,
            returning: None,
            tokens: Vec::new(),
            counts: HashMap::new(),
            suspects: Vec::new(),
            piece: None,
            report: Report::default(),
        }
    }

    /// The recovery of the instance `from`, which is dead for certain though its lease runs.
    #[must_use]
    pub fn certain(from: Vec<u8>, proof: Proof) -> Self {
        Self {
            certain: Some(proof),
            ..Self::new(from)
        }
    }

    /// The settlement of jobs that the instance `identity` has in flight, though no thread of it runs them any more: by the
    /// same decisions as if it were dead. It must have its lease, and keeps it. Jobs that must wait are told in the report;
    /// they are to be given to another such settlement when they have.
    #[must_use]
    pub fn own(identity: &str, dropped: Vec<Dropped>) -> Self {
        let own = dropped.into_iter().map(|dropped| (dropped.token.clone(), dropped));
        Self {
            own: Some(own.collect()),
            ..Self::new(identity.as_bytes().to_vec())
        }
    }

    /// Whose recovery it is, as it stands in Redis.
    #[must_use]
    pub fn from(&self) -> &[u8] {
        &self.from
    }

    /// Makes the next call. One that failed may be made again: nothing is done twice, and nothing is reported twice.
    ///
    /// # Errors
    /// As for every script.
    pub fn step(&mut self, link: &mut Link, reaper: &Reaper, tell: impl FnMut(Event)) -> Result<Progress> {
        if let Some(asked) = self.next(reaper) {
            let answer = asked.run(link)?;
            return self.answered(reaper, answer, tell);
        }
        if let Some(legacy) = &mut self.legacy {
            legacy.step(link, reaper, tell)
        } else if self.instance.is_none() {
            self.look(link, reaper)
        } else {
            self.put_due_back(link, reaper, tell)
        }
    }

    /// The next call, where it is one that others may be made beside (`answered`); else it is for `step`.
    pub(crate) fn next(&self, reaper: &Reaper) -> Option<Asked> {
        if self.legacy.is_some() || self.returning.is_some() {
            return None;
        }
        let keys = &reaper.keys;
        match (&self.instance, &self.piece) {
            (None, _) if self.own.is_some() => None,
            (None, _) => {
                failpoint::reach("before_reap");
                let (by, proof) = (&reaper.by, self.certain.as_ref());
                Some(scripts::reaping(keys, reaper.pace, &self.from, by, reaper.hold, proof))
            }
            (Some(_), None) => Some(scripts::peeking(keys, &self.from, self.next_tokens())),
            (Some(instance), Some(piece)) => {
                let settlement = self.settlement(reaper, instance, piece);
                Some(scripts::recovering(keys, &settlement, &piece.orphans))
            }
        }
    }

    /// The answer to the call that `next` has told.
    ///
    /// # Errors
    /// As for every script.
    pub(crate) fn answered(&mut self, reaper: &Reaper, answer: Value, tell: impl FnMut(Event)) -> Result<Progress> {
        if self.instance.is_none() {
            self.reaped(reaper, answer, tell)
        } else if self.piece.is_some() {
            self.settled(reaper, answer, tell)
        } else {
            self.peeked(reaper, answer)
        }
    }

    fn reaped(&mut self, reaper: &Reaper, answer: Value, mut tell: impl FnMut(Event)) -> Result<Progress> {
        failpoint::reach("after_reap");
        match scripts::reaped(answer)? {
            Reaped::Fenced(found) => {
                if let Some(proof) = &self.certain {
                    let from = String::from_utf8_lossy(&self.from);
                    tell(Event::Note(format!(
                        "found dead before its lease ran out: {from}: {}",
                        proof.told
                    )));
                }
                self.found(reaper, found)?;
            }
            Reaped::Gone | Reaped::Runs => self.report.idle = true,
            Reaped::Overwritten => self.report.overwritten = true,
        }
        self.proceed()
    }

    /// The next step in putting back what the scheduler of the dead had claimed. It was no run, so nothing of it is counted,
    /// and all of it goes back, marked or not.
    fn put_due_back(&mut self, link: &mut Link, reaper: &Reaper, mut tell: impl FnMut(Event)) -> Result<Progress> {
        let Some(returning) = &mut self.returning else {
            return Ok(Progress::More);
        };
        if let Some(returned) = returning.step(link, &reaper.keys)? {
            self.returning = None;
            self.report.stuck_due += returned.stuck;
            if returned.back > 0 {
                let from = String::from_utf8_lossy(&self.from);
                let back = returned.back;
                tell(Event::Note(format!(
                    "put {back} due jobs of {from} back, which it had not pushed"
                )));
            }
        }
        self.proceed()
    }

    fn found(&mut self, reaper: &Reaper, found: Found) -> Result<()> {
        self.returning = found.scheduled.then(|| Returning::of(&self.from));
        self.instance = Some(Instance {
            source: Source::read(&found.info),
            timetable: Timetable {
                now: found.now,
                since: found.fenced_at,
                last: found.released_at,
            },
            at: Instant::now(),
            empty: found.fields.is_empty(),
            indexes: host::indexes(&reaper.keys, &found.info),
        });
        let count = found.fields.len();
        let told = found.payloads.len() == count && count <= PIECE;
        let payloads = found.payloads.into_iter().map(Some).chain(iter::repeat(None));
        let mut tokens: Vec<_> = found
            .fields
            .into_iter()
            .zip(payloads)
            .filter_map(|(field, payload)| Some((Token::read(field)?, payload)))
            .collect();
        self.report.unreadable = (count - tokens.len()) as u64;
        // Settled from the newest to the oldest, since each goes to the end that Sidekiq takes from.
        tokens.sort_by_key(|(token, _)| token.order());
        if told && !tokens.is_empty() {
            let (tokens, payloads) = tokens
                .into_iter()
                .rev()
                .map(|(token, payload)| (token, payload.flatten()))
                .unzip();
            self.piece = Some(self.piece(reaper, tokens, payloads, found.at_ms)?);
        } else {
            self.tokens = tokens.into_iter().map(|(token, _)| token).collect();
        }
        Ok(())
    }

    fn look(&mut self, link: &mut Link, reaper: &Reaper) -> Result<Progress> {
        let info = scripts::info(link, &reaper.keys, &String::from_utf8_lossy(&self.from))?;
        self.instance = Some(Instance {
            source: Source::read(&info),
            timetable: Timetable::beginning(),
            at: Instant::now(),
            empty: false,
            indexes: Vec::new(),
        });
        self.tokens = self.own.iter().flat_map(HashMap::keys).cloned().collect();
        self.tokens.sort_by_key(Token::order);
        self.proceed()
    }

    /// Lets those suspects go that are due. Where others are left, or nothing was in flight at all, a last call says so.
    fn release_suspects(&mut self) -> Result<()> {
        let Some(instance) = &mut self.instance else {
            return Ok(());
        };
        let passed = instance.at.elapsed();
        let timetable = Timetable {
            now: instance.timetable.now + passed,
            ..instance.timetable
        };
        let mut waits = timetable.waits(&self.from, std::mem::take(&mut self.suspects));
        let due = waits.partition_point(|(_, wait)| wait.is_zero());
        let waiting = waits.split_off(due);
        for (suspect, _) in waits {
            instance.timetable.last = Some(timetable.now);
            self.counts.insert(suspect.token.clone(), suspect.count);
            self.tokens.insert(0, suspect.token);
        }
        if !self.tokens.is_empty() {
            self.suspects = waiting.into_iter().map(|(suspect, _)| suspect).collect();
            return Ok(());
        }
        let rest = waiting.first().map(|(_, wait)| *wait);
        if self.own.is_some() {
            self.report.waiting = waiting
                .into_iter()
                .map(|(suspect, wait)| (suspect.token, wait))
                .collect();
        } else if rest.is_some() || std::mem::take(&mut instance.empty) {
            self.piece = Some(Piece {
                name: identity::nonce()?,
                orphans: Vec::new(),
                payloads: Vec::new(),
                rest,
            });
        }
        Ok(())
    }

    fn next_tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.iter().rev().take(PIECE)
    }

    fn peeked(&mut self, reaper: &Reaper, answer: Value) -> Result<Progress> {
        let (at_ms, payloads) = scripts::peeked(answer)?;
        failpoint::reach("after_peek");
        let tokens: Vec<Token> = self.next_tokens().cloned().collect();
        if payloads.is_empty() || payloads.len() > tokens.len() {
            return Err(Error::protocol("peek", "another number of payloads than of tokens"));
        }
        self.tokens.truncate(self.tokens.len() - payloads.len());
        self.piece = Some(self.piece(reaper, tokens, payloads, at_ms)?);
        Ok(Progress::More)
    }

    /// What is decided for these tokens, with what they held at `at_ms`.
    fn piece(&self, reaper: &Reaper, tokens: Vec<Token>, payloads: Vec<Option<Vec<u8>>>, at_ms: u64) -> Result<Piece> {
        let payloads: Vec<Option<Arc<[u8]>>> = payloads.into_iter().map(|payload| payload.map(Into::into)).collect();
        let orphans = tokens
            .into_iter()
            .zip(&payloads)
            .map(|(token, payload)| self.orphan(reaper, token, payload.as_deref(), at_ms));
        Ok(Piece {
            name: identity::nonce()?,
            orphans: orphans.collect(),
            payloads,
            rest: None,
        })
    }

    fn orphan(&self, reaper: &Reaper, token: Token, payload: Option<&[u8]>, at_ms: u64) -> Orphan {
        let facts = payload.map(payload::read).unwrap_or_default();
        let counted_as = payload::counted_as(&facts, payload.unwrap_or_default());
        let known = self.counts.get(&token).copied().unwrap_or(0);
        let counts = self.dropped(&token).is_none_or(|dropped| dropped.ran);
        let (count, decision) = match &self.instance {
            Some(instance) if counts && payload.is_some() => (
                Some(known),
                decision::decide(&facts, &instance.source, &reaper.policy, known),
            ),
            _ => (None, Decision::Requeue),
        };
        let entry = match (decision, payload) {
            (Decision::Kill(reason), Some(payload)) => Death {
                reason,
                token: &token,
                from: &self.from,
                recoveries: known + 1,
                at_ms,
            }
            .entry(payload, &reaper.policy),
            _ => Vec::new(),
        };
        Orphan {
            token,
            facts,
            counted_as,
            count,
            decision,
            entry,
        }
    }

    fn dropped(&self, token: &Token) -> Option<&Dropped> {
        self.own.as_ref()?.get(token)
    }

    fn settlement<'a>(&'a self, reaper: &'a Reaper, instance: &'a Instance, piece: &'a Piece) -> Settlement<'a> {
        Settlement {
            from: &self.from,
            by: &reaper.by,
            pace: reaper.pace,
            hold: reaper.hold,
            piece: &piece.name,
            own: self.own.is_some(),
            // What is stuck is tried again as soon as ever.
            rest: piece
                .rest
                .filter(|_| self.report.stuck + self.report.stuck_due + self.report.unreadable == 0),
            policy: &reaper.policy,
            sidekiq_identity: instance.source.sidekiq_identity.as_deref(),
            indexes: &instance.indexes,
        }
    }

    fn settled(&mut self, reaper: &Reaper, answer: Value, mut tell: impl FnMut(Event)) -> Result<Progress> {
        let orphans = self.piece.as_ref().map_or(0, |piece| piece.orphans.len());
        let Some(settled) = scripts::recovered(answer, orphans)? else {
            self.report.idle = true;
            return Ok(self.done());
        };
        failpoint::reach("after_recover");
        self.report.unnoted |= !settled.noted;
        self.report.unsettled_locks += settled.unsettled_locks;
        if let Some(warning) = dead_set::trimmed(settled.trimmed) {
            tell(Event::Warning(warning));
        }
        let Some(piece) = self.piece.take() else {
            return Ok(Progress::More);
        };
        self.report.rest = piece.rest;
        for ((orphan, payload), outcome) in piece.orphans.into_iter().zip(piece.payloads).zip(settled.outcomes) {
            match outcome {
                Outcome::Ended(end) | Outcome::EndedBefore(end) => {
                    *self.report.total(end) += 1;
                    tell(Event::Settled(Settled {
                        end,
                        reason: orphan.decision.reason().filter(|_| end != End::Superseded),
                        queue: orphan.token.queue().to_vec(),
                        jid: orphan.facts.jid,
                        class: orphan.facts.class,
                        from: String::from_utf8_lossy(&self.from).into_owned(),
                        by: reaper.by.clone(),
                        recoveries: orphan.count.map_or(0, |count| count + 1),
                        at_ms: settled.at_ms,
                        payload,
                    }));
                }
                Outcome::Again(count) => self.decide_again(reaper, orphan, count),
                Outcome::Stuck => self.report.stuck += 1,
                Outcome::Gone => {}
            }
        }
        self.proceed()
    }

    /// The orphan was orphaned another number of times than its decision was made for.
    fn decide_again(&mut self, reaper: &Reaper, orphan: Orphan, count: u64) {
        let token = orphan.token;
        let source = self.instance.as_ref().map(|instance| &instance.source);
        let decision = source.map(|source| decision::decide(&orphan.facts, source, &reaper.policy, count));
        let waited = self.dropped(&token).is_some_and(|dropped| dropped.waited);
        if decision == Some(Decision::RequeueLast) && !waited {
            self.suspects.push(Suspect { token, count });
        } else {
            self.counts.insert(token.clone(), count);
            self.tokens.push(token);
        }
    }

    /// Goes on, unless there is nothing left to do.
    fn proceed(&mut self) -> Result<Progress> {
        if self.returning.is_some() {
            return Ok(Progress::More);
        }
        if self.instance.is_some() && self.piece.is_none() && self.tokens.is_empty() {
            self.release_suspects()?;
        }
        if self.piece.is_none() && self.tokens.is_empty() {
            return Ok(self.done());
        }
        Ok(Progress::More)
    }

    fn done(&mut self) -> Progress {
        Progress::Done(std::mem::take(&mut self.report))
    }
}

impl Report {
    pub(crate) fn total(&mut self, end: End) -> &mut u64 {
        match end {
            End::Requeued => &mut self.requeued,
            End::Dead => &mut self.dead,
            End::Discarded => &mut self.discarded,
            End::Superseded => &mut self.superseded,
        }
    }

    /// What is to be said when the journal, the totals or unique locks could not be written.
    #[must_use]
    pub fn unnoted(&self, keys: &Keys) -> Option<String> {
        self.unnoted.then(|| {
            format!(
                "Recovered jobs are not noted in {} and {}: one of these keys holds something else. Remove it (DEL)",
                keys.journal(),
                keys.stats()
            )
        })
    }

    /// What is to be said when unique locks could not be settled.
    #[must_use]
    pub fn unsettled_locks(&self, from: &[u8]) -> Option<String> {
        (self.unsettled_locks > 0).then(|| {
            format!(
                "Jobs of the dead instance {} are recovered, but unique locks of theirs are as they were, since \
                 something else lies under the keys of these locks: {}. The journal names the jobs (lock: unsettled)",
                String::from_utf8_lossy(from),
                self.unsettled_locks
            )
        })
    }

    /// The same of jobs that a living instance has dropped itself.
    #[must_use]
    pub fn own_leftovers(&self, keys: &Keys, from: &str) -> Option<String> {
        let left = self.stuck + self.unreadable;
        (left > 0).then(|| {
            format!(
                "Jobs whose threads have gone can't be put back, since their queues' keys hold something that is no list: {left}. \
                 They stay recorded in {}, and are tried again every minute",
                keys.inflight(from)
            )
        })
    }

    /// What stays behind and needs a person, if anything does.
    #[must_use]
    pub fn leftovers(&self, keys: &Keys, from: &[u8]) -> Option<String> {
        if let Some(instance) = legacy::instance(from) {
            return legacy::leftovers(keys, instance, self);
        }
        let from = &String::from_utf8_lossy(from);
        if self.overwritten {
            return Some(format!(
                "The key {} of the dead instance {from} holds something that is no hash: its jobs can't be recovered. \
                 It is looked at again until that key is gone",
                keys.inflight(from)
            ));
        }
        if self.stuck_due > 0 {
            return Some(format!(
                "{} holds due jobs of the dead instance {from} that cannot go back, since the keys of their sets (retry, \
                 schedule) hold something else: {}. It is tried again until that hash is empty",
                keys.due(from),
                self.stuck_due
            ));
        }
        if self.stuck == 0 && self.unreadable == 0 {
            return None;
        }
        Some(format!(
            "{} holds what cannot be recovered of the dead instance {from}: jobs whose queue's key holds no list: {}, \
             fields that are no jobs: {}. It is tried again until that hash is empty",
            keys.inflight(from),
            self.stuck,
            self.unreadable
        ))
    }
}
