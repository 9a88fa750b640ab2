//! Due jobs go from their set to their queue: each once, whatever is cut, comes late or dies on the way.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::due::{Claimed, Push, Straight};
use processing_tracker_core::engine::Engine;
use processing_tracker_core::events::Event;
use processing_tracker_core::Result;
use redis::Commands;
use support::lua;
use support::process::Options;
use support::proxy::{relay, Action, At, End, Faults, Proxy, Request, When};
use support::redis_server::RedisServer;
use support::rng::seed;
use support::tracker::{
    assert_at_rest, hostile_payloads, instances, is_lease_lost, job, jobs, keys, queue, recover_all, settings, Tracker,
    SOON,
};
use support::wait::eventually;

/// What is due, and what is not yet.
const NOW: &[u8] = b"1000";
/// More than two claims take.
const MANY: usize = 450;

fn schedule(server: &RedisServer, set: &str, jobs: &[Vec<u8>], from: f64) {
    let mut connection = server.connect();
    for (i, job) in jobs.iter().enumerate() {
        let () = connection.zadd(set, job, from + i as f64 / 1000.0).unwrap();
    }
}

fn scheduled(server: &RedisServer, set: &str) -> Vec<(Vec<u8>, f64)> {
    server.connect().zrange_withscores(set, 0, -1).unwrap()
}

/// What the schedulers of instances have taken and not pushed.
fn taken(server: &RedisServer) -> Vec<Vec<u8>> {
    let mut connection = server.connect();
    let hashes: Vec<String> = connection.keys(keys().due("*")).unwrap();
    let mut payloads = Vec::new();
    for hash in hashes {
        let fields: Vec<(String, Vec<u8>)> = connection.hgetall(hash).unwrap();
        payloads.extend(
            fields
                .into_iter()
                .filter(|(field, _)| field != "call")
                .map(|(_, payload)| payload),
        );
    }
    payloads
}

fn pushes(claimed: &Claimed) -> Vec<(Vec<u8>, Push)> {
    let push = |(token, payload): &(Vec<u8>, Vec<u8>)| (token.clone(), Push::Queue(b"work".to_vec(), payload.clone()));
    claimed.jobs.iter().map(push).collect()
}

/// A poll as Sidekiq's poller has it made. Answers how many were pushed.
fn poll(engine: &Engine, set: &str) -> Result<u64> {
    let outcome = (|| {
        let mut pushed = 0;
        loop {
            let claimed = engine.claim_due(set.as_bytes(), NOW, None)?;
            pushed += claimed.pushed + engine.settle_due(&pushes(&claimed))?;
            if !claimed.more {
                return Ok(pushed);
            }
        }
    })();
    engine.end_due().and(outcome)
}

#[track_caller]
fn assert_each_once(server: &RedisServer, jobs: &[Vec<u8>], what: &str) {
    let mut pushed = queue(server, "work");
    let mut expected = jobs.to_vec();
    pushed.sort();
    expected.sort();
    assert_eq!(pushed.len(), expected.len(), "{what}");
    assert!(pushed == expected, "{what}");
    assert_eq!(scheduled(server, "schedule"), [], "{what}");
    assert_eq!(taken(server), Vec::<Vec<u8>>::new(), "{what}");
}

