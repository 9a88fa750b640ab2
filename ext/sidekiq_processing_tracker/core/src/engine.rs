//! The engine: one for each process that works on jobs. It starts the native threads and is what Ruby talks to.
//!
//! All that threads share lies under one lock, which is never held over a call to Redis, a wait, or anything of Ruby's.

use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::keys::Keys;
use crate::parker::{lock, Parker};
use crate::registry::{Handle, Registry, Requeueing, Standing};
use crate::scripts::{self, Beat, Fenced};
use crate::settings::{Pace, Settings};
use crate::{claims, clock, control, payload, threads};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What the native threads share.
pub(crate) struct Shared {
    pub settings: Settings,
    pub keys: Keys,
    pub events: Events,
    /// Ruby has done something since the last note of it.
    pub progress: AtomicBool,
    state: Mutex<State>,
    pub claims_wake: Condvar,
    pub control_wake: Condvar,
    warned: Mutex<HashSet<String>>,
}

pub(crate) struct State {
    pub registry: Registry,
    /// The identity that is registered, or was last.
    pub identity: String,
    pub registered: bool,
    pub was_registered: bool,
    pub pace: Pace,
    /// When the last beat was sent that was answered.
    pub last_beat: Option<Instant>,
    /// The same moment by a clock that counts suspension.
    last_beat_at: Duration,
    /// Somebody waits for a beat, to know whether the lease still stands.
    pub beat_now: bool,
    beat_waiters: Vec<Arc<Parker>>,
    /// The control thread cannot connect and wants its beat sent by the claims thread.
    pub ride: bool,
    /// The claims thread waits for something to do.
    pub claims_idle: bool,
    pub phase: Phase,
    pub left_cleanly: bool,
    /// What was lost with the identity before, to be told with the next one.
    lost: Option<(String, Vec<Arc<[u8]>>)>,
    health: Health,
    ended: Vec<Arc<Parker>>,
}

/// When a beat was sent: for the pace of beats, and by a clock that counts suspension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent(Instant, Duration);

impl Sent {
    pub fn now() -> Self {
        Self(Instant::now(), clock::now())
    }
}

/// An engine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Running,
    /// Its last turns and `leave` are to be sent.
    Leaving,
    /// It has left; the threads end.
    Left,
    /// It has no more time; the threads end where they are.
    Stopped,
}

/// Which connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Control,
    Claims,
}

#[derive(Debug, Default)]
struct Health {
    control_down: bool,
    claims_down: bool,
    /// The claims link has got an answer since the control link went down: jobs can be recorded all the same.
    claims_work: bool,
    since: Option<Instant>,
}

impl Health {
    /// Whether a record can be expected soon.
    fn takes_records(&self) -> bool {
        !self.claims_down && (!self.control_down || self.claims_work)
    }
}

impl State {
    /// Whether this is the identity that has the lease.
    pub fn is(&self, identity: &str) -> bool {
        self.registered && self.identity == identity
    }

    /// Whether the lease cannot have run out yet. It lasts `ttl` from the moment in which the last beat was sent, less a
    /// step, which the lease clock may have been ahead when the server's clock was set meanwhile.
    fn is_within_lease(&self) -> bool {
        clock::now().saturating_sub(self.last_beat_at) < self.pace.ttl.saturating_sub(self.pace.step)
    }

    fn beat_answered(&mut self, sent: Sent) {
        self.last_beat = self.last_beat.max(Some(sent.0));
        self.last_beat_at = self.last_beat_at.max(sent.1);
        self.wake_beat_waiters();
    }

    fn wake_beat_waiters(&mut self) {
        self.beat_now = false;
        for waiter in self.beat_waiters.drain(..) {
            waiter.unpark();
        }
    }

    pub fn is_claims_down(&self) -> bool {
        self.health.claims_down
    }
}

