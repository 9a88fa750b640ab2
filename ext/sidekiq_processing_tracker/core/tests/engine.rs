//! One engine and what it does when people and Redis do what they do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::engine::Recorded;
use processing_tracker_core::events::{Event, LostJob};
use processing_tracker_core::identity;
use processing_tracker_core::parker::{Parker, Woken};
use processing_tracker_core::password::{Asked, Desk, Password};
use processing_tracker_core::registry::Requeueing;
use processing_tracker_core::scripts::{self, Turn, Turned};
use processing_tracker_core::server;
use processing_tracker_core::settings::Settings;
use processing_tracker_core::target::Address;
use processing_tracker_core::Error;
use redis::Commands;
use support::lua;
use support::proxy::{relay, Action, End, OnConnect, Plan, Proxy, Request};
use support::redis_server::{Options as ServerOptions, RedisServer, PASSWORD, USER};
use support::tracker::{
    self, assert_at_rest, in_flight, instances, is_lease_lost, is_outage, is_outage_over, is_recovered, job, jobs,
    journal, keys, link, our_keys, queue, recover_all, settings, Tracker, SOON, STEP, TTL,
};
use support::wait::eventually;

const NOTHING: [Vec<u8>; 0] = [];

fn engine(server: &RedisServer, instance_id: &str) -> Tracker {
    Tracker::registered(settings(&server.socket_path(), instance_id))
}

// --- identities ---

#[test]
fn two_instances_under_one_name_are_two() {
    let server = RedisServer::start();
    let (one, other) = (engine(&server, "pod:a:1"), engine(&server, "pod:a:1"));
    assert_ne!(one.identity(), other.identity());
    for tracker in [&one, &other] {
        assert!(tracker.identity().starts_with("pod:a:1:"), "{}", tracker.identity());
    }
    one.record("work", &job("one"));
    let kept = other.record("work", &job("other"));
    let dead = one.identity();
    one.stop();
    eventually(SOON, "the job of the one is back", || {
        queue(&server, "work") == [job("one")]
    });
    assert_eq!(in_flight(&server), [job("other")]);
    assert_eq!(journal(&server)[0].from, dead);
    assert_eq!(journal(&server)[0].by, other.identity());
    // The same name once more, as in a restarted pod.
    let again = engine(&server, "pod:a:1");
    assert!(![dead, other.identity()].contains(&again.identity()));
    other.engine().ack(kept);
    assert!(other.leave(SOON));
    assert!(again.leave(SOON));
    assert_eq!(other.count(is_lease_lost), 0);
    assert_at_rest(&server);
}

#[test]
fn a_process_that_finds_a_clone_of_itself_goes_on_as_another() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let old = tracker.identity();
    tracker.record("work", &job("held"));
    // A copy of the process (a snapshot of a machine, say) has gone on counting.
    let turn = Turn {
        call: 99,
        ..Turn::default()
    };
    let turned = scripts::turn(&mut link(&server), &keys(), &old, &turn).unwrap();
    assert!(matches!(turned, Turned::Done(_)));
    let handle = tracker.record("work", &job("next"));
    assert_ne!(tracker.identity(), old);
    let told = tracker.wait_for("the loss is told", is_lease_lost);
    assert_eq!(
        told,
        Event::LeaseLost {
            identity: old,
            new_identity: tracker.identity(),
            jobs: vec![LostJob {
                queue: b"work".to_vec(),
                payload: job("held").into(),
            }],
        }
    );
    // The clone does not beat: what was held under its name comes back.
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    tracker.engine().ack(handle);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn identities_are_drawn_anew_every_time() {
    let mut drawn: Vec<String> = (0..1000).map(|_| identity::draw("a:b").unwrap()).collect();
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 1000);
}

// --- jobs ---

#[test]
fn many_jobs_are_recorded_and_acked() {
    let server = RedisServer::start();
    let tracker = engine(&server, "busy");
    let handles: Vec<u64> = jobs(3000).iter().map(|job| tracker.track("work", job)).collect();
    for handle in &handles {
        assert!(tracker.is_recorded(*handle, SOON));
    }
    assert_eq!(in_flight(&server).len(), 3000);
    // A job of a megabyte each, more than one turn carries.
    let large: Vec<u64> = (0..5)
        .map(|i| tracker.track("work", &vec![b'0' + i; 1 << 20]))
        .collect();
    for handle in &large {
        assert!(tracker.is_recorded(*handle, SOON));
    }
    for handle in handles.iter().chain(&large) {
        tracker.engine().ack(*handle);
        // Once more is nothing.
        tracker.engine().ack(*handle);
    }
    eventually(SOON, "all are acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_eq!(tracker.count(is_outage), 0);
    assert_at_rest(&server);
}

#[test]
fn a_job_goes_back_and_its_late_ack_takes_nothing() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let () = server.connect().lpush("queue:work", "waits").unwrap();
    let handle = tracker.record("work", &job("a"));
    let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
        panic!()
    };
    assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done);
    assert!(!tracker.engine().take_back(handle));
    assert_eq!(queue(&server, "work"), [job("a"), b"waits".to_vec()]);
    tracker.engine().ack(handle);
    assert!(matches!(tracker.engine().requeue(handle), Requeueing::Settled));
    let other = tracker.record("work", &job("b"));
    tracker.engine().ack(other);
    assert!(matches!(tracker.engine().requeue(other), Requeueing::Settled));
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("a"), b"waits".to_vec()]);
    assert_at_rest(&server);
}

