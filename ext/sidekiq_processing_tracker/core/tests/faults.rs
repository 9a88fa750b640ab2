//! Engines and processes behind a proxy that cuts, delays, stalls, postpones and copies, by a seed.
//!
//! Repeat a run with `FAULT_SEED=<seed>`; `FAULT_SECONDS` makes it longer. The seed decides what befalls which request
//! of which connection; the threads' timing remains free.

#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use processing_tracker_core::events::Event;
use processing_tracker_core::parker::Woken;
use processing_tracker_core::registry::{Handle, Requeueing};
use redis::Commands;
use support::lua;
use support::process::{Instance, Options};
use support::proxy::{Action, At, End, Faults, OnConnect, Plan, Proxy, Request, When};
use support::redis_server::RedisServer;
use support::rng::{seed, Rng};
use support::storm::{assert_all_kinds, faults, seconds, CutOff};
use support::tracker::{
    assert_at_rest, forgetful, in_flight, is_lease_lost, is_recovered, job, journal, queue, recover_all, settings,
    stat, Tracker, SOON,
};
use support::wait::eventually;

/// So many faults a run sees at least.
const ENOUGH: u64 = 1200;

/// What a run of a job may lead to: how often the job is put back to its queue.
#[derive(Debug, Clone, Copy)]
struct Returns {
    at_least: usize,
    at_most: usize,
    /// At most, where the instance lost a lease or died, so that others recovered what was in Redis.
    at_most_if_recovered: usize,
}

/// The job was done, and its ack answered.
const DONE: Returns = returns(0, 0, 0);
/// The job was done; its ack may have been lost with the lease or the process.
const DONE_BUT_MAYBE_UNHEARD: Returns = returns(0, 1, 1);
/// The job was done, and the instance left. It may have lost its lease on the way, and the ack with it.
const DONE_THEN_LEFT: Returns = returns(0, 0, 1);
/// The job was in Redis and not done, or handed back: it comes back, once.
const BACK: Returns = returns(1, 1, 1);

const fn returns(at_least: usize, at_most: usize, at_most_if_recovered: usize) -> Returns {
    Returns {
        at_least,
        at_most,
        at_most_if_recovered,
    }
}

/// Who did what with which job: what was promised for each.
#[derive(Default)]
struct Ledger {
    next_job: usize,
    /// For each run that is over: the job, the life of the instance that ran it, and what may come of it.
    runs: Vec<(String, usize, Returns)>,
    /// The identities of each life of an instance.
    lives: Vec<Vec<String>>,
    /// What was taken from the queue again.
    taken: BTreeMap<String, usize>,
    tally: BTreeMap<&'static str, u64>,
}

struct World {
    server: RedisServer,
    proxy: Proxy,
    ledger: Mutex<Ledger>,
    deadline: Instant,
}

impl World {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, what: &'static str) {
        *self.ledger().tally.entry(what).or_default() += 1;
    }

    /// A job as another fetcher would pop it: one that came back, or a new one.
    fn fetch(&self, rng: &mut Rng, connection: &mut redis::Connection) -> String {
        if rng.chance(0.4) {
            let payload: Option<Vec<u8>> = connection.rpop("queue:work", None).unwrap();
            if let Some(payload) = payload {
                let jid = jid(&payload);
                *self.ledger().taken.entry(jid.clone()).or_default() += 1;
                return jid;
            }
        }
        let mut ledger = self.ledger();
        ledger.next_job += 1;
        format!("j{}", ledger.next_job)
    }

    fn put_back(&self, jid: &str, connection: &mut redis::Connection) {
        let () = connection.rpush("queue:work", job(jid)).unwrap();
        self.count("put back by the caller");
    }

    fn is_over(&self) -> bool {
        let late = Instant::now().checked_duration_since(self.deadline);
        let Some(late) = late else { return false };
        // A slow machine gets more time to see enough.
        let enough = self.proxy.counts().faults() >= ENOUGH && self.ledger().tally.contains_key("leases lost");
        enough || late > Duration::from_secs(30)
    }
}

