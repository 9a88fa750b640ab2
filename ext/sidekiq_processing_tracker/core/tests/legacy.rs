//! What the 1.0 gem has left is recovered and removed: every byte, once; and what lives is left alone.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::decision::{End, Reason};
use processing_tracker_core::events::{Event, Settled};
use processing_tracker_core::legacy::{self, Search};
use processing_tracker_core::recovery::{Progress, Reaper, Recovery, Report};
use redis::Commands;
use support::lua;
use support::process::Options;
use support::proxy::{relay, Action, Proxy, Request, When};
use support::redis_server::{RedisServer, USER};
use support::tracker::{
    assert_at_rest, hostile_payloads, instances, is_recovered, job, journal, keys, link, queue, recover_all, settings,
    stat, Tracker, SOON, STEP, TTL,
};
use support::wait::eventually;

const HOUR: Duration = Duration::from_secs(3600);

fn key(name: &str) -> String {
    format!("sidekiq_processing:{name}")
}

/// Writes a job as the 1.0 gem does when it begins.
fn begin(server: &RedisServer, instance: &str, id: &[u8], payload: &[u8]) {
    let mut connection = server.connect();
    let job = [key("job:").as_bytes(), id].concat();
    let () = connection.set(job, payload).unwrap();
    let () = connection.sadd(key(&format!("jobs:{instance}")), id).unwrap();
}

/// The heartbeat of the 1.0 gem.
fn beat(server: &RedisServer, instance: &str) {
    let () = server
        .connect()
        .set_ex(key(&format!("instance:{instance}")), "1700000000.5", 90)
        .unwrap();
}

