//! What becomes of orphans: back to the queue, to the dead set, or nowhere; with their unique locks settled.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use processing_tracker_core::decision::{Decision, End, Reason};
use processing_tracker_core::entry::Token;
use processing_tracker_core::events::{Event, Settled};
use processing_tracker_core::keys::Keys;
use processing_tracker_core::link::Link;
use processing_tracker_core::payload;
use processing_tracker_core::recovery::{Dropped, Progress, Reaper, Recovery, Report};
use processing_tracker_core::scripts::{self, Fenced, Orphan, Outcome, Proof, Settlement, Turn, Turned};
use processing_tracker_core::settings::{Pace, Policy, Timestamps};
use redis::Commands;
use support::redis_server::{Options, RedisServer};
use support::tracker::{assert_at_rest, job, jobs, journal, keys, link, queue, recover_all, settings, stat};

const PACE: Pace = Pace {
    step: Duration::from_secs(1),
    ttl: Duration::from_secs(5),
};
const HOLD: Duration = Duration::from_secs(300);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A server, and a reaper that does what it is told, call by call.
struct Bench {
    server: RedisServer,
    connection: redis::Connection,
    link: Link,
    keys: Keys,
    policy: Policy,
    /// The number of the last turn.
    calls: u64,
}

/// What a recovery did and told.
#[derive(Debug)]
struct Done {
    report: Report,
    settled: Vec<Settled>,
    warnings: Vec<String>,
}

impl Done {
    /// How each job ended, by id.
    fn ends(&self) -> BTreeMap<String, End> {
        let jid = |settled: &Settled| settled.jid.clone().unwrap_or_default();
        self.settled.iter().map(|settled| (jid(settled), settled.end)).collect()
    }

    /// The only job that was settled.
    #[track_caller]
    fn only(&self) -> &Settled {
        assert_eq!(self.settled.len(), 1, "{self:?}");
        &self.settled[0]
    }
}

impl Bench {
    fn start() -> Self {
        Self::on(RedisServer::start())
    }

    fn on(server: RedisServer) -> Self {
        Self {
            connection: server.connect(),
            link: link(&server),
            keys: keys(),
            policy: Policy::default(),
            calls: 0,
            server,
        }
    }

    fn register(&mut self, identity: &str, info: &[(&str, &str)]) {
        let info: Vec<(String, String)> = info.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        scripts::register(&mut self.link, &self.keys, identity, PACE, &info).unwrap();
    }

