//! Calls that fail half way, keys that somebody else has written, and a last moment that comes early: what an engine
//! and a recovery make of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::error::Error;
use processing_tracker_core::events::Event;
use processing_tracker_core::identity;
use processing_tracker_core::parker::{Parker, Woken};
use processing_tracker_core::registry::Requeueing;
use processing_tracker_core::scripts::{self, Turn, Turned};
use processing_tracker_core::settings::Settings;
use redis::{Commands, Script};
use support::lua;
use support::proxy::{relay, Action, End, OnConnect, Plan, Proxy, Request};
use support::redis_server::{RedisServer, USER};
use support::tracker::{
    self, assert_at_rest, forgetful, in_flight, instances, is_lease_lost, is_outage, is_outage_over, is_recovered, job,
    jobs, journal, keys, link, queue, recover_all, settings, stat, Tracker, SOON, STEP, TTL,
};
use support::wait::eventually;

const NOTHING: [Vec<u8>; 0] = [];

fn engine(server: &RedisServer, instance_id: &str) -> Tracker {
    Tracker::registered(settings(&server.socket_path(), instance_id))
}

/// An instance that has died with these jobs in flight, and never recovered anybody; it is due at once.
fn dead(server: &RedisServer, instance_id: &str, queue: &str, jobs: &[Vec<u8>]) -> String {
    let identity = dying(server, instance_id, queue, jobs);
    due(server, &identity);
    identity
}

/// The same, with a lease that still runs.
fn dying(server: &RedisServer, instance_id: &str, queue: &str, jobs: &[Vec<u8>]) -> String {
    let (mut link, identity) = (link(server), identity::draw(instance_id).unwrap());
    let pace = settings(&server.socket_path(), instance_id).pace();
    scripts::register(&mut link, &keys(), &identity, pace, &[]).unwrap();
    let turn = Turn {
        call: 1,
        records: jobs.iter().map(|job| (queue.into(), job.clone().into())).collect(),
        ..Turn::default()
    };
    let turned = scripts::turn(&mut link, &keys(), &identity, &turn).unwrap();
    assert!(matches!(turned, Turned::Done(done) if done.recorded.len() == jobs.len()));
    identity
}

/// So many jobs that are no other instance's: one that is orphaned for the second time waits, and goes behind all others.
fn jobs_of(name: &str, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| job(&format!("{name}-{i}"))).collect()
}

/// Lets its lease run out, now.
fn due(server: &RedisServer, identity: &str) {
    let () = server.connect().zadd(keys().instances(), identity, 0).unwrap();
}

fn is_warning_of(text: &str) -> impl Fn(&Event) -> bool + '_ {
    move |event| matches!(event, Event::Warning(warning) if warning.contains(text))
}

/// The jobs that somebody was told of as recovered, in that order.
fn recovered_jids(told: &[Event]) -> Vec<String> {
    let jid = |event: &Event| match event {
        Event::Settled(settled) => settled.jid.clone(),
        _ => None,
    };
    told.iter().filter_map(jid).collect()
}

fn overwrite(server: &RedisServer, key: &str) {
    let () = server.connect().del(key).unwrap();
    let () = server.connect().set(key, "not ours").unwrap();
}

/// A proxy that loses the reply to every other call of this script, beginning with the first.
fn loses_every_other_reply(server: &RedisServer, script: &'static Script) -> (Proxy, Arc<AtomicU64>) {
    // Else its first call would be two.
    let mut connection = server.connect();
    script.prepare_invoke().load(&mut connection).unwrap();
    let lost = Arc::new(AtomicU64::new(0));
    let counted = lost.clone();
    // The connection that has ended so, and the one after it, whose first call was answered.
    let (mut ended, mut spared) = (None, Some(0));
    let proxy = Proxy::start(server.socket_path(), move |request: &Request| {
        // Of `reap`, only the call that fences: `KEYS` holds a hash. What is sent behind a call whose reply is lost has no reply either.
        let counts = lua::is_call(request, script) && request.contains(":inflight:");
        if !counts || ended == Some(request.connection) {
            return Action::pass();
        }
        if spared.is_none() {
            spared = Some(request.connection);
            return Action::pass();
        }
        (ended, spared) = (Some(request.connection), None);
        counted.fetch_add(1, SeqCst);
        Action::drop_reply()
    });
    (proxy, lost)
}

// --- leases that are taken away ---

