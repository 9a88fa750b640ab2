//! What this process holds: its jobs, and what it still has to tell Redis about them. Plain data, no threads.
//!
//! Each job has a handle, which it keeps for as long as it runs here, whatever becomes of its record in Redis.

use crate::crew::{Crew, Plan};
use crate::entry::Token;
use crate::events::LostJob;
use crate::parker::{Errand, Parker};
use crate::payload;
use crate::recovery::Dropped;
use crate::scripts::{Closing, Done, Known, LastCall, Opening, Recorded, Requeue, Turn, SMALL};
use crate::slots::{Brought, Client, Order, Slots};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A job of this process.
pub type Handle = u64;

/// How many jobs of a kind one turn carries at most, so that no call takes long. What is over goes into the next.
const BATCH: usize = 500;
/// How many bytes of payloads one turn carries, at least one payload.
const BATCH_BYTES: usize = 1 << 20;

#[derive(Debug)]
struct Job {
    queue: Vec<u8>,
    payload: Arc<[u8]>,
    record: Record,
    fate: Fate,
    waiter: Option<Arc<Parker>>,
    /// A turn of ours has taken it from its queue, not another fetcher.
    claimed: bool,
}

/// How a job stands in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Record {
    /// Not there; the next turn records it.
    Waiting,
    /// In the outstanding turn.
    Sent,
    /// There, in a hand. Its token is on its way.
    InHand,
    /// There.
    Kept(Token),
    /// It was there when this process lost its lease: now it is somebody else's.
    Lost,
}

/// What is to become of a job whose record is on its way.
#[derive(Debug, Clone)]
enum Fate {
    Running,
    Acked,
    Released,
    /// It goes back to its queue, and nobody waits for that.
    PutBack,
    Requeued(Arc<Parker>),
}

/// How a job stands in Redis, as far as its thread must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Its record is on its way.
    Awaited,
    /// Its record is there, or need not be there any more.
    Kept,
    /// Its record was there when the lease was lost: others have the job.
    Lost,
}

/// What a requeue can do for a job.
#[derive(Debug, Clone)]
pub enum Requeueing {
    /// It is taken care of when the parker is done.
    Under(Arc<Parker>),
    /// There is nothing to do: it is done, or somebody else's.
    Settled,
    /// It is in this process alone. The caller must take it back, and put it into its queue.
    Unrecorded,
}

/// A job that was claimed for a thread and is now its own.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What to call it.
    pub handle: Handle,
    /// The name of its queue.
    pub queue: Vec<u8>,
    /// The job.
    pub payload: Arc<[u8]>,
}

/// The jobs of this process.
#[derive(Debug, Default)]
pub struct Registry {
    jobs: HashMap<Handle, Job>,
    next: Handle,
    crews: Vec<Crew>,
    /// The claims that wait in Redis for jobs.
    pub slots: Slots,
    dice: Option<fastrand::Rng>,
    /// Redis keeps counters of jobs that were orphaned before, which an ack clears.
    counted: bool,
    /// The counters to clear with the next turn.
    counters: Vec<String>,
    /// The largest payload of late, in bytes.
    largest: usize,
    /// Records of jobs whose threads have gone without an ack: when each is to be settled, and whether it has waited for that.
    /// `None` for one that is being settled.
    dropped: HashMap<Token, Option<(Instant, bool)>>,
    /// Those whose records are not sent yet, in the order in which they came.
    waiting: BTreeSet<Handle>,
    acks: Vec<Token>,
    oldest_ack: Option<Instant>,
    requeues: Vec<(Requeue, Option<Arc<Parker>>)>,
    marks: Vec<String>,
    marked: BTreeSet<String>,
    /// Who waits for the marks that are not sent yet.
    mark_waiters: Vec<Arc<Parker>>,
    calls: u64,
    outstanding: Option<Outstanding>,
}

#[derive(Debug)]
struct Outstanding {
    turn: Arc<Turn>,
    records: Vec<Handle>,
    requeues: Vec<Option<Arc<Parker>>>,
    marks: Vec<Arc<Parker>>,
    /// Which crew each claim is for.
    claims: Vec<usize>,
}

/// What came out of an answered turn that somebody should know of.
#[derive(Debug, Default)]
pub struct Remarks {
    /// Queues under whose keys something else lies: their jobs could not be put back and stay in flight.
    pub stuck: Vec<Vec<u8>>,
    /// Queues that nothing can be taken from, for the same reason.
    pub refused: Vec<Vec<u8>>,
    /// How many jobs were asked for, and how many there were.
    pub asked: usize,
    /// See `asked`.
    pub claimed: usize,
    /// Whom to ring, when no lock is held any more.
    pub called: Calls,
}