impl Shared {
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// An instance is registered: the first one, or the next one after a lost lease.
    pub fn registered(&self, identity: String, pace: Pace, sent: Sent) {
        let mut state = self.state();
        state.identity = identity;
        state.registered = true;
        state.pace = pace;
        state.beat_answered(sent);
        let lost = state.lost.take();
        let first = !std::mem::replace(&mut state.was_registered, true);
        let identity = state.identity.clone();
        self.works(&mut state, Link::Control);
        drop(state);
        self.claims_wake.notify_all();
        if let Some((old, payloads)) = lost {
            let jid = |payload: &Arc<[u8]>| payload::read(payload).jid.unwrap_or_default();
            self.events.push(Event::LeaseLost {
                identity: old,
                new_identity: identity,
                jids: payloads.iter().map(jid).collect(),
            });
        } else if first {
            self.events.push(Event::Started {
                identity,
                server: self.settings.redis.to_string(),
                namespace: self.settings.namespace.clone(),
                interval: self.settings.interval,
                ttl: self.settings.ttl,
            });
        }
    }

    /// A beat was answered on this link. Answers an instance that is due.
    pub fn beaten(&self, link: Link, identity: &str, sent: Sent, beat: &Fenced<Beat>) -> Option<Vec<u8>> {
        let Fenced::Alive(beat) = beat else {
            self.lose(identity);
            return None;
        };
        let mut state = self.state();
        if !state.is(identity) {
            return None;
        }
        state.beat_answered(sent);
        state.pace = beat.pace;
        state.ride = false;
        self.works(&mut state, link);
        beat.seen.as_ref().and_then(|(_, due)| due.clone())
    }

    /// The control thread asks the claims thread for a ride.
    pub fn ride(&self) {
        let mut state = self.state();
        if state.registered {
            state.ride = true;
            self.claims_wake.notify_all();
        }
    }

    /// The lease of `identity` is lost.
    pub fn lose(&self, identity: &str) {
        let mut state = self.state();
        if !state.is(identity) {
            return;
        }
        state.registered = false;
        let payloads = state.registry.lose();
        state.lost = Some((identity.to_owned(), payloads));
        state.wake_beat_waiters();
        self.control_wake.notify_all();
        self.claims_wake.notify_all();
    }

    /// A link has failed. The first failure of an outage is told, once.
    pub fn link_failed(&self, link: Link, error: &Error) {
        let mut state = self.state();
        match link {
            Link::Control if !state.health.control_down => {
                state.health.control_down = true;
                state.health.claims_work = false;
            }
            Link::Control => {}
            Link::Claims => state.health.claims_down = true,
        }
        self.outage(&mut state, &error.to_string());
    }

    fn outage(&self, state: &mut State, error: &str) {
        if state.health.since.is_none() {
            state.health.since = Some(Instant::now());
            self.events.push(Event::Outage {
                error: error.to_owned(),
            });
        }
        // Who waits for a requeue waits on: his job may be in Redis, and to push it as well would be once too often.
        for waiter in state.registry.record_waiters() {
            waiter.unpark();
        }
        state.wake_beat_waiters();
    }

    /// A link has got an answer.
    pub fn link_works(&self, link: Link) {
        let mut state = self.state();
        self.works(&mut state, link);
    }

    fn works(&self, state: &mut State, link: Link) {
        match link {
            Link::Control => state.health.control_down = false,
            Link::Claims => {
                state.health.claims_down = false;
                state.health.claims_work = true;
            }
        }
        if state.health.control_down || state.health.claims_down {
            return;
        }
        if let Some(since) = state.health.since.take() {
            self.events.push(Event::OutageOver {
                lasted: since.elapsed(),
            });
        }
    }

    /// Warns of a thing, and does not repeat it.
    pub fn warn_once(&self, about: &str, message: String) {
        let mut warned = lock(&self.warned);
        if warned.len() > 1000 {
            warned.clear();
        }
        if warned.insert(about.to_owned()) {
            self.events.push(Event::Warning(message));
        }
    }

    /// Wakes the claims thread, unless it is at work and will look by itself: a wake-up costs more than a turn's share.
    pub fn nudge(&self, state: &mut State) {
        if std::mem::take(&mut state.claims_idle) {
            self.claims_wake.notify_one();
        }
    }

