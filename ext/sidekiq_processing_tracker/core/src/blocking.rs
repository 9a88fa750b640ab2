//! The blocking threads: each waits in Redis for a job of one queue, while all queues are empty (docs/protocol.md, "Blocking
//! claims").

use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::scripts::{self, Block, Fenced};
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
        let outcome = match order {
            Order::Connect => thread.connect(),
            Order::Claim { queue, index } => thread.claim(&identity, queue, index),
        };
        match outcome {
            Ok(()) => thread.attempts.succeeded(),
            Err(error) => thread.fail(&error),
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
            if let Some(order) = state.registry.slots.order(self.slot) {
                return Some((order, state.identity.clone()));
            }
            state = match self.shared.slot_wakes.get(self.slot) {
                Some(wake) => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                None => return None,
            };
        }
    }

    /// Sees to it that there is a connection, and that others know it.
    fn connect(&mut self) -> Result<()> {
        self.link.connect()?;
        if self.link.generation() == self.connection {
            return Ok(());
        }
        let queue = self.shared.state().registry.slots.queue(self.slot).unwrap_or_default();
        let id = scripts::prepare_to_block(&mut self.link, &self.shared.keys, &queue)?;
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

    fn claim(&mut self, identity: &str, queue: Arc<[u8]>, index: u64) -> Result<()> {
        self.connect()?;
        let block = Block {
            queue,
            slot: self.slot,
            index,
            patience: PATIENCE,
        };
        let blocked = scripts::block(&mut self.link, &self.shared.keys, identity, &block)?;
        let mut state = self.shared.state();
        let is_lost = blocked == Fenced::Lost;
        let brought = match blocked {
            Fenced::Alive(blocked) if state.is(identity) => Some(blocked),
            // What it may have brought, others recover.
            Fenced::Alive(_) | Fenced::Lost => None,
        };
        let goes_on = state.registered && state.phase == Phase::Running && !is_lost;
        let calls = state.registry.brought(self.slot, brought, goes_on, Instant::now());
        if state.registry.is_urgent() || state.phase == Phase::Leaving {
            self.shared.nudge(&mut state);
        }
        drop(state);
        calls.ring();
        if is_lost {
            self.shared.lose(identity);
        }
        Ok(())
    }

    fn fail(&mut self, error: &Error) {
        self.link.discard();
        let mut state = self.shared.state();
        self.attempts.failed(state.pace);
        let rests_until = match error {
            Error::Refused(text) if server::is_of_rights(error) || text.contains("unknown command") => {
                Some(Instant::now() + LONG_REST)
            }
            Error::Refused(_) => Some(Instant::now() + REST),
            _ => self.attempts.at,
        };
        state.registry.slots.failed(self.slot, rests_until);
        // It may have claimed something all the same, or may yet.
        state.sweeps.ask();
        self.shared.nudge(&mut state);
        drop(state);
        if let Error::Refused(text) = error {
            self.shared.warn_once(
                "blocking",
                format!("Redis does not wait for new jobs on our behalf, so they begin a little later: {text}"),
            );
        }
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
