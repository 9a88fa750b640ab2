//! Servers that take each other's places: real sentinels, a real failover, and links that must not be of two minds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::crew::Plan;
use processing_tracker_core::engine::Engine;
use processing_tracker_core::events::Event;
use processing_tracker_core::link::Link;
use processing_tracker_core::sentinel::{Node, Sentinels};
use processing_tracker_core::settings::{Fetch, Settings};
use processing_tracker_core::target::{Address, Target};
use redis::Commands;
use support::redis_server::RedisServer;
use support::sentinel::{Pusher, Watched, MASTER};
use support::tracker::{is_lease_lost, is_outage, is_recovered, job, settings, Tracker, SOON};
use support::wait::eventually;

/// Engines that fetch jobs themselves, each with some threads, and which jobs these have done.
struct Fleet {
    trackers: Vec<Arc<Tracker>>,
    done: Arc<Mutex<Vec<String>>>,
    threads: Vec<thread::JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

impl Fleet {
    fn start(target: impl Fn() -> Target, count: usize) -> Self {
        let (done, over): (Arc<Mutex<Vec<String>>>, Arc<AtomicBool>) = Default::default();
        let mut fleet = Self {
            trackers: Vec::new(),
            done,
            threads: Vec::new(),
            over,
        };
        for number in 0..count {
            let settings = Settings {
                redis: target(),
                fetch: Fetch::Native,
                interval: Duration::from_millis(300),
                ttl: Duration::from_millis(1800),
                ..settings("/nowhere".as_ref(), &format!("fleet-{number}"))
            };
            let tracker = Arc::new(Tracker::registered(settings));
            let crew = tracker.engine().add_crew(Plan::new([b"work".to_vec()], true)).unwrap();
            for _ in 0..2 {
                let (tracker, done, over) = (tracker.clone(), fleet.done.clone(), fleet.over.clone());
                fleet.threads.push(thread::spawn(move || {
                    while !over.load(SeqCst) {
                        work(tracker.engine(), crew, &done);
                    }
                }));
            }
            fleet.trackers.push(tracker);
        }
        fleet
    }

    fn done(&self) -> Vec<String> {
        self.done.lock().unwrap().clone()
    }