/// Threads that are on their way and still to be rung.
#[derive(Debug, Default)]
pub struct Calls(Vec<Arc<Parker>>);

impl Calls {
    /// Rings them. Each will want the registry's lock at once.
    pub fn ring(self) {
        self.0.iter().for_each(|parker| parker.ring());
    }
}

impl Job {
    /// The job ends in this way, once its record has an answer. One that goes back to its queue does so whatever comes
    /// after: what runs on is nobody's business here any more, and somebody waits for it.
    fn end(&mut self, fate: Fate) {
        if !matches!(self.fate, Fate::Requeued(_) | Fate::PutBack) {
            self.fate = fate;
        }
    }
}

impl Registry {
    /// A job begins. `marked` is its class when the class has the mark and the payload has not.
    pub fn track(&mut self, queue: Vec<u8>, payload: Arc<[u8]>, marked: Option<String>) -> Handle {
        self.next += 1;
        self.jobs.insert(
            self.next,
            Job {
                queue,
                payload,
                record: Record::Waiting,
                fate: Fate::Running,
                waiter: None,
                claimed: false,
            },
        );
        self.waiting.insert(self.next);
        if let Some(class) = marked {
            if self.marked.insert(class.clone()) {
                self.marks.push(class);
            }
        }
        self.next
    }

    /// Threads that take from these queues will come. Answers what to call them.
    pub fn add_crew(&mut self, plan: Plan, seed: u64) -> usize {
        self.dice.get_or_insert_with(|| fastrand::Rng::with_seed(seed));
        self.crews.push(Crew::new(plan));
        self.crews.len() - 1
    }

    /// This crew may have claims that wait in Redis.
    pub fn add_slots(&mut self, crew: usize) {
        if let (Some(plan), Some(dice)) = (self.crews.get(crew), &mut self.dice) {
            self.slots.add(crew, plan, dice);
        }
    }

    /// Makes the claims that are to wait in Redis. Answers the slots that have something to do now.
    pub fn post_claims(&mut self, now: Instant) -> Vec<usize> {
        if self.largest > SMALL {
            // A script would copy them, where a turn moves them from list to list.
            return Vec::new();
        }
        let busy = self.slots.post(&self.crews, now);
        self.slots.count_for(&mut self.crews);
        busy
    }

    /// The connections whose claims are not wanted any more.
    pub fn unwanted_claims(&mut self) -> Vec<Client> {
        self.slots.unwanted(&self.crews)
    }

    /// Whether there are any.
    #[must_use]
    pub fn has_unwanted_claims(&self) -> bool {
        self.crews.iter().any(|crew| crew.surplus_claims() > 0)
    }

    /// Waits no more for the claims on these connections.
    pub fn ignore_claims(&mut self, which: impl Fn(Client) -> bool) {
        self.slots.ignore(which);
        self.slots.count_for(&mut self.crews);
    }

    /// The claim of a slot is answered, perhaps with a job. `goes_on`: it may make another one at once. `reader`: the parker of a thread
    /// that has read the answer itself. It is told of a job, if there is one, and need not be rung.
    pub fn claim_answered(
        &mut self,
        slot: usize,
        brought: Option<Vec<u8>>,
        goes_on: bool,
        reader: Option<&Parker>,
        now: Instant,
    ) -> Calls {
        let mut calls = Calls::default();
        let Some(number) = self.slots.answered(slot) else {
            return calls;
        };
        if let Some(payload) = brought {
            self.brought(slot, number, payload, reader, now, &mut calls);
        }
        if goes_on && self.largest <= SMALL {
            self.slots.claim_again(slot, &self.crews);
        }
        self.slots.count_for(&mut self.crews);
        calls
    }

    fn brought(
        &mut self,
        slot: usize,
        number: usize,
        payload: Vec<u8>,
        reader: Option<&Parker>,
        now: Instant,
        calls: &mut Calls,
    ) {
        self.largest = self.largest.max(payload.len());
        let queue = self
            .slots
            .queue_of(slot)
            .map(|queue| queue.to_vec())
            .unwrap_or_default();
        let handle = self.insert(queue, payload, Record::InHand);
        let has_others = self.slots.brought(slot, handle);
        match self.crews.get_mut(number) {
            Some(crew) if !crew.is_quiet() => {
                crew.add(handle);
                // Where two come at once there are mostly more.
                crew.dry &= !has_others;
                if !reader.is_some_and(|reader| crew.tell(reader)) {
                    calls.0.extend(crew.call());
                }
                crew.weigh(now);
            }
            _ => self.put_ready_back(vec![handle]),
        }
    }