#[test]
fn what_is_due_is_pushed_in_its_order_byte_for_byte_and_nothing_else() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "me"));
    let mut due = jobs(MANY);
    due.extend(hostile_payloads());
    schedule(&server, "schedule", &due, 100.0);
    schedule(&server, "schedule", &[job("later")], 1000.5);
    schedule(&server, "retry", &[job("retried")], 1000.0);
    assert_eq!(poll(tracker.engine(), "schedule").unwrap(), due.len() as u64);
    assert_eq!(queue(&server, "work"), due);
    assert_eq!(scheduled(&server, "schedule"), [(job("later"), 1000.5)]);
    assert_eq!(poll(tracker.engine(), "retry").unwrap(), 1);
    assert_eq!(poll(tracker.engine(), "retry").unwrap(), 0);
    let known: Vec<String> = server.connect().smembers("queues").unwrap();
    assert_eq!(known, ["work"]);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn what_is_not_pushed_goes_back_with_its_score() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "me"));
    let due = jobs(MANY);
    schedule(&server, "schedule", &due, 1.0 / 3.0);
    let before = scheduled(&server, "schedule");
    let engine = tracker.engine();
    let first = engine.claim_due(b"schedule", NOW, None).unwrap();
    let second = engine.claim_due(b"schedule", NOW, None).unwrap();
    assert_eq!((first.jobs.len(), second.jobs.len(), first.more), (200, 200, true));
    assert_eq!(scheduled(&server, "schedule"), before[400..]);
    // One is refused, one is scheduled anew, all others nobody says anything of.
    let settled = [
        (first.jobs[0].0.clone(), Push::Nowhere),
        (
            second.jobs[0].0.clone(),
            Push::Set(b"schedule".to_vec(), b"5000.25".to_vec(), job("anew")),
        ),
    ];
    assert_eq!(engine.settle_due(&settled).unwrap(), 2);
    engine.end_due().unwrap();
    let mut expected = before;
    expected.remove(200);
    expected.remove(0);
    expected.push((job("anew"), 5000.25));
    assert_eq!(scheduled(&server, "schedule"), expected);
    assert_eq!(queue(&server, "work"), Vec::<Vec<u8>>::new());
    // What has gone back is nobody's to push.
    assert_eq!(engine.settle_due(&pushes(&first)).unwrap(), 0);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_late_copy_of_a_claim_takes_nothing_also_after_polls_that_found_nothing() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "me"));
    let due_key = keys().due(&tracker.identity());
    let claim = |number: u64| -> String {
        let answer: Vec<redis::Value> = lua::CLAIM_DUE
            .key(keys().inflight(&tracker.identity()))
            .key(&due_key)
            .key("schedule")
            .arg(number)
            .arg(NOW)
            .arg(10)
            .arg("schedule")
            .invoke(&mut server.connect())
            .unwrap();
        redis::from_redis_value(answer[0].clone()).unwrap()
    };
    let noted = || -> Option<u64> { server.connect().hget(&due_key, "call").unwrap() };
    // Each is answered, so there is no copy of it, and it leaves nothing behind.
    assert_eq!((claim(1), claim(1)), ("idle".into(), "idle".into()));
    assert_eq!(noted(), None);
    // The first has had no answer, and may still arrive.
    assert_eq!((claim(2), noted()), ("ok".into(), Some(2)));
    schedule(&server, "schedule", &jobs(1), 1.0);
    assert_eq!((claim(1), claim(2)), ("stale".into(), "stale".into()));
    assert_eq!(scheduled(&server, "schedule").len(), 1);
    assert_eq!((claim(3), noted()), ("ok".into(), Some(3)));
    assert_eq!((claim(4), noted()), ("idle".into(), Some(3)));
    assert_eq!(scheduled(&server, "schedule"), []);
}

#[test]
fn after_a_claim_without_an_answer_comes_another_though_nothing_is_due() {
    let server = RedisServer::start();
    let late = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let late = late.clone();
        move |request: &Request| {
            if late.load(SeqCst) && lua::is_call(request, &lua::CLAIM_DUE) {
                Action::postpone(When::OnRelease)
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "me"));
    let engine = tracker.engine();
    schedule(&server, "schedule", &jobs(1), 1.0);
    let first = engine.claim_due(b"schedule", NOW, None).unwrap();
    assert!(!first.more);
    schedule(&server, "schedule", &[job("another")], 1.0);
    // A call is made twice, and none of the two reaches Redis. What was claimed before has gone back between them.
    late.store(true, SeqCst);
    assert!(engine.claim_due(b"schedule", NOW, None).is_err());
    assert_eq!(proxy.late_waiting(), 2);
    late.store(false, SeqCst);
    assert_eq!(engine.settle_due(&pushes(&first)).unwrap(), 0);
    engine.end_due().unwrap();
    let () = server.connect().del("schedule").unwrap();
    poll(tracker.engine(), "schedule").unwrap();
    // Two polls that find nothing: the second one only looks.
    poll(tracker.engine(), "schedule").unwrap();
    let noted = || -> u64 { server.connect().hget(keys().due(&tracker.identity()), "call").unwrap() };
    assert_eq!(noted(), 4);
    schedule(&server, "schedule", &[job("next")], 1.0);
    proxy.release_late();
    proxy.wait_late(SOON);
    assert_eq!(scheduled(&server, "schedule").len(), 1);
    poll(tracker.engine(), "schedule").unwrap();
    assert_eq!(queue(&server, "work"), [job("next")]);
    assert_eq!(noted(), 5);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_payload_that_is_large_comes_alone() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "me"));
    let large: Vec<Vec<u8>> = (0..4u8).map(|i| vec![b'a' + i; 1 << 20]).collect();
    // Others before them, so that a claim has reason to hope for many.
    let small: Vec<Vec<u8>> = (0..20).map(|i| job(&format!("before {i}"))).collect();
    schedule(&server, "schedule", &small, 0.0);
    schedule(&server, "schedule", &large, 1.0);
    schedule(&server, "schedule", &jobs(3), 2.0);
    let engine = tracker.engine();
    let mut sizes = Vec::new();
    loop {
        let claimed = engine.claim_due(b"schedule", NOW, None).unwrap();
        sizes.push(claimed.jobs.len());
        engine.settle_due(&pushes(&claimed)).unwrap();
        if !claimed.more {
            break;
        }
    }
    // No answer is larger than a MB and the last job in it.
    assert_eq!(sizes, [21, 1, 1, 1, 3]);
    assert_eq!(queue(&server, "work"), [small, large, jobs(3)].concat());
}

