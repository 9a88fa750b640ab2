//! A death that is certain is not waited for, and nothing else is taken for one. The lease is a minute here: what comes back
//! within the time of a test has not waited for its end.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use processing_tracker_core::events::Event;
use processing_tracker_core::host::{Process, PROC};
use processing_tracker_core::settings::Settings;
use redis::Commands;
use support::lua;
use support::process::{Instance, Options};
use support::proxy::{relay, Action, Proxy, Request};
use support::redis_server::{Options as ServerOptions, RedisServer};
use support::tracker::{
    assert_at_rest, in_flight, instances, is_found_dead, is_lease_lost, is_recovered, job, keys, queue, settings,
    Tracker, SOON, STEP,
};
use support::wait::eventually;

const LEASE: Duration = Duration::from_secs(60);
/// For what must not happen: so many beats, each with its look around.
const A_WHILE: Duration = Duration::from_millis(1500);

/// Settings of one that looks around.
fn watchful(server: &RedisServer, instance_id: &str) -> Settings {
    Settings {
        ttl: LEASE,
        proc: Some(PROC.into()),
        ..settings(&server.socket_path(), instance_id)
    }
}

/// The same in a process of its own.
fn child(server: &RedisServer, instance_id: &str) -> Options {
    Options::new(&server.socket_path())
        .set("instance_id", instance_id)
        .set("ttl_ms", LEASE.as_millis())
        .set("proc", PROC)
}

/// A test that cannot be run here. With `TRACKER_ALL_TESTS` that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("TRACKER_ALL_TESTS").is_none(), "cannot run: {why}");
    eprintln!("skipped: {why}");
}

/// Whether this may be done here: root in a container may lack the rights.
fn may(command: &[&str]) -> bool {
    let status = Command::new(command[0])
        .args(&command[1..])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let may = status.is_ok_and(|status| status.success());
    if !may {
        skip(&format!("it needs root and the right to {command:?}"));
    }
    may
}

/// The pid of an instance, as it sees it itself.
fn pid_of(identity: &str) -> i32 {
    identity.rsplit(':').nth(1).unwrap().parse().unwrap()
}

/// What an index says of an instance.
fn entry(server: &RedisServer, index: &str, identity: &str) -> Option<String> {
    server.connect().hget(index, identity).unwrap()
}

fn host_index() -> String {
    keys().host(&Process::this(PROC.as_ref()).unwrap().place)
}

/// The only job there is has come back, since the death of its instance was found, and nothing remains.
#[track_caller]
fn assert_found(server: &RedisServer, finder: &Tracker, expected: &[u8]) {
    eventually(SOON, "the job is back", || queue(server, "work") == [expected]);
    eventually(SOON, "it is told", || {
        finder.count(is_found_dead) == 1 && finder.count(is_recovered) == 1
    });
    eventually(SOON, "the dead is gone", || {
        instances(server) == [finder.identity()] && in_flight(server).is_empty()
    });
    assert_eq!(finder.count(is_lease_lost), 0);
    assert!(finder.leave(SOON));
    assert_at_rest(server);
}

#[track_caller]
fn assert_untouched(server: &RedisServer, watcher: &Tracker, identity: &str) {
    // Time that has to pass: it is what this is about.
    thread::sleep(A_WHILE);
    assert_eq!(watcher.count(is_found_dead), 0, "{:?}", watcher.told());
    assert_eq!(watcher.count(is_recovered), 0);
    assert!(instances(server).contains(&identity.to_owned()));
}

#[test]
fn a_neighbour_finds_the_death_of_another() {
    let server = RedisServer::start();
    let survivor = Tracker::registered(watchful(&server, "survivor"));
    let mut killed = child(&server, "killed").registered();
    killed.record("work", &job("held"));
    eventually(SOON, "both are known on this host", || {
        server.connect().hlen::<_, u64>(host_index()).unwrap() == 2
    });
    let info: Vec<Option<String>> = redis::cmd("HMGET")
        .arg(keys().info(&killed.identity()))
        .arg(&["boot_id", "pid_namespace", "process"])
        .query(&mut server.connect())
        .unwrap();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(info[0].as_deref(), Some(boot_id.trim()));
    assert_eq!(info[1].as_deref(), namespace.to_str());
    let pid = pid_of(&killed.identity());
    assert!(info[2].as_deref().unwrap().starts_with(&format!("{pid} ")));
    killed.kill();
    assert_found(&server, &survivor, &job("held"));
}

