//! Waiting for work: no push is missed, whatever becomes of the connection that is to be told of it; and what becomes of
//! jobs that were claimed for threads that are not there any more.
//!
//! A push that is missed is found by the look that comes after 5 s in any case. So `QUICK` tells the one from the other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use processing_tracker_core::parker::Woken;
use processing_tracker_core::registry::Taken;
use redis::Commands;
use support::crews::{crew, info, look, push, waits, QUICK};
use support::lua;
use support::proxy::{Action, At, End as Cut, Proxy, Request};
use support::redis_server::{RedisServer, USER};
use support::rng::{seed, Rng};
use support::tracker::{
    assert_at_rest, in_flight, is_lease_lost, job, jobs, keys, native, queue, settings, Tracker, SOON, STEP,
};
use support::wait::eventually;
use support::workers::{at_once, strict, weighted, Book, Perform, Workers};

const NOTHING: [Vec<u8>; 0] = [];

fn engine(server: &RedisServer) -> Tracker {
    Tracker::registered(native(settings(&server.socket_path(), "one")))
}

/// A thread that waits for a job.
#[track_caller]
fn take(tracker: &Tracker, crew: usize, within: Duration) -> Taken {
    let deadline = Instant::now() + within;
    loop {
        match look(tracker, crew) {
            Ok(taken) => return taken,
            Err(parker) => {
                let woken = parker.wait(Some(deadline));
                tracker.engine().stop_waiting(crew, &parker);
                assert_eq!(woken, Woken::Done, "no job within {within:?}");
            }
        }
    }
}

/// The engine has looked into its queues, in vain, and is to be told when something comes.
#[track_caller]
fn watches(server: &RedisServer) {
    eventually(SOON, "Redis is to tell of changes", || {
        info(server, "stats", "tracking_total_keys") != "0"
    });
}

#[test]
fn no_push_is_missed_whatever_threads_do_at_the_moment() {
    let seed = seed();
    eprintln!("FAULT_SEED={seed}");
    let server = RedisServer::start();
    let book: Arc<Book> = Arc::default();
    let perform: Arc<Perform> = Arc::new(at_once);
    let crews = [strict(&["a"], 2), weighted(&["b", "b", "a"], 3), strict(&["c", "b"], 1)];
    let workers: Vec<Workers> = (0..2)
        .map(|process| {
            let mut settings = native(settings(&server.socket_path(), &format!("p{process}")));
            settings.blocks = process == 1;
            let tracker = Tracker::registered(settings);
            Workers::start(tracker, &crews, &book, process, seed, &perform)
        })
        .collect();
    let mut connection = server.connect();
    let mut rng = Rng::new(seed);
    let mut slowest = Duration::ZERO;
    for round in 0..1500 {
        let name = ["a", "b", "c"][rng.below(3) as usize];
        let payloads: Vec<Vec<u8>> = (0..1 + rng.below(3))
            .map(|i| book.enqueue(&format!("j{round}-{i}"), name))
            .collect();
        let start = Instant::now();
        let () = connection.lpush(format!("queue:{name}"), payloads).unwrap();
        eventually(QUICK, &format!("FAULT_SEED={seed}: round {round} is done"), || {
            book.is_done()
        });
        slowest = slowest.max(start.elapsed());
        // Any place in what the engine does after a job, from its ack to the next wait.
        if rng.chance(0.8) {
            thread::sleep(rng.up_to(Duration::from_micros(2500)));
        }
    }
    eprintln!("the slowest took {slowest:?}");
    book.assert_exactly_once();
    for workers in workers {
        assert!(workers.leave());
    }
    assert_eq!(in_flight(&server), NOTHING);
    assert_at_rest(&server);
}

/// A proxy that holds the answers to turns for a while when told so.
fn slow_answer(server: &RedisServer) -> (Proxy, Arc<AtomicBool>) {
    let armed = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let armed = armed.clone();
        move |request: &Request| {
            if lua::is_turn(request) && armed.load(SeqCst) {
                Action::delay_reply(Duration::from_millis(300))
            } else {
                Action::pass()
            }
        }
    });
    (proxy, armed)
}

