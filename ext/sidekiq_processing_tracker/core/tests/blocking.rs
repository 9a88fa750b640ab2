//! Blocking claims: Redis hands a job over as it comes, and what breaks in the middle of it costs nothing.
//!
//! Other ways to hear of a job (*Waiting for work* in docs/protocol.md) are at work as well, and a look every 5 s. So `QUICK`
//! tells whether it was one of those looks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use processing_tracker_core::link::Link;
use processing_tracker_core::parker::Woken;
use processing_tracker_core::registry::Requeueing;
use processing_tracker_core::scripts::{self, Blocked, Closing, Fenced, Hand, Known, LastCall, Opening, Proof, Took};
use processing_tracker_core::settings::Pace;
use processing_tracker_core::Error;
use redis::Commands;
use support::crews::{blocked, crew, look, push, taken_by, until_blocked, waits, QUICK};
use support::lua;
use support::proxy::{Action, At, End as Cut, Proxy, Request, When};
use support::redis_server::{RedisServer, USER};
use support::tracker::{
    assert_at_rest, blocking, in_flight, is_lease_lost, job, keys, link, our_keys, queue, recover_all, settings,
    Tracker, SOON, STEP, TTL,
};
use support::wait::{eventually, eventually_some};

const NOTHING: [Vec<u8>; 0] = [];

fn engine(server: &RedisServer) -> Tracker {
    Tracker::registered(blocking(settings(&server.socket_path(), "one")))
}

fn is_warning(event: &Event) -> bool {
    matches!(event, Event::Warning(_))
}

#[test]
fn redis_hands_jobs_over_as_they_come_and_is_asked_for_nothing_else() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..20 {
        let parker = waits(&tracker, work);
        until_blocked(&server, 1);
        let turns = server.calls_of("rpop") - server.calls_of("blmove");
        let payload = job(&format!("j{round}"));
        push(&server, "work", std::slice::from_ref(&payload));
        let taken = taken_by(&tracker, work, &parker, QUICK);
        assert_eq!((taken.queue.as_slice(), &*taken.payload), (&b"work"[..], &payload[..]));
        assert_eq!(in_flight(&server), [payload]);
        assert_eq!(queue(&server, "work"), NOTHING);
        if round > 0 {
            // The script takes one with a pop; no turn has asked the queue.
            assert!(server.calls_of("rpop") - server.calls_of("blmove") <= turns + 1);
        }
        tracker.engine().ack(taken.handle);
        eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    }
    assert_eq!(tracker.count(is_warning), 0);
    assert!(tracker.leave(SOON));
    assert_eq!(blocked(&server), 0);
    assert_at_rest(&server);
}

#[test]
fn each_queue_has_a_claim_as_long_as_there_are_threads_for_them() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["a", "b", "c"]);
    let mut parkers: Vec<_> = (0..4).map(|_| waits(&tracker, work)).collect();
    until_blocked(&server, 1);
    parkers.push(waits(&tracker, work));
    parkers.push(waits(&tracker, work));
    // One more thread changes nothing by itself: the next that happens brings more claims.
    push(&server, "c", &[job("c")]);
    let came = eventually_some(QUICK, "the job is handed over", || {
        parkers.iter().position(|parker| parker.is_done())
    });
    let parker = parkers.remove(came);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    tracker.engine().ack(taken.handle);
    parkers.push(waits(&tracker, work));
    until_blocked(&server, 3);
    for name in ["c", "a", "b"] {
        push(&server, name, &[job(name)]);
        let came = eventually_some(QUICK, "the job is handed over", || {
            parkers.iter().position(|parker| parker.is_done())
        });
        let parker = parkers.remove(came);
        let taken = taken_by(&tracker, work, &parker, QUICK);
        assert_eq!(taken.queue, name.as_bytes());
        tracker.engine().ack(taken.handle);
        parkers.push(waits(&tracker, work));
    }
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn redis_tells_of_jobs_only_where_a_queue_has_no_claim() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["a", "b", "c"]);
    let mut parkers: Vec<_> = (0..6).map(|_| waits(&tracker, work)).collect();
    until_blocked(&server, 3);
    let listeners = || -> usize {
        let mut list = redis::cmd("CLIENT");
        let listed: String = list
            .arg("LIST")
            .arg("TYPE")
            .arg("pubsub")
            .query(&mut server.connect())
            .unwrap();
        listed.lines().count()
    };
    // One that there was at first is closed after a while.
    eventually(SOON, "nobody is told", || listeners() == 0);
    let mut quiet_rounds = 0;
    for round in 0..3 {
        for name in ["a", "b", "c"] {
            push(&server, name, &[job(&format!("{name}{round}"))]);
            let came = eventually_some(QUICK, "the job is handed over", || {
                parkers.iter().position(|parker| parker.is_done())
            });
            let parker = parkers.remove(came);
            tracker.engine().ack(taken_by(&tracker, work, &parker, QUICK).handle);
            parkers.push(waits(&tracker, work));
        }
        quiet_rounds += usize::from(listeners() == 0);
        // Where the machine is so busy that a claim is made late, somebody is told meanwhile.
        eventually(SOON, "nobody is told any more", || listeners() == 0);
    }
    assert!(quiet_rounds > 0);
    // Too few threads wait for a claim each.
    for parker in parkers.drain(..4) {
        tracker.engine().stop_waiting(work, &parker);
    }
    eventually(SOON, "somebody is told", || listeners() == 1);
    for name in ["a", "b", "c"] {
        push(&server, name, &[job(name)]);
        let came = eventually_some(QUICK, "the job comes", || {
            parkers.iter().position(|parker| parker.is_done())
        });
        let parker = parkers.remove(came);
        tracker.engine().ack(taken_by(&tracker, work, &parker, QUICK).handle);
        parkers.push(waits(&tracker, work));
    }
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn claims_of_threads_that_have_gone_are_taken_back() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..20 {
        let parker = waits(&tracker, work);
        until_blocked(&server, 1);
        tracker.engine().stop_waiting(work, &parker);
        until_blocked(&server, 0);
        let payload = job(&format!("j{round}"));
        push(&server, "work", std::slice::from_ref(&payload));
        thread::sleep(STEP / 4);
        assert_eq!(queue(&server, "work"), std::slice::from_ref(&payload));
        assert_eq!(in_flight(&server), NOTHING);
        // Whoever comes next gets it.
        let parker = tracker.engine().wait_for_work(work);
        if let Some(parker) = &parker {
            assert_eq!(parker.wait(Some(Instant::now() + QUICK)), Woken::Done);
            tracker.engine().stop_waiting(work, parker);
        }
        let taken = eventually_some(QUICK, "it is there", || tracker.engine().take(work));
        assert_eq!(&*taken.payload, &payload[..]);
        tracker.engine().ack(taken.handle);
        eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    }
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_quiet_crew_has_no_claims() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let _parkers: Vec<_> = (0..3).map(|_| waits(&tracker, work)).collect();
    until_blocked(&server, 1);
    tracker.engine().be_quiet(work, false);
    until_blocked(&server, 0);
    push(&server, "work", &[job("later")]);
    thread::sleep(STEP);
    assert_eq!(queue(&server, "work"), [job("later")]);
    assert_eq!(tracker.engine().take(work).map(|taken| taken.handle), None);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_job_that_comes_while_the_process_goes_stays_in_its_queue_or_goes_back() {
    let server = RedisServer::start();
    for round in 0..30 {
        let tracker = engine(&server);
        let work = crew(&tracker, &["work"]);
        let _parker = waits(&tracker, work);
        until_blocked(&server, 1);
        let payload = job(&format!("j{round}"));
        let pushes = thread::spawn({
            let (path, payload) = (server.socket_path(), payload.clone());
            move || {
                thread::sleep(Duration::from_micros(50 * round));
                let mut link = Link::new(support::tracker::target(&path), SOON);
                link.command(redis::cmd("LPUSH").arg("queue:work").arg(payload))
                    .unwrap();
            }
        });
        assert!(tracker.leave(SOON));
        pushes.join().unwrap();
        // Where it was on its way, Redis gives it back when it hears that the lease is over.
        eventually(SOON, "it is in its queue", || {
            queue(&server, "work") == [payload.clone()]
        });
        let () = server.connect().del("queue:work").unwrap();
        assert_at_rest(&server);
    }
}

