//! A thread that waits for a job reads the answer to a blocking claim itself (*Blocking claims* in docs/protocol.md), and goes
//! whenever it must.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use processing_tracker_core::link::Link;
use processing_tracker_core::parker::{Parker, Woken};
use processing_tracker_core::Error;
use support::crews::{blocked, crew, push, until_blocked, waits, QUICK};
use support::proxy::{Action, At, End, Proxy, Request};
use support::redis_server::RedisServer;
use support::tracker::{assert_at_rest, blocking, in_flight, job, queue, settings, target, Tracker, SOON};
use support::wait::{eventually, eventually_some};

const NOTHING: [Vec<u8>; 0] = [];

fn engine(server: &RedisServer) -> Tracker {
    Tracker::registered(blocking(settings(&server.socket_path(), "one")))
}

/// A thread that waits for a job of a crew, as a thread of Ruby's does.
struct Waiting {
    parker: Arc<Parker>,
    thread: JoinHandle<Woken>,
}

fn waiting(tracker: &Tracker, crew: usize, within: Duration) -> Waiting {
    let parker = waits(tracker, crew);
    let waits = parker.clone();
    let thread = thread::spawn(move || waits.wait(Some(Instant::now() + within)));
    Waiting { parker, thread }
}

impl Waiting {
    #[track_caller]
    fn until_it_reads(&self) {
        eventually(SOON, "it reads itself", || self.parker.has_errand());
    }

    /// How its wait ends, soon.
    #[track_caller]
    fn woken(self) -> Woken {
        eventually(SOON, "the wait ends", || self.thread.is_finished());
        self.thread.join().unwrap()
    }

    /// The job that it gets.
    #[track_caller]
    fn job(self, tracker: &Tracker, crew: usize) -> Vec<u8> {
        let parker = self.parker.clone();
        assert_eq!(self.woken(), Woken::Done);
        let taken = tracker.engine().arrive(crew, &parker).expect("a job");
        tracker.engine().ack(taken.handle);
        taken.payload.to_vec()
    }
}

/// Ends the connections of the claims that wait.
fn kill_claims(server: &RedisServer) {
    let mut connection = server.connect();
    let clients: String = redis::cmd("CLIENT").arg("LIST").query(&mut connection).unwrap();
    for line in clients.lines().filter(|line| line.contains(" flags=b ")) {
        let id = line.split(' ').find_map(|field| field.strip_prefix("id=")).unwrap();
        let () = redis::cmd("CLIENT")
            .arg("KILL")
            .arg("ID")
            .arg(id)
            .query(&mut connection)
            .unwrap();
    }
}

