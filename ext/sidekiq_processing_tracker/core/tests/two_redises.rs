//! Sidekiq's queues in another Redis than the tracker's keys: what is recovered goes to the outbox, and from there to the
//! queues, at least once.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use processing_tracker_core::decision::End;
use processing_tracker_core::events::Event;
use processing_tracker_core::settings::Settings;
use redis::Commands;
use support::process::{Instance, Options};
use support::redis_server::RedisServer;
use support::tracker::{
    assert_at_rest, hostile_payloads, in_flight, is_lease_lost, is_outage, is_recovered, job, jobs, journal, keys,
    queue, recover_all, settings, stat, target, Tracker, SOON,
};
use support::wait::eventually;

/// The tracker's server and Sidekiq's.
fn servers() -> (RedisServer, RedisServer) {
    (RedisServer::start(), RedisServer::start())
}

fn of(servers: &(RedisServer, RedisServer), instance_id: &str) -> Settings {
    let mut settings = settings(&servers.0.socket_path(), instance_id);
    settings.queues = Some(target(&servers.1.socket_path()));
    settings
}

fn process(servers: &(RedisServer, RedisServer), instance_id: &str) -> Options {
    Options::new(&servers.0.socket_path())
        .set("queues", servers.1.socket_path().display())
        .set("instance_id", instance_id)
}

/// One that has died with these jobs.
fn dead(servers: &(RedisServer, RedisServer), name: &str, payloads: &[Vec<u8>]) {
    let mut dead: Instance = process(servers, "dead").registered();
    dead.record_all(name, payloads);
    dead.kill();
}

fn delivered(servers: &(RedisServer, RedisServer), name: &str, count: usize) -> Vec<Vec<u8>> {
    eventually(SOON, "the jobs are in Sidekiq's queue", || {
        queue(&servers.1, name).len() >= count
    });
    queue(&servers.1, name)
}

#[test]
fn jobs_come_back_byte_for_byte_and_in_order_to_sidekiqs_queues() {
    let servers = servers();
    let hostile: Vec<Vec<u8>> = hostile_payloads()
        .into_iter()
        .filter(|payload| payload.len() < 1000)
        .collect();
    dead(&servers, "work", &jobs(25));
    let tracker = Tracker::registered(of(&servers, "heir"));
    assert_eq!(delivered(&servers, "work", 25), jobs(25));
    dead(&servers, "other", &hostile);
    let all = delivered(&servers, "other", hostile.len());
    assert_eq!(all, hostile);
    let names: Vec<String> = servers.1.connect().smembers("queues").unwrap();
    assert_eq!(names.len(), 2);
    eventually(SOON, "the outbox is empty", || {
        let keys: Vec<String> = servers.0.connect().keys("*:outbox:*").unwrap();
        keys.is_empty()
    });
    let keys: Vec<String> = servers.0.connect().keys("queue*").unwrap();
    assert!(keys.is_empty(), "{keys:?}");
    assert!(tracker.leave(SOON));
    assert_at_rest(&servers.0);
}

#[test]
fn one_who_is_killed_between_the_two_leaves_a_piece_to_be_delivered_again() {
    for (place, twice) in [("before_deliver", 0), ("after_deliver", 10), ("after_deliver:2", 10)] {
        let servers = servers();
        dead(&servers, "work", &jobs(25));
        let mut heir = process(&servers, "heir").failpoint(place).start();
        eventually(SOON, "the heir dies", || heir.is_killed());
        let last = Tracker::registered(of(&servers, "last"));
        let all = delivered(&servers, "work", 25 + twice);
        for job in jobs(25) {
            assert!(all.contains(&job), "{place}");
        }
        eventually(SOON, "the outbox is empty", || {
            let left: usize = servers.0.connect().exists("sidekiq_processing:outbox:queues").unwrap();
            left == 0
        });
        assert_eq!(queue(&servers.1, "work").len(), 25 + twice, "{place}");
        assert!(last.leave(SOON));
    }
}

#[test]
fn a_sidekiqs_redis_that_is_away_is_no_outage_and_gets_its_jobs_later() {
    let servers = servers();
    let tracker = Tracker::registered(of(&servers, "heir"));
    servers.1.pause();
    dead(&servers, "work", &jobs(3));
    tracker.wait_for("they are recovered", is_recovered);
    tracker.wait_for(
        "a person is told",
        |event| matches!(event, Event::Warning(text) if text.contains("wait in the outbox")),
    );
    servers.1.resume();
    // A call that got no answer in time may have been done.
    let all = delivered(&servers, "work", 3);
    for job in jobs(3) {
        assert!(all.contains(&job));
    }
    eventually(SOON, "nothing is in flight", || in_flight(&servers.0).is_empty());
    assert_eq!(tracker.count(is_outage) + tracker.count(is_lease_lost), 0);
    assert!(tracker.leave(SOON));
}

