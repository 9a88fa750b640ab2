//! Nobody is taken for dead who lives, and who really was away learns it once.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use processing_tracker_core::registry::Handle;
use redis::Commands;
use support::process::Options;
use support::redis_server::{Options as ServerOptions, RedisServer};
use support::tracker::{
    assert_at_rest, in_flight, instances, is_lease_lost, is_outage, is_outage_over, is_recovered, job, journal, keys,
    queue, settings, Tracker, SOON, STEP, TTL,
};
use support::wait::eventually;

/// Three engines at work, each with a job in flight.
struct Fleet(Vec<(Tracker, String, Handle)>);

impl Fleet {
    fn start(server: &RedisServer) -> Self {
        let start = |i| {
            let tracker = Tracker::registered(settings(&server.socket_path(), &format!("engine{i}")));
            let handle = tracker.record("work", &job(&format!("j{i}")));
            let identity = tracker.identity();
            (tracker, identity, handle)
        };
        Fleet((0..3).map(start).collect())
    }

    /// Time that has to pass: it is what these tests are about.
    fn live_through(&self, time: Duration) {
        thread::sleep(time);
        self.assert_untroubled();
    }

    fn outages(&self) -> usize {
        self.0.iter().map(|(tracker, ..)| tracker.count(is_outage)).sum()
    }

    fn outages_over(&self) -> usize {
        self.0.iter().map(|(tracker, ..)| tracker.count(is_outage_over)).sum()
    }

    /// Nobody lost a lease or recovered anybody, and all are who they were.
    #[track_caller]
    fn assert_untroubled(&self) {
        for (tracker, identity, _) in &self.0 {
            assert_eq!(tracker.count(is_lease_lost), 0, "{:?}", tracker.told());
            assert_eq!(tracker.count(is_recovered), 0, "{:?}", tracker.told());
            assert_eq!(tracker.identity(), *identity);
        }
    }

    /// All have a record each and beat; they finish their jobs, do one more, and leave.
    fn end(self, server: &RedisServer) {
        let mut connection = server.connect();
        let ends: Vec<(String, f64)> = connection.zrange_withscores(keys().instances(), 0, -1).unwrap();
        eventually(SOON, "all beat", || {
            let now: Vec<(String, f64)> = connection.zrange_withscores(keys().instances(), 0, -1).unwrap();
            ends.iter()
                .all(|(identity, end)| now.iter().any(|(name, later)| name == identity && later > end))
        });
        // Reaps would follow now, if they did at all.
        self.live_through(TTL);
        assert_eq!(in_flight(server).len(), 3);
        for (tracker, _, handle) in &self.0 {
            let another = tracker.record("work", &job("another"));
            tracker.engine().ack(*handle);
            tracker.engine().ack(another);
        }
        self.assert_untroubled();
        for (tracker, ..) in &self.0 {
            assert!(tracker.leave(SOON));
        }
        assert_eq!(queue(server, "work"), Vec::<Vec<u8>>::new());
        assert_eq!(journal(server), []);
        assert_at_rest(server);
    }
}

#[test]
fn a_redis_that_stands_kills_nobody() {
    let server = RedisServer::start();
    let fleet = Fleet::start(&server);
    server.pause();
    fleet.live_through(TTL * 3);
    assert_eq!((fleet.outages(), fleet.outages_over()), (3, 0));
    server.resume();
    eventually(SOON, "the outage is over", || fleet.outages_over() == 3);
    assert_eq!(fleet.outages(), 3);
    fleet.end(&server);
}

#[test]
fn a_redis_that_is_restarted_kills_nobody() {
    let mut server = ServerOptions::default()
        .appendonly()
        .config("appendfsync", "always")
        .start();
    let fleet = Fleet::start(&server);
    server.crash();
    fleet.live_through(TTL * 3);
    assert_eq!((fleet.outages(), fleet.outages_over()), (3, 0));
    server.start_again();
    eventually(SOON, "the outage is over", || fleet.outages_over() == 3);
    fleet.end(&server);
}