    #[track_caller]
    fn turn(&mut self, identity: &str, turn: Turn) -> Vec<Token> {
        self.calls += 1;
        let turn = Turn {
            call: self.calls,
            ..turn
        };
        match scripts::turn(&mut self.link, &self.keys, identity, &turn).unwrap() {
            Turned::Done(done) => done.recorded,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn record(&mut self, identity: &str, payloads: &[Vec<u8>]) -> Vec<Token> {
        let record = |payload: &Vec<u8>| (b"work".to_vec(), payload[..].into());
        let records = payloads.iter().map(record).collect();
        self.turn(
            identity,
            Turn {
                records,
                ..Turn::default()
            },
        )
    }

    /// Lets the lease clock move on.
    fn pass(&mut self, time: Duration) {
        let () = self
            .connection
            .hincr(self.keys.clock(), "now", time.as_millis() as u64)
            .unwrap();
    }

    /// An instance that has told this about itself dies with these jobs in flight.
    fn dead_with(&mut self, identity: &str, info: &[(&str, &str)], payloads: &[Vec<u8>]) -> Vec<Token> {
        self.register(identity, info);
        let tokens = self.record(identity, payloads);
        self.pass(PACE.ttl + PACE.step);
        tokens
    }

    /// An instance with the native fetch, which records marked jobs and others.
    fn dead(&mut self, identity: &str, payloads: &[Vec<u8>]) -> Vec<Token> {
        self.dead_with(identity, &[("track", "marked"), ("fetch", "native")], payloads)
    }

    fn reaper(&self) -> Reaper {
        Reaper {
            keys: self.keys.clone(),
            by: "reaper".into(),
            pace: PACE,
            hold: HOLD,
            policy: self.policy.clone(),
        }
    }

    fn run(&mut self, mut recovery: Recovery) -> Done {
        let reaper = self.reaper();
        let (mut settled, mut warnings) = (Vec::new(), Vec::new());
        loop {
            let progress = recovery.step(&mut self.link, &reaper, |event| match event {
                Event::Settled(one) => settled.push(one),
                Event::Warning(warning) => warnings.push(warning),
                other => panic!("{other:?}"),
            });
            if let Progress::Done(report) = progress.unwrap() {
                return Done {
                    report,
                    settled,
                    warnings,
                };
            }
        }
    }

    fn recover(&mut self, identity: &str) -> Done {
        self.run(Recovery::new(identity.as_bytes().to_vec()))
    }

    /// Dies with one job, which is recovered, after its pause where it has one.
    fn recover_one(&mut self, payload: &[u8]) -> Done {
        let identity = format!("dead{}", self.calls);
        self.dead(&identity, &[payload.to_vec()]);
        let done = self.recover(&identity);
        let Some(rest) = done.report.rest else { return done };
        assert!(done.settled.is_empty(), "{done:?}");
        self.wait(rest);
        self.recover(&identity)
    }

    /// Lets so much of a pause pass, by a clock that moves in twentieths of a step.
    fn wait(&mut self, rest: Duration) {
        self.pass(rest + PACE.step / 10);
    }

    fn count(&mut self, jid: &str) -> Option<u64> {
        self.connection.get(self.keys.recoveries(jid)).unwrap()
    }

    fn set_count(&mut self, jid: &str, count: u64) {
        let () = self.connection.set_ex(self.keys.recoveries(jid), count, 1000).unwrap();
    }

    fn ttl(&mut self, key: &str) -> i64 {
        self.connection.pttl(key).unwrap()
    }

    /// What lies in the dead set, with its scores.
    fn dead_set(&mut self) -> Vec<(Vec<u8>, f64)> {
        self.connection.zrange_withscores("dead", 0, -1).unwrap()
    }

    fn exists(&mut self, key: &str) -> bool {
        self.connection.exists(key).unwrap()
    }

    fn lease_end(&mut self, identity: &str) -> Option<f64> {
        self.connection.zscore(self.keys.instances(), identity).unwrap()
    }

    fn now(&mut self) -> f64 {
        self.connection.hget(self.keys.clock(), "now").unwrap()
    }

    fn queue(&self) -> Vec<Vec<u8>> {
        queue(&self.server, "work")
    }

    fn unique_keys(&mut self) -> Vec<String> {
        let mut keys: Vec<String> = self.connection.keys("uniquejobs:*").unwrap();
        keys.sort();
        keys
    }
}

/// A job that nobody has marked.
fn unmarked(jid: &str) -> Vec<u8> {
    format!(r#"{{"class":"HardJob","args":[1],"jid":"{jid}","queue":"work"}}"#).into_bytes()
}

fn json(payload: &[u8]) -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_slice(payload).unwrap()
}

// --- what goes back, and how often ---

#[test]
fn the_first_time_it_goes_to_the_head_of_its_queue_and_is_counted() {
    let mut bench = Bench::start();
    let () = bench.connection.lpush("queue:work", "waits").unwrap();
    bench.dead("dead", &[job("a")]);
    let done = bench.recover("dead");
    assert_eq!(bench.queue(), [job("a"), b"waits".to_vec()]);
    assert_eq!(bench.count("a"), Some(1));
    for key in [bench.keys.recoveries("a"), bench.keys.counted()] {
        let ttl = bench.ttl(&key);
        assert!(ttl > 71 * 3_600_000 && ttl <= 72 * 3_600_000, "{key}: {ttl}");
    }
    let told = done.only();
    assert_eq!(
        (told.end, told.reason, told.recoveries, told.payload.as_deref()),
        (End::Requeued, None, 1, Some(&job("a")[..]))
    );
    assert!(told.at_ms > 1_700_000_000_000);
    assert_eq!((done.report.requeued, stat(&bench.server, "requeued")), (1, 1));
    let line = &journal(&bench.server)[0];
    assert_eq!(
        (line.outcome.as_str(), line.reason.as_str(), line.recoveries),
        ("requeued", "", 1)
    );
    assert_at_rest(&bench.server);
}

#[test]
fn a_window_of_its_own_and_a_name_for_what_has_no_id() {
    let mut bench = Bench::start();
    bench.policy.recovery_window = Duration::from_secs(60);
    bench.policy.track_all = true;
    bench.recover_one(b"no json");
    let name = payload::counted_as(&payload::Facts::default(), b"no json");
    assert_eq!(bench.count(&name), Some(1));
    let ttl = bench.ttl(&keys().recoveries(&name));
    assert!(ttl > 50_000 && ttl <= 60_000);
}

#[test]
fn what_goes_back_for_the_fourth_time_is_a_poison_pill() {
    let mut bench = Bench::start();
    for times in 1..=3 {
        let done = bench.recover_one(&job("pill"));
        assert_eq!((done.only().end, done.only().recoveries), (End::Requeued, times));
        assert_eq!(bench.queue(), [job("pill")]);
        let () = bench.connection.del("queue:work").unwrap();
    }
    let done = bench.recover_one(&job("pill"));
    let told = done.only();
    assert_eq!(
        (told.end, told.reason, told.recoveries),
        (End::Dead, Some(Reason::PoisonPill), 4)
    );
    assert_eq!(told.payload.as_deref(), Some(&job("pill")[..]));
    assert_eq!(bench.count("pill"), None);
    assert!(bench.queue().is_empty());
    let dead = bench.dead_set();
    assert_eq!(dead.len(), 1);
    let entry = json(&dead[0].0);
    assert_eq!(entry["error_class"], "Sidekiq::ProcessingTracker::PoisonPill");
    let message = entry["error_message"].as_str().unwrap();
    assert!(
        message.starts_with("Orphaned 4 times, each within 72 h of the one before, the last time by the death of dead"),
        "{message}"
    );
    let failed_at = entry["failed_at"].as_f64().unwrap();
    assert!((failed_at - dead[0].1).abs() < 20.0 && failed_at > 1.7e9);
    assert_eq!(
        (entry["jid"].as_str(), entry["queue"].as_str()),
        (Some("pill"), Some("work"))
    );
    assert_eq!((stat(&bench.server, "requeued"), stat(&bench.server, "dead")), (3, 1));
    let line = journal(&bench.server).pop().unwrap();
    assert_eq!(
        (line.outcome.as_str(), line.reason.as_str(), line.recoveries),
        ("dead", "poison_pill", 4)
    );
    assert_at_rest(&bench.server);
}

#[test]
fn limits_of_one_none_and_no_limit() {
    let mut bench = Bench::start();
    bench.policy.max_recoveries = Some(0);
    assert_eq!(bench.recover_one(&job("a")).only().end, End::Dead);
    bench.policy.max_recoveries = Some(1);
    assert_eq!(bench.recover_one(&job("b")).only().end, End::Requeued);
    assert_eq!(bench.recover_one(&job("b")).only().end, End::Dead);
    bench.policy.max_recoveries = None;
    bench.set_count("c", 1_000_000);
    assert_eq!(bench.recover_one(&job("c")).only().recoveries, 1_000_001);
    assert_eq!(bench.count("c"), Some(1_000_001));
}

#[test]
fn a_job_that_forbids_it_does_not_enter_the_dead_set() {
    let mut bench = Bench::start();
    bench.set_count("a", 3);
    let payload = br#"{"jid":"a","class":"A","processing":true,"dead":false}"#;
    let done = bench.recover_one(payload);
    let told = done.only();
    assert_eq!((told.end, told.reason), (End::Discarded, Some(Reason::PoisonPill)));
    assert_eq!(told.payload.as_deref(), Some(&payload[..]));
    assert_eq!(
        (bench.dead_set().len(), bench.queue().len(), bench.count("a")),
        (0, 0, None)
    );
    assert_eq!((stat(&bench.server, "discarded"), done.report.discarded), (1, 1));
    assert_eq!(journal(&bench.server)[0].outcome, "discarded");
    assert_at_rest(&bench.server);
}

// --- what was not marked ---

#[test]
fn only_what_was_marked_goes_back_where_all_is_in_flight() {
    let mut bench = Bench::start();
    let by_class = br#"{"jid":"by class","class":"Marked"}"#.to_vec();
    let wrapped = br#"{"jid":"wrapped","class":"Wrapper","wrapped":"Other"}"#.to_vec();
    let no = br#"{"jid":"no","class":"Marked","processing":false}"#.to_vec();
    let raw = b"{\"jid\":\"cut".to_vec();
    let info = [
        ("track", "marked"),
        ("fetch", "native"),
        ("marked:Marked", "1"),
        ("marked:Other", "1"),
    ];
    bench.dead_with(
        "dead",
        &info,
        &[
            job("by payload"),
            by_class,
            wrapped,
            unmarked("unmarked"),
            no,
            raw.clone(),
        ],
    );
    let done = bench.recover("dead");
    let ends = done.ends();
    for jid in ["by payload", "by class", "wrapped"] {
        assert_eq!(ends[jid], End::Requeued, "{jid}");
    }
    let reasons: HashMap<String, Reason> = done
        .settled
        .iter()
        .filter_map(|one| Some((one.jid.clone().unwrap_or_default(), one.reason?)))
        .collect();
    let expected = [
        ("unmarked", Reason::Unmarked),
        ("no", Reason::Unmarked),
        ("", Reason::Unreadable),
    ];
    assert_eq!(reasons, expected.map(|(jid, reason)| (jid.to_owned(), reason)).into());
    let dead: Vec<Vec<u8>> = bench.dead_set().into_iter().map(|(entry, _)| entry).collect();
    assert!(dead.contains(&raw));
    let entry = dead
        .iter()
        .find(|entry| entry.starts_with(&unmarked("unmarked")[..40]))
        .unwrap();
    let entry = json(entry);
    assert_eq!(entry["error_class"], "Sidekiq::ProcessingTracker::Orphaned");
    assert!(entry["error_message"].as_str().unwrap().contains("was not marked"));
    assert_eq!((done.report.dead, stat(&bench.server, "dead")), (3, 3));
    assert_at_rest(&bench.server);
}

#[test]
fn all_goes_back_where_all_is_tracked_or_only_marked_jobs_are_recorded() {
    let payloads = [unmarked("a"), b"no json".to_vec(), br#"{"processing":false}"#.to_vec()];
    let goes_back = |info: &[(&str, &str)], track_all: bool| {
        let mut bench = Bench::start();
        bench.policy.track_all = track_all;
        bench.dead_with("dead", info, &payloads);
        let done = bench.recover("dead");
        assert_eq!(done.settled.len(), 3);
        let all = bench.queue() == payloads;
        assert_eq!(all, bench.dead_set().is_empty(), "{info:?}: {done:?}");
        all
    };
    assert!(goes_back(&[("track", "all"), ("fetch", "native")], false));
    assert!(goes_back(&[("track", "marked"), ("fetch", "sidekiq")], false));
    assert!(goes_back(&[("hostname", "an older version")], false));
    assert!(goes_back(&[("track", "marked"), ("fetch", "native")], true));
    assert!(!goes_back(&[("track", "marked"), ("fetch", "native")], false));
}

// --- decisions for another count ---

#[test]
fn two_tokens_of_one_job_are_not_decided_at_one_count() {
    let mut bench = Bench::start();
    bench.policy.max_recoveries = Some(1);
    bench.dead("dead", &[job("a"), job("a")]);
    let done = bench.recover("dead");
    let ends: Vec<End> = done.settled.iter().map(|one| one.end).collect();
    assert_eq!(ends, [End::Requeued, End::Dead]);
    assert_eq!((bench.queue().len(), bench.dead_set().len()), (1, 1));
    assert_at_rest(&bench.server);
}

fn orphan(token: &Token, payload: &[u8], decision: Decision, count: u64) -> Orphan {
    let facts = payload::read(payload);
    Orphan {
        token: token.clone(),
        counted_as: payload::counted_as(&facts, payload),
        facts,
        count: Some(count),
        decision,
        entry: payload.to_vec(),
    }
}

impl Bench {
    #[track_caller]
    fn call(&mut self, piece: &str, own: bool, orphans: &[Orphan]) -> Option<Vec<Outcome>> {
        let settlement = Settlement {
            from: b"dead",
            by: "reaper",
            pace: PACE,
            hold: HOLD,
            piece,
            own,
            rest: None,
            policy: &self.policy.clone(),
            sidekiq_identity: None,
            indexes: &[],
        };
        let settled = scripts::recover(&mut self.link, &self.keys, &settlement, orphans).unwrap()?;
        assert!(settled.noted);
        Some(settled.outcomes)
    }

    /// Everything but the lease clock and the leases on it.
    fn everything(&mut self) -> BTreeMap<String, Vec<u8>> {
        let names: Vec<String> = self.connection.keys("*").unwrap();
        let names = names
            .into_iter()
            .filter(|name| !name.ends_with(":clock") && !name.ends_with(":instances"));
        let mut all = BTreeMap::new();
        for name in names {
            let value = redis::cmd("DUMP").arg(&name).query(&mut self.connection).unwrap();
            all.insert(name, value);
        }
        all
    }
}

#[test]
fn orphans_of_several_queues_each_go_back_in_their_order_and_a_stuck_queue_holds_up_its_own_alone() {
    let mut bench = Bench::start();
    let names = ["a1", "a2", "b1", "stuck1", "stuck2", "b2", "a3"];
    let payloads: Vec<Vec<u8>> = names.map(job).into();
    bench.register("dead", &[("track", "marked"), ("fetch", "native")]);
    let queue_of = |name: &str| name.trim_end_matches(char::is_numeric).as_bytes().to_vec();
    let records = names
        .iter()
        .zip(&payloads)
        .map(|(name, payload)| (queue_of(name), payload[..].into()));
    let turn = Turn {
        records: records.collect(),
        ..Turn::default()
    };
    let tokens = bench.turn("dead", turn);
    bench.pass(PACE.ttl + PACE.step);
    scripts::reap(&mut bench.link, &bench.keys, PACE, b"dead", "reaper", HOLD, None).unwrap();
    let () = bench.connection.set("queue:stuck", "no list").unwrap();
    let orphans: Vec<Orphan> = tokens
        .iter()
        .zip(&payloads)
        .map(|(token, payload)| orphan(token, payload, Decision::Requeue, 0))
        .collect();
    let done = Outcome::Ended(End::Requeued);
    let stuck = Outcome::Stuck;
    assert_eq!(
        bench.call("piece", false, &orphans).unwrap(),
        [done, done, done, stuck, stuck, done, done]
    );
    // The last one comes first: each was pushed to the end that Sidekiq takes from.
    assert_eq!(queue(&bench.server, "a"), ["a3", "a2", "a1"].map(job));
    assert_eq!(queue(&bench.server, "b"), ["b2", "b1"].map(job));
    assert_eq!(
        ["a1", "b2", "stuck1"].map(|name| bench.count(name)),
        [Some(1), Some(1), None]
    );
    let left: BTreeSet<Vec<u8>> = bench.connection.hvals(bench.keys.inflight("dead")).unwrap();
    assert_eq!(left, ["stuck1", "stuck2"].map(job).into());
}

#[test]
fn a_call_that_is_sent_again_does_nothing_and_tells_what_it_did() {
    let mut bench = Bench::start();
    let payloads: Vec<Vec<u8>> = ["back", "last", "dead", "gone", "beaten", "elsewhere", "again"]
        .map(job)
        .into();
    let locked = br#"{"jid":"beaten","lock":"until_executed","lock_digest":"uniquejobs:x"}"#;
    let () = bench.connection.hset("uniquejobs:x:LOCKED", "other", "1").unwrap();
    let () = bench.connection.hset("uniquejobs:x:RUN:LOCKED", "beaten", "1").unwrap();
    bench.set_count("again", 2);
    bench.set_count("last", 1);
    let tokens = bench.dead("dead", &payloads);
    let reaped = scripts::reap(&mut bench.link, &bench.keys, PACE, b"dead", "reaper", HOLD, None).unwrap();
    assert!(matches!(reaped, scripts::Reaped::Fenced(_)));
    let orphans = [
        orphan(&tokens[0], &payloads[0], Decision::Requeue, 0),
        orphan(&tokens[1], &payloads[1], Decision::RequeueLast, 1),
        orphan(&tokens[2], &payloads[2], Decision::Kill(Reason::PoisonPill), 0),
        orphan(&tokens[3], &payloads[3], Decision::Discard(Reason::Unmarked), 0),
        orphan(&tokens[4], locked, Decision::Requeue, 0),
        orphan(&tokens[5], &payloads[5], Decision::Requeue, 0),
        orphan(&tokens[6], &payloads[6], Decision::Requeue, 0),
    ];
    let elsewhere = bench.call("another", false, &orphans[5..6]).unwrap();
    assert_eq!(elsewhere, [Outcome::Ended(End::Requeued)]);

    let first = bench.call("piece", false, &orphans).unwrap();
    let ends = [End::Requeued, End::Requeued, End::Dead, End::Discarded, End::Superseded];
    let mut expected: Vec<Outcome> = ends.map(Outcome::Ended).into();
    expected.extend([Outcome::Gone, Outcome::Again(2)]);
    assert_eq!(first, expected);
    assert!(!bench.exists("uniquejobs:x:RUN:LOCKED") && bench.exists("uniquejobs:x:LOCKED"));
    assert_eq!(bench.queue(), [job("back"), job("elsewhere"), job("last")]);

    let after = bench.everything();
    let mut expected: Vec<Outcome> = ends.map(Outcome::EndedBefore).into();
    expected.extend([Outcome::Gone, Outcome::Again(2)]);
    assert_eq!(bench.call("piece", false, &orphans), Some(expected));
    assert_eq!(bench.everything(), after);

    // Decided anew.
    let anew = [orphan(&tokens[6], &payloads[6], Decision::RequeueLast, 2)];
    assert_eq!(
        bench.call("next", false, &anew),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert_eq!(bench.count("again"), Some(3));
    let journal_entries: Vec<redis::Value> = redis::cmd("XRANGE")
        .arg(bench.keys.journal())
        .arg("-")
        .arg("+")
        .query(&mut bench.connection)
        .unwrap();
    assert_eq!(journal_entries.len(), 3);
    // A late copy of the first, after all is over.
    let after = bench.everything();
    bench.call("piece", false, &orphans);
    assert_eq!(bench.everything(), after);
}

// --- suspects leave one at a time ---

#[test]
fn suspects_leave_one_at_a_time_and_behind_all_others() {
    let mut bench = Bench::start();
    let () = bench.connection.lpush("queue:work", "waits").unwrap();
    for jid in ["s1", "s2", "s3"] {
        bench.set_count(jid, 1);
    }
    bench.set_count("t", 2);
    bench.dead("dead", &["s1", "new", "s2", "t", "s3"].map(job));

    let done = bench.recover("dead");
    assert_eq!(done.only().jid.as_deref(), Some("new"));
    bench.wait(done.report.rest.unwrap());
    let done = bench.recover("dead");
    assert_eq!(done.only().recoveries, 2);
    let rest = done.report.rest.unwrap();
    assert!(
        rest > Duration::from_millis(1500) && rest <= Duration::from_secs(2),
        "{rest:?}"
    );
    let (lease_end, now) = (bench.lease_end("dead").unwrap(), bench.now());
    assert!(
        lease_end > now + 1400.0 && lease_end <= now + 2000.0,
        "{lease_end} {now}"
    );
    let back = bench.queue();
    assert_eq!(back[..2], [job("new"), b"waits".to_vec()]);
    assert_eq!(back.len(), 3);

    // Too early, for this reaper and for another one.
    let early = bench.recover("dead");
    assert!(early.settled.is_empty());
    assert!(scripts::due(&mut bench.link, &bench.keys, PACE).unwrap().is_empty());

    for expected in [4, 5] {
        bench.pass(Duration::from_secs(2));
        let due = scripts::due(&mut bench.link, &bench.keys, PACE).unwrap();
        assert_eq!(due, [b"dead".to_vec()]);
        let done = bench.recover("dead");
        assert_eq!(done.only().recoveries, 2);
        assert_eq!(bench.queue().len(), expected);
    }
    // The one that was orphaned more often comes last, after a longer pause.
    bench.pass(Duration::from_secs(2));
    let done = bench.recover("dead");
    assert!(done.settled.is_empty());
    assert!(
        done.report.rest.unwrap() > Duration::from_secs(12),
        "{:?}",
        done.report.rest
    );
    bench.pass(Duration::from_secs(13));
    assert_eq!(bench.recover("dead").only().jid.as_deref(), Some("t"));
    assert_eq!(bench.queue().last(), Some(&job("t")));
    assert_eq!(bench.lease_end("dead"), None);
    assert_at_rest(&bench.server);
}

#[test]
fn also_a_lone_suspect_waits_longer_each_time_and_never_as_long_as_another() {
    let mut bench = Bench::start();
    bench.policy.max_recoveries = None;
    for (count, pause) in [(1, 1), (2, 2), (3, 4), (1_000, 4)] {
        let mut rests = BTreeSet::new();
        for i in 0..20 {
            bench.set_count("a", count);
            let identity = format!("dead{count}.{i}");
            bench.dead(&identity, &[job("a")]);
            let began = std::time::Instant::now();
            let done = bench.recover(&identity);
            let rest = done.report.rest.unwrap();
            assert!(done.settled.is_empty());
            let pause = Duration::from_secs(pause);
            assert!(
                rest + began.elapsed() >= pause / 2 && rest <= pause * 3 / 2,
                "{count}: {rest:?}"
            );
            rests.insert(rest.as_millis() / 10);
            // Who asks in between finds the rest of the same pause.
            bench.pass(rest / 2);
            let early = bench.recover(&identity);
            assert!(early.settled.is_empty());
            let left = early.report.rest.unwrap();
            assert!(left <= rest - rest / 2 + PACE.step / 10, "{left:?} of {rest:?}");
            bench.wait(rest - rest / 2);
            assert_eq!(bench.recover(&identity).only().recoveries, count + 1);
        }
        assert!(rests.len() > 10, "{count}: {rests:?}");
    }
    assert_at_rest(&bench.server);
}

#[test]
fn many_suspects_have_all_left_after_a_minute() {
    let mut bench = Bench::start();
    let all = jobs(300);
    for i in 0..300 {
        bench.set_count(&format!("j{i}"), 1);
    }
    bench.dead("dead", &all);
    let mut passes = 0;
    while bench.lease_end("dead").is_some() {
        bench.recover("dead");
        bench.pass(Duration::from_secs(5));
        passes += 1;
        assert!(passes <= 14, "{} of 300", bench.queue().len());
    }
    assert!(passes >= 12, "{passes}");
    let back: BTreeSet<Vec<u8>> = bench.queue().into_iter().collect();
    assert_eq!(back, all.into_iter().collect());
    assert_at_rest(&bench.server);
}

#[test]
fn a_console_waits_for_the_suspects() {
    let mut bench = Bench::start();
    bench.set_count("a", 1);
    bench.set_count("b", 1);
    bench.dead("dead", &[job("a"), job("b")]);
    let recovered = recover_all(&settings(&bench.server.socket_path(), "console")).unwrap();
    assert_eq!(recovered.requeued, 2);
    assert_eq!(bench.queue().len(), 2);
    assert_at_rest(&bench.server);
}

/// Processes one after the other, on a clock that this test moves: one job kills its process, nine take 2 s.
struct Fleet {
    bench: Bench,
    pill_after: u64,
    boot: u64,
    time: u64,
    process: Option<Process>,
    next_at: u64,
    processes: u64,
    seed: u64,
    finished: BTreeMap<String, u64>,
}

struct Process {
    identity: String,
    /// Token, id, and when it ends.
    threads: Vec<(Token, String, u64)>,
}

impl Fleet {
    const TICK: u64 = 100;

    fn tick(&mut self) {
        self.time += Self::TICK;
        self.bench.pass(Duration::from_millis(Self::TICK));
        let Some(mut process) = self.process.take() else {
            if self.time >= self.next_at {
                self.processes += 1;
                let identity = format!("p{}:{}", self.processes, self.seed);
                self.bench
                    .register(&identity, &[("track", "marked"), ("fetch", "native")]);
                self.process = Some(Process {
                    identity,
                    threads: Vec::new(),
                });
            }
            return;
        };
        let beat = scripts::beat(
            &mut self.bench.link,
            &self.bench.keys,
            &process.identity,
            PACE,
            false,
            None,
        )
        .unwrap();
        assert!(matches!(beat, Fenced::Alive(_)));
        while process.threads.len() < 10 {
            let taken: Option<Vec<u8>> = self.bench.connection.rpop("queue:work", None).unwrap();
            let Some(payload) = taken else { break };
            let token = self
                .bench
                .record(&process.identity, std::slice::from_ref(&payload))
                .remove(0);
            let jid = payload::read(&payload).jid.unwrap();
            let takes = if jid == "j0" { self.pill_after } else { 2000 };
            process.threads.push((token, jid, self.time + takes));
        }
        let time = self.time;
        if process.threads.iter().any(|(_, jid, end)| jid == "j0" && *end <= time) {
            self.next_at = self.time + self.boot;
            return;
        }
        let done: Vec<_> = process.threads.extract_if(.., |(_, _, end)| *end <= time).collect();
        for (token, jid, _) in done {
            let acks = vec![token];
            self.bench.turn(
                &process.identity,
                Turn {
                    acks,
                    ..Turn::default()
                },
            );
            let () = self.bench.connection.del(self.bench.keys.recoveries(&jid)).unwrap();
            *self.finished.entry(jid).or_default() += 1;
        }
        while let Some(due) = scripts::due(&mut self.bench.link, &self.bench.keys, PACE)
            .unwrap()
            .pop()
        {
            self.bench.run(Recovery::new(due));
        }
        self.process = Some(process);
    }
}

#[test]
fn a_pill_among_nine_jobs_is_the_only_one_to_die() {
    for seed in 0..16 {
        let mut fleet = Fleet {
            bench: Bench::start(),
            pill_after: [0, 300, 1000, 1900][seed % 4],
            boot: [500, 3000, 10_000, 1000][seed / 4],
            time: 0,
            process: None,
            next_at: 0,
            processes: 0,
            seed: seed as u64,
            finished: BTreeMap::new(),
        };
        for job in jobs(10) {
            let () = fleet.bench.connection.lpush("queue:work", job).unwrap();
        }
        while fleet.finished.len() < 9 || fleet.bench.dead_set().is_empty() {
            fleet.tick();
            assert!(fleet.time < 300_000, "seed {seed}: {:?}", fleet.finished);
        }
        let dead = fleet.bench.dead_set();
        assert_eq!(dead.len(), 1, "seed {seed}: {dead:?}");
        assert_eq!(json(&dead[0].0)["jid"], "j0");
        let once: BTreeMap<String, u64> = (1..10).map(|i| (format!("j{i}"), 1)).collect();
        assert_eq!(fleet.finished, once, "seed {seed}");
        assert!(fleet.bench.queue().is_empty());
    }
}

// --- jobs of its own that nobody runs any more ---

#[test]
fn a_live_instance_settles_what_its_threads_have_dropped() {
    let mut bench = Bench::start();
    bench.register("me", &[("track", "marked"), ("fetch", "native")]);
    bench.set_count("pill", 3);
    bench.set_count("first", 1);
    bench.set_count("second", 1);
    let payloads = [
        job("new"),
        job("pill"),
        unmarked("unmarked"),
        unmarked("untouched"),
        job("first"),
        job("second"),
        job("runs"),
    ];
    let tokens = bench.record("me", &payloads);
    let dropped = |tokens: &[Token]| -> Vec<Dropped> {
        tokens
            .iter()
            .map(|token| Dropped {
                token: token.clone(),
                ran: *token != tokens[3],
                waited: false,
            })
            .collect()
    };
    let lease_end = bench.lease_end("me");
    let done = bench.run(Recovery::own("me", dropped(&tokens[..6])));
    let ends = done.ends();
    let expected = [
        ("new", End::Requeued),
        ("pill", End::Dead),
        ("unmarked", End::Dead),
        ("untouched", End::Requeued),
    ];
    assert_eq!(ends, expected.map(|(jid, end)| (jid.to_owned(), end)).into());
    assert_eq!((bench.count("new"), bench.count("untouched")), (Some(1), None));
    let mut waiting = done.report.waiting.clone();
    assert_eq!(waiting.len(), 2);
    assert_eq!(waiting[1].1 - waiting[0].1, Duration::from_secs(2));
    assert!(
        waiting[0].1 >= Duration::from_millis(500) && waiting[0].1 <= Duration::from_millis(1500),
        "{waiting:?}"
    );
    assert_eq!(bench.lease_end("me"), lease_end);

    waiting.sort_by_key(|(token, _)| *token != tokens[4]);
    let waited: Vec<Dropped> = waiting
        .into_iter()
        .map(|(token, _)| Dropped {
            token,
            ran: true,
            waited: true,
        })
        .collect();
    for (waited, jid) in waited.iter().zip(["first", "second"]) {
        let done = bench.run(Recovery::own("me", vec![waited.clone()]));
        assert_eq!(done.only().jid.as_deref(), Some(jid));
    }
    let left: Vec<Vec<u8>> = bench.connection.hkeys(bench.keys.inflight("me")).unwrap();
    let mut expected = vec![b"call".to_vec(), tokens[6].as_bytes().to_vec()];
    expected.sort();
    let mut left = left;
    left.sort();
    assert_eq!(left, expected);
    assert!(matches!(
        scripts::beat(&mut bench.link, &bench.keys, "me", PACE, false, None).unwrap(),
        Fenced::Alive(_)
    ));

    // Fenced: others do that.
    bench.pass(PACE.ttl + PACE.step);
    scripts::reap(&mut bench.link, &bench.keys, PACE, b"me", "reaper", HOLD, None).unwrap();
    let before = bench.everything();
    assert!(bench.run(Recovery::own("me", waited)).report.idle);
    assert_eq!(bench.everything(), before);
}

// --- Sidekiq's dead set ---

#[test]
fn the_dead_set_keeps_to_its_limits_and_says_so() {
    let mut bench = Bench::start();
    bench.policy.dead_max_jobs = 3;
    bench.policy.dead_timeout = DAY;
    bench.policy.timestamps = Timestamps::Milliseconds;
    let now = support::redis_server::unix_now() as f64;
    for (member, age) in [("too old", 100_000.0), ("old", 3.0), ("newer", 2.0), ("newest", 1.0)] {
        let () = bench.connection.zadd("dead", member, now - age).unwrap();
    }
    let done = bench.recover_one(&unmarked("a"));
    let entries = bench.dead_set();
    assert_eq!(entries.len(), 3);
    assert_eq!((&entries[0].0[..], &entries[1].0[..]), (&b"newer"[..], &b"newest"[..]));
    assert!(json(&entries[2].0)["failed_at"].as_u64().unwrap() > 1_700_000_000_000);
    assert_eq!(done.warnings.len(), 1, "{:?}", done.warnings);
    assert!(done.warnings[0].contains("entries lost: 2"), "{:?}", done.warnings);

    bench.policy.dead_max_jobs = 1;
    bench.recover_one(&unmarked("b"));
    assert_eq!(bench.dead_set().len(), 1);
    assert_eq!(json(&bench.dead_set()[0].0)["jid"], "b");
    bench.policy.dead_max_jobs = 5;
    assert_eq!(bench.recover_one(&unmarked("c")).warnings, Vec::<String>::new());
}

// --- keys that somebody else has written ---

#[test]
fn overwritten_keys_stop_only_what_needs_them() {
    let mut bench = Bench::start();
    let () = bench.connection.set("dead", "not a set").unwrap();
    let () = bench.connection.hset(bench.keys.recoveries("a"), "x", "y").unwrap();
    let () = bench.connection.set(bench.keys.recoveries("b"), "many").unwrap();
    let () = bench.connection.sadd(bench.keys.counted(), "x").unwrap();
    bench.dead("dead", &[job("a"), job("b"), unmarked("stuck")]);
    let () = bench.connection.set("queues", "not a set").unwrap();
    let done = bench.recover("dead");
    assert_eq!((done.report.requeued, done.report.stuck), (2, 1));
    assert_eq!((bench.count("a"), bench.count("b")), (Some(1), Some(1)));
    let () = bench.connection.del("dead").unwrap();
    bench.pass(PACE.step * 2);
    assert_eq!(bench.recover("dead").only().end, End::Dead);

    // Its info: all goes back, and the pauses come to an end.
    bench.set_count("c", 1);
    bench.set_count("d", 1);
    bench.dead("other", &[job("c"), job("d"), unmarked("e")]);
    let () = bench.connection.del(bench.keys.info("other")).unwrap();
    let () = bench.connection.set(bench.keys.info("other"), "not a hash").unwrap();
    assert_eq!(bench.recover("other").report.requeued, 1);
    for _ in 0..2 {
        bench.pass(Duration::from_secs(3));
        assert_eq!(bench.recover("other").report.requeued, 1);
    }
    let () = bench.connection.del("queues").unwrap();
    assert_at_rest(&bench.server);
}

#[test]
fn a_full_redis_settles_all_the_same() {
    let mut bench = Bench::on(Options::default().maxmemory("100mb").start());
    let locked = br#"{"jid":"l","processing":true,"lock":"until_and_while_executing","lock_digest":"uniquejobs:x"}"#;
    bench.set_count("pill", 3);
    bench.dead("dead", &[job("a"), job("pill"), locked.to_vec()]);
    bench.server.config_set("maxmemory", "1mb");
    let refused: redis::RedisResult<()> = bench.connection.set("x", "x");
    assert!(refused.is_err());
    let done = bench.recover("dead");
    assert_eq!((done.report.requeued, done.report.dead), (2, 1));
    assert!(bench.exists("uniquejobs:x:LOCKED"));
    let freed = scripts::clear_unique_lock(&mut bench.link, "uniquejobs:x", None).unwrap();
    assert!(freed && bench.unique_keys().is_empty());
}

// --- unique locks ---

fn locked(jid: &str, kind: &str, more: &str) -> Vec<u8> {
    format!(r#"{{"jid":"{jid}","class":"A","processing":true,"lock":"{kind}","lock_digest":"uniquejobs:x"{more}}}"#)
        .into_bytes()
}

impl Bench {
    /// Somebody holds the lock, as sidekiq-unique-jobs 7 and 8 write it.
    fn hold(&mut self, name: &str, jid: &str) {
        let () = self.connection.set(name, jid).unwrap();
        let () = self
            .connection
            .hset(format!("{name}:LOCKED"), jid, "1700000000.5")
            .unwrap();
        let () = self.connection.zadd("uniquejobs:digests", name, 5).unwrap();
    }

    fn holders(&mut self, name: &str) -> Vec<String> {
        let mut holders: Vec<String> = self.connection.hkeys(format!("{name}:LOCKED")).unwrap();
        holders.sort();
        holders
    }

    fn indexed(&mut self) -> Vec<String> {
        self.connection.zrange("uniquejobs:digests", 0, -1).unwrap()
    }

    fn lock_noted(&self) -> String {
        journal(&self.server).pop().unwrap().lock
    }
}

const X: &str = "uniquejobs:x";
const RUN: &str = "uniquejobs:x:RUN";

#[test]
fn until_and_while_executing_takes_its_lock_again() {
    let mut bench = Bench::start();
    bench.hold(RUN, "a");
    let done = bench.recover_one(&locked("a", "until_and_while_executing", r#","lock_ttl":60"#));
    assert_eq!(done.only().end, End::Requeued);
    assert_eq!(
        (bench.holders(X), bench.holders(RUN)),
        (vec!["a".to_owned()], vec!["a".to_owned()])
    );
    assert_eq!(bench.connection.get(X), Ok("a".to_owned()));
    assert_eq!(bench.indexed(), [RUN, X]);
    for key in [X, "uniquejobs:x:LOCKED"] {
        let ttl = bench.ttl(key);
        assert!(ttl > 50_000 && ttl <= 60_000, "{key}: {ttl}");
    }
    assert_eq!(bench.lock_noted(), "taken");

    // Once more: it holds it.
    bench.recover_one(&locked("a", "until_and_while_executing", ""));
    assert_eq!(
        (bench.holders(X), bench.lock_noted()),
        (vec!["a".to_owned()], String::new())
    );
}

#[test]
fn the_string_beside_the_lock_is_left_to_the_versions_that_have_it() {
    let mut bench = Bench::start();
    let () = bench.connection.hset("uniquejobs:x:RUN:LOCKED", "a", "{}").unwrap();
    bench.recover_one(&locked("a", "until_and_while_executing", ""));
    assert_eq!(bench.holders(X), ["a"]);
    assert!(!bench.exists(X));
    assert_eq!(bench.ttl("uniquejobs:x:LOCKED"), -1);
}

#[test]
fn until_and_while_executing_gives_way_to_a_duplicate() {
    let mut bench = Bench::start();
    bench.hold(X, "other");
    bench.hold(RUN, "a");
    let done = bench.recover_one(&locked("a", "until_and_while_executing", ""));
    let told = done.only();
    assert_eq!((told.end, told.reason, told.recoveries), (End::Superseded, None, 1));
    assert_eq!(bench.holders(X), ["other"]);
    assert_eq!(bench.unique_keys(), ["uniquejobs:digests", X, "uniquejobs:x:LOCKED"]);
    assert_eq!(bench.indexed(), [X]);
    assert!(bench.queue().is_empty());
    assert_eq!(
        (bench.lock_noted().as_str(), stat(&bench.server, "superseded")),
        ("given up", 1)
    );
    assert_at_rest(&bench.server);
}

#[test]
fn a_limit_of_two_leaves_room_for_one_more() {
    let mut bench = Bench::start();
    bench.hold(X, "other");
    let two = r#","lock_limit":2"#;
    let done = bench.recover_one(&locked("a", "until_and_while_executing", two));
    assert_eq!(
        (done.only().end, bench.holders(X)),
        (End::Requeued, vec!["a".into(), "other".into()])
    );
    let done = bench.recover_one(&locked("b", "until_and_while_executing", two));
    assert_eq!(
        (done.only().end, bench.holders(X)),
        (End::Superseded, vec!["a".into(), "other".into()])
    );
    let done = bench.recover_one(&locked("b", "until_executed", two));
    assert_eq!(done.only().end, End::Superseded);
    let done = bench.recover_one(&locked("b", "until_executed", r#","lock_limit":3"#));
    assert_eq!(
        (done.only().end, bench.holders(X)),
        (End::Requeued, vec!["a".into(), "other".into()])
    );
}

#[test]
fn a_lock_that_is_kept_or_free_is_not_touched() {
    for kind in [
        "until_executed",
        "until_expired",
        "while_executing",
        "until_executing",
        "its own",
        "",
    ] {
        let mut bench = Bench::start();
        bench.hold(X, "a");
        bench.hold(RUN, "a");
        let before: Vec<String> = bench.unique_keys();
        assert_eq!(
            bench.recover_one(&locked("a", kind, "")).only().end,
            End::Requeued,
            "{kind}"
        );
        assert_eq!(
            (bench.unique_keys(), bench.holders(X), bench.holders(RUN)),
            (before, vec!["a".into()], vec!["a".into()])
        );
        assert_eq!(bench.lock_noted(), "");

        let mut bench = Bench::start();
        assert_eq!(
            bench.recover_one(&locked("a", kind, "")).only().end,
            End::Requeued,
            "{kind}"
        );
        assert!(bench.unique_keys().is_empty());

        // Another one has it.
        let mut bench = Bench::start();
        bench.hold(X, "other");
        let end = bench.recover_one(&locked("a", kind, "")).only().end;
        let gives_way = ["until_executed", "until_expired"].contains(&kind);
        assert_eq!(end == End::Superseded, gives_way, "{kind}");
        assert_eq!(bench.holders(X), ["other"]);
    }
}

#[test]
fn what_does_not_go_back_gives_up_all_it_holds_and_nothing_else() {
    for forbids in ["", r#","dead":false"#] {
        let mut bench = Bench::start();
        bench.hold(X, "a");
        bench.hold(RUN, "a");
        let () = bench.connection.rpush("uniquejobs:x:QUEUED", "a").unwrap();
        let () = bench.connection.set("uniquejobs:x:INFO", "{}").unwrap();
        let () = bench.connection.zadd("uniquejobs:expiring_digests", X, 5).unwrap();
        bench.set_count("a", 3);
        let done = bench.recover_one(&locked(
            "a",
            "until_executed",
            &format!(r#","lock_digest":"uniquejobs:x:RUN"{forbids}"#),
        ));
        assert_ne!(done.only().end, End::Requeued);
        assert_eq!(bench.unique_keys(), Vec::<String>::new());

        bench.hold(RUN, "other");
        bench.hold(X, "other");
        bench.hold(X, "a");
        let () = bench.connection.rpush("uniquejobs:x:PRIMED", &["other", "a"]).unwrap();
        let () = bench.connection.set("uniquejobs:x:INFO", "{}").unwrap();
        bench.set_count("a", 3);
        bench.recover_one(&locked("a", "until_executed", &format!(r#","lock_limit":2{forbids}"#)));
        assert_eq!(
            (bench.holders(X), bench.holders(RUN)),
            (vec!["other".into()], vec!["other".into()])
        );
        assert!(bench.exists("uniquejobs:x:INFO"));
        assert_eq!(
            bench.connection.lrange("uniquejobs:x:PRIMED", 0, -1),
            Ok(vec!["other".to_owned()])
        );
        assert_eq!(bench.indexed(), [X, RUN]);
    }
}

#[test]
fn a_lock_that_cannot_be_settled_stops_nothing() {
    for decided in ["requeue", "dead"] {
        let mut bench = Bench::start();
        let () = bench.connection.set("uniquejobs:x:LOCKED", "not a hash").unwrap();
        if decided == "dead" {
            bench.set_count("a", 3);
        }
        let done = bench.recover_one(&locked("a", "until_and_while_executing", ""));
        assert_eq!(done.only().end == End::Dead, decided == "dead");
        assert_eq!(
            (done.report.unsettled_locks, bench.lock_noted().as_str()),
            (1, "unsettled")
        );
        assert!(done.report.unsettled_locks(b"dead").is_some());
        assert_at_rest(&bench.server);
    }
}

#[test]
fn a_lock_is_freed_on_demand() {
    let mut bench = Bench::start();
    let clear = |bench: &mut Bench, jid: Option<&str>| {
        scripts::clear_unique_lock(&mut bench.link, "uniquejobs:x:RUN", jid).unwrap()
    };
    assert!(!clear(&mut bench, Some("a")));
    bench.hold(X, "other");
    bench.hold(RUN, "a");
    assert!(clear(&mut bench, Some("a")));
    assert_eq!(
        (bench.holders(X), bench.indexed()),
        (vec!["other".to_owned()], vec![X.to_owned()])
    );
    assert!(!clear(&mut bench, Some("a")));
    bench.hold(RUN, "third");
    let () = bench.connection.rpush("uniquejobs:x:QUEUED", "1").unwrap();
    assert!(clear(&mut bench, None));
    assert!(!clear(&mut bench, None));
    assert!(bench.unique_keys().is_empty());
    let () = bench.connection.set("uniquejobs:x:LOCKED", "not a hash").unwrap();
    assert!(scripts::clear_unique_lock(&mut bench.link, X, Some("a")).is_err());
}

// --- what Sidekiq keeps of a process ---

#[test]
fn the_ghost_of_a_dead_process_goes_with_it() {
    const PROCESS: &str = "host:1:abc";
    let forgotten = |in_flight: &[Vec<u8>], lives_for: Option<i64>| {
        let mut bench = Bench::start();
        let () = bench.connection.sadd("processes", &[PROCESS, "another"]).unwrap();
        if let Some(lives_for) = lives_for {
            let () = bench.connection.hset(PROCESS, "beat", "1").unwrap();
            if lives_for >= 0 {
                let () = bench.connection.expire(PROCESS, lives_for).unwrap();
            }
        }
        let () = bench.connection.hset("host:1:abc:work", "thread", "{}").unwrap();
        bench.register("dead", &[("sidekiq_identity", PROCESS), ("fetch", "sidekiq")]);
        if !in_flight.is_empty() {
            bench.record("dead", in_flight);
        }
        bench.pass(PACE.ttl + PACE.step);
        bench.recover("dead");
        assert_at_rest(&bench.server);
        let left: Vec<String> = bench.connection.smembers("processes").unwrap();
        let gone = !bench.exists(PROCESS) && !bench.exists("host:1:abc:work");
        assert_eq!(gone, left == ["another"], "{left:?}");
        gone
    };
    assert!(forgotten(&[job("a")], Some(50)));
    assert!(forgotten(&[], Some(50)));
    assert!(forgotten(&[job("a")], None));
    // It has beaten while its lease ran out; or the hash is not Sidekiq's.
    assert!(!forgotten(&[job("a")], Some(59)));
    assert!(!forgotten(&[], Some(60)));
    assert!(!forgotten(&[job("a")], Some(-1)));
}

#[test]
fn the_ghost_goes_at_once_where_the_process_is_known_to_have_ended_also_with_another_reaper() {
    const PROCESS: &str = "host:1:abc";
    for (process_ended, in_flight, goes) in [
        (true, vec![job("a")], true),
        (true, vec![], true),
        // A promise about a label says nothing of the process.
        (false, vec![job("a")], false),
    ] {
        for dies in [false, true] {
            let mut bench = Bench::start();
            let () = bench.connection.sadd("processes", PROCESS).unwrap();
            // Sidekiq has just beaten.
            let () = bench.connection.hset(PROCESS, "beat", "1").unwrap();
            let () = bench.connection.expire(PROCESS, 60).unwrap();
            bench.register("dead", &[("sidekiq_identity", PROCESS), ("fetch", "sidekiq")]);
            if !in_flight.is_empty() {
                bench.record("dead", &in_flight);
            }
            let proof = Proof {
                lease_end: scripts::lease_end(&mut bench.link, &bench.keys, b"dead")
                    .unwrap()
                    .unwrap(),
                process_ended,
                told: "it is known".into(),
            };
            let reaper = bench.reaper();
            if dies {
                let (keys, proof) = (&reaper.keys, Some(&proof));
                let reaped = scripts::reap(&mut bench.link, keys, PACE, b"dead", "killed", HOLD, proof).unwrap();
                assert!(matches!(reaped, scripts::Reaped::Fenced(_)), "{reaped:?}");
                bench.pass(PACE.step * 2);
                bench.recover("dead");
            } else {
                let mut recovery = Recovery::certain(b"dead".to_vec(), proof);
                while recovery.step(&mut bench.link, &reaper, |_| {}).unwrap() == Progress::More {}
            }
            assert_at_rest(&bench.server);
            let left: Vec<String> = bench.connection.smembers("processes").unwrap();
            assert_eq!(
                (bench.exists(PROCESS), left.is_empty()),
                (!goes, goes),
                "{process_ended} {dies}"
            );
        }
    }
}