fn in_queue(jid: &str, queue: &str) -> Vec<u8> {
    format!(r#"{{"queue":"{queue}","class":"HardJob","args":["ü"],"jid":"{jid}"}}"#).into_bytes()
}

/// All that the 1.0 gem has in Redis, with its values.
fn left_of_1_0(server: &RedisServer) -> BTreeSet<(String, Vec<Vec<u8>>)> {
    let mut connection = server.connect();
    let mut left = BTreeSet::new();
    for pattern in ["jobs:*", "job:*", "instance:*"] {
        let found: Vec<Vec<u8>> = connection.keys(key(pattern)).unwrap();
        for name in found {
            let kind: String = redis::cmd("TYPE").arg(&name).query(&mut connection).unwrap();
            let mut values: Vec<Vec<u8>> = match kind.as_str() {
                "set" => connection.smembers(&name).unwrap(),
                "string" => vec![connection.get(&name).unwrap()],
                _ => vec![],
            };
            values.sort();
            left.insert((String::from_utf8_lossy(&name).into_owned(), values));
        }
    }
    left
}

fn sorted(mut payloads: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    payloads.sort();
    payloads
}

fn settled(event: Event) -> Option<Settled> {
    match event {
        Event::Settled(settled) => Some(settled),
        _ => None,
    }
}

fn warnings(events: &[Event]) -> Vec<String> {
    let warning = |event: &Event| match event {
        Event::Warning(text) => Some(text.clone()),
        _ => None,
    };
    events.iter().filter_map(warning).collect()
}

/// Who recovers.
fn reaper(by: &str) -> Reaper {
    let settings = settings("nowhere".as_ref(), by);
    Reaper {
        keys: keys(),
        by: by.into(),
        pace: settings.pace(),
        hold: settings.hold,
        policy: settings.policy,
    }
}

/// Lists the 1.0 instances, and lets their leases run out.
fn list_as_due(server: &RedisServer) {
    let mut search = Search::default();
    let mut link = link(server);
    while search
        .step(&mut link, &keys(), reaper("lister").pace, |_, warning| {
            panic!("{warning}")
        })
        .unwrap()
        .is_none()
    {}
    let mut connection = server.connect();
    for identity in instances(server) {
        let () = connection.zadd(keys().instances(), identity, 0).unwrap();
    }
}

#[test]
fn orphans_come_back_byte_for_byte_and_every_key_of_theirs_goes() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let instance = "web:1:4711: x";
    let () = server.connect().lpush("queue:a:b", "waited").unwrap();
    let odd_id = b"\xff\x00 :*?\r\n";
    begin(&server, instance, b"j1", &in_queue("j1", "a:b"));
    begin(&server, instance, odd_id, &in_queue("odd", "a:b"));
    begin(&server, instance, b"j2", &job("j2"));
    begin(&server, "", b"nameless", &in_queue("nameless", "other"));
    let hostile = hostile_payloads();
    for (i, payload) in hostile.iter().enumerate() {
        begin(&server, "second", format!("h{i}").as_bytes(), payload);
    }

    let began = Instant::now();
    let tracker = Tracker::registered(settings(&socket, "new"));
    let is_left = || !left_of_1_0(&server).is_empty() || instances(&server).len() > 1;
    eventually(SOON, "all is settled", || !is_left());
    assert!(began.elapsed() > TTL, "a missed heartbeat is no death");

    assert_eq!(
        sorted(queue(&server, "a:b")),
        sorted(vec![b"waited".to_vec(), in_queue("j1", "a:b"), in_queue("odd", "a:b")])
    );
    assert_eq!(queue(&server, "other"), [in_queue("nameless", "other")]);
    // What names no queue goes to Sidekiq's default; what is no job to the dead set.
    let (jobs, others): (Vec<_>, Vec<_>) = hostile.into_iter().partition(|payload| {
        payload.starts_with(b"{\"class\"") && payload.ends_with(b"}") || payload.starts_with(b" ")
    });
    assert_eq!(
        sorted(queue(&server, "default")),
        sorted([jobs.clone(), vec![job("j2")]].concat())
    );
    let dead: Vec<Vec<u8>> = server.connect().zrange("dead", 0, -1).unwrap();
    let (wrapped, raw): (Vec<_>, Vec<_>) = dead
        .into_iter()
        .partition(|entry| entry.starts_with(b"{\"args\":[null]"));
    // What Sidekiq's pages could not show is shown as an argument; all else is as it was.
    let wrapped = String::from_utf8(wrapped.concat()).unwrap();
    assert!(
        wrapped.contains("1.0 second") && wrapped.contains("ProcessingTracker::Orphaned"),
        "{wrapped}"
    );
    assert!(
        wrapped.contains("since an unknown time") && wrapped.contains(r#""queue":"default""#),
        "{wrapped}"
    );
    let is_raw = |payload: &&Vec<u8>| *payload != b"null";
    assert_eq!(sorted(raw), sorted(others.iter().filter(is_raw).cloned().collect()));
    let known: BTreeSet<String> = server.connect().smembers("queues").unwrap();
    assert_eq!(known, ["a:b", "default", "other"].map(String::from).into());

    let count = jobs.len() as u64 + 4;
    assert_eq!(
        (stat(&server, "requeued"), stat(&server, "dead")),
        (count, others.len() as u64)
    );
    let told = tracker.told();
    assert_eq!(told.iter().filter(|event| is_recovered(event)).count() as u64, count);
    let settled: Vec<Settled> = told.into_iter().filter_map(settled).collect();
    let of = |jid: &str| {
        settled
            .iter()
            .find(|job| job.jid.as_deref() == Some(jid))
            .unwrap()
            .clone()
    };
    assert_eq!(
        Settled { at_ms: 0, ..of("odd") },
        Settled {
            end: End::Requeued,
            reason: None,
            jid: Some("odd".into()),
            class: Some("HardJob".into()),
            queue: b"a:b".to_vec(),
            from: "1.0 web:1:4711: x".into(),
            by: tracker.identity(),
            recoveries: 0,
            at_ms: 0,
            payload: Some(in_queue("odd", "a:b").into()),
        }
    );
    let dead: Vec<_> = settled.iter().filter(|job| job.end == End::Dead).collect();
    assert_eq!(dead.len(), others.len());
    assert!(dead
        .iter()
        .all(|job| job.reason == Some(Reason::Unreadable) && job.from == "1.0 second"));
    let lines = journal(&server);
    assert_eq!(lines.len() as u64, count + others.len() as u64);
    assert!(lines
        .iter()
        .all(|line| (line.reason == "unreadable") == (line.outcome == "dead") && line.by == tracker.identity()));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_living_instance_is_left_alone_and_a_late_heartbeat_saves_one() {
    let server = RedisServer::start();
    let socket = server.socket_path();
    for (instance, jid) in [("alive:1", "a"), ("late:1", "l"), ("dead:1", "d")] {
        begin(&server, instance, jid.as_bytes(), &in_queue(jid, "work"));
    }
    beat(&server, "alive:1");
    // Alive, and without jobs.
    beat(&server, "idle");
    let tracker = Tracker::registered(settings(&socket, "new"));
    eventually(SOON, "the others are listed", || {
        instances(&server)
            .iter()
            .filter(|name| name.starts_with("1.0 "))
            .count()
            == 2
    });
    assert!(!instances(&server).contains(&"1.0 alive:1".into()));
    beat(&server, "late:1");
    let before: BTreeSet<_> = left_of_1_0(&server)
        .into_iter()
        .filter(|(name, _)| *name != key("jobs:dead:1") && *name != key("job:d"))
        .collect();

    eventually(SOON, "the dead one is recovered and none is listed any more", || {
        instances(&server) == [tracker.identity()]
    });
    assert_eq!(queue(&server, "work"), [in_queue("d", "work")]);
    assert_eq!(left_of_1_0(&server), before);
    // It looks again soon, since there is somebody whose end it must see.
    let after: u64 = server.connect().hget(keys().clock(), "scan_after").unwrap();
    assert_eq!(after, 600_000);
    assert!(tracker.leave(SOON));
}

#[test]
fn the_dead_set_keeps_to_its_limits_and_a_job_may_forbid_it() {
    let server = RedisServer::start();
    for member in ["older", "old"] {
        let now = support::redis_server::unix_now() - 10;
        let () = server.connect().zadd("dead", member, now).unwrap();
    }
    begin(&server, "old", b"classless", br#"{"jid":"classless"}"#);
    begin(&server, "old", b"undying", br#"{"jid":"undying","dead":false}"#);
    let mut console = settings(&server.socket_path(), "console");
    console.policy.dead_max_jobs = 2;
    let recovered = recover_all(&console).unwrap();
    assert_eq!((recovered.dead, recovered.discarded), (1, 1));
    assert_eq!((stat(&server, "dead"), stat(&server, "discarded")), (1, 1));
    assert_eq!(server.connect().zcard::<_, u64>("dead").unwrap(), 2);
    let text = warnings(&recovered.events).join("\n");
    assert!(text.contains("entries lost: 1"), "{text}");
    assert_eq!(left_of_1_0(&server), BTreeSet::new());
    assert_at_rest(&server);
}

#[test]
fn what_has_expired_is_told_and_its_member_removed() {
    let server = RedisServer::start();
    begin(&server, "old", b"there", &in_queue("there", "work"));
    begin(&server, "old", b"expired", b"");
    let () = server.connect().del(key("job:expired")).unwrap();
    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!((recovered.requeued, recovered.stuck), (1, 0));
    assert_eq!(queue(&server, "work"), [in_queue("there", "work")]);
    assert_eq!(left_of_1_0(&server), BTreeSet::new());
    assert_eq!(stat(&server, "expired"), 1);
    let text = warnings(&recovered.events).join("\n");
    assert!(
        text.contains("without a payload") && text.contains("\"expired\"") && text.contains("1.0 old"),
        "{text}"
    );
    assert_at_rest(&server);
}

/// The warnings that a console gets.
#[test]
fn what_is_not_of_1_0s_type_is_told_and_stops_nothing() {
    let server = RedisServer::start();
    let mut connection = server.connect();
    let () = connection.set(key("jobs:no set"), "5").unwrap();
    begin(&server, "no beat", b"n", &in_queue("n", "work"));
    let () = connection.hset(key("instance:no beat"), "a", 1).unwrap();
    begin(&server, "mixed", b"good", &in_queue("good", "work"));
    begin(&server, "mixed", b"hash", b"");
    let () = connection.del(key("job:hash")).unwrap();
    let () = connection.hset(key("job:hash"), "a", 1).unwrap();
    begin(&server, "mixed", b"unpushable", &in_queue("unpushable", "taken"));
    let () = connection.set("queue:taken", "no list").unwrap();
    begin(&server, "mixed", b"unbearable", b"no job");
    let () = connection.set("dead", "no zset").unwrap();
    // Notes are worth less than jobs.
    let () = connection.set(keys().journal(), "no stream").unwrap();

    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!((recovered.requeued, recovered.stuck), (1, 3));
    assert_eq!(queue(&server, "work"), [in_queue("good", "work")]);
    let text = warnings(&recovered.events).join("\n");
    for part in [
        "jobs:no set",
        "instance:no beat",
        "no list: 2",
        "no string: 1",
        "jobs:mixed",
        "not noted",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let left: Vec<Vec<u8>> = connection.smembers(key("jobs:mixed")).unwrap();
    assert_eq!(
        sorted(left),
        [b"hash".to_vec(), b"unbearable".to_vec(), b"unpushable".to_vec()]
    );
    assert_eq!(instances(&server), Vec::<String>::new(), "nobody has to wait for these");

    // As soon as the way is free they come back.
    let () = connection.del(&["queue:taken", "dead"][..]).unwrap();
    let () = connection.del(key("job:hash")).unwrap();
    assert_eq!(
        recover_all(&settings(&server.socket_path(), "console"))
            .unwrap()
            .requeued,
        1
    );
    assert_eq!(queue(&server, "taken"), [in_queue("unpushable", "taken")]);
    let dead: Vec<Vec<u8>> = connection.zrange("dead", 0, -1).unwrap();
    assert_eq!(dead, [b"no job".to_vec()]);
}

/// A job of sidekiq-unique-jobs, of version 7 or 8, or with `unique_digest` of version 6.
fn locked(jid: &str, kind: &str, digest_field: &str, digest: &str) -> Vec<u8> {
    format!(
        r#"{{"queue":"work","class":"HardJob","jid":"{jid}","lock":"{kind}","{digest_field}":"{digest}","lock_limit":1}}"#
    )
    .into_bytes()
}

#[test]
fn unique_locks_are_settled_as_for_every_orphan() {
    let server = RedisServer::start();
    let mut connection = server.connect();
    // It gave its lock up when it started, and needs it again to run.
    begin(
        &server,
        "old",
        b"again",
        &locked("again", "until_and_while_executing", "lock_digest", "uniquejobs:1"),
    );
    // The same, but a queued duplicate has the lock by now; its runtime lock is what the dead one still holds.
    begin(
        &server,
        "old",
        b"late",
        &locked("late", "until_and_while_executing", "unique_digest", "uniquejobs:2:RUN"),
    );
    let () = connection.hset("uniquejobs:2:LOCKED", "duplicate", 1).unwrap();
    let () = connection.hset("uniquejobs:2:RUN:LOCKED", "late", 1).unwrap();
    // It holds its own lock, and keeps it.
    begin(
        &server,
        "old",
        b"own",
        &locked("own", "until_executed", "lock_digest", "uniquejobs:3"),
    );
    let () = connection.hset("uniquejobs:3:LOCKED", "own", 1).unwrap();
    // Other things lie under the lock's keys.
    begin(
        &server,
        "old",
        b"odd",
        &locked("odd", "until_and_while_executing", "lock_digest", "uniquejobs:4"),
    );
    let () = connection.set("uniquejobs:4:LOCKED", "no hash").unwrap();

    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!((recovered.requeued, recovered.superseded, recovered.stuck), (3, 1, 0));
    let text = warnings(&recovered.events).join("\n");
    assert!(text.contains("unique locks of theirs are as they were"), "{text}");
    let jids: BTreeSet<String> = queue(&server, "work")
        .iter()
        .map(|job| String::from_utf8_lossy(job).split('"').nth(11).unwrap().to_owned())
        .collect();
    assert_eq!(jids, ["again", "odd", "own"].map(String::from).into());
    let holders = |connection: &mut redis::Connection, lock: &str| -> Vec<String> {
        connection.hkeys(format!("uniquejobs:{lock}:LOCKED")).unwrap()
    };
    assert_eq!(holders(&mut connection, "1"), ["again"]);
    assert_eq!(holders(&mut connection, "2"), ["duplicate"]);
    assert_eq!(holders(&mut connection, "2:RUN"), Vec::<String>::new());
    assert_eq!(holders(&mut connection, "3"), ["own"]);
    let index: Vec<String> = connection.zrange("uniquejobs:digests", 0, -1).unwrap();
    assert_eq!(index, ["uniquejobs:1"]);
    assert_eq!(left_of_1_0(&server), BTreeSet::new());
    let mut did: Vec<(String, String, String)> = journal(&server)
        .into_iter()
        .map(|line| (line.jid, line.outcome, line.lock))
        .collect();
    did.sort();
    let expected = [
        ("again", "requeued", "taken"),
        ("late", "superseded", "given up"),
        ("odd", "requeued", "unsettled"),
        ("own", "requeued", ""),
    ];
    assert_eq!(
        did,
        expected.map(|(jid, outcome, lock)| (jid.into(), outcome.into(), lock.into()))
    );
}

#[test]
fn two_reapers_at_once_put_nothing_back_twice() {
    let server = RedisServer::start();
    let jobs: Vec<Vec<u8>> = (0..250).map(|i| in_queue(&format!("j{i}"), "work")).collect();
    for (i, payload) in jobs.iter().enumerate() {
        begin(&server, "old:1", format!("j{i}").as_bytes(), payload);
    }
    list_as_due(&server);
    let (one, other) = (reaper("one"), reaper("other"));
    let mut links = (link(&server), link(&server));
    let mut recoveries = (
        Recovery::new(b"1.0 old:1".to_vec()),
        Recovery::new(b"1.0 old:1".to_vec()),
    );
    let mut told = 0;

    // One reads and holds; its hold runs out; the other does the same, and settles a piece; then the first sends his.
    for _ in 0..2 {
        recoveries.0.step(&mut links.0, &one, |_| told += 1).unwrap();
    }
    let () = server.connect().zadd(keys().instances(), "1.0 old:1", 0).unwrap();
    for _ in 0..3 {
        recoveries.1.step(&mut links.1, &other, |_| told += 1).unwrap();
    }
    assert_eq!(
        recoveries.0.step(&mut links.0, &one, |_| told += 1).unwrap(),
        Progress::Done(Report::default())
    );
    // And one who asks while it is held gets nothing.
    let mut third = Recovery::new(b"1.0 old:1".to_vec());
    let idle = Report {
        idle: true,
        ..Report::default()
    };
    assert_eq!(
        third.step(&mut links.0, &one, |_| told += 1).unwrap(),
        Progress::Done(idle)
    );
    while recoveries.1.step(&mut links.1, &other, |_| told += 1).unwrap() == Progress::More {}
    assert_eq!(told, jobs.len());
    assert_eq!(sorted(queue(&server, "work")), sorted(jobs));
    assert_eq!(left_of_1_0(&server), BTreeSet::new());
    assert_at_rest(&server);
}

#[test]
fn a_heartbeat_between_two_pieces_ends_a_recovery() {
    let server = RedisServer::start();
    for i in 0..150 {
        begin(
            &server,
            "old",
            format!("j{i}").as_bytes(),
            &in_queue(&format!("j{i}"), "work"),
        );
    }
    list_as_due(&server);
    let (mut link, reaper) = (link(&server), reaper("one"));
    let mut recovery = Recovery::new(b"1.0 old".to_vec());
    for _ in 0..4 {
        assert_eq!(recovery.step(&mut link, &reaper, |_| ()).unwrap(), Progress::More);
    }
    beat(&server, "old");
    let Progress::Done(report) = recovery.step(&mut link, &reaper, |_| ()).unwrap() else {
        panic!("it goes on")
    };
    assert_eq!(report.requeued, 100);
    assert_eq!(queue(&server, "work").len(), 100);
    let left: u64 = server.connect().scard(key("jobs:old")).unwrap();
    assert_eq!((left, instances(&server).len()), (50, 0));
}

#[test]
fn lost_answers_and_late_copies_change_nothing() {
    let server = RedisServer::start();
    let jobs: Vec<Vec<u8>> = (0..250).map(|i| in_queue(&format!("j{i}"), "work")).collect();
    // Every script is known to the server, so that each call is one request.
    begin(&server, "another", b"x", &in_queue("x", "other"));
    recover_all(&settings(&server.socket_path(), "first")).unwrap();
    for (i, payload) in jobs.iter().enumerate() {
        begin(&server, "old:1", format!("j{i}").as_bytes(), payload);
    }
    let proxy = Proxy::start(server.socket_path(), {
        let (reaps, moves) = (AtomicU64::new(0), AtomicU64::new(0));
        move |request: &Request| {
            let is_lost = if lua::is_call(request, &lua::LEGACY_REAP) {
                reaps.fetch_add(1, Ordering::SeqCst) == 0
            } else if lua::is_call(request, &lua::LEGACY_MOVE) {
                moves.fetch_add(1, Ordering::SeqCst) % 2 == 0
            } else {
                return relay(request);
            };
            // Of every call a copy comes late, whether its answer is lost or not.
            let action = if is_lost { Action::drop_reply() } else { Action::pass() };
            action.and_copy(When::OnRelease)
        }
    });
    let recovered = recover_all(&settings(&proxy.socket_path(), "console")).unwrap();
    assert_eq!((recovered.requeued, recovered.stuck), (250, 0));
    assert_eq!(sorted(queue(&server, "work")), sorted(jobs.clone()));
    assert_eq!(left_of_1_0(&server), BTreeSet::new());

    // The same jobs run again in a 1.0 process of the same name, which has missed its heartbeats, when the copies come.
    for (i, payload) in jobs.iter().enumerate() {
        begin(&server, "old:1", format!("j{i}").as_bytes(), payload);
    }
    let before = left_of_1_0(&server);
    list_as_due(&server);
    assert!(proxy.release_late() >= 4);
    assert_eq!(left_of_1_0(&server), before);
    assert_eq!(queue(&server, "work").len(), jobs.len());
}

#[test]
fn the_one_who_recovers_may_be_killed_at_every_step() {
    const PLACES: [&str; 7] = [
        "before_legacy_found",
        "after_legacy_reap",
        "before_legacy_move",
        "after_legacy_move",
        "before_legacy_move:2",
        "after_legacy_move:2",
        "after_legacy_move:3",
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
    let jobs: Vec<Vec<u8>> = (0..250).map(|i| in_queue(&format!("j{i}"), "work")).collect();
    for (i, payload) in jobs.iter().enumerate() {
        begin(&server, "old:1", format!("j{i}").as_bytes(), payload);
    }
    let mut reaper = Options::new(&socket)
        .set("instance_id", "reaper")
        .failpoint(place)
        .start();
    eventually(SOON, &format!("the reaper dies at {place}"), || reaper.is_killed());
    let next = Tracker::registered(settings(&socket, "next"));
    eventually(SOON, &format!("all is back after {place}"), || {
        left_of_1_0(&server).is_empty() && instances(&server).len() == 1
    });
    assert_eq!(sorted(queue(&server, "work")), sorted(jobs), "{place}");
    assert_eq!(stat(&server, "requeued"), 250, "{place}");
    assert_eq!(journal(&server).len(), 250, "{place}");
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_full_redis_takes_its_jobs_back() {
    let server = RedisServer::start();
    begin(&server, "old", b"j", &in_queue("j", "work"));
    server.config_set("maxmemory", "1");
    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    server.config_set("maxmemory", "0");
    assert_eq!(recovered.requeued, 1);
    assert_eq!(queue(&server, "work"), [in_queue("j", "work")]);
}

fn scans(server: &RedisServer) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("commandstats")
        .query(&mut server.connect())
        .unwrap();
    info.lines()
        .find_map(|line| line.strip_prefix("cmdstat_scan:calls="))
        .and_then(|rest| rest.split(',').next())
        .map_or(0, |calls| calls.parse().unwrap())
}

#[test]
fn a_search_goes_in_small_steps_between_which_beats_go_on() {
    let server = RedisServer::start();
    let mut connection = server.connect();
    for chunk in 0..10 {
        let mut pipeline = redis::pipe();
        for i in 0..1000 {
            pipeline.set(format!("jobs:{}", chunk * 1000 + i), "x").ignore();
        }
        let () = pipeline.query(&mut connection).unwrap();
    }
    begin(&server, "old", b"j", &in_queue("j", "work"));
    // As far as the command's own time goes, no step may be long.
    server.config_set("slowlog-log-slower-than", "20000");
    let tracker = Tracker::registered(settings(&server.socket_path(), "new"));
    eventually(SOON, "the search is over", || {
        let after: Option<u64> = connection.hget(keys().clock(), "scan_after").unwrap();
        after == Some(3_600_000)
    });
    let steps = scans(&server);
    assert!((8..=40).contains(&steps), "{steps} steps");
    assert_eq!(
        instances(&server)
            .iter()
            .filter(|name| name.starts_with("1.0 "))
            .count(),
        1
    );
    let slow: u64 = redis::cmd("SLOWLOG").arg("LEN").query(&mut connection).unwrap();
    assert_eq!(slow, 0);
    eventually(SOON, "the orphan is back", || tracker.count(is_recovered) == 1);
    let foreign: u64 = redis::cmd("DBSIZE").query(&mut connection).unwrap();
    assert!(foreign >= 10_000, "{foreign}");
    assert!(tracker.leave(SOON));
}

#[test]
fn one_of_many_processes_searches_and_once_an_hour() {
    let server = RedisServer::start();
    let trackers: Vec<Tracker> = (0..6)
        .map(|i| Tracker::start(settings(&server.socket_path(), &format!("t{i}"))))
        .collect();
    for tracker in &trackers {
        tracker.wait_for("a start", |event| matches!(event, Event::Started { .. }));
    }
    let after = || -> Option<u64> { server.connect().hget(keys().clock(), "scan_after").unwrap() };
    eventually(SOON, "one has searched", || after() == Some(3_600_000));
    // All have asked by the time all have beaten.
    thread::sleep(STEP * 3);
    assert_eq!(scans(&server), 1);
    assert!(trackers.iter().all(|tracker| tracker.leave(SOON)));

    // The turn, asked for one call at a time.
    let (mut link, keys) = (link(&server), keys());
    let minute = Duration::from_secs(60);
    let wait = legacy::look(&mut link, &keys, HOUR, minute).unwrap().unwrap();
    assert!(wait <= HOUR && wait > HOUR - minute, "{wait:?}");
    assert!(legacy::look(&mut link, &keys, minute, minute).unwrap().unwrap() <= minute);
    let set_back = |by: Duration| {
        let scanned: u64 = server.connect().hget(keys.clock(), "scanned").unwrap();
        let () = server
            .connect()
            .hset(keys.clock(), "scanned", scanned - by.as_millis() as u64)
            .unwrap();
    };
    set_back(minute);
    // One that boots does not wait for the hour to end; then one who has begun is waited for; and not for ever.
    assert!(legacy::look(&mut link, &keys, HOUR, minute).unwrap().is_some());
    assert_eq!(legacy::look(&mut link, &keys, minute, minute).unwrap(), None);
    assert!(legacy::look(&mut link, &keys, HOUR, HOUR).unwrap().unwrap() <= minute);
    set_back(minute);
    assert_eq!(legacy::look(&mut link, &keys, HOUR, HOUR).unwrap(), None);
    set_back(HOUR - minute);
    assert!(legacy::look(&mut link, &keys, HOUR, HOUR).unwrap().is_some());
    set_back(minute);
    assert_eq!(legacy::look(&mut link, &keys, HOUR, HOUR).unwrap(), None);
}

#[test]
fn a_process_that_boots_later_searches_again() {
    let server = RedisServer::start();
    let first = Tracker::registered(settings(&server.socket_path(), "first"));
    eventually(SOON, "the search is over", || {
        let after: Option<u64> = server.connect().hget(keys().clock(), "scan_after").unwrap();
        after == Some(3_600_000)
    });
    begin(&server, "old", b"j", &in_queue("j", "work"));
    let scanned: u64 = server.connect().hget(keys().clock(), "scanned").unwrap();
    let () = server
        .connect()
        .hset(keys().clock(), "scanned", scanned - 60_000)
        .unwrap();
    let second = Tracker::registered(settings(&server.socket_path(), "second"));
    eventually(SOON, "the orphan is back", || !queue(&server, "work").is_empty());
    assert_eq!(scans(&server), 2);
    assert!(first.leave(SOON) && second.leave(SOON));
}

#[test]
fn a_server_that_forbids_the_search_is_no_outage() {
    let server = RedisServer::start();
    let mut connection = server.connect();
    redis::cmd("ACL")
        .arg("SETUSER")
        .arg(USER)
        .arg("-scan")
        .exec(&mut connection)
        .unwrap();
    let mut killed = Options::new(&server.socket_path())
        .set("instance_id", "dead")
        .registered();
    killed.record("work", &job("j"));
    eventually(SOON, "the search fails", || killed.told("Warning") == 1);
    let text = killed.events().join("\n");
    assert!(
        text.contains("Cannot look for what the 1.0 gem has left") && text.contains("NOPERM"),
        "{text}"
    );
    let tracker = Tracker::registered(settings(&server.socket_path(), "new"));
    killed.kill();
    eventually(SOON, "the job is back", || tracker.count(is_recovered) == 1);
    // Nor does it keep a console from its work.
    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert!(warnings(&recovered.events).join("\n").contains("Cannot look for"));
    assert!(tracker.leave(SOON));
}