#[test]
fn each_time_that_sidekiqs_redis_is_away_a_person_is_told_also_where_only_suspects_wait() {
    let servers = servers();
    let tracker = Tracker::registered(of(&servers, "heir"));
    let is_told = |event: &Event| matches!(event, Event::Warning(text) if text.contains("wait in the outbox"));
    for times in 1..=2 {
        let jid = format!("suspect{times}");
        let () = servers.0.connect().set_ex(keys().recoveries(&jid), 1, 1000).unwrap();
        servers.1.pause();
        dead(&servers, "work", &[job(&jid)]);
        eventually(SOON, "a person is told", || tracker.count(is_told) >= times);
        servers.1.resume();
        delivered(&servers, "work", times);
        eventually(SOON, "the outbox is empty", || {
            let left: usize = servers.0.connect().exists("sidekiq_processing:outbox:queues").unwrap();
            left == 0
        });
        // Once a time, however often it was tried.
        assert_eq!(tracker.count(is_told), times);
    }
    assert!(tracker.leave(SOON));
}

#[test]
fn what_dies_and_what_is_suspected_go_where_they_should() {
    let servers = servers();
    let _: () = servers.1.connect().lpush("queue:work", "waits").unwrap();
    let mut forbid = of(&servers, "console");
    for round in 0..2 {
        dead(&servers, "work", &[job("pill")]);
        recover_all(&forbid).unwrap();
        let all = delivered(&servers, "work", 2 + round);
        // First before all others, then behind them.
        assert_eq!(&all[if round == 0 { 0 } else { 2 }], &job("pill"), "{round}");
    }
    forbid.policy.max_recoveries = Some(2);
    forbid.policy.dead_max_jobs = 1;
    let _: () = servers
        .1
        .connect()
        .zadd("dead", "older", support::redis_server::unix_now())
        .unwrap();
    dead(&servers, "work", &[job("pill")]);
    let recovered = recover_all(&forbid).unwrap();
    assert_eq!(recovered.dead, 1);
    let told = &recovered.events;
    let is_trimmed = |event: &Event| matches!(event, Event::Warning(text) if text.contains("entries lost: 1"));
    assert_eq!(told.iter().filter(|event| is_trimmed(event)).count(), 1, "{told:?}");
    let dead: Vec<String> = servers.1.connect().zrange("dead", 0, -1).unwrap();
    assert_eq!(dead.len(), 1);
    assert!(dead[0].contains("PoisonPill"), "{dead:?}");
    let left: Vec<String> = servers.0.connect().keys("*outbox:dead").unwrap();
    assert!(left.is_empty());
}

#[test]
fn unique_locks_are_settled_where_the_queues_are() {
    let servers = servers();
    let payload = |jid: &str| {
        let text = format!(
            r#"{{"class":"A","jid":"{jid}","args":[],"processing":true,"lock":"until_executed","lock_digest":"uniquejobs:d"}}"#
        );
        text.into_bytes()
    };
    // Reaped meanwhile, and taken by a duplicate.
    let _: () = servers.1.connect().hset("uniquejobs:d:LOCKED", "other", "1").unwrap();
    dead(&servers, "work", &[payload("mine"), job("free")]);
    let tracker = Tracker::registered(of(&servers, "heir"));
    assert_eq!(delivered(&servers, "work", 1), [job("free")]);
    let is_superseded = |event: &Event| matches!(event, Event::Settled(settled) if settled.end == End::Superseded);
    let told = tracker.wait_for("it is told as superseded", is_superseded);
    let Event::Settled(told) = told else { panic!("{told:?}") };
    assert_eq!(
        (told.jid.as_deref(), &told.queue[..], &told.from[..], told.payload),
        (Some("mine"), &b"work"[..], "outbox", Some(payload("mine").into()))
    );
    // The same job again, in the same process, is as much of an event.
    dead(&servers, "work", &[payload("mine")]);
    eventually(SOON, "it is told again", || tracker.count(is_superseded) == 2);
    assert_eq!(queue(&servers.1, "work"), [job("free")]);
    assert!(tracker.leave(SOON));
    assert_eq!((stat(&servers.0, "requeued"), stat(&servers.0, "superseded")), (3, 2));
    let lines = journal(&servers.0);
    let lines = lines.iter().filter(|line| line.outcome == "superseded");
    let lines: Vec<_> = lines
        .map(|line| (&line.from[..], &line.jid[..], &line.queue[..]))
        .collect();
    assert_eq!(lines, [("outbox", "mine", "work"); 2]);
}

#[test]
fn a_console_counts_what_is_superseded_at_its_delivery_and_somebody_tells_of_it_once() {
    let servers = servers();
    let payload =
        br#"{"class":"A","jid":"mine","args":[],"lock":"until_executed","lock_digest":"uniquejobs:d"}"#.to_vec();
    let _: () = servers.1.connect().hset("uniquejobs:d:LOCKED", "other", "1").unwrap();
    dead(&servers, "work", &[payload]);
    // It has done all but to take it out.
    let mut heir = process(&servers, "heir").failpoint("after_deliver").start();
    eventually(SOON, "the heir dies", || heir.is_killed());
    assert_eq!(stat(&servers.0, "superseded"), 0);
    let recovered = recover_all(&of(&servers, "console")).unwrap();
    assert_eq!((recovered.requeued, recovered.superseded), (0, 1));
    assert_eq!(stat(&servers.0, "superseded"), 1);
    assert!(queue(&servers.1, "work").is_empty());
}