    /// What a slot had in its hand is recorded; or it is not there any more.
    pub fn took(&mut self, slot: usize, recorded: Option<Recorded>, now: Instant) {
        let Some(handle) = self.slots.took(slot) else { return };
        let Some(recorded) = recorded else {
            self.vanished(handle);
            return;
        };
        self.counted = recorded.counted;
        if let Some(crew) = self.slots.crew_of(slot).and_then(|crew| self.crews.get_mut(crew)) {
            crew.dry &= !recorded.more;
        }
        self.recorded(handle, recorded.token, now);
    }

    /// A slot has a new connection. Answers what is to be done for that.
    pub fn renew_slot(&mut self, slot: usize) -> Option<Opening> {
        let hand = self.slots.renew(slot)?;
        let old = self.slots.old(slot);
        let old = old.map(|(number, brought)| (number, brought.and_then(|brought| self.known(brought))));
        Some(Opening {
            hand,
            old: old.collect(),
        })
    }

    fn known(&self, brought: Brought) -> Option<Known> {
        Some(Known {
            index: brought.index,
            sha1: payload::sha1(&self.jobs.get(&brought.handle)?.payload),
        })
    }

    /// A slot has closed its old hands, and this is what it had there.
    pub fn closed(&mut self, slot: usize, closings: Vec<Closing>, now: Instant) {
        for (handle, token) in self.slots.closed(slot, closings) {
            match token {
                Some(token) => self.recorded(handle, token, now),
                None => self.vanished(handle),
            }
        }
    }