    /// Wakes every thread that waits for the engine, to see that it ends.
    pub fn wake_all(&self, state: &mut State) {
        self.claims_wake.notify_all();
        self.control_wake.notify_all();
        state.wake_beat_waiters();
        for parker in state.registry.waiters().into_iter().chain(state.ended.drain(..)) {
            parker.unpark();
        }
    }
}

/// The engine of a process. Every method is quick, but for those that say otherwise; none needs the GVL.
pub struct Engine {
    shared: Arc<Shared>,
    pid: u32,
    threads: Vec<Arc<Parker>>,
}

impl Engine {
    /// Starts the native threads, which connect and register by themselves.
    ///
    /// # Errors
    /// `Error::Internal` when the system has no thread or no random bytes to give.
    pub fn start(settings: Settings) -> Result<Self> {
        scripts::prepare();
        let pace = settings.pace();
        let shared = Arc::new(Shared {
            keys: Keys::new(&settings.namespace),
            events: Events::default(),
            progress: AtomicBool::new(true),
            state: Mutex::new(State {
                registry: Registry::default(),
                identity: crate::identity::draw(&settings.instance_id)?,
                registered: false,
                was_registered: false,
                pace,
                last_beat: None,
                last_beat_at: Duration::ZERO,
                beat_now: false,
                beat_waiters: Vec::new(),
                ride: false,
                claims_idle: false,
                phase: Phase::Running,
                left_cleanly: false,
                lost: None,
                health: Health::default(),
                ended: Vec::new(),
            }),
            claims_wake: Condvar::new(),
            control_wake: Condvar::new(),
            warned: Mutex::default(),
            settings,
        });
        let mut engine = Self {
            shared,
            pid: std::process::id(),
            threads: Vec::new(),
        };
        let started = engine
            .start_thread("tracker-control", control::run)
            .and_then(|()| engine.start_thread("tracker-claims", claims::run));
        if let Err(error) = started {
            engine.stop();
            return Err(error);
        }
        Ok(engine)
    }

