//! Recovery on demand, from any process: a console has no engine.

use crate::courier::{Courier, Delivery, News};
use crate::decision::End;
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::identity;
use crate::legacy::{self, Search};
use crate::link::Link;
use crate::parker::{Parker, Woken};
use crate::recoveries::{News as Told, Recoveries, Round};
use crate::recovery::{Reaper, Report};
use crate::scripts;
use crate::settings::Settings;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How often it looks whether a reader that is far behind has come closer.
const READER: Duration = Duration::from_millis(5);

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Jobs that are back in their queues.
    pub requeued: u64,
    /// Jobs that are in the dead set.
    pub dead: u64,
    /// Jobs that would be in the dead set if they did not forbid it.
    pub discarded: u64,
    /// Jobs whose unique locks others hold.
    pub superseded: u64,
    /// Jobs and fields that stay where they are, since something is wrong with their queues' keys or with them.
    pub stuck: u64,
}

impl Recovered {
    fn count(&mut self, event: &Event) {
        if let Event::Settled(settled) = event {
            *match settled.end {
                End::Requeued => &mut self.requeued,
                End::Dead => &mut self.dead,
                End::Discarded => &mut self.discarded,
                End::Superseded => &mut self.superseded,
            } += 1;
        }
    }
}

struct Orphans<'a> {
    link: Link,
    reaper: Reaper,
    cancel: &'a Parker,
    events: &'a Events,
    /// The search for instances of the 1.0 gem, until it is over.
    search: Option<Search>,
    /// The instances that were listed at the call, and their lease ends then. `None` before they were asked for.
    listed: Option<HashMap<Vec<u8>, f64>>,
    /// Delivers what was recovered, where Sidekiq's queues are elsewhere.
    courier: Option<Courier>,
    recoveries: Recoveries,
    /// What stays, by instance: an instance is looked at again whenever its hold has run out.
    stuck: HashMap<Vec<u8>, u64>,
    unnoted: bool,
    /// The call before has failed.
    failed: bool,
    recovered: Recovered,
}

/// Recovers what is due, until every instance listed at the call was recovered or has renewed its lease; keeps the lease
/// clock going meanwhile. So it waits for leases that run, a `ttl` at most, and for suspects that leave one at a time, five
/// minutes at most (docs/protocol.md, "Orphans settled"). `cancel` ends it early.
///
/// It tells `events` as it goes: of each job that is settled, and of each instance that needs a person; also when it ends
/// early or fails. They are to be read meanwhile: it waits for a reader that is far behind. In the end it closes them.
///
/// # Errors
/// `Error::Connection`, `Error::Refused` when Redis fails twice in a row.
pub fn reenqueue_orphans(settings: &Settings, cancel: &Parker, events: &Events) -> Result<Recovered> {
    let _closing = Closing(events);
    let reaper = Reaper {
        keys: settings.keys(),
        by: identity::draw(&settings.instance_id)?,
        pace: settings.pace(),
        hold: settings.hold,
        policy: settings.policy.clone(),
    };
    let pause = reaper.pace.pause();
    let mut orphans = Orphans {
        link: Link::new(settings.redis.clone(), settings.redis.read_timeout),
        reaper,
        cancel,
        events,
        search: Some(Search::default()),
        listed: None,
        courier: settings
            .queues
            .clone()
            .map(|queues| Courier::new(queues, settings.redis.read_timeout)),
        recoveries: Recoveries::default(),
        stuck: HashMap::new(),
        unnoted: false,
        failed: false,
        recovered: Recovered::default(),
    };
    while !cancel.is_done() {
        match orphans.pass() {
            Ok(true) => break,
            Ok(false) => orphans.failed = false,
            Err(error) if orphans.failed => return Err(error),
            Err(_) => orphans.failed = true,
        }
        if cancel.wait(Some(Instant::now() + pause)) == Woken::Done {
            break;
        }
    }
    orphans.recovered.stuck = orphans.stuck.values().sum();
    Ok(orphans.recovered)
}

