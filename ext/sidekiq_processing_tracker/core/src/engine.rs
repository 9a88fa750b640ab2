//! The engine: one for each process that works on jobs. It starts the native threads and is what Ruby talks to.

use crate::crew::Plan;
use crate::due::{Claimed, Due, Push, Straight};
use crate::error::Result;
use crate::events::Events;
use crate::identity;
use crate::parker::{lock, Parker};
use crate::registry::{Handle, Requeueing, Standing, Taken};
use crate::scripts;
use crate::settings::{Fetch, Settings};
use crate::shared::{Phase, Shared, State};
use crate::{blocking, claims, control, wake};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The engine of a process. Every method is quick, but for those that say otherwise; none needs the GVL.
pub struct Engine {
    shared: Arc<Shared>,
    pid: u32,
    threads: Vec<Arc<Parker>>,
    due: Mutex<Due>,
}

impl Engine {
    /// Starts the native threads, which connect and register by themselves.
    ///
    /// # Errors
    /// `Error::Internal` when the system has no thread or no random bytes to give.
    pub fn start(settings: Settings) -> Result<Self> {
        scripts::prepare();
        let shared = Arc::new(Shared::new(settings)?);
        let mut engine = Self {
            due: Mutex::new(Due::new(&shared)),
            shared,
            pid: std::process::id(),
            threads: Vec::new(),
        };
        let started = engine
            .start_thread("tracker-control", control::run)
            .and_then(|()| engine.start_thread("tracker-claims", claims::run))
            .and_then(|()| engine.start_thread("tracker-wake", wake::run));
        if let Err(error) = started {
            engine.stop();
            return Err(error);
        }
        Ok(engine)
    }

    fn start_thread(&mut self, name: &str, body: fn(Arc<Shared>)) -> Result<()> {
        self.threads.push(self.shared.start_thread(name, body)?);
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
        // Mostly its thread asks for the record at once, and sends it.
        self.shared.nudge_within(&mut state, claims::LINGER);
        handle
    }

    /// Threads will come that take jobs by this plan. Answers what to call them.
    ///
    /// # Errors
    /// `Error::Internal` when the system has no random bytes, or no thread, to give.
    pub fn add_crew(&self, plan: Plan) -> Result<usize> {
        let seed = identity::seed()?;
        let settings = &self.shared.settings;
        let mut state = self.shared.state();
        let crew = state.registry.add_crew(plan, seed);
        let slots = state.registry.slots.count();
        if settings.blocks && !settings.polls {
            state.registry.add_slots(crew);
        }
        let slots = slots..state.registry.slots.count();
        self.shared.alarm_wake.notify_all();
        drop(state);
        blocking::start(&self.shared, slots)?;
        Ok(crew)
    }

    /// Takes a job that is ready for a crew. Never one that others may have by now: after a pause longer than the
    /// lease first comes a beat.
    #[must_use]
    pub fn take(&self, crew: usize) -> Option<Taken> {
        self.take_ready(&mut self.shared.state(), crew)
    }

    fn take_ready(&self, state: &mut State, crew: usize) -> Option<Taken> {
        if state.phase != Phase::Running || !state.registry.has_ready(crew) || !state.is_within_lease() {
            return None;
        }
        let was_idle = state.registry.is_idle_crew(crew);
        let taken = state.registry.take(crew, Instant::now());
        self.nudge_for(state, crew, was_idle);
        taken
    }

    /// A thread of a crew has been woken. It waits no more, and takes a job, if nobody else has been faster.
    #[must_use]
    pub fn arrive(&self, crew: usize, parker: &Arc<Parker>) -> Option<Taken> {
        let mut state = self.shared.state();
        state.registry.arrive(crew, parker);
        self.take_ready(&mut state, crew)
    }

    /// Wakes the claims thread where there is something to claim, or where a crew has come to wait for something in queues
    /// that were found empty: they may not be watched. One more thread that waits in vain changes nothing.
    fn nudge_for(&self, state: &mut State, crew: usize, was_idle: bool) {
        let is_watched = was_idle || !state.registry.is_idle_crew(crew);
        if state.registry.is_hungry() || !is_watched || state.registry.has_unwanted_claims() {
            self.shared.nudge(state);
        }
    }