#[test]
fn threads_whose_jobs_others_have_taken_are_not_forgotten() {
    let server = RedisServer::start();
    let (proxy, armed) = slow_answer(&server);
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    armed.store(true, SeqCst);
    push(&server, "work", &jobs(2));
    // One claim for the first, then one for two of whom one gets nothing; and one has gone before that is answered: there is
    // a job for each who waits.
    let parkers = [waits(&tracker, work), waits(&tracker, work), waits(&tracker, work)];
    eventually(SOON, "two are claimed", || in_flight(&server).len() == 2);
    tracker.engine().stop_waiting(work, &parkers[2]);
    armed.store(false, SeqCst);
    // Others come by and take both: turns come one after another, so the second claim is answered when this is recorded.
    let probe = tracker.record("probes", &job("probe"));
    let taken = [
        tracker.engine().take(work).unwrap(),
        tracker.engine().take(work).unwrap(),
    ];
    // So who was woken finds nothing, and waits again.
    let woken = parkers.iter().position(|parker| parker.is_done()).unwrap();
    tracker.engine().stop_waiting(work, &parkers[woken]);
    let again = waits(&tracker, work);
    let waiting = parkers[1 - woken].clone();
    watches(&server);
    push(&server, "work", &[job("next")]);
    let start = Instant::now();
    eventually(QUICK, "the next is claimed", || tracker.engine().has_ready(work));
    eventually(QUICK, "somebody is woken", || again.is_done() || waiting.is_done());
    assert!(start.elapsed() < QUICK);
    let next = tracker.engine().take(work).unwrap();
    for parker in [again, waiting] {
        tracker.engine().stop_waiting(work, &parker);
    }
    for taken in taken.iter().chain([&next]) {
        tracker.engine().ack(taken.handle);
    }
    tracker.engine().ack(probe);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

#[test]
fn what_is_claimed_for_threads_that_have_gone_goes_back_in_its_order() {
    let server = RedisServer::start();
    let (proxy, armed) = slow_answer(&server);
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    armed.store(true, SeqCst);
    push(&server, "work", &jobs(5));
    let parkers: Vec<_> = (0..3).map(|_| waits(&tracker, work)).collect();
    eventually(SOON, "three are claimed", || in_flight(&server).len() == 3);
    for parker in &parkers {
        tracker.engine().stop_waiting(work, parker);
    }
    armed.store(false, SeqCst);
    eventually(SOON, "they are back", || {
        in_flight(&server).is_empty() && queue(&server, "work").len() == 5
    });
    assert_eq!(queue(&server, "work"), jobs(5));
    assert!(!tracker.engine().has_ready(work));

    // The same where the crew goes quiet while its claim is under way.
    armed.store(true, SeqCst);
    let parker = waits(&tracker, work);
    eventually(SOON, "one is claimed", || in_flight(&server).len() == 1);
    tracker.engine().be_quiet(work, true);
    armed.store(false, SeqCst);
    assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done);
    assert!(tracker.engine().take(work).is_none());
    eventually(SOON, "it is back", || in_flight(&server).is_empty());
    assert_eq!(queue(&server, "work"), jobs(5));
    // Nobody claims for it any more.
    let turns = server.calls_of("evalsha");
    assert!(tracker.engine().wait_for_work(work).is_none());
    thread::sleep(STEP * 2);
    assert!(server.calls_of("evalsha") - turns < 8);
    assert_eq!(queue(&server, "work"), jobs(5));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_repeated_turn_hands_its_jobs_out_in_their_order_and_to_their_crews() {
    let server = RedisServer::start();
    let (to_cut, looked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let proxy = Proxy::start(server.socket_path(), {
        let (to_cut, looked) = (to_cut.clone(), looked.clone());
        move |request: &Request| {
            // Those that claim for both crews, or look into the queues of both.
            let both = request.contains("queue:many") && request.contains("queue:few");
            looked.fetch_add(usize::from(both && request.command() == "EXISTS"), SeqCst);
            if lua::is_turn(request) && both && to_cut.load(SeqCst) > 0 {
                to_cut.fetch_sub(1, SeqCst);
                Action::cut_reply(At::Share(0.5), Cut::Close)
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let (none, few, many) = (crew(&tracker, &[]), crew(&tracker, &["few"]), crew(&tracker, &["many"]));
    // More than a small hash holds, so that Redis answers in any order.
    let many_jobs = jobs(600);
    let few_jobs = [job("few0"), job("few1")];
    server.pause();
    let parkers: Vec<_> = [(none, 2), (few, 4), (many, 200)]
        .into_iter()
        .flat_map(|(crew, count)| (0..count).map(move |_| crew))
        .map(|crew| (crew, waits(&tracker, crew)))
        .collect();
    server.resume();
    // Only then has each crew found its queue empty, and no claim for one of them alone is under way.
    eventually(SOON, "nothing is there", || looked.load(SeqCst) > 0);
    to_cut.store(2, SeqCst);
    let mut pipe = redis::pipe();
    pipe.atomic()
        .lpush("queue:many", &many_jobs)
        .lpush("queue:few", &few_jobs);
    let () = pipe.query(&mut server.connect()).unwrap();
    eventually(SOON, "both crews have some", || {
        tracker.engine().has_ready(few) && tracker.engine().has_ready(many)
    });
    assert_eq!(to_cut.load(SeqCst), 0);
    assert!(tracker.engine().take(none).is_none());
    let all = |crew| std::iter::from_fn(|| tracker.engine().take(crew)).collect::<Vec<Taken>>();
    let (got_few, got_many) = (all(few), all(many));
    let payloads = |taken: &[Taken]| taken.iter().map(|taken| taken.payload.to_vec()).collect::<Vec<_>>();
    assert_eq!(payloads(&got_few), few_jobs);
    assert!(got_many.len() >= 200);
    assert_eq!(payloads(&got_many), many_jobs[..got_many.len()]);
    for (crew, parker) in &parkers {
        tracker.engine().be_quiet(*crew, true);
        tracker.engine().stop_waiting(*crew, parker);
    }
    got_few
        .iter()
        .chain(&got_many)
        .for_each(|taken| tracker.engine().ack(taken.handle));
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "many"), many_jobs[got_many.len()..]);
    assert_at_rest(&server);
}

// --- the connection that is told ---

fn is_warning(event: &Event) -> bool {
    matches!(event, Event::Warning(_))
}

#[test]
fn a_listening_connection_that_is_closed_is_made_again() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for (round, kind) in ["pubsub", "normal", "pubsub", "normal"].into_iter().enumerate() {
        let parker = waits(&tracker, work);
        watches(&server);
        redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", kind, "SKIPME", "yes"])
            .exec(&mut server.connect())
            .unwrap();
        push(&server, "work", &[job(&format!("j{round}"))]);
        tracker.engine().stop_waiting(work, &parker);
        // Nobody hears of the other connection's end before it is used.
        let within = if kind == "pubsub" { QUICK } else { SOON };
        let taken = take(&tracker, work, within);
        tracker.engine().ack(taken.handle);
    }
    assert_eq!(tracker.count(is_warning), 0);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_listening_connection_that_is_dead_without_a_sign_costs_one_job_its_five_seconds() {
    let server = RedisServer::start();
    let subscribed = Arc::new(AtomicUsize::new(0));
    let proxy = Proxy::start(server.socket_path(), {
        let subscribed = subscribed.clone();
        move |request: &Request| match request.command().as_str() {
            // It hears that it is subscribed, and nothing after that.
            "SUBSCRIBE" if subscribed.fetch_add(1, SeqCst) == 0 => Action::cut_reply(At::End, Cut::Silence),
            _ => Action::pass(),
        }
    });
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    watches(&server);
    push(&server, "work", &[job("first")]);
    tracker.engine().stop_waiting(work, &parker);
    let first = take(&tracker, work, SOON);
    tracker.engine().ack(first.handle);
    eventually(SOON, "it listens anew", || subscribed.load(SeqCst) == 2);
    for i in 0..5 {
        let parker = waits(&tracker, work);
        watches(&server);
        push(&server, "work", &[job(&format!("j{i}"))]);
        tracker.engine().stop_waiting(work, &parker);
        let taken = take(&tracker, work, QUICK);
        tracker.engine().ack(taken.handle);
    }
    assert_eq!(subscribed.load(SeqCst), 2);
    assert_eq!(tracker.count(is_warning), 0);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_redis_that_has_just_come_back_is_not_taken_for_one_that_tells_nothing() {
    let mut server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..4 {
        let parker = waits(&tracker, work);
        watches(&server);
        server.restart();
        tracker.engine().stop_waiting(work, &parker);
        push(&server, "work", &[job(&format!("j{round}"))]);
        let taken = take(&tracker, work, SOON);
        tracker.engine().ack(taken.handle);
    }
    // It is told again, and so need not ask.
    let parker = waits(&tracker, work);
    watches(&server);
    thread::sleep(STEP * 3);
    let asked = server.calls_of("exists");
    thread::sleep(STEP * 5);
    assert!(server.calls_of("exists") - asked <= 1);
    tracker.engine().stop_waiting(work, &parker);
    assert_eq!(tracker.count(is_warning), 0, "{:?}", tracker.told());
    assert!(tracker.leave(SOON));
}

#[test]
fn where_redis_tells_nothing_it_is_asked() {
    let server = RedisServer::start();
    // As behind a proxy that knows no such command.
    let forbidden = "+@all -client|tracking".split(' ');
    redis::cmd("ACL")
        .arg("SETUSER")
        .arg(USER)
        .arg(forbidden.collect::<Vec<_>>())
        .exec(&mut server.connect())
        .unwrap();
    let refused = engine(&server);
    let mut settings = native(settings(&server.socket_path(), "two"));
    settings.polls = true;
    let polls = Tracker::registered(settings);
    for tracker in [&refused, &polls] {
        let work = crew(tracker, &["work"]);
        for i in 0..3 {
            let parker = waits(tracker, work);
            thread::sleep(Duration::from_millis(50));
            push(&server, "work", &[job(&format!("j{i}"))]);
            tracker.engine().stop_waiting(work, &parker);
            let taken = take(tracker, work, QUICK);
            tracker.engine().ack(taken.handle);
        }
        assert!(tracker.leave(SOON));
    }
    let tells = |event: &Event| matches!(event, Event::Warning(text) if text.contains("asked from time to time"));
    assert_eq!(
        (refused.count(tells), refused.count(is_warning)),
        (1, 1),
        "{:?}",
        refused.told()
    );
    assert_eq!(polls.count(is_warning), 0);
    assert_at_rest(&server);
}

// --- jobs nobody runs any more, in a process that lives ---

#[test]
fn a_job_whose_record_nobody_holds_goes_back_and_a_claim_that_is_undone_is_not_recorded_again() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    push(&server, "work", &jobs(3));
    let taken: Vec<Taken> = (0..3).map(|_| take(&tracker, work, SOON)).collect();
    let hash = keys().inflight(&tracker.identity());
    let mut connection = server.connect();
    // As after a failover: the ack of one is lost, and the claim of another.
    tracker.engine().ack(taken[0].handle);
    eventually(SOON, "it is acked", || in_flight(&server).len() == 2);
    let () = connection.hset(&hash, "1-1 5 work", job("j0")).unwrap();
    let fields: Vec<(Vec<u8>, Vec<u8>)> = connection.hgetall(&hash).unwrap();
    let (token, _) = fields.iter().find(|(_, payload)| *payload == job("j1")).unwrap();
    let () = connection.hdel(&hash, token).unwrap();
    let () = connection.rpush("queue:work", job("j1")).unwrap();
    // Every connection is new.
    redis::cmd("CLIENT")
        .arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"])
        .exec(&mut server.connect())
        .unwrap();
    tracker.engine().touch();
    let probe = tracker.record("probes", &job("probe"));
    tracker.engine().ack(probe);
    eventually(SOON, "the first is back", || {
        queue(&server, "work").contains(&job("j0"))
    });
    eventually(SOON, "one is in flight", || in_flight(&server) == [job("j2")]);
    // It runs on, and its ack takes nothing.
    tracker.engine().ack(taken[1].handle);
    tracker.engine().ack(taken[2].handle);
    eventually(SOON, "nothing is in flight", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    let mut back = queue(&server, "work");
    back.sort();
    assert_eq!(back, [job("j0"), job("j1")]);
    assert_eq!(tracker.count(is_lease_lost), 0);
}

#[test]
fn a_dropped_job_that_redis_refuses_for_a_moment_is_settled_when_it_does_not() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    // Nobody has said of the first that it may run twice.
    let unmarked = br#"{"class":"HardJob","args":[],"jid":"unmarked"}"#.to_vec();
    push(&server, "work", &[unmarked]);
    push(&server, "work", &[job("marked")]);
    let taken = [take(&tracker, work, SOON), take(&tracker, work, SOON)];
    server.config_set("min-replicas-to-write", "1");
    for taken in &taken {
        tracker.engine().release(taken.handle);
    }
    tracker.wait_for(
        "a person is told",
        |event| matches!(event, Event::Warning(text) if text.contains("NOREPLICAS")),
    );
    assert_eq!(in_flight(&server).len(), 2);
    server.config_set("min-replicas-to-write", "0");
    eventually(SOON, "both are settled", || in_flight(&server).is_empty());
    assert_eq!(queue(&server, "work"), [job("marked")]);
    let dead: Vec<Vec<u8>> = server.connect().zrange("dead", 0, -1).unwrap();
    assert_eq!(dead.len(), 1);
    let counter: u64 = server.connect().get(keys().recoveries("marked")).unwrap();
    assert_eq!(counter, 1);
    assert!(tracker.leave(SOON));
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert_at_rest(&server);
}

#[test]
fn a_queue_that_is_no_list_keeps_nobody_from_the_others_and_is_looked_at_again() {
    let server = RedisServer::start();
    let () = server.connect().set("queue:broken", "x").unwrap();
    let tracker = engine(&server);
    let work = crew(&tracker, &["broken", "work"]);
    push(&server, "work", &jobs(200));
    for job in jobs(200) {
        let taken = take(&tracker, work, SOON);
        assert_eq!(*taken.payload, job);
        tracker.engine().ack(taken.handle);
    }
    let parker = waits(&tracker, work);
    let warning = tracker.wait_for("a person is told", is_warning);
    assert!(
        matches!(&warning, Event::Warning(text) if text.contains("queue:broken")),
        "{warning:?}"
    );
    // It does not keep the engine busy.
    watches(&server);
    let calls = server.calls_of("evalsha");
    thread::sleep(STEP * 5);
    assert!(server.calls_of("evalsha") - calls < 15);
    tracker.engine().stop_waiting(work, &parker);
    let () = server.connect().del("queue:broken").unwrap();
    push(&server, "broken", &[job("mended")]);
    let taken = take(&tracker, work, SOON);
    assert_eq!((&*taken.queue, &*taken.payload), (&b"broken"[..], &*job("mended")));
    tracker.engine().ack(taken.handle);
    assert_eq!(tracker.count(is_warning), 1);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn large_jobs_come_a_megabyte_at_a_time_and_small_ones_at_once() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let large = |i: usize| {
        format!(
            r#"{{"class":"HardJob","jid":"l{i}","args":["{}"]}}"#,
            "x".repeat(400 << 10)
        )
        .into_bytes()
    };
    let payloads: Vec<Vec<u8>> = (0..12)
        .map(large)
        .chain((0..50).map(|i| job(&format!("s{i}"))))
        .collect();
    // First a few, so that it knows that they are large.
    push(&server, "work", &payloads[..2]);
    let mut got: Vec<Taken> = (0..2).map(|_| take(&tracker, work, SOON)).collect();
    let parkers: Vec<_> = (0..62).map(|_| waits(&tracker, work)).collect();
    watches(&server);
    push(&server, "work", &payloads[2..]);
    eventually(SOON, "all come", || {
        got.extend(tracker.engine().take(work));
        got.len() == 62
    });
    let payloads_of: Vec<&[u8]> = got.iter().map(|taken| &*taken.payload).collect();
    assert_eq!(payloads_of, payloads.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for parker in &parkers {
        tracker.engine().stop_waiting(work, parker);
    }
    got.iter().for_each(|taken| tracker.engine().ack(taken.handle));
    eventually(SOON, "all are acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    eventually(SOON, "nothing is left", || queue(&server, "work").is_empty());
    assert_at_rest(&server);
}
