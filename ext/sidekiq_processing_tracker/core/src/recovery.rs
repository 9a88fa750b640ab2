//! Recovery: the jobs of a dead instance go back, in pieces, each one script.

use crate::entry::Token;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::failpoint;
use crate::identity;
use crate::keys::Keys;
use crate::legacy;
use crate::link::Link;
use crate::payload;
use crate::scripts::{self, Orphan, Outcome, Reaped, Settlement};
use crate::settings::Pace;
use std::time::Duration;

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
}

/// The recovery of one instance.
#[derive(Debug)]
pub struct Recovery {
    /// The identity as it stands in Redis.
    from: Vec<u8>,
    /// The tokens that are left; the last comes first. `None` before the instance is reaped.
    tokens: Option<Vec<Token>>,
    /// What is being settled, and the name of that call. It stays until the call was answered.
    piece: Option<(String, Vec<Orphan>)>,
    report: Report,
    /// The recovery of an instance of the 1.0 gem, which goes another way.
    legacy: Option<legacy::Recovery>,
}

/// What a recovery has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Jobs that are back in their queues.
    pub requeued: u64,
    /// Jobs that stay in flight, since something else lies under their queues' keys.
    pub stuck: u64,
    /// Fields that are no tokens.
    pub unreadable: u64,
    /// Whether something else lies under the key of the instance's in-flight hash.
    pub overwritten: bool,
    /// Whether the journal or the totals could not be written.
    pub unnoted: bool,
    /// Whether there was nothing to recover: somebody else has done it, or the instance lives.
    pub idle: bool,
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
            tokens: None,
            piece: None,
            report: Report::default(),
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
        if let Some(legacy) = &mut self.legacy {
            return legacy.step(link, reaper, tell);
        }
        match (&self.tokens, &self.piece) {
            (None, _) => self.reap(link, reaper),
            (Some(_), None) => self.peek(link, reaper),
            (Some(_), Some(_)) => self.settle(link, reaper, tell),
        }
    }

    fn reap(&mut self, link: &mut Link, reaper: &Reaper) -> Result<Progress> {
        failpoint::reach("before_reap");
        let reaped = scripts::reap(link, &reaper.keys, reaper.pace, &self.from, &reaper.by, reaper.hold)?;
        failpoint::reach("after_reap");
        let fields = match reaped {
            Reaped::Fenced(fields) => fields,
            Reaped::Gone | Reaped::Runs => {
                self.report.idle = true;
                return Ok(self.done());
            }
            Reaped::Overwritten => {
                self.report.overwritten = true;
                return Ok(self.done());
            }
        };
        let count = fields.len();
        let mut tokens: Vec<Token> = fields.into_iter().filter_map(Token::read).collect();
        self.report.unreadable = (count - tokens.len()) as u64;
        // Settled from the newest to the oldest, since each goes to the end that Sidekiq takes from.
        tokens.sort_by_key(Token::order);
        Ok(self.continue_with(tokens))
    }

    fn peek(&mut self, link: &mut Link, reaper: &Reaper) -> Result<Progress> {
        let tokens: Vec<Token> = self.tokens.iter().flatten().rev().take(PIECE).cloned().collect();
        let payloads = scripts::peek(link, &reaper.keys, &self.from, &tokens)?;
        failpoint::reach("after_peek");
        if payloads.is_empty() || payloads.len() > tokens.len() {
            return Err(Error::protocol("peek", "another number of payloads than of tokens"));
        }
        let orphans = tokens.into_iter().zip(payloads).map(|(token, payload)| Orphan {
            token,
            facts: payload.as_deref().map(payload::read).unwrap_or_default(),
        });
        self.piece = Some((identity::nonce()?, orphans.collect()));
        Ok(Progress::More)
    }

    fn settle(&mut self, link: &mut Link, reaper: &Reaper, mut tell: impl FnMut(Event)) -> Result<Progress> {
        let (Some((piece, orphans)), Some(tokens)) = (&self.piece, &self.tokens) else {
            return Ok(Progress::More);
        };
        let settlement = Settlement {
            from: &self.from,
            by: &reaper.by,
            pace: reaper.pace,
            hold: reaper.hold,
            piece,
        };
        let Some(settled) = scripts::recover(link, &reaper.keys, &settlement, orphans)? else {
            self.report.idle = true;
            return Ok(self.done());
        };
        failpoint::reach("after_recover");
        self.report.unnoted |= !settled.noted;
        for (orphan, outcome) in orphans.iter().zip(settled.outcomes) {
            match outcome {
                Outcome::Requeued | Outcome::RequeuedBefore => {
                    self.report.requeued += 1;
                    tell(Event::Recovered {
                        queue: orphan.token.queue().to_vec(),
                        jid: orphan.facts.jid.clone(),
                        class: orphan.facts.class.clone(),
                        from: String::from_utf8_lossy(&self.from).into_owned(),
                        by: reaper.by.clone(),
                    });
                }
                Outcome::Stuck => self.report.stuck += 1,
                Outcome::Gone => {}
            }
        }
        let mut left = tokens.clone();
        left.truncate(tokens.len() - orphans.len());
        self.piece = None;
        Ok(self.continue_with(left))
    }

    fn continue_with(&mut self, tokens: Vec<Token>) -> Progress {
        if tokens.is_empty() {
            return self.done();
        }
        self.tokens = Some(tokens);
        Progress::More
    }

    fn done(&mut self) -> Progress {
        Progress::Done(std::mem::take(&mut self.report))
    }
}

impl Report {
    /// What is to be said when the journal or the totals could not be written.
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
