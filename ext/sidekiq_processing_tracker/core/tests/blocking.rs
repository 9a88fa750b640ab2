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
use processing_tracker_core::scripts::{self, Block, Blocked, Fenced};
use processing_tracker_core::settings::Pace;
use redis::Commands;
use support::crews::{blocked, crew, push, taken_by, until_blocked, waits, QUICK};
use support::lua;
use support::proxy::{Action, At, End as Cut, Proxy, Request};
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
    let mut parkers: Vec<_> = (0..5).map(|_| waits(&tracker, work)).collect();
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
fn what_is_laid_aside_for_an_instance_that_has_lost_its_lease_is_found() {
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
    assert_eq!(in_flight(&server), [job("j")]);
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
fn a_job_that_is_laid_aside_for_a_claim_that_never_comes_goes_back() {
    // Redis executes BLMOVE, and what belongs behind it is lost or torn.
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
        assert_eq!((tracker.count(warning), tracker.count(is_warning)), (1, 1), "{missing}");
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
        assert_eq!(
            our_keys(&server).iter().filter(|key| key.starts_with("aside")).count(),
            0
        );
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

#[test]
fn a_process_without_such_claims_finds_what_lies_aside() {
    let server = RedisServer::start();
    let aside = |queue: &str| format!("sidekiq_processing:aside:{queue}");
    let mut connection = server.connect();
    let () = connection.lpush(aside("work"), &[job("one"), job("two")]).unwrap();
    let () = connection.sadd("queues", "work").unwrap();
    let tracker = Tracker::registered(settings(&server.socket_path(), "middleware"));
    eventually(SOON, "they are back", || {
        queue(&server, "work") == [job("one"), job("two")]
    });
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

// --- the scripts ---

const PACE: Pace = Pace {
    step: Duration::from_secs(1),
    ttl: Duration::from_secs(10),
};
const ME: &str = "me:1:00";

fn claim(index: u64) -> Block {
    Block {
        queue: Arc::from(&b"work"[..]),
        slot: 0,
        index,
        patience: Duration::from_millis(50),
    }
}

fn registered(server: &RedisServer) -> Link {
    let mut link = link(server);
    scripts::register(&mut link, &keys(), ME, PACE, &[]).unwrap();
    link
}

#[test]
fn a_claim_takes_the_oldest_and_says_what_else_there_is() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("old"), job("new")]);
    for (index, jid, more) in [(7, "old", true), (8, "new", false)] {
        let Fenced::Alive(Blocked::Brought(brought)) = scripts::block(&mut link, &keys(), ME, &claim(index)).unwrap()
        else {
            panic!("a job was expected");
        };
        assert_eq!(
            (brought.payload, brought.more, brought.counted),
            (job(jid), more, false)
        );
        assert_eq!(
            (brought.token.order(), brought.token.queue()),
            ((0, index), &b"work"[..])
        );
    }
    assert_eq!(in_flight(&server).len(), 2);
    assert_eq!(
        scripts::block(&mut link, &keys(), ME, &claim(9)).unwrap(),
        Fenced::Alive(Blocked::Nothing)
    );
}

#[test]
fn a_late_copy_of_a_claim_takes_nothing() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("one"), job("two"), job("three")]);
    for index in [2, 2, 1] {
        scripts::block(&mut link, &keys(), ME, &claim(index)).unwrap();
        assert_eq!(in_flight(&server), [job("one")]);
        assert_eq!(queue(&server, "work"), [job("two"), job("three")]);
    }
    // Another slot has its own.
    let other = Block { slot: 1, ..claim(1) };
    scripts::block(&mut link, &keys(), ME, &other).unwrap();
    assert_eq!(queue(&server, "work"), [job("three")]);
}