/// An instance loses its lease while its claim waits in Redis; then a job comes. `arrives`: so does the rest of the claim.
fn loses_its_lease_while_it_waits(arrives: bool) {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), support::proxy::relay);
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    let identity = tracker.identity();
    proxy.set_plan(
        move |request: &Request| match request.is_setup() || arrives && is_take(request) {
            true => Action::pass(),
            false => Action::drop_request(),
        },
    );
    let other = Tracker::registered(settings(&server.socket_path(), "other"));
    eventually(TTL + SOON, "it is recovered", || {
        !support::tracker::instances(&server).contains(&identity)
    });
    push(&server, "work", &[job("j")]);
    eventually(SOON, "Redis has done its part", || blocked(&server) == 0);
    if arrives {
        eventually(SOON, "Redis has given it back", || queue(&server, "work") == [job("j")]);
    }
    assert_eq!(in_flight(&server), NOTHING);
    proxy.calm();
    tracker.wait_for("it hears of it", is_lease_lost);
    let taken = taken_by(&tracker, work, &parker, SOON);
    tracker.engine().ack(taken.handle);
    assert!(tracker.leave(SOON));
    assert!(other.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn an_instance_that_has_lost_its_lease_gets_nothing_by_a_claim_that_waits() {
    loses_its_lease_while_it_waits(true);
}

#[test]
fn a_claim_of_an_instance_that_cannot_hear_of_its_lost_lease_takes_nothing() {
    loses_its_lease_while_it_waits(false);
}

/// A proxy that does this with the next request of a kind, when told so.
fn once(server: &RedisServer, is_it: fn(&Request) -> bool, action: Action) -> (Proxy, Arc<AtomicBool>) {
    let armed = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let armed = armed.clone();
        move |request: &Request| match is_it(request) && armed.swap(false, SeqCst) {
            true => action,
            false => Action::pass(),
        }
    });
    (proxy, armed)
}

/// A job comes to an instance whose next claim meets with this, and runs once.
fn comes_once_in_spite_of(is_it: fn(&Request) -> bool, action: Action, within: Duration) {
    let server = RedisServer::start();
    let (proxy, armed) = once(&server, is_it, action);
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("before")]);
    armed.store(true, SeqCst);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    tracker.engine().ack(taken.handle);
    let parker = waits(&tracker, work);
    eventually(SOON, "it happens", || !armed.load(SeqCst));
    push(&server, "work", &[job("j")]);
    let taken = taken_by(&tracker, work, &parker, within);
    assert_eq!(&*taken.payload, job("j"));
    eventually(SOON, "the one before is acked", || in_flight(&server) == [job("j")]);
    tracker.engine().ack(taken.handle);
    eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_eq!(tracker.count(is_warning), 0, "{:?}", tracker.told());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

fn is_blmove(request: &Request) -> bool {
    request.command() == "BLMOVE"
}

fn is_take(request: &Request) -> bool {
    lua::is_call(request, &lua::TAKE)
}

