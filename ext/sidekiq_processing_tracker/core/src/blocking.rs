//! The blocking threads: each waits in Redis for a job of one queue, while all queues are empty (docs/protocol.md, "Blocking
//! claims").

use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::parker::{Errand, Parker};
use crate::registry::Calls;
use crate::scripts::{self, Blocked, Fenced, Hand, Took};
use crate::server;
use crate::shared::{Phase, Shared, State};
use crate::slots::{Client, Order};
use crate::wire::{Alarm, Bell, Wire};
use redis::Value;
use std::os::fd::AsFd;
use std::sync::{Arc, MutexGuard, PoisonError};
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
        identity: String::new(),
        signals: None,
    };
    while let Some((order, identity)) = thread.next_order() {
        let outcome = match order {
            Order::Connect => thread.connect(identity),
            Order::Take(hand, index) => thread.take(&hand, Some(index)),
            Order::Claim(hand, index) => thread.claim(&hand, index),
        };
        if let Err(error) = outcome {
            thread.fail(&error);
        }
    }
}

struct Thread<'a> {
    shared: &'a Arc<Shared>,
    slot: usize,
    link: Link,
    /// The connection that `slots` knows.
    connection: u64,
    /// Whose hand it has.
    identity: String,
    attempts: Attempts,
    /// Wakes a thread that waits for replies in our stead, and wakes us when it is back.
    signals: Option<(Arc<Bell>, Arc<Alarm>)>,
}

/// A thread of Ruby's that has nothing to do waits for the reply to a claim: then it need not be woken by another.
struct Watch {
    shared: Arc<Shared>,
    slot: usize,
    identity: String,
    bell: Arc<Bell>,
    alarm: Arc<Alarm>,
    /// Until it is over.
    wire: Option<Wire>,
    /// When the reply should be there.
    deadline: Instant,
}

/// A connection that was lent, and what has come over it.
pub(crate) struct Returned {
    wire: Wire,
    news: News,
}