#[test]
fn one_whose_lease_is_taken_again_and_again_registers_at_a_pace() {
    let server = RedisServer::start();
    // Its jobs are orphaned again and again.
    let tracker = Tracker::registered(forgetful(&server.socket_path(), "one"));
    let start = Instant::now();
    let take_all =
        Script::new("for _, key in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('HDEL', key, 'call') end");
    let mut connection = server.connect();
    let mut handles = Vec::new();
    while start.elapsed() < TTL * 2 {
        // What is new here wants its record, and so the loss is seen at once each time. Each is another job: one that is
        // orphaned so often would be a suspect, and leave at a pace of its own.
        handles.push(tracker.track("work", &job(&format!("new-{}", handles.len()))));
        let () = take_all.arg(keys().inflight("*")).invoke(&mut connection).unwrap();
    }
    let losses = tracker.count(is_lease_lost);
    let most = start.elapsed().as_millis() / (STEP / 5).as_millis() + 2;
    assert!(losses >= 3, "{losses}");
    assert!((losses as u128) <= most, "{losses}, and {most} at most");
    assert!(instances(&server).len() as u128 <= most);
    assert_eq!(tracker.count(is_outage), 0, "{:?}", tracker.told());

    // Then it goes on, and nothing stays of the others.
    handles.push(tracker.record("work", &job("next")));
    let identity = tracker.identity();
    thread::sleep(STEP * 3);
    assert_eq!(tracker.identity(), identity);
    for handle in handles {
        tracker.engine().ack(handle);
    }
    assert!(tracker.leave(SOON));
    recover_all(&forgetful(&server.socket_path(), "console")).unwrap();
    assert_at_rest(&server);
}

#[test]
fn the_loss_of_a_lease_loses_no_job_that_is_with_this_process_alone() {
    // A record that never reached Redis, of a job whose thread has gone, or whose requeue was given up.
    for (then, back) in [("release", true), ("abandon", true), ("run", false), ("ack", false)] {
        let server = RedisServer::start();
        let through = Arc::new(AtomicBool::new(true));
        let proxy = Proxy::start(server.socket_path(), {
            let through = through.clone();
            move |request: &Request| {
                if !through.load(SeqCst) && lua::is_turn(request) {
                    Action::stall()
                } else {
                    Action::pass()
                }
            }
        });
        let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
        let stalled = proxy.counts().of("stalled");
        through.store(false, SeqCst);
        let handle = tracker.track("work", &job("a"));
        eventually(SOON, "the turn is under way", || proxy.counts().of("stalled") > stalled);
        match then {
            "release" => tracker.engine().release(handle),
            "abandon" => {
                assert!(matches!(tracker.engine().requeue(handle), Requeueing::Under(_)));
                tracker.engine().abandon(&[handle]);
            }
            "ack" => tracker.engine().ack(handle),
            _ => {}
        }
        let () = server.connect().del(keys().inflight(&tracker.identity())).unwrap();
        tracker.wait_for("the lease is lost", is_lease_lost);
        through.store(true, SeqCst);
        if back {
            eventually(SOON, "it is back", || queue(&server, "work") == [job("a")]);
        } else if then == "run" {
            eventually(SOON, "it is recorded", || in_flight(&server) == [job("a")]);
            tracker.engine().ack(handle);
        }
        let probe = tracker.record("probes", &job("probe"));
        tracker.engine().ack(probe);
        assert!(tracker.leave(SOON));
        assert_eq!(queue(&server, "work").len(), usize::from(back), "{then}");
        recover_all(&settings(&server.socket_path(), "console")).unwrap();
        assert_at_rest(&server);
    }
}

#[test]
fn an_overwritten_info_costs_neither_the_marks_nor_a_beat() {
    let server = RedisServer::start();
    let tracker = engine(&server, "one");
    let identity = tracker.identity();
    let info = keys().info(&identity);
    overwrite(&server, &info);
    let marked = tracker
        .engine()
        .track(b"work".to_vec(), job("marked").into(), Some("HardJob".into()));
    assert!(tracker.is_recorded(marked, SOON));
    assert!(server.connect().hexists::<_, _, bool>(&info, "marked:HardJob").unwrap());
    // Progress is noted there too, or not at all.
    overwrite(&server, &info);
    tracker.engine().touch();
    thread::sleep(STEP * 7);
    assert_eq!(tracker.identity(), identity);
    tracker.engine().ack(marked);
    assert!(tracker.leave(SOON));
    assert_eq!((tracker.count(is_outage), tracker.count(is_lease_lost)), (0, 0));
    assert_eq!(queue(&server, "work"), NOTHING);
    assert_at_rest(&server);
}

// --- recovery of others ---