#[test]
fn a_claim_that_does_not_arrive_is_made_again() {
    comes_once_in_spite_of(is_blmove, Action::drop_request(), QUICK);
    comes_once_in_spite_of(is_blmove, Action::cut_request(At::Share(0.5), Cut::Reset), QUICK);
}

#[test]
fn a_job_whose_record_is_not_made_at_once_is_recorded_later() {
    comes_once_in_spite_of(is_blmove, Action::cut_request(At::End, Cut::Close), SOON);
    comes_once_in_spite_of(is_take, Action::drop_request(), SOON);
    comes_once_in_spite_of(is_take, Action::cut_request(At::Share(0.5), Cut::Close), SOON);
}

#[test]
fn a_job_whose_claim_is_not_heard_of_goes_back() {
    comes_once_in_spite_of(is_blmove, Action::drop_reply(), SOON);
    comes_once_in_spite_of(is_blmove, Action::cut_reply(At::Share(0.5), Cut::Reset), SOON);
    comes_once_in_spite_of(is_take, Action::drop_reply(), SOON);
    comes_once_in_spite_of(is_take, Action::cut_reply(At::Share(0.5), Cut::Reset), SOON);
}

#[test]
fn a_job_comes_through_a_redis_that_has_forgotten_the_script() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..5 {
        let parker = waits(&tracker, work);
        until_blocked(&server, 1);
        redis::cmd("SCRIPT").arg("FLUSH").exec(&mut server.connect()).unwrap();
        push(&server, "work", &[job(&format!("j{round}"))]);
        let taken = taken_by(&tracker, work, &parker, QUICK);
        tracker.engine().ack(taken.handle);
    }
    eventually(SOON, "all are acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_redis_that_restarts_is_asked_again() {
    let mut server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    for round in 0..3 {
        let parker = waits(&tracker, work);
        until_blocked(&server, 1);
        server.restart();
        push(&server, "work", &[job(&format!("j{round}"))]);
        let taken = taken_by(&tracker, work, &parker, SOON);
        tracker.engine().ack(taken.handle);
    }
    let _parker = waits(&tracker, work);
    until_blocked(&server, 1);
    assert_eq!(tracker.count(is_warning), 0, "{:?}", tracker.told());
    assert!(tracker.leave(SOON));
}

#[test]
fn without_the_rights_it_waits_as_it_can_and_says_so_once() {
    for missing in ["blmove", "lmove", "client|unblock"] {
        let server = RedisServer::start();
        redis::cmd("ACL")
            .arg("SETUSER")
            .arg(USER)
            .arg(&["+@all", &format!("-{missing}")])
            .exec(&mut server.connect())
            .unwrap();
        let tracker = engine(&server);
        let work = crew(&tracker, &["work"]);
        let warning =
            |event: &Event| matches!(event, Event::Warning(text) if text.contains("wait for new jobs on our behalf"));
        for round in 0..3 {
            let parker = waits(&tracker, work);
            tracker.wait_for(&format!("it says that {missing} is missing"), warning);
            push(&server, "work", &[job(&format!("j{round}"))]);
            let taken = taken_by(&tracker, work, &parker, QUICK);
            tracker.engine().ack(taken.handle);
        }
        // Without one of them, turns need their script.
        let others = |event: &Event| {
            is_warning(event) && !matches!(event, Event::Warning(text) if text.contains("transactions"))
        };
        assert_eq!((tracker.count(warning), tracker.count(others)), (1, 1), "{missing}");
        assert_eq!(blocked(&server), 0);
        assert!(tracker.leave(SOON));
        assert_at_rest(&server);
    }
}

#[test]
fn a_redis_that_is_full_gives_what_it_has() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("one"), job("two")]);
    server.config_set("maxmemory", "1");
    let taken = taken_by(&tracker, work, &parker, QUICK);
    tracker.engine().ack(taken.handle);
    let parker = tracker.engine().wait_for_work(work);
    if let Some(parker) = &parker {
        assert_eq!(parker.wait(Some(Instant::now() + QUICK)), Woken::Done);
        tracker.engine().stop_waiting(work, parker);
    }
    let taken = eventually_some(QUICK, "the other", || tracker.engine().take(work));
    tracker.engine().ack(taken.handle);
    eventually(SOON, "they are acked", || in_flight(&server).is_empty());
    server.config_set("maxmemory", "0");
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_queue_that_is_no_list_keeps_nobody_from_the_others() {
    let server = RedisServer::start();
    let () = server.connect().set("queue:broken", "x").unwrap();
    let tracker = engine(&server);
    let work = crew(&tracker, &["broken", "work"]);
    for round in 0..3 {
        let parkers: Vec<_> = (0..6).map(|_| waits(&tracker, work)).collect();
        push(&server, "work", &[job(&format!("j{round}"))]);
        let came = eventually_some(SOON, "the job comes", || parkers.iter().find(|parker| parker.is_done()));
        let taken = taken_by(&tracker, work, came, QUICK);
        tracker.engine().ack(taken.handle);
        parkers
            .iter()
            .for_each(|parker| tracker.engine().stop_waiting(work, parker));
    }
    assert!(tracker.leave(SOON));
    let () = server.connect().del("queue:broken").unwrap();
    assert_at_rest(&server);
}

