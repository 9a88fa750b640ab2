//! The blocking threads: each waits in Redis for a job of one queue, while all queues are empty (docs/protocol.md, "Blocking
//! claims").

use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::parker::{Errand, Parker};
use crate::registry::Calls;
use crate::scripts::{self, Block, Blocked, Fenced};
use crate::server;
use crate::shared::{Phase, Shared};
use crate::slots::{Client, Order};
use crate::wire::{Alarm, Bell, Wire};
use redis::Value;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long one claim waits in Redis. The next begins at once; only where a connection is dead without a sign does it matter.
const PATIENCE: Duration = Duration::from_secs(20);
/// A thread of Ruby's that has read of a job begins with it before its slot is woken to make the next claim: on a machine that is idle
/// that takes until then.
const HEAD_START: Duration = Duration::from_micros(400);
/// How long a slot waits itself for its claim's answer before it tries again to have a thread of Ruby's do that: at first, and at most.
const SHORT_LOOK: Duration = Duration::from_millis(1);
const LONG_LOOK: Duration = Duration::from_millis(256);
/// How long a slot makes no claims after Redis has refused one.
const REST: Duration = Duration::from_secs(5);
/// The same where it has refused for want of a right: that leaves an entry in its log each time.
const LONG_REST: Duration = Duration::from_secs(600);