#[test]
fn a_recovery_that_redis_refuses_stops_no_other_and_is_warned_of_once() {
    let server = RedisServer::start();
    // So many are not read by `reap`.
    let refused = dead(&server, "refused", "work", &jobs(250));
    let orphans = jobs_of("other", 3);
    let other = dead(&server, "other", "others", &orphans);
    let hash = keys().inflight(&refused);
    let settled = Arc::new(AtomicU64::new(0));
    // Else its first call would be two.
    lua::RECOVER.prepare_invoke().load(&mut server.connect()).unwrap();
    let proxy = Proxy::start(server.socket_path(), {
        let (hash, socket) = (hash.clone(), server.url());
        let mut done = false;
        let (settled, other) = (settled.clone(), keys().inflight(&other));
        // Between `reap` and `peek` somebody overwrites it.
        move |request: &Request| {
            settled.fetch_add(
                u64::from(lua::is_call(request, &lua::RECOVER) && request.contains(&other)),
                SeqCst,
            );
            if !done && lua::is_call(request, &lua::PEEK) && request.contains(&hash) {
                done = true;
                let client = redis::Client::open(socket.as_str()).unwrap();
                let () = client.get_connection().unwrap().set(&hash, "not ours").unwrap();
            }
            Action::pass()
        }
    });
    // It comes first.
    let () = server.connect().zadd(keys().instances(), &refused, -1).unwrap();
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    eventually(SOON, "the other's are back", || queue(&server, "others") == orphans);
    // What was on its way together with the call that is refused is heard of, and needs no other call.
    eventually(SOON, "it is told", || tracker.count(is_recovered) == orphans.len());
    assert_eq!(settled.load(SeqCst), 1);
    let warning = tracker.wait_for("a person is told", is_warning_of(&refused));
    assert!(
        matches!(&warning, Event::Warning(text) if text.contains("WRONGTYPE")),
        "{warning:?}"
    );
    let kind: String = redis::cmd("TYPE").arg(&hash).query(&mut server.connect()).unwrap();
    assert_eq!(kind, "string");
    // It is tried again, but not told so, and others die and are recovered meanwhile.
    thread::sleep(STEP * 3);
    let orphans = jobs_of("third", 2);
    let third = dead(&server, "third", "third", &orphans);
    eventually(SOON, "the third's are back", || queue(&server, "third") == orphans);
    thread::sleep(STEP * 3);
    assert_eq!(tracker.count(is_warning_of(&refused)), 1, "{:?}", tracker.told());
    for identity in [&other, &third] {
        assert_eq!(tracker.count(is_warning_of(identity)), 0);
    }
    let () = server.connect().del(&hash).unwrap();
    eventually(SOON, "it is forgotten", || instances(&server) == [tracker.identity()]);
    assert_eq!((tracker.count(is_outage), tracker.count(is_lease_lost)), (0, 0));
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_listed_name_of_any_bytes_is_recovered_and_keeps_nobody_busy() {
    let server = RedisServer::start();
    let mut connection = server.connect();
    let tracker = engine(&server, "one");
    // One with a job, one with nothing, one that cannot be recovered.
    let (with_job, with_nothing, hopeless) = (b"\xff:1:\xfe", b"\xff\r\n", b"\xc0\x80");
    let () = connection
        .hset(keys().inflight_of(with_job), "1-1 5 work", job("odd"))
        .unwrap();
    let () = connection.set(keys().inflight_of(hopeless), "not ours").unwrap();
    for name in [&with_job[..], with_nothing, hopeless] {
        let () = connection.zadd(keys().instances(), name, -1).unwrap();
    }
    dead(&server, "dead", "others", &jobs(3));
    eventually(SOON, "all are back", || {
        queue(&server, "work") == [job("odd")] && queue(&server, "others") == jobs(3)
    });
    let listed =
        |connection: &mut redis::Connection| -> Vec<Vec<u8>> { connection.zrange(keys().instances(), 0, -1).unwrap() };
    eventually(SOON, "one stays", || listed(&mut connection).len() == 2);
    assert!(listed(&mut connection).contains(&hopeless.to_vec()));
    let told = tracker.told();
    let from: BTreeSet<String> = told
        .iter()
        .filter_map(|event| match event {
            Event::Settled(settled) => Some(settled.from.clone()),
            _ => None,
        })
        .collect();
    assert!(from.contains("\u{fffd}:1:\u{fffd}"), "{from:?}");

    // One beat a step, and now and then a look at the hopeless one.
    let before = calls_of_scripts(&server);
    thread::sleep(STEP * 10);
    let calls = calls_of_scripts(&server) - before;
    assert!(calls < 10 * 10, "{calls} calls in ten steps");
    assert_eq!(
        tracker.count(is_warning_of("\u{fffd}\u{fffd}")),
        1,
        "{:?}",
        tracker.told()
    );

    // A console does not wait for it either.
    let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
    assert_eq!(recovered.requeued, 0);
    let () = connection.del(keys().inflight_of(hopeless)).unwrap();
    eventually(SOON, "it is forgotten", || listed(&mut connection).len() == 1);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

fn calls_of_scripts(server: &RedisServer) -> u64 {
    let stats: String = redis::cmd("INFO")
        .arg("commandstats")
        .query(&mut server.connect())
        .unwrap();
    let line = stats
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    line.unwrap().split(',').next().unwrap().parse().unwrap()
}

/// A proxy that lists a name whenever a reaper looks: it comes back as often as it goes.
fn lists_again(server: &RedisServer) -> Proxy {
    let mut connection = server.connect();
    Proxy::start(server.socket_path(), move |request: &Request| {
        if lua::is_call(request, &lua::REAP) {
            let () = connection.zadd(keys().instances(), b"\xff", 0).unwrap();
        }
        Action::pass()
    })
}

#[test]
fn somebody_who_is_due_again_and_again_keeps_no_engine_busy() {
    let server = RedisServer::start();
    let proxy = lists_again(&server);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let before = calls_of_scripts(&server);
    thread::sleep(STEP * 10);
    let calls = calls_of_scripts(&server) - before;
    // A beat a step, and two calls to recover for each pause of a fifth of one.
    assert!(calls <= 10 * 2 + 10 * 5 * 2 + 10, "{calls} calls in ten steps");
    // Others are recovered all the same.
    dead(&server, "dead", "work", &jobs(3));
    eventually(SOON, "all are back", || queue(&server, "work") == jobs(3));
    assert_eq!(tracker.count(is_lease_lost), 0);
}

#[test]
fn a_console_that_always_finds_somebody_due_can_be_cancelled() {
    let server = RedisServer::start();
    let proxy = lists_again(&server);
    dead(&server, "dead", "work", &jobs(3));
    let cancel = Parker::new();
    let waiting = thread::spawn({
        let (cancel, settings) = (cancel.clone(), settings(&proxy.socket_path(), "console"));
        move || tracker::recover(&settings, &cancel)
    });
    eventually(SOON, "the others are back", || queue(&server, "work") == jobs(3));
    let before = calls_of_scripts(&server);
    thread::sleep(STEP * 5);
    assert!(!waiting.is_finished());
    let calls = calls_of_scripts(&server) - before;
    assert!(calls < 5 * 5 * 3, "{calls} calls in five steps");
    cancel.unpark();
    let start = Instant::now();
    assert_eq!(waiting.join().unwrap().unwrap().requeued, 3);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_lost_reply_to_recover_loses_no_event_and_doubles_none() {
    let server = RedisServer::start();
    // Three pieces.
    let dead = dead(&server, "dead", "work", &jobs(450));
    let (proxy, lost) = loses_every_other_reply(&server, &lua::RECOVER);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    eventually(SOON, "the dead is gone", || instances(&server) == [tracker.identity()]);
    eventually(SOON, "all is told", || tracker.count(is_recovered) >= 450);
    assert!(tracker.leave(SOON));
    assert!(lost.load(SeqCst) >= 3, "{lost:?}");
    assert_eq!(queue(&server, "work"), jobs(450));
    let told = recovered_jids(&tracker.told());
    assert_eq!(told.len(), 450);
    let jids: BTreeSet<String> = told.into_iter().collect();
    assert_eq!(jids, (0..450).map(|i| format!("j{i}")).collect());
    assert_eq!((stat(&server, "requeued"), journal(&server).len()), (450, 450));
    assert!(journal(&server).iter().all(|line| line.from == dead));
    assert_eq!(tracker.count(is_outage), 0);
    assert_at_rest(&server);
}

/// Slow settings: two steps are four seconds.
fn slow(mut settings: Settings) -> Settings {
    (settings.interval, settings.ttl) = (Duration::from_secs(2), Duration::from_secs(10));
    settings
}

#[test]
fn reenqueue_orphans_fails_where_redis_refuses_for_ever() {
    let server = RedisServer::start();
    let refused = dead(&server, "a", "work", &jobs(2));
    let due = keys().due(&refused);
    let () = server.connect().hset(&due, "1-1 1700000000 retry", job("due")).unwrap();
    dead(&server, "b", "others", &jobs_of("b", 3));
    let acl = |rule: &str| {
        redis::cmd("ACL")
            .arg(&["SETUSER", USER, rule])
            .exec(&mut server.connect())
            .unwrap();
    };
    // What puts due jobs back cannot go without.
    acl("-hlen");
    let settings = settings(&server.socket_path(), "console");
    let error = recover_all(&settings).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    acl("+hlen");
    assert_eq!(recover_all(&settings).unwrap().requeued, 5);
    assert_at_rest(&server);
}

/// While Redis works on one dead instance the next step of another is on its way; also where it forgets its scripts meanwhile, and
/// where an answer is lost while another call waits behind it.
#[test]
fn two_dead_instances_are_recovered_at_a_time() {
    for loses in [false, true] {
        let server = RedisServer::start();
        for name in ["d0", "d1", "d2", "d3"] {
            dead(&server, name, name, &jobs_of(name, 3));
        }
        let (calls, socket) = (Arc::new(Mutex::new(Vec::new())), server.socket_path());
        let seen = calls.clone();
        let proxy = Proxy::start(socket.clone(), move |request: &Request| {
            let name = ["reap", "recover"]
                .into_iter()
                .zip([&lua::REAP, &lua::RECOVER])
                .find_map(|(name, script)| lua::is_call(request, script).then_some(name));
            let of = ["d0", "d1", "d2", "d3"]
                .into_iter()
                .find(|of| request.contains(&format!("inflight:{of}:")));
            let (Some(name), Some(of)) = (name, of) else {
                return Action::pass();
            };
            let mut seen = seen.lock().unwrap();
            seen.push(format!("{name} {of}"));
            match seen.len() {
                2 => {
                    let mut connection = redis::Client::open(format!("unix://{}", socket.display()))
                        .unwrap()
                        .get_connection()
                        .unwrap();
                    let () = redis::cmd("SCRIPT").arg("FLUSH").query(&mut connection).unwrap();
                    Action::pass()
                }
                5 if loses => Action::drop_reply(),
                _ => Action::pass(),
            }
        });
        let recovered = recover_all(&settings(&proxy.socket_path(), "console")).unwrap();
        assert_eq!(recovered.requeued, 12, "{:?}", calls.lock().unwrap());
        for name in ["d0", "d1", "d2", "d3"] {
            assert_eq!(queue(&server, name), jobs_of(name, 3));
        }
        let calls = calls.lock().unwrap();
        assert_eq!(calls[..2], ["reap d0", "reap d1"], "{calls:?}");
        let at = |call: &str| calls.iter().position(|seen| seen == call).unwrap();
        assert!(at("recover d1") < at("reap d3"), "{calls:?}");
        assert_eq!((stat(&server, "requeued"), journal(&server).len()), (12, 12));
        assert_at_rest(&server);
    }
}

#[test]
fn a_lost_reply_to_reap_costs_no_hold() {
    let server = RedisServer::start();
    dead(&server, "dead", "work", &[job("a")]);
    let (proxy, lost) = loses_every_other_reply(&server, &lua::REAP);
    let tracker = Tracker::registered(slow(settings(&proxy.socket_path(), "one")));
    let start = Instant::now();
    eventually(SOON, "it is back", || queue(&server, "work") == [job("a")]);
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert_eq!(lost.load(SeqCst), 1);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn an_overwritten_journal_is_warned_of_once_and_costs_no_job() {
    for key in [keys().journal(), keys().stats()] {
        let server = RedisServer::start();
        let tracker = engine(&server, "one");
        overwrite(&server, &key);
        for round in 0..3 {
            let name = format!("q{round}");
            let orphans = jobs_of(&name, 3);
            dead(&server, &name, &name, &orphans);
            eventually(SOON, "all are back", || queue(&server, &name) == orphans);
        }
        tracker.wait_for("a person is told", is_warning_of(&key));
        eventually(SOON, "all is told", || tracker.count(is_recovered) == 9);
        assert!(tracker.leave(SOON));
        assert_eq!(tracker.count(|event| matches!(event, Event::Warning(_))), 1);
        assert_eq!((tracker.count(is_outage), tracker.count(is_lease_lost)), (0, 0));
        // On demand as well.
        for round in 3..5 {
            let name = format!("q{round}");
            dead(&server, "dead", &name, &jobs_of(&name, 2));
        }
        let recovered = recover_all(&settings(&server.socket_path(), "console")).unwrap();
        assert_eq!((recovered.requeued, recovered.stuck), (4, 0));
        let told = recovered.events;
        assert_eq!(told.iter().filter(|event| is_warning_of(&key)(event)).count(), 1);
        assert_eq!(told.iter().filter(|event| is_recovered(event)).count(), 4);
        let () = server.connect().del(&key).unwrap();
        assert_at_rest(&server);
    }
}

#[test]
fn reenqueue_orphans_counts_what_is_stuck_once_however_often_it_looks() {
    let server = RedisServer::start();
    // One whose lease still runs, so that the console has to wait for longer than a hold.
    dying(&server, "late", "late", &[job("late")]);
    let mut connection = server.connect();
    let odd = dead(&server, "dead", "broken", &jobs(3));
    let () = connection.hset(keys().inflight(&odd), "no token", "x").unwrap();
    let () = connection.del("queue:broken").unwrap();
    let () = connection.set("queue:broken", "x").unwrap();
    let held = Arc::new(AtomicU64::new(0));
    let proxy = Proxy::start(server.socket_path(), {
        let (held, odd) = (held.clone(), odd.clone());
        move |request: &Request| {
            held.fetch_add(
                u64::from(lua::is_call(request, &lua::REAP) && request.contains(&odd)),
                SeqCst,
            );
            Action::pass()
        }
    });
    let recovered = recover_all(&settings(&proxy.socket_path(), "console")).unwrap();
    assert!(held.load(SeqCst) >= 2, "{held:?}");
    assert_eq!((recovered.requeued, recovered.stuck), (1, 4));
    let told = recovered.events;
    assert_eq!(recovered_jids(&told), ["late"]);
    assert_eq!(told.iter().filter(|event| is_warning_of(&odd)(event)).count(), 1);
    assert_eq!(told.len(), 2, "{told:?}");
}

#[test]
fn reenqueue_orphans_counts_right_when_connections_break() {
    for script in [&lua::REAP, &lua::PEEK, &lua::RECOVER] {
        let server = RedisServer::start();
        let (one, two) = (jobs_of("one", 450), jobs_of("two", 2));
        dead(&server, "one", "one", &one);
        dead(&server, "two", "two", &two);
        let (proxy, lost) = loses_every_other_reply(&server, script);
        let recovered = recover_all(&settings(&proxy.socket_path(), "console")).unwrap();
        assert!(lost.load(SeqCst) >= 2, "{lost:?}");
        assert_eq!((recovered.requeued, recovered.stuck), (452, 0));
        let told = recovered.events;
        assert_eq!((told.len(), recovered_jids(&told).len()), (452, 452));
        assert_eq!((queue(&server, "one"), queue(&server, "two")), (one, two));
        assert_eq!(journal(&server).len(), 452);
        assert_at_rest(&server);
    }
}

#[test]
fn reenqueue_orphans_bears_an_overwritten_hash_that_somebody_else_holds() {
    let server = RedisServer::start();
    let broken = dead(&server, "broken", "work", &jobs(1));
    overwrite(&server, &keys().inflight(&broken));
    // Held by a reaper at the call, and held anew by it while the console waits for somebody else.
    dying(&server, "late", "late", &[job("late")]);
    let clock: f64 = server.connect().hget(keys().clock(), "now").unwrap();
    let () = server
        .connect()
        .zadd(keys().instances(), &broken, clock + 100.0)
        .unwrap();
    let proxy = Proxy::start(server.socket_path(), {
        let (mut connection, mut listed) = (server.connect(), 0);
        let broken = broken.clone();
        move |request: &Request| {
            if request.command() == "ZRANGE" {
                listed += 1;
                if listed == 2 {
                    let () = connection.zincr(keys().instances(), &broken, 300).unwrap();
                }
            }
            Action::pass()
        }
    });
    let recovered = recover_all(&settings(&proxy.socket_path(), "console")).unwrap();
    assert_eq!(recovered.requeued, 1);
    assert_eq!(queue(&server, "late"), [job("late")]);
    let told = recovered.events;
    assert_eq!(told.iter().filter(|event| is_warning_of(&broken)(event)).count(), 1);
}

// --- requeues that are under way ---

/// A proxy whose turns are executed, but not heard of (in time), and which shuts out the control link, when told so.
struct Trouble {
    turns_heard: Arc<AtomicBool>,
    control_passes: Arc<AtomicBool>,
    proxy: Proxy,
}

struct TroublePlan {
    turns_heard: Arc<AtomicBool>,
    control_passes: Arc<AtomicBool>,
    unheard: Action,
    control: Option<u64>,
}

impl Plan for TroublePlan {
    fn connect(&mut self, _connection: u64) -> OnConnect {
        if self.control_passes.load(SeqCst) {
            OnConnect::Accept
        } else {
            OnConnect::Close
        }
    }

    fn request(&mut self, request: &Request) -> Action {
        if lua::is_call(request, &lua::REGISTER) {
            self.control = Some(request.connection);
        }
        if !self.control_passes.load(SeqCst) && self.control == Some(request.connection) {
            Action::drop_request()
        } else if !self.turns_heard.load(SeqCst) && lua::is_turn(request) {
            self.unheard
        } else {
            Action::pass()
        }
    }
}

impl Trouble {
    fn start(server: &RedisServer, unheard: Action) -> Self {
        let (turns_heard, control_passes) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(true)));
        let plan = TroublePlan {
            turns_heard: turns_heard.clone(),
            control_passes: control_passes.clone(),
            unheard,
            control: None,
        };
        Self {
            turns_heard,
            control_passes,
            proxy: Proxy::start(server.socket_path(), plan),
        }
    }

    /// An engine on it, and a job of it whose record is in Redis while its answer is not heard.
    fn with_sent_record(&self, server: &RedisServer) -> (Tracker, u64) {
        let tracker = Tracker::registered(settings(&self.proxy.socket_path(), "one"));
        // From now on the server knows the script, and so executes the first call.
        let first = tracker.record("work", &job("first"));
        tracker.engine().ack(first);
        eventually(SOON, "the first is acked", || in_flight(server).is_empty());
        self.turns_heard.store(false, SeqCst);
        let handle = tracker.track("work", &job("a"));
        eventually(SOON, "the record is written", || in_flight(server).len() == 1);
        (tracker, handle)
    }
}

/// Fails unless the requeue that is under `parker` is done, by Redis alone, when its caller hears of it.
#[track_caller]
fn assert_requeued_by_redis(server: &RedisServer, tracker: &Tracker, handle: u64, parker: &Parker) {
    assert_eq!(parker.wait(Some(Instant::now() + SOON)), Woken::Done);
    assert!(!tracker.engine().take_back(handle));
    assert_eq!(queue(server, "work"), [job("a")]);
    assert_eq!(in_flight(server), NOTHING);
}

#[test]
fn a_control_link_that_breaks_hands_nobody_a_job_that_is_in_redis() {
    let server = RedisServer::start();
    // The claims link bears this: its timeout is a second.
    let trouble = Trouble::start(&server, Action::delay_reply(Duration::from_millis(700)));
    let (tracker, handle) = trouble.with_sent_record(&server);
    let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
        panic!()
    };
    trouble.control_passes.store(false, SeqCst);
    tracker.wait_for("the outage is told", is_outage);
    trouble.turns_heard.store(true, SeqCst);
    assert_requeued_by_redis(&server, &tracker, handle, &parker);
    trouble.control_passes.store(true, SeqCst);
    eventually(SOON, "the outage is over", || {
        tracker.count(is_outage) == tracker.count(is_outage_over)
    });
    assert!(tracker.leave(SOON));
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert_eq!(queue(&server, "work"), [job("a")]);
    assert_at_rest(&server);
}

#[test]
fn beats_that_redis_refuses_keep_no_turn_from_it() {
    let server = RedisServer::start();
    let trouble = Trouble::start(&server, Action::stall_reply());
    let (tracker, handle) = trouble.with_sent_record(&server);
    let Requeueing::Under(parker) = tracker.engine().requeue(handle) else {
        panic!()
    };
    let identity = tracker.identity();
    overwrite(&server, &keys().instances());
    tracker.wait_for("the outage is told", is_outage);
    assert_eq!(parker.wait(Some(Instant::now() + STEP * 2)), Woken::TimedOut);
    trouble.turns_heard.store(true, SeqCst);
    assert_requeued_by_redis(&server, &tracker, handle, &parker);
    // Others are recorded and acked too, for as long as that key is what it is, and no turn waits for the next attempt
    // at a beat.
    let start = Instant::now();
    for i in 0..20 {
        let handle = tracker.track("work", &job(&format!("j{i}")));
        eventually(SOON, "it is recorded", || in_flight(&server).len() == 1);
        tracker.engine().ack(handle);
        eventually(SOON, "it is acked", || in_flight(&server).is_empty());
    }
    assert!(start.elapsed() < STEP / 5 * 40, "{:?}", start.elapsed());
    assert_eq!((tracker.count(is_outage), tracker.count(is_outage_over)), (1, 0));
    let () = server.connect().del(keys().instances()).unwrap();
    tracker.wait_for("the outage is over", is_outage_over);
    assert_eq!(tracker.identity(), identity);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("a")]);
    assert_at_rest(&server);
}

