//! The control thread: beats, and recovers the jobs of instances that are dead.
//!
//! Nothing may delay a beat: recovery goes in pieces, and between two of them comes the beat that is due.

use crate::courier::{Courier, Delivery, News};
use crate::error::Error;
use crate::events::Event;
use crate::host::{self, Neighbours, Process, Step};
use crate::identity;
use crate::legacy::{self, Lookout};
use crate::link::Link;
use crate::recoveries::{News as Told, Recoveries, Round};
use crate::recovery::{Reaper, Recovery, Report};
use crate::scripts::{self, Fenced};
use crate::server;
use crate::settings::Pace;
use crate::shared::{Phase, Ride, Sent, Shared, Side, State};
use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

pub(crate) fn run(shared: Arc<Shared>) {
    Control::new(shared).run();
}

struct Control {
    shared: Arc<Shared>,
    link: Link,
    beat: Attempts,
    recover: Attempts,
    recoveries: Recoveries,
    /// Whether another instance may be due.
    look: bool,
    /// The search for instances of the 1.0 gem.
    lookout: Lookout,
    search: Attempts,
    /// Delivers what was recovered, where Sidekiq's queues are elsewhere.
    courier: Option<Courier>,
    deliver: Attempts,
    /// Instances whose death may be certain before their leases end.
    neighbours: Neighbours,
    neighbours_asked: Attempts,
    /// Nobody is told of this process any more, see `process_to_tell`.
    untold: bool,
    /// When orphans are due that wait in a dead instance.
    returns: Option<Instant>,
    /// How long a call for recovery takes at the worst; falls slowly.
    slowest: Duration,
    /// When the instance was registered last.
    registered: Option<Instant>,
    /// The last beat that was answered, and how long after it the next one is due in a small fleet, in steps.
    gap: (Option<Instant>, f64),
    /// When the neighbours were last looked after.
    looked: Instant,
    last_progress: Option<Instant>,
    /// When the claims thread was asked to send the beat that is due.
    asked: Option<Instant>,
    /// When the connection was last needed for something that cannot go over the claims link.
    needed: Instant,
}

enum Task {
    Stop,
    Register,
    Beat(String, Pace),
    /// Until the beat is due.
    Recover(String, Pace, Instant),
    Search(Pace),
    Deliver(String, Pace),
    LookAround(String, Pace),
}

impl Control {
    fn new(shared: Arc<Shared>) -> Self {
        let pace = shared.settings.pace();
        Self {
            link: Link::new(shared.settings.redis.clone(), timeout(pace)),
            courier: shared
                .settings
                .queues
                .clone()
                .map(|queues| Courier::new(queues, timeout(pace))),
            deliver: Attempts::default(),
            neighbours: Neighbours::new(shared.settings.proc.clone()),
            untold: false,
            neighbours_asked: Attempts::default(),
            shared,
            beat: Attempts::default(),
            recover: Attempts::default(),
            recoveries: Recoveries::default(),
            look: false,
            lookout: Lookout::new(),
            search: Attempts::default(),
            returns: None,
            slowest: Duration::ZERO,
            registered: None,
            gap: (None, 1.0),
            looked: Instant::now(),
            last_progress: None,
            asked: None,
            needed: Instant::now(),
        }
    }

    fn run(mut self) {
        loop {
            match self.next_task() {
                Task::Stop => return,
                Task::Beat(identity, pace) => {
                    self.beat(&identity, pace);
                    continue;
                }
                Task::Register => self.register(),
                Task::Recover(by, pace, due) => self.recover(by, pace, due),
                Task::Search(pace) => self.search(pace),
                Task::Deliver(by, pace) => self.deliver(&by, pace),
                Task::LookAround(identity, pace) => self.look_around(&identity, pace),
            }
            self.needed = Instant::now();
        }
    }