#[test]
fn a_redis_whose_memory_is_full_kills_nobody_but_the_dead() {
    let server = ServerOptions::default().maxmemory("8mb").start();
    let fleet = Fleet::start(&server);
    let mut killed = Options::new(&server.socket_path()).registered();
    killed.record("dead", &job("dead"));
    let mut connection = server.connect();
    let full = |connection: &mut redis::Connection| {
        let big = vec![b'x'; 100_000];
        let mut refused = |i: u32, bytes: &[u8]| connection.set::<_, _, ()>(format!("fill:{i}"), bytes).is_err();
        (0..1000).any(|i| refused(i, &big)) && (1000..100_000).any(|i| refused(i, b"x"))
    };
    assert!(full(&mut connection));
    thread::sleep(TTL * 3 / 2);
    fleet.assert_untroubled_but_reaping();
    assert!(full(&mut connection));
    // Orphans come back, records and acks are taken, nobody notices anything.
    killed.kill();
    eventually(SOON, "the orphan is back", || queue(&server, "dead") == [job("dead")]);
    for (tracker, ..) in &fleet.0 {
        let handle = tracker.record("work", &job("meanwhile"));
        tracker.engine().ack(handle);
    }
    thread::sleep(TTL * 3 / 2);
    eventually(SOON, "the acks are done", || in_flight(&server).len() == 3);
    fleet.assert_untroubled_but_reaping();
    assert_eq!(fleet.outages(), 0);
    assert_eq!(instances(&server).len(), 3);
    for (tracker, _, handle) in &fleet.0 {
        tracker.engine().ack(*handle);
        assert!(tracker.leave(SOON));
    }
    assert_at_rest(&server);
}

impl Fleet {
    #[track_caller]
    fn assert_untroubled_but_reaping(&self) {
        for (tracker, identity, _) in &self.0 {
            assert_eq!(tracker.count(is_lease_lost), 0, "{:?}", tracker.told());
            assert_eq!(tracker.identity(), *identity);
        }
    }
}

#[test]
fn a_redis_that_refuses_writes_kills_nobody() {
    let server = RedisServer::start();
    let fleet = Fleet::start(&server);
    server.break_saves();
    fleet.live_through(TTL * 3);
    assert_eq!((fleet.outages(), fleet.outages_over()), (3, 0));
    server.mend_saves();
    eventually(SOON, "the outage is over", || fleet.outages_over() == 3);

    server.config_set("min-replicas-to-write", "1");
    fleet.live_through(TTL * 3);
    assert_eq!((fleet.outages(), fleet.outages_over()), (6, 3));
    for code in ["MISCONF", "NOREPLICAS"] {
        for (tracker, ..) in &fleet.0 {
            let tells = |event: &Event| matches!(event, Event::Outage { error } if error.contains(code));
            assert_eq!(tracker.count(tells), 1, "{:?}", tracker.told());
        }
    }
    server.config_set("min-replicas-to-write", "0");
    eventually(SOON, "the outage is over", || fleet.outages_over() == 6);
    fleet.end(&server);
}

#[test]
fn a_server_clock_that_is_set_kills_nobody() {
    let server = ServerOptions::default().fake_clock().start();
    let fleet = Fleet::start(&server);
    for seconds in [300, -300, 3600, 3590, 0] {
        server.set_clock(seconds);
        fleet.live_through(STEP * 3);
    }
    assert_eq!(fleet.outages(), 0);
    fleet.end(&server);
}

#[test]
fn a_deleted_clock_kills_nobody() {
    let server = RedisServer::start();
    let fleet = Fleet::start(&server);
    for _ in 0..5 {
        let () = server.connect().del(keys().clock()).unwrap();
        fleet.live_through(STEP * 2);
    }
    fleet.end(&server);
}