#[test]
fn a_requeue_that_is_abandoned_in_the_middle_puts_the_jobs_back() {
    let mut server = RedisServer::start();
    let trouble = Trouble::start(&server, Action::stall_reply());
    let (tracker, sent) = trouble.with_sent_record(&server);
    let waiting = tracker.track("work", &job("waiting"));
    let untouched = tracker.track("work", &job("untouched"));
    assert!(matches!(tracker.engine().requeue(sent), Requeueing::Under(_)));
    assert!(matches!(tracker.engine().requeue(waiting), Requeueing::Unrecorded));
    // One that waits, one that is on its way, one that nobody knows (any more).
    tracker.engine().abandon(&[waiting, sent, 4711]);
    tracker.engine().abandon(&[waiting]);
    // The caller is gone, and so is his claim.
    assert!(!tracker.engine().take_back(waiting));
    trouble.turns_heard.store(true, SeqCst);
    let back = |server: &RedisServer| queue(server, "work").into_iter().collect::<BTreeSet<_>>();
    eventually(SOON, "both are back", || {
        back(&server) == BTreeSet::from([job("a"), job("waiting")])
    });
    eventually(SOON, "the third runs on", || in_flight(&server) == [job("untouched")]);

    // One that was recorded long ago goes back whoever waits for it.
    let recorded = tracker.record("work", &job("recorded"));
    assert!(matches!(tracker.engine().requeue(recorded), Requeueing::Under(_)));
    tracker.engine().abandon(&[recorded]);
    eventually(SOON, "it is back", || queue(&server, "work").len() == 3);

    // With Redis away, they are put back when it is there again.
    server.pause();
    let away = tracker.track("work", &job("away"));
    tracker.wait_for("the outage is told", is_outage);
    let away_and_waiting = tracker.track("work", &job("away and waiting"));
    for handle in [away, away_and_waiting] {
        assert!(!matches!(tracker.engine().requeue(handle), Requeueing::Settled));
    }
    tracker.engine().abandon(&[away, away_and_waiting]);
    server.resume();
    eventually(SOON, "they are back", || queue(&server, "work").len() == 5);
    tracker.engine().ack(untouched);
    assert!(tracker.leave(SOON));
    assert_eq!((queue(&server, "work").len(), back(&server).len()), (5, 5));
    assert_eq!(tracker.count(is_lease_lost), 0);
    assert_at_rest(&server);
    server.stop();
}