pub(crate) fn run(shared: &Arc<Shared>, slot: usize) {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    let mut thread = Thread {
        shared,
        slot,
        link: Link::bare(shared.settings.redis.clone(), timeout),
        connection: 0,
        attempts: Attempts::default(),
        signals: None,
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
    shared: &'a Arc<Shared>,
    slot: usize,
    link: Link,
    /// The connection that `slots` knows.
    connection: u64,
    attempts: Attempts,
    /// Wakes a thread that waits for replies in our stead, and wakes us when it is back.
    signals: Option<(Arc<Bell>, Arc<Alarm>)>,
}

/// A thread of Ruby's that has nothing to do waits for the replies to a claim: then it need not be woken by another.
struct Watch {
    shared: Arc<Shared>,
    slot: usize,
    identity: String,
    bell: Arc<Bell>,
    alarm: Arc<Alarm>,
    /// Until it is over.
    wire: Option<Wire>,
    /// The reply to the first of the two commands, when it is there.
    waited: Option<Value>,
    /// When both should be there.
    deadline: Instant,
}

/// A connection that was lent, and what has come over it.
pub(crate) struct Returned {
    wire: Wire,
    news: News,
}

enum News {
    /// Nothing, or the first reply of two.
    Part(Option<Value>),
    Replies([Value; 2]),
    /// A job, and it is taken care of.
    Job,
    Failure(Error),
}

impl Errand for Watch {
    fn wait(&self, deadline: Instant) -> bool {
        let Some(wire) = &self.wire else { return true };
        let waited = self.bell.wait_beside(wire.as_fd(), deadline.min(self.deadline));
        waited.unwrap_or(true) || self.deadline <= Instant::now()
    }

    fn bell(&self) -> Arc<Bell> {
        self.bell.clone()
    }

    fn go_on(mut self: Box<Self>, parker: &Parker) -> Option<Box<dyn Errand>> {
        let replies = loop {
            match self.wire.as_mut()?.try_receive() {
                Ok(None) if Instant::now() < self.deadline => return Some(self),
                Ok(None) => return self.end(News::Failure(late())),
                Err(error) => return self.end(News::Failure(error.into())),
                Ok(Some(reply)) => match self.waited.take() {
                    None => self.waited = Some(reply),
                    Some(waited) => break [waited, reply],
                },
            }
        };
        if !scripts::brings(&replies) {
            return self.end(News::Replies(replies));
        }
        match scripts::judge(replies) {
            Ok(blocked) => {
                let calls = settle(&self.shared, self.slot, &self.identity, blocked, Some(parker));
                self.end(News::Job);
                calls.ring();
                None
            }
            Err(error) => self.end(News::Failure(error)),
        }
    }

    fn give_back(mut self: Box<Self>) {
        let waited = self.waited.take();
        self.end(News::Part(waited));
    }
}

impl Watch {
    fn end(&mut self, news: News) -> Option<Box<dyn Errand>> {
        let wire = self.wire.take()?;
        let after = match news {
            News::Job => HEAD_START,
            _ => Duration::ZERO,
        };
        if let Some(returned) = self.shared.state().returned.get_mut(self.slot) {
            *returned = Some(Returned { wire, news });
        }
        self.alarm.set(after);
        None
    }
}

/// The slot waits for it, whatever happens.
impl Drop for Watch {
    fn drop(&mut self) {
        self.end(News::Failure(Error::Internal(
            "nobody waits for the answer to a claim".into(),
        )));
    }
}

fn late() -> Error {
    Error::Connection("a claim had no answer in time".into())
}

/// Takes care of what a claim has brought. `reader`: the parker of the thread that has read it, which takes a job if it can.
fn settle(shared: &Shared, slot: usize, identity: &str, blocked: Fenced<Blocked>, reader: Option<&Parker>) -> Calls {
    let mut state = shared.state();
    let is_lost = blocked == Fenced::Lost;
    let brought = match blocked {
        Fenced::Alive(blocked) if state.is(identity) => Some(blocked),
        // What it may have brought, others recover.
        Fenced::Alive(_) | Fenced::Lost => None,
    };
    let goes_on = state.registered && state.phase == Phase::Running && !is_lost;
    let calls = state.registry.brought(slot, brought, goes_on, reader, Instant::now());
    // Also where the slot makes no claim again though its crew waits: then its queue is to be looked at.
    let is_left = !state.registry.slots.is_outstanding_at(slot) && state.registry.idle_crews().next().is_some();
    let is_urgent = state.registry.is_urgent() || state.registry.has_unwanted_claims();
    if is_left || is_urgent || state.phase == Phase::Leaving {
        shared.nudge(&mut state);
    }
    drop(state);
    if is_lost {
        shared.lose(identity);
    }
    calls
}

impl Thread<'_> {
    /// Waits until there is something to do. `None`: the thread is to end.
    fn next_order(&mut self) -> Option<(Order, String)> {
        let mut state = self.shared.state();
        loop {
            if matches!(state.phase, Phase::Left | Phase::Stopped) {
                return None;
            }
            let claimed = state.registry.slots.is_outstanding_at(self.slot);
            if let Some(order) = state.registry.slot_order(self.slot) {
                return Some((order, state.identity.clone()));
            }
            if claimed {
                // It was taken back before it was sent: its thread is free for a turn.
                self.shared.nudge(&mut state);
            }
            state = match self.shared.slot_wakes.get(self.slot) {
                Some(wake) => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                None => return None,
            };
        }
    }

    /// Sees to it that there is a connection, and that others know it.
    fn connect(&mut self, identity: &str) -> Result<()> {
        if self.signals.is_none() {
            self.signals = Some((Arc::new(Bell::new()?), Arc::new(Alarm::new()?)));
        }
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
        let claim = scripts::begin_to_block(&mut self.link, &self.shared.keys, identity, &block)?;
        let Some(replies) = self.wait_for_replies(identity)? else {
            self.attempts.succeeded();
            return Ok(());
        };
        let blocked = scripts::end_block(&mut self.link, &claim, replies)?;
        self.attempts.succeeded();
        if let Fenced::Alive(Blocked::Refused(error)) = blocked {
            self.rest(&error);
            return Ok(());
        }
        settle(self.shared, self.slot, identity, blocked, None).ring();
        Ok(())
    }

    /// `None`: they have been read, and taken care of.
    fn wait_for_replies(&mut self, identity: &str) -> Result<Option<[Value; 2]>> {
        let (Some((bell, alarm)), Some(mut wire)) = (self.signals.clone(), self.link.lend()) else {
            return Ok(Some([self.link.receive()?, self.link.receive()?]));
        };
        let deadline = wire.deadline();
        let mut waited = None;
        let mut pause = SHORT_LOOK;
        loop {
            let watch = Watch {
                shared: self.shared.clone(),
                slot: self.slot,
                identity: identity.to_owned(),
                bell: bell.clone(),
                alarm: alarm.clone(),
                wire: Some(wire),
                waited,
                deadline,
            };
            let (was_lent, news);
            (was_lent, wire, news) = self.lend(watch, &alarm);
            waited = match news {
                News::Part(waited) => waited,
                News::Replies(replies) => {
                    self.link.take_back(wire);
                    return Ok(Some(replies));
                }
                News::Job => {
                    self.link.take_back(wire);
                    return Ok(None);
                }
                News::Failure(error) => return Err(error),
            };
            if matches!(self.shared.state().phase, Phase::Left | Phase::Stopped) {
                return Err(Error::Connection("the engine has ended".into()));
            }
            if was_lent {
                // Another may have the time.
                pause = SHORT_LOOK;
                continue;
            }
            let until = deadline.min(Instant::now() + pause);
            pause = LONG_LOOK.min(pause * 2);
            while let Some(reply) = wire.receive_until(until)? {
                if let Some(waited) = waited {
                    self.link.take_back(wire);
                    return Ok(Some([waited, reply]));
                }
                waited = Some(reply);
            }
            if deadline <= Instant::now() {
                return Err(late());
            }
        }
    }

    /// Has a thread that waits for a job of this crew wait for the replies, if there is one. Returns when that is over, and whether there
    /// was.
    fn lend(&self, watch: Watch, alarm: &Alarm) -> (bool, Wire, News) {
        let refused = self.shared.state().registry.lend(self.slot, Box::new(watch));
        let was_lent = refused.is_none();
        if let Some(watch) = refused {
            watch.give_back();
        }
        loop {
            alarm.wait();
            let returned = self.shared.state().returned.get_mut(self.slot).and_then(Option::take);
            if let Some(Returned { wire, news }) = returned {
                return (was_lent, wire, news);
            }
        }
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
        match error {
            Error::Refused(_) => self.rest(error),
            // The system has no sockets left, or the like.
            Error::Internal(text) => self.shared.warn_once("slots", text.clone()),
            _ => {}
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