#[test]
fn orphans_come_back_in_a_fleet_where_nobody_lives_long() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let mut orphaned = 0;
    let mut recovered = 0;
    let start = Instant::now();
    while recovered < 3 {
        assert!(start.elapsed() < SOON, "{recovered} of {orphaned} are back");
        let born = Instant::now();
        let mut instance = Options::new(&socket).set("instance_id", "loop").registered();
        instance.record("work", &job(&format!("j{orphaned}")));
        orphaned += 1;
        thread::sleep((TTL * 3 / 5).saturating_sub(born.elapsed()));
        instance.kill();
        let lived = born.elapsed();
        recovered = queue(&server, "work").len();
        // A machine that is this slow proves nothing either way.
        if lived >= TTL {
            eprintln!("an instance lived for {lived:?}");
        }
    }
    let next = Tracker::registered(settings(&socket, "next"));
    eventually(SOON, "all are back", || queue(&server, "work").len() == orphaned);
    let mut back = queue(&server, "work");
    back.sort();
    back.dedup();
    assert_eq!(back.len(), orphaned);
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn orphans_come_back_in_a_crash_loop_of_processes_with_different_settings() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let start = Instant::now();
    let settings = [(400, 2000), (600, 3000)];
    // Each registers with other settings than the one before, as in a deployment that fails half way.
    for (orphaned, (interval, ttl)) in settings.into_iter().cycle().enumerate() {
        let back = queue(&server, "work").len();
        if back >= 2 {
            break;
        }
        assert!(start.elapsed() < SOON * 2, "{back} of {orphaned} are back");
        let born = Instant::now();
        let mut instance = Options::new(&socket)
            .set("interval_ms", interval)
            .set("ttl_ms", ttl)
            .registered();
        instance.record("work", &job(&format!("j{orphaned}")));
        thread::sleep(Duration::from_millis(800).saturating_sub(born.elapsed()));
        instance.kill();
    }
    // Which ones they are is a matter of their leases: a later instance with a shorter one may be dead sooner.
    let mut back = queue(&server, "work");
    back.sort();
    back.dedup();
    assert!(back.len() >= 2, "{}", back.len());
}

#[test]
fn a_living_instance_bears_others_with_longer_and_shorter_steps() {
    let server = RedisServer::start();
    let fleet = Fleet::start(&server);
    // Ten times the step, and a tenth: they come and go while the fleet beats by what it knows.
    for factor in [10, 1, 10, 1] {
        let mut other = settings(&server.socket_path(), "other");
        (other.interval, other.ttl) = (STEP * factor, TTL * factor);
        let other = Tracker::registered(other);
        fleet.live_through(STEP * 2);
        assert!(other.leave(SOON));
    }
    fleet.end(&server);
}

#[test]
fn a_process_that_stood_still_beyond_its_lease_learns_it_once_and_goes_on() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let mut paused = Options::new(&socket).set("instance_id", "paused").registered();
    let old = paused.identity();
    let lost = paused.record("work", &job("lost"));
    let finished = paused.record("work", &job("finished"));
    let survivor = Tracker::registered(settings(&socket, "survivor"));
    paused.pause();
    eventually(SOON, "its jobs are recovered", || survivor.count(is_recovered) == 2);
    assert_eq!(queue(&server, "work"), [job("lost"), job("finished")]);

    // Their new owner has them in flight when the old one awakes.
    let mut connection = server.connect();
    let taken: Vec<Vec<u8>> = (0..2).map(|_| connection.rpop("queue:work", None).unwrap()).collect();
    let owned: Vec<Handle> = taken.iter().map(|payload| survivor.record("work", payload)).collect();
    paused.resume();
    // A job that others have must not be begun here, whoever asks first after the pause.
    assert!(!paused.is_recorded(lost, SOON));
    paused.ack(finished);
    eventually(SOON, "it learns of its loss", || paused.told("LeaseLost") == 1);
    let new = paused.identity();
    assert_ne!(new, old);
    let told = paused
        .events()
        .into_iter()
        .find(|event| event.starts_with("LeaseLost"))
        .unwrap();
    for part in [&old, &new, "lost"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    paused.ack(lost);
    // It works on: what it does now is done under its new name.
    let handle = paused.record("work", &job("new"));
    paused.ack(handle);
    eventually(SOON, "only the new owner's are in flight", || {
        in_flight(&server).len() == 2
    });
    let mut held = in_flight(&server);
    held.sort();
    assert_eq!(held, [job("finished"), job("lost")]);
    for handle in owned {
        survivor.engine().ack(handle);
    }
    assert!(paused.leave(SOON));
    assert_eq!(paused.told("LeaseLost"), 1);
    assert!(survivor.leave(SOON));
    assert_eq!(survivor.count(is_recovered), 2);
    assert_eq!(queue(&server, "work"), Vec::<Vec<u8>>::new());
    assert_at_rest(&server);
}