    fn next_task(&mut self) -> Task {
        let shared = self.shared.clone();
        let mut state = shared.state();
        loop {
            let now = Instant::now();
            let mut wake = None;
            if matches!(state.phase, Phase::Left | Phase::Stopped) {
                return Task::Stop;
            }
            self.link.set_timeout(timeout(state.pace));
            if !state.registered {
                if state.phase != Phase::Running && state.registry.is_idle() {
                    // There is nothing left to leave: no lease, and no job that is with this process alone.
                    state.left_cleanly = !state.was_registered;
                    state.phase = Phase::Left;
                    shared.wake_all(&mut state);
                    return Task::Stop;
                } else if let Some(soon) = self.too_soon(now, state.pace) {
                    wake = Some(soon);
                } else if self.beat.is_due(now) {
                    return Task::Register;
                }
            } else {
                if self.gap.0 != state.last_beat {
                    self.gap = (state.last_beat, 0.8 + 0.2 * identity::jitter());
                }
                if let Some((hosted, due)) = state.ridden.take() {
                    self.answered(hosted, due);
                }
                let stretch = state.pace.stretch(state.instances, state.moved_clock);
                let gap = state.pace.step.mul_f64(self.gap.1 * stretch);
                let mut due = state.last_beat.map_or(now, |last| last + gap);
                if now < due {
                    self.asked = None;
                }
                if (now >= due || state.beat_now) && self.beat.is_due(now) {
                    match self.ride(&mut state, now) {
                        Some(until) => due = until,
                        None => return Task::Beat(state.identity.clone(), state.pace),
                    }
                }
                wake = earlier(Some(due.max(now)), self.returns);
                // Neighbours are looked after once a step, however seldom beats are.
                if stretch > 1.0 && self.beat.works() {
                    let next = self.looked + state.pace.step;
                    if now >= next {
                        self.looked = now;
                        self.neighbours.look();
                    }
                    wake = earlier(wake, Some(self.looked + state.pace.step));
                }
                if self.returns.is_some_and(|at| now >= at) {
                    self.returns = None;
                    self.look = true;
                }
                if state.phase == Phase::Running && self.recoveries.is_empty() && self.neighbours.is_busy() {
                    let asked = &self.neighbours_asked;
                    if asked.is_due(now) && self.is_time_for_a_call(now, due, state.pace) {
                        return Task::LookAround(state.identity.clone(), state.pace);
                    }
                    wake = earlier(wake, asked.at.filter(|at| *at > now));
                }
                if state.phase == Phase::Running && (!self.recoveries.is_empty() || self.look) {
                    if self.recover.is_due(now) && !state.beat_now && self.is_time_for_a_call(now, due, state.pace) {
                        return Task::Recover(state.identity.clone(), state.pace, due);
                    }
                    wake = earlier(wake, self.recover.at.filter(|at| *at > now));
                }
                if state.phase == Phase::Running && self.courier.is_some() {
                    if self.deliver.is_due(now) && self.is_time_for_a_call(now, due, state.pace) {
                        return Task::Deliver(state.identity.clone(), state.pace);
                    }
                    wake = earlier(wake, self.deliver.at.filter(|at| *at > now));
                }
                if state.phase == Phase::Running {
                    let at = self.lookout.at.max(self.search.at.unwrap_or(now));
                    if at <= now && self.is_time_for_a_call(now, due, state.pace) {
                        return Task::Search(state.pace);
                    }
                    wake = earlier(wake, Some(at).filter(|at| *at > now));
                }
            }
            if !self.beat.is_due(now) {
                wake = later(wake, self.beat.at);
            }
            if self.link.is_connected() && state.registered && !state.is_claims_down() {
                let until = self.needed + shared.settings.keep_control;
                if until <= now {
                    self.link.discard();
                } else {
                    wake = earlier(wake, Some(until));
                }
            }
            let wait = wake.map_or(state.pace.step, |at| at.saturating_duration_since(now));
            state = shared
                .control_wake
                .wait_timeout(state, wait.max(Duration::from_millis(1)))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A call that takes as long as the slowest one must not make the beat late.
    fn is_time_for_a_call(&self, now: Instant, due: Instant, pace: Pace) -> bool {
        is_time_for_calls(1, self.slowest, now, due, pace)
    }

    /// When the next registration may be, if not now. Where a lease is lost as soon as it is had, something takes it away
    /// again and again, and a new identity each time would fill Redis with them.
    fn too_soon(&self, now: Instant, pace: Pace) -> Option<Instant> {
        self.registered
            .map(|last| last + pace.pause())
            .filter(|soon| *soon > now)
    }

    fn register(&mut self) {
        let (pace, mut info) = (self.shared.settings.pace(), self.shared.settings.told());
        for class in self.shared.state().registry.marked() {
            info.push((format!("marked:{class}"), "1".into()));
        }
        let process = self.process_to_tell();
        info.extend(process.iter().flat_map(Process::told));
        let sent = Sent::now();
        // A nonce is used once: the script may have been done though its answer was lost.
        let registered = identity::draw(&self.shared.settings.instance_id).and_then(|identity| {
            scripts::register(&mut self.link, &self.shared.keys, &identity, pace, &info).map(|pace| (identity, pace))
        });
        match registered {
            Ok((identity, pace)) => {
                self.beat.succeeded();
                self.look = true;
                self.registered = Some(Instant::now());
                let settings = &self.shared.settings;
                let exclusive = settings.exclusive.then(|| settings.instance_id.clone());
                let first = !self.shared.state().was_registered;
                self.neighbours.registered(process, exclusive, first);
                let indexes = host::indexes(&self.shared.keys, &info.into_iter().map(as_bytes).collect());
                self.shared.registered(identity, indexes, pace, sent);
                if first {
                    self.warn_of_eviction();
                }
            }
            Err(error) => self.failed(&error, pace),
        }
    }

    /// What others of this host are told of the process, so that they see its end. Nothing any more once it was fenced
    /// though its lease had not run out: what they saw of it was wrong, and may be so with each new lease. In doubt the
    /// lease decides.
    fn process_to_tell(&mut self) -> Option<Process> {
        let fenced_early = {
            let state = self.shared.state();
            state.was_registered && state.is_within_lease()
        };
        if fenced_early && self.neighbours.host().is_some() {
            self.untold = true;
            self.shared.warn_once(
                "fenced early",
                "this instance was fenced before its lease had run out. Others of this host are not told of its process any more, \
                 so from now on only its lease decides whether it lives"
                    .into(),
            );
        }
        if self.untold {
            return None;
        }
        self.neighbours.this_process()
    }

    fn warn_of_eviction(&mut self) {
        match server::evicts(&mut self.link) {
            Ok(Some(policy)) => self.shared.events.push(Event::Warning(format!(
                "Redis throws keys away when its memory is full (maxmemory-policy {policy}): jobs and what is known of those \
                 that run would go without a trace. Sidekiq and the tracker need maxmemory-policy noeviction"
            ))),
            Ok(None) => {}
            // Nobody is to go without a beat for that.
            Err(_) => self.link.discard(),
        }
    }

    fn beat(&mut self, identity: &str, pace: Pace) {
        if !self.link.is_connected() {
            // It could not go over the claims link, and the next one may not either.
            self.needed = Instant::now();
        }
        let progress = self.progress();
        let sent = Sent::now();
        match scripts::beat(
            &mut self.link,
            &self.shared.keys,
            identity,
            pace,
            progress,
            self.neighbours.host(),
        ) {
            Ok(answer) => {
                self.beat.succeeded();
                let due = self.shared.beaten(Side::Control, identity, sent, &answer);
                if let Fenced::Alive(beat) = &answer {
                    self.answered(beat.hosted, due);
                }
                if answer == Fenced::Lost {
                    self.recoveries.clear();
                }
            }
            Err(error) => {
                self.failed(&error, pace);
                let host = self.neighbours.host().map(str::to_owned);
                self.shared
                    .ride(&mut self.shared.state(), Ride { progress: false, host });
            }
        }
    }

    /// A beat was answered, on either link.
    fn answered(&mut self, hosted: Option<u64>, due: Option<Vec<u8>>) {
        self.looked = Instant::now();
        self.neighbours.beaten(hosted, self.looked);
        if let Some(due) = due {
            self.recoveries.begin(Recovery::new(due));
        }
    }

    /// Has the claims thread send the beat that is due, where that link is known to work and there is no other. Answers how long to
    /// wait for that, or `None` where the beat is to go over the thread's own link.
    fn ride(&mut self, state: &mut State, now: Instant) -> Option<Instant> {
        if self.link.is_connected() || !self.beat.works() || state.is_claims_down() || state.beat_now {
            return None;
        }
        let since = match self.asked {
            Some(since) => since,
            None => {
                let (progress, host) = (self.progress(), self.neighbours.host().map(str::to_owned));
                self.shared.ride(state, Ride { progress, host });
                *self.asked.insert(now)
            }
        };
        Some(since + state.pace.step / 4).filter(|until| now < *until)
    }

    /// Whether Ruby has made progress that is worth a note: once in six beats.
    fn progress(&mut self) -> bool {
        let step = self.shared.settings.pace().step;
        let recent = self.last_progress.is_some_and(|last| last.elapsed() < step * 6);
        if recent || !self.shared.progress.swap(false, Ordering::Relaxed) {
            return false;
        }
        self.last_progress = Some(Instant::now());
        true
    }

    fn failed(&mut self, error: &Error, pace: Pace) {
        if self.beat.failed(pace) {
            let identity = self.shared.state().identity.clone();
            let error = scripts::explain(&mut self.link, &self.shared.keys, &identity, error);
            self.shared.link_failed(Side::Control, &error);
        }
        self.link.discard();
    }

    /// Recovers dead instances until the beat is due, or something else is to be done.
    fn recover(&mut self, by: String, pace: Pace, due: Instant) {
        let shared = self.shared.clone();
        let reaper = Reaper {
            keys: shared.keys.clone(),
            by,
            pace,
            hold: shared.settings.hold,
            policy: shared.settings.policy.clone(),
        };
        let slowest = Cell::new(self.slowest);
        let (mut last, mut over, mut answered) = (Instant::now(), Vec::new(), false);
        let may_go_on = |others| {
            let state = shared.state();
            let goes_on = state.phase == Phase::Running && state.is(&reaper.by) && !state.beat_now;
            drop(state);
            goes_on && is_time_for_calls(others + 1, slowest.get(), Instant::now(), due, pace)
        };
        let tell = |told| match told {
            Told::Events(told) => shared.events.push_all(told),
            Told::Answered => {
                answered = true;
                slowest.set(last.elapsed().max(slowest.get().mul_f64(0.9)));
                last = Instant::now();
            }
            Told::Over(from, report) => over.push((from, report, Instant::now())),
        };
        let round = self.recoveries.round(&mut self.link, &reaper, may_go_on, tell);
        self.slowest = last.elapsed().max(slowest.get());
        for (from, report, at) in over {
            self.report(&reaper, &from, &report, at);
        }
        if answered {
            self.recover.succeeded();
        }
        match round {
            Ok(round) => {
                self.look = round != Round::Idle;
                match round {
                    Round::InVain => self.recover.pause(pace),
                    Round::Worked | Round::Idle => self.recover.succeeded(),
                }
            }
            Err(error) => {
                // A failure to reach Redis is told by the beats, and the same call is made again. What Redis refuses, it
                // may refuse for ever: the hold runs out, and meanwhile others get their turn.
                if self.recover.failed(pace) && !matches!(error, Error::Connection(_) | Error::Unfit(_)) {
                    let from = self
                        .recoveries
                        .give_up()
                        .map(|from| String::from_utf8_lossy(&from).into_owned());
                    self.look = true;
                    let of = from.as_deref().unwrap_or("dead instances");
                    self.shared
                        .warn_once(of, format!("The recovery of {of} does not work: {error}"));
                }
            }
        }
    }

    /// Tells what a recovery that was over then has left behind, if anything.
    fn report(&mut self, reaper: &Reaper, from: &[u8], report: &Report, at: Instant) {
        let shared = &self.shared;
        if let Some(unnoted) = report.unnoted(&reaper.keys) {
            shared.warn_once("unnoted", unnoted);
        }
        if let Some(leftovers) = report.leftovers(&reaper.keys, from) {
            shared.warn_once(&String::from_utf8_lossy(from), leftovers);
        }
        if let Some(unsettled) = report.unsettled_locks(from) {
            shared.warn_once(&format!("locks of {}", String::from_utf8_lossy(from)), unsettled);
        }
        if let Some(rest) = report.rest {
            // The lease clock moves in twentieths of a step.
            self.returns = earlier(self.returns, Some(at + rest + reaper.pace.step / 10));
        }
    }

    fn search(&mut self, pace: Pace) {
        let began = Instant::now();
        let shared = &self.shared;
        let outcome = self.lookout.step(&mut self.link, &shared.keys, pace, |of, warning| {
            shared.warn_once(&String::from_utf8_lossy(of), warning);
        });
        self.slowest = began.elapsed().max(self.slowest.mul_f64(0.9));
        match outcome {
            Ok(()) => self.search.succeeded(),
            Err(error) => {
                self.link.discard();
                if self.search.failed(pace) && !matches!(error, Error::Connection(_) | Error::Unfit(_)) {
                    self.search.succeeded();
                    self.lookout.give_up();
                    self.shared.warn_once("legacy", legacy::cannot_search(&error));
                }
            }
        }
    }

    /// Brings some of what waits in the outbox to Sidekiq's Redis. A Redis that is away there makes no outage here: the jobs
    /// wait, and a person is told.
    fn deliver(&mut self, by: &str, pace: Pace) {
        let (shared, began) = (self.shared.clone(), Instant::now());
        let Some(courier) = &mut self.courier else { return };
        let tell = |news| match news {
            News::Warning { about, text } => shared.warn_once(&about, text),
            News::Event(event) => shared.events.push(event),
        };
        let outcome = courier.step(&mut self.link, &shared.keys, by, &shared.settings.policy, tell);
        self.slowest = began.elapsed().max(self.slowest.mul_f64(0.9));
        match outcome {
            Ok(Delivery::Found) => {}
            Ok(Delivery::More) => {
                self.deliver.succeeded();
                shared.warn_again("delivery");
            }
            Ok(Delivery::Done | Delivery::Busy) => self.deliver.pause(pace),
            Err(error) => {
                courier.discard();
                if self.deliver.failed(pace) {
                    shared.warn_once(
                        "delivery",
                        format!("Jobs that were recovered wait in the outbox, since they cannot be brought to Sidekiq's Redis: {error}"),
                    );
                }
            }
        }
    }

    /// The next step in the search for instances that are dead for certain.
    fn look_around(&mut self, identity: &str, pace: Pace) {
        let began = Instant::now();
        let outcome = self.neighbours.step(&mut self.link, &self.shared.keys, identity);
        self.slowest = began.elapsed().max(self.slowest.mul_f64(0.9));
        match outcome {
            Ok(step) => {
                self.neighbours_asked.succeeded();
                match step {
                    Step::Dead(recovery) => self.recoveries.begin(*recovery),
                    Step::NotAlone(warning) => self.shared.events.push(Event::Warning(warning)),
                    Step::Nothing => {}
                }
            }
            Err(error) => {
                self.link.discard();
                // What Redis refuses, it may refuse for ever, and leases decide as well.
                if self.neighbours_asked.failed(pace) && !matches!(error, Error::Connection(_) | Error::Unfit(_)) {
                    self.neighbours_asked.succeeded();
                    self.neighbours.give_up();
                    self.shared.warn_once(
                        "neighbours",
                        format!("Cannot look for deaths that are certain, so leases decide: {error}"),
                    );
                }
            }
        }
    }
}

/// When to try again: at once after the first failure, then after a pause.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    failures: u32,
    pub(crate) at: Option<Instant>,
}

impl Attempts {
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now >= at)
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether the last attempt was none that failed.
    fn works(&self) -> bool {
        self.failures == 0
    }