/// An engine whose turns are executed, but not heard of until the flag is set again.
fn deaf_to_turns(server: &RedisServer) -> (Proxy, Tracker, Arc<AtomicBool>) {
    let heard = Arc::new(AtomicBool::new(true));
    let proxy = Proxy::start(server.socket_path(), {
        let heard = heard.clone();
        move |request: &Request| {
            if !heard.load(SeqCst) && lua::is_turn(request) {
                Action::stall_reply()
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    // From now on the server knows the script, and so executes the first call.
    let first = tracker.record("work", &job("first"));
    tracker.engine().ack(first);
    eventually(SOON, "the first is acked", || in_flight(server).is_empty());
    heard.store(false, SeqCst);
    (proxy, tracker, heard)
}

#[test]
fn a_job_whose_record_got_no_answer_is_put_back_by_its_caller_and_only_by_it() {
    let server = RedisServer::start();
    let (_proxy, tracker, turns_are_heard) = deaf_to_turns(&server);
    let handle = tracker.track("work", &job("a"));
    eventually(SOON, "the record is written", || in_flight(&server).len() == 1);
    let Requeueing::Under(_) = tracker.engine().requeue(handle) else {
        panic!()
    };
    assert!(tracker.engine().take_back(handle));
    let () = server.connect().rpush("queue:work", job("a")).unwrap();
    assert!(!tracker.engine().take_back(handle));
    // The answer comes at last: the record goes away.
    turns_are_heard.store(true, SeqCst);
    eventually(SOON, "the record is gone", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("a")]);
    assert_at_rest(&server);
}

#[test]
fn what_a_job_does_after_its_requeue_is_nobodys_business() {
    for then in ["ack", "release", "requeue"] {
        let server = RedisServer::start();
        let (_proxy, tracker, turns_are_heard) = deaf_to_turns(&server);
        let handle = tracker.track("work", &job("a"));
        eventually(SOON, "the record is written", || in_flight(&server).len() == 1);
        let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
            panic!()
        };
        match then {
            "ack" => tracker.engine().ack(handle),
            "release" => tracker.engine().release(handle),
            _ => assert!(matches!(tracker.engine().requeue(handle), Requeueing::Under(_))),
        }
        turns_are_heard.store(true, SeqCst);
        eventually(SOON, "the job is back", || queue(&server, "work") == [job("a")]);
        assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done, "{then}");
        assert!(!tracker.engine().take_back(handle), "{then}");
        assert!(tracker.leave(SOON));
        assert_eq!(queue(&server, "work"), [job("a")], "{then}");
        assert_at_rest(&server);
    }
}

#[test]
fn what_cannot_go_back_stays_recorded_until_it_can() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let dead = engine(&server, "dead");
    let handle = tracker.record("broken", &job("requeued"));
    dead.record("broken", &job("orphan"));
    dead.stop();
    let () = server.connect().set("queue:broken", "not a list").unwrap();
    let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
        panic!()
    };
    assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done);
    let warns = |of: &'static str| move |event: &Event| matches!(event, Event::Warning(text) if text.contains(of));
    tracker.wait_for("the requeue is warned of", warns("queue:broken"));
    tracker.wait_for("the orphan is warned of", warns("no list"));
    eventually(SOON, "the orphan was tried and warned of", || {
        tracker.count(warns("dead")) == 1
    });
    // It is tried again and again, but not told so.
    let held_until =
        |server: &RedisServer| -> f64 { server.connect().zscore(keys().instances(), dead.identity()).unwrap() };
    let first = held_until(&server);
    eventually(SOON, "the orphan was tried again", || held_until(&server) > first);
    assert_eq!(in_flight(&server).len(), 2);
    let () = server.connect().del("queue:broken").unwrap();
    eventually(SOON, "the orphan is back", || {
        queue(&server, "broken") == [job("orphan")]
    });
    proxy.close_all(End::Close);
    let probe = tracker.record("work", &job("probe"));
    tracker.engine().ack(probe);
    eventually(SOON, "the other is back too", || queue(&server, "broken").len() == 2);
    assert_eq!(tracker.count(warns("queue:broken")), 1);
    assert_eq!(tracker.count(warns("dead")), 1);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn what_nobody_holds_goes_back_and_what_is_missing_is_recorded_again() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let held = tracker.record("work", &job("held"));
    let released = tracker.record("work", &job("released"));
    let mut connection = server.connect();
    let hash = keys().inflight(&tracker.identity());
    // A Redis that came back older than it was: an acked job is there again, a record is missing.
    let tokens: Vec<(String, Vec<u8>)> = connection.hgetall(&hash).unwrap();
    let token = tokens.iter().find(|(_, payload)| *payload == job("held")).unwrap();
    let () = connection.hdel(&hash, &token.0).unwrap();
    let () = connection.hset(&hash, "0-1 5 work", job("acked")).unwrap();
    tracker.engine().release(released);
    proxy.close_all(End::Close);
    let probe = tracker.record("work", &job("probe"));
    tracker.engine().ack(probe);
    eventually(SOON, "what nobody holds is back", || queue(&server, "work").len() == 2);
    assert_eq!(queue(&server, "work"), [job("acked"), job("released")]);
    eventually(SOON, "the record is there again", || {
        in_flight(&server) == [job("held")]
    });
    tracker.engine().ack(held);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work").len(), 2);
    assert_at_rest(&server);
}

