//! The claims thread: tells Redis what this process does with jobs, one turn at a time, and leaves last.
//!
//! One thread at a time is at the helm and does that. When Redis has told of a job, it is the wake thread: until another
//! thread has woken up, the job might have begun.

use crate::control::Attempts;
use crate::error::Error;
use crate::failpoint;
use crate::identity;
use crate::link::Link;
use crate::parker::lock;
use crate::recovery::{Progress, Reaper, Recovery};
use crate::scripts::{self, Fenced, LastCall, Turn, Turned};
use crate::settings::{Fetch, Pace};
use crate::shared::{Phase, Ride, Sent, Shared, Side, State};
use crate::slots::Client;
use crate::turns::{Ended, Turns};
use std::collections::BTreeSet;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long an ack may wait for company.
pub(crate) const LINGER: Duration = Duration::from_millis(1);
/// How long claims that Redis is to end are counted on, by a clean exit too. What they bring later goes back by itself.
const WITHDRAWN_WITHIN: Duration = Duration::from_millis(500);
/// How often what Redis has is compared with what this process holds.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How often empty queues are looked at though Redis has told of no change, which it may have done in vain.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The shortest and the longest pause between two looks where Redis tells of nothing.
const POLLS: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// The pause after the first wake-up in vain, and the longest pause for each instance there is.
const DEAF: Duration = Duration::from_millis(10);
/// So few instances may all be woken by each push: a push that finds all of them deaf waits for the first that is not any more.
const HEARING: u64 = 4;

pub(crate) fn run(shared: Arc<Shared>) {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    *lock(&shared.helm) = Some(Claims {
        link: match shared.settings.fetch {
            Fetch::Native => Link::new(shared.settings.redis.clone(), timeout),
            Fetch::Sidekiq => Link::bare(shared.settings.redis.clone(), timeout),
        },
        shared: shared.clone(),
        turns: Turns::default(),
        attempts: Attempts::default(),
        swept: (0, Instant::now()),
        swept_last: false,
        last_call: None,
        settling: None,
        settle: Attempts::default(),
        watch: Watch::default(),
        withdrawal: None,
        turned: None,
        leaving_since: None,
        refused: Vec::new(),
    });
    loop {
        let mut helm = lock(&shared.helm);
        let Some(claims) = helm.as_mut() else { return };
        let mut state = shared.state();
        match claims.next_task(&mut state) {
            Ok(Task::Stop) => {
                drop(state);
                claims.let_go();
                *helm = None;
                return;
            }
            Ok(task) => {
                drop(state);
                claims.perform(task);
            }
            Err(wait) => {
                drop(helm);
                state.claims_idle = true;
                state.claims_until = Some(Instant::now() + wait);
                state = shared
                    .claims_wake
                    .wait_timeout(state, wait)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
                state.claims_idle = false;
                state.claims_until = None;
            }
        }
    }
}

/// Redis has told of a change in queues that were empty: does at once what is to be done at once, on the thread that was told.
/// Where the claims thread is at the helm, it is left to that.
pub(crate) fn answer_alarm(shared: &Shared) {
    shared.state().alarm = true;
    let Ok(mut helm) = shared.helm.try_lock() else { return };
    let Some(claims) = helm.as_mut() else { return };
    loop {
        let mut state = shared.state();
        match claims.next_task(&mut state) {
            Ok(Task::Stop) => {
                shared.claims_wake.notify_one();
                return;
            }
            Ok(task) => {
                // Nobody need wake the claims thread meanwhile.
                state.claims_idle = false;
                drop(state);
                claims.perform(task);
            }
            Err(wait) => {
                match state.claims_until {
                    Some(until) if until <= Instant::now() + wait => state.claims_idle = true,
                    // It would wake up too late.
                    Some(_) => shared.claims_wake.notify_one(),
                    None => {}
                }
                return;
            }
        }
    }
}

