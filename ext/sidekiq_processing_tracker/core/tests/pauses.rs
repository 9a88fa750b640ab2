//! What Redis and the way to it do to a process that claims its jobs: it waits, goes on by itself, and every job is done
//! exactly once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::settings::Settings;
use processing_tracker_core::target::Address;
use redis::Commands;
use support::lua;
use support::proxy::{Action, At, End as Cut, Proxy, Request};
use support::redis_server::{Options, RedisServer};
use support::rng::{seed, Rng};
use support::tracker::{
    assert_at_rest, in_flight, is_lease_lost, is_outage, is_outage_over, native, queue, settings, stat, Tracker, SOON,
};
use support::wait::eventually;
use support::workers::{strict, weighted, Book, Crew, End, Perform, Workers};

const QUEUES: [&str; 3] = ["a", "b", "c"];
/// Jobs in a round.
const JOBS: usize = 400;

fn crews() -> Vec<Crew> {
    vec![strict(&["a", "b"], 3), weighted(&["b", "c", "c"], 3)]
}

/// No lease is to end here, however busy the machine is.
fn patient(mut settings: Settings) -> Settings {
    (settings.interval, settings.ttl) = (Duration::from_millis(500), Duration::from_secs(10));
    native(settings)
}

/// Two processes, their jobs, and the way by which jobs are enqueued.
struct Rig {
    book: Arc<Book>,
    workers: Vec<Workers>,
    socket: PathBuf,
    enqueued: usize,
    seed: u64,
}

impl Rig {
    fn start(server: &RedisServer) -> Self {
        Self::at(&server.socket_path(), Address::Unix(server.socket_path()))
    }

    /// Processes that reach Redis there, and jobs that are enqueued at this socket.
    fn at(socket: &Path, address: Address) -> Self {
        let (book, seed) = (Arc::<Book>::default(), seed());
        eprintln!("FAULT_SEED={seed}");
        let perform: Arc<Perform> = Arc::new(|rng: &mut Rng| (rng.up_to(Duration::from_millis(4)), End::Acked));
        let workers = (0..2)
            .map(|process| {
                let mut settings = patient(settings(socket, &format!("p{process}")));
                settings.redis.address = address.clone();
                Workers::start(Tracker::registered(settings), &crews(), &book, process, seed, &perform)
            })
            .collect();
        Self {
            book,
            workers,
            socket: socket.to_owned(),
            enqueued: 0,
            seed,
        }
    }

    fn enqueue(&mut self) {
        let client = redis::Client::open(format!("redis+unix://{}", self.socket.display())).unwrap();
        let mut connection = client.get_connection().unwrap();
        for _ in 0..JOBS {
            self.enqueued += 1;
            let name = QUEUES[self.enqueued % QUEUES.len()];
            let payload = self.book.enqueue(&format!("j{}", self.enqueued), name);
            let () = connection.lpush(format!("queue:{name}"), payload).unwrap();
        }
    }

    /// How many were done of those enqueued.
    fn done(&self) -> usize {
        self.book.tally().1
    }

    /// More jobs, and all of them in the middle of it.
    fn in_the_middle(&mut self) {
        let before = self.done();
        self.enqueue();
        eventually(SOON, "some are done", || self.done() > before + 20);
        assert!(self.done() < self.enqueued, "the trouble comes too late");
    }

    #[track_caller]
    fn goes_on(&self) {
        eventually(SOON * 2, "all are done", || self.book.is_done());
    }

    fn outages(&self) -> usize {
        self.workers
            .iter()
            .map(|workers| workers.tracker().count(is_outage))
            .sum()
    }

    /// Fails unless everybody leaves, and every job was done once and is gone.
    #[track_caller]
    fn ends_well(self, server: &RedisServer) {
        eprintln!("{} jobs, {} outages", self.enqueued, self.outages());
        for workers in self.workers {
            eventually(SOON, "the outages are over", || {
                workers.tracker().count(is_outage) == workers.tracker().count(is_outage_over)
            });
            assert_eq!(workers.tracker().count(is_lease_lost), 0, "FAULT_SEED={}", self.seed);
            assert!(workers.leave());
        }
        self.book.assert_exactly_once();
        for name in QUEUES {
            assert_eq!(queue(server, name), Vec::<Vec<u8>>::new());
        }
        assert_eq!(in_flight(server), Vec::<Vec<u8>>::new());
        assert_eq!(stat(server, "requeued"), 0);
        assert_at_rest(server);
    }
}