/// Fails on a payload that is not byte for byte one of ours.
fn jid(payload: &[u8]) -> String {
    let text = std::str::from_utf8(payload).unwrap();
    let jid = text.split('"').nth(9).unwrap();
    assert_eq!(payload, job(jid));
    jid.to_owned()
}

/// A job that runs in an instance.
struct Run {
    jid: String,
    handle: Handle,
    /// Its record was answered.
    recorded: bool,
    /// Leases that were lost while it had no answer: under each its record may be in Redis.
    losses: usize,
    /// It was recorded when the lease was lost.
    lost: bool,
}

impl Run {
    /// What comes of it when it ends without an ack. `at_least` for one whose record was not answered.
    fn unfinished(&self, at_least: usize) -> Returns {
        if self.recorded || self.lost {
            returns(1, 1, 1 + self.losses)
        } else {
            returns(at_least, 1, 2 + self.losses)
        }
    }
}

/// An engine, its jobs, and what it did with others. It may be ended and followed by another one.
struct Worker<'a> {
    world: &'a World,
    rng: Rng,
    connection: redis::Connection,
    tracker: Tracker,
    heard: usize,
    life: usize,
    /// When this life ends.
    ends: Instant,
    running: Vec<Run>,
    /// Done, their acks not known to be answered.
    acked: Vec<Run>,
    /// Released, with what comes of it.
    released: Vec<Run>,
}

impl<'a> Worker<'a> {
    fn start(world: &'a World, number: u64, seed: u64) -> Self {
        let tracker = Self::engine(world, number);
        let mut worker = Self {
            world,
            rng: Rng::at(seed, &[1, number]),
            connection: world.server.connect(),
            life: 0,
            ends: world.deadline,
            heard: 0,
            running: Vec::new(),
            acked: Vec::new(),
            released: Vec::new(),
            tracker,
        };
        worker.begin_life();
        worker
    }

    fn engine(world: &World, number: u64) -> Tracker {
        Tracker::registered(forgetful(&world.proxy.socket_path(), &format!("engine{number}")))
    }

    fn begin_life(&mut self) {
        let mut ledger = self.world.ledger();
        self.life = ledger.lives.len();
        ledger.lives.push(Vec::new());
        drop(ledger);
        self.heard = 0;
        self.ends = Instant::now() + self.rng.up_to(Duration::from_secs(8));
    }

    fn settle(&self, run: &Run, returns: Returns) {
        self.world.ledger().runs.push((run.jid.clone(), self.life, returns));
    }

    fn work(mut self, number: u64) {
        while !self.world.is_over() {
            self.listen();
            if Instant::now() >= self.ends {
                self.renew(number);
            }
            match self.rng.below(1000) {
                0..=399 if self.running.len() < 12 => self.begin(),
                650..=919 => self.ack(),
                920..=944 => self.release(),
                945..=964 => self.requeue(),
                _ => self.look(),
            }
        }
        self.end(true);
    }

    /// Hears what the engine tells.
    fn listen(&mut self) {
        let told = self.tracker.told();
        for event in &told[self.heard..] {
            match event {
                Event::Started { identity, .. } => self.world.ledger().lives[self.life].push(identity.clone()),
                Event::LeaseLost { new_identity, jobs, .. } => {
                    let jids: Vec<_> = jobs.iter().filter_map(|job| job.facts().jid).collect();
                    self.world.ledger().lives[self.life].push(new_identity.clone());
                    self.world.count("leases lost");
                    for run in &mut self.running {
                        if jids.contains(&run.jid) {
                            run.lost = true;
                        } else if !run.lost {
                            assert!(!run.recorded, "{} was recorded, and its loss is not told", run.jid);
                            run.losses += 1;
                        }
                    }
                    for run in &mut self.released {
                        run.losses += usize::from(!run.recorded);
                    }
                    for run in std::mem::take(&mut self.acked) {
                        let mut returns = DONE_BUT_MAYBE_UNHEARD;
                        returns.at_most_if_recovered += run.losses;
                        self.settle(&run, returns);
                    }
                }
                Event::Dropped(_) => panic!("events were dropped"),
                _ => {}
            }
        }
        self.heard = told.len();
    }