    /// Something to try again after a pause, though nothing failed.
    pub(crate) fn pause(&mut self, pace: Pace) {
        self.at = Some(Instant::now() + pace.pause());
    }

    /// Answers whether it is an outage: a connection that broke once, and the next one works, is none.
    pub(crate) fn failed(&mut self, pace: Pace) -> bool {
        self.failures = self.failures.saturating_add(1);
        let again = self.failures > 1;
        self.at = again.then(|| Instant::now() + pace.pause());
        again
    }
}

/// Whether so many calls, on their way together and each as long as the slowest one, leave the beat in time. More than one only where it
/// is known how long one takes.
fn is_time_for_calls(count: usize, slowest: Duration, now: Instant, due: Instant, pace: Pace) -> bool {
    let longest = slowest.min(timeout(pace));
    match u32::try_from(count) {
        Ok(count) => now + longest * count <= due && (count == 1 || !slowest.is_zero()),
        Err(_) => false,
    }
}

/// Less than a step, so that a lease bears more than one interruption (docs/protocol.md, "The lease clock").
fn timeout(pace: Pace) -> Duration {
    pace.step.mul_f64(0.6)
}

fn as_bytes((field, value): (String, String)) -> (Vec<u8>, Vec<u8>) {
    (field.into_bytes(), value.into_bytes())
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

fn later(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.max(other)
}