/// A server that keeps what it has answered, whatever befalls it.
fn durable() -> Options {
    Options::default().appendonly().config("appendfsync", "always")
}

#[test]
fn restarts_and_crashes() {
    let mut server = durable().start();
    let mut rig = Rig::start(&server);
    for round in 0..4 {
        rig.in_the_middle();
        if round % 2 == 0 {
            // The scripts are forgotten with it.
            server.restart();
        } else {
            server.crash();
            thread::sleep(Duration::from_millis(300));
            server.start_again();
        }
        rig.goes_on();
    }
    rig.ends_well(&server);
}

#[test]
fn a_redis_that_loads_its_data() {
    // So slowly that it answers LOADING for a while.
    let mut server = durable()
        .config("key-load-delay", "500")
        .config("loading-process-events-interval-bytes", "1024")
        .start();
    let mut rig = Rig::start(&server);
    let () = redis::cmd("CONFIG")
        .arg("SET")
        .arg("appendfsync")
        .arg("no")
        .query(&mut server.connect())
        .unwrap();
    let mut filler = redis::pipe();
    (0..3000).for_each(|i| {
        filler.set(format!("filler{i}"), i).ignore();
    });
    let () = filler.query(&mut server.connect()).unwrap();
    let () = redis::cmd("CONFIG")
        .arg("SET")
        .arg("appendfsync")
        .arg("always")
        .query(&mut server.connect())
        .unwrap();
    for _ in 0..2 {
        rig.in_the_middle();
        let start = Instant::now();
        server.restart();
        assert!(start.elapsed() > Duration::from_secs(1), "it has loaded too quickly");
        rig.goes_on();
    }
    assert!(rig.outages() >= 2);
    for i in 0..3000 {
        let () = server.connect().del(format!("filler{i}")).unwrap();
    }
    rig.ends_well(&server);
}

#[test]
fn a_redis_that_is_a_replica_for_a_while() {
    let server = RedisServer::start();
    let mut rig = Rig::start(&server);
    let replicate = |to: &[&str]| redis::cmd("REPLICAOF").arg(to).exec(&mut server.connect()).unwrap();
    for _ in 0..3 {
        rig.in_the_middle();
        replicate(&["127.0.0.1", "1"]);
        thread::sleep(Duration::from_millis(700));
        let done = rig.done();
        thread::sleep(Duration::from_millis(200));
        assert!(rig.done() - done <= 12, "jobs are claimed from a replica");
        replicate(&["NO", "ONE"]);
        rig.goes_on();
    }
    assert!(rig.outages() >= 2);
    rig.ends_well(&server);
}

#[test]
fn a_failover_to_another_server() {
    let one = Options::default().tcp().start();
    let port = |server: &RedisServer| server.port().unwrap().to_string();
    let other = Options::default()
        .tcp()
        .config("replicaof", &format!("127.0.0.1 {}", port(&one)))
        .start();
    // One address, behind which there is now this server, now that one.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("redis.sock");
    let point_to = |server: &RedisServer| {
        let new = dir.path().join("new");
        std::os::unix::fs::symlink(server.socket_path(), &new).unwrap();
        std::fs::rename(new, &socket).unwrap();
    };
    let info = |server: &RedisServer, what: &str| -> bool {
        let text: String = redis::cmd("INFO")
            .arg("replication")
            .query(&mut server.connect())
            .unwrap();
        text.contains(what)
    };
    point_to(&one);
    let mut rig = Rig::at(&socket, Address::Unix(socket.clone()));
    let (mut from, mut to) = (&one, &other);
    for _ in 0..2 {
        eventually(SOON, "the replica is up to date", || info(from, "state=online"));
        rig.in_the_middle();
        // What was answered is there, as with any failover that does not lose the last writes.
        redis::cmd("FAILOVER")
            .arg(&["TO", "127.0.0.1", &port(to)])
            .exec(&mut from.connect())
            .unwrap();
        eventually(SOON, "the other is the master", || {
            info(to, "role:master") && info(from, "role:slave")
        });
        thread::sleep(Duration::from_millis(300));
        point_to(to);
        rig.goes_on();
        std::mem::swap(&mut from, &mut to);
    }
    rig.ends_well(&one);
}