#[test]
fn twenty_processes_that_wait_get_a_job_each() {
    let server = RedisServer::start();
    let trackers: Vec<_> = (0..20)
        .map(|i| Tracker::registered(blocking(settings(&server.socket_path(), &format!("p{i}")))))
        .collect();
    let crews: Vec<_> = trackers.iter().map(|tracker| crew(tracker, &["work"])).collect();
    for round in 0..3 {
        let parkers: Vec<_> = trackers
            .iter()
            .zip(&crews)
            .map(|(tracker, crew)| waits(tracker, *crew))
            .collect();
        until_blocked(&server, 20);
        let jobs: Vec<_> = (0..20).map(|i| job(&format!("j{round}-{i}"))).collect();
        push(&server, "work", &jobs);
        for ((tracker, crew), parker) in trackers.iter().zip(&crews).zip(&parkers) {
            let taken = taken_by(tracker, *crew, parker, SOON);
            tracker.engine().ack(taken.handle);
        }
        eventually(SOON, "all are acked", || in_flight(&server).is_empty());
    }
    for tracker in trackers {
        assert!(tracker.leave(SOON));
    }
    assert_at_rest(&server);
}

#[test]
fn a_queue_whose_claim_is_not_made_again_is_looked_at() {
    let server = RedisServer::start();
    let tracker = engine(&server);
    let work = crew(&tracker, &["a", "b"]);
    let mut parkers: Vec<_> = (0..10).map(|_| waits(&tracker, work)).collect();
    until_blocked(&server, 2);
    // None of them ends, so nothing of this process' own makes it look.
    for round in 0..10 {
        push(&server, "a", &[job(&format!("j{round}"))]);
        let came = eventually_some(QUICK, "the job comes", || {
            parkers.iter().position(|parker| parker.is_done())
        });
        let parker = parkers.remove(came);
        taken_by(&tracker, work, &parker, QUICK);
    }
    assert_eq!(in_flight(&server).len(), 10);
    until_blocked(&server, 0);
}

/// Something becomes of a job before its record has a token: what the slot has to say is held up.
fn before_its_record(
    what: impl Fn(&Tracker, u64),
    at_last: impl Fn() -> bool + Send + 'static,
    then: impl Fn(&RedisServer),
) {
    let server = RedisServer::start();
    let holds = Arc::new(AtomicBool::new(true));
    let proxy = Proxy::start(server.socket_path(), {
        let holds = holds.clone();
        move |request: &Request| match records(request) && holds.load(SeqCst) {
            true if at_last() => Action::drop_reply(),
            true => Action::delay(Duration::from_millis(200)),
            false => Action::pass(),
        }
    });
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("j")]);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    assert_eq!(in_flight(&server), [job("j")]);
    assert_eq!(
        server
            .connect()
            .exists::<_, u64>(keys().hands(&tracker.identity()))
            .unwrap(),
        1
    );
    what(&tracker, taken.handle);
    then(&server);
    holds.store(false, SeqCst);
    assert!(tracker.leave(SOON));
    then(&server);
    let () = server.connect().del("queue:work").unwrap();
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_at_rest(&server);
}

/// A call of `take` that is to record something.
fn records(request: &Request) -> bool {
    is_take(request) && request.args().last().is_some_and(|index| !index.is_empty())
}

#[test]
fn a_job_may_end_in_any_way_before_its_record_has_a_token() {
    let is_done = |server: &RedisServer| {
        eventually(SOON, "it is acked", || in_flight(server).is_empty());
        assert_eq!(queue(server, "work"), NOTHING);
    };
    let is_back = |server: &RedisServer| {
        eventually(SOON, "it is back", || {
            in_flight(server).is_empty() && queue(server, "work") == [job("j")]
        });
    };
    for lost in [false, true] {
        before_its_record(|tracker, handle| tracker.engine().ack(handle), move || lost, is_done);
        before_its_record(
            |tracker, handle| tracker.engine().release(handle),
            move || lost,
            is_back,
        );
        let is_abandoned = |tracker: &Tracker, handle| {
            assert!(matches!(tracker.engine().requeue(handle), Requeueing::Under(_)));
            tracker.engine().abandon(&[handle]);
        };
        before_its_record(is_abandoned, move || lost, is_back);
        let requeues = |tracker: &Tracker, handle| {
            let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
                panic!("it is to be requeued");
            };
            assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done);
            assert!(!tracker.engine().take_back(handle));
        };
        before_its_record(requeues, move || lost, is_back);
    }
}

#[test]
fn what_a_slot_has_sent_before_its_connection_broke_takes_nothing_out_of_its_hand() {
    let server = RedisServer::start();
    let armed = Arc::new(AtomicBool::new(true));
    let holds = Arc::new(AtomicBool::new(true));
    let proxy = Proxy::start(server.socket_path(), {
        let (armed, holds) = (armed.clone(), holds.clone());
        move |request: &Request| {
            if request.command() == "LMOVE" && armed.swap(false, SeqCst) {
                Action::postpone(When::OnRelease)
            } else if records(request) && holds.load(SeqCst) {
                Action::delay(Duration::from_millis(300))
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("j")]);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    assert_eq!(proxy.late_waiting(), 1);
    proxy.release_late();
    proxy.wait_late(SOON);
    assert_eq!((in_flight(&server), queue(&server, "work")), (vec![job("j")], vec![]));
    holds.store(false, SeqCst);
    tracker.engine().ack(taken.handle);
    eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
}

#[test]
fn a_slot_that_connects_while_its_process_leaves_puts_nothing_back_that_is_done() {
    let server = RedisServer::start();
    let armed = Arc::new(AtomicBool::new(true));
    let slow = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let (armed, slow) = (armed.clone(), slow.clone());
        move |request: &Request| {
            if records(request) && armed.swap(false, SeqCst) {
                slow.store(true, SeqCst);
                Action::drop_request()
            } else if lua::is_call(request, &lua::LEAVE) {
                Action::delay(Duration::from_millis(350))
            } else if request.is_setup() && slow.swap(false, SeqCst) {
                Action::delay(Duration::from_millis(750))
            } else {
                Action::pass()
            }
        }
    });
    let mut settings = blocking(settings(&proxy.socket_path(), "one"));
    (settings.interval, settings.ttl) = (Duration::from_secs(2), Duration::from_secs(20));
    let tracker = Tracker::registered(settings);
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("j")]);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    tracker.engine().ack(taken.handle);
    eventually(SOON, "it connects", || !armed.load(SeqCst) && !slow.load(SeqCst));
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