#[test]
fn leaving_flushes_acks_and_puts_back_what_is_held_oldest_first() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let () = server.connect().lpush("queue:work", "waits").unwrap();
    let handles: Vec<u64> = jobs(20).iter().map(|job| tracker.record("work", job)).collect();
    for handle in handles.iter().step_by(2) {
        tracker.engine().ack(*handle);
    }
    // One more, in the very last moment.
    let _ = tracker.track("work", &job("last"));
    assert!(tracker.leave(SOON));
    let mut expected: Vec<Vec<u8>> = jobs(20).into_iter().skip(1).step_by(2).collect();
    expected.extend([job("last"), b"waits".to_vec()]);
    assert_eq!(queue(&server, "work"), expected);
    assert_at_rest(&server);
}

#[test]
fn a_marked_class_is_known_before_its_job_and_under_every_identity() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let marked = |identity: &str| -> bool {
        server
            .connect()
            .hexists(keys().info(identity), "marked:HardJob")
            .unwrap()
    };
    assert!(!marked(&tracker.identity()));
    let handle = tracker
        .engine()
        .track(b"work".to_vec(), job("a").into(), Some("HardJob".into()));
    assert!(tracker.is_recorded(handle, SOON));
    assert!(marked(&tracker.identity()));
    let old = tracker.identity();
    let () = server.connect().del(keys().inflight(&old)).unwrap();
    tracker.wait_for("the lease is lost", is_lease_lost);
    assert!(marked(&tracker.identity()));
    assert!(tracker.leave(SOON));
}

// --- recovery on demand ---