#[test]
fn scripts_that_are_flushed_again_and_again() {
    let server = RedisServer::start();
    let mut rig = Rig::start(&server);
    let mut connection = server.connect();
    for _ in 0..3 {
        rig.in_the_middle();
        while !rig.book.is_done() {
            redis::cmd("SCRIPT").arg("FLUSH").exec(&mut connection).unwrap();
        }
    }
    assert_eq!(rig.outages(), 0);
    rig.ends_well(&server);
}

#[test]
fn connections_that_are_reset_in_a_reply_and_in_a_request() {
    let server = RedisServer::start();
    let mut rng = Rng::new(seed());
    let proxy = Proxy::start(server.socket_path(), move |request: &Request| {
        if !lua::is_turn(request) || rng.chance(0.6) {
            return Action::pass();
        }
        let at = match rng.below(4) {
            0 => At::Byte(1),
            1 => At::BeforeEnd(1),
            _ => At::Share(rng.unit()),
        };
        if rng.chance(0.5) {
            Action::cut_request(at, Cut::Reset)
        } else {
            Action::cut_reply(at, Cut::Reset)
        }
    });
    let address = Address::Tcp(proxy.tcp_addr().ip().to_string(), proxy.tcp_addr().port());
    let mut rig = Rig::at(&server.socket_path(), address);
    while proxy.counts().faults() < 500 {
        rig.in_the_middle();
        rig.goes_on();
    }
    eprintln!("{}", proxy.counts());
    proxy.calm();
    rig.ends_well(&server);
}

#[test]
fn stalls_of_a_second_and_more() {
    let server = RedisServer::start();
    let mut rig = Rig::start(&server);
    for round in 0..4 {
        rig.in_the_middle();
        if round % 2 == 0 {
            server.pause();
            thread::sleep(Duration::from_millis(1000 + 700 * round / 2));
            server.resume();
        } else {
            redis::cmd("CLIENT")
                .arg(&["PAUSE", "1200", "WRITE"])
                .exec(&mut server.connect())
                .unwrap();
        }
        rig.goes_on();
    }
    rig.ends_well(&server);
}

#[test]
fn a_redis_that_is_full_goes_on_giving_its_jobs_away() {
    let server = Options::default().maxmemory("0").start();
    let mut rig = Rig::start(&server);
    for _ in 0..2 {
        rig.in_the_middle();
        server.config_set("maxmemory", "1");
        let full = server.connect().set::<_, _, ()>("filler", "x");
        assert_eq!(full.unwrap_err().code(), Some("OOM"));
        // They are done while it is full, and acked.
        rig.goes_on();
        eventually(SOON, "all are acked", || in_flight(&server).is_empty());
        server.config_set("maxmemory", "0");
    }
    assert_eq!(rig.outages(), 0);
    rig.ends_well(&server);
}

#[test]
fn a_redis_that_refuses_writes_for_a_while() {
    let server = RedisServer::start();
    let mut rig = Rig::start(&server);
    for round in 0..4 {
        rig.in_the_middle();
        // MISCONF and NOREPLICAS.
        if round % 2 == 0 {
            server.break_saves();
        } else {
            server.config_set("min-replicas-to-write", "1");
        }
        let refused = server.connect().set::<_, _, ()>("filler", "x").unwrap_err();
        assert!(matches!(refused.code(), Some("MISCONF" | "NOREPLICAS")), "{refused}");
        eventually(SOON, "it is told", || rig.outages() > 0);
        let done = rig.done();
        thread::sleep(Duration::from_millis(300));
        assert!(rig.done() - done <= 12, "jobs are claimed from a Redis that refuses");
        if round % 2 == 0 {
            server.mend_saves();
            server.config_set("save", "");
        } else {
            server.config_set("min-replicas-to-write", "0");
        }
        rig.goes_on();
    }
    rig.ends_well(&server);
}

#[test]
fn connections_that_redis_closes_again_and_again() {
    let server = RedisServer::start();
    let mut rig = Rig::start(&server);
    let mut connection = server.connect();
    let mut killed = 0;
    while killed < 50 {
        rig.in_the_middle();
        while !rig.book.is_done() {
            for kind in ["normal", "pubsub"] {
                let many: u64 = redis::cmd("CLIENT")
                    .arg(&["KILL", "TYPE", kind, "SKIPME", "yes"])
                    .query(&mut connection)
                    .unwrap();
                killed += many;
            }
            // Now and then a turn gets through.
            thread::sleep(Duration::from_millis(10));
        }
    }
    rig.ends_well(&server);
}