#[test]
fn the_next_process_finds_it_at_its_start() {
    let server = RedisServer::start();
    let mut killed = child(&server, "web").registered();
    killed.record("work", &job("held"));
    killed.kill();
    let next = Tracker::registered(watchful(&server, "web"));
    assert_found(&server, &next, &job("held"));
}

#[test]
fn a_zombie_that_nobody_has_waited_for_is_dead() {
    let server = RedisServer::start();
    let mut killed = child(&server, "killed").registered();
    killed.record("work", &job("held"));
    kill(Pid::from_raw(pid_of(&killed.identity())), Signal::SIGKILL).unwrap();
    let next = Tracker::registered(watchful(&server, "next"));
    assert_found(&server, &next, &job("held"));
    assert!(killed.is_killed());
}

#[test]
fn a_process_that_stands_is_not_dead() {
    let server = RedisServer::start();
    let survivor = Tracker::registered(watchful(&server, "survivor"));
    let mut paused = child(&server, "paused").registered();
    let handle = paused.record("work", &job("held"));
    let identity = paused.identity();
    paused.pause();
    assert_untouched(&server, &survivor, &identity);
    paused.resume();
    paused.ack(handle);
    assert!(paused.leave(SOON));
    assert_eq!(paused.told("LeaseLost"), 0);
    assert_eq!(entry(&server, &host_index(), &identity), None);
    assert!(survivor.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_pid_that_is_another_process_now_is_no_life() {
    if !may(&["sh", "-c", "echo 1000 > /proc/sys/kernel/ns_last_pid"]) {
        return;
    }
    let server = RedisServer::start();
    let mut killed = child(&server, "killed").registered();
    killed.record("work", &job("held"));
    let pid = pid_of(&killed.identity());
    killed.kill();
    let mut another = None;
    // Others start processes too.
    eventually(SOON, "another process has its pid", || {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut process = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if process.id() as i32 == pid {
            another = Some(process);
            return true;
        }
        process.kill().unwrap();
        process.wait().unwrap();
        false
    });
    let mut another = another.unwrap();
    let next = Tracker::registered(watchful(&server, "next"));
    assert_found(&server, &next, &job("held"));
    another.kill().unwrap();
    another.wait().unwrap();
}

/// The same, without the rights that it takes.
#[test]
fn a_start_time_that_is_another_is_another_process() {
    let server = RedisServer::start();
    let mut living = Command::new("sleep")
        .arg("60")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut killed = child(&server, "killed").registered();
    killed.record("work", &job("held"));
    let identity = killed.identity();
    let entry = entry(&server, &host_index(), &identity).unwrap();
    let mut parts: Vec<&str> = entry.split(' ').collect();
    let pid = living.id().to_string();
    (parts[1], parts[2]) = (&pid, "1");
    let () = server.connect().hset(host_index(), &identity, parts.join(" ")).unwrap();
    killed.kill();
    let next = Tracker::registered(watchful(&server, "next"));
    assert_found(&server, &next, &job("held"));
    living.kill().unwrap();
    living.wait().unwrap();
}

#[test]
fn one_that_was_fenced_though_it_lives_loses_its_lease_and_no_more() {
    let server = RedisServer::start();
    let mut wronged = child(&server, "wronged").registered();
    let handle = wronged.record("work", &job("held"));
    let identity = wronged.identity();
    // Somebody writes into Redis that it was started at another time.
    let told = entry(&server, &host_index(), &identity).unwrap();
    let mut parts: Vec<&str> = told.split(' ').collect();
    parts[2] = "1";
    let () = server.connect().hset(host_index(), &identity, parts.join(" ")).unwrap();
    let watcher = Tracker::registered(watchful(&server, "watcher"));
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    eventually(SOON, "it says so", || watcher.count(is_found_dead) == 1);

    eventually(SOON, "it says so", || wronged.told("LeaseLost") == 1);
    let lost = wronged
        .events()
        .into_iter()
        .find(|event| event.starts_with("LeaseLost"))
        .unwrap();
    assert!(lost.contains("\"held\"") && lost.contains(&identity), "{lost}");
    // It goes on.
    wronged.ack(handle);
    let handle = wronged.record("work", &job("another"));
    assert_ne!(wronged.identity(), identity);
    // Whatever made the first proof wrong may make the next one wrong too: there is none to make.
    assert_eq!(entry(&server, &host_index(), &wronged.identity()), None);
    thread::sleep(A_WHILE);
    wronged.ack(handle);
    assert!(wronged.leave(SOON));
    assert_eq!((wronged.told("LeaseLost"), watcher.count(is_recovered)), (1, 1));
    assert_eq!(queue(&server, "work"), [job("held")]);
    assert!(watcher.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn two_that_live_under_one_label_leave_each_other_alone() {
    let server = RedisServer::start();
    let mut first = child(&server, "web").registered();
    first.record("work", &job("held"));
    let identity = first.identity();
    let second = Tracker::registered(watchful(&server, "web"));
    assert_untouched(&server, &second, &identity);
    assert_eq!(first.told("LeaseLost"), 0);
    first.kill();
    assert_found(&server, &second, &job("held"));
}

/// One whose label is promised to be its own. Nobody knows of processes here, as on macOS.
fn alone(server: &RedisServer) -> Options {
    Options::new(&server.socket_path())
        .set("instance_id", "shop-0")
        .set("ttl_ms", LEASE.as_millis())
        .set("exclusive", true)
}

fn alone_too(server: &RedisServer) -> Settings {
    Settings {
        ttl: LEASE,
        exclusive: true,
        ..settings(&server.socket_path(), "shop-0")
    }
}

#[test]
fn an_exclusive_label_is_taken_over_at_the_start() {
    let server = RedisServer::start();
    let mut killed = alone(&server).registered();
    killed.record("work", &job("held"));
    killed.kill();
    let mut other = Options::new(&server.socket_path())
        .set("instance_id", "shop-1")
        .set("ttl_ms", LEASE.as_millis())
        .set("exclusive", true)
        .registered();
    let next = Tracker::registered(alone_too(&server));
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    eventually(SOON, "it says so", || next.count(is_found_dead) == 1);
    let identity = other.identity();
    assert_untouched_by_label(&server, &other, &identity);
    assert!(other.leave(SOON));
    assert!(next.leave(SOON));
    assert_at_rest(&server);
}

#[track_caller]
fn assert_untouched_by_label(server: &RedisServer, instance: &Instance, identity: &str) {
    thread::sleep(A_WHILE);
    assert_eq!(instance.told("LeaseLost"), 0);
    assert!(instances(server).contains(&identity.to_owned()));
}

#[test]
fn who_breaks_the_promise_of_an_exclusive_label_loses_one_lease() {
    let server = RedisServer::start();
    let mut first = alone(&server).registered();
    first.record("work", &job("held"));
    let mut second = alone(&server).registered();
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    eventually(SOON, "the first says so", || first.told("LeaseLost") == 1);
    // It takes nothing over in its turn: it is not new.
    let identities = [first.identity(), second.identity()];
    assert_untouched_by_label(&server, &second, &identities[1]);
    assert_eq!((first.told("LeaseLost"), first.told("Note")), (1, 0));
    assert!(instances(&server).contains(&identities[0]));
    assert!(first.leave(SOON) && second.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn an_exclusive_label_whose_holder_is_seen_to_live_is_not_taken_over() {
    let server = RedisServer::start();
    let mut first = child(&server, "shop-0").set("exclusive", true).registered();
    first.record("work", &job("held"));
    let identity = first.identity();
    let second = Tracker::registered(Settings {
        exclusive: true,
        ..watchful(&server, "shop-0")
    });
    second.wait_for("it says so", |event| {
        matches!(event, Event::Warning(text) if text.contains("exclusive_instance_id") && text.contains(&identity))
    });
    assert_untouched(&server, &second, &identity);
    first.kill();
    assert_found(&server, &second, &job("held"));
}

/// Its registration was done, though the answer was lost, and another was made: that is nobody else.
#[test]
fn an_exclusive_label_is_not_taken_from_oneself() {
    let server = RedisServer::start();
    let mut registrations = 0;
    // A script that Redis does not know yet is sent twice: by its hash, and whole.
    let proxy = Proxy::start(server.socket_path(), move |request: &Request| {
        registrations += usize::from(lua::is_call(request, &lua::REGISTER));
        if registrations == 2 && lua::is_call(request, &lua::REGISTER) {
            return Action::drop_reply();
        }
        relay(request)
    });
    let tracker = Tracker::registered(Settings {
        exclusive: true,
        ..Settings {
            redis: support::tracker::target(&proxy.socket_path()),
            ..watchful(&server, "shop-0")
        }
    });
    assert_eq!(proxy.counts().faults(), 1);
    eventually(SOON, "both stand in the index of the label", || {
        server.connect().hlen::<_, u64>(keys().label("shop-0")).unwrap() == 2
    });
    thread::sleep(A_WHILE);
    let warned = |event: &Event| matches!(event, Event::Warning(text) if text.contains("exclusive_instance_id"));
    assert_eq!(tracker.count(warned), 0, "{:?}", tracker.told());
    assert_eq!(tracker.count(is_found_dead), 0);
    assert!(tracker.leave(SOON));
}

/// However many there are of it, a new process knows since when it is there itself.
#[test]
fn an_exclusive_label_that_has_many_entries_is_taken_over_too() {
    let server = RedisServer::start();
    let index = keys().label("shop-0");
    let mut connection = server.connect();
    for i in 0..1000 {
        let () = connection.hset(&index, format!("gone{i}"), "1").unwrap();
    }
    let next = Tracker::registered(alone_too(&server));
    eventually(SOON, "those it has looked at are gone", || {
        connection.hlen::<_, usize>(&index).unwrap() <= 1001 - 63
    });
    assert!(next.leave(SOON));
}

/// Starts it as the first process of a pid namespace of its own.
const OWN_PIDS: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];

#[test]
fn of_another_pid_namespace_only_the_lease_tells() {
    if !may(&["unshare", "--pid", "--fork", "--mount-proc", "true"]) {
        return;
    }
    let server = RedisServer::start();
    // Short, since it is to run out.
    let ttl = Duration::from_secs(3);
    let mut contained = child(&server, "contained")
        .set("ttl_ms", ttl.as_millis())
        .within(&OWN_PIDS)
        .registered();
    contained.record("work", &job("held"));
    let identity = contained.identity();
    assert_eq!(pid_of(&identity), 1);
    // Each has the other's pid for somebody else's, or nobody's.
    let outside = Tracker::registered(Settings {
        ttl,
        ..watchful(&server, "outside")
    });
    assert_untouched(&server, &outside, &identity);
    assert_eq!(contained.told("LeaseLost") + contained.told("Note"), 0);
    contained.kill();
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    assert_eq!(outside.count(is_found_dead), 0);
    assert!(outside.leave(SOON));
    // The index of a host that is no more goes by itself.
    let mut connection = server.connect();
    let indexes: Vec<String> = connection.keys(keys().host("*")).unwrap();
    assert_eq!(indexes, Vec::<String>::new());
    assert_at_rest(&server);
}

#[test]
fn in_a_pid_namespace_that_is_shared_a_death_is_seen() {
    if !may(&["unshare", "--mount", "true"]) {
        return;
    }
    let server = RedisServer::start();
    let mut contained = child(&server, "contained")
        .within(&["unshare", "--mount", "--ipc", "--net"])
        .registered();
    contained.record("work", &job("held"));
    let outside = Tracker::registered(watchful(&server, "outside"));
    assert_untouched(&server, &outside, &contained.identity());
    contained.kill();
    assert_found(&server, &outside, &job("held"));
}

/// A container whose `/proc` is its host's: what that says of a pid is said of another process.
#[test]
fn a_proc_of_another_namespace_is_of_no_use() {
    if !may(&["unshare", "--pid", "--fork", "true"]) {
        return;
    }
    let server = RedisServer::start();
    let mut contained = child(&server, "contained")
        .within(&["unshare", "--pid", "--fork", "--kill-child"])
        .registered();
    let identity = contained.identity();
    let told: Option<String> = server.connect().hget(keys().info(&identity), "host").unwrap();
    assert_eq!(told, None);
    let outside = Tracker::registered(watchful(&server, "outside"));
    assert_untouched(&server, &outside, &identity);
    assert!(contained.leave(SOON));
    assert!(outside.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn what_hidepid_hides_is_not_dead() {
    let hide =
        "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534 --clear-groups --pdeathsig KILL \"$@\"";
    let hidden = ["unshare", "--mount", "sh", "-c", hide, "sh"];
    if !may(&[&hidden[..], &["sh", "-c", "! test -e /proc/1"]].concat()) {
        return;
    }
    let server = ServerOptions::default().config("unixsocketperm", "777").start();
    std::fs::set_permissions(server.dir(), std::fs::Permissions::from_mode(0o755)).unwrap();
    // The instances of two users. One of them sees the other's pid nowhere.
    let watcher = child(&server, "watcher").within(&hidden).registered();
    let mut killed = child(&server, "killed").registered();
    killed.record("work", &job("held"));
    let identity = killed.identity();
    assert!(entry(&server, &host_index(), &identity).is_some());
    thread::sleep(A_WHILE);
    assert_eq!((watcher.told("Note"), killed.told("LeaseLost")), (0, 0));
    // But that there is none any more, the kernel tells everybody.
    killed.kill();
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    eventually(SOON, "it says so", || watcher.told("Note") == 1);
}

#[test]
fn no_clock_that_is_set_makes_a_process_another_one() {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .map(|arch| format!("/usr/lib/{arch}/faketime/libfaketime.so.1"))
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    let Some(library) = library else {
        skip("it needs the package faketime");
        return;
    };
    let server = ServerOptions::default().fake_clock().start();
    let mut behind = child(&server, "behind")
        .env("LD_PRELOAD", &library)
        .env("FAKETIME", "-2h")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .registered();
    behind.record("work", &job("held"));
    let watcher = Tracker::registered(watchful(&server, "watcher"));
    for seconds in [-3600, 3600, 0] {
        server.set_clock(seconds);
        assert_untouched(&server, &watcher, &behind.identity());
    }
    assert_eq!(behind.told("LeaseLost"), 0);
    server.set_clock(-7200);
    behind.kill();
    assert_found(&server, &watcher, &job("held"));
}

#[test]
fn an_index_that_somebody_overwrites_costs_the_look_and_nothing_else() {
    let server = RedisServer::start();
    let ttl = Duration::from_secs(2);
    let mut connection = server.connect();
    let () = connection.set(host_index(), "no hash").unwrap();
    let mut killed = child(&server, "killed").set("ttl_ms", ttl.as_millis()).registered();
    killed.record("work", &job("held"));
    let survivor = Tracker::registered(Settings {
        ttl,
        ..watchful(&server, "survivor")
    });
    thread::sleep(STEP * 3);
    killed.kill();
    eventually(SOON, "the job is back", || queue(&server, "work") == [job("held")]);
    assert_eq!(survivor.count(is_found_dead), 0);
    let () = connection.del(host_index()).unwrap();
    eventually(SOON, "it is in the index again", || {
        entry(&server, &host_index(), &survivor.identity()).is_some()
    });
    assert!(survivor.leave(SOON));
    assert_at_rest(&server);
}

/// An instance that was recovered by one who knew nothing of its index.
#[test]
fn an_entry_without_an_instance_is_removed_by_who_sees_it() {
    let server = RedisServer::start();
    let mut ended = Command::new("true").spawn().unwrap();
    let place = Process::this(PROC.as_ref()).unwrap().place;
    let value = format!("1 {} 1 {place}", ended.id());
    ended.wait().unwrap();
    let () = server.connect().hset(host_index(), "nobody", value).unwrap();
    let watcher = Tracker::registered(watchful(&server, "watcher"));
    eventually(SOON, "it is gone", || entry(&server, &host_index(), "nobody").is_none());
    let ttl: i64 = server.connect().ttl(host_index()).unwrap();
    assert!(ttl > 0);
    assert!(watcher.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_crowd_on_one_host_is_looked_at_in_part_only() {
    let server = RedisServer::start();
    let place = Process::this(PROC.as_ref()).unwrap().place;
    let mut connection = server.connect();
    for i in 0..1000 {
        let entry = format!("1 {} 1 another-{place}", 100_000 + i);
        let () = connection.hset(host_index(), format!("n{i}"), entry).unwrap();
    }
    let watcher = Tracker::registered(watchful(&server, "watcher"));
    let mut link = support::tracker::link(&server);
    let enlisted =
        processing_tracker_core::scripts::enlist(&mut link, &keys(), &watcher.identity(), &[host_index()], SOON, 64)
            .unwrap();
    let processing_tracker_core::scripts::Fenced::Alive(lists) = enlisted else {
        panic!("it has its lease")
    };
    // On a busy machine a registration may get no answer in time, and another is made.
    assert!(lists[0].0 >= Some(1001));
    // And its own.
    let own = |(identity, _): &&(Vec<u8>, Vec<u8>)| *identity == watcher.identity().as_bytes();
    let count = lists[0].1.iter().filter(own).count();
    assert_eq!(count, 1);
    assert!((64..=65).contains(&lists[0].1.len()));
}