/// Sends what there is to send, for a thread that waits for the answer, without ever waiting itself: where the answer is there at once,
/// no other thread need wake up, neither for the turn nor for its answer. What remains is the claims thread's, which is to be nudged.
pub(crate) fn hurry(shared: &Shared) {
    let mut helm = match shared.helm.try_lock() {
        Ok(helm) => helm,
        Err(TryLockError::Poisoned(helm)) => helm.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    let Some(claims) = helm.as_mut() else { return };
    if catch_unwind(AssertUnwindSafe(|| claims.hurry())).is_err() {
        // A bug. The claims thread goes on with another connection: on this one there may be answers that nobody waits for.
        claims.start_anew();
    }
}

pub(crate) struct Claims {
    shared: Arc<Shared>,
    link: Link,
    turns: Turns,
    attempts: Attempts,
    /// The connection on which the last sweep was made, and when.
    swept: (u64, Instant),
    /// A sweep has been made for `leave`: what nobody holds should go back now, not when a lease has run out.
    swept_last: bool,
    /// What `leave` is to do: drawn up once, since it takes everything out of the registry.
    last_call: Option<LastCall>,
    /// The settlement of jobs whose threads have gone without an ack.
    settling: Option<Recovery>,
    settle: Attempts,
    watch: Watch,
    /// When claims were first found to be unwanted, and when to ask Redis again to end them.
    withdrawal: Option<(Instant, Instant)>,
    /// When the last turn was answered.
    turned: Option<Instant>,
    /// When there was first nothing left to do but to leave.
    leaving_since: Option<Instant>,
    /// Queues that nothing could be taken from, and since when. They are not looked at, since they are never empty.
    refused: Vec<(Vec<u8>, Instant)>,
}

/// How this instance learns that there is something in queues that were empty.
#[derive(Debug, Default)]
struct Watch {
    /// For which connection, and for which one that is told, Redis has been asked to tell of changes.
    asked: Option<(u64, i64)>,
    /// Redis does not do that, for these two.
    refused_for: Option<(u64, i64)>,
    /// The queues that were looked at and empty, and when; as long as nothing has been told of them.
    watched: Option<(BTreeSet<Arc<[u8]>>, Instant)>,
    /// Which server was looked at last.
    visit: Option<u64>,
    /// The turn that goes next was caused by a wake-up, and by nothing of this process's own.
    woken: bool,
    /// How long to be deaf at most, after the next wake-up in vain.
    deaf: Duration,
    deaf_until: Option<Instant>,
    /// How long it was from the last look to the next, where Redis tells of nothing.
    poll: Duration,
}

enum Task {
    Stop,
    Turn(String, Arc<Turn>),
    Sweep(String),
    Ride(String, Pace, Ride),
    Settle(String, Pace),
    Look(BTreeSet<Arc<[u8]>>, Option<i64>),
    Withdraw(Vec<Client>),
    Leave(String),
}

impl Claims {
    fn perform(&mut self, task: Task) {
        let outcome = match task {
            Task::Stop => return,
            Task::Turn(identity, turn) => self.turn(&identity, &turn),
            Task::Sweep(identity) => self.sweep(&identity),
            Task::Ride(identity, pace, ride) => match self.ride(&identity, pace, &ride) {
                Err(error @ Error::Connection(_)) => {
                    // It may have been dead for long: once more, if nobody has sent a beat by then.
                    self.shared.state().ride.get_or_insert(ride);
                    Err(error)
                }
                // Redis refuses a beat, on whichever link. That tells nothing of turns, which must get their chance.
                Err(Error::Refused(_)) => return,
                outcome => outcome,
            },
            Task::Settle(identity, pace) => self.settle(identity, pace),
            Task::Look(queues, told) => self.look(queues, told),
            Task::Withdraw(clients) => self.unblock(&clients),
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
    }

    /// What is to be done now, or how long to wait.
    fn next_task(&mut self, state: &mut State) -> std::result::Result<Task, Duration> {
        let now = Instant::now();
        if self.turns.has_begun() && !(state.registered && state.registry.is_outstanding()) {
            // Nobody waits for these answers any more, and nothing else may come before them.
            self.start_anew();
        }
        if matches!(state.phase, Phase::Left | Phase::Stopped) {
            Ok(Task::Stop)
        } else if !state.registered {
            // The control thread registers, or ends it all.
            Err(SWEEP_EVERY)
        } else if !self.attempts.is_due(now) {
            Err(self.attempts.at.map_or(LINGER, |at| at.saturating_duration_since(now)))
        } else {
            self.due(state, now)
        }
    }

    /// The same, where this instance is registered and the link works, as far as is known.
    fn due(&mut self, state: &mut State, now: Instant) -> std::result::Result<Task, Duration> {
        let identity = state.identity.clone();
        if self.turns.has_begun() {
            return Ok(Task::Turn(identity, state.registry.turn()));
        }
        if let Some(ride) = state.ride.take() {
            return Ok(Task::Ride(identity, state.pace, ride));
        }
        if self.last_call.is_some() {
            return Ok(Task::Leave(identity));
        }
        if state.registry.is_outstanding() {
            return Ok(Task::Turn(identity, state.registry.turn()));
        }
        if self.settling.is_none() {
            let dropped = state.registry.settle_dropped(now);
            self.settling = (!dropped.is_empty()).then(|| Recovery::own(&identity, dropped));
        }
        if self.settling.is_some() && self.settle.is_due(now) {
            return Ok(Task::Settle(identity, state.pace));
        }
        state.registry.give_back(now);
        if std::mem::take(&mut state.alarm) {
            self.watch.watched = None;
            self.watch.woken |= state.registry.idle_crews().next().is_some();
            state.registry.hope();
        }
        let mut wait = (self.swept.1 + SWEEP_EVERY).saturating_duration_since(now);
        let settles_at = match self.settling {
            Some(_) => self.settle.at,
            None => state.registry.settles_at(),
        };
        for at in [state.registry.gives_back_at(), settles_at].into_iter().flatten() {
            wait = wait.min(at.saturating_duration_since(now));
        }
        if wait.is_zero() || self.link.generation() != self.swept.0 || state.is_claims_down() {
            return Ok(Task::Sweep(identity));
        }
        let leaving = state.phase == Phase::Leaving;
        for slot in state.registry.slots.owing(now) {
            self.wake_slot(slot);
        }
        if let Some(at) = state.registry.slots.posts_at(now) {
            wait = wait.min(at.saturating_duration_since(now));
        }
        match self.withdraw(state, now) {
            Some(Ok(task)) => return Ok(task),
            Some(Err(pause)) => wait = wait.min(pause),
            None => {}
        }
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
        } else if leaving && self.awaits_claims(state, now) {
            return Err(wait.min(WITHDRAWN_WITHIN).max(LINGER));
        } else if leaving && self.swept_last {
            // Drawn up under the lock that says there is nothing else: what comes later comes too late for the process.
            let (last, waiters) = state.registry.last_call();
            self.last_call = Some(last);
            state.ended.extend(waiters);
            return Ok(Task::Leave(identity));
        } else if leaving {
            return Ok(Task::Sweep(identity));
        } else {
            for slot in state.registry.post_claims(now) {
                self.wake_slot(slot);
            }
            match self.next_look(state, now) {
                Some(Ok(task)) => return Ok(task),
                Some(Err(pause)) => wait = wait.min(pause),
                None => {}
            }
        }
        // In middleware mode: then acks need not wake this thread.
        if state.registry.crews().is_empty() && self.turned.is_some_and(|at| now.duration_since(at) < 2 * LINGER) {
            wait = wait.min(LINGER);
        }
        Err(wait)
    }

    /// Forgets what is known of the connection, and the connection.
    fn start_anew(&mut self) {
        self.turns = Turns::default();
        self.link.discard();
    }

    /// See the function of this name.
    fn hurry(&mut self) {
        // That of another thread may have begun before.
        let had_begun = self.turns.has_begun();
        if self.hurry_once() && had_begun {
            self.hurry_once();
        }
    }

    /// Answers whether a turn is done.
    fn hurry_once(&mut self) -> bool {
        let Some((identity, turn)) = self.turn_at_once(&mut self.shared.clone().state()) else {
            return false;
        };
        let keys = &self.shared.keys;
        let begun = if self.turns.has_begun() {
            Ok(())
        } else {
            self.turns.begin_at_once(&mut self.link, keys, &identity, &turn)
        };
        failpoint::reach("after_begin");
        match begun.and_then(|()| self.turns.end_at_once(&mut self.link, keys, &identity, &turn)) {
            Ok(Ended::Done(turned)) => {
                self.turned(&identity, turned);
                self.attempts.succeeded();
                self.shared.link_works(Side::Claims);
                true
            }
            Ok(Ended::NotYet | Ended::NotSo) => false,
            Err(_) => {
                // The claims thread sends it anew, by script, and tells of what fails then.
                self.turns.in_vain();
                self.link.discard();
                false
            }
        }
    }

    /// The turn to be sent now, where there is nothing else to be done before it.
    fn turn_at_once(&mut self, state: &mut State) -> Option<(String, Arc<Turn>)> {
        let is_ordinary = state.phase == Phase::Running
            && state.registered
            && state.ride.is_none()
            && self.last_call.is_none()
            && !state.is_claims_down()
            && !self.shared.settings.polls
            && self.link.generation() == self.swept.0
            && state.registry.crews().is_empty()
            && state.registry.is_outstanding() == self.turns.has_begun()
            && (self.turns.has_begun() || self.turns.may_begin(&self.link))
            && !state.registry.is_idle();
        is_ordinary.then(|| (state.identity.clone(), state.registry.turn()))
    }

    /// Whether a clean exit waits for claims: what they bring may go back yet, and what they have brought gets its token.
    fn awaits_claims(&mut self, state: &State, now: Instant) -> bool {
        let since = *self.leaving_since.get_or_insert(now);
        let awaits = |since: Instant| now < since + WITHDRAWN_WITHIN;
        let is_withdrawing = self.withdrawal.is_some_and(|(since, _)| awaits(since));
        is_withdrawing || state.registry.slots.have_brought() && awaits(since)
    }

    fn wake_slot(&self, slot: usize) {
        if let Some(wake) = self.shared.slot_wakes.get(slot) {
            wake.notify_one();
        }
    }

    /// Has Redis end the claims that wait there and are not wanted any more, if there are any.
    fn withdraw(&mut self, state: &mut State, now: Instant) -> Option<std::result::Result<Task, Duration>> {
        let rendezvous = &self.shared.settings.redis.rendezvous;
        state
            .registry
            .ignore_claims(|client| !rendezvous.is_current(client.visit));
        let clients = state.registry.unwanted_claims();
        if clients.is_empty() {
            self.withdrawal = None;
            return None;
        }
        let (since, at) = *self.withdrawal.get_or_insert((now, now));
        if now < at {
            return Some(Err(at - now));
        }
        if now - since > WITHDRAWN_WITHIN {
            // Redis has ended them, and the answers do not come.
            state.registry.ignore_claims(|client| clients.contains(&client));
        }
        // It may not have reached Redis yet.
        let pause = (now - since).clamp(LINGER, Duration::from_millis(100));
        self.withdrawal = Some((since, now + pause));
        Some(Ok(Task::Withdraw(clients)))
    }

    fn unblock(&mut self, clients: &[Client]) -> crate::Result<()> {
        self.link.connect()?;
        let here = self.link.visit();
        // Elsewhere the id would be another's.
        let ids = clients.iter().filter(|client| Some(client.visit) == here);
        match scripts::unblock(&mut self.link, &ids.map(|client| client.id).collect::<Vec<_>>()) {
            // A right that was there before. The claims end by themselves.
            Err(Error::Refused(_)) => {
                self.withdrawal = self.withdrawal.map(|(since, _)| (since, Instant::now() + LOOK_EVERY));
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// The engine ends without having left: what Redis would still give to its claims would lie there until its lease has run out.
    fn let_go(&mut self) {
        let mut state = self.shared.state();
        state.registry.slots.withdraw();
        let clients = state.registry.unwanted_claims();
        drop(state);
        if !clients.is_empty() {
            let _ = self.unblock(&clients);
        }
    }

    /// When to look at the queues that threads wait for, if there are any.
    fn next_look(&mut self, state: &mut State, now: Instant) -> Option<std::result::Result<Task, Duration>> {
        self.refused
            .retain(|(_, since)| now.duration_since(*since) < LOOK_EVERY);
        let mut queues: BTreeSet<Arc<[u8]>> = BTreeSet::new();
        let rendezvous = &self.shared.settings.redis.rendezvous;
        for (number, crew) in state.registry.idle_crews() {
            let is_covered = |queue: &[u8]| {
                state
                    .registry
                    .slots
                    .covers(number, queue, |visit| rendezvous.is_current(visit))
            };
            queues.extend(crew.plan.queues().filter(|queue| !is_covered(queue)).cloned());
        }
        queues.retain(|queue| !self.refused.iter().any(|(refused, _)| **refused == **queue));
        if state.unclaimed.note(!queues.is_empty(), now) {
            self.watch.poll = Duration::ZERO;
            self.shared.alarm_wake.notify_all();
        }
        if queues.is_empty() {
            return self
                .refused
                .first()
                .map(|(_, since)| Err((*since + LOOK_EVERY).saturating_duration_since(now)));
        }
        let generation = self.link.generation();
        let told = state
            .told
            .filter(|id| self.watch.refused_for != Some((generation, *id)));
        let at = match (&self.watch.watched, told) {
            (Some((watched, at)), Some(told))
                if queues.is_subset(watched) && self.watch.asked == Some((generation, told)) =>
            {
                Some(*at + LOOK_EVERY)
            }
            (_, Some(_)) => self.watch.deaf_until,
            (Some((watched, at)), None) if queues.is_subset(watched) => Some(*at + self.watch.poll),
            (_, None) => self.watch.deaf_until,
        };
        Some(match at.filter(|at| *at > now) {
            Some(at) => Err(at.saturating_duration_since(now)),
            None => Ok(Task::Look(queues, told)),
        })
    }

    /// Looks whether there is anything in these queues, and asks Redis to tell when there is.
    fn look(&mut self, queues: BTreeSet<Arc<[u8]>>, told: Option<i64>) -> crate::Result<()> {
        // What is told from here on is about this look or a later one.
        self.shared.state().alarm = false;
        self.link.connect()?;
        if std::mem::replace(&mut self.watch.visit, self.link.visit()) != self.link.visit() {
            // It may listen to another server.
            self.shared.ring_wake_bell();
        }
        let generation = self.link.generation();
        let watched = matches!(&self.watch.watched, Some((watched, _)) if queues.is_subset(watched))
            && told.is_some_and(|id| self.watch.asked == Some((generation, id)));
        let mut commands = redis::pipe();
        if let Some(id) = told {
            if self.watch.asked != Some((generation, id)) {
                commands.cmd("CLIENT").arg("TRACKING").arg("OFF");
                commands
                    .cmd("CLIENT")
                    .arg("TRACKING")
                    .arg("ON")
                    .arg("REDIRECT")
                    .arg(id)
                    .arg("OPTIN");
            }
            commands.cmd("CLIENT").arg("CACHING").arg("YES");
        }
        commands.cmd("EXISTS");
        for queue in &queues {
            commands.arg(self.shared.keys.queue(queue));
        }
        let mut answers = self.link.pipeline(&commands)?;
        let exists = answers.pop();
        let watches = told.filter(|_| answers.iter().all(std::result::Result::is_ok));
        if let (Some(id), None) = (told, watches) {
            self.not_told(id, generation, &answers);
        }
        self.watch.asked = watches.map(|id| (self.link.generation(), id));
        let found = match exists {
            Some(Ok(redis::Value::Int(0))) => false,
            Some(Err(error)) => return Err(error.into()),
            _ => true,
        };
        if found {
            self.watch.woken = true;
            self.watch.watched = None;
            self.watch.poll = Duration::ZERO;
            let mut state = self.shared.state();
            state.registry.hope();
            if watched && self.link.generation() == generation && !state.alarm {
                // Redis should have told of it. The listening connection may be dead without a sign.
                state.distrusted = told;
                self.shared.ring_wake_bell();
            }
        } else {
            // A watch that began on another connection is none.
            self.watch.watched = Some((queues, Instant::now()));
            self.watch.poll = (self.watch.poll * 2).clamp(POLLS.0, POLLS.1);
        }
        Ok(())
    }

    /// Redis does not tell of changes. That is no matter where the listening connection has just gone, perhaps without a
    /// sign: then there is soon another.
    fn not_told(&mut self, id: i64, generation: u64, answers: &[redis::RedisResult<redis::Value>]) {
        let mut state = self.shared.state();
        if state.told == Some(id) && self.link.generation() == generation {
            self.watch.refused_for = Some((generation, id));
            state.alarm = false;
            if let Some(Err(error)) = answers.iter().find(|answer| answer.is_err()) {
                if error.detail().is_some_and(|detail| detail.contains("does not exist")) {
                    state.distrusted = Some(id);
                    self.shared.ring_wake_bell();
                    return;
                }
                drop(state);
                let error: Error = error.clone().into();
                self.shared.warn_once(
                    "tracking",
                    format!("Redis does not tell of new jobs, so it is asked from time to time: {error}"),
                );
            }
        }
    }

    /// A claim was answered. Who was woken in vain is deaf for a while: with each wake-up of many instances one job is
    /// taken, and all others have asked for nothing.
    fn weigh_claim(&mut self, asked: usize, claimed: usize, instances: u64) {
        let woken = std::mem::take(&mut self.watch.woken);
        if claimed > 0 {
            self.watch.deaf = Duration::ZERO;
            self.watch.deaf_until = None;
        } else if asked > 0 && woken && instances > HEARING {
            let most = DEAF.saturating_mul(u32::try_from(instances).unwrap_or(u32::MAX));
            self.watch.deaf = (self.watch.deaf * 2).clamp(DEAF, most);
            self.watch.deaf_until = Some(Instant::now() + self.watch.deaf.mul_f64(0.5 + 0.5 * identity::jitter()));
        }
    }

    fn turn(&mut self, identity: &str, turn: &Turn) -> crate::Result<()> {
        failpoint::reach("before_turn");
        let shared = &self.shared;
        let plain = shared.settings.polls;
        let turned = self.turns.send(&mut self.link, &shared.keys, identity, turn, plain)?;
        if let Some(error) = self.turns.refusal() {
            shared.warn_once(
                "transactions",
                format!("Redis refuses transactions, so each turn is a script, which costs it up to three times as much: {error}"),
            );
        }
        failpoint::reach("after_turn");
        self.turned(identity, turned);
        Ok(())
    }

    /// A turn is answered.
    fn turned(&mut self, identity: &str, turned: Turned) {
        self.turned = Some(Instant::now());
        match turned {
            Turned::Done(done) => {
                let (mut remarks, instances) = {
                    let mut state = self.shared.state();
                    if !state.is(identity) {
                        return;
                    }
                    (state.registry.answered(done, Instant::now()), state.instances)
                };
                std::mem::take(&mut remarks.called).ring();
                self.weigh_claim(remarks.asked, remarks.claimed, instances);
                let now = Instant::now();
                self.refused.retain(|(queue, _)| !remarks.refused.contains(queue));
                self.refused
                    .extend(remarks.refused.iter().map(|queue| (queue.clone(), now)));
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
    }

    fn sweep(&mut self, identity: &str) -> crate::Result<()> {
        let fields = scripts::fields(&mut self.link, &self.shared.keys, identity)?;
        let hands = scripts::hands(&mut self.link, &self.shared.keys, identity)?;
        self.swept = (self.link.generation(), Instant::now());
        match fields {
            Fenced::Lost => self.shared.lose(identity),
            Fenced::Alive(fields) => {
                let mut state = self.shared.state();
                if state.is(identity) {
                    self.swept_last = state.phase == Phase::Leaving;
                    state.registry.sweep(fields);
                    state.registry.slots.reopen(hands);
                }
            }
        }
        Ok(())
    }

    /// The next step in the settlement of jobs whose threads have gone without an ack.
    fn settle(&mut self, identity: String, pace: Pace) -> crate::Result<()> {
        let Some(mut settling) = self.settling.take_if(|settling| settling.from() == identity.as_bytes()) else {
            // Of a lease before this one: others have those jobs.
            self.settling = None;
            return Ok(());
        };
        let shared = self.shared.clone();
        let reaper = Reaper {
            keys: shared.keys.clone(),
            by: identity,
            pace,
            hold: shared.settings.hold,
            policy: shared.settings.policy.clone(),
        };
        match settling.step(&mut self.link, &reaper, |event| shared.events.push(event)) {
            Ok(Progress::More) => {
                self.settle.succeeded();
                self.settling = Some(settling);
            }
            Ok(Progress::Done(report)) if report.idle => shared.lose(&reaper.by),
            Ok(Progress::Done(report)) => {
                self.settle.succeeded();
                if let Some(leftovers) = report.own_leftovers(&reaper.keys, &reaper.by) {
                    shared.warn_once("own jobs", leftovers);
                }
                let mut state = shared.state();
                if state.is(&reaper.by) {
                    state.registry.settled(report.waiting, Instant::now());
                }
            }
            Err(error @ Error::Refused(_)) => {
                // What Redis refuses it may refuse for ever, and turns must go on meanwhile.
                self.link.discard();
                self.settling = Some(settling);
                if self.settle.failed(pace) {
                    shared.warn_once(
                        "own jobs",
                        format!("Jobs whose threads have gone can't be settled yet. They stay recorded: {error}"),
                    );
                }
            }
            Err(error) => {
                self.settling = Some(settling);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The beat that the control thread has asked to be sent here.
    fn ride(&mut self, identity: &str, pace: Pace, ride: &Ride) -> crate::Result<()> {
        failpoint::reach("before_ride");
        let (keys, sent) = (&self.shared.keys, Sent::now());
        let beat = scripts::beat(
            &mut self.link,
            keys,
            identity,
            pace,
            ride.progress,
            ride.host.as_deref(),
        )?;
        self.shared.beaten(Side::Claims, identity, sent, &beat);
        Ok(())
    }

    fn leave(&mut self, identity: &str) -> crate::Result<()> {
        let shared = self.shared.clone();
        let Some(last) = &self.last_call else {
            return Ok(());
        };
        failpoint::reach("before_leave");
        let indexes = shared.state().indexes.clone();
        let left = scripts::leave(&mut self.link, &shared.keys, identity, &indexes, last)?;
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