#[test]
fn a_job_whose_process_dies_before_its_record_has_a_token_is_recovered() {
    let server = RedisServer::start();
    let holds = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let holds = holds.clone();
        move |request: &Request| match holds.load(SeqCst) || records(request) {
            true => {
                holds.store(true, SeqCst);
                Action::drop_request()
            }
            false => Action::pass(),
        }
    });
    let tracker = Tracker::registered(blocking(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    push(&server, "work", &[job("j")]);
    let taken = taken_by(&tracker, work, &parker, QUICK);
    eventually(SOON, "nothing gets through", || holds.load(SeqCst));
    assert_eq!(in_flight(&server), [job("j")]);
    let other = Tracker::registered(settings(&server.socket_path(), "other"));
    eventually(TTL + SOON, "it is recovered", || queue(&server, "work") == [job("j")]);
    // It is alive, and its job has been taken from it.
    holds.store(false, SeqCst);
    proxy.calm();
    let lost = tracker.wait_for("it hears of it", is_lease_lost);
    assert!(matches!(lost, Event::LeaseLost { jobs, .. } if jobs.len() == 1));
    tracker.engine().ack(taken.handle);
    assert!(tracker.leave(SOON));
    assert!(other.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("j")]);
    let () = server.connect().del("queue:work").unwrap();
    assert_at_rest(&server);
}

#[test]
fn an_instance_whose_keys_are_gone_while_its_claim_waits_gets_the_job_once_it_is_registered_anew() {
    let server = RedisServer::start();
    let mut settings = blocking(settings(&server.socket_path(), "one"));
    // No beat tells it before.
    (settings.interval, settings.ttl) = (SOON, SOON * 5);
    let tracker = Tracker::registered(settings);
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    until_blocked(&server, 1);
    for key in our_keys(&server) {
        let () = server.connect().del(keys().clock().replace("clock", &key)).unwrap();
    }
    push(&server, "work", &[job("j")]);
    // It begins, and is then told that nothing protects it: it goes back, and runs once more. Unless a turn was on its way, and has heard
    // of it before: then the thread is woken in vain.
    assert_eq!(parker.wait(Some(Instant::now() + QUICK)), Woken::Done);
    let begun = tracker.engine().arrive(work, &parker);
    let lost = tracker.wait_for("it hears of it", is_lease_lost);
    assert!(matches!(lost, Event::LeaseLost { jobs, .. } if jobs.len() == usize::from(begun.is_some())));
    begun.into_iter().for_each(|taken| tracker.engine().ack(taken.handle));
    // Another claim that waits may bring it once more for the lease that is gone: then a thread is woken in vain.
    let taken = eventually_some(SOON, "it comes again", || match look(&tracker, work) {
        Ok(taken) => Some(taken),
        Err(parker) => {
            parker.wait(Some(Instant::now() + STEP));
            tracker.engine().stop_waiting(work, &parker);
            None
        }
    });
    assert_eq!(&*taken.payload, job("j"));
    tracker.engine().ack(taken.handle);
    eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    assert_eq!(queue(&server, "work"), NOTHING);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

// --- the scripts ---

const PACE: Pace = Pace {
    step: Duration::from_secs(1),
    ttl: Duration::from_secs(10),
};
const ME: &str = "me:1:00";

const PATIENCE: Duration = Duration::from_millis(50);

fn hand(number: u64) -> Hand {
    Hand {
        number,
        queue: Arc::from(&b"work"[..]),
    }
}

fn registered(server: &RedisServer) -> Link {
    let mut link = link(server);
    scripts::register(&mut link, &keys(), ME, PACE, &[]).unwrap();
    link
}

fn opening(number: u64, old: &[(u64, Option<Known>)]) -> Opening {
    Opening {
        hand: hand(number),
        old: old.to_vec(),
    }
}

/// An instance with a hand that is open.
fn open(server: &RedisServer) -> Link {
    let mut link = registered(server);
    opens(&mut link, 1, &[]);
    link
}

/// Opens this hand, and closes these. Answers the tokens of the jobs that were known there.
fn opens(link: &mut Link, number: u64, old: &[(u64, Option<Known>)]) -> Vec<Option<(u64, u64)>> {
    match scripts::open(link, &keys(), ME, &opening(number, old)).unwrap() {
        Fenced::Alive(closings) => closings
            .into_iter()
            .map(|closing| closing.token.map(|token| token.order()))
            .collect(),
        Fenced::Lost => panic!("the lease is lost"),
    }
}

/// What is known of a job in a hand.
fn known(index: u64, jid: &str) -> Known {
    Known {
        index,
        sha1: processing_tracker_core::payload::sha1(&job(jid)),
    }
}

fn claims(link: &mut Link, number: u64, index: Option<u64>) -> (Fenced<Took>, Blocked) {
    scripts::block(link, &keys(), ME, &hand(number), index, PATIENCE).unwrap()
}

/// A job that is in a hand.
fn brings(link: &mut Link, number: u64) -> Vec<u8> {
    match claims(link, number, None) {
        (Fenced::Alive(Took::Nothing), Blocked::Brought(payload)) => payload,
        other => panic!("{other:?}"),
    }
}

/// A claim that is made in spite of everything, without the script that goes before it.
fn moves(link: &mut Link, number: u64) -> processing_tracker_core::Result<redis::Value> {
    let mut command = redis::cmd("BLMOVE");
    command.arg("queue:work").arg(keys().hand(ME, number));
    link.command(command.arg("RIGHT").arg("LEFT").arg(PATIENCE.as_secs_f64()))
}

fn is_refused(claimed: processing_tracker_core::Result<redis::Value>) -> bool {
    matches!(claimed, Err(Error::Refused(text)) if text.contains("WRONGTYPE"))
}

/// What a reaper does, who has a proof of the death.
fn fences(link: &mut Link) {
    let mut listed = scripts::instances(link, &keys()).unwrap();
    let lease_end = listed.pop().unwrap().1.to_string().into_bytes();
    let proof = Proof {
        lease_end,
        process_ended: false,
        told: String::new(),
    };
    scripts::reap(link, &keys(), PACE, ME.as_bytes(), "reaper", PACE.ttl, Some(&proof)).unwrap();
}

/// The fields of the in-flight hash but for the lease, by their numbers.
fn recorded(server: &RedisServer) -> Vec<String> {
    let fields: Vec<String> = server.connect().hkeys(keys().inflight(ME)).unwrap();
    let mut numbers: Vec<_> = fields
        .into_iter()
        .filter(|field| field != "call")
        .map(|field| field.split(' ').next().unwrap().to_owned())
        .collect();
    numbers.sort();
    numbers
}

#[test]
fn a_claim_takes_the_oldest_and_the_next_one_records_it() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("old"), job("new")]);
    assert_eq!(brings(&mut link, 1), job("old"));
    assert_eq!((in_flight(&server), recorded(&server)), (vec![job("old")], vec![]));
    let (took, blocked) = claims(&mut link, 1, Some(7));
    assert_eq!(blocked, Blocked::Brought(job("new")));
    let Fenced::Alive(Took::Recorded(old)) = took else {
        panic!("{took:?}");
    };
    assert_eq!((old.token.order(), old.token.queue()), ((0, 7), &b"work"[..]));
    assert_eq!((old.more, old.counted), (true, false));
    assert_eq!(recorded(&server), ["0-7"]);
    let took = scripts::take(&mut link, &keys(), ME, &hand(1), Some(8)).unwrap();
    assert!(
        matches!(&took, Fenced::Alive(Took::Recorded(new)) if !new.more),
        "{took:?}"
    );
    assert_eq!(recorded(&server), ["0-7", "0-8"]);
    assert_eq!(
        claims(&mut link, 1, None),
        (Fenced::Alive(Took::Nothing), Blocked::Nothing)
    );
    // A hand that holds nothing, where Redis has lost it.
    let took = scripts::take(&mut link, &keys(), ME, &hand(1), Some(9)).unwrap();
    assert_eq!(took, Fenced::Alive(Took::Nothing));
}