    fn count(&self, kind: impl Fn(&Event) -> bool + Copy) -> usize {
        self.trackers.iter().map(|tracker| tracker.count(kind)).sum()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(engine: &Engine, crew: usize, done: &Mutex<Vec<String>>) {
    if let Some(taken) = engine.take(crew) {
        let payload = String::from_utf8(taken.payload.to_vec()).unwrap();
        let jid = payload.split("\"jid\":\"").nth(1).unwrap().split('"').next().unwrap();
        done.lock().unwrap().push(jid.to_owned());
        engine.ack(taken.handle);
    } else if let Some(parker) = engine.wait_for_work(crew) {
        parker.wait(Some(Instant::now() + Duration::from_millis(200)));
        engine.stop_waiting(crew, &parker);
    }
}

#[test]
fn a_failover_under_load_costs_no_lease_and_no_job_that_the_replica_has() {
    failover(RedisServer::crash, RedisServer::start_again);
}

#[test]
fn nor_does_one_from_a_master_that_stands_still_for_a_while() {
    failover(|server| server.pause(), |server| server.resume());
}

fn failover(end: impl Fn(&mut RedisServer), begin: impl Fn(&mut RedisServer)) {
    let mut watched = Watched::start(None, None);
    let fleet = Fleet::start(|| watched.target(None, None), 3);
    let over = Arc::new(AtomicBool::new(false));

    // Pushes to whoever is the master, and notes what was taken.
    let urls = watched.servers.each_ref().map(|server| server.tcp_url());
    let pusher = thread::spawn({
        let over = over.clone();
        move || {
            let mut pusher = Pusher::default();
            while !over.load(SeqCst) {
                pusher.push(&urls, "work");
            }
            pusher.disconnect();
            pusher
        }
    });

    eventually(SOON, "jobs run", || fleet.done().len() > 300);
    let old = watched.servers[0].port().unwrap();
    let before = fleet.done().len();
    end(&mut watched.servers[0]);
    let new = watched.wait_for_failover(old).port();
    eventually(SOON, "jobs run from the new master", || {
        fleet.done().len() > before + 300
    });

    // What pushes has left it, too: it would else go on there for as long as it is still a master.
    let master = watched.servers.iter().find(|server| server.port() == new).unwrap();
    redis::cmd("CONFIG")
        .arg("RESETSTAT")
        .exec(&mut master.connect())
        .unwrap();
    eventually(SOON, "jobs are pushed to the new master", || {
        master.calls_of("lpush") > 0
    });

    // The old master comes back, as a master for a moment, then as a replica: nobody of ours goes to it.
    begin(&mut watched.servers[0]);
    eventually(SOON * 4, "the old master is a replica", || {
        let info: String = redis::cmd("INFO")
            .arg("replication")
            .query(&mut watched.servers[0].connect())
            .unwrap_or_default();
        info.contains("role:slave") && info.contains("master_link_status:up")
    });
    let after = fleet.done().len();
    eventually(SOON, "jobs run on", || fleet.done().len() > after + 100);
    over.store(true, SeqCst);
    let pushed = pusher.join().unwrap();

    // What was taken and is not done: nothing but what the old master alone had.
    let lost = || -> BTreeSet<String> {
        let done: BTreeSet<String> = fleet.done().into_iter().collect();
        pushed.taken.difference(&done).cloned().collect()
    };
    eventually(SOON, "all jobs are done that replication has not lost", || {
        lost().is_subset(&pushed.at_risk)
    });
    let server = watched.servers.iter().find(|server| server.port() == new).unwrap();
    eventually(SOON, "nothing is in flight", || {
        let length: u64 = server.connect().llen("queue:work").unwrap();
        length == 0 && support::tracker::in_flight(server).is_empty()
    });
    let mut runs: BTreeMap<String, usize> = BTreeMap::new();
    for jid in fleet.done() {
        *runs.entry(jid).or_default() += 1;
    }
    let twice = runs.values().filter(|runs| **runs > 1).count();
    println!(
        "{} jobs taken, {} run, {twice} of them twice; {} at risk in the old master, {} of them lost; outages told: {}",
        pushed.taken.len(),
        runs.len(),
        pushed.at_risk.len(),
        lost().len(),
        fleet.count(is_outage)
    );
    // What was in the old master alone may run again: jobs taken, and acks, of its last moments.
    assert!(twice < runs.len() / 4, "{twice} of {} ran twice", runs.len());
    // Else that would allow too much.
    let at_risk = pushed.at_risk.len();
    assert!(at_risk < pushed.taken.len() / 4, "{at_risk} of {}", pushed.taken.len());
    assert_eq!(fleet.count(is_lease_lost), 0);
    assert_eq!(fleet.count(is_recovered), 0);
    assert!(!watched.servers[0].log().contains("evalsha"));
    let strangers: String = redis::cmd("CLIENT")
        .arg("LIST")
        .query(&mut watched.servers[0].connect())
        .unwrap();
    assert!(!strangers.contains("cmd=evalsha"), "{strangers}");

    // An instance that dies now is recovered by the others, there.
    let mut fleet = fleet;
    let dead = Tracker::registered(Settings {
        redis: watched.target(None, None),
        interval: Duration::from_millis(300),
        ttl: Duration::from_millis(1800),
        ..settings("/nowhere".as_ref(), "dead")
    });
    dead.record("rest", &job("orphan"));
    dead.stop();
    eventually(SOON, "the orphan is back", || fleet.count(is_recovered) == 1);
    assert_eq!(support::tracker::queue(server, "rest"), [job("orphan")]);
    for tracker in fleet.trackers.drain(..) {
        assert!(tracker.leave(SOON));
    }
}

#[test]
fn sentinels_have_passwords_of_their_own_and_need_not_all_answer() {
    let mut watched = Watched::start(Some("of-the-servers"), Some("of-the-sentinels"));
    let read = |target: &Target| Link::new(target.clone(), Duration::from_secs(3)).read("key");
    let target = watched.target(Some("of-the-servers"), Some("of-the-sentinels"));
    assert_eq!(read(&target), Ok(None));

    let error = read(&watched.target(Some("of-the-servers"), Some("wrong")))
        .unwrap_err()
        .to_string();
    assert!(error.contains("no Sentinel leads to the master"), "{error}");
    assert_eq!(error.matches("refused the username or password").count(), 3, "{error}");
    let error = read(&watched.target(Some("wrong"), Some("of-the-sentinels")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("refused the username or password") && !error.contains("no Sentinel leads"),
        "{error}"
    );
    let text = format!("{target} {target:?}");
    assert!(!text.contains("of-the-se"), "{text}");

    // One is gone, one says nothing: the third is asked in time.
    watched.sentinels[0].crash();
    watched.sentinels[1].pause();
    assert_eq!(
        read(&watched.target(Some("of-the-servers"), Some("of-the-sentinels"))),
        Ok(None)
    );
    watched.sentinels[1].resume();

    // Only one was named, and it is gone. The others are known from it.
    let mut one = Target::new(Address::Sentinel(Arc::new(Sentinels::new(
        MASTER.into(),
        vec![Node {
            host: "127.0.0.1".into(),
            port: watched.sentinels[1].port().unwrap(),
            username: None,
            password: "of-the-sentinels".into(),
            tls: None,
        }],
    ))));
    one.password = "of-the-servers".into();
    assert_eq!(read(&one), Ok(None));
    watched.sentinels[1].crash();
    eventually(SOON, "another one is asked", || read(&one) == Ok(None));

    watched.sentinels[2].crash();
    let error = read(&one).unwrap_err().to_string();
    assert!(error.contains("no Sentinel leads to the master"), "{error}");
    for sentinel in &watched.sentinels[1..] {
        assert!(
            error.contains(&format!("127.0.0.1:{}", sentinel.port().unwrap())),
            "{error}"
        );
    }
}

#[test]
fn what_is_no_sentinel_or_no_master_is_named() {
    let server = support::redis_server::Options::default().tcp().start();
    let node = Node {
        host: "127.0.0.1".into(),
        port: server.port().unwrap(),
        username: None,
        password: Default::default(),
        tls: None,
    };
    let target = Target::new(Address::Sentinel(Arc::new(Sentinels::new("main".into(), vec![node]))));
    let error = Link::new(target, SOON).read("key").unwrap_err().to_string();
    assert!(
        error.contains("unknown command") && error.contains("SENTINEL"),
        "{error}"
    );
    let watched = Watched::start(None, None);
    let mut other = watched.target(None, None);
    if let Address::Sentinel(sentinels) = &mut other.address {
        let node = Node {
            host: "127.0.0.1".into(),
            port: watched.sentinels[0].port().unwrap(),
            username: None,
            password: Default::default(),
            tls: None,
        };
        *sentinels = Arc::new(Sentinels::new("other".into(), vec![node]));
    }
    let error = Link::new(other, SOON).read("key").unwrap_err().to_string();
    assert!(error.contains("knows no master by the name \"other\""), "{error}");
    let direct = Target::new(Address::Tcp("127.0.0.1".into(), watched.sentinels[0].port().unwrap()));
    let error = Link::new(direct, SOON).read("key").unwrap_err().to_string();
    assert!(error.contains("this is a Sentinel"), "{error}");
}

#[test]
fn links_of_one_target_talk_to_one_server() {
    let (one, two) = (RedisServer::start(), RedisServer::start());
    let _: () = one.connect().set("name", "one").unwrap();
    let _: () = two.connect().set("name", "two").unwrap();
    // A name that leads elsewhere later.
    let place = one.dir().join("name");
    std::os::unix::fs::symlink(one.socket_path(), &place).unwrap();
    let target = Target::new(Address::Unix(place.clone()));
    let (mut first, mut second) = (Link::new(target.clone(), SOON), Link::new(target.clone(), SOON));
    let mut stranger = Link::new(Target::new(Address::Unix(place.clone())), SOON);
    for link in [&mut first, &mut second, &mut stranger] {
        assert_eq!(link.read("name").unwrap().as_deref(), Some("one"));
    }
    std::fs::remove_file(&place).unwrap();
    std::os::unix::fs::symlink(two.socket_path(), &place).unwrap();
    assert_eq!(first.read("name").unwrap().as_deref(), Some("one"));
    second.discard();
    assert_eq!(second.read("name").unwrap().as_deref(), Some("two"));
    assert_eq!(first.read("name").unwrap().as_deref(), Some("two"));
    assert_eq!((first.generation(), second.generation()), (2, 2));
    assert_eq!(stranger.read("name").unwrap().as_deref(), Some("one"));
}