    /// A thread of a crew waits for a job. Answers where; `None` when it need not, or should not: there is a job to take, or
    /// none will come any more.
    #[must_use]
    pub fn wait_for_work(&self, crew: usize) -> Option<Arc<Parker>> {
        let mut state = self.shared.state();
        if !state.gives_work(crew) {
            return None;
        }
        let parker = Parker::new();
        if state.registry.has_ready(crew) {
            if state.is_within_lease() {
                return None;
            }
            state.beat_now = true;
            state.beat_waiters.push(parker.clone());
            self.shared.control_wake.notify_all();
        }
        let was_idle = state.registry.is_idle_crew(crew);
        state.registry.wait(crew, parker.clone());
        self.nudge_for(&mut state, crew, was_idle);
        Some(parker)
    }

    /// Whether there is a job to take.
    #[must_use]
    pub fn has_ready(&self, crew: usize) -> bool {
        self.shared.state().registry.has_ready(crew)
    }

    /// Whether jobs may still come.
    #[must_use]
    pub fn gives_work(&self, crew: usize) -> bool {
        self.shared.state().gives_work(crew)
    }

    /// A thread of a crew waits no more, though nothing has come for it.
    pub fn stop_waiting(&self, crew: usize, parker: &Arc<Parker>) {
        let mut state = self.shared.state();
        state.registry.stop_waiting(crew, parker, Instant::now());
        if state.registry.gives_back_at().is_some() || state.registry.has_unwanted_claims() {
            self.shared.nudge(&mut state);
        }
    }

    /// No job is claimed any more for a crew; what is claimed and not taken goes back. `dismiss`: its threads that wait are
    /// sent away.
    pub fn be_quiet(&self, crew: usize, dismiss: bool) {
        let mut state = self.shared.state();
        state.registry.be_quiet(crew);
        if dismiss {
            state.registry.dismiss(crew);
        }
        self.shared.nudge(&mut state);
    }

    /// A class is marked though its payloads do not say so. Answers where to wait until Redis has been told, if it has not.
    #[must_use]
    pub fn mark(&self, class: String) -> Option<Arc<Parker>> {
        let mut state = self.shared.state();
        let parker = state.registry.mark(class);
        self.shared.nudge(&mut state);
        parker
    }

    /// Whether the job is recorded and may run; else, when that is soon to be expected, where to wait for it.
    ///
    /// A process that was stopped or cut off may get the answer to a record long after others have recovered the job. So
    /// after such a pause first comes a beat, which tells whether the lease still stands.
    #[must_use]
    pub fn recorded(&self, handle: Handle) -> Recorded {
        let mut state = self.shared.state();
        let mut standing = state.registry.standing(handle);
        if standing == Standing::Awaited && self.shared.settings.fetch == Fetch::Sidekiq {
            drop(state);
            claims::hurry(&self.shared);
            state = self.shared.state();
            standing = state.registry.standing(handle);
            if standing == Standing::Awaited {
                self.shared.nudge(&mut state);
            }
        }
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
            self.shared.nudge_within(&mut state, claims::LINGER);
        }
    }

    /// The job's thread has gone without an ack.
    pub fn release(&self, handle: Handle) {
        let mut state = self.shared.state();
        state.registry.release(handle, Instant::now());
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

    /// Claims jobs of Sidekiq's `set` whose score is `until` at most: they are this instance's to push. With `straight` those
    /// that need nothing of Ruby's have gone to their queues already. Without a lease it claims nothing, and says so. Takes as long as Redis takes.
    ///
    /// # Errors
    /// `Error::Connection`, `Error::Refused` when Redis fails twice; what is claimed by then goes back with the next call.
    pub fn claim_due(&self, set: &[u8], until: &[u8], straight: Option<&Straight>) -> Result<Claimed> {
        lock(&self.due).claim(&self.shared, set, until, straight)
    }

    /// Says what has become of jobs that were claimed, and does it: each is pushed in the moment in which it ceases to be
    /// this instance's. Answers how many were. The others had gone back before, with the lease. Takes as long as Redis takes.
    ///
    /// # Errors
    /// As for `claim_due`.
    pub fn settle_due(&self, pushes: &[(Vec<u8>, Push)]) -> Result<u64> {
        lock(&self.due).settle(&self.shared, pushes)
    }

    /// A poll is over: what was claimed and not settled goes back to where it was. Takes as long as Redis takes.
    ///
    /// # Errors
    /// As for `claim_due`.
    pub fn end_due(&self) -> Result<()> {
        lock(&self.due).end(&self.shared)
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
                for crew in 0..state.registry.crews().len() {
                    state.registry.be_quiet(crew);
                    state.registry.dismiss(crew);
                }
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