#[test]
fn reenqueue_orphans_returns_when_all_listed_are_recovered_or_have_renewed() {
    let server = RedisServer::start();
    let dead: Vec<Tracker> = (0..2).map(|i| engine(&server, &format!("dead{i}"))).collect();
    for (i, tracker) in dead.iter().enumerate() {
        tracker.record("work", &job(&format!("j{i}")));
        tracker.stop();
    }
    let alive = engine(&server, "alive");
    alive.record("work", &job("alive"));
    let start = Instant::now();
    let settings = settings(&server.socket_path(), "console");
    let report = recover_all(&settings).unwrap();
    // The living engine reaps too: between them they have got both.
    assert_eq!(queue(&server, "work").len(), 2);
    assert_eq!(report.requeued as usize + alive.count(is_recovered), 2);
    assert_eq!(alive.count(is_lease_lost), 0);
    assert_eq!(in_flight(&server), [job("alive")]);
    assert!(start.elapsed() < SOON);

    // Nothing is due: it waits for a sign of life, no longer.
    let report = recover_all(&settings).unwrap();
    assert_eq!(report.requeued, 0);
    assert!(alive.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn reenqueue_orphans_alone_keeps_the_clock_going() {
    let server = RedisServer::start();
    let settings = settings(&server.socket_path(), "console");
    assert_eq!(recover_all(&settings).unwrap().requeued, 0);
    let dead = engine(&server, "dead");
    for job in jobs(450) {
        dead.track("work", &job);
    }
    dead.record("work", &job("last"));
    let from = dead.identity();
    dead.stop();
    let report = recover_all(&settings).unwrap();
    assert_eq!((report.requeued, report.stuck), (451, 0));
    let mut expected = jobs(450);
    expected.push(job("last"));
    assert_eq!(queue(&server, "work"), expected);
    assert!(journal(&server)
        .iter()
        .all(|line| line.from == from && line.by.starts_with("console:")));
    assert_at_rest(&server);
}

#[test]
fn reenqueue_orphans_does_not_wait_for_what_cannot_be_settled() {
    let server = RedisServer::start();
    let (stuck, overwritten) = (engine(&server, "stuck"), engine(&server, "overwritten"));
    stuck.record("broken", &job("stuck"));
    stuck.record("work", &job("fine"));
    overwritten.record("work", &job("gone"));
    let lost = keys().inflight(&overwritten.identity());
    stuck.stop();
    overwritten.stop();
    let () = server.connect().set("queue:broken", "x").unwrap();
    let () = server.connect().set(&lost, "x").unwrap();
    let report = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!((report.requeued, report.stuck), (1, 1));
    assert_eq!(queue(&server, "work"), [job("fine")]);
    assert_eq!(instances(&server).len(), 2);
}

#[test]
fn reenqueue_orphans_can_be_cancelled() {
    let server = RedisServer::start();
    let mut slow = settings(&server.socket_path(), "one");
    (slow.interval, slow.ttl) = (Duration::from_secs(60), Duration::from_secs(600));
    let engine = Tracker::registered(slow.clone());
    engine.stop();
    let cancel = Parker::new();
    let waiting = thread::spawn({
        let cancel = cancel.clone();
        move || tracker::recover(&slow, &cancel)
    });
    let clock = |server: &RedisServer| -> f64 { server.connect().hget(keys().clock(), "seen").unwrap() };
    let before = clock(&server);
    let () = server.connect().hincr(keys().clock(), "seen", -30_000).unwrap();
    eventually(SOON, "it is at work", || clock(&server) >= before);
    assert!(!waiting.is_finished());
    cancel.unpark();
    let start = Instant::now();
    assert_eq!(waiting.join().unwrap().unwrap().requeued, 0);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn reenqueue_orphans_says_that_redis_is_away() {
    let mut server = RedisServer::start();
    let settings = settings(&server.socket_path(), "console");
    server.crash();
    let start = Instant::now();
    let error = recover_all(&settings).unwrap_err();
    assert!(matches!(error, Error::Connection(_)), "{error:?}");
    assert!(start.elapsed() < SOON);
}

// --- outages ---

#[test]
fn in_an_outage_nobody_waits_and_what_still_runs_is_recorded_after_it() {
    let mut server = ServerOptions::default().appendonly().start();
    let tracker = engine(&server, "one");
    let before = tracker.record("work", &job("before"));
    for outage in 1..=2 {
        server.crash();
        tracker.wait_for("the outage is told", |_| tracker.count(is_outage) == outage);
        let runs = tracker.track("work", &job(&format!("runs{outage}")));
        let finished = tracker.track("work", &job("finished"));
        let put_back = tracker.track("work", &job("put back"));
        let start = Instant::now();
        for handle in [runs, finished, put_back] {
            assert!(matches!(tracker.engine().recorded(handle), Recorded::No));
        }
        assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
        tracker.engine().ack(finished);
        assert!(matches!(tracker.engine().requeue(put_back), Requeueing::Unrecorded));
        assert!(tracker.engine().take_back(put_back));
        if outage == 1 {
            tracker.engine().ack(before);
        }
        server.start_again();
        let back = Instant::now();
        eventually(SOON, "what runs is recorded", || in_flight(&server).len() == outage);
        assert!(back.elapsed() < Duration::from_secs(3), "{:?}", back.elapsed());
        eventually(SOON, "the end of the outage is told", || {
            tracker.count(is_outage_over) == outage
        });
        assert!(tracker.is_recorded(runs, SOON));
    }
    let mut held = in_flight(&server);
    held.sort();
    assert_eq!(held, [job("runs1"), job("runs2")]);
    // A wait that an outage overtakes ends with it.
    server.pause();
    let handle = tracker.track("work", &job("overtaken"));
    let start = Instant::now();
    assert!(!tracker.is_recorded(handle, SOON));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    server.resume();
    eventually(SOON, "it is recorded", || in_flight(&server).len() == 3);
    eventually(SOON, "the outage is over", || tracker.count(is_outage_over) == 3);
    assert_eq!(tracker.count(is_outage), 3);
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work").len(), 3);
    assert_at_rest(&server);
}

#[test]
fn a_connection_that_breaks_once_is_no_outage() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let lease_end = || -> f64 { server.connect().zscore(keys().instances(), tracker.identity()).unwrap() };
    for round in 0..10 {
        proxy.close_all(End::Close);
        let handle = tracker.record("work", &job(&format!("j{round}")));
        tracker.engine().ack(handle);
        // A link that breaks twice, with no answer between, is an outage. One beat may go along on the other link; of the next
        // two the second tells that the first was answered.
        for _ in 0..3 {
            let before = lease_end();
            eventually(SOON, "it has beaten", || lease_end() > before);
        }
    }
    assert!(tracker.leave(SOON));
    assert_eq!((tracker.count(is_outage), tracker.count(is_lease_lost)), (0, 0));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

#[test]
fn one_who_waited_in_vain_stops_the_others_only_until_the_next_answer() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    tracker.record("work", &job("a"));
    // Until nothing is under way any more, whose answer would count.
    thread::sleep(STEP);
    tracker.engine().waited_in_vain();
    eventually(Duration::from_secs(5), "Redis was asked again", || {
        tracker.count(is_outage_over) == 1
    });
    assert_eq!(tracker.count(is_outage), 1);
    let handle = tracker.track("work", &job("b"));
    assert!(!matches!(tracker.engine().recorded(handle), Recorded::No));
}

#[test]
fn an_engine_may_start_before_redis_does() {
    let mut server = RedisServer::start();
    server.crash();
    let tracker = Tracker::start(settings(&server.socket_path(), "early"));
    tracker.wait_for("the outage is told", is_outage);
    let handle = tracker.track("work", &job("a"));
    assert!(matches!(tracker.engine().recorded(handle), Recorded::No));
    server.start_again();
    tracker.wait_for("it is registered", |event| matches!(event, Event::Started { .. }));
    assert!(tracker.is_recorded(handle, SOON));
    eventually(SOON, "the outage is over", || tracker.count(is_outage_over) == 1);
    assert_eq!(tracker.count(is_outage), 1);
    assert_eq!(instances(&server), [tracker.identity()]);
    tracker.engine().ack(handle);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn an_engine_that_cannot_reach_redis_ends_in_time() {
    let mut server = RedisServer::start();
    let registered = engine(&server, "one");
    registered.record("work", &job("a"));
    server.crash();
    let never = Tracker::start(settings(&server.socket_path(), "never"));
    let waits = Tracker::start(settings(&server.socket_path(), "never, and has a job"));
    let _ = waits.track("work", &job("b"));
    // One that was never registered and has no job has nothing to leave.
    for (tracker, leaves) in [(&registered, false), (&never, true), (&waits, false)] {
        let start = Instant::now();
        assert_eq!(tracker.leave(Duration::from_millis(500)), leaves);
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

/// Lets connections come and go, until it shuts the door on the control link.
struct Selective {
    shut: Arc<AtomicBool>,
    control: Option<u64>,
}

impl Plan for Selective {
    fn connect(&mut self, _connection: u64) -> OnConnect {
        if self.shut.load(SeqCst) {
            OnConnect::Close
        } else {
            OnConnect::Accept
        }
    }

    fn request(&mut self, request: &Request) -> Action {
        if lua::is_call(request, &lua::REGISTER) {
            self.control = Some(request.connection);
        }
        if self.shut.load(SeqCst) && self.control == Some(request.connection) {
            Action::drop_request()
        } else {
            Action::pass()
        }
    }
}

#[test]
fn beats_ride_on_the_claims_link_when_the_control_link_cannot_connect() {
    let server = RedisServer::start();
    let shut = Arc::new(AtomicBool::new(false));
    let plan = Selective {
        shut: shut.clone(),
        control: None,
    };
    let proxy = Proxy::start(server.socket_path(), plan);
    let mut settings_of_one = settings(&proxy.socket_path(), "one");
    settings_of_one.keep_control = SOON;
    let tracker = Tracker::registered(settings_of_one);
    let survivor = engine(&server, "survivor");
    let identity = tracker.identity();
    let held = tracker.record("work", &job("held"));
    shut.store(true, SeqCst);
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < TTL * 3 {
        let handle = tracker.track("work", &job("meanwhile"));
        eventually(SOON, "the job is recorded", || in_flight(&server).len() == 2);
        tracker.engine().ack(handle);
        eventually(SOON, "the job is acked", || in_flight(&server).len() == 1);
        done += 1;
    }
    assert!(done > 10, "{done}");
    assert!(proxy.counts().of("refused") > 2, "{}", proxy.counts());
    assert_eq!(tracker.identity(), identity);
    assert_eq!(survivor.count(is_recovered), 0);
    // Trouble with one link is one trouble, however often the other helps out.
    assert!(tracker.count(is_outage) <= 1, "{:?}", tracker.told());
    shut.store(false, SeqCst);
    eventually(SOON, "the outage is over", || {
        tracker.count(is_outage) == tracker.count(is_outage_over)
    });
    tracker.engine().ack(held);
    assert!(tracker.leave(SOON));
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert!(survivor.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

#[test]
fn a_claims_link_that_does_not_answer_holds_up_no_beat() {
    let server = RedisServer::start();
    let stalls = Arc::new(AtomicBool::new(false));
    let ridden = Arc::new(AtomicUsize::new(0));
    let proxy = Proxy::start(server.socket_path(), {
        let (stalls, ridden) = (stalls.clone(), ridden.clone());
        let mut claims = None;
        move |request: &Request| {
            if lua::is_turn(request) {
                claims = Some(request.connection);
            }
            if !lua::is_call(request, &lua::BEAT) || claims != Some(request.connection) {
                return Action::pass();
            }
            ridden.fetch_add(1, SeqCst);
            if stalls.swap(false, SeqCst) {
                Action::stall()
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let survivor = engine(&server, "survivor");
    let identity = tracker.identity();
    for _ in 0..3 {
        let handle = tracker.record("work", &job("held"));
        ridden.store(0, SeqCst);
        eventually(SOON, "beats go over the claims link", || ridden.load(SeqCst) > 5);
        // Then it is silent, for as long as a lease lasts.
        stalls.store(true, SeqCst);
        eventually(SOON, "it is silent", || !stalls.load(SeqCst));
        eventually(SOON, "there is another", || proxy.open_connections() > 1);
        tracker.engine().ack(handle);
        eventually(SOON, "the job is acked", || in_flight(&server).is_empty());
    }
    assert_eq!(tracker.identity(), identity);
    assert_eq!((survivor.count(is_recovered), tracker.count(is_lease_lost)), (0, 0));
    assert!(tracker.leave(SOON));
    assert!(survivor.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

/// In a large fleet others keep the lease clock going, and Redis is spared half of the beats.
#[test]
fn many_instances_beat_less_often() {
    let server = RedisServer::start();
    let beats = Arc::new(AtomicUsize::new(0));
    let proxy = Proxy::start(server.socket_path(), {
        let beats = beats.clone();
        move |request: &Request| {
            beats.fetch_add(usize::from(lua::is_call(request, &lua::BEAT)), SeqCst);
            Action::pass()
        }
    });
    // One that begins the clock; that gives each lease a new end.
    assert!(engine(&server, "first").leave(SOON));
    let others: Vec<(f64, String)> = (0..10_000).map(|i| (1e14, format!("other:{i}"))).collect();
    let () = server.connect().zadd_multiple(keys().instances(), &others).unwrap();
    let spared = Settings {
        ttl: STEP * 6,
        ..settings(&proxy.socket_path(), "one")
    };
    let pace = spared.pace();
    let (over, mut connection) = (AtomicBool::new(false), server.connect());
    let mut clock = || -> f64 { connection.hget(keys().clock(), "now").unwrap() };
    thread::scope(|scope| {
        let ticking = scope.spawn(|| {
            let mut link = link(&server);
            while !over.load(SeqCst) {
                assert_eq!(scripts::due(&mut link, &keys(), pace).unwrap(), Vec::<Vec<u8>>::new());
            }
        });
        let tracker = Tracker::registered(spared);
        eventually(SOON, "it knows", || beats.load(SeqCst) > 1);
        let (began, before) = (clock(), beats.load(SeqCst));
        eventually(SOON, "time has passed", || {
            clock() - began > 30.0 * STEP.as_millis() as f64
        });
        // At 1.6 to 2 steps from beat to beat; at 0.8 to 1 it were 30 at least.
        let beaten = beats.load(SeqCst) - before;
        assert!((10..25).contains(&beaten), "{beaten} beats");
        assert_eq!(tracker.count(is_lease_lost), 0);
        assert!(tracker.leave(SOON));
        over.store(true, SeqCst);
        ticking.join().unwrap();
    });
}

#[test]
fn scripts_may_be_flushed_at_any_time() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut connection = server.connect();
            while !over.load(SeqCst) {
                redis::cmd("SCRIPT").arg("FLUSH").exec(&mut connection).unwrap();
            }
        });
        for job in jobs(500) {
            let handle = tracker.record("work", &job);
            tracker.engine().ack(handle);
        }
        over.store(true, SeqCst);
    });
    assert!(tracker.leave(SOON));
    assert_eq!((tracker.count(is_outage), tracker.count(is_lease_lost)), (0, 0));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

// --- a Redis that refuses ---

/// What an engine with these settings says is wrong; nothing else may be told.
#[track_caller]
fn trouble(mut settings: Settings) -> String {
    // Time enough for an answer on a busy machine: what is to be seen is what Redis says, not that it said nothing.
    (settings.interval, settings.ttl) = (STEP * 5, STEP * 25);
    let tracker = Tracker::start(settings);
    let told = tracker.wait_for("the trouble is told", is_outage);
    let handle = tracker.track("work", &job("a"));
    let start = Instant::now();
    assert!(!tracker.is_recorded(handle, SOON));
    assert!(start.elapsed() < Duration::from_millis(500));
    tracker.engine().ack(handle);
    // Several more attempts, a fifth of a step apart, do not make more of it.
    thread::sleep(STEP * 3);
    assert_eq!(tracker.told(), std::slice::from_ref(&told));
    let Event::Outage { error } = told else { panic!() };
    for secret in ["hunter2", "wrong-pass", "s3cret"] {
        assert!(!error.contains(secret), "{error}");
    }
    error
}

#[test]
fn a_redis_that_refuses_is_quoted_without_secrets() {
    let server = RedisServer::start();
    // Only now: the server could not be found alive without a password.
    server.config_set("requirepass", "hunter2-is-right");
    let with = |password: Option<&str>, username: Option<&str>| {
        let mut settings = settings(&server.socket_path(), "one");
        settings.redis.password = password.map(Into::into).unwrap_or_default();
        settings.redis.username = username.map(Into::into);
        settings
    };
    let text = trouble(with(Some("wrong-pass"), None));
    assert!(text.contains("refused the username or password"), "{text}");
    let text = trouble(with(Some("wrong-pass"), Some("s3cret-user")));
    assert!(text.contains("refused the username or password"), "{text}");
    let text = trouble(with(None, None));
    assert!(text.contains("NOAUTH"), "{text}");
    let mut settings = with(Some("hunter2-is-right"), None);
    settings.redis.db = 99;
    let text = trouble(settings);
    assert!(text.contains("DB index is out of range"), "{text}");
}

#[test]
fn an_engine_logs_in_and_works_in_its_database() {
    let server = ServerOptions::default().tcp().start();
    redis::cmd("ACL")
        .arg("SETUSER")
        .arg(&["tracker", "on", ">hunter2", "~*", "+@all"])
        .exec(&mut server.connect())
        .unwrap();
    let mut settings = settings(&server.socket_path(), "one");
    settings.redis.address = Address::Tcp("127.0.0.1".into(), server.port().unwrap());
    settings.redis.db = 3;
    settings.redis.username = Some("tracker".into());
    settings.redis.password = "hunter2".into();
    let tracker = Tracker::registered(settings.clone());
    tracker.record("work", &job("a"));
    assert_eq!(our_keys(&server), NOTHING.map(|_| String::new()));
    // Its next connections too.
    redis::cmd("CLIENT")
        .arg(&["KILL", "TYPE", "normal"])
        .exec(&mut server.connect())
        .unwrap();
    tracker.record("work", &job("b"));
    tracker.stop();
    assert_eq!(recover_all(&settings).unwrap().requeued, 2);
    let mut connection = server.connect();
    redis::cmd("SELECT").arg(3).exec(&mut connection).unwrap();
    let back: Vec<Vec<u8>> = connection.lrange("queue:work", 0, -1).unwrap();
    assert_eq!(back, [job("b"), job("a")]);
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut server.connect()).unwrap();
    assert_eq!(keys, NOTHING.map(|_| String::new()));
}

#[test]
fn a_replica_is_named_as_such() {
    let server = ServerOptions::default().config("replicaof", "127.0.0.1 1").start();
    let text = trouble(settings(&server.socket_path(), "one"));
    assert!(text.contains("this server is a replica"), "{text}");
    // The master again: it goes on.
    let tracker = Tracker::start(settings(&server.socket_path(), "one"));
    tracker.wait_for("the trouble is told", is_outage);
    redis::cmd("REPLICAOF")
        .arg("NO")
        .arg("ONE")
        .exec(&mut server.connect())
        .unwrap();
    tracker.wait_for("it is registered", |event| matches!(event, Event::Started { .. }));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn nobody_listens() {
    let server = RedisServer::start();
    let mut settings = settings(&server.socket_path(), "one");
    settings.redis.address = Address::Unix("/nowhere/redis.sock".into());
    let text = trouble(settings.clone());
    assert!(text.contains("No such file"), "{text}");
    settings.redis.address = Address::Tcp("127.0.0.1".into(), 1);
    let text = trouble(settings);
    assert!(text.contains("refused"), "{text}");
}

#[test]
fn an_overwritten_key_is_named_an_outage_and_costs_no_lease() {
    for key in [keys().clock(), keys().instances()] {
        let server = RedisServer::start();
        let tracker = engine(&server, "one");
        let identity = tracker.identity();
        let held = tracker.record("work", &job("held"));
        let () = server.connect().set(&key, "not ours").unwrap();
        let told = tracker.wait_for("the trouble is told", is_outage);
        assert!(
            matches!(&told, Event::Outage { error } if error.contains(&key) && error.contains("overwritten")),
            "{told:?}"
        );
        // Another one that starts meanwhile leaves nothing behind.
        let other = Tracker::start(settings(&server.socket_path(), "other"));
        other.wait_for("the trouble is told", is_outage);
        let inflight = |server: &RedisServer| {
            let mut keys = our_keys(server);
            keys.retain(|key| key.starts_with("inflight:"));
            keys.len()
        };
        thread::sleep(STEP * 2);
        assert_eq!(inflight(&server), 1, "{key}: {:?}", our_keys(&server));
        let () = server.connect().del(&key).unwrap();
        eventually(SOON, "both go on", || instances(&server).len() == 2);
        thread::sleep(TTL);
        assert_eq!(tracker.identity(), identity);
        assert_eq!((tracker.count(is_lease_lost), other.count(is_recovered)), (0, 0));
        assert_eq!((tracker.count(is_outage), tracker.count(is_outage_over)), (1, 1));
        tracker.engine().ack(held);
        assert!(tracker.leave(SOON));
        assert!(other.leave(SOON));
        assert_eq!(queue(&server, "work"), NOTHING);
        assert_at_rest(&server);
    }
}

#[test]
fn an_overwritten_hash_of_a_living_instance_costs_its_lease_only() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let identity = tracker.identity();
    let held = tracker.record("work", &job("held"));
    let hash = keys().inflight(&identity);
    let () = server.connect().set(&hash, "not ours").unwrap();
    let told = tracker.wait_for("the lease is lost", is_lease_lost);
    assert_eq!(
        told,
        Event::LeaseLost {
            identity: identity.clone(),
            new_identity: tracker.identity(),
            jobs: vec![LostJob {
                queue: b"work".to_vec(),
                payload: job("held").into(),
            }],
        }
    );
    assert_ne!(tracker.identity(), identity);
    // What somebody has put there is not ours to delete, and stops nobody.
    let next = tracker.record("work", &job("next"));
    let names_the_key = |event: &Event| matches!(event, Event::Warning(text) if text.contains(&hash));
    tracker.wait_for("a person is told which key it is", names_the_key);
    thread::sleep(STEP * 5);
    assert_eq!((tracker.count(names_the_key), tracker.count(is_outage)), (1, 0));
    let still: String = server.connect().get(&hash).unwrap();
    assert_eq!(still, "not ours");
    let () = server.connect().del(&hash).unwrap();
    tracker.engine().ack(held);
    tracker.engine().ack(next);
    assert!(tracker.leave(SOON));
    assert_eq!(tracker.count(is_lease_lost), 1);
    assert_eq!(queue(&server, "work"), NOTHING);
    // Its old entry goes when its lease has run out.
    let report = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!(report.requeued, 0);
    assert_at_rest(&server);
}

#[test]
fn overwritten_keys_that_only_people_read_trouble_nobody() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let dead = engine(&server, "dead");
    dead.record("work", &job("orphan"));
    let info = keys().info(&tracker.identity());
    for key in [&info, &keys().stats(), &keys().journal(), &"queues".to_owned()] {
        let () = server.connect().del(key).unwrap();
        let () = server.connect().set(key, "not ours").unwrap();
    }
    dead.stop();
    tracker.engine().touch();
    eventually(SOON, "the orphan is back", || queue(&server, "work") == [job("orphan")]);
    let handle = tracker.record("work", &job("a"));
    tracker.engine().ack(handle);
    thread::sleep(STEP * 7);
    assert_eq!(tracker.count(is_outage), 0, "{:?}", tracker.told());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_right_that_goes_missing_is_named_and_no_lease_is_lost_for_it() {
    let server = RedisServer::start();
    let acl = |rule: &str| {
        redis::cmd("ACL")
            .arg(&["SETUSER", USER, rule])
            .exec(&mut server.connect())
            .unwrap();
    };
    let examine = |settings: &Settings| server::examine(&settings.redis, &keys(), SOON);
    let settings = settings(&server.socket_path(), "one");
    assert_eq!(examine(&settings), Ok(()));
    let tracker = Tracker::registered(settings.clone());
    acl("-zadd");
    let Event::Outage { error } = tracker.wait_for("the trouble is told", is_outage) else {
        panic!()
    };
    assert!(error.contains("zadd on sidekiq_processing:*"), "{error}");
    let text = examine(&settings).unwrap_err().to_string();
    assert!(
        text.contains("zadd on sidekiq_processing:*; zadd on dead; zadd on schedule"),
        "{text}"
    );
    acl("+zadd");
    tracker.wait_for("it goes on", is_outage_over);
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert!(tracker.leave(SOON));

    acl("-eval");
    acl("-evalsha");
    let text = examine(&settings).unwrap_err().to_string();
    assert!(text.contains("NOPERM") && text.contains("eval"), "{text}");
    redis::cmd("ACL")
        .arg(&["SETUSER", USER, "resetkeys", "~queue:*", "~queues", "+eval", "+evalsha"])
        .exec(&mut server.connect())
        .unwrap();
    let text = examine(&settings).unwrap_err().to_string();
    assert!(
        text.contains("on sidekiq_processing:*") && !text.contains("on queue"),
        "{text}"
    );
}

#[test]
fn a_right_that_the_look_at_the_lease_needs_costs_no_lease_either() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    tracker.record("work", &job("a"));
    let acl = |rule: &str| {
        redis::cmd("ACL")
            .arg(&["SETUSER", USER, rule])
            .exec(&mut server.connect())
            .unwrap();
    };
    acl("-hget");
    let Event::Outage { error } = tracker.wait_for("the trouble is told", is_outage) else {
        panic!()
    };
    assert!(error.contains("hget on sidekiq_processing:*"), "{error}");
    acl("+hget");
    tracker.wait_for("it goes on", is_outage_over);
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("a")]);
}

#[test]
fn a_redis_that_may_throw_keys_away_is_warned_of_once() {
    let server = ServerOptions::default()
        .config("maxmemory-policy", "allkeys-lru")
        .start();
    let tracker = engine(&server, "one");
    let text = |event: &Event| match event {
        Event::Warning(text) => text.contains("maxmemory-policy allkeys-lru").then(|| text.clone()),
        _ => None,
    };
    tracker.wait_for("the warning", |event| text(event).is_some());
    redis::cmd("CLIENT")
        .arg(&["KILL", "TYPE", "normal"])
        .exec(&mut server.connect())
        .unwrap();
    tracker.record("work", &job("a"));
    assert_eq!(tracker.count(|event| text(event).is_some()), 1);
    let quiet = engine(&RedisServer::start(), "two");
    assert_eq!(quiet.count(|event| matches!(event, Event::Warning(_))), 0);
}

#[test]
fn a_cluster_is_refused() {
    let server = ServerOptions::default().tcp().config("cluster-enabled", "yes").start();
    let text = trouble(settings(&server.socket_path(), "one"));
    assert!(text.contains("Redis Cluster"), "{text}");
}

#[test]
fn a_password_is_asked_for_before_each_login() {
    let server = RedisServer::start();
    let desk = Arc::new(Desk::default());
    let answers = Arc::new(std::sync::Mutex::new(PASSWORD.to_owned()));
    let clerk = thread::spawn({
        let (desk, answers) = (desk.clone(), answers.clone());
        move || loop {
            match desk.next() {
                Asked::Question(question, number) => {
                    let answer = answers.lock().unwrap().clone();
                    desk.answer(question, number, Some(Some(answer)));
                }
                Asked::Wait(parker) => drop(parker.wait(None)),
                Asked::Closed => return,
            }
        }
    });
    let mut settings = settings(&server.socket_path(), "one");
    settings.redis.password = Password::Asked(desk.clone(), desk.add(Some("old".into())));
    let tracker = Tracker::registered(settings);
    tracker.record("work", &job("a"));
    // The password changes, and every connection is made anew.
    *answers.lock().unwrap() = "another".into();
    redis::cmd("ACL")
        .arg(&["SETUSER", USER, "resetpass", ">another"])
        .exec(&mut server.connect())
        .unwrap();
    let kill = || {
        redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", "normal"])
            .exec(&mut server.connect())
            .unwrap();
    };
    kill();
    tracker.record("work", &job("b"));
    // Nobody answers any more: what it was is tried, and is right.
    desk.close();
    clerk.join().unwrap();
    kill();
    tracker.record("work", &job("c"));
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert!(tracker.leave(SOON));
}
