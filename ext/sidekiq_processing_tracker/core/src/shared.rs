//! What the native threads of an engine share, and how they tell each other of it.
//!
//! All of it lies under one lock, which is never held over a call to Redis, a wait, or anything of Ruby's.

use crate::blocking::Returned;
use crate::claims::Claims;
use crate::clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events, LostJob};
use crate::keys::Keys;
use crate::parker::{lock, Parker};
use crate::registry::Registry;
use crate::scripts::{Beat, Fenced};
use crate::settings::{Pace, Settings};
use crate::slots;
use crate::threads;
use crate::wire::Bell;
use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
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
    /// What the claims thread works with. Who has the lock is at the helm. It is never taken by one who has the state's.
    pub helm: Mutex<Option<Claims>>,
    pub claims_wake: Condvar,
    pub control_wake: Condvar,
    pub alarm_wake: Condvar,
    /// Wakes the wake thread where it waits for Redis, as long as there is that thread.
    pub wake_bell: Mutex<Option<Arc<Bell>>>,
    pub slot_wakes: [Condvar; slots::MOST],
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
    pub beat_waiters: Vec<Arc<Parker>>,
    /// A beat that the control thread wants the claims thread to send.
    pub ride: Option<Ride>,
    /// The answer to it: how many instances are on the host, and one that is due.
    pub ridden: Option<(Option<u64>, Option<Vec<u8>>)>,
    /// The claims thread waits for something to do, and nobody else is at the helm.
    pub claims_idle: bool,
    /// Until when the claims thread waits, at most.
    pub claims_until: Option<Instant>,
    /// Whether threads wait for jobs of queues for which no claim waits in Redis.
    pub unclaimed: Unclaimed,
    /// The id of the connection that is told of changes in queues, while there is one.
    pub told: Option<i64>,
    /// The same, of one that should have been told and was not.
    pub distrusted: Option<i64>,
    /// It was told of one.
    pub alarm: bool,
    /// How many instances there are, as far as this one knows.
    pub instances: u64,
    /// Whether the last beat moved the lease clock: nobody else had looked at it just before.
    pub moved_clock: bool,
    /// The indexes in which the registered instance stands.
    pub indexes: Vec<Vec<u8>>,
    pub phase: Phase,
    pub left_cleanly: bool,
    /// What was lost with the identity before, to be told with the next one.
    lost: Option<(String, Vec<LostJob>)>,
    pub health: Health,
    pub ended: Vec<Arc<Parker>>,
    /// What the slots have lent, when it is back.
    pub returned: [Option<Returned>; slots::MOST],
}

/// A beat that is sent on the claims link: what the control thread would tell with it.
#[derive(Debug)]
pub(crate) struct Ride {
    /// Ruby has made progress that is worth a note.
    pub progress: bool,
    /// The host whose instances are to be counted.
    pub host: Option<String>,
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
pub(crate) enum Side {
    Control,
    Claims,
}

#[derive(Debug, Default)]
pub(crate) struct Health {
    control_down: bool,
    pub claims_down: bool,
    /// The claims link has got an answer since the control link went down: jobs can be recorded all the same.
    claims_work: bool,
    since: Option<Instant>,
}

impl Health {
    /// Whether a record can be expected soon.
    pub fn takes_records(&self) -> bool {
        !self.claims_down && (!self.control_down || self.claims_work)
    }
}

/// Queues that threads wait for, and for which no claim waits in Redis.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unclaimed {
    /// There are such queues.
    pub any: bool,
    /// Since when, but for short breaks.
    pub since: Option<Instant>,
    /// When there were none any more, the last time.
    pub until: Option<Instant>,
}

impl Unclaimed {
    /// A break as short as that is none.
    pub const BREAK: Duration = Duration::from_secs(5);

    /// Notes whether there are any now. Answers whether that is new.
    pub fn note(&mut self, any: bool, now: Instant) -> bool {
        if self.any == any {
            return false;
        }
        self.any = any;
        if !any {
            self.until = Some(now);
        } else if self.is_over(now) {
            self.since = Some(now);
        }
        true
    }

    /// Whether there have been none for so long that it is no break.
    pub fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now.duration_since(until) > Self::BREAK)
    }
}

impl State {
    /// Whether this is the identity that has the lease.
    pub fn is(&self, identity: &str) -> bool {
        self.registered && self.identity == identity
    }