#[test]
fn a_claim_that_comes_after_its_slot_has_connected_anew_takes_nothing() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("one")]);
    scripts::prepare_to_block(&mut link, &keys(), ME, &claim(5)).unwrap();
    for index in [5, 4] {
        scripts::block(&mut link, &keys(), ME, &claim(index)).unwrap();
        assert_eq!((in_flight(&server), queue(&server, "work")), (vec![], vec![job("one")]));
    }
    // It goes on from there, and never back.
    scripts::prepare_to_block(&mut link, &keys(), ME, &claim(3)).unwrap();
    scripts::block(&mut link, &keys(), ME, &claim(5)).unwrap();
    assert_eq!(in_flight(&server), NOTHING);
    scripts::block(&mut link, &keys(), ME, &claim(6)).unwrap();
    assert_eq!(in_flight(&server), [job("one")]);
    // Who has no lease leaves nothing behind.
    scripts::prepare_to_block(&mut link, &keys(), "nobody:1:00", &claim(5)).unwrap();
    assert!(!our_keys(&server).iter().any(|key| key.contains("nobody")));
}

#[test]
fn what_an_instance_has_not_heard_of_goes_back_when_it_leaves() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("one"), job("two")]);
    let index = 1 << 32;
    scripts::block(&mut link, &keys(), ME, &claim(index)).unwrap();
    let Fenced::Alive(Blocked::Brought(known)) = scripts::block(&mut link, &keys(), ME, &claim(index + 1)).unwrap()
    else {
        panic!("a job was expected");
    };
    let left = scripts::leave(&mut link, &keys(), ME, &[], &[known.token], &[]).unwrap();
    assert_eq!(left, Fenced::Alive(0));
    assert_eq!(queue(&server, "work"), [job("one")]);
    assert_at_rest(&server);
}

#[test]
fn without_a_lease_nothing_is_claimed() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("one"), job("two")]);
    let () = server.connect().del(keys().inflight(ME)).unwrap();
    assert_eq!(scripts::block(&mut link, &keys(), ME, &claim(1)).unwrap(), Fenced::Lost);
    assert_eq!(queue(&server, "work"), [job("one"), job("two")]);
    let () = server.connect().set(keys().inflight(ME), "overwritten").unwrap();
    assert_eq!(scripts::block(&mut link, &keys(), ME, &claim(1)).unwrap(), Fenced::Lost);
    assert_eq!(queue(&server, "work"), [job("one"), job("two")]);
}

#[test]
fn what_lies_aside_goes_back_in_its_order() {
    let server = RedisServer::start();
    let mut link = registered(&server);
    push(&server, "work", &[job("third")]);
    let aside = "sidekiq_processing:aside:work";
    let () = server.connect().lpush(aside, &[job("first"), job("second")]).unwrap();
    let queues = [Arc::from(&b"work"[..]), Arc::from(&b"none"[..])];
    assert_eq!(scripts::gather(&mut link, &keys(), ME, &queues).unwrap(), 2);
    assert_eq!(queue(&server, "work"), [job("first"), job("second"), job("third")]);
    assert_eq!(scripts::gather(&mut link, &keys(), ME, &queues).unwrap(), 0);
    // Where it cannot go back it stays.
    let () = server.connect().lpush(aside, job("stays")).unwrap();
    let () = server.connect().set("queue:none", "x").unwrap();
    let () = server.connect().rename(aside, "sidekiq_processing:aside:none").unwrap();
    assert_eq!(scripts::gather(&mut link, &keys(), ME, &queues).unwrap(), 0);
    let left: Vec<Vec<u8>> = server.connect().lrange("sidekiq_processing:aside:none", 0, -1).unwrap();
    assert_eq!(left, [job("stays")]);
}

#[test]
fn the_next_process_finds_what_lies_aside() {
    let server = RedisServer::start();
    let () = server
        .connect()
        .lpush("sidekiq_processing:aside:work", job("left"))
        .unwrap();
    let tracker = engine(&server);
    let work = crew(&tracker, &["work"]);
    let parker = waits(&tracker, work);
    let taken = taken_by(&tracker, work, &parker, SOON);
    assert_eq!(&*taken.payload, job("left"));
    tracker.engine().ack(taken.handle);
    assert!(tracker.leave(SOON));
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_at_rest(&server);
}