#[test]
fn who_takes_the_lease_takes_what_is_in_the_hands_and_closes_them() {
    let server = RedisServer::start();
    let mut link = open(&server);
    opens(&mut link, 2, &[]);
    push(&server, "work", &[job("one"), job("two")]);
    assert_eq!(brings(&mut link, 1), job("one"));
    let mut reaper = support::tracker::link(&server);
    fences(&mut reaper);
    assert_eq!(in_flight(&server), [job("one")]);
    // Numbers that neither turns nor claims give.
    assert_eq!(recorded(&server), [format!("0-{}", 1_u64 << 33)]);
    for number in [1, 2] {
        assert!(is_refused(moves(&mut link, number)));
        assert!(matches!(
            claims(&mut link, number, Some(5)),
            (Fenced::Lost, Blocked::Refused(_))
        ));
        let ttl: i64 = server.connect().ttl(keys().hand(ME, number)).unwrap();
        assert!(ttl > 60);
        // However late: a claim says itself whose it is.
        let () = server.connect().del(keys().hand(ME, number)).unwrap();
        assert!(matches!(
            claims(&mut link, number, None),
            (Fenced::Lost, Blocked::Refused(_))
        ));
    }
    assert_eq!(queue(&server, "work"), [job("two")]);
    assert_eq!(
        scripts::open(&mut link, &keys(), ME, &opening(3, &[])).unwrap(),
        Fenced::Lost
    );
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!(queue(&server, "work"), [job("one"), job("two")]);
    let () = server.connect().del("queue:work").unwrap();
    assert_at_rest(&server);
}

#[test]
fn a_claim_that_waits_while_its_lease_is_taken_leaves_the_job_to_the_next() {
    let server = RedisServer::start();
    let mut link = open(&server);
    let wait = thread::spawn({
        let path = server.socket_path();
        move || {
            let mut link = Link::new(support::tracker::target(&path), SOON);
            let mut command = redis::cmd("BLMOVE");
            command.arg("queue:work").arg(keys().hand(ME, 1));
            link.command(command.arg("RIGHT").arg("LEFT").arg(0))
        }
    });
    until_blocked(&server, 1);
    let next = thread::spawn({
        let mut connection = server.connect();
        move || -> (String, Vec<u8>) { connection.brpop("queue:work", 0.0).unwrap() }
    });
    until_blocked(&server, 2);
    fences(&mut link);
    push(&server, "work", &[job("j")]);
    assert!(is_refused(wait.join().unwrap()));
    assert_eq!(next.join().unwrap().1, job("j"));
    assert_eq!(in_flight(&server), NOTHING);
}