    fn begin(&mut self) {
        let jid = self.world.fetch(&mut self.rng, &mut self.connection);
        let handle = self.tracker.track("work", &job(&jid));
        self.running.push(Run {
            jid,
            handle,
            recorded: false,
            losses: 0,
            lost: false,
        });
    }

    fn pick(&mut self) -> Option<usize> {
        let count = self.running.len() as u64;
        (count > 0).then(|| self.rng.below(count) as usize)
    }

    /// One to end. Seldom one whose record was not answered: else few would ever be.
    fn pick_to_end(&mut self) -> Option<Run> {
        let at = self.pick()?;
        (self.running[at].recorded || self.rng.chance(0.1)).then(|| self.running.swap_remove(at))
    }

    /// Waits a little for a record.
    fn look(&mut self) {
        let Some(at) = self.pick() else { return };
        let handle = self.running[at].handle;
        let within = self.rng.up_to(Duration::from_millis(5));
        if self.tracker.is_recorded(handle, within) {
            // First the losses before this record, and one after it, which takes it away.
            let before = self.world.ledger().lives[self.life].len();
            self.listen();
            self.running[at].recorded = !self.running[at].lost;
            let same_identity = self.world.ledger().lives[self.life].len() == before;
            // Turns come one after another: what was acked before this job began was acked with its record at the
            // latest.
            let (flushed, waits): (Vec<Run>, Vec<Run>) = std::mem::take(&mut self.acked)
                .into_iter()
                .partition(|acked| same_identity && acked.handle < handle);
            self.acked = waits;
            for run in flushed {
                let mut returns = DONE;
                returns.at_most_if_recovered += run.losses;
                self.settle(&run, returns);
            }
        } else {
            // In an outage the answer comes at once; a job takes its time all the same.
            thread::sleep(within);
        }
    }

    fn ack(&mut self) {
        let Some(mut run) = self.pick_to_end() else { return };
        self.tracker.engine().ack(run.handle);
        if run.lost {
            self.settle(&run, BACK);
            return;
        }
        // From here on the handle tells when it was acked: those that begin later are younger.
        run.handle = self.tracker.track("probes", b"a probe");
        self.tracker.engine().ack(run.handle);
        self.acked.push(run);
    }

    fn release(&mut self) {
        let Some(run) = self.pick_to_end() else { return };
        self.tracker.engine().release(run.handle);
        self.released.push(run);
    }

    fn requeue(&mut self) {
        let Some(run) = self.pick_to_end() else { return };
        let returns = run.unfinished(1);
        match self.tracker.engine().requeue(run.handle) {
            Requeueing::Settled => {}
            Requeueing::Unrecorded => {
                assert!(self.tracker.engine().take_back(run.handle));
                self.world.put_back(&run.jid, &mut self.connection);
            }
            Requeueing::Under(parker) => {
                let within = self.rng.up_to(Duration::from_millis(100));
                let woken = parker.wait(Some(Instant::now() + within));
                if self.tracker.engine().take_back(run.handle) {
                    self.world.put_back(&run.jid, &mut self.connection);
                } else if woken == Woken::Done {
                    self.world.count("requeued");
                }
            }
        }
        self.settle(&run, returns);
    }

    /// This engine ends, in one way or the other, and another one begins.
    fn renew(&mut self, number: u64) {
        let leaves = self.rng.chance(0.5);
        self.end(leaves);
        self.tracker = Self::engine(self.world, number);
        self.begin_life();
    }

    fn end(&mut self, leaves: bool) {
        let left = leaves && self.tracker.leave(SOON);
        if !left {
            self.tracker.stop();
        }
        self.listen();
        self.world.count(if left { "left" } else { "ended without leaving" });
        for run in std::mem::take(&mut self.running)
            .into_iter()
            .chain(std::mem::take(&mut self.released))
        {
            self.settle(&run, run.unfinished(usize::from(left)));
        }
        for run in std::mem::take(&mut self.acked) {
            let mut returns = if left { DONE_THEN_LEFT } else { DONE_BUT_MAYBE_UNHEARD };
            returns.at_most_if_recovered += run.losses;
            self.settle(&run, returns);
        }
    }
}