    fn start_thread(&mut self, name: &str, body: fn(Arc<Shared>)) -> Result<()> {
        let (shared, ended) = (self.shared.clone(), Parker::new());
        let has_ended = ended.clone();
        threads::spawn(name, move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(shared.clone())));
            if outcome.is_err() {
                // The other threads end too, so the lease runs out, and others recover what is recorded.
                let mut state = shared.state();
                state.phase = Phase::Stopped;
                shared.wake_all(&mut state);
                drop(state);
                shared.events.push(Event::Warning(
                    "A native thread died of a bug. Restart this process".into(),
                ));
            }
            has_ended.unpark();
        })?;
        self.threads.push(ended);
        Ok(())
    }

    /// Whether this is the process that started the engine. In a forked child nothing here may be touched: the locks may
    /// be held by threads that do not exist there.
    #[must_use]
    pub fn is_of_this_process(&self) -> bool {
        self.pid == std::process::id()
    }

    /// Who this instance is. Another one after a lost lease.
    #[must_use]
    pub fn identity(&self) -> String {
        self.shared.state().identity.clone()
    }

    /// A job begins. Its record is written as soon as Redis takes it, for as long as the job runs.
    #[must_use]
    pub fn track(&self, queue: Vec<u8>, payload: Arc<[u8]>, marked: Option<String>) -> Handle {
        let mut state = self.shared.state();
        let handle = state.registry.track(queue, payload, marked);
        self.shared.nudge(&mut state);
        handle
    }

    /// Whether the job is recorded and may run; else, when that is soon to be expected, where to wait for it.
    ///
    /// A process that was stopped or cut off may get the answer to a record long after others have recovered the job. So
    /// after such a pause first comes a beat, which tells whether the lease still stands.
    #[must_use]
    pub fn recorded(&self, handle: Handle) -> Recorded {
        let mut state = self.shared.state();
        let standing = state.registry.standing(handle);
        if standing == Standing::Lost {
            return Recorded::Lost;
        }
        let kept = standing == Standing::Kept;
        if kept && state.is_within_lease() {
            return Recorded::Yes;
        }
        if state.phase != Phase::Running || !state.health.takes_records() {
            return if kept { Recorded::Yes } else { Recorded::No };
        }
        let parker = Parker::new();
        if kept {
            state.beat_now = true;
            state.beat_waiters.push(parker.clone());
            self.shared.control_wake.notify_all();
        } else {
            state.registry.wake_when_recorded(handle, parker.clone());
        }
        Recorded::Wait(parker)
    }

    /// Somebody has waited for a record for as long as may be. Until the next answer nobody waits any more.
    pub fn waited_in_vain(&self) {
        let mut state = self.shared.state();
        state.health.claims_down = true;
        self.shared
            .outage(&mut state, "Redis did not take the record of a job in time");
        // Asks Redis at once: else an idle link would count as down until its next call.
        self.shared.nudge(&mut state);
    }

    /// The job is done: its record goes with the next turn.
    pub fn ack(&self, handle: Handle) {
        let mut state = self.shared.state();
        let lingers = state.registry.oldest_ack().is_some();
        state.registry.ack(handle, Instant::now());
        if !lingers {
            self.shared.nudge(&mut state);
        }
    }

    /// The job's thread has gone without an ack.
    pub fn release(&self, handle: Handle) {
        let mut state = self.shared.state();
        state.registry.release(handle);
        self.shared.nudge(&mut state);
    }

    /// The job goes back to its queue, and its record with it.
    #[must_use]
    pub fn requeue(&self, handle: Handle) -> Requeueing {
        let mut state = self.shared.state();
        let requeueing = state.registry.requeue(handle);
        self.shared.nudge(&mut state);
        requeueing
    }

    /// Whether a job that was to be requeued is the caller's to put back, now that it waits no longer.
    #[must_use]
    pub fn take_back(&self, handle: Handle) -> bool {
        self.shared.state().registry.take_back(handle)
    }

    /// The thread that requeued jobs was interrupted, and takes none of these back.
    pub fn abandon(&self, handles: &[Handle]) {
        let mut state = self.shared.state();
        for handle in handles {
            state.registry.abandon(*handle);
        }
        self.shared.nudge(&mut state);
    }

    /// Whether turns are still sent: else a requeue that is under way stays so.
    #[must_use]
    pub fn is_at_work(&self) -> bool {
        matches!(self.shared.state().phase, Phase::Running | Phase::Leaving)
    }

    /// What Ruby should hear of.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// Ruby has made progress.
    pub fn touch(&self) {
        self.shared.progress.store(true, Ordering::Relaxed);
    }

    /// Begins to leave. Done when the parker is, or when the caller calls `stop`.
    #[must_use]
    pub fn leave(&self) -> Arc<Parker> {
        let parker = Parker::new();
        let mut state = self.shared.state();
        match state.phase {
            Phase::Running | Phase::Leaving => {
                state.phase = Phase::Leaving;
                state.ended.push(parker.clone());
            }
            Phase::Left | Phase::Stopped => parker.unpark(),
        }
        self.shared.claims_wake.notify_all();
        self.shared.control_wake.notify_all();
        parker
    }

    /// Ends the threads, wherever they are. What was not told to Redis by now is recovered when the lease runs out.
    /// Answers the parkers on which to wait for the threads' ends.
    pub fn stop(&self) -> Vec<Arc<Parker>> {
        let mut state = self.shared.state();
        if state.phase != Phase::Left {
            state.phase = Phase::Stopped;
        }
        self.shared.wake_all(&mut state);
        drop(state);
        self.shared.events.close();
        self.threads.clone()
    }

    /// Whether the instance has left as it should.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.shared.state().left_cleanly
    }
}

/// Whether a job is recorded.
#[derive(Debug, Clone)]
pub enum Recorded {
    /// It is, or it need not be any more.
    Yes,
    /// It was, but the lease has been lost: others have the job, and it must not run here.
    Lost,
    /// It is not, and nobody knows when it will be.
    No,
    /// It will be, soon: wait, then ask again.
    Wait(Arc<Parker>),
}

/// How long a thread's end is waited for: no call on a link takes much longer than a few of these.
pub const END_WITHIN: Duration = Duration::from_millis(500);
