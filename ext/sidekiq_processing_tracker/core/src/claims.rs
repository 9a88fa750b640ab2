//! The claims thread: tells Redis what this process does with jobs, one turn at a time, and leaves last.

use crate::control::Attempts;
use crate::entry::Token;
use crate::error::Error;
use crate::failpoint;
use crate::link::Link;
use crate::scripts::{self, Fenced, Turn, Turned};
use crate::settings::Pace;
use crate::shared::{Phase, Sent, Shared, Side, State};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long an ack may wait for company.
const LINGER: Duration = Duration::from_millis(1);
/// How often what Redis has is compared with what this process holds.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

pub(crate) fn run(shared: Arc<Shared>) {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    let mut claims = Claims {
        link: Link::new(shared.settings.redis.clone(), timeout),
        shared,
        attempts: Attempts::default(),
        swept: (0, Instant::now()),
        swept_last: false,
        last_call: None,
    };
    while claims.step() {}
}

struct Claims {
    shared: Arc<Shared>,
    link: Link,
    attempts: Attempts,
    /// The connection on which the last sweep was made, and when.
    swept: (u64, Instant),
    /// A sweep has been made for `leave`: what nobody holds should go back now, not when a lease has run out.
    swept_last: bool,
    /// What `leave` is to do: drawn up once, since it takes everything out of the registry.
    last_call: Option<(Vec<Token>, Vec<Token>)>,
}

enum Task {
    Stop,
    Turn(String, Arc<Turn>),
    Sweep(String),
    Ride(String, Pace),
    Leave(String),
}

impl Claims {
    fn step(&mut self) -> bool {
        let outcome = match self.next_task() {
            Task::Stop => return false,
            Task::Turn(identity, turn) => self.turn(&identity, &turn),
            Task::Sweep(identity) => self.sweep(&identity),
            Task::Ride(identity, pace) => match self.ride(&identity, pace) {
                // Redis refuses a beat, on whichever link. That tells nothing of turns, which must get their chance.
                Err(Error::Refused(_)) => return true,
                outcome => outcome,
            },
            Task::Leave(identity) => self.leave(&identity),
        };
        match outcome {
            Ok(()) => {
                self.attempts.succeeded();
                self.shared.link_works(Side::Claims);
            }
            Err(error) => {
                let (pace, identity) = {
                    let state = self.shared.state();
                    (state.pace, state.identity.clone())
                };
                if self.attempts.failed(pace) {
                    let error = scripts::explain(&mut self.link, &self.shared.keys, &identity, &error);
                    self.shared.link_failed(Side::Claims, &error);
                }
                self.link.discard();
            }
        }
        true
    }

    fn next_task(&mut self) -> Task {
        let shared = self.shared.clone();
        let mut state = shared.state();
        loop {
            let now = Instant::now();
            let wait = if matches!(state.phase, Phase::Left | Phase::Stopped) {
                return Task::Stop;
            } else if !state.registered {
                // The control thread registers, or ends it all.
                SWEEP_EVERY
            } else if !self.attempts.is_due(now) {
                self.attempts.at.map_or(LINGER, |at| at.saturating_duration_since(now))
            } else {
                match self.due(&mut state, now) {
                    Ok(task) => return task,
                    Err(wait) => wait,
                }
            };
            state.claims_idle = true;
            state = shared
                .claims_wake
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.claims_idle = false;
        }
    }

    /// What is to be done now, or how long to wait for company.
    fn due(&mut self, state: &mut State, now: Instant) -> std::result::Result<Task, Duration> {
        let identity = state.identity.clone();
        if std::mem::take(&mut state.ride) {
            return Ok(Task::Ride(identity, state.pace));
        }
        if self.last_call.is_some() {
            return Ok(Task::Leave(identity));
        }
        if state.registry.is_outstanding() {
            return Ok(Task::Turn(identity, state.registry.turn()));
        }
        let mut wait = (self.swept.1 + SWEEP_EVERY).saturating_duration_since(now);
        if wait.is_zero() || self.link.generation() != self.swept.0 || state.is_claims_down() {
            return Ok(Task::Sweep(identity));
        }
        let leaving = state.phase == Phase::Leaving;
        if !state.registry.is_idle() {
            let company = match state.registry.oldest_ack() {
                Some(oldest) if !leaving && !state.registry.is_urgent() => {
                    (oldest + LINGER).saturating_duration_since(now)
                }
                _ => Duration::ZERO,
            };
            if company.is_zero() {
                return Ok(Task::Turn(identity, state.registry.turn()));
            }
            wait = wait.min(company);
        } else if leaving && self.swept_last {
            // Drawn up under the lock that says there is nothing else: what comes later comes too late for the process.
            self.last_call = Some(state.registry.last_call());
            return Ok(Task::Leave(identity));
        } else if leaving {
            return Ok(Task::Sweep(identity));
        }
        Err(wait)
    }

    fn turn(&mut self, identity: &str, turn: &Turn) -> crate::Result<()> {
        failpoint::reach("before_turn");
        let turned = scripts::turn(&mut self.link, &self.shared.keys, identity, turn)?;
        failpoint::reach("after_turn");
        match turned {
            Turned::Done(done) => {
                let remarks = {
                    let mut state = self.shared.state();
                    if !state.is(identity) {
                        return Ok(());
                    }
                    state.registry.answered(done, Instant::now())
                };
                for queue in remarks.stuck.iter().chain(&remarks.refused) {
                    let queue = String::from_utf8_lossy(queue);
                    self.shared.warn_once(
                        &format!("queue {queue}"),
                        format!("The key queue:{queue} holds something that is no list. Jobs can't be taken from it nor put back; those in flight stay recorded"),
                    );
                }
            }
            Turned::Lost | Turned::Stale => self.shared.lose(identity),
        }
        Ok(())
    }

    fn sweep(&mut self, identity: &str) -> crate::Result<()> {
        let fields = scripts::fields(&mut self.link, &self.shared.keys, identity)?;
        self.swept = (self.link.generation(), Instant::now());
        match fields {
            Fenced::Lost => self.shared.lose(identity),
            Fenced::Alive(fields) => {
                let mut state = self.shared.state();
                if state.is(identity) {
                    self.swept_last = state.phase == Phase::Leaving;
                    state.registry.sweep(fields);
                }
            }
        }
        Ok(())
    }

    /// The control thread cannot connect: its beat goes along here.
    fn ride(&mut self, identity: &str, pace: Pace) -> crate::Result<()> {
        let sent = Sent::now();
        let beat = scripts::beat(&mut self.link, &self.shared.keys, identity, pace, false)?;
        self.shared.beaten(Side::Claims, identity, sent, &beat);
        Ok(())
    }

    fn leave(&mut self, identity: &str) -> crate::Result<()> {
        let shared = self.shared.clone();
        let Some((acks, held)) = &self.last_call else {
            return Ok(());
        };
        failpoint::reach("before_leave");
        let left = scripts::leave(&mut self.link, &shared.keys, identity, acks, held)?;
        failpoint::reach("after_leave");
        if let Fenced::Alive(jobs @ 1..) = left {
            shared.events.push(crate::events::Event::Warning(format!(
                "left in {} at exit, for another instance to recover: {jobs}",
                shared.keys.inflight(identity)
            )));
        }
        let mut state = shared.state();
        state.registered = false;
        state.left_cleanly = true;
        state.phase = Phase::Left;
        shared.wake_all(&mut state);
        Ok(())
    }
}