/// Processes that are killed, one after another: from outside, or at a step of their work.
fn kill_processes(world: &World, number: u64, seed: u64) {
    const PLACES: [&str; 8] = [
        "after_begin",
        "before_turn",
        "after_turn",
        "before_reap",
        "after_reap",
        "after_peek",
        "after_recover",
        "before_leave",
    ];
    let mut rng = Rng::at(seed, &[2, number]);
    let mut connection = world.server.connect();
    while !world.is_over() {
        let mut options = Options::new(&world.proxy.socket_path())
            .set("instance_id", format!("child{number}"))
            .set("recovery_window_ms", 1);
        if rng.chance(0.5) {
            let place = PLACES[rng.below(PLACES.len() as u64) as usize];
            options = options.failpoint(&format!("{place}:{}", 1 + rng.below(5)));
        }
        let mut instance = options.start();
        let dies = Instant::now() + rng.up_to(Duration::from_millis(2500));
        let mut runs = Vec::new();
        while Instant::now() < dies && !instance.is_killed() {
            if process_works(world, &mut rng, &mut connection, &mut instance, &mut runs).is_none() {
                break;
            }
        }
        instance.kill();
        world.count("killed");
        let mut ledger = world.ledger();
        let life = ledger.lives.len();
        // Who it was does not matter: it is recovered in any case, and its losses are its own affair.
        let losses = instance.told("LeaseLost");
        ledger.lives.push(vec!["killed".into()]);
        for (jid, recorded, acked) in runs {
            let at_least = usize::from(recorded && !acked);
            ledger.runs.push((jid, life, returns(at_least, 1, 1 + losses)));
        }
    }
}

/// One command; `None` when the process is gone.
fn process_works(
    world: &World,
    rng: &mut Rng,
    connection: &mut redis::Connection,
    instance: &mut Instance,
    runs: &mut Vec<(String, bool, bool)>,
) -> Option<()> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let jid = world.fetch(rng, connection);
    runs.push((jid.clone(), false, false));
    let run = runs.last_mut()?;
    let handle = instance.try_ask(&format!("track {} {}", hex(b"work"), hex(&job(&jid))))?;
    if rng.chance(0.8) {
        run.1 = instance.try_ask(&format!("recorded {handle} 300"))? == "true";
    }
    if rng.chance(0.7) {
        run.2 = true;
        instance.try_ask(&format!("ack {handle}"))?;
    }
    Some(())
}

