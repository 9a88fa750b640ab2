//! Native claims, by several engines with several crews and threads each: whatever breaks, every job that was enqueued is
//! done, and done twice only where Redis never heard of the first end.
//!
//! `FAULT_SEED=<seed>` repeats a run, `FAULT_SECONDS` makes it longer:
//! `FAULT_SECONDS=300 cargo test --release --features failpoints --test claims -- --nocapture storm`

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use redis::Commands;
use support::process::Options;
use support::proxy::Proxy;
use support::redis_server::RedisServer;
use support::rng::{seed, Rng};
use support::storm::{assert_all_kinds, seconds, CutOff};
use support::tracker::{
    assert_at_rest, forgetful, in_flight, is_lease_lost, journal, native, queue, recover_all, stat, Tracker, SOON,
};
use support::wait::eventually;
use support::workers::{at_once, strict, weighted, Book, Crew, End, Perform, Workers};

/// So many faults the storm brings at least.
const ENOUGH: u64 = 2000;
const QUEUES: [&str; 3] = ["high", "work", "low"];
/// So many jobs wait in the queues at most.
const BACKLOG: usize = 400;

fn crews() -> Vec<Crew> {
    vec![
        strict(&["high", "work"], 3),
        weighted(&["work", "work", "low", "high"], 4),
        strict(&["low"], 2),
    ]
}

/// Mostly quick, now and then as long as a lease; mostly acked.
fn as_it_comes(rng: &mut Rng) -> (Duration, End) {
    let takes = match rng.below(1000) {
        0..=599 => Duration::ZERO,
        600..=989 => rng.up_to(Duration::from_millis(5)),
        990..=997 => rng.up_to(Duration::from_millis(100)),
        _ => rng.up_to(Duration::from_millis(1500)),
    };
    let end = match rng.below(100) {
        0..=93 => End::Acked,
        94..=96 => End::Dropped,
        _ => End::Requeued,
    };
    (takes, end)
}

struct Storm {
    seed: u64,
    server: RedisServer,
    proxy: Proxy,
    book: Arc<Book>,
    deadline: Instant,
    processes: AtomicUsize,
    leases_lost: AtomicUsize,
    /// How each process ended.
    ends: Mutex<BTreeMap<usize, &'static str>>,
}

impl Storm {
    fn is_over(&self) -> bool {
        let late = Instant::now().checked_duration_since(self.deadline);
        let Some(late) = late else { return false };
        // A slow machine gets more time to see enough.
        let enough = self.proxy.counts().faults() >= ENOUGH && self.leases_lost.load(SeqCst) > 0;
        enough || late > Duration::from_secs(30)
    }

    fn ended(&self, process: usize, end: &'static str) {
        self.ends
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(process, end);
    }