enum News {
    Nothing,
    Reply(Value),
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
        let reply = match self.wire.as_mut()?.try_receive() {
            Ok(None) if Instant::now() < self.deadline => return Some(self),
            Ok(None) => return self.end(News::Failure(late())),
            Err(error) => return self.end(News::Failure(error.into())),
            Ok(Some(reply)) => reply,
        };
        let payload = match reply {
            Value::BulkString(payload) => payload,
            reply => return self.end(News::Reply(reply)),
        };
        match bring(&self.shared, self.slot, &self.identity, payload, Some(parker)) {
            Ok(calls) => {
                self.end(News::Job);
                calls.ring();
                None
            }
            Err(payload) => self.end(News::Reply(Value::BulkString(payload))),
        }
    }

    fn give_back(mut self: Box<Self>) {
        self.end(News::Nothing);
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

/// A claim has brought a job: that is this process's now, unless the claim was made for a lease that it has lost. `reader`: the parker
/// of the thread that has read of it, which takes it if it can.
fn bring(
    shared: &Shared,
    slot: usize,
    identity: &str,
    payload: Vec<u8>,
    reader: Option<&Parker>,
) -> std::result::Result<Calls, Vec<u8>> {
    let state = shared.state();
    if state.is(identity) {
        Ok(answer(shared, state, slot, Some(payload), reader))
    } else {
        Err(payload)
    }
}

/// The claim of a slot is answered.
fn answer(
    shared: &Shared,
    mut state: MutexGuard<'_, State>,
    slot: usize,
    brought: Option<Vec<u8>>,
    reader: Option<&Parker>,
) -> Calls {
    let goes_on = state.registered && state.phase == Phase::Running;
    let calls = state
        .registry
        .claim_answered(slot, brought, goes_on, reader, Instant::now());
    // Also where the slot makes no claim again though its crew waits: then its queue is to be looked at.
    let is_left = !state.registry.slots.is_outstanding_at(slot) && state.registry.idle_crews().next().is_some();
    let is_urgent = state.registry.is_urgent() || state.registry.has_unwanted_claims();
    if is_left || is_urgent || state.phase == Phase::Leaving {
        shared.nudge(&mut state);
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
            let order = state.registry.slot_order(self.slot);
            if claimed && !matches!(order, Some(Order::Claim(..))) {
                // It was taken back before it was sent: its thread is free for a turn.
                self.shared.nudge(&mut state);
            }
            if let Some(order) = order {
                return Some((order, state.identity.clone()));
            }
            state = match self.shared.slot_wakes.get(self.slot) {
                Some(wake) => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                None => return None,
            };
        }
    }

    /// Sees to it that there is a connection with a hand of this identity's, and that others know it.
    fn connect(&mut self, identity: String) -> Result<()> {
        if self.signals.is_none() {
            self.signals = Some((Arc::new(Bell::new()?), Arc::new(Alarm::new()?)));
        }
        self.link.connect()?;
        let Some(opening) = self.shared.state().registry.renew_slot(self.slot) else {
            return Ok(());
        };
        self.identity = identity;
        let opened = scripts::open(&mut self.link, &self.shared.keys, &self.identity, &opening)?;
        let mut state = self.shared.state();
        match opened {
            Fenced::Alive(closings) if state.is(&self.identity) => {
                state.registry.closed(self.slot, closings, Instant::now());
                self.shared.nudge(&mut state);
                drop(state);
            }
            Fenced::Alive(_) | Fenced::Lost => {
                drop(state);
                self.shared.lose(&self.identity);
                return Err(Error::Connection("the lease is lost".into()));
            }
        }
        let id = scripts::prepare_to_block(&mut self.link, &self.shared.keys, &self.identity, &opening.hand.queue)?;
        let Some(visit) = self.link.visit() else {
            return Err(Error::Connection("the connection is gone".into()));
        };
        self.connection = self.link.generation();
        let mut state = self.shared.state();
        if state.is(&self.identity) {
            state.registry.slots.connected(self.slot, Client { id, visit });
        } else {
            state.registry.slot_failed(self.slot, None);
        }
        self.shared.nudge(&mut state);
        Ok(())
    }

    /// The connection may be another by now, which has no hand yet.
    fn is_connected(&mut self) -> Result<()> {
        self.link.connect()?;
        if self.link.generation() == self.connection {
            Ok(())
        } else {
            Err(Error::Connection("the connection was another".into()))
        }
    }

    /// Records what is in the hand.
    fn take(&mut self, hand: &Hand, index: Option<u64>) -> Result<()> {
        self.is_connected()?;
        let took = scripts::take(&mut self.link, &self.shared.keys, &self.identity, hand, index)?;
        self.took(took)?;
        self.attempts.succeeded();
        Ok(())
    }

    fn took(&self, took: Fenced<Took>) -> Result<()> {
        let mut state = self.shared.state();
        if took == Fenced::Lost || !state.is(&self.identity) {
            // What it was others recover, or it is in its queue again.
            state.registry.slots.took(self.slot);
        }
        match took {
            Fenced::Alive(_) if !state.is(&self.identity) => Ok(()),
            Fenced::Alive(Took::Recorded(recorded)) => {
                state.registry.took(self.slot, Some(recorded), Instant::now());
                let is_over = !state.registry.is_idle() || state.registry.settles_at().is_some();
                if is_over || state.phase == Phase::Leaving {
                    self.shared.nudge(&mut state);
                }
                Ok(())
            }
            Fenced::Alive(Took::Nothing) => {
                state.registry.took(self.slot, None, Instant::now());
                Ok(())
            }
            Fenced::Alive(Took::Closed) => {
                state.registry.took(self.slot, None, Instant::now());
                Err(Error::Connection("its claims are closed".into()))
            }
            Fenced::Lost => {
                drop(state);
                self.shared.lose(&self.identity);
                Err(Error::Connection("the lease is lost".into()))
            }
        }
    }

    fn claim(&mut self, hand: &Hand, index: Option<u64>) -> Result<()> {
        self.is_connected()?;
        let keys = &self.shared.keys;
        scripts::begin_to_block(&mut self.link, keys, &self.identity, hand, index, PATIENCE)?;
        let took = scripts::took(self.link.receive()?)?;
        self.took(took)?;
        self.link.wait_longer(PATIENCE)?;
        let reply = self.wait_for_reply()?;
        self.link.wait_longer(Duration::ZERO)?;
        if let Some(reply) = reply {
            self.answered(hand, scripts::blocked(reply)?)?;
        }
        self.attempts.succeeded();
        Ok(())
    }

    fn answered(&mut self, hand: &Hand, blocked: Blocked) -> Result<()> {
        match blocked {
            Blocked::Nothing => answer(self.shared, self.shared.state(), self.slot, None, None).ring(),
            Blocked::Brought(payload) => {
                match bring(self.shared, self.slot, &self.identity, payload, None) {
                    Ok(calls) => calls.ring(),
                    Err(_) => {
                        self.shared.state().registry.slots.answered(self.slot);
                        // Where nobody has taken the lease, nobody will recover it.
                        return self.take(hand, None);
                    }
                }
            }
            Blocked::Refused(error) => {
                // Where the lease is lost, the hand is closed.
                self.take(hand, None)?;
                self.rest(&error);
            }
        }
        Ok(())
    }

    /// `None`: it has been read, and taken care of.
    fn wait_for_reply(&mut self) -> Result<Option<Value>> {
        let (Some((bell, alarm)), Some(mut wire)) = (self.signals.clone(), self.link.lend()) else {
            return Ok(Some(self.link.receive()?));
        };
        let deadline = wire.deadline();
        // It may have come together with the one before.
        let mut reply = wire.try_receive()?;
        let mut pause = SHORT_LOOK;
        loop {
            if reply.is_some() {
                self.link.take_back(wire);
                return Ok(reply);
            }
            let watch = Watch {
                shared: self.shared.clone(),
                slot: self.slot,
                identity: self.identity.clone(),
                bell: bell.clone(),
                alarm: alarm.clone(),
                wire: Some(wire),
                deadline,
            };
            let (was_lent, news);
            (was_lent, wire, news) = self.lend(watch, &alarm);
            match news {
                News::Nothing => {}
                News::Reply(read) => {
                    reply = Some(read);
                    continue;
                }
                News::Job => {
                    self.link.take_back(wire);
                    return Ok(None);
                }
                News::Failure(error) => return Err(error),
            }
            if matches!(self.shared.state().phase, Phase::Left | Phase::Stopped) {
                return Err(Error::Connection("the engine has ended".into()));
            }
            if was_lent {
                // Another may have the time.
                pause = SHORT_LOOK;
                continue;
            }
            reply = wire.receive_until(deadline.min(Instant::now() + pause))?;
            pause = LONG_LOOK.min(pause * 2);
            if reply.is_none() && deadline <= Instant::now() {
                return Err(late());
            }
        }
    }

    /// Has a thread that waits for a job of this crew wait for the reply, if there is one. Returns when that is over, and whether there
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
    fn fail(&mut self, error: &Error) {
        self.link.discard();
        let mut state = self.shared.state();
        self.attempts.failed(state.pace);
        state.registry.slot_failed(self.slot, self.attempts.at);
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
        // A job may wait for its token, and its ack with it.
        let pause = match state.registry.slots.owes(self.slot) {
            true => pause.min(REST),
            false => pause,
        };
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
