//! Processes are killed, and what they held comes back: every byte, once, in its order; also when the one who
//! recovers is killed at any step of it.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use redis::Commands;
use support::process::Options;
use support::redis_server::RedisServer;
use support::tracker::{
    assert_at_rest, hostile_payloads, in_flight, instances, is_lease_lost, is_recovered, job, jobs, journal, keys,
    queue, settings, stat, JournalLine, Tracker, SOON, STEP, TTL,
};
use support::wait::eventually;

/// For the machine, on top of what the protocol promises.
const SLACK: Duration = Duration::from_secs(2);

#[test]
fn every_payload_of_a_killed_process_comes_back_byte_for_byte_once_and_in_order() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let () = server.connect().lpush("queue:work", "waited all the time").unwrap();
    let odd_queue = "a: b\r\nc";
    let payloads = hostile_payloads();

    let mut killed = Options::new(&socket).set("instance_id", "pod:7").registered();
    killed.record_all("work", &payloads);
    killed.record(odd_queue, &job("odd"));
    // Twice the same bytes are two jobs.
    killed.record(odd_queue, &job("odd"));
    let from = killed.identity();
    let survivor = Tracker::registered(settings(&socket, "survivor"));
    killed.kill();
    let death = Instant::now();

    let mut expected = payloads.clone();
    expected.push(b"waited all the time".to_vec());
    eventually(SOON, "all is back", || {
        survivor.count(is_recovered) == payloads.len() + 2
    });
    assert!(death.elapsed() <= TTL + STEP + SLACK, "after {:?}", death.elapsed());
    assert_eq!(queue(&server, "work"), expected);
    assert_eq!(queue(&server, odd_queue), [job("odd"), job("odd")]);
    let known: Vec<String> = server.connect().smembers("queues").unwrap();
    assert!(
        known.contains(&"work".into()) && known.contains(&odd_queue.into()),
        "{known:?}"
    );

    assert_eq!(stat(&server, "requeued"), expected.len() as u64 + 1);
    let lines = journal(&server);
    assert_eq!(lines.len(), expected.len() + 1);
    let by = survivor.identity();
    for line in &lines {
        assert_eq!((&line.from, &line.by, line.outcome.as_str()), (&from, &by, "requeued"));
    }
    let jids = |queue: &str| -> Vec<String> {
        let of = |line: &&JournalLine| line.queue == queue;
        lines.iter().filter(of).map(|line| line.jid.clone()).collect()
    };
    assert_eq!(jids(odd_queue), ["odd", "odd"]);
    let mut known: Vec<String> = jids("work").into_iter().filter(|jid| !jid.is_empty()).collect();
    known.sort();
    assert_eq!(
        known,
        [
            "big",
            "deep",
            "huge",
            "large",
            "spaces",
            "surrogate",
            "twice",
            "utf8",
            "üü\u{2028}\u{1F600}"
        ]
    );
    let told = survivor.told().into_iter().filter(is_recovered);
    assert!(told.into_iter().all(|event| matches!(event,
        Event::Settled(settled) if settled.from == from && settled.by == by)));
    assert!(survivor.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_recovering_process_may_be_killed_at_every_step() {
    // 450 jobs are three pieces.
    const PLACES: [&str; 9] = [
        "before_reap",
        "after_reap",
        "after_peek",
        "after_peek:2",
        "after_peek:3",
        "after_recover",
        "after_recover:2",
        "after_recover:3",
        "before_reap:2",
    ];
    thread::scope(|scope| {
        for place in PLACES {
            scope.spawn(move || recover_past(place));
        }
    });
}

fn recover_past(place: &str) {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let mut connection = server.connect();
    let mut jobs = jobs(450);
    // Among them are jobs whose locks are to be taken again, and in the middle one that is a pill by now.
    for i in [3, 225, 447] {
        let (jid, digest) = (format!("j{i}"), format!("uniquejobs:{i}"));
        jobs[i] = format!(
            r#"{{"jid":"{jid}","class":"A","processing":true,"lock":"until_and_while_executing","lock_digest":"{digest}"}}"#
        )
        .into_bytes();
        let () = connection
            .hset(format!("{digest}:RUN:LOCKED"), &jid, "1700000000.5")
            .unwrap();
    }
    let mut held = jobs.clone();
    held.insert(200, job("pill"));
    let () = connection.set_ex(keys().recoveries("pill"), 3, 1000).unwrap();
    let mut killed = Options::new(&socket).set("instance_id", "first").registered();
    killed.record_all("work", &held);
    killed.kill();

    // For its second reap, it finds a second dead instance.
    if place == "before_reap:2" {
        let mut another = Options::new(&socket).set("instance_id", "another").registered();
        another.record("other", &job("other"));
        another.kill();
    }
    let mut reaper = Options::new(&socket)
        .set("instance_id", "reaper")
        .failpoint(place)
        .start();
    eventually(SOON, &format!("the reaper dies at {place}"), || reaper.is_killed());
    let death = Instant::now();

    let next = Tracker::registered(settings(&socket, "next"));
    eventually(SOON, &format!("all is back after {place}"), || {
        in_flight(&server).is_empty()
    });
    assert!(
        death.elapsed() <= TTL + STEP + STEP * 2 + SLACK,
        "{place}: after {:?}",
        death.elapsed()
    );
    eventually(SOON, "the dead are gone", || instances(&server).len() == 1);
    assert_eq!(queue(&server, "work"), jobs, "{place}");
    let others = queue(&server, "other");
    assert_eq!(others.len(), usize::from(place == "before_reap:2"));
    let count = jobs.len() + others.len();
    assert_eq!(stat(&server, "requeued"), count as u64, "{place}");
    assert_eq!(journal(&server).len(), count + 1, "{place}");
    for i in [3, 225, 447] {
        for lock in [format!("uniquejobs:{i}"), format!("uniquejobs:{i}:RUN")] {
            let holders: Vec<String> = connection.hkeys(format!("{lock}:LOCKED")).unwrap();
            assert_eq!(holders, [format!("j{i}")], "{place}: {lock}");
        }
    }
    let dead: Vec<String> = connection.zrange("dead", 0, -1).unwrap();
    assert_eq!((dead.len(), stat(&server, "dead")), (1, 1), "{place}");
    assert!(
        dead[0].contains("\"pill\"") && dead[0].contains("Orphaned 4 times"),
        "{place}: {dead:?}"
    );
    assert!(
        !connection.exists::<_, bool>(keys().recoveries("pill")).unwrap(),
        "{place}"
    );
    assert_eq!(next.count(is_lease_lost), 0);
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn two_reapers_in_turn_do_the_work_once() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let jobs = jobs(1000);
    let mut killed = Options::new(&socket).set("instance_id", "dead").registered();
    killed.record_all("work", &jobs);
    let survivors: Vec<Tracker> = (0..4)
        .map(|i| Tracker::registered(settings(&socket, &format!("reaper{i}"))))
        .collect();
    killed.kill();
    eventually(SOON, "all is back", || in_flight(&server).is_empty());
    eventually(SOON, "all is told", || {
        survivors
            .iter()
            .map(|tracker| tracker.count(is_recovered))
            .sum::<usize>()
            == jobs.len()
    });
    assert_eq!(queue(&server, "work"), jobs);
    assert_eq!(stat(&server, "requeued"), jobs.len() as u64);
    for survivor in &survivors {
        assert!(survivor.leave(SOON));
    }
    assert_at_rest(&server);
}

/// Where a process is killed, and what is then true of a job that it held and one that it had acked.
#[test]
fn a_working_process_may_be_killed_at_every_step() {
    thread::scope(|scope| {
        // The answer to the record is not heard.
        scope.spawn(|| work_until("after_turn", &["held"]));
        // The ack is not sent, or sent and its answer not heard.
        scope.spawn(|| work_until("before_turn:3", &["held", "acked"]));
        scope.spawn(|| work_until("after_turn:3", &["held"]));
        // What is held at a clean exit goes back, by the leaving process or by the next.
        scope.spawn(|| work_until("before_leave", &["held"]));
        scope.spawn(|| work_until("after_leave", &["held"]));
    });
}

fn work_until(place: &str, back: &[&str]) {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let mut killed = Options::new(&socket).failpoint(place).registered();
    // Commands that the process does not live to answer are no failure here: it dies where it is told to.
    let mut ask = |command: String| killed.try_ask(&command).unwrap_or_default();
    let hex = |jid: &str| job(jid).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let work: String = b"work".iter().map(|byte| format!("{byte:02x}")).collect();
    ask(format!("track {work} {}", hex("held")));
    ask("recorded 1 20000".into());
    if place != "after_turn" {
        ask(format!("track {work} {}", hex("acked")));
        ask("recorded 2 20000".into());
        ask("ack 2".into());
    }
    if place.ends_with("leave") {
        ask("leave 20000".into());
    }
    eventually(SOON, &format!("the process dies at {place}"), || killed.is_killed());

    let next = Tracker::registered(settings(&socket, "next"));
    eventually(SOON, "the dead is gone", || instances(&server).len() == 1);
    let expected: Vec<Vec<u8>> = back.iter().map(|jid| job(jid)).collect();
    assert_eq!(queue(&server, "work"), expected, "{place}");
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}