#[test]
fn a_slot_that_connects_anew_finds_what_it_knows_of_and_puts_back_the_rest() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("known"), job("unknown"), job("left")]);
    assert_eq!(brings(&mut link, 1), job("known"));
    moves(&mut link, 1).unwrap();
    for _ in 0..2 {
        // A repetition answers the same.
        assert_eq!(opens(&mut link, 2, &[(1, Some(known(7, "known")))]), [Some((0, 7))]);
        assert_eq!(in_flight(&server), [job("known")]);
        assert_eq!(queue(&server, "work"), [job("unknown"), job("left")]);
    }
    // What was sent before comes late, whole or torn off.
    assert!(is_refused(moves(&mut link, 1)));
    for index in [None, Some(7), Some(8)] {
        assert!(matches!(
            claims(&mut link, 1, index),
            (Fenced::Alive(Took::Closed), Blocked::Refused(_))
        ));
    }
    assert_eq!(queue(&server, "work"), [job("unknown"), job("left")]);
    // Its record was made, and the answer lost.
    assert_eq!(brings(&mut link, 2), job("unknown"));
    scripts::take(&mut link, &keys(), ME, &hand(2), Some(8)).unwrap();
    assert_eq!(opens(&mut link, 3, &[(2, Some(known(8, "unknown")))]), [Some((0, 8))]);
    // Nobody has anything of it any more.
    assert_eq!(
        opens(&mut link, 4, &[(3, Some(known(9, "gone"))), (2, None)]),
        [None, None]
    );
    assert_eq!(
        (recorded(&server), queue(&server, "work")),
        (vec!["0-7".into(), "0-8".into()], vec![job("left")])
    );
    let hands: Vec<String> = server.connect().hkeys(keys().hands(ME)).unwrap();
    assert_eq!(hands, ["4"]);
}

#[test]
fn what_an_instance_has_not_heard_of_goes_back_when_it_leaves() {
    let server = RedisServer::start();
    for is_quiet in [true, false] {
        let mut link = open(&server);
        push(
            &server,
            "work",
            &[job("recorded"), job("done"), job("brought"), job("left")],
        );
        let recorded = 1 << 32;
        brings(&mut link, 1);
        claims(&mut link, 1, Some(recorded));
        let done = scripts::take(&mut link, &keys(), ME, &hand(1), Some(recorded + 1)).unwrap();
        let Fenced::Alive(Took::Recorded(done)) = done else {
            panic!("{done:?}");
        };
        brings(&mut link, 1);
        let last = LastCall {
            acks: vec![done.token],
            quiet: if is_quiet { vec![1] } else { vec![] },
            ..LastCall::default()
        };
        let left = scripts::leave(&mut link, &keys(), ME, &[], &last).unwrap();
        assert_eq!(left, Fenced::Alive(0));
        let mut back = queue(&server, "work");
        assert_eq!(back.pop(), Some(job("left")));
        back.sort();
        assert_eq!(back, [job("brought"), job("recorded")]);
        assert_eq!(our_keys(&server).iter().any(|key| key.starts_with("hands")), !is_quiet);
        assert_eq!(is_refused(moves(&mut link, 1)), !is_quiet);
        let () = server.connect().del("queue:work").unwrap();
        let () = server.connect().del(keys().hand(ME, 1)).unwrap();
        assert_at_rest(&server);
    }
}

#[test]
fn who_leaves_acks_what_is_done_though_it_knows_no_token_of_it() {
    let server = RedisServer::start();
    let mut link = open(&server);
    opens(&mut link, 2, &[]);
    push(&server, "work", &[job("one"), job("two")]);
    brings(&mut link, 1);
    let recorded = 1 << 32;
    // Of the one the answer is lost, the other has not been recorded.
    scripts::take(&mut link, &keys(), ME, &hand(1), Some(recorded)).unwrap();
    brings(&mut link, 2);
    let last = LastCall {
        acks_in_hand: vec![(hand(1), known(recorded, "one")), (hand(2), known(recorded + 1, "two"))],
        quiet: vec![1, 2],
        ..LastCall::default()
    };
    let left = scripts::leave(&mut link, &keys(), ME, &[], &last).unwrap();
    assert_eq!(left, Fenced::Alive(0));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

#[test]
fn where_somebody_has_removed_the_lease_the_next_claim_puts_back_what_the_last_has_brought() {
    let server = RedisServer::start();
    for overwritten in [false, true] {
        let mut link = open(&server);
        push(&server, "work", &[job("one"), job("two")]);
        brings(&mut link, 1);
        let () = server.connect().del(keys().inflight(ME)).unwrap();
        if overwritten {
            let () = server.connect().set(keys().inflight(ME), "overwritten").unwrap();
        }
        assert!(matches!(
            claims(&mut link, 1, Some(7)),
            (Fenced::Lost, Blocked::Refused(_))
        ));
        assert_eq!(queue(&server, "work"), [job("one"), job("two")]);
        let () = redis::cmd("FLUSHALL").query(&mut server.connect()).unwrap();
    }
}

#[test]
fn a_reaper_that_finds_an_overwritten_hash_puts_back_what_is_in_the_hands() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("one"), job("two")]);
    brings(&mut link, 1);
    let () = server.connect().set(keys().inflight(ME), "overwritten").unwrap();
    fences(&mut link);
    assert_eq!(queue(&server, "work"), [job("one"), job("two")]);
    assert!(is_refused(moves(&mut link, 1)));
    let () = server.connect().del(keys().inflight(ME)).unwrap();
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    let () = server.connect().del("queue:work").unwrap();
    assert_at_rest(&server);
}