/// Closes events, however their writer ends: somebody waits for the last one.
struct Closing<'a>(&'a Events);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Orphans<'_> {
    /// Recovers all that is due, then says whether nothing is left to wait for.
    fn pass(&mut self) -> Result<bool> {
        if !self.search()? {
            return Ok(true);
        }
        if self.listed.is_none() {
            self.listed = Some(
                scripts::instances(&mut self.link, &self.reaper.keys)?
                    .into_iter()
                    .collect(),
            );
        }
        while !self.cancel.is_done() {
            match self.round()? {
                Round::Worked => {}
                Round::InVain => return Ok(false),
                Round::Idle => return Ok(self.deliver()? && self.are_settled()?),
            }
        }
        Ok(true)
    }

    /// Looks for instances of the 1.0 gem, all at once. Answers false when it was cancelled.
    fn search(&mut self) -> Result<bool> {
        while let Some(search) = &mut self.search {
            if self.cancel.is_done() {
                return Ok(false);
            }
            let events = self.events;
            let found = search.step(&mut self.link, &self.reaper.keys, self.reaper.pace, |_, warning| {
                events.push(Event::Warning(warning));
            });
            match found {
                Ok(None) => {}
                Ok(Some(_)) => self.search = None,
                // What has no right to search can recover all the same.
                Err(error @ Error::Refused(_)) if self.failed => {
                    events.push(Event::Warning(legacy::cannot_search(&error)));
                    self.search = None;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Answers whether nothing is left to deliver, but for what cannot be.
    fn deliver(&mut self) -> Result<bool> {
        let (keys, events, recovered) = (&self.reaper.keys, self.events, &mut self.recovered);
        while let Some(courier) = &mut self.courier {
            let tell = |news| match news {
                News::Warning { text, .. } => events.push(Event::Warning(text)),
                News::Event(event) => {
                    recovered.count(&event);
                    events.push(event);
                }
            };
            match courier.step(&mut self.link, keys, &self.reaper.by, &self.reaper.policy, tell) {
                Ok(Delivery::Found | Delivery::More) if !self.cancel.is_done() => {}
                Ok(delivery) => return Ok(delivery == Delivery::Done),
                Err(error) => {
                    courier.discard();
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    fn round(&mut self) -> Result<Round> {
        let (events, cancel) = (self.events, self.cancel);
        let (recovered, failed, mut over) = (&mut self.recovered, &mut self.failed, Vec::new());
        let may_go_on = |others| {
            // What would not fit is not told at all. Nothing is lost meanwhile: if the hold runs out, another may go on.
            while others == 0 && events.is_crowded() && !cancel.is_done() {
                cancel.wait(Some(Instant::now() + READER));
            }
            !cancel.is_done() && !events.is_crowded()
        };
        let tell = |told| match told {
            Told::Events(told) => {
                told.iter().for_each(|event| recovered.count(event));
                events.push_all(told);
            }
            // A round over many instances may meet more than one connection that breaks.
            Told::Answered => *failed = false,
            Told::Over(from, report) => over.push((from, report)),
        };
        let round = self.recoveries.round(&mut self.link, &self.reaper, may_go_on, tell);
        for (from, report) in over {
            self.report(&from, &report);
        }
        round
    }

    /// Tells what a recovery has left behind, if anything.
    fn report(&mut self, from: &[u8], report: &Report) {
        if let Some(unsettled) = report.unsettled_locks(from) {
            self.events.push(Event::Warning(unsettled));
        }
        if let Some(unnoted) = report.unnoted(&self.reaper.keys).filter(|_| !self.unnoted) {
            self.unnoted = true;
            self.events.push(Event::Warning(unnoted));
        }
        if let Some(leftovers) = report.leftovers(&self.reaper.keys, from) {
            let left = report.stuck + report.unreadable;
            if self.stuck.insert(from.to_vec(), left).is_none() {
                self.events.push(Event::Warning(leftovers));
            }
            // It is not going to be settled while somebody waits here.
            if let Some(listed) = &mut self.listed {
                listed.remove(from);
            }
        }
    }

    fn are_settled(&mut self) -> Result<bool> {
        let now: HashMap<Vec<u8>, f64> = scripts::instances(&mut self.link, &self.reaper.keys)?
            .into_iter()
            .collect();
        let Some(listed) = &mut self.listed else {
            return Ok(true);
        };
        for (identity, before) in listed.clone() {
            let settled = match now.get(&identity) {
                None => true,
                // A reaper's hold moves the lease end too.
                Some(lease_end) => {
                    *lease_end > before && scripts::is_alive(&mut self.link, &self.reaper.keys, &identity)?
                }
            };
            if settled {
                listed.remove(&identity);
            }
        }
        Ok(listed.is_empty())
    }
}