/// Does something to the n-th call of a script, once.
fn once(script: &'static redis::Script, nth: usize, action: fn() -> Action) -> impl FnMut(&Request) -> Action {
    let mut seen = 0;
    move |request: &Request| {
        // A script that Redis does not know yet is sent twice: by its hash, and whole.
        if lua::is_call(request, script) {
            seen += 1;
            if seen == nth {
                return action();
            }
        }
        relay(request)
    }
}

/// What a test does to a call.
type Fault = (&'static str, fn() -> Action);

#[test]
fn redis_may_be_cut_off_at_every_step() {
    let scripts: [(&str, &'static redis::Script); 3] = [
        ("claim", &lua::CLAIM_DUE),
        ("settle", &lua::SETTLE_DUE),
        ("return", &lua::RETURN_DUE),
    ];
    let actions: [Fault; 6] = [
        ("request lost", Action::drop_request),
        ("request cut", || Action::cut_request(At::Share(0.5), End::Close)),
        ("reply lost", Action::drop_reply),
        ("reply cut", || Action::cut_reply(At::Share(0.5), End::Close)),
        ("late", || Action::postpone(When::OnRelease)),
        ("copied", || Action::pass().and_copy(When::OnRelease)),
    ];
    thread::scope(|scope| {
        for (name, script) in scripts {
            for (fault, action) in actions {
                scope.spawn(move || {
                    for nth in 2..=4 {
                        // Each poll claims and settles more than once, but may put nothing back.
                        let hits = name != "return" || nth == 2;
                        cut_once(&format!("{name} {nth}: {fault}"), hits, once(script, nth, action));
                    }
                });
            }
        }
    });
}

/// `hits`: whether the call is surely made, so that the fault has its chance.
fn cut_once(what: &str, hits: bool, plan: impl FnMut(&Request) -> Action + Send + 'static) {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), plan);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "me"));
    let jobs = jobs(MANY);
    schedule(&server, "schedule", &jobs, 1.0);
    let engine = tracker.engine();
    // A poll that is broken off in the middle, so that something has to go back.
    let broken_off = engine.claim_due(b"schedule", NOW, None);
    if let Ok(claimed) = &broken_off {
        let _ = engine.settle_due(&pushes(claimed)[..claimed.jobs.len() / 2]);
    }
    let _ = engine.end_due();
    eventually(SOON, what, || {
        // A copy that was late finds its time in between.
        if server.connect().zcard::<_, u64>("schedule").unwrap() < MANY as u64 / 2 {
            proxy.release_late();
        }
        let _ = poll(engine, "schedule");
        scheduled(&server, "schedule").is_empty() && taken(&server).is_empty()
    });
    proxy.release_late();
    // What a late copy may have taken goes back with the next poll that takes something.
    schedule(&server, "schedule", &[job("last")], 1.0);
    let mut all = jobs;
    all.push(job("last"));
    eventually(SOON, what, || {
        let _ = poll(engine, "schedule");
        queue(&server, "work").len() >= all.len()
    });
    assert_each_once(&server, &all, what);
    assert!(!hits || proxy.counts().faults() == 1, "{what}: {:?}", proxy.counts());
    proxy.calm();
    assert!(tracker.leave(SOON), "{what}");
    assert_at_rest(&server);
}

#[test]
fn whatever_befalls_the_connection_each_job_is_pushed_once() {
    let seed = seed();
    let server = RedisServer::start();
    let mut faults = Faults::some(seed);
    faults.may_copy = lua::may_repeat;
    let proxy = Proxy::start(server.socket_path(), faults);
    proxy.calm();
    let mut patient = settings(&proxy.socket_path(), "me");
    // Its lease is not what this is about.
    patient.ttl = Duration::from_secs(60);
    let tracker = Tracker::registered(patient);
    proxy.storm();
    let mut all = Vec::new();
    for round in 0..40 {
        let jobs: Vec<Vec<u8>> = (0..60).map(|i| job(&format!("{round}-{i}"))).collect();
        schedule(&server, "schedule", &jobs, 1.0);
        all.extend(jobs);
        let _ = poll(tracker.engine(), "schedule");
    }
    proxy.calm();
    proxy.release_late();
    eventually(SOON, &format!("all is pushed (seed {seed})"), || {
        let _ = poll(tracker.engine(), "schedule");
        queue(&server, "work").len() >= all.len() && scheduled(&server, "schedule").is_empty()
    });
    assert!(proxy.counts().faults() > 20, "{:?}", proxy.counts());
    assert_each_once(&server, &all, &format!("seed {seed}"));
}

#[test]
fn a_scheduler_may_be_killed_at_every_step() {
    const PLACES: [&str; 6] = [
        "before_claim_due:2",
        "after_claim_due",
        "after_claim_due:2",
        "before_settle_due:2",
        "after_settle_due",
        "after_settle_due:3",
    ];
    thread::scope(|scope| {
        for place in PLACES {
            scope.spawn(move || push_past(place, None));
        }
        // And who recovers it too.
        for place in ["after_reap", "after_return_due", "after_recover"] {
            scope.spawn(move || push_past("after_claim_due", Some(place)));
        }
    });
}

fn push_past(place: &str, reaper_dies_at: Option<&str>) {
    let server = RedisServer::start();
    let socket = server.socket_path();
    let jobs = jobs(MANY);
    schedule(&server, "schedule", &jobs, 1.0);
    let before = scheduled(&server, "schedule");
    let mut killed = Options::new(&socket).failpoint(place).registered();
    assert_eq!(killed.try_ask("poll schedule"), None, "{place}");
    eventually(SOON, &format!("the process dies at {place}"), || killed.is_killed());
    if let Some(place) = reaper_dies_at {
        let mut reaper = Options::new(&socket)
            .set("instance_id", "reaper")
            .failpoint(place)
            .start();
        eventually(SOON, &format!("the reaper dies at {place}"), || reaper.is_killed());
    }
    let next = Tracker::registered(settings(&socket, "next"));
    eventually(SOON, "the dead is gone", || instances(&server) == [next.identity()]);
    // Pushed, or back with the score that it had.
    let (pushed, back) = (queue(&server, "work"), scheduled(&server, "schedule"));
    assert_eq!(pushed.len() + back.len(), MANY, "{place}");
    assert!(back.iter().all(|entry| before.contains(entry)), "{place}");
    assert_eq!(taken(&server), Vec::<Vec<u8>>::new(), "{place}");
    poll(next.engine(), "schedule").unwrap();
    assert_each_once(&server, &jobs, place);
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}

/// Sidekiq waits for its poller when it shuts down.
#[test]
fn a_redis_that_does_not_answer_is_not_waited_for_again_and_again() {
    let server = RedisServer::start();
    let mut slow = settings(&server.socket_path(), "me");
    // Longer than a poll may take.
    (slow.interval, slow.ttl) = (Duration::from_secs(20), Duration::from_secs(100));
    let tracker = Tracker::registered(slow);
    let engine = tracker.engine();
    let due = jobs(3);
    schedule(&server, "schedule", &due, 1.0);
    let claimed = engine.claim_due(b"schedule", NOW, None).unwrap();
    server.pause();
    let began = Instant::now();
    engine.settle_due(&pushes(&claimed)).unwrap_err();
    // It has just been found away.
    let failed = began.elapsed();
    engine.end_due().unwrap();
    let (ended, limit) = (began.elapsed(), Duration::from_secs(4));
    assert!(
        failed < limit && ended - failed < Duration::from_secs(1),
        "{failed:?}, {ended:?}"
    );
    // The end that meets it first waits once.
    server.resume();
    eventually(SOON, "it is back", || engine.claim_due(b"schedule", NOW, None).is_ok());
    server.pause();
    let began = Instant::now();
    engine.end_due().unwrap_err();
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    server.resume();
    eventually(SOON, "all is pushed", || {
        let _ = poll(engine, "schedule");
        queue(&server, "work") == due
    });
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn who_has_lost_its_lease_pushes_nothing() {
    let server = RedisServer::start();
    let mut paused = Options::new(&server.socket_path()).registered();
    let away = Tracker::registered(settings(&server.socket_path(), "away"));
    let mut due = jobs(3);
    schedule(&server, "schedule", &due, 1.0);
    let claimed = away.engine().claim_due(b"schedule", NOW, None).unwrap();
    assert_eq!(claimed.jobs.len(), 3);
    // It is fenced by somebody.
    let () = server
        .connect()
        .hdel(keys().inflight(&away.identity()), "call")
        .unwrap();
    let () = server.connect().zadd(keys().instances(), away.identity(), 0).unwrap();
    assert!(claimed.leased);
    schedule(&server, "schedule", &[job("next")], 2.0);
    due.push(job("next"));
    let again = away.engine().claim_due(b"schedule", NOW, None).unwrap();
    assert_eq!(again, Claimed::default());
    assert!(!again.leased);
    assert_eq!(away.engine().settle_due(&pushes(&claimed)).unwrap(), 0);
    away.wait_for("it says so", is_lease_lost);
    eventually(SOON, "all is back", || scheduled(&server, "schedule").len() == 4);
    assert_eq!(queue(&server, "work"), Vec::<Vec<u8>>::new());
    away.engine().end_due().unwrap();
    eventually(SOON, "it goes on under its next name", || {
        poll(away.engine(), "schedule").unwrap();
        queue(&server, "work") == due
    });
    assert!(paused.leave(SOON));
    assert!(away.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn what_cannot_go_back_stays_and_is_told() {
    let server = RedisServer::start();
    let mut killed = Options::new(&server.socket_path())
        .failpoint("after_claim_due")
        .registered();
    schedule(&server, "schedule", &jobs(3), 1.0);
    assert_eq!(killed.try_ask("poll schedule"), None);
    eventually(SOON, "the process dies", || killed.is_killed());
    let mut connection = server.connect();
    let () = connection.set("schedule", "no set").unwrap();
    let survivor = Tracker::registered(settings(&server.socket_path(), "survivor"));
    survivor.wait_for(
        "it is told",
        |event| matches!(event, Event::Warning(text) if text.contains(":due:") && text.contains(": 3.")),
    );
    assert_eq!(taken(&server).len(), 3);
    let () = connection.del("schedule").unwrap();
    eventually(SOON, "all is back", || {
        taken(&server).is_empty() && scheduled(&server, "schedule").len() == 3
    });
    eventually(SOON, "the dead is gone", || instances(&server).len() == 1);
    assert!(survivor.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_console_puts_due_jobs_back_too() {
    let server = RedisServer::start();
    let mut killed = Options::new(&server.socket_path())
        .failpoint("after_claim_due")
        .registered();
    schedule(&server, "retry", &jobs(3), 1.0);
    assert_eq!(killed.try_ask("poll retry"), None);
    eventually(SOON, "the process dies", || killed.is_killed());
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!(scheduled(&server, "retry").len(), 3);
    assert_at_rest(&server);
}

#[test]
fn what_needs_nothing_of_ruby_goes_straight_to_its_queue() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "me"));
    let plain = br#"{"retry":true,"queue":"a: b","class":"A","args":[1, 2.50],"jid":"p","created_at":1.5}"#.to_vec();
    let irregular = br#"{"retry":true,"class":"A","args":[],"jid":"i","created_at":1.5}"#.to_vec();
    schedule(&server, "schedule", &[plain, irregular.clone()], 1.0);
    let straight = Straight {
        defaults: vec!["retry".into(), "queue".into()],
        transient: Vec::new(),
        milliseconds: true,
    };
    let claimed = tracker.engine().claim_due(b"schedule", NOW, Some(&straight)).unwrap();
    assert_eq!((claimed.pushed, claimed.jobs.len()), (1, 1));
    assert_eq!(claimed.jobs[0].1, irregular);
    let pushed = String::from_utf8(queue(&server, "a: b").remove(0)).unwrap();
    let (before, time) = pushed.rsplit_once(r#","enqueued_at":"#).unwrap();
    assert_eq!(
        before,
        r#"{"retry":true,"queue":"a: b","class":"A","args":[1, 2.50],"jid":"p","created_at":1.5"#
    );
    assert!(time.trim_end_matches('}').parse::<u64>().unwrap() > 1_700_000_000_000);
    tracker.engine().end_due().unwrap();
    assert_eq!(scheduled(&server, "schedule"), [(irregular, 1.001)]);
}