#[test]
fn an_abandoned_requeue_waits_for_no_sweep_and_nothing_takes_it_away() {
    let server = RedisServer::start();
    // The connection bears this, so no sweep looks after it.
    let trouble = Trouble::start(&server, Action::delay_reply(Duration::from_millis(500)));
    let (tracker, handle) = trouble.with_sent_record(&server);
    assert!(matches!(tracker.engine().requeue(handle), Requeueing::Under(_)));
    tracker.engine().abandon(&[handle]);
    // The job's thread runs to its end all the same.
    tracker.engine().ack(handle);
    trouble.turns_heard.store(true, SeqCst);
    eventually(SOON, "it is back", || queue(&server, "work") == [job("a")]);
    assert_eq!(in_flight(&server), NOTHING);
    assert!(tracker.leave(SOON));
    assert_eq!(queue(&server, "work"), [job("a")]);
    assert_at_rest(&server);
}

// --- the last moment ---

#[test]
fn one_may_leave_right_after_the_start() {
    let server = RedisServer::start();
    for i in 0..30 {
        let tracker = Tracker::start(settings(&server.socket_path(), "brief"));
        if i % 3 == 1 {
            let _ = tracker.track("work", &job(&format!("j{i}")));
        }
        // Every third gets a little further.
        if i % 3 == 2 {
            eventually(SOON, "it is registered", || instances(&server).len() == 1);
        }
        assert!(tracker.leave(SOON), "{i}");
    }
    assert_eq!(queue(&server, "work").len(), 10);
    assert_eq!(journal(&server), []);
    assert_eq!(instances(&server), Vec::<String>::new());
    assert_at_rest(&server);
}