#[test]
fn what_cannot_go_back_stays_in_the_hand() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("j")]);
    brings(&mut link, 1);
    let () = server.connect().set("queue:work", "no list").unwrap();
    assert_eq!(opens(&mut link, 2, &[(1, None)]), [None]);
    assert_eq!(in_flight(&server), [job("j")]);
    // It is found when the instance is reaped.
    let () = server.connect().del("queue:work").unwrap();
    fences(&mut link);
    assert_eq!(recorded(&server).len(), 1);
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!(queue(&server, "work"), [job("j")]);
}

#[test]
fn what_redis_has_lost_of_a_hand_is_not_taken_for_something_else() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("there"), job("lost")]);
    brings(&mut link, 1);
    // It knows of another, which lies in its queue again.
    assert_eq!(opens(&mut link, 2, &[(1, Some(known(7, "lost")))]), [None]);
    assert_eq!((in_flight(&server), recorded(&server)), (vec![], vec![]));
    assert_eq!(queue(&server, "work"), [job("there"), job("lost")]);
    brings(&mut link, 2);
    let last = LastCall {
        acks_in_hand: vec![(hand(2), known(8, "lost"))],
        ..LastCall::default()
    };
    scripts::leave(&mut link, &keys(), ME, &[], &last).unwrap();
    let mut left = queue(&server, "work");
    left.extend(in_flight(&server));
    assert_eq!(left.len(), 2);
}

#[test]
fn what_redis_refuses_is_no_empty_hand() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("j")]);
    brings(&mut link, 1);
    let rights = |rule: &str| {
        let mut command = redis::cmd("ACL");
        command.arg("SETUSER").arg(USER).arg(rule);
        command.exec(&mut server.connect()).unwrap();
    };
    rights("-rpop");
    let taken = scripts::take(&mut link, &keys(), ME, &hand(1), Some(7));
    assert!(matches!(taken, Err(Error::Refused(_))), "{taken:?}");
    let mut reaper = support::tracker::link(&server);
    let lease_end = scripts::instances(&mut reaper, &keys()).unwrap().pop().unwrap().1;
    let proof = Proof {
        lease_end: lease_end.to_string().into_bytes(),
        process_ended: false,
        told: String::new(),
    };
    let reaped = scripts::reap(&mut reaper, &keys(), PACE, ME.as_bytes(), "r", PACE.ttl, Some(&proof));
    assert!(reaped.is_err());
    assert_eq!(in_flight(&server), [job("j")]);
    rights("+rpop");
    fences(&mut reaper);
    assert_eq!(recorded(&server).len(), 1);
}

#[test]
fn a_hand_that_cannot_be_closed_is_told() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("j")]);
    brings(&mut link, 1);
    let () = server.connect().set("queue:work", "no list").unwrap();
    let closing = |token, closed| Closing { token, closed };
    let old = [(1, None)];
    let opened = scripts::open(&mut link, &keys(), ME, &opening(2, &old)).unwrap();
    assert_eq!(opened, Fenced::Alive(vec![closing(None, false)]));
    let mut hands = scripts::hands(&mut link, &keys(), ME).unwrap();
    hands.sort();
    assert_eq!(hands, [(1, b"work".to_vec()), (2, b"work".to_vec())]);
    let () = server.connect().del("queue:work").unwrap();
    let opened = scripts::open(&mut link, &keys(), ME, &opening(3, &old)).unwrap();
    assert_eq!(opened, Fenced::Alive(vec![closing(None, true)]));
    assert_eq!(queue(&server, "work"), [job("j")]);
    // Also where somebody has overwritten the list of hands.
    let () = server.connect().del(keys().hands(ME)).unwrap();
    let () = server.connect().set(keys().hands(ME), "x").unwrap();
    assert_eq!(scripts::hands(&mut link, &keys(), ME).unwrap(), []);
    opens(&mut link, 4, &[]);
    assert_eq!(scripts::hands(&mut link, &keys(), ME).unwrap(), [(4, b"work".to_vec())]);
}

#[test]
fn a_list_of_hands_that_somebody_has_removed_is_written_again() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("one"), job("two")]);
    brings(&mut link, 1);
    let () = server.connect().del(keys().hands(ME)).unwrap();
    let (took, blocked) = claims(&mut link, 1, Some(7));
    assert!(matches!(took, Fenced::Alive(Took::Recorded(_))), "{took:?}");
    assert_eq!(blocked, Blocked::Brought(job("two")));
    fences(&mut link);
    assert_eq!(recorded(&server).len(), 2);
}

#[test]
fn a_survey_counts_what_is_in_the_hands() {
    let server = RedisServer::start();
    let mut link = open(&server);
    opens(&mut link, 2, &[]);
    push(&server, "work", &[job("one"), job("two")]);
    brings(&mut link, 1);
    let survey = scripts::survey(&mut link, &keys(), &[ME.as_bytes().to_vec()], &[]).unwrap();
    assert_eq!(survey.instances[0].as_ref().unwrap().in_flight, Some(1));
}

#[test]
fn in_a_full_redis_what_was_brought_is_recorded_all_the_same() {
    let server = RedisServer::start();
    let mut link = open(&server);
    push(&server, "work", &[job("one"), job("two")]);
    brings(&mut link, 1);
    server.config_set("maxmemory", "1");
    assert!(matches!(
        claims(&mut link, 1, Some(7)),
        (Fenced::Alive(Took::Recorded(_)), Blocked::Refused(_))
    ));
    assert_eq!(opens(&mut link, 2, &[(1, None)]), [None]);
    server.config_set("maxmemory", "0");
    assert!(is_refused(moves(&mut link, 1)));
    assert_eq!(
        (recorded(&server), queue(&server, "work")),
        (vec!["0-7".into()], vec![job("two")])
    );
}