#[test]
fn the_thread_that_waits_reads_the_answer_and_takes_the_job() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..50 {
        let thread = waiting(&tracker, work, QUICK);
        thread.until_it_reads();
        push(&server, "work", &[job(&format!("j{round}"))]);
        assert_eq!(thread.job(&tracker, work), job(&format!("j{round}")));
    }
    eventually(SOON, "all are acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn each_of_several_claims_has_a_reader_of_its_own() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["a", "b", "c"]);
    let mut threads: Vec<_> = (0..7).map(|_| waiting(&tracker, work, SOON)).collect();
    until_blocked(&server, 3);
    eventually(SOON, "three read", || {
        threads.iter().filter(|thread| thread.parker.has_errand()).count() == 3
    });
    for name in ["b", "c", "a"] {
        push(&server, name, &[job(name)]);
        let done = eventually_some(QUICK, "one has the job", || {
            threads.iter().position(|thread| thread.parker.is_done())
        });
        assert_eq!(threads.remove(done).job(&tracker, work), job(name));
    }
    for thread in threads {
        thread.parker.interrupt();
        tracker.engine().stop_waiting(work, &thread.parker);
        assert_eq!(thread.woken(), Woken::Interrupted);
    }
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_reader_that_is_wanted_elsewhere_goes_at_once_and_another_reads_on() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let mut threads = vec![waiting(&tracker, work, SOON), waiting(&tracker, work, SOON)];
    let reader = eventually_some(SOON, "one reads", || {
        threads.iter().position(|thread| thread.parker.has_errand())
    });
    let reader = threads.remove(reader);
    reader.parker.interrupt();
    tracker.engine().stop_waiting(work, &reader.parker);
    assert_eq!(reader.woken(), Woken::Interrupted);
    let other = threads.remove(0);
    other.until_it_reads();
    push(&server, "work", &[job("j")]);
    assert_eq!(other.job(&tracker, work), job("j"));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_reader_whose_time_is_up_goes_and_its_claim_is_taken_back() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let thread = waiting(&tracker, work, Duration::from_millis(300));
    thread.until_it_reads();
    let parker = thread.parker.clone();
    assert_eq!(thread.woken(), Woken::TimedOut);
    assert!(!parker.has_errand());
    tracker.engine().stop_waiting(work, &parker);
    until_blocked(&server, 0);
    push(&server, "work", &[job("j")]);
    // A claim that had not reached Redis yet may have taken it, and puts it back.
    eventually(SOON, "it lies in its queue", || queue(&server, "work") == [job("j")]);
    let thread = waiting(&tracker, work, QUICK);
    assert_eq!(thread.job(&tracker, work), job("j"));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn half_an_answer_holds_nobody_up_and_its_job_goes_back() {
    let server = RedisServer::start();
    // Redis has moved the job, and the process gets some bytes of what it says to that.
    let armed = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let armed = armed.clone();
        move |request: &Request| match armed.load(SeqCst) && request.command() == "BLMOVE" {
            true => Action::cut_reply(At::Byte(7), End::Silence),
            false => Action::pass(),
        }
    });
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let thread = waiting(&tracker, work, SOON);
    thread.until_it_reads();
    // The script is known to Redis when the next claim is made.
    push(&server, "work", &[job("before")]);
    assert_eq!(thread.job(&tracker, work), job("before"));
    armed.store(true, SeqCst);
    kill_claims(&server);
    eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    let thread = waiting(&tracker, work, SOON);
    thread.until_it_reads();
    push(&server, "work", &[job("j")]);
    eventually(SOON, "it is recorded", || in_flight(&server) == [job("j")]);
    thread.parker.interrupt();
    tracker.engine().stop_waiting(work, &thread.parker);
    assert_eq!(thread.woken(), Woken::Interrupted);
    // The claim waits on, for its slot alone.
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("j")]);
}

#[test]
fn a_connection_that_ends_under_a_reader_is_made_anew_and_it_waits_on() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let thread = waiting(&tracker, work, SOON);
    thread.until_it_reads();
    for _ in 0..3 {
        let before = server.calls_of("blmove");
        kill_claims(&server);
        eventually(SOON, "another claim", || {
            server.calls_of("blmove") > before || blocked(&server) == 1
        });
        thread.until_it_reads();
    }
    push(&server, "work", &[job("j")]);
    assert_eq!(thread.job(&tracker, work), job("j"));
    eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn an_engine_that_ends_takes_its_claims_with_it() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let thread = waiting(&tracker, work, SOON);
    thread.until_it_reads();
    tracker.stop();
    assert_eq!(thread.woken(), Woken::Done);
    eventually(SOON, "all connections are closed", || {
        let clients: String = redis::cmd("CLIENT").arg("LIST").query(&mut server.connect()).unwrap();
        clients.lines().count() == 1
    });
    push(&server, "work", &[job("j")]);
    assert_eq!(queue(&server, "work"), [job("j")]);
    assert_eq!(in_flight(&server), NOTHING);
}

#[test]
fn a_connection_with_a_socket_of_its_own_logs_in_as_others_do() {
    let server = RedisServer::start();
    let target = target(&server.socket_path());
    assert!(Link::bare(target.clone(), SOON).connect().is_ok());
    let (mut stranger, mut lost) = (target.clone(), target);
    stranger.username = Some("nobody".into());
    stranger.password = "not-the-password".into();
    lost.db = 99_999;
    for (target, word) in [(stranger, "username or password"), (lost, "out of range")] {
        let errors =
            [Link::bare(target.clone(), SOON), Link::new(target, SOON)].map(|mut link| link.connect().unwrap_err());
        for error in errors {
            assert!(matches!(&error, Error::Refused(text) if text.contains(word)), "{error}");
            assert!(!error.to_string().contains("not-the-password"));
        }
    }
}