#[test]
fn one_may_leave_while_its_registration_is_under_way() {
    let server = RedisServer::start();
    for with_job in [false, true] {
        for delay_request in [false, true] {
            let proxy = Proxy::start(server.socket_path(), move |request: &Request| {
                let delay = STEP / 3;
                match lua::is_call(request, &lua::REGISTER) {
                    true if delay_request => Action::delay(delay),
                    true => Action::delay_reply(delay),
                    false => Action::pass(),
                }
            });
            let tracker = Tracker::start(settings(&proxy.socket_path(), "brief"));
            let delayed = |proxy: &Proxy| proxy.counts().of("delayed") + proxy.counts().of("delayed_reply");
            eventually(SOON, "it is under way", || delayed(&proxy) > 0);
            if with_job {
                let _ = tracker.track("work", &job("a"));
            }
            assert!(tracker.leave(SOON));
            let mut connection = server.connect();
            assert_eq!(queue(&server, "work").len(), usize::from(with_job));
            assert_eq!(instances(&server), Vec::<String>::new());
            let () = connection.del("queue:work").unwrap();
        }
    }
    assert_at_rest(&server);
}

// --- beats ---

#[test]
fn recovery_over_a_slow_link_makes_no_beat_late() {
    const LONG_STEP: Duration = Duration::from_millis(500);
    let server = RedisServer::start();
    dead(&server, "dead", "work", &jobs(2000));
    let beats: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let proxy = Proxy::start(server.socket_path(), {
        let beats = beats.clone();
        move |request: &Request| {
            let scripts = [&lua::REAP, &lua::PEEK, &lua::RECOVER];
            if lua::is_call(request, &lua::BEAT) {
                beats.lock().unwrap().push(Instant::now());
            } else if scripts.iter().any(|script| lua::is_call(request, script)) {
                // A beat is due after 0.8 to 1.0 steps; a call may take 0.6.
                return Action::delay_reply(LONG_STEP * 2 / 5);
            }
            Action::pass()
        }
    });
    let mut settings = settings(&proxy.socket_path(), "one");
    (settings.interval, settings.ttl) = (LONG_STEP, LONG_STEP * 5);
    let tracker = Tracker::registered(settings);
    eventually(SOON, "all is told", || tracker.count(is_recovered) == 2000);
    assert_eq!(queue(&server, "work"), jobs(2000));
    let beats = beats.lock().unwrap().clone();
    let gaps: Vec<f64> = beats
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() / LONG_STEP.as_secs_f64())
        .collect();
    assert!(gaps.len() >= 8, "{gaps:?}");
    // Until the first slow call nobody knows that they are slow; and the machine may be busy once.
    let late = gaps.iter().filter(|gap| **gap > 1.15).count();
    assert!(late <= 2, "{gaps:?}");
    assert_eq!((tracker.count(is_lease_lost), tracker.count(is_outage)), (0, 0));
    proxy.set_plan(relay);
    proxy.close_all(End::Close);
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}