#[test]
fn nothing_is_lost_under_random_cuts_and_doubled_only_what_may_be() {
    let seed = seed();
    let server = RedisServer::start();
    let plan = CutOff::new(seed, (0..3).map(|number| format!("engine{number}:")).collect());
    let proxy = Proxy::start(server.socket_path(), plan);
    let world = World {
        deadline: Instant::now() + seconds(12),
        ledger: Mutex::default(),
        server,
        proxy,
    };
    eprintln!("FAULT_SEED={seed}");
    thread::scope(|scope| {
        let world = &world;
        for number in 0..3 {
            scope.spawn(move || Worker::start(world, number, seed).work(number));
        }
        for number in 0..2 {
            scope.spawn(move || kill_processes(world, number, seed));
        }
    });
    let counts = world.proxy.counts();
    world.proxy.calm();
    world.proxy.wait_late(SOON);
    settle_all(&world.server);

    let ledger = world.ledger();
    eprintln!("{:?}; {} jobs; {counts}", ledger.tally, ledger.next_job);
    let recovered: BTreeSet<String> = journal(&world.server).into_iter().map(|line| line.from).collect();
    let mut allowed: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (jid, life, returns) in &ledger.runs {
        let identities = &ledger.lives[*life];
        let was_recovered = identities
            .iter()
            .any(|name| name == "killed" || recovered.contains(name));
        let most = if was_recovered {
            returns.at_most_if_recovered
        } else {
            returns.at_most
        };
        let range = allowed.entry(jid).or_default();
        range.0 += returns.at_least;
        range.1 += most;
    }
    let mut returned: BTreeMap<String, usize> = ledger.taken.clone();
    for payload in queue(&world.server, "work") {
        *returned.entry(jid(&payload)).or_default() += 1;
    }
    for (jid, (least, most)) in &allowed {
        let times = returned.remove(*jid).unwrap_or(0);
        if !(*least..=*most).contains(&times) {
            let runs: Vec<_> = ledger.runs.iter().filter(|run| run.0 == **jid).collect();
            let lives: Vec<_> = runs.iter().map(|run| &ledger.lives[run.1]).collect();
            panic!("FAULT_SEED={seed}: {jid} came back {times} times, not {least} to {most}: {runs:?} {lives:?}");
        }
    }
    assert_eq!(returned, BTreeMap::new(), "FAULT_SEED={seed}");
    assert_all_kinds(seed, &counts);
    assert!(counts.faults() >= ENOUGH, "{counts}");
    assert!(stat(&world.server, "requeued") > 0);
    assert!(ledger.tally.contains_key("leases lost"), "{:?}", ledger.tally);
    assert!(ledger.next_job > 500, "{} jobs", ledger.next_job);
}

/// Recovers until nobody is left, whoever a late registration has made.
#[track_caller]
fn settle_all(server: &RedisServer) {
    let console = forgetful(&server.socket_path(), "console");
    let report = recover_all(&console).unwrap();
    assert_eq!(report.stuck, 0);
    let () = server.connect().del("queue:probes").unwrap();
    assert_eq!(in_flight(server), Vec::<Vec<u8>>::new());
    assert_at_rest(server);
}

/// Breaks every second call of recovery, and little else.
struct OnRecovery(Faults);

impl Plan for OnRecovery {
    fn connect(&mut self, connection: u64) -> OnConnect {
        self.0.connect(connection)
    }

    fn request(&mut self, request: &Request) -> Action {
        let scripts = [&lua::REAP, &lua::PEEK, &lua::RECOVER];
        if scripts.iter().any(|script| lua::is_call(request, script)) {
            self.0.request(request)
        } else {
            Action::pass()
        }
    }
}

#[test]
fn recovery_under_random_cuts_loses_and_doubles_nothing_and_keeps_the_order() {
    let seed = seed();
    eprintln!("FAULT_SEED={seed}");
    let server = RedisServer::start();
    let plan = OnRecovery(Faults {
        refuse: 0.1,
        cut_request: 0.15,
        cut_reply: 0.15,
        delay: 0.05,
        delay_reply: 0.05,
        postpone: 0.1,
        copy: 0.2,
        may_copy: lua::may_repeat,
        ..faults(seed)
    });
    let proxy = Proxy::start(server.socket_path(), plan);
    let reapers: Vec<Tracker> = (0..3)
        .map(|i| Tracker::registered(settings(&proxy.socket_path(), &format!("reaper{i}"))))
        .collect();
    const EACH: usize = 450;
    // A job of another one under the same id would be suspected.
    let jobs_of =
        |round: i32, i: usize| -> Vec<Vec<u8>> { (0..EACH).map(|n| job(&format!("j{round}-{i}-{n}"))).collect() };
    for round in 0..3 {
        // Each has its own queue, so that the order can be told.
        let dead: Vec<Tracker> = (0..12)
            .map(|i| Tracker::registered(settings(&server.socket_path(), &format!("dead{round}-{i}"))))
            .collect();
        for (i, tracker) in dead.iter().enumerate() {
            let handles: Vec<Handle> = jobs_of(round, i)
                .iter()
                .map(|job| tracker.track(&format!("q{round}-{i}"), job))
                .collect();
            assert!(handles.iter().all(|handle| tracker.is_recorded(*handle, SOON)));
        }
        dead.iter().for_each(Tracker::stop);
        eventually(SOON, "all is back", || in_flight(&server).is_empty());
    }
    let total = 3 * 12 * EACH as u64;
    let counts = proxy.counts();
    eprintln!("{counts}");
    proxy.calm();
    proxy.close_all(End::Close);
    proxy.wait_late(SOON);
    for reaper in &reapers {
        assert_eq!(reaper.count(is_lease_lost), 0, "FAULT_SEED={seed}");
        assert!(reaper.leave(SOON));
    }
    settle_all(&server);
    for round in 0..3 {
        for i in 0..12 {
            assert_eq!(
                queue(&server, &format!("q{round}-{i}")),
                jobs_of(round, i),
                "FAULT_SEED={seed}"
            );
        }
    }
    assert_eq!(stat(&server, "requeued"), total, "FAULT_SEED={seed}");
    assert_eq!(journal(&server).len() as u64, total);
    // What was done and not heard of is in the journal only.
    let told: usize = reapers.iter().map(|reaper| reaper.count(is_recovered)).sum();
    assert!(told as u64 <= total);
    assert_all_kinds(seed, &counts);
}