    /// What a claim has brought is not in its hand any more: Redis has lost that, and with it the claim. So the job lies in its queue
    /// again, for others.
    fn vanished(&mut self, handle: Handle) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        if let Fate::Running = job.fate {
            job.record = Record::Lost;
            return;
        }
        if let Fate::Requeued(parker) = &job.fate {
            parker.unpark();
        }
        self.jobs.remove(&handle);
    }

    /// Has a thread that waits for a job of this slot's crew do this meanwhile. Answers it where none has the time.
    pub(crate) fn lend(&self, slot: usize, errand: Box<dyn Errand>) -> Option<Box<dyn Errand>> {
        let crew = self.slots.crew_of(slot).and_then(|crew| self.crews.get(crew));
        match crew {
            Some(crew) => crew.lend(errand),
            None => Some(errand),
        }
    }

    /// What a slot is to do now.
    pub fn slot_order(&mut self, slot: usize) -> Option<Order> {
        let order = self.slots.order(slot);
        self.slots.count_for(&mut self.crews);
        order
    }

    /// A slot has lost its connection, or has none yet.
    pub fn slot_failed(&mut self, slot: usize, rests_until: Option<Instant>) {
        self.slots.failed(slot, rests_until);
        self.slots.count_for(&mut self.crews);
    }

    /// A slot has a connection, but Redis refuses its claims.
    pub fn slot_rests(&mut self, slot: usize, until: Instant) {
        self.slots.rests(slot, until);
        self.slots.count_for(&mut self.crews);
    }

    /// A claimed job.
    fn insert(&mut self, queue: Vec<u8>, payload: Vec<u8>, record: Record) -> Handle {
        self.next += 1;
        let job = Job {
            queue,
            payload: payload.into(),
            record,
            fate: Fate::Running,
            waiter: None,
            claimed: true,
        };
        self.jobs.insert(self.next, job);
        self.next
    }

    /// The crews.
    #[must_use]
    pub fn crews(&self) -> &[Crew] {
        &self.crews
    }

    /// Takes a job that was claimed for this crew.
    pub fn take(&mut self, crew: usize, now: Instant) -> Option<Taken> {
        let handle = self.crews.get_mut(crew)?.take(now)?;
        let job = self.jobs.get(&handle)?;
        Some(Taken {
            handle,
            queue: job.queue.clone(),
            payload: job.payload.clone(),
        })
    }

    /// Whether there is a job to take.
    #[must_use]
    pub fn has_ready(&self, crew: usize) -> bool {
        self.crews.get(crew).is_some_and(Crew::has_ready)
    }

    /// Sends the threads of this crew away.
    pub fn dismiss(&mut self, crew: usize) {
        for parker in self.crews.get_mut(crew).map(Crew::dismiss).unwrap_or_default() {
            parker.unpark();
        }
    }

    /// A thread of this crew waits for a job.
    pub fn wait(&mut self, crew: usize, parker: Arc<Parker>) {
        if let Some(crew) = self.crews.get_mut(crew) {
            crew.wait(parker);
        }
    }

    /// A thread of this crew waits no more.
    pub fn stop_waiting(&mut self, crew: usize, parker: &Arc<Parker>, now: Instant) {
        if let Some(crew) = self.crews.get_mut(crew) {
            crew.stop_waiting(parker, now);
        }
    }

    /// A thread of this crew has been woken, and waits no more.
    pub fn arrive(&mut self, crew: usize, parker: &Arc<Parker>) {
        if let Some(crew) = self.crews.get_mut(crew) {
            crew.arrive(parker);
        }
    }

    /// Claims no job any more for this crew. What is claimed and not taken goes back.
    pub fn be_quiet(&mut self, crew: usize) {
        let ready = self.crews.get_mut(crew).map(Crew::be_quiet).unwrap_or_default();
        self.put_ready_back(ready);
    }

    /// Jobs that are claimed and that nobody waits for go back, if they have lain there for too long.
    pub fn give_back(&mut self, now: Instant) {
        let surplus: Vec<Handle> = self.crews.iter_mut().flat_map(|crew| crew.give_back(now)).collect();
        self.put_ready_back(surplus);
    }

    /// When `give_back` is to be called.
    #[must_use]
    pub fn gives_back_at(&self) -> Option<Instant> {
        self.crews.iter().filter_map(Crew::gives_back_at).min()
    }

    /// The newest first: each goes to the end that Sidekiq takes from.
    fn put_ready_back(&mut self, mut handles: Vec<Handle>) {
        handles.sort_unstable_by_key(|handle| std::cmp::Reverse(*handle));
        for handle in handles {
            match self.jobs.get_mut(&handle) {
                Some(job) if job.record == Record::InHand => job.end(Fate::PutBack),
                _ => {
                    if let Some(Record::Kept(token)) = self.jobs.remove(&handle).map(|job| job.record) {
                        self.requeues.push((Requeue::Recorded(token), None));
                    }
                }
            }
        }
    }

    /// Whether threads wait for jobs that should be claimed at once.
    #[must_use]
    pub fn is_hungry(&self) -> bool {
        self.crews.iter().any(Crew::is_hungry)
    }

    /// The crews whose threads wait for something to come into empty queues, and what they are called.
    pub fn idle_crews(&self) -> impl Iterator<Item = (usize, &Crew)> {
        self.crews.iter().enumerate().filter(|(_, crew)| crew.is_idle())
    }

    /// Whether this crew is one of those.
    #[must_use]
    pub fn is_idle_crew(&self, crew: usize) -> bool {
        self.crews.get(crew).is_some_and(Crew::is_idle)
    }

    /// There may be jobs in queues that were found empty.
    pub fn hope(&mut self) {
        for crew in &mut self.crews {
            crew.dry = false;
        }
    }

    /// A class is marked though its payloads do not say so. Where that is news to Redis, a parker that is done when
    /// it has been told.
    pub fn mark(&mut self, class: String) -> Option<Arc<Parker>> {
        if self.marked.insert(class.clone()) {
            self.marks.push(class);
        } else if self.marks.is_empty() && self.outstanding.as_ref().is_none_or(|turn| turn.marks.is_empty()) {
            return None;
        }
        let parker = Parker::new();
        self.mark_waiters.push(parker.clone());
        Some(parker)
    }

    /// The jobs whose threads have gone without an ack and that are to be settled now.
    pub fn settle_dropped(&mut self, now: Instant) -> Vec<Dropped> {
        let mut due = Vec::new();
        for (token, at) in &mut self.dropped {
            if let Some((_, waited)) = at.take_if(|(at, _)| *at <= now) {
                due.push(Dropped {
                    token: token.clone(),
                    ran: true,
                    waited,
                });
            }
        }
        due
    }

    /// When `settle_dropped` is to be called.
    #[must_use]
    pub fn settles_at(&self) -> Option<Instant> {
        self.dropped.values().flatten().map(|(at, _)| *at).min()
    }

    /// Those that were to be settled are, but for these, which have to wait.
    pub fn settled(&mut self, waiting: Vec<(Token, Duration)>, now: Instant) {
        self.dropped.retain(|_, at| at.is_some());
        for (token, wait) in waiting {
            self.dropped.insert(token, Some((now + wait, true)));
        }
    }

    fn drop_record(&mut self, token: Token, now: Instant) {
        self.dropped.insert(token, Some((now, false)));
    }

    /// How a job stands in Redis.
    #[must_use]
    pub fn standing(&self, handle: Handle) -> Standing {
        match self.jobs.get(&handle).map(|job| &job.record) {
            Some(Record::Waiting | Record::Sent) => Standing::Awaited,
            Some(Record::Lost) => Standing::Lost,
            Some(Record::Kept(_) | Record::InHand) | None => Standing::Kept,
        }
    }

    /// Wakes `parker` when the job is in Redis.
    pub fn wake_when_recorded(&mut self, handle: Handle, parker: Arc<Parker>) {
        if let Some(job) = self.jobs.get_mut(&handle) {
            job.waiter = Some(parker);
        }
    }

    /// The job is done.
    pub fn ack(&mut self, handle: Handle, now: Instant) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        match &job.record {
            Record::Sent | Record::InHand => job.end(Fate::Acked),
            Record::Kept(token) => {
                let token = token.clone();
                self.jobs
                    .remove(&handle)
                    .into_iter()
                    .for_each(|job| self.clear_counter(&job));
                self.queue_ack(token, now);
            }
            Record::Waiting | Record::Lost => self.forget(handle),
        }
    }

    /// A job that was orphaned before has come to its end: it is innocent.
    fn clear_counter(&mut self, job: &Job) {
        if self.counted {
            let facts = payload::read(&job.payload);
            self.counters.push(payload::counted_as(&facts, &job.payload));
        }
    }

    /// The job's thread has gone without an ack. What is recorded is an orphan in a living process, and is settled like
    /// any other; a job without a record is put back at once.
    pub fn release(&mut self, handle: Handle, now: Instant) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        match &job.record {
            Record::Sent | Record::InHand => job.end(Fate::Released),
            Record::Waiting => self.put_back(handle),
            Record::Kept(token) => {
                let token = token.clone();
                self.drop_record(token, now);
                self.forget(handle);
            }
            Record::Lost => self.forget(handle),
        }
    }

    fn forget(&mut self, handle: Handle) {
        self.jobs.remove(&handle);
        self.waiting.remove(&handle);
    }

    /// Queues a job without a record to go back.
    fn put_back(&mut self, handle: Handle) {
        self.waiting.remove(&handle);
        if let Some(job) = self.jobs.remove(&handle) {
            let requeue = Requeue::Unrecorded {
                queue: job.queue,
                payload: job.payload,
            };
            self.requeues.push((requeue, None));
        }
    }

    /// The job goes back to its queue.
    pub fn requeue(&mut self, handle: Handle) -> Requeueing {
        let Some(job) = self.jobs.get_mut(&handle) else {
            return Requeueing::Settled;
        };
        match &job.record {
            Record::Waiting => {
                self.waiting.remove(&handle);
                Requeueing::Unrecorded
            }
            Record::Sent | Record::InHand => {
                let parker = match &job.fate {
                    Fate::Requeued(parker) => parker.clone(),
                    _ => Parker::new(),
                };
                job.fate = Fate::Requeued(parker.clone());
                Requeueing::Under(parker)
            }
            Record::Kept(token) => {
                let parker = Parker::new();
                self.requeues
                    .push((Requeue::Recorded(token.clone()), Some(parker.clone())));
                // What runs on is nobody's business here any more: an ack that still comes must not take the job away.
                self.jobs.remove(&handle);
                Requeueing::Under(parker)
            }
            Record::Lost => {
                self.jobs.remove(&handle);
                Requeueing::Settled
            }
        }
    }

    /// The caller of `requeue` has waited long enough. Whether it must put the job back: one without a record, or whose
    /// record never got an answer, is its own again.
    pub fn take_back(&mut self, handle: Handle) -> bool {
        let unrecorded = matches!(
            self.jobs.get(&handle),
            Some(Job {
                record: Record::Sent | Record::Waiting,
                ..
            })
        );
        if unrecorded {
            self.forget(handle);
        }
        unrecorded
    }

    /// The caller of `requeue` has gone in the middle of it, and will not take the job back: it is put back from here.
    pub fn abandon(&mut self, handle: Handle) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        match &job.record {
            Record::Waiting => self.put_back(handle),
            Record::Sent | Record::InHand => job.fate = Fate::PutBack,
            Record::Kept(_) | Record::Lost => {}
        }
    }

    fn queue_ack(&mut self, token: Token, now: Instant) {
        self.acks.push(token);
        self.oldest_ack.get_or_insert(now);
    }

    /// Since when an ack has been waiting.
    #[must_use]
    pub fn oldest_ack(&self) -> Option<Instant> {
        self.oldest_ack
    }

    /// Whether something waits that a thread waits for.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        !self.requeues.is_empty() || !self.waiting.is_empty() || !self.marks.is_empty() || self.is_hungry()
    }

    /// Whether a turn waits for its answer.
    #[must_use]
    pub fn is_outstanding(&self) -> bool {
        self.outstanding.is_some()
    }

    /// Whether there is nothing left to tell Redis.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.outstanding.is_none() && self.acks.is_empty() && !self.is_urgent()
    }

    /// The turn to send: the outstanding one, else a new one with what has gathered.
    pub fn turn(&mut self) -> Arc<Turn> {
        if let Some(outstanding) = &self.outstanding {
            return outstanding.turn.clone();
        }
        self.calls += 1;
        let mut turn = Turn {
            call: self.calls,
            acks: split(&mut self.acks, BATCH),
            counters: split(&mut self.counters, BATCH),
            marks: std::mem::take(&mut self.marks),
            ..Turn::default()
        };
        if self.acks.is_empty() {
            self.oldest_ack = None;
        }
        let mut requeues = Vec::new();
        for (requeue, waiter) in split(&mut self.requeues, BATCH) {
            turn.requeues.push(requeue);
            requeues.push(waiter);
        }
        let (mut records, mut bytes, mut later) = (Vec::new(), 0, BTreeSet::new());
        for handle in std::mem::take(&mut self.waiting) {
            let Some(job) = self.jobs.get_mut(&handle) else {
                continue;
            };
            if records.len() == BATCH || bytes >= BATCH_BYTES {
                later.insert(handle);
                continue;
            }
            job.record = Record::Sent;
            bytes += job.payload.len();
            turn.records.push((job.queue.clone(), job.payload.clone()));
            records.push(handle);
        }
        self.waiting = later;
        let claims = self.claim(&mut turn);
        let turn = Arc::new(turn);
        self.outstanding = Some(Outstanding {
            turn: turn.clone(),
            records,
            requeues,
            marks: std::mem::take(&mut self.mark_waiters),
            claims,
        });
        turn
    }

    /// A job for each thread that waits, never more: what is claimed here cannot be claimed by a process that has time.
    fn claim(&mut self, turn: &mut Turn) -> Vec<usize> {
        let mut claims = Vec::new();
        let Some(dice) = self.dice.as_mut() else {
            return claims;
        };
        turn.large = (self.largest > SMALL).then_some(self.largest);
        for (number, crew) in self.crews.iter_mut().enumerate().filter(|(_, crew)| !crew.dry) {
            let wanted = crew.wanted_now().min(BATCH - claims.len());
            turn.claims.extend(crew.plan.claims(wanted, dice));
            crew.claimed += wanted;
            claims.resize(claims.len() + wanted, number);
        }
        claims
    }

    /// What was claimed. A crew that got less than it asked for knows that its queues are empty, unless the answer was cut
    /// or some were not tried.
    fn claimed(
        &mut self,
        outstanding: &Outstanding,
        mut claimed: Vec<(Token, Vec<u8>)>,
        untried: bool,
        now: Instant,
    ) -> Calls {
        let (claims, records) = (&outstanding.claims, outstanding.records.len());
        // A repeated turn answers in any order.
        claimed.sort_by_key(|(token, _)| token.order());
        for number in claims {
            self.crews[*number].claimed -= 1;
        }
        let mut bytes = 0;
        let mut missing: Vec<usize> = vec![0; self.crews.len()];
        claims.iter().for_each(|number| missing[*number] += 1);
        let mut back = Vec::new();
        for (token, payload) in claimed {
            // As the script has counted them.
            bytes += match outstanding.turn.large {
                Some(large) if token.has_list() => large,
                _ => payload.len(),
            };
            self.largest = self.largest.max(payload.len());
            let place = usize::try_from(token.index())
                .ok()
                .and_then(|index| index.checked_sub(records + 1));
            let handle = self.insert(token.queue().to_vec(), payload, Record::Kept(token));
            match place.and_then(|place| claims.get(place)) {
                Some(number) if !self.crews[*number].is_quiet() => {
                    missing[*number] = missing[*number].saturating_sub(1);
                    self.crews[*number].add(handle);
                }
                _ => back.push(handle),
            }
        }
        self.largest -= self.largest / 16;
        self.put_ready_back(back);
        let mut calls = Vec::new();
        for (crew, missing) in self.crews.iter_mut().zip(missing) {
            crew.dry |= missing > 0 && bytes < BATCH_BYTES && !untried;
            calls.extend(crew.call());
            crew.weigh(now);
        }
        Calls(calls)
    }

    /// The outstanding turn is done.
    pub fn answered(&mut self, done: Done, now: Instant) -> Remarks {
        let mut remarks = Remarks {
            refused: done.refused,
            claimed: done.claimed.len(),
            ..Remarks::default()
        };
        self.counted = done.counted;
        let Some(outstanding) = self.outstanding.take() else {
            return remarks;
        };
        remarks.asked = outstanding.claims.len();
        for token in done.vain {
            self.queue_ack(token, now);
        }
        outstanding.marks.iter().for_each(|parker| parker.unpark());
        remarks.called = self.claimed(&outstanding, done.claimed, done.untried, now);
        for (position, waiter) in outstanding.requeues.into_iter().enumerate() {
            if done.undone.contains(&position) {
                remarks.stuck.push(match &outstanding.turn.requeues[position] {
                    Requeue::Recorded(token) => token.queue().to_vec(),
                    Requeue::Unrecorded { queue, .. } => queue.clone(),
                });
            }
            if let Some(parker) = waiter {
                parker.unpark();
            }
        }
        let mut tokens: HashMap<u64, Token> = done.recorded.into_iter().map(|token| (token.index(), token)).collect();
        for (index, handle) in (1..).zip(outstanding.records) {
            match tokens.remove(&index) {
                Some(token) => self.recorded(handle, token, now),
                None => self.unrecorded(handle),
            }
        }
        remarks
    }

    fn recorded(&mut self, handle: Handle, token: Token, now: Instant) {
        let Some(job) = self.jobs.get_mut(&handle) else {
            // Given up meanwhile, by a caller that has put the job back itself.
            self.queue_ack(token, now);
            return;
        };
        if let Some(waiter) = job.waiter.take() {
            waiter.unpark();
        }
        match job.fate.clone() {
            Fate::Running => job.record = Record::Kept(token),
            Fate::Acked => {
                self.jobs
                    .remove(&handle)
                    .into_iter()
                    .for_each(|job| self.clear_counter(&job));
                self.queue_ack(token, now);
            }
            Fate::Released => {
                self.jobs.remove(&handle);
                self.drop_record(token, now);
            }
            Fate::PutBack => {
                self.jobs.remove(&handle);
                self.requeues.push((Requeue::Recorded(token), None));
            }
            Fate::Requeued(parker) => {
                self.jobs.remove(&handle);
                self.requeues.push((Requeue::Recorded(token), Some(parker)));
            }
        }
    }

    /// The record of a job is not there, though it was sent. A job that still runs gets another one.
    fn unrecorded(&mut self, handle: Handle) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        match job.fate.clone() {
            Fate::Running => {
                job.record = Record::Waiting;
                self.waiting.insert(handle);
            }
            Fate::Acked => {
                self.jobs.remove(&handle);
            }
            Fate::Released | Fate::PutBack => self.put_back(handle),
            // Its caller finds it without a record, and takes it back.
            Fate::Requeued(parker) => {
                job.record = Record::Waiting;
                parker.unpark();
            }
        }
    }

    /// The lease is lost: what was recorded is somebody else's now, what was not is recorded anew under the next
    /// identity. Answers the jobs that are lost but run on here.
    pub fn lose(&mut self) -> Vec<LostJob> {
        self.acks.clear();
        self.oldest_ack = None;
        self.counters.clear();
        self.dropped.clear();
        self.slots.lose();
        for handle in self.crews.iter_mut().flat_map(Crew::clear).collect::<Vec<_>>() {
            self.jobs.remove(&handle);
        }
        for crew in &mut self.crews {
            crew.claimed = 0;
            crew.dry = false;
        }
        let mut kept = Vec::new();
        for (requeue, waiter) in std::mem::take(&mut self.requeues) {
            self.after_loss(requeue, waiter, &mut kept);
        }
        if let Some(outstanding) = self.outstanding.take() {
            for (requeue, waiter) in outstanding.turn.requeues.iter().cloned().zip(outstanding.requeues) {
                self.after_loss(requeue, waiter, &mut kept);
            }
            for handle in outstanding.records {
                self.unrecorded(handle);
            }
            self.mark_waiters.extend(outstanding.marks);
        }
        // Not instead of what is there by now: a job whose thread has gone while its record was on its way.
        kept.append(&mut self.requeues);
        self.requeues = kept;
        self.marks = self.marked.iter().cloned().collect();
        let is_over = |job: &Job| job.record == Record::InHand && !matches!(job.fate, Fate::Running);
        let over: Vec<Handle> = self
            .jobs
            .iter()
            .filter(|(_, job)| is_over(job))
            .map(|(handle, _)| *handle)
            .collect();
        over.into_iter().for_each(|handle| self.vanished(handle));
        let mut lost = Vec::new();
        for job in self.jobs.values_mut() {
            if matches!(job.record, Record::Kept(_) | Record::InHand) {
                job.record = Record::Lost;
                lost.push(LostJob {
                    queue: job.queue.clone(),
                    payload: job.payload.clone(),
                });
            }
        }
        lost
    }

    /// A recorded job is put back by the one who recovers it. One without a record is with this process alone.
    fn after_loss(
        &self,
        requeue: Requeue,
        waiter: Option<Arc<Parker>>,
        kept: &mut Vec<(Requeue, Option<Arc<Parker>>)>,
    ) {
        match requeue {
            Requeue::Recorded(_) => {
                if let Some(parker) = waiter {
                    parker.unpark();
                }
            }
            Requeue::Unrecorded { .. } => kept.push((requeue, waiter)),
        }
    }

    /// Compares what Redis has with what this process holds; only while no turn is outstanding, whose tokens would look
    /// like nobody's. A record that nobody holds goes back to its queue. A missing one is made again, but not that of a
    /// claimed job: it was lost together with the claim, so that job lies in its queue again.
    pub fn sweep(&mut self, fields: Vec<Vec<u8>>) {
        if self.outstanding.is_some() {
            return;
        }
        let found: HashSet<Token> = fields.into_iter().filter_map(Token::read).collect();
        let mut held: HashSet<&Token> = self.acks.iter().chain(self.dropped.keys()).collect();
        held.extend(self.requeues.iter().filter_map(|(requeue, _)| match requeue {
            Requeue::Recorded(token) => Some(token),
            Requeue::Unrecorded { .. } => None,
        }));
        let mut missing = Vec::new();
        for (handle, job) in &self.jobs {
            if let Record::Kept(token) = &job.record {
                if !job.claimed && !found.contains(token) {
                    missing.push(*handle);
                }
                held.insert(token);
            }
        }
        let is_held = |token: &Token| held.contains(token) || self.slots.may_hold(token);
        let mut nobodys: Vec<Token> = found.iter().filter(|token| !is_held(token)).cloned().collect();
        // The newest first: each goes to the end that Sidekiq takes from.
        nobodys.sort_by_key(|token| std::cmp::Reverse(token.order()));
        self.requeues
            .extend(nobodys.into_iter().map(|token| (Requeue::Recorded(token), None)));
        for handle in missing {
            if let Some(job) = self.jobs.get_mut(&handle) {
                job.record = Record::Waiting;
                self.waiting.insert(handle);
            }
        }
    }

    /// For a clean exit, when the registry is idle: the acks that are left, and the records of jobs whose threads have gone. And who
    /// waits for that.
    pub fn last_call(&mut self) -> (LastCall, Vec<Arc<Parker>>) {
        let is_done = |handle: &Handle| matches!(self.jobs.get(handle).map(|job| &job.fate), Some(Fate::Acked));
        let done = self.slots.in_hand().filter(|(_, brought)| is_done(&brought.handle));
        let acks_in_hand = done.filter_map(|(hand, brought)| Some((hand, self.known(brought)?)));
        let acks_in_hand = acks_in_hand.collect();
        let waiters = self.requeue_waiters();
        let mut held: Vec<Token> = Vec::new();
        // A slot that connects meanwhile must still know what is in its hands.
        self.jobs.retain(|_, job| {
            if let Record::Kept(token) = &job.record {
                held.push(token.clone());
            }
            job.record == Record::InHand
        });
        held.extend(self.dropped.drain().map(|(token, _)| token));
        held.sort_by_key(|token| std::cmp::Reverse(token.order()));
        self.oldest_ack = None;
        let last = LastCall {
            acks: std::mem::take(&mut self.acks),
            acks_in_hand,
            requeues: held,
            quiet: self.slots.quiet().collect(),
        };
        (last, waiters)
    }

    /// Classes whose jobs are marked though their payloads do not say so.
    pub fn marked(&self) -> impl Iterator<Item = &str> {
        self.marked.iter().map(String::as_str)
    }

    /// The parkers of those who wait for a record.
    pub fn record_waiters(&mut self) -> Vec<Arc<Parker>> {
        self.jobs.values_mut().filter_map(|job| job.waiter.take()).collect()
    }

    /// The parkers of all who wait, so that they can be sent away.
    pub fn waiters(&mut self) -> Vec<Arc<Parker>> {
        let mut waiters = self.record_waiters();
        waiters.append(&mut self.mark_waiters);
        waiters.extend(self.outstanding.iter_mut().flat_map(|turn| turn.marks.drain(..)));
        waiters.extend(self.crews.iter_mut().flat_map(Crew::dismiss));
        waiters.extend(self.requeue_waiters());
        waiters
    }

    fn requeue_waiters(&self) -> Vec<Arc<Parker>> {
        let waits = |job: &Job| match &job.fate {
            Fate::Requeued(parker) => Some(parker.clone()),
            _ => None,
        };
        self.jobs.values().filter_map(waits).collect()
    }
}

fn split<T>(from: &mut Vec<T>, most: usize) -> Vec<T> {
    let rest = from.split_off(from.len().min(most));
    std::mem::replace(from, rest)
}
