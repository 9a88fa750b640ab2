//! What this process holds: its jobs, and what it still has to tell Redis about them. Plain data, no threads.
//!
//! Each job has a handle, which it keeps for as long as it runs here, whatever becomes of its record in Redis.

use crate::entry::Token;
use crate::events::LostJob;
use crate::parker::Parker;
use crate::scripts::{Done, Requeue, Turn};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

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
}

/// How a job stands in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Record {
    /// Not there; the next turn records it.
    Waiting,
    /// In the outstanding turn.
    Sent,
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

/// The jobs of this process.
#[derive(Debug, Default)]
pub struct Registry {
    jobs: HashMap<Handle, Job>,
    next: Handle,
    /// Those whose records are not sent yet, in the order in which they came.
    waiting: BTreeSet<Handle>,
    acks: Vec<Token>,
    oldest_ack: Option<Instant>,
    requeues: Vec<(Requeue, Option<Arc<Parker>>)>,
    marks: Vec<String>,
    marked: BTreeSet<String>,
    calls: u64,
    outstanding: Option<Outstanding>,
}

#[derive(Debug)]
struct Outstanding {
    turn: Arc<Turn>,
    records: Vec<Handle>,
    requeues: Vec<Option<Arc<Parker>>>,
}

/// What came out of an answered turn that somebody should know of.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Remarks {
    /// Queues under whose keys something else lies: their jobs could not be put back and stay in flight.
    pub stuck: Vec<Vec<u8>>,
    /// Queues that nothing can be taken from, for the same reason.
    pub refused: Vec<Vec<u8>>,
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

    /// How a job stands in Redis.
    #[must_use]
    pub fn standing(&self, handle: Handle) -> Standing {
        match self.jobs.get(&handle).map(|job| &job.record) {
            Some(Record::Waiting | Record::Sent) => Standing::Awaited,
            Some(Record::Lost) => Standing::Lost,
            Some(Record::Kept(_)) | None => Standing::Kept,
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
            Record::Sent => job.end(Fate::Acked),
            Record::Kept(token) => {
                let token = token.clone();
                self.jobs.remove(&handle);
                self.queue_ack(token, now);
            }
            Record::Waiting | Record::Lost => self.forget(handle),
        }
    }

    /// The job's thread has gone without an ack. A record is left to the sweep, which finds that nobody holds it; a job
    /// without one is put back at once.
    pub fn release(&mut self, handle: Handle) {
        let Some(job) = self.jobs.get_mut(&handle) else { return };
        match &job.record {
            Record::Sent => job.end(Fate::Released),
            Record::Waiting => self.put_back(handle),
            Record::Kept(_) | Record::Lost => self.forget(handle),
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
            Record::Sent => {
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
            Record::Sent => job.fate = Fate::PutBack,
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
        !self.requeues.is_empty() || !self.waiting.is_empty()
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
        let turn = Arc::new(turn);
        self.outstanding = Some(Outstanding {
            turn: turn.clone(),
            records,
            requeues,
        });
        turn
    }

    /// The outstanding turn is done.
    pub fn answered(&mut self, done: Done, now: Instant) -> Remarks {
        let mut remarks = Remarks {
            refused: done.refused,
            ..Remarks::default()
        };
        let Some(outstanding) = self.outstanding.take() else {
            return remarks;
        };
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
                self.jobs.remove(&handle);
                self.queue_ack(token, now);
            }
            Fate::Released => {
                self.jobs.remove(&handle);
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
        }
        // Not instead of what is there by now: a job whose thread has gone while its record was on its way.
        kept.append(&mut self.requeues);
        self.requeues = kept;
        self.marks = self.marked.iter().cloned().collect();
        let mut lost = Vec::new();
        for job in self.jobs.values_mut() {
            if matches!(job.record, Record::Kept(_)) {
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
    /// like nobody's. A record that nobody holds goes back to its queue, a missing one is made again.
    pub fn sweep(&mut self, fields: Vec<Vec<u8>>) {
        if self.outstanding.is_some() {
            return;
        }
        let found: HashSet<Token> = fields.into_iter().filter_map(Token::read).collect();
        let mut held: HashSet<&Token> = self.acks.iter().collect();
        held.extend(self.requeues.iter().filter_map(|(requeue, _)| match requeue {
            Requeue::Recorded(token) => Some(token),
            Requeue::Unrecorded { .. } => None,
        }));
        let mut missing = Vec::new();
        for (handle, job) in &self.jobs {
            if let Record::Kept(token) = &job.record {
                if !found.contains(token) {
                    missing.push(*handle);
                }
                held.insert(token);
            }
        }
        let mut nobodys: Vec<Token> = found.iter().filter(|token| !held.contains(token)).cloned().collect();
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

    /// For a clean exit, when the registry is idle: the acks that are left, and the records of jobs whose threads have gone.
    pub fn last_call(&mut self) -> (Vec<Token>, Vec<Token>) {
        let mut held: Vec<Token> = Vec::new();
        for (_, job) in self.jobs.drain() {
            if let Record::Kept(token) = job.record {
                held.push(token);
            }
        }
        held.sort_by_key(|token| std::cmp::Reverse(token.order()));
        self.oldest_ack = None;
        (std::mem::take(&mut self.acks), held)
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
        for job in self.jobs.values() {
            if let Fate::Requeued(parker) = &job.fate {
                waiters.push(parker.clone());
            }
        }
        waiters
    }
}

fn split<T>(from: &mut Vec<T>, most: usize) -> Vec<T> {
    let rest = from.split_off(from.len().min(most));
    std::mem::replace(from, rest)
}