    /// Enqueues, in bursts and with pauses in which all is done and everybody waits.
    fn enqueue(&self) {
        let mut rng = Rng::at(self.seed, &[1]);
        let mut connection = self.server.connect();
        let mut number = 0;
        while !self.is_over() {
            for _ in 0..rng.below(30) {
                number += 1;
                let queue = QUEUES[rng.below(3) as usize];
                let payload = self.book.enqueue(&format!("j{number}"), queue);
                let () = connection.sadd("queues", queue).unwrap();
                let () = connection.lpush(format!("queue:{queue}"), payload).unwrap();
            }
            let pause = if rng.chance(0.05) { 200 } else { 10 };
            thread::sleep(rng.up_to(Duration::from_millis(pause)));
            while !self.is_over() && self.backlog() > BACKLOG {
                thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn backlog(&self) -> usize {
        let (enqueued, done) = self.book.tally();
        enqueued - done
    }

    /// One engine after another, which leave or end without a word.
    fn live(&self, slot: usize) {
        let mut rng = Rng::at(self.seed, &[2, slot as u64]);
        let perform: Arc<Perform> = Arc::new(as_it_comes);
        while !self.is_over() {
            let process = self.processes.fetch_add(1, SeqCst);
            let mut settings = native(forgetful(&self.proxy.socket_path(), &format!("slot{slot}-{process}")));
            settings.blocks = rng.chance(0.7);
            let workers = Workers::start(
                Tracker::registered(settings),
                &crews(),
                &self.book,
                process,
                self.seed,
                &perform,
            );
            let ends = Instant::now() + rng.up_to(Duration::from_secs(8));
            while Instant::now() < ends && !self.is_over() {
                thread::sleep(Duration::from_millis(20));
                assert!(!workers
                    .tracker()
                    .told()
                    .iter()
                    .any(|event| matches!(event, Event::Dropped(_))));
            }
            self.leases_lost
                .fetch_add(workers.tracker().count(is_lease_lost), SeqCst);
            if rng.chance(0.5) {
                let left = workers.leave();
                self.ended(process, if left { "left" } else { "could not leave" });
            } else {
                workers.die();
                self.ended(process, "ended without leaving");
            }
        }
    }

    /// One process after another, which are killed: from outside, or at a step of their work.
    fn kill(&self, slot: usize) {
        const PLACES: [&str; 4] = ["before_turn", "after_turn", "after_turn", "after_recover"];
        let mut rng = Rng::at(self.seed, &[3, slot as u64]);
        while !self.is_over() {
            let process = self.processes.fetch_add(1, SeqCst);
            let mut options = Options::new(&self.proxy.socket_path())
                .set("instance_id", format!("killed{slot}-{process}"))
                .set("recovery_window_ms", 1)
                .set("blocks", rng.chance(0.7))
                .set("work", "3,strict,high,work")
                .set("work", "3,weighted,low,low,work");
            if rng.chance(0.5) {
                let place = PLACES[rng.below(PLACES.len() as u64) as usize];
                options = options.failpoint(&format!("{place}:{}", 1 + rng.below(300)));
            }
            let mut instance = options.start();
            let dies = Instant::now() + rng.up_to(Duration::from_secs(3));
            while Instant::now() < dies && !instance.is_killed() && !self.is_over() {
                thread::sleep(Duration::from_millis(10));
            }
            instance.kill();
            self.ended(process, "killed");
            for event in instance.said() {
                match event.split(' ').collect::<Vec<_>>()[..] {
                    ["Begun", queue, payload] => {
                        self.book.begin(process, queue.as_bytes(), &from_hex(payload));
                    }
                    ["Done", payload] => self.book.finish(process, &Book::jid(&from_hex(payload))),
                    _ => {}
                }
            }
        }
    }
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn a_storm_costs_no_job_and_doubles_only_those_whose_acks_it_cut() {
    let seed = seed();
    eprintln!("FAULT_SEED={seed}");
    let server = RedisServer::start();
    let victims = (0..3).map(|slot| format!("slot{slot}-")).collect();
    let storm = Storm {
        seed,
        proxy: Proxy::start(server.socket_path(), CutOff::new(seed, victims)),
        server,
        book: Arc::default(),
        deadline: Instant::now() + seconds(12),
        processes: AtomicUsize::new(0),
        leases_lost: AtomicUsize::new(0),
        ends: Mutex::default(),
    };
    thread::scope(|scope| {
        let storm = &storm;
        scope.spawn(|| storm.enqueue());
        for slot in 0..3 {
            scope.spawn(move || storm.live(slot));
        }
        for slot in 0..2 {
            scope.spawn(move || storm.kill(slot));
        }
    });
    let counts = storm.proxy.counts();
    storm.proxy.calm();
    storm.proxy.wait_late(SOON);
    // The rest, and all that comes back.
    let server = &storm.server;
    let process = storm.processes.fetch_add(1, SeqCst);
    let perform: Arc<Perform> = Arc::new(at_once);
    let last = Workers::start(
        Tracker::registered(native(forgetful(&server.socket_path(), &format!("last-{process}")))),
        &crews(),
        &storm.book,
        process,
        seed,
        &perform,
    );
    recover_all(&forgetful(&server.socket_path(), "console")).unwrap();
    eventually(SOON * 2, "all is done", || {
        storm.book.is_done() && QUEUES.iter().all(|name| queue(server, name).is_empty()) && in_flight(server).is_empty()
    });
    assert!(last.leave());
    recover_all(&forgetful(&server.socket_path(), "console")).unwrap();

    let ends = storm.ends.lock().unwrap_or_else(PoisonError::into_inner);
    // By job, and by process: how often others recovered it there, and how often it was recovered at all.
    let mut recovered: BTreeMap<String, BTreeMap<usize, usize>> = BTreeMap::new();
    let mut journalled: BTreeMap<String, usize> = BTreeMap::new();
    // How often a process settled it itself.
    let mut settled: BTreeMap<String, BTreeMap<usize, usize>> = BTreeMap::new();
    for line in journal(server) {
        assert_eq!(line.outcome, "requeued", "{line:?}");
        let label = line.from.split(':').next().unwrap();
        let process = label.rsplit('-').next().unwrap().parse().unwrap();
        let tally = if line.from == line.by {
            &mut settled
        } else {
            &mut recovered
        };
        *tally.entry(line.jid.clone()).or_default().entry(process).or_default() += 1;
        *journalled.entry(line.jid).or_default() += 1;
    }
    let (mut twice, mut runs) = (0, 0);
    for (jid, entry) in storm.book.entries().iter() {
        let recovered = recovered.get(jid).cloned().unwrap_or_default();
        // An ack was cut where a job came to its end in a process and was recovered from it.
        let cut = |(process, done): (&usize, &usize)| (*done).min(recovered.get(process).copied().unwrap_or(0));
        let acks_cut: usize = entry.done.iter().map(cut).sum();
        assert!(
            (1..=1 + acks_cut).contains(&entry.done()),
            "FAULT_SEED={seed}: {jid} was done {} times, with {acks_cut} acks cut: {entry:?}, recovered {recovered:?}",
            entry.done()
        );
        // What a process still holds goes back when it leaves: also where it never got the answer to that.
        let leaves = |process: &usize| matches!(ends.get(process), Some(&"left" | &"could not leave"));
        let held = |(process, held): (&usize, &usize)| held * usize::from(leaves(process));
        // So does what a thread has dropped there and nobody has settled yet.
        let settled = settled.get(jid).cloned().unwrap_or_default();
        let dropped = |(process, dropped): (&usize, &usize)| {
            let settled = settled.get(process).copied().unwrap_or(0);
            dropped.saturating_sub(settled) * usize::from(leaves(process))
        };
        let back = journalled.get(jid).copied().unwrap_or(0)
            + entry.put_back
            + entry.held.iter().map(held).sum::<usize>()
            + entry.dropped.iter().map(dropped).sum::<usize>();
        assert!(
            entry.begun() <= 1 + back,
            "FAULT_SEED={seed}: {jid} was begun {} times, and came back {back} times: {entry:?}, recovered {recovered:?}, ends {:?}",
            entry.begun(),
            entry.begun.keys().map(|process| ends.get(process)).collect::<Vec<_>>()
        );
        twice += entry.done() - 1;
        runs += entry.begun();
    }
    let mut tally: BTreeMap<&str, usize> = BTreeMap::new();
    ends.values().for_each(|end| *tally.entry(end).or_default() += 1);
    let (jobs, _) = storm.book.tally();
    eprintln!(
        "{jobs} jobs, {runs} runs, {twice} done again since their acks were cut; leases lost: {:?}; processes: {tally:?}; {counts}",
        storm.leases_lost
    );
    assert_all_kinds(seed, &counts);
    assert!(counts.faults() >= ENOUGH, "{counts}");
    assert!(storm.leases_lost.load(SeqCst) > 0);
    assert!(twice > 0, "no ack was cut");
    assert!(jobs > 2000, "{jobs} jobs");
    assert!(stat(server, "requeued") > 0);
    // Each of these is a job that came without the script of a turn.
    let moved = server.calls_of("lmove");
    assert!(moved > 200, "{moved} jobs of {jobs}");
    assert_at_rest(server);
}
