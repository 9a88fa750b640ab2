//! The blocking threads: each waits in Redis for a job of one queue, while all queues are empty (docs/protocol.md, "Blocking
//! claims").

use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::scripts::{self, Block, Blocked, Fenced};
use crate::server;
use crate::shared::{Phase, Shared};
use crate::slots::{Client, Order};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long one claim waits in Redis. The next begins at once; only where a connection is dead without a sign does it matter.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a slot makes no claims after Redis has refused one.
const REST: Duration = Duration::from_secs(5);
/// The same where it has refused for want of a right: that leaves an entry in its log each time.
const LONG_REST: Duration = Duration::from_secs(600);

pub(crate) fn run(shared: &Shared, slot: usize) {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    let mut thread = Thread {
        shared,
        slot,
        link: Link::new(shared.settings.redis.clone(), timeout),
        connection: 0,
        attempts: Attempts::default(),
    };
    while let Some((order, identity)) = thread.next_order() {
        let claims = matches!(order, Order::Claim { .. });
        let outcome = match order {
            Order::Connect => thread.connect(&identity),
            Order::Claim { queue, index } => thread.claim(&identity, queue, index),
        };
        if let Err(error) = outcome {
            thread.fail(&error, claims);
        }
    }
}

struct Thread<'a> {
    shared: &'a Shared,
    slot: usize,
    link: Link,
    /// The connection that `slots` knows.
    connection: u64,
    attempts: Attempts,
}

impl Thread<'_> {
    /// Waits until there is something to do. `None`: the thread is to end.
    fn next_order(&mut self) -> Option<(Order, String)> {
        let mut state = self.shared.state();
        loop {
            if matches!(state.phase, Phase::Left | Phase::Stopped) {
                return None;
            }
            if let Some(order) = state.registry.slot_order(self.slot) {
                return Some((order, state.identity.clone()));
            }
            state = match self.shared.slot_wakes.get(self.slot) {
                Some(wake) => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                None => return None,
            };
        }
    }

    /// Sees to it that there is a connection, and that others know it.
    fn connect(&mut self, identity: &str) -> Result<()> {
        self.link.connect()?;
        if self.link.generation() == self.connection {
            return Ok(());
        }
        let (queue, index) = self.shared.state().registry.slots.past(self.slot).unwrap_or_default();
        let before = self.block(queue, index);
        let id = scripts::prepare_to_block(&mut self.link, &self.shared.keys, identity, &before)?;
        self.link.wait_longer(PATIENCE)?;
        let Some(visit) = self.link.visit() else {
            return Err(Error::Connection("the connection is gone".into()));
        };
        self.connection = self.link.generation();
        let mut state = self.shared.state();
        state.registry.slots.connected(self.slot, Client { id, visit });
        self.shared.nudge(&mut state);
        Ok(())
    }

    fn block(&self, queue: Arc<[u8]>, index: u64) -> Block {
        Block {
            queue,
            slot: self.slot,
            index,
            patience: PATIENCE,
        }
    }

    fn claim(&mut self, identity: &str, queue: Arc<[u8]>, index: u64) -> Result<()> {
        self.connect(identity)?;
        let block = self.block(queue, index);
        let blocked = scripts::block(&mut self.link, &self.shared.keys, identity, &block)?;
        self.attempts.succeeded();
        if let Fenced::Alive(Blocked::Refused(error)) = blocked {
            self.rest(&error);
            return Ok(());
        }
        let mut state = self.shared.state();
        let is_lost = blocked == Fenced::Lost;
        let brought = match blocked {
            Fenced::Alive(blocked) if state.is(identity) => Some(blocked),
            // What it may have brought, others recover.
            Fenced::Alive(_) | Fenced::Lost => None,
        };
        let goes_on = state.registered && state.phase == Phase::Running && !is_lost;
        let calls = state.registry.brought(self.slot, brought, goes_on, Instant::now());
        // Also where the slot makes no claim again though its crew waits: then its queue is to be looked at.
        let is_left =
            !state.registry.slots.is_outstanding_at(self.slot) && state.registry.idle_crews().next().is_some();
        let is_urgent = state.registry.is_urgent() || state.registry.has_unwanted_claims();
        if is_left || is_urgent || state.phase == Phase::Leaving {
            self.shared.nudge(&mut state);
        }
        drop(state);
        calls.ring();
        if is_lost {
            self.shared.lose(identity);
        }
        Ok(())
    }

    /// The connection cannot be used, or a claim had no answer.
    fn fail(&mut self, error: &Error, claims: bool) {
        self.link.discard();
        let mut state = self.shared.state();
        self.attempts.failed(state.pace);
        state.registry.slot_failed(self.slot, self.attempts.at);
        if claims {
            // It may have claimed something all the same, or may yet.
            state.sweeps.ask();
        }
        self.shared.nudge(&mut state);
        drop(state);
        if matches!(error, Error::Refused(_)) {
            self.rest(error);
        }
    }

    /// Redis does not do such things.
    fn rest(&self, error: &Error) {
        let text = error.to_string();
        let is_for_good = ["unknown", "unsupported", "not supported"]
            .iter()
            .any(|word| text.to_lowercase().contains(word));
        let pause = if is_for_good || server::is_of_rights(error) {
            LONG_REST
        } else {
            REST
        };
        let mut state = self.shared.state();
        state.registry.slot_rests(self.slot, Instant::now() + pause);
        self.shared.nudge(&mut state);
        drop(state);
        if text.contains("WRONGTYPE") {
            // A queue that is no list: turns tell of it.
            return;
        }
        self.shared.warn_once(
            "blocking",
            format!("Redis does not wait for new jobs on our behalf, so they begin a little later: {text}"),
        );
    }
}

/// Starts the threads of these slots.
///
/// # Errors
/// `Error::Internal` when the system has no thread to give.
pub(crate) fn start(shared: &Arc<Shared>, slots: std::ops::Range<usize>) -> Result<()> {
    for slot in slots {
        shared.start_thread(&format!("tracker-block-{}", slot + 1), move |shared| run(&shared, slot))?;
    }
    Ok(())
}