/// A cut at every place of a turn and of the last call, with a late copy; a turn without a script is cut there, or comes late.
#[test]
fn a_turn_and_a_leave_may_be_cut_at_every_place() {
    thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || {
                let server = RedisServer::start();
                let shares = (0..=10).map(|tenth| f64::from(tenth) / 10.0);
                for share in shares {
                    for late in [false, true] {
                        cut_at(&server, share, half == 0, late);
                    }
                }
                assert_at_rest(&server);
            });
        }
    });
}

fn cut_at(server: &RedisServer, share: f64, in_request: bool, late: bool) {
    let (at, armed) = (At::Share(share), std::sync::Arc::new(Mutex::new(None)));
    let action = if in_request {
        Action::cut_request(at, End::Close)
    } else {
        Action::cut_reply(at, End::Close)
    };
    let plan = {
        let armed = armed.clone();
        move |request: &Request| {
            let mut armed = armed.lock().unwrap();
            let hit = match *armed {
                Some("turn") => lua::is_turn(request),
                Some("leave") => lua::is_call(request, &lua::LEAVE),
                _ => false,
            };
            if hit {
                *armed = None;
                return match request.is_transaction() && late {
                    true => Action::postpone(When::OnRelease),
                    false => action.and_copy(When::OnRelease),
                };
            }
            Action::pass()
        }
    };
    let lates = |proxy: &Proxy| proxy.counts().of("copied") + proxy.counts().of("postponed");
    let proxy = Proxy::start(server.socket_path(), plan);
    let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
    let first = tracker.record("work", &job("first"));
    let arm = |what: &'static str| *armed.lock().unwrap() = Some(what);

    arm("turn");
    let second = tracker.record("work", &job("second"));
    assert_eq!(in_flight(server).len(), 2, "at {share}");
    arm("turn");
    tracker.engine().ack(first);
    eventually(SOON, "the ack is done", || in_flight(server) == [job("second")]);
    arm("turn");
    let Requeueing::Under(parker) = tracker.engine().requeue(second) else {
        panic!()
    };
    parker.wait(Some(Instant::now() + SOON));
    assert_eq!(queue(server, "work"), [job("second")], "at {share}");
    let _held = tracker.record("work", &job("held"));
    // Now the first copies arrive.
    assert_eq!(proxy.release_late() as u64, lates(&proxy), "{}", proxy.counts());
    assert_eq!(in_flight(server), [job("held")], "at {share}");
    arm("leave");
    assert!(tracker.leave(SOON));
    proxy.release_late();
    assert_eq!(queue(server, "work"), [job("held"), job("second")], "at {share}");
    assert_eq!(tracker.count(is_lease_lost), 0);
    let () = server.connect().del(&["queue:work", "queues"]).unwrap();
    let counts = proxy.counts();
    let hits = counts.of("cut_request") + counts.of("cut_reply") + counts.of("postponed");
    assert!(hits >= 4, "{counts}");
}