    /// Whether the lease cannot have run out yet. It lasts `ttl` from the moment in which the last beat was sent, less a
    /// step, which the lease clock may have been ahead when the server's clock was set meanwhile.
    pub fn is_within_lease(&self) -> bool {
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

    /// Whether jobs may still come for a crew.
    pub fn gives_work(&self, crew: usize) -> bool {
        self.phase == Phase::Running && self.registry.crews().get(crew).is_some_and(|crew| !crew.dismissed)
    }

    pub fn is_claims_down(&self) -> bool {
        self.health.claims_down
    }
}

impl Shared {
    pub fn new(settings: Settings) -> Result<Self> {
        let pace = settings.pace();
        Ok(Self {
            keys: settings.keys(),
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
                ride: None,
                ridden: None,
                claims_idle: false,
                claims_until: None,
                unclaimed: Unclaimed::default(),
                told: None,
                distrusted: None,
                alarm: false,
                instances: 1,
                moved_clock: true,
                indexes: Vec::new(),
                phase: Phase::Running,
                left_cleanly: false,
                lost: None,
                health: Health::default(),
                ended: Vec::new(),
                returned: Default::default(),
            }),
            helm: Mutex::new(None),
            claims_wake: Condvar::new(),
            control_wake: Condvar::new(),
            alarm_wake: Condvar::new(),
            wake_bell: Mutex::default(),
            slot_wakes: Default::default(),
            warned: Mutex::default(),
            settings,
        })
    }

    /// Starts a native thread. Answers a parker that is done when it has ended.
    ///
    /// # Errors
    /// `Error::Internal` when the system has no thread to give.
    pub fn start_thread(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(Arc<Self>) + Send + 'static,
    ) -> Result<Arc<Parker>> {
        let (shared, ended) = (self.clone(), Parker::new());
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
        Ok(ended)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// An instance is registered: the first one, or the next one after a lost lease.
    pub fn registered(&self, identity: String, indexes: Vec<Vec<u8>>, pace: Pace, sent: Sent) {
        let mut state = self.state();
        state.indexes = indexes;
        state.identity = identity;
        state.registered = true;
        state.pace = pace;
        state.moved_clock = true;
        state.beat_answered(sent);
        let lost = state.lost.take();
        let first = !std::mem::replace(&mut state.was_registered, true);
        let identity = state.identity.clone();
        self.works(&mut state, Side::Control);
        drop(state);
        self.claims_wake.notify_all();
        self.alarm_wake.notify_all();
        if let Some((old, jobs)) = lost {
            self.events.push(Event::LeaseLost {
                identity: old,
                new_identity: identity,
                jobs,
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

    /// A beat was answered on this link. Answers an instance that is due; for the control thread to read (`State::ridden`), where it was
    /// sent by another.
    pub fn beaten(&self, side: Side, identity: &str, sent: Sent, beat: &Fenced<Beat>) -> Option<Vec<u8>> {
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
        state.ride = None;
        state.instances = beat.instances;
        state.moved_clock = beat.moved;
        self.works(&mut state, side);
        let due = beat.due.clone();
        if side == Side::Claims {
            state.ridden = Some((beat.hosted, due));
            self.control_wake.notify_all();
            return None;
        }
        due
    }

    /// The control thread asks the claims thread to send its beat.
    pub fn ride(&self, state: &mut State, ride: Ride) {
        if state.registered {
            state.ride = Some(ride);
            self.nudge(state);
        }
    }

    /// The lease of `identity` is lost.
    pub fn lose(&self, identity: &str) {
        let mut state = self.state();
        if !state.is(identity) {
            return;
        }
        state.registered = false;
        (state.ride, state.ridden) = (None, None);
        let jobs = state.registry.lose();
        state.lost = Some((identity.to_owned(), jobs));
        state.wake_beat_waiters();
        self.control_wake.notify_all();
        self.claims_wake.notify_all();
    }

    /// A link has failed. The first failure of an outage is told, once.
    pub fn link_failed(&self, side: Side, error: &Error) {
        let mut state = self.state();
        match side {
            Side::Control if !state.health.control_down => {
                state.health.control_down = true;
                state.health.claims_work = false;
            }
            Side::Control => {}
            Side::Claims => state.health.claims_down = true,
        }
        self.outage(&mut state, &error.to_string());
    }

    pub fn outage(&self, state: &mut State, error: &str) {
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
    pub fn link_works(&self, side: Side) {
        let mut state = self.state();
        self.works(&mut state, side);
    }

    fn works(&self, state: &mut State, side: Side) {
        match side {
            Side::Control => state.health.control_down = false,
            Side::Claims => {
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

    /// What was warned of is over: should it come back, a person hears of it again.
    pub fn warn_again(&self, about: &str) {
        lock(&self.warned).remove(about);
    }

    /// Wakes the claims thread, unless it is at work and will look by itself: a wake-up costs more than a turn's share.
    pub fn nudge(&self, state: &mut State) {
        if std::mem::take(&mut state.claims_idle) {
            self.claims_wake.notify_one();
        }
    }

    /// The same, where the claims thread would not look by itself for so long.
    pub fn nudge_within(&self, state: &mut State, longest: Duration) {
        if state.claims_until.is_none_or(|until| until > Instant::now() + longest) {
            self.nudge(state);
        }
    }

    /// The wake thread is to look up.
    pub fn ring_wake_bell(&self) {
        if let Some(bell) = &*lock(&self.wake_bell) {
            bell.ring();
        }
    }

    /// Wakes every thread that waits for the engine, to see that it ends.
    pub fn wake_all(&self, state: &mut State) {
        self.claims_wake.notify_all();
        self.control_wake.notify_all();
        self.alarm_wake.notify_all();
        self.ring_wake_bell();
        self.slot_wakes.iter().for_each(Condvar::notify_all);
        state.wake_beat_waiters();
        for parker in state.registry.waiters().into_iter().chain(state.ended.drain(..)) {
            parker.unpark();
        }
    }
}
