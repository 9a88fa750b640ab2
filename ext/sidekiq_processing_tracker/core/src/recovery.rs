//! Recovery: the jobs of a dead instance go back, in pieces, each one script.

use crate::entry::Token;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::failpoint;
use crate::identity;
use crate::keys::Keys;
use crate::link::Link;
use crate::parker::{Parker, Woken};
use crate::payload;
use crate::scripts::{self, Orphan, Outcome, Reaped};
use crate::settings::{Pace, Settings};
use std::collections::HashMap;
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
}

/// The recovery of one instance.
#[derive(Debug)]
pub struct Recovery {
    from: String,
    stage: Stage,
    report: Report,
}

#[derive(Debug)]
enum Stage {
    Reap,
    /// The tokens that are left; the last comes first.
    Settle(Vec<Token>),
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
    /// Whether the instance was found alive.
    pub alive: bool,
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
    pub fn new(from: String) -> Self {
        Self {
            from,
            stage: Stage::Reap,
            report: Report::default(),
        }
    }

    /// Whose recovery it is.
    #[must_use]
    pub fn from(&self) -> &str {
        &self.from
    }

    /// Does the next piece: one or two calls. A piece that failed may be done again; what it had settled is then gone.
    ///
    /// # Errors
    /// As for every script.
    pub fn step(&mut self, link: &mut Link, reaper: &Reaper, mut tell: impl FnMut(Event)) -> Result<Progress> {
        match &mut self.stage {
            Stage::Reap => {
                failpoint::reach("before_reap");
                let reaped = scripts::reap(link, &reaper.keys, reaper.pace, &self.from, reaper.hold)?;
                failpoint::reach("after_reap");
                let fields = match reaped {
                    Reaped::Gone => return Ok(self.done()),
                    Reaped::Runs => {
                        self.report.alive = true;
                        return Ok(self.done());
                    }
                    Reaped::Overwritten => {
                        self.report.overwritten = true;
                        return Ok(self.done());
                    }
                    Reaped::Fenced(fields) => fields,
                };
                let count = fields.len();
                let mut tokens: Vec<Token> = fields.into_iter().filter_map(Token::read).collect();
                self.report.unreadable = (count - tokens.len()) as u64;
                // Settled from the newest to the oldest, since each goes to the end that Sidekiq takes from.
                tokens.sort_by_key(Token::order);
                self.stage = Stage::Settle(tokens);
            }
            Stage::Settle(tokens) => {
                let piece: Vec<Token> = tokens.iter().rev().take(PIECE).cloned().collect();
                let payloads = scripts::peek(link, &reaper.keys, &self.from, &piece)?;
                failpoint::reach("after_peek");
                if payloads.is_empty() || payloads.len() > piece.len() {
                    return Err(Error::protocol("peek", "another number of payloads than of tokens"));
                }
                let orphans: Vec<Orphan> = piece
                    .into_iter()
                    .zip(payloads)
                    .map(|(token, payload)| Orphan {
                        token,
                        facts: payload.as_deref().map(payload::read).unwrap_or_default(),
                    })
                    .collect();
                let recovery = scripts::Recovery {
                    from: &self.from,
                    by: &reaper.by,
                    pace: reaper.pace,
                    hold: reaper.hold,
                };
                let Some(outcomes) = scripts::recover(link, &reaper.keys, &recovery, &orphans)? else {
                    self.report.alive = true;
                    return Ok(self.done());
                };
                failpoint::reach("after_recover");
                tokens.truncate(tokens.len() - orphans.len());
                for (orphan, outcome) in orphans.into_iter().zip(outcomes) {
                    match outcome {
                        Outcome::Requeued => {
                            self.report.requeued += 1;
                            tell(Event::Recovered {
                                queue: orphan.token.queue().to_vec(),
                                jid: orphan.facts.jid,
                                class: orphan.facts.class,
                                from: self.from.clone(),
                                by: reaper.by.clone(),
                            });
                        }
                        Outcome::Stuck => self.report.stuck += 1,
                        Outcome::Gone => {}
                    }
                }
            }
        }
        match &self.stage {
            Stage::Settle(tokens) if tokens.is_empty() => Ok(self.done()),
            _ => Ok(Progress::More),
        }
    }

    fn done(&mut self) -> Progress {
        Progress::Done(std::mem::take(&mut self.report))
    }
}

impl Report {
    /// What stays behind and needs a person, if anything does.
    #[must_use]
    pub fn leftovers(&self, keys: &Keys, from: &str) -> Option<String> {
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

/// Recovers what is due, from any process, until every instance listed at the call was recovered or has renewed its
/// lease; keeps the lease clock going meanwhile. `cancel` ends it early.
///
/// # Errors
/// `Error::Connection` when Redis fails twice in a row.
pub fn reenqueue_orphans(settings: &Settings, cancel: &Parker) -> Result<Report> {
    let reaper = Reaper {
        keys: Keys::new(&settings.namespace),
        by: identity::draw(&settings.instance_id)?,
        pace: settings.pace(),
        hold: settings.hold,
    };
    let mut link = Link::new(settings.redis.clone(), settings.redis.read_timeout);
    let mut waited_for: Option<HashMap<String, f64>> = None;
    let mut total = Report::default();
    let mut failed = false;
    while !cancel.is_done() {
        match pass(&mut link, &reaper, &mut waited_for, &mut total) {
            Ok(true) => break,
            Ok(false) => failed = false,
            Err(error) if failed => return Err(error),
            Err(_) => failed = true,
        }
        if cancel.wait(Some(Instant::now() + reaper.pace.pause())) == Woken::Done {
            break;
        }
    }
    Ok(total)
}

/// Recovers all that is due, then says whether nothing is left to wait for.
fn pass(
    link: &mut Link,
    reaper: &Reaper,
    waited_for: &mut Option<HashMap<String, f64>>,
    total: &mut Report,
) -> Result<bool> {
    if waited_for.is_none() {
        *waited_for = Some(scripts::instances(link, &reaper.keys)?.into_iter().collect());
    }
    let Some(waited_for) = waited_for else { return Ok(true) };
    while let Some(due) = scripts::due(link, &reaper.keys, reaper.pace)? {
        let mut recovery = Recovery::new(due);
        loop {
            if let Progress::Done(report) = recovery.step(link, reaper, |_| {})? {
                total.requeued += report.requeued;
                if report.overwritten {
                    waited_for.remove(recovery.from());
                }
                if report.stuck + report.unreadable > 0 {
                    total.stuck += report.stuck;
                    total.unreadable += report.unreadable;
                    waited_for.remove(recovery.from());
                }
                break;
            }
        }
    }
    let now: HashMap<String, f64> = scripts::instances(link, &reaper.keys)?.into_iter().collect();
    for (identity, before) in waited_for.clone() {
        let settled = match now.get(&identity) {
            None => true,
            // A reaper's hold moves the lease end too.
            Some(lease_end) => *lease_end > before && scripts::is_alive(link, &reaper.keys, &identity)?,
        };
        if settled {
            waited_for.remove(&identity);
        }
    }
    Ok(waited_for.is_empty())
}
