//! Threads that take jobs from an engine, as Sidekiq's processors do, and the book they keep.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use processing_tracker_core::crew::Plan;
use processing_tracker_core::registry::{Requeueing, Taken};

use super::rng::Rng;
use super::tracker::{job, Tracker, SOON};

/// A crew: its queues in their order, a queue of weight `n` named `n` times, and how many threads it has.
#[derive(Clone, Debug)]
pub struct Crew {
    /// The queues.
    pub queues: Vec<&'static str>,
    /// Whether their order is fixed.
    pub strict: bool,
    /// The threads.
    pub threads: usize,
}

/// A crew with these queues, in this order.
pub fn strict(queues: &[&'static str], threads: usize) -> Crew {
    Crew {
        queues: queues.to_vec(),
        strict: true,
        threads,
    }
}

/// A crew with these queues, each as often as it weighs.
pub fn weighted(queues: &[&'static str], threads: usize) -> Crew {
    Crew {
        strict: false,
        ..strict(queues, threads)
    }
}

impl Crew {
    /// The same for the engine.
    pub fn plan(&self) -> Plan {
        Plan::new(self.queues.iter().map(|queue| queue.as_bytes().to_vec()), self.strict)
    }
}

/// How a thread ends a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Done, and acked.
    Acked,
    /// The thread dies in the middle of it, without a word.
    Dropped,
    /// Put back in the middle of it.
    Requeued,
}

/// What happened to one job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its queue.
    pub queue: String,
    /// By process: how often it was begun there.
    pub begun: BTreeMap<usize, usize>,
    /// By process: how often it came to its end there.
    pub done: BTreeMap<usize, usize>,
    /// By process: how often it was cut short by the end of that.
    pub held: BTreeMap<usize, usize>,
    /// By process: how often a thread dropped it there.
    pub dropped: BTreeMap<usize, usize>,
    /// How often it was put back by hand.
    pub put_back: usize,
}

impl Entry {
    /// How often it was begun.
    pub fn begun(&self) -> usize {
        self.begun.values().sum()
    }

    /// How often it came to its end.
    pub fn done(&self) -> usize {
        self.done.values().sum()
    }
}

/// What was enqueued, and what happened to it.
#[derive(Debug, Default)]
pub struct Book {
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Book {
    /// The entries.
    pub fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job is about to be enqueued. Answers its payload.
    pub fn enqueue(&self, jid: &str, queue: &str) -> Vec<u8> {
        let entry = Entry {
            queue: queue.into(),
            ..Entry::default()
        };
        assert!(self.entries().insert(jid.into(), entry).is_none(), "{jid} comes twice");
        job(jid)
    }

    /// The job's id. Fails on one that is not byte for byte what it was.
    pub fn jid(payload: &[u8]) -> String {
        let text = std::str::from_utf8(payload).expect("a job of ours");
        let jid = text.split('"').nth(9).expect("a jid").to_owned();
        assert_eq!(payload, job(&jid));
        jid
    }

    /// A job is begun. Fails on one that was never enqueued, or lay elsewhere.
    pub fn begin(&self, process: usize, queue: &[u8], payload: &[u8]) -> String {
        let jid = Self::jid(payload);
        let mut entries = self.entries();
        let entry = entries
            .get_mut(&jid)
            .unwrap_or_else(|| panic!("{jid} was not enqueued"));
        assert_eq!(queue, entry.queue.as_bytes(), "{jid}");
        *entry.begun.entry(process).or_default() += 1;
        jid
    }

    /// It came to its end.
    pub fn finish(&self, process: usize, jid: &str) {
        self.change(jid, |entry| *entry.done.entry(process).or_default() += 1);
    }

    /// It was cut short by the end of its process.
    pub fn hold(&self, process: usize, jid: &str) {
        self.change(jid, |entry| *entry.held.entry(process).or_default() += 1);
    }

    /// A thread dropped it.
    pub fn dropped(&self, process: usize, jid: &str) {
        self.change(jid, |entry| *entry.dropped.entry(process).or_default() += 1);
    }

    /// It was put back.
    pub fn put_back(&self, jid: &str) {
        self.change(jid, |entry| entry.put_back += 1);
    }

    fn change(&self, jid: &str, change: impl FnOnce(&mut Entry)) {
        change(self.entries().get_mut(jid).expect("a job that was begun"));
    }

    /// How many jobs were enqueued, and how many came to their end at least once.
    pub fn tally(&self) -> (usize, usize) {
        let entries = self.entries();
        (entries.len(), entries.values().filter(|entry| entry.done() > 0).count())
    }

    /// Whether all came to their ends.
    pub fn is_done(&self) -> bool {
        let (enqueued, done) = self.tally();
        enqueued == done
    }

    /// Fails unless every job was begun once and came to its end once.
    #[track_caller]
    pub fn assert_exactly_once(&self) {
        for (jid, entry) in self.entries().iter() {
            assert_eq!((entry.begun(), entry.done()), (1, 1), "{jid}: {entry:?}");
        }
    }
}

/// What a thread does with a job: how long it takes, and how it ends.
pub type Perform = dyn Fn(&mut Rng) -> (Duration, End) + Send + Sync;

/// All jobs at once, and all of them acked.
pub fn at_once(_rng: &mut Rng) -> (Duration, End) {
    (Duration::ZERO, End::Acked)
}

/// A process of its own, as far as Redis can tell: an engine, and threads that take jobs from it.
pub struct Workers {
    tracker: Arc<Tracker>,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Threads for each crew. `process` is what the book calls them.
    pub fn start(
        tracker: Tracker,
        crews: &[Crew],
        book: &Arc<Book>,
        process: usize,
        seed: u64,
        perform: &Arc<Perform>,
    ) -> Self {
        let (tracker, ending) = (Arc::new(tracker), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for crew in crews {
            let number = tracker.engine().add_crew(crew.plan()).expect("a crew");
            for thread in 0..crew.threads {
                let worker = Worker {
                    tracker: tracker.clone(),
                    crew: number,
                    ending: ending.clone(),
                    book: book.clone(),
                    process,
                    rng: Rng::at(seed, &[process as u64, number as u64, thread as u64]),
                };
                let perform = perform.clone();
                threads.push(thread::spawn(move || worker.run(&*perform)));
            }
        }
        Self {
            tracker,
            ending,
            threads,
        }
    }

    /// The engine and what it told.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Ends all threads, where they are.
    pub fn halt(&mut self) {
        self.ending.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().expect("the thread has no complaint");
        }
    }

    /// Ends all threads, then the engine leaves. Whether it could.
    pub fn leave(mut self) -> bool {
        self.halt();
        self.tracker.leave(SOON)
    }

    /// Ends all threads and the engine, without a word to Redis.
    pub fn die(mut self) {
        self.halt();
        self.tracker.stop();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.ending.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Worker {
    tracker: Arc<Tracker>,
    crew: usize,
    ending: Arc<AtomicBool>,
    book: Arc<Book>,
    process: usize,
    rng: Rng,
}

impl Worker {
    fn run(mut self, perform: &Perform) {
        while !self.is_ending() {
            match self.tracker.engine().take(self.crew) {
                Some(taken) => self.perform(&taken, perform),
                None => self.wait(),
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.ending.load(SeqCst)
    }

    /// Waits for work, but now and then for moments only, and now and then the thread is not there when it comes.
    fn wait(&mut self) {
        let engine = self.tracker.engine();
        let Some(parker) = engine.wait_for_work(self.crew) else {
            if !engine.gives_work(self.crew) {
                self.sleep(Duration::from_millis(5));
            }
            return;
        };
        let patience = if self.rng.chance(0.05) { 2 } else { 100 };
        parker.wait(Some(Instant::now() + self.rng.up_to(Duration::from_millis(patience))));
        engine.stop_waiting(self.crew, &parker);
        if self.rng.chance(0.002) {
            self.sleep(Duration::from_millis(60));
        }
    }

    fn perform(&mut self, taken: &Taken, perform: &Perform) {
        let jid = self.book.begin(self.process, &taken.queue, &taken.payload);
        let (takes, end) = perform(&mut self.rng);
        let engine = self.tracker.engine();
        if !self.sleep(takes) {
            self.book.hold(self.process, &jid);
            return;
        }
        match end {
            End::Acked => {
                self.book.finish(self.process, &jid);
                engine.ack(taken.handle);
            }
            End::Dropped => {
                self.book.dropped(self.process, &jid);
                engine.release(taken.handle);
            }
            End::Requeued => {
                self.book.put_back(&jid);
                match engine.requeue(taken.handle) {
                    Requeueing::Under(parker) => {
                        parker.wait(Some(Instant::now() + Duration::from_millis(100)));
                        assert!(!engine.take_back(taken.handle), "{jid} has a record");
                    }
                    Requeueing::Settled => {}
                    Requeueing::Unrecorded => panic!("{jid} was claimed and has no record"),
                }
            }
        }
    }

    /// Whether it could sleep so long.
    fn sleep(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if self.is_ending() {
                return false;
            }
            thread::sleep(
                until
                    .saturating_duration_since(Instant::now())
                    .min(Duration::from_millis(20)),
            );
        }
        true
    }
}
