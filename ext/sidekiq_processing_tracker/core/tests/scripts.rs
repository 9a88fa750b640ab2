//! What each script promises, asked of a real Redis, one call at a time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use processing_tracker_core::decision::{Decision, End, Reason};
use processing_tracker_core::entry::Token;
use processing_tracker_core::keys::Keys;
use processing_tracker_core::link::Link;
use processing_tracker_core::payload;
use processing_tracker_core::scripts::{
    self, Beat, Claim, Done, Fenced, Orphan, Outcome, Reaped, Requeue, Settled, Settlement, Turn, Turned,
};
use processing_tracker_core::settings::{Pace, Policy};
use processing_tracker_core::watch;
use processing_tracker_core::{Error, Result};
use redis::{Commands, FromRedisValue, Value};
use support::lua;
use support::redis_server::{Options, RedisServer, USER};
use support::tracker::{assert_at_rest, job, journal, keys, link, queue, stat};

const PACE: Pace = Pace {
    step: Duration::from_secs(1),
    ttl: Duration::from_secs(5),
};
const HOLD: Duration = Duration::from_secs(300);

/// A server and a link to it.
struct Bench {
    server: RedisServer,
    connection: redis::Connection,
    link: Link,
    keys: Keys,
    /// So many calls to recover were made.
    pieces: u64,
}

impl Bench {
    fn start() -> Self {
        Self::on(RedisServer::start())
    }

    fn on(server: RedisServer) -> Self {
        Bench {
            connection: server.connect(),
            link: link(&server),
            keys: keys(),
            pieces: 0,
            server,
        }
    }

    /// A bench on which this instance is registered.
    fn with(identity: &str) -> Self {
        let mut bench = Self::start();
        bench.register(identity);
        bench
    }

    fn register(&mut self, identity: &str) {
        assert_eq!(
            scripts::register(&mut self.link, &self.keys, identity, PACE, &[]).unwrap(),
            PACE
        );
    }

    fn try_turn(&mut self, identity: &str, turn: &Turn) -> Result<Turned> {
        scripts::turn(&mut self.link, &self.keys, identity, turn)
    }

    #[track_caller]
    fn turn(&mut self, identity: &str, turn: &Turn) -> Done {
        match self.try_turn(identity, turn).unwrap() {
            Turned::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    /// Records jobs with a turn of this number.
    #[track_caller]
    fn record(&mut self, identity: &str, call: u64, queue: &str, payloads: &[Vec<u8>]) -> Vec<Token> {
        let turn = Turn {
            call,
            records: payloads.iter().map(|payload| record(queue, payload)).collect(),
            ..Turn::default()
        };
        let tokens = self.turn(identity, &turn).recorded;
        assert_eq!(tokens.len(), payloads.len());
        tokens
    }

    fn try_beat(&mut self, identity: &str) -> Result<Fenced<Beat>> {
        scripts::beat(&mut self.link, &self.keys, identity, PACE, false, None)
    }

    #[track_caller]
    fn beat(&mut self, identity: &str) -> Fenced<Beat> {
        self.try_beat(identity).unwrap()
    }

    fn try_reap(&mut self, identity: &str) -> Result<Reaped> {
        self.try_reap_by("reaper", identity)
    }

    fn try_reap_by(&mut self, by: &str, identity: &str) -> Result<Reaped> {
        scripts::reap(&mut self.link, &self.keys, PACE, identity.as_bytes(), by, HOLD, None)
    }

    #[track_caller]
    fn reap_by(&mut self, by: &str, identity: &str) -> Reaped {
        self.try_reap_by(by, identity).unwrap()
    }

    #[track_caller]
    fn reap(&mut self, identity: &str) -> Reaped {
        self.try_reap(identity).unwrap()
    }

    /// A call to recover, under a new name.
    fn try_recover(&mut self, from: &str, tokens: &[Token]) -> Result<Option<Settled>> {
        self.pieces += 1;
        self.try_recover_as(&self.pieces.to_string(), from, tokens)
    }

    /// A call to recover, under this name.
    fn try_recover_as(&mut self, piece: &str, from: &str, tokens: &[Token]) -> Result<Option<Settled>> {
        let policy = Policy::default();
        let settlement = settlement(piece, from.as_bytes(), &policy);
        let orphans: Vec<Orphan> = tokens.iter().map(orphan).collect();
        scripts::recover(&mut self.link, &self.keys, &settlement, &orphans)
    }

    #[track_caller]
    fn recover(&mut self, from: &str, tokens: &[Token]) -> Option<Vec<Outcome>> {
        self.try_recover(from, tokens).unwrap().map(noted)
    }

    #[track_caller]
    fn recover_as(&mut self, piece: &str, from: &str, tokens: &[Token]) -> Option<Vec<Outcome>> {
        self.try_recover_as(piece, from, tokens).unwrap().map(noted)
    }

    /// What is in flight in an instance that is reaped.
    #[track_caller]
    fn reap_fields(&mut self, identity: &str) -> Vec<Vec<u8>> {
        fields_of(self.reap(identity))
    }

    fn try_leave(&mut self, identity: &str, acks: &[Token], requeues: &[Token]) -> Result<Fenced<u64>> {
        let last = scripts::LastCall {
            acks: acks.to_vec(),
            requeues: requeues.to_vec(),
            ..Default::default()
        };
        scripts::leave(&mut self.link, &self.keys, identity, &[], &last)
    }

    fn due(&mut self) -> Option<String> {
        let due = scripts::due(&mut self.link, &self.keys, PACE).unwrap();
        due.into_iter()
            .next()
            .map(|identity| String::from_utf8(identity).unwrap())
    }

    /// Lets the lease of everybody run out who does not beat from now on.
    fn outlive_leases(&mut self) {
        let () = self.connection.hincr(self.keys.clock(), "now", 100_000).unwrap();
    }

    /// An instance with these jobs in flight, fenced.
    fn dead(&mut self, identity: &str, payloads: &[Vec<u8>]) -> Vec<Token> {
        self.register(identity);
        let tokens = self.record(identity, 1, "work", payloads);
        self.outlive_leases();
        self.reap_fields(identity);
        tokens
    }

    fn push(&mut self, queue: &str, payloads: &[&[u8]]) {
        for payload in payloads {
            let () = self.connection.lpush(format!("queue:{queue}"), *payload).unwrap();
        }
    }

    fn lease_end(&mut self, identity: &str) -> Option<f64> {
        self.connection.zscore(self.keys.instances(), identity).unwrap()
    }

    fn clock(&mut self, field: &str) -> f64 {
        self.connection.hget(self.keys.clock(), field).unwrap()
    }

    fn fields(&mut self, identity: &str) -> Vec<Vec<u8>> {
        self.connection.hkeys(self.keys.inflight(identity)).unwrap()
    }

    fn exists(&mut self, key: &str) -> bool {
        self.connection.exists(key).unwrap()
    }

    /// All that is in Redis: each key, and what it holds as Redis dumps it.
    fn everything(&mut self) -> BTreeMap<String, Vec<u8>> {
        let keys: Vec<String> = self.connection.keys("*").unwrap();
        keys.into_iter()
            .map(|key| {
                let value = redis::cmd("DUMP").arg(&key).query(&mut self.connection).unwrap();
                (key, value)
            })
            .collect()
    }

    /// All but the lease clock.
    fn all_but_the_clock(&mut self) -> BTreeMap<String, Vec<u8>> {
        let mut all = self.everything();
        all.remove(&self.keys.clock());
        all
    }
}

/// What is in flight in an instance that was reaped.
#[track_caller]
fn fields_of(reaped: Reaped) -> Vec<Vec<u8>> {
    match reaped {
        Reaped::Fenced(found) => found.fields,
        other => panic!("{other:?}"),
    }
}

/// A call to recover.
fn settlement<'a>(piece: &'a str, from: &'a [u8], policy: &'a Policy) -> Settlement<'a> {
    Settlement {
        from,
        by: "reaper",
        pace: PACE,
        hold: HOLD,
        piece,
        own: false,
        rest: None,
        policy,
        sidekiq_identity: None,
        indexes: &[],
    }
}

/// An orphan that goes back without being counted.
fn orphan(token: &Token) -> Orphan {
    Orphan {
        token: token.clone(),
        facts: payload::Facts {
            jid: Some("the jid".into()),
            ..payload::Facts::default()
        },
        counted_as: "the jid".into(),
        count: None,
        decision: Decision::Requeue,
        entry: Vec::new(),
    }
}

/// The outcomes of a recovery that was noted as it should.
#[track_caller]
fn noted(settled: Settled) -> Vec<Outcome> {
    assert!(settled.noted);
    settled.outcomes
}

fn record(queue: &str, payload: &[u8]) -> (Vec<u8>, std::sync::Arc<[u8]>) {
    (queue.into(), payload.into())
}

fn claims(queues: &[&str], threads: usize) -> Vec<Claim> {
    let orders = vec![queues.iter().map(|queue| queue.as_bytes().into()).collect()];
    vec![Claim { threads, orders }]
}

fn payloads(done: &Done) -> Vec<&[u8]> {
    done.claimed.iter().map(|(_, payload)| &payload[..]).collect()
}

/// The text of the error, which must be one that Redis gave.
#[track_caller]
fn refusal<T: std::fmt::Debug>(answer: Result<T>) -> String {
    match answer {
        Err(Error::Refused(text)) => text,
        other => panic!("{other:?}"),
    }
}

// --- what cannot be worked with ---

#[test]
fn a_server_that_answers_as_a_cluster_does_cannot_be_used_whatever_it_says_of_itself() {
    let mut bench = Bench::start();
    let mut answer = |text: &str| {
        let mut command = redis::cmd("EVAL");
        command.arg("return redis.error_reply(ARGV[1])").arg(0).arg(text);
        bench.link.command(&command).unwrap_err()
    };
    for text in [
        "MOVED 3999 127.0.0.1:6381",
        "ASK 3999 127.0.0.1:6381",
        "CLUSTERDOWN The cluster is down",
        "CROSSSLOT Keys in request don't hash to the same slot",
    ] {
        match answer(text) {
            Error::Unfit(told) => assert!(told.contains("use a server without cluster mode"), "{told}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    // Any other is a refusal, which may not last.
    assert_eq!(
        answer("MISCONF No disk"),
        Error::Refused("Redis answered MISCONF No disk".into())
    );
}

// --- turns ---

#[test]
fn without_a_lease_there_are_no_turns_and_nothing_is_made() {
    let mut bench = Bench::start();
    bench.push("work", &[b"a"]);
    let turn = Turn {
        call: 1,
        records: vec![record("work", b"b")],
        requeues: vec![Requeue::Unrecorded {
            queue: b"work".to_vec(),
            payload: b"c"[..].into(),
        }],
        marks: vec!["A".into()],
        claims: claims(&["work"], 1),
        ..Turn::default()
    };
    let before = bench.everything();
    assert_eq!(bench.try_turn("nobody", &turn).unwrap(), Turned::Lost);
    assert_eq!(bench.beat("nobody"), Fenced::Lost);
    assert_eq!(bench.try_leave("nobody", &[], &[]).unwrap(), Fenced::Lost);
    assert_eq!(bench.everything(), before);

    // Fenced is the same, though jobs are still in flight.
    let tokens = bench.dead("dead", &[b"d".to_vec()]);
    let before = bench.all_but_the_clock();
    let turn = Turn {
        call: 2,
        acks: tokens.clone(),
        requeues: vec![Requeue::Recorded(tokens[0].clone())],
        ..turn
    };
    assert_eq!(bench.try_turn("dead", &turn).unwrap(), Turned::Lost);
    assert_eq!(bench.beat("dead"), Fenced::Lost);
    assert_eq!(bench.try_leave("dead", &tokens, &tokens).unwrap(), Fenced::Lost);
    assert_eq!(bench.all_but_the_clock(), before);
}

#[test]
fn a_repeated_turn_reads_its_tokens_back_and_does_nothing() {
    let mut bench = Bench::with("me");
    bench.push("work", &[b"a", b"b", b"c", b"d"]);
    let held = bench.record("me", 1, "other", &[b"acked".to_vec(), b"requeued".to_vec()]);
    let turn = Turn {
        counters: vec![],
        large: None,
        call: 2,
        acks: vec![held[0].clone()],
        requeues: vec![
            Requeue::Recorded(held[1].clone()),
            Requeue::Unrecorded {
                queue: b"other".to_vec(),
                payload: b"unrecorded"[..].into(),
            },
        ],
        marks: vec!["A".into()],
        records: vec![record("work", b"r1"), record("a queue", b"r2")],
        claims: claims(&["work"], 2),
    };
    let first = bench.turn("me", &turn);
    assert_eq!(payloads(&first), [b"a", b"b"]);
    assert_eq!(
        first.recorded.iter().map(Token::order).collect::<Vec<_>>(),
        [(2, 1), (2, 2)]
    );
    assert_eq!(first.recorded[1].queue(), b"a queue");
    assert_eq!(queue(&bench.server, "other"), [&b"unrecorded"[..], b"requeued"]);
    assert_eq!(queue(&bench.server, "work"), [b"c", b"d"]);

    let after = bench.everything();
    let sorted = |mut done: Done| {
        done.recorded.sort_by_key(Token::order);
        done.claimed.sort_by_key(|(token, _)| token.order());
        done
    };
    for _ in 0..2 {
        let again = bench.turn("me", &turn);
        assert_eq!(sorted(again), sorted(first.clone()));
        assert_eq!(bench.everything(), after);
    }

    // What was acked meanwhile is not read back, and does not come back.
    let next = Turn {
        call: 3,
        acks: vec![first.recorded[0].clone(), first.claimed[0].0.clone()],
        ..Turn::default()
    };
    bench.turn("me", &next);
    let after = bench.everything();
    assert_eq!(bench.try_turn("me", &turn).unwrap(), Turned::Stale);
    assert_eq!(bench.everything(), after);
    assert_eq!(bench.turn("me", &next), Done::default());
    assert_eq!(bench.everything(), after);
}

#[test]
fn a_late_copy_of_a_turn_that_found_nothing_takes_nothing() {
    let mut bench = Bench::with("me");
    let turn = Turn {
        call: 1,
        claims: claims(&["work"], 2),
        ..Turn::default()
    };
    assert_eq!(bench.turn("me", &turn), Done::default());
    bench.push("work", &[b"a"]);
    let before = bench.everything();
    assert_eq!(bench.turn("me", &turn), Done::default());
    assert_eq!(bench.everything(), before);
    // Numbers may be left out: the process counts, whoever it is at the moment.
    assert_eq!(
        payloads(&bench.turn(
            "me",
            &Turn {
                call: 9,
                ..turn.clone()
            }
        )),
        [b"a"]
    );
    assert_eq!(bench.try_turn("me", &turn).unwrap(), Turned::Stale);
}

#[test]
fn a_turn_acks_then_requeues_then_claims() {
    let mut bench = Bench::with("me");
    bench.push("work", &[b"waits"]);
    let held = bench.record("me", 1, "work", &[b"old".to_vec(), b"older".to_vec(), b"done".to_vec()]);
    let turn = Turn {
        call: 2,
        acks: vec![held[2].clone()],
        requeues: vec![Requeue::Recorded(held[0].clone()), Requeue::Recorded(held[1].clone())],
        claims: claims(&["work"], 2),
        ..Turn::default()
    };
    // The last one that was put back is the first to be taken.
    assert_eq!(payloads(&bench.turn("me", &turn)), [&b"older"[..], b"old"]);
    assert_eq!(queue(&bench.server, "work"), [b"waits"]);
    assert_eq!(bench.fields("me").len(), 3);
    let known: Vec<String> = bench.connection.smembers("queues").unwrap();
    assert_eq!(known, ["work"]);

    // To ack or requeue what is not there (any more) does nothing.
    let turn = Turn {
        call: 3,
        claims: vec![],
        ..turn
    };
    assert_eq!(bench.turn("me", &turn), Done::default());
    assert_eq!(queue(&bench.server, "work"), [b"waits"]);
}

#[test]
fn each_thread_claims_in_its_own_order() {
    let mut bench = Bench::with("me");
    bench.push("high", &[b"h1"]);
    bench.push("low", &[b"l1", b"l2", b"l3"]);
    let turn = Turn {
        call: 1,
        claims: [claims(&["low", "high"], 1), claims(&["high", "low"], 2), claims(&[], 1)].concat(),
        ..Turn::default()
    };
    let done = bench.turn("me", &turn);
    assert_eq!(payloads(&done), [b"l1", b"h1", b"l2"]);
    let orders: Vec<_> = done.claimed.iter().map(|(token, _)| token.order()).collect();
    assert_eq!(orders, [(1, 1), (1, 2), (1, 3)]);
    assert_eq!(done.claimed[0].0.queue(), b"low");
    assert_eq!(done.claimed[1].0.queue(), b"high");
    let now: (u64, u64) = redis::cmd("TIME").query(&mut bench.connection).unwrap();
    let age = (now.0 * 1000 + now.1 / 1000).abs_diff(done.claimed[0].0.taken_at_ms());
    assert!(age < 60_000, "{age} ms");
}

#[test]
fn an_empty_queue_is_tried_once_a_turn() {
    let mut bench = Bench::with("me");
    bench.push("third", &[b"a", b"b", b"c"]);
    let turn = Turn {
        call: 1,
        claims: claims(&["first", "second", "third"], 5),
        ..Turn::default()
    };
    assert_eq!(payloads(&bench.turn("me", &turn)), [b"a", b"b", b"c"]);
    // The first one; then, until nothing is left, all others at once, or one by one where Redis is too old for that.
    let calls = (bench.server.calls_of("rpop"), bench.server.calls_of("lmpop"));
    assert!([(1, 2), (2 + 2, 0)].contains(&calls), "{calls:?}");
}

#[test]
fn a_claim_ends_at_a_megabyte_but_not_before_its_first_job() {
    let mut bench = Bench::with("me");
    let large = vec![b'l'; 600_000];
    let huge = vec![b'h'; 3_000_000];
    bench.push("work", &[&large, &large, &huge, b"small"]);
    let turn = |call, large| Turn {
        call,
        large: Some(large),
        claims: claims(&["work"], 4),
        ..Turn::default()
    };
    let sizes = |done: Done| {
        done.claimed
            .iter()
            .map(|(_, payload)| payload.len())
            .collect::<Vec<_>>()
    };
    let first = bench.turn("me", &turn(1, 600_000));
    assert_eq!(sizes(first), [600_000, 600_000]);
    assert_eq!(sizes(bench.turn("me", &turn(1, 600_000))), [600_000, 600_000]);
    assert_eq!(sizes(bench.turn("me", &turn(2, 3_000_000))), [3_000_000]);
    assert_eq!(sizes(bench.turn("me", &turn(3, 600_000))), [5]);
}

/// Claims with lists of their own.
fn large_claims(call: u64, queues: &[&str], threads: usize) -> Turn {
    Turn {
        call,
        large: Some(50_000),
        claims: claims(queues, threads),
        ..Turn::default()
    }
}

/// A payload of 50 KB.
fn large(letter: u8) -> Vec<u8> {
    [&[letter][..], b"\0\xff", &vec![b'l'; 50_000]].concat()
}

#[test]
fn a_large_payload_has_a_list_of_its_own_for_as_long_as_it_is_in_flight() {
    let mut bench = Bench::with("me");
    let jobs: Vec<Vec<u8>> = (b'a'..=b'e').map(large).collect();
    bench.push("first", &[&jobs[0]]);
    bench.push("second", &jobs[1..].iter().map(Vec::as_slice).collect::<Vec<_>>());
    let turn = large_claims(1, &["none", "first", "second"], 4);
    let done = bench.turn("me", &turn);
    assert_eq!(payloads(&done), jobs[..4].iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert_eq!(queue(&bench.server, "second"), jobs[4..]);
    let after = bench.everything();
    let mut again = bench.turn("me", &turn);
    again.claimed.sort_by_key(|(token, _)| token.order());
    assert_eq!(again, done);
    assert_eq!(bench.everything(), after);

    // Nothing of it is in the hash, and no pop has made a string of it.
    let tokens: Vec<Token> = done.claimed.iter().map(|(token, _)| token.clone()).collect();
    let lists: Vec<Vec<u8>> = tokens
        .iter()
        .map(|token| bench.keys.payload(b"me", token.order()))
        .collect();
    for (token, list) in tokens.iter().zip(&lists) {
        assert!(token.has_list());
        let held: Vec<u8> = bench
            .connection
            .hget(bench.keys.inflight("me"), token.as_bytes())
            .unwrap();
        assert_eq!(held, b"");
        assert_eq!(bench.connection.llen::<_, u64>(list).unwrap(), 1);
    }
    assert_eq!(bench.server.calls_of("rpop"), 0);

    // One ends, one goes back, for one the list is gone: then there is nothing to put back.
    let () = bench.connection.del(&lists[2]).unwrap();
    let turn = Turn {
        call: 2,
        acks: vec![tokens[0].clone()],
        requeues: vec![
            Requeue::Recorded(tokens[2].clone()),
            Requeue::Recorded(tokens[1].clone()),
        ],
        ..Turn::default()
    };
    for _ in 0..2 {
        assert_eq!(bench.turn("me", &turn).undone, Vec::<usize>::new());
        assert!(queue(&bench.server, "second") == [jobs[1].clone(), jobs[4].clone()]);
        assert_eq!(bench.fields("me"), [b"call".to_vec(), tokens[3].as_bytes().to_vec()]);
        let left: Vec<bool> = lists
            .iter()
            .map(|list| bench.connection.exists(list).unwrap())
            .collect();
        assert_eq!(left, [false, false, false, true]);
    }
    assert_eq!(bench.try_leave("me", &tokens[3..], &[]).unwrap(), Fenced::Alive(0));
    assert_eq!(
        bench.all_but_the_clock().keys().collect::<Vec<_>>(),
        ["queue:second", "queues"]
    );
}

#[test]
fn what_is_held_in_lists_is_given_back_at_exit_and_looked_at_meanwhile() {
    let mut bench = Bench::with("me");
    let payload = |jid: u8| {
        [
            &br#"{"class":"HardJob","jid":""#[..],
            &[jid],
            br#"","args":[""#,
            &large(b'x')[3..],
            br#""]}"#,
        ]
        .concat()
    };
    let jobs: Vec<Vec<u8>> = (b'a'..=b'd').map(payload).collect();
    bench.push("work", &jobs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let tokens: Vec<Token> = bench
        .turn("me", &large_claims(1, &["work"], 4))
        .claimed
        .into_iter()
        .map(|(token, _)| token)
        .collect();
    let (mut seen, page) = watch::in_flight(&mut bench.link, &bench.keys, b"me", None).unwrap();
    assert_eq!(page, None);
    seen.sort_by_key(|job| job.facts.jid.clone());
    let jids: Vec<_> = seen.iter().map(|job| job.facts.jid.as_deref().unwrap()).collect();
    assert_eq!(jids, ["a", "b", "c", "d"]);
    let newest_first: Vec<Token> = tokens[1..].iter().rev().cloned().collect();
    assert_eq!(
        bench.try_leave("me", &tokens[..1], &newest_first).unwrap(),
        Fenced::Alive(0)
    );
    assert_eq!(queue(&bench.server, "work"), jobs[1..]);
    assert_eq!(
        bench.all_but_the_clock().keys().collect::<Vec<_>>(),
        ["queue:work", "queues"]
    );
}

#[test]
fn orphans_in_lists_of_their_own_are_settled_like_any_others() {
    let mut bench = Bench::with("dead");
    let jobs: Vec<Vec<u8>> = (b'a'..=b'f').map(large).collect();
    bench.push("work", &jobs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut tokens: Vec<Token> = bench
        .turn("dead", &large_claims(1, &["work"], 5))
        .claimed
        .into_iter()
        .map(|(token, _)| token)
        .collect();
    // Of one, somebody removes the list. One was small.
    let gone = tokens.pop().unwrap();
    let () = bench.connection.del(bench.keys.payload(b"dead", gone.order())).unwrap();
    tokens.extend(bench.record("dead", 2, "work", &[b"small".to_vec()]));
    tokens.push(gone);
    bench.outlive_leases();
    assert_eq!(bench.reap_fields("dead").len(), 6);
    let peeked = scripts::peek(&mut bench.link, &bench.keys, b"dead", &tokens).unwrap().1;
    let expected = jobs[..4].iter().cloned().chain([b"small".to_vec()]).map(Some);
    assert!(peeked == expected.chain([None]).collect::<Vec<_>>());

    let decisions = [
        Decision::Requeue,
        Decision::Kill(Reason::PoisonPill),
        Decision::RequeueLast,
        Decision::Discard(Reason::Unreadable),
        Decision::Requeue,
        Decision::Requeue,
    ];
    let orphans: Vec<Orphan> = tokens
        .iter()
        .zip(decisions)
        .map(|(token, decision)| Orphan {
            decision,
            entry: b"entry".to_vec(),
            ..orphan(token)
        })
        .collect();
    let policy = Policy::default();
    let settlement = settlement("piece", b"dead", &policy);
    let settled = scripts::recover(&mut bench.link, &bench.keys, &settlement, &orphans).unwrap();
    let ends = [End::Requeued, End::Dead, End::Requeued, End::Discarded, End::Requeued];
    let outcomes: Vec<Outcome> = ends.map(Outcome::Ended).into_iter().chain([Outcome::Gone]).collect();
    assert_eq!(noted(settled.unwrap()), outcomes);
    let expected = [b"small", &jobs[0][..], &jobs[5], &jobs[2]].map(<[u8]>::to_vec);
    assert!(queue(&bench.server, "work") == expected);
    assert_eq!(journal(&bench.server).len(), 4 + 1);
    let left = bench.all_but_the_clock();
    assert!(!left.keys().any(|key| key.contains("inflight")), "{:?}", left.keys());
}

#[test]
fn a_queue_that_is_no_list_is_skipped_for_large_payloads_too() {
    let mut bench = Bench::with("me");
    bench.push("work", &[&large(b'a')]);
    let () = bench.connection.set("queue:text", "x").unwrap();
    // SORT would take one of these.
    let () = bench.connection.sadd("queue:set", "a member").unwrap();
    let () = bench.connection.zadd("queue:sorted", "a member", 1).unwrap();
    let done = bench.turn("me", &large_claims(1, &["text", "set", "sorted", "work"], 2));
    assert_eq!(payloads(&done), [large(b'a')]);
    assert_eq!(done.refused, [b"text".to_vec(), b"set".to_vec(), b"sorted".to_vec()]);
    assert_eq!(bench.connection.scard::<_, u64>("queue:set").unwrap(), 1);
    assert_eq!(bench.connection.zcard::<_, u64>("queue:sorted").unwrap(), 1);
    assert_eq!(
        bench.try_leave("me", &[done.claimed[0].0.clone()], &[]).unwrap(),
        Fenced::Alive(0)
    );
    assert!(!bench.everything().keys().any(|key| key.contains("inflight")));
}

#[test]
fn a_right_that_is_missing_loses_no_large_payload() {
    let mut bench = Bench::with("me");
    let jobs: Vec<Vec<u8>> = (b'a'..=b'h').map(large).collect();
    bench.push("work", &jobs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut admin = bench.server.connect();
    let mut acl = |rule: &str| {
        redis::cmd("ACL")
            .arg(&["SETUSER", USER, rule])
            .exec(&mut admin)
            .unwrap();
    };
    // Without these it is popped.
    for (right, call) in [("sort", 1), ("ltrim", 2), ("lindex", 3)] {
        acl(&format!("-{right}"));
        let done = bench.turn("me", &large_claims(call, &["work"], 2));
        assert!(done.claimed.iter().all(|(token, _)| !token.has_list()));
        assert_eq!((done.claimed.len(), done.refused.len()), (2, 0));
        acl(&format!("+{right}"));
    }
    let done = bench.turn("me", &large_claims(4, &["work"], 2));
    let tokens: Vec<Token> = done.claimed.iter().map(|(token, _)| token.clone()).collect();
    assert!(tokens.len() == 2 && tokens.iter().all(Token::has_list));
    // What can be neither moved nor read stays where it is, and comes back when one of both can be done.
    acl("-lindex");
    acl("-lmove");
    let requeue = |call| Turn {
        call,
        requeues: vec![Requeue::Recorded(tokens[0].clone())],
        ..Turn::default()
    };
    assert_eq!(bench.turn("me", &requeue(5)).undone, [0]);
    let refused = scripts::peek(&mut bench.link, &bench.keys, b"me", &tokens);
    assert!(matches!(&refused, Err(Error::Refused(_))), "{}", refused.is_ok());
    acl("+lmove");
    assert_eq!(bench.turn("me", &requeue(6)).undone, [0; 0]);
    assert!(queue(&bench.server, "work") == [large(b'g')]);
    acl("+lindex");
    let peeked = scripts::peek(&mut bench.link, &bench.keys, b"me", &tokens[1..])
        .unwrap()
        .1;
    assert!(peeked == [Some(large(b'h'))]);
}

#[test]
fn large_payloads_can_be_claimed_when_memory_is_full() {
    let mut bench = Bench::on(Options::default().maxmemory("64mb").start());
    bench.register("me");
    bench.push("work", &[&large(b'a'), &large(b'b')]);
    bench.server.config_set("maxmemory", "1mb");
    assert!(bench.connection.set::<_, _, ()>("k", "v").is_err());
    let done = bench.turn("me", &large_claims(1, &["work"], 1));
    assert_eq!(payloads(&done), [large(b'a')]);
    let turn = Turn {
        acks: vec![done.claimed[0].0.clone()],
        ..large_claims(2, &["work"], 1)
    };
    assert_eq!(payloads(&bench.turn("me", &turn)), [large(b'b')]);
}

#[test]
fn a_queue_that_is_no_list_is_skipped_and_reported_and_stops_nothing_else() {
    let mut bench = Bench::with("me");
    let held = bench.record("me", 1, "broken", &[b"kept".to_vec()]);
    bench.push("work", &[b"a"]);
    let () = bench.connection.set("queue:broken", "x").unwrap();
    let turn = Turn {
        call: 2,
        requeues: vec![
            Requeue::Unrecorded {
                queue: b"work".to_vec(),
                payload: b"b"[..].into(),
            },
            Requeue::Recorded(held[0].clone()),
        ],
        claims: claims(&["broken", "work"], 3),
        ..Turn::default()
    };
    let done = bench.turn("me", &turn);
    assert_eq!(done.refused, [b"broken"]);
    assert_eq!(done.undone, [1]);
    assert_eq!(payloads(&done), [b"b", b"a"]);
    assert!(bench.fields("me").contains(&held[0].as_bytes().to_vec()));
    assert_eq!(bench.turn("me", &turn).undone, [1]);

    // Once the key is gone the job goes where it belongs.
    let () = bench.connection.del("queue:broken").unwrap();
    let turn = Turn {
        call: 3,
        requeues: vec![Requeue::Recorded(held[0].clone())],
        ..Turn::default()
    };
    assert_eq!(bench.turn("me", &turn), Done::default());
    assert_eq!(queue(&bench.server, "broken"), [b"kept"]);
}

#[test]
fn a_job_without_a_record_that_cannot_go_back_gets_one() {
    let mut bench = Bench::with("me");
    let () = bench.connection.set("queue:broken", "x").unwrap();
    bench.push("work", &[b"claimed"]);
    let turn = Turn {
        call: 1,
        requeues: vec![Requeue::Unrecorded {
            queue: b"broken".to_vec(),
            payload: b"alone"[..].into(),
        }],
        records: vec![record("work", b"recorded")],
        claims: claims(&["work"], 1),
        ..Turn::default()
    };
    for _ in 0..2 {
        let done = bench.turn("me", &turn);
        assert_eq!(done.recorded.len(), 1);
        assert_eq!(payloads(&done), [b"claimed"]);
    }
    let token = bench
        .fields("me")
        .into_iter()
        .filter_map(Token::read)
        .max_by_key(Token::order)
        .unwrap();
    assert_eq!((token.order(), token.queue()), ((1, 3), &b"broken"[..]));
    let () = bench.connection.del("queue:broken").unwrap();
    let turn = Turn {
        call: 2,
        requeues: vec![Requeue::Recorded(token)],
        ..Turn::default()
    };
    bench.turn("me", &turn);
    assert_eq!(queue(&bench.server, "broken"), [b"alone"]);
}

#[test]
fn an_info_that_somebody_has_overwritten_is_made_anew_for_the_marks() {
    let mut bench = Bench::with("me");
    let held = bench.record("me", 1, "work", &[b"a".to_vec(), b"b".to_vec()]);
    overwrite(&mut bench, &keys().info("me"));
    let turn = Turn {
        call: 2,
        acks: vec![held[0].clone()],
        requeues: vec![
            Requeue::Recorded(held[1].clone()),
            Requeue::Unrecorded {
                queue: b"work".to_vec(),
                payload: b"c"[..].into(),
            },
        ],
        marks: vec!["A".into(), "B".into()],
        ..Turn::default()
    };
    assert_eq!(bench.turn("me", &turn), Done::default());
    let after = bench.everything();
    assert_eq!(bench.turn("me", &turn), Done::default());
    assert_eq!(bench.everything(), after);
    assert_eq!(queue(&bench.server, "work"), [b"c", b"b"]);
    let mut info: Vec<String> = bench.connection.hkeys(bench.keys.info("me")).unwrap();
    info.sort();
    assert_eq!(info, ["marked:A", "marked:B"]);
    // Nobody else has to write it, and so it costs no beat.
    overwrite(&mut bench, &keys().info("me"));
    let beat = scripts::beat(&mut bench.link, &bench.keys, "me", PACE, true, None).unwrap();
    assert!(matches!(beat, Fenced::Alive(_)));
    assert_eq!(bench.try_leave("me", &[], &[]).unwrap(), Fenced::Alive(0));
    assert!(!bench.exists(&keys().info("me")));
}

#[test]
fn a_turn_carries_a_thousand_acks_and_records() {
    let mut bench = Bench::with("me");
    let many: Vec<Vec<u8>> = (0..1000).map(|i| job(&format!("j{i}"))).collect();
    let tokens = bench.record("me", 1, "work", &many);
    let again: Vec<Token> = bench.record("me", 1, "work", &many);
    assert_eq!(again.len(), 1000);
    let turn = Turn {
        call: 2,
        acks: tokens.iter().cycle().take(2500).cloned().collect(),
        ..Turn::default()
    };
    bench.turn("me", &turn);
    assert_eq!(bench.fields("me"), [b"call"]);
}

// --- leases ---

#[test]
fn a_beat_renews_and_names_who_is_due_when_it_moved_the_clock() {
    let mut bench = Bench::with("me");
    let seen = |answer: Fenced<Beat>| match answer {
        Fenced::Alive(beat) => {
            assert_eq!(beat.pace, PACE);
            (beat.instances, beat.moved, beat.due)
        }
        Fenced::Lost => panic!("lost"),
    };
    // The clock has just been looked at; less than a twentieth of a step later it stays.
    bench.set_seen(0);
    assert_eq!(seen(bench.beat("me")), (1, false, None));
    bench.set_seen(-100);
    assert_eq!(seen(bench.beat("me")), (1, true, None));
    let end = bench.lease_end("me").unwrap();
    assert_eq!(end, bench.clock("now") + 5000.0);

    bench.register("late");
    bench.register("later");
    bench.outlive_leases();
    let () = bench.connection.zincr(bench.keys.instances(), "late", -1).unwrap();
    bench.set_seen(-100);
    assert_eq!(seen(bench.beat("me")), (3, true, Some(b"late".to_vec())));
    // Its own lease had run out too, but nobody fenced it: it lives.
    assert_eq!(bench.reap("me"), Reaped::Runs);

    let progress =
        |bench: &mut Bench| -> Option<f64> { bench.connection.hget(bench.keys.info("me"), "progress").unwrap() };
    assert_eq!(progress(&mut bench), None);
    scripts::beat(&mut bench.link, &bench.keys, "me", PACE, true, None).unwrap();
    assert!(progress(&mut bench).is_some());
}

impl Bench {
    /// When the clock was last looked at, in ms from now on.
    fn set_seen(&mut self, from_now: i64) {
        let (seconds, micros): (i64, i64) = redis::cmd("TIME").query(&mut self.connection).unwrap();
        let seen = seconds * 1000 + micros / 1000 + from_now;
        let () = self.connection.hset(self.keys.clock(), "seen", seen).unwrap();
    }
}

#[test]
fn the_lease_clock_moves_by_a_step_at_most_and_never_back() {
    let server = Options::default().fake_clock().start();
    let mut bench = Bench::on(server);
    bench.register("me");
    let mut now = bench.clock("now");
    let mut beat_at = |seconds: i64| {
        bench.server.set_clock(seconds);
        // Redis lets go of connections when its clock jumps; that is not what this is about.
        bench.link.discard();
        bench.connection = bench.server.connect();
        bench.beat("me");
        let before = std::mem::replace(&mut now, bench.clock("now"));
        now - before
    };
    assert_eq!(beat_at(600), 1000.0);
    assert_eq!(beat_at(3600), 1000.0);
    assert_eq!(beat_at(-600), 0.0);
    assert_eq!(beat_at(-550), 1000.0);
    assert_eq!(beat_at(0), 1000.0);
    // Within a step it is exact.
    let (before, seen) = (bench.clock("now"), bench.clock("seen"));
    bench.set_seen(-700);
    let moved_from = bench.clock("seen");
    bench.beat("me");
    assert!(moved_from >= seen - 700.0);
    assert_eq!(
        bench.clock("now") - before,
        (bench.clock("seen") - moved_from).min(1000.0)
    );
}

#[test]
fn a_missing_clock_begins_with_every_lease_anew() {
    let mut bench = Bench::with("me");
    bench.register("other");
    bench.outlive_leases();
    let nonsense = ["x", "", "-1", "inf", "-inf", "nan", "1e300"];
    let fields = ["now", "seen", "step", "ttl"];
    let no_pace = ["step", "ttl"].map(|field| (field, "0"));
    let all = fields
        .into_iter()
        .flat_map(|field| nonsense.map(|value| (field, value)));
    for (field, value) in all.chain(no_pace) {
        let () = bench.connection.hset(bench.keys.clock(), field, value).unwrap();
        assert_eq!(bench.due(), None, "{field} {value}");
        assert_eq!(bench.reap("other"), Reaped::Runs);
        assert_eq!(bench.lease_end("other").unwrap(), bench.clock("now") + 5000.0);
        assert_eq!((bench.clock("step"), bench.clock("ttl")), (1000.0, 5000.0));
        bench.outlive_leases();
    }
    let () = bench.connection.del(bench.keys.clock()).unwrap();
    assert_eq!(bench.reap("other"), Reaped::Runs);
    bench.outlive_leases();
    let () = bench.connection.del(bench.keys.clock()).unwrap();
    bench.register("third");
    assert_eq!(bench.reap("other"), Reaped::Runs);
}

#[test]
fn a_clock_with_nonsense_lets_a_registration_and_a_beat_set_it_right() {
    for value in ["0", "-5", "inf", "nan"] {
        for field in ["step", "ttl"] {
            let mut bench = Bench::with("me");
            let () = bench.connection.hset(bench.keys.clock(), field, value).unwrap();
            assert!(
                matches!(bench.beat("me"), Fenced::Alive(Beat { pace, .. }) if pace == PACE),
                "{field} {value}"
            );
            let () = bench.connection.hset(bench.keys.clock(), field, value).unwrap();
            bench.register("next");
            assert_eq!((bench.clock("step"), bench.clock("ttl")), (1000.0, 5000.0));
            assert_eq!(bench.due(), None);
        }
        // What is to make the clock slower for a while cannot make it stand.
        let mut bench = Bench::with("me");
        for field in ["clamp", "clamp_until"] {
            let (clock, other) = (
                bench.keys.clock(),
                [("clamp", 500_i64), ("clamp_until", 900_000_000_000_000_i64)],
            );
            let () = bench.connection.hset_multiple(&clock, &other).unwrap();
            let () = bench.connection.hset(&clock, field, value).unwrap();
            let before = bench.clock("now");
            bench.set_seen(-60_000);
            bench.due();
            assert_eq!(bench.clock("now") - before, 1000.0, "{field} {value}");
        }
    }
}

#[test]
fn a_registration_with_other_settings_touches_no_lease() {
    let mut bench = Bench::with("me");
    bench.register("dead");
    bench.outlive_leases();
    bench.beat("me");
    bench.set_seen(0);
    let (before, dead) = (bench.lease_end("me"), bench.lease_end("dead"));
    let shorter = Pace {
        step: Duration::from_millis(200),
        ttl: Duration::from_secs(1),
    };
    let info = [("hostname".to_owned(), "h".to_owned())];
    assert_eq!(
        scripts::register(&mut bench.link, &bench.keys, "new", shorter, &info).unwrap(),
        shorter
    );
    // Nobody's lease gets shorter before he knows of it.
    assert_eq!(bench.lease_end("me"), before);
    assert_eq!(bench.lease_end("new").unwrap(), bench.clock("now") + 1000.0);
    assert_eq!(bench.lease_end("dead"), dead);
    assert_eq!((bench.clock("step"), bench.clock("ttl")), (200.0, 1000.0));
    // Each learns of it with his next beat, and has understood with the one after.
    assert!(matches!(bench.beat("me"), Fenced::Alive(Beat { pace, .. }) if pace == shorter));
    assert_eq!(bench.lease_end("me").unwrap(), bench.clock("now") + 5000.0);
    let beat = scripts::beat(&mut bench.link, &bench.keys, "me", shorter, false, None).unwrap();
    assert!(matches!(beat, Fenced::Alive(Beat { pace, .. }) if pace == shorter));
    assert_eq!(bench.lease_end("me").unwrap(), bench.clock("now") + 1000.0);
    let info: BTreeMap<String, String> = bench.connection.hgetall(bench.keys.info("new")).unwrap();
    assert_eq!(info["hostname"], "h");
    assert!(info["started_at"].parse::<u64>().unwrap() > 0);

    let longer = Pace {
        step: Duration::from_secs(10),
        ttl: Duration::from_secs(60),
    };
    let end = bench.lease_end("me");
    scripts::register(&mut bench.link, &bench.keys, "newer", longer, &[]).unwrap();
    assert_eq!((bench.clock("step"), bench.clock("ttl")), (10_000.0, 60_000.0));
    assert_eq!((bench.lease_end("me"), bench.lease_end("dead")), (end, dead));
    // Who works by the old step lives all the same: until the last lease ends the clock goes on in such steps.
    let begun = bench.clock("now");
    let mut move_on = || {
        bench.set_seen(-10_000);
        let before = bench.clock("now");
        bench.due();
        bench.clock("now") - before
    };
    assert_eq!([0; 5].map(|_| move_on()), [200.0; 5]);
    assert_eq!(move_on(), 10_000.0);
    assert_eq!(bench.clock("now"), begun + 11_000.0);
}

#[test]
fn one_change_of_settings_after_another_lets_the_clock_go_by_the_shortest_step_that_is_in_use() {
    let mut bench = Bench::with("me");
    let pace = |step, ttl| Pace {
        step: Duration::from_millis(step),
        ttl: Duration::from_millis(ttl),
    };
    let register = |bench: &mut Bench, name: &str, pace| {
        bench.set_seen(0);
        scripts::register(&mut bench.link, &bench.keys, name, pace, &[]).unwrap();
    };
    let moves = |bench: &mut Bench| {
        bench.set_seen(-60_000);
        let before = bench.clock("now");
        bench.due();
        bench.clock("now") - before
    };
    // PACE, 1 s and 5 s, is in use.
    register(&mut bench, "longer", pace(4000, 20_000));
    assert_eq!(moves(&mut bench), 1000.0);
    register(&mut bench, "longest", pace(8000, 40_000));
    assert_eq!(moves(&mut bench), 1000.0);
    // Shorter ones hold at once.
    register(&mut bench, "short", pace(500, 3000));
    assert_eq!(moves(&mut bench), 500.0);
    register(&mut bench, "short too", pace(500, 30_000));
    assert_eq!(moves(&mut bench), 500.0);
    register(&mut bench, "long again", pace(2000, 30_000));
    let last = bench.lease_end("longest").unwrap();
    while bench.clock("now") < last {
        assert_eq!(moves(&mut bench), 500.0);
    }
    assert_eq!(moves(&mut bench), 2000.0);
}

// --- death ---

#[test]
fn only_a_lease_that_has_run_out_is_reaped() {
    let mut bench = Bench::with("me");
    let held = bench.record("me", 1, "work", &[b"a".to_vec(), b"b".to_vec()]);
    assert_eq!(bench.reap("nobody"), Reaped::Gone);
    assert!(!bench.exists(&bench.keys.inflight("nobody")));
    let before = bench.all_but_the_clock();
    assert_eq!(bench.due(), None);
    assert_eq!(bench.reap("me"), Reaped::Runs);
    assert_eq!(bench.all_but_the_clock(), before);

    bench.outlive_leases();
    assert_eq!(bench.due(), Some("me".into()));
    let mut fields = bench.reap_fields("me");
    fields.sort();
    let mut tokens: Vec<Vec<u8>> = held.iter().map(|token| token.as_bytes().to_vec()).collect();
    tokens.sort();
    assert_eq!(fields, tokens);
    // It is held: nobody else is sent after it meanwhile.
    assert_eq!(bench.lease_end("me").unwrap(), bench.clock("now") + 2000.0);
    assert_eq!(bench.reap_by("another", "me"), Reaped::Runs);
    assert_eq!(bench.due(), None);
    bench.outlive_leases();
    assert_eq!(bench.due(), Some("me".into()));
    let short = Duration::from_millis(300);
    let capped = scripts::reap(&mut bench.link, &bench.keys, PACE, b"me", "reaper", short, None).unwrap();
    assert!(matches!(capped, Reaped::Fenced(_)));
    assert_eq!(bench.lease_end("me").unwrap(), bench.clock("now") + 300.0);
}

#[test]
fn a_reaper_that_got_no_answer_may_ask_again_while_it_holds() {
    let mut bench = Bench::with("me");
    let held = bench.record("me", 1, "work", &[b"a".to_vec()]);
    let fields = vec![held[0].as_bytes().to_vec()];
    assert_eq!(bench.reap("me"), Reaped::Runs);
    bench.outlive_leases();
    for _ in 0..3 {
        assert_eq!(fields_of(bench.reap_by("one", "me")), fields.clone());
        assert_eq!(bench.reap_by("other", "me"), Reaped::Runs);
    }
    // The hold has run out: another one has it now.
    bench.outlive_leases();
    assert_eq!(fields_of(bench.reap_by("other", "me")), fields.clone());
    assert_eq!(bench.reap_by("one", "me"), Reaped::Runs);
    assert_eq!(fields_of(bench.reap_by("other", "me")), fields.clone());
    // Without the note of it, nobody knows; the hold runs out.
    overwrite(&mut bench, &keys().info("me"));
    assert_eq!(bench.reap_by("other", "me"), Reaped::Runs);
    bench.outlive_leases();
    assert_eq!(fields_of(bench.reap_by("other", "me")), fields);
    assert_eq!(bench.recover("me", &held), Some(vec![Outcome::Ended(End::Requeued)]));
    assert_at_rest(&bench.server);
}

#[test]
fn a_name_in_an_info_makes_nobody_a_reaper_of_the_living() {
    let mut bench = Bench::with("me");
    bench.record("me", 1, "work", &[b"a".to_vec()]);
    let () = bench.connection.hset(keys().info("me"), "reaper", "reaper").unwrap();
    assert_eq!(bench.reap("me"), Reaped::Runs);
    assert!(matches!(bench.beat("me"), Fenced::Alive(_)));
}

#[test]
fn an_identity_may_be_any_bytes() {
    let mut bench = Bench::start();
    let name = b"\xff\xfe: \r\n\0";
    let hash = keys().inflight_of(name);
    let () = bench.connection.zadd(keys().instances(), name, 0).unwrap();
    let () = bench.connection.hset(&hash, "call", 1).unwrap();
    let () = bench.connection.hset(&hash, "1-1 5 work", "a").unwrap();
    let () = bench.connection.hset(keys().info_of(name), "hostname", "x").unwrap();
    assert!(scripts::is_alive(&mut bench.link, &bench.keys, name).unwrap());
    assert_eq!(
        scripts::instances(&mut bench.link, &bench.keys).unwrap(),
        [(name.to_vec(), 0.0)]
    );
    let due = scripts::due(&mut bench.link, &bench.keys, PACE).unwrap();
    // A clock that is missing begins with every lease anew.
    assert!(due.is_empty());
    bench.outlive_leases();
    let due = scripts::due(&mut bench.link, &bench.keys, PACE).unwrap();
    assert_eq!(due, [name.to_vec()]);
    let reaped = scripts::reap(&mut bench.link, &bench.keys, PACE, name, "reaper", HOLD, None).unwrap();
    assert_eq!(fields_of(reaped), [b"1-1 5 work".to_vec()]);
    let tokens = [Token::read(b"1-1 5 work".to_vec()).unwrap()];
    let (_, payloads) = scripts::peek(&mut bench.link, &bench.keys, name, &tokens).unwrap();
    assert_eq!(payloads, [Some(b"a".to_vec())]);
    let policy = Policy::default();
    let settlement = settlement("piece", name, &policy);
    let orphans = tokens.map(|token| orphan(&token));
    let settled = scripts::recover(&mut bench.link, &bench.keys, &settlement, &orphans).unwrap();
    assert_eq!(settled.map(noted), Some(vec![Outcome::Ended(End::Requeued)]));
    assert_eq!(queue(&bench.server, "work"), [b"a"]);
    let mut left: Vec<Vec<u8>> = bench.connection.keys("*").unwrap();
    left.sort();
    let expected = [
        keys().clock(),
        keys().journal(),
        keys().stats(),
        "queue:work".into(),
        "queues".into(),
    ];
    let mut expected = expected.map(String::into_bytes);
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn an_instance_with_nothing_in_flight_is_removed() {
    let mut bench = Bench::with("me");
    bench.outlive_leases();
    assert_eq!(bench.reap("me"), Reaped::Gone);
    assert_at_rest(&bench.server);
    assert_eq!(bench.beat("me"), Fenced::Lost);
    assert_at_rest(&bench.server);
}

#[test]
fn a_proof_of_death_fences_at_once_unless_there_was_a_beat_since() {
    let mut bench = Bench::with("me");
    bench.record("me", 1, "work", &[b"a".to_vec()]);
    let reap = |bench: &mut Bench, lease_end: &str| -> String {
        let mut call = lua::REAP.prepare_invoke();
        for key in [
            bench.keys.clock(),
            bench.keys.instances(),
            bench.keys.inflight("me"),
            bench.keys.info("me"),
            bench.keys.due("me"),
            bench.keys.hands("me"),
            "queues".into(),
        ] {
            call.key(key);
        }
        call.arg(&["1000", "5000", "me", "300000", lease_end, "reaper", "", "queue:"]);
        let answer: Vec<Value> = call.invoke(&mut bench.connection).unwrap();
        String::from_redis_value(answer[0].clone()).unwrap()
    };
    let read_before: String = bench.connection.zscore(bench.keys.instances(), "me").unwrap();
    bench.set_seen(-500);
    bench.beat("me");
    assert_eq!(reap(&mut bench, &read_before), "runs");
    let read_before: String = bench.connection.zscore(bench.keys.instances(), "me").unwrap();
    assert_eq!(reap(&mut bench, &read_before), "reaped");
    assert_eq!(bench.beat("me"), Fenced::Lost);
}

#[test]
fn orphans_are_settled_once_however_often_it_is_asked_for() {
    let mut bench = Bench::start();
    let tokens = bench.dead("dead", &[b"1".to_vec(), b"2".to_vec(), b"3".to_vec()]);
    bench.push("work", &[b"waits"]);
    bench.connection.set::<_, _, ()>("unrelated", 1).unwrap();
    let newest_first: Vec<Token> = tokens.iter().rev().cloned().collect();
    bench.outlive_leases();
    assert_eq!(
        bench.recover("dead", &newest_first[..1]),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    // The hold is renewed.
    assert_eq!(bench.lease_end("dead").unwrap(), bench.clock("now") + 2000.0);
    assert_eq!(
        bench.recover("dead", &newest_first),
        Some(vec![
            Outcome::Gone,
            Outcome::Ended(End::Requeued),
            Outcome::Ended(End::Requeued)
        ])
    );
    assert_eq!(queue(&bench.server, "work"), [&b"1"[..], b"2", b"3", b"waits"]);
    assert_at_rest(&bench.server);
    let before = bench.all_but_the_clock();
    assert_eq!(bench.recover("dead", &newest_first), Some(vec![Outcome::Gone; 3]));
    assert_eq!(bench.all_but_the_clock(), before);

    assert_eq!(stat(&bench.server, "requeued"), 3);
    let lines = journal(&bench.server);
    assert_eq!(lines.len(), 3);
    assert_eq!((lines[0].from.as_str(), lines[0].by.as_str()), ("dead", "reaper"));
    assert_eq!((lines[0].jid.as_str(), lines[0].class.as_str()), ("the jid", ""));
    assert_eq!(
        (lines[0].queue.as_str(), lines[0].outcome.as_str()),
        ("work", "requeued")
    );
}

#[test]
fn a_repeated_recovery_tells_again_what_the_first_call_did_and_does_nothing() {
    let mut bench = Bench::start();
    let tokens = bench.dead("dead", &[b"1".to_vec(), b"2".to_vec(), b"3".to_vec()]);
    // One of the three is gone before.
    let settled_before = bench.recover_as("other", "dead", &tokens[1..2]);
    assert_eq!(settled_before, Some(vec![Outcome::Ended(End::Requeued)]));
    let first = [
        Outcome::Ended(End::Requeued),
        Outcome::Gone,
        Outcome::Ended(End::Requeued),
    ];
    assert_eq!(bench.recover_as("piece", "dead", &tokens), Some(first.to_vec()));
    let before = bench.all_but_the_clock();
    let again = [
        Outcome::EndedBefore(End::Requeued),
        Outcome::Gone,
        Outcome::EndedBefore(End::Requeued),
    ];
    for _ in 0..3 {
        assert_eq!(bench.recover_as("piece", "dead", &tokens), Some(again.to_vec()));
        // Who did not do it hears that it is gone.
        assert_eq!(
            bench.recover_as("another", "dead", &tokens),
            Some(vec![Outcome::Gone; 3])
        );
        assert_eq!(bench.all_but_the_clock(), before);
    }
    assert_eq!(queue(&bench.server, "work").len(), 3);
    assert_eq!((stat(&bench.server, "requeued"), journal(&bench.server).len()), (3, 3));
}

#[test]
fn a_repeated_recovery_settles_what_the_first_call_found_stuck() {
    let mut bench = Bench::start();
    let mut tokens = bench.dead("dead", &[b"1".to_vec()]);
    let () = bench
        .connection
        .hset(keys().inflight("dead"), "1-2 5 broken", "2")
        .unwrap();
    tokens.push(Token::read(b"1-2 5 broken".to_vec()).unwrap());
    let () = bench.connection.set("queue:broken", "x").unwrap();
    let first = [Outcome::Ended(End::Requeued), Outcome::Stuck];
    assert_eq!(bench.recover_as("piece", "dead", &tokens), Some(first.to_vec()));
    let () = bench.connection.del("queue:broken").unwrap();
    let again = [Outcome::EndedBefore(End::Requeued), Outcome::Ended(End::Requeued)];
    assert_eq!(bench.recover_as("piece", "dead", &tokens), Some(again.to_vec()));
    assert_eq!(queue(&bench.server, "broken"), [b"2"]);
    assert_eq!(journal(&bench.server).len(), 2);
    assert_at_rest(&bench.server);
}

#[test]
fn nobody_recovers_an_instance_that_has_its_lease() {
    let mut bench = Bench::with("me");
    let tokens = bench.record("me", 1, "work", &[b"a".to_vec()]);
    let before = bench.everything();
    assert_eq!(bench.recover("me", &tokens), None);
    assert_eq!(bench.everything(), before);
}

#[test]
fn an_orphan_whose_queue_is_no_list_stays_until_it_is_one() {
    let mut bench = Bench::start();
    let tokens = bench.dead("dead", &[b"1".to_vec()]);
    let () = bench.connection.set("queue:work", "x").unwrap();
    assert_eq!(bench.recover("dead", &tokens), Some(vec![Outcome::Stuck]));
    assert_eq!(journal(&bench.server), []);
    assert!(bench.lease_end("dead").is_some());
    let () = bench.connection.del("queue:work").unwrap();
    assert_eq!(
        bench.recover("dead", &tokens),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert_eq!(queue(&bench.server, "work"), [b"1"]);
    assert_at_rest(&bench.server);
}

#[test]
fn a_field_that_is_no_token_keeps_its_instance_listed() {
    let mut bench = Bench::start();
    let tokens = bench.dead("dead", &[b"1".to_vec()]);
    let () = bench
        .connection
        .hset(bench.keys.inflight("dead"), "what is this", "x")
        .unwrap();
    assert_eq!(
        bench.recover("dead", &tokens),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert!(bench.lease_end("dead").is_some());
    bench.outlive_leases();
    assert_eq!(bench.reap_fields("dead"), vec![b"what is this".to_vec()]);
    assert_eq!(bench.fields("dead"), [b"what is this"]);
}

#[test]
fn a_peek_fits_a_reply() {
    let mut bench = Bench::start();
    let sizes = [3_000_000, 10, 500_000, 500_000, 500_000, 10];
    let tokens = bench.dead("dead", &sizes.map(|size| vec![b'x'; size]));
    let mut peek = |tokens: &[Token]| -> Vec<Option<usize>> {
        let (_, payloads) = scripts::peek(&mut bench.link, &bench.keys, b"dead", tokens).unwrap();
        payloads
            .into_iter()
            .map(|payload| payload.map(|bytes| bytes.len()))
            .collect()
    };
    assert_eq!(peek(&tokens), [Some(3_000_000)]);
    assert_eq!(peek(&tokens[1..]), [Some(10), Some(500_000), Some(500_000)]);
    let gone = Token::read(b"9-9 5 work".to_vec()).unwrap();
    assert_eq!(peek(&[gone.clone(), tokens[5].clone()]), [None, Some(10)]);
    assert_eq!(peek(&[gone]), [None]);
}

// --- leaving ---

#[test]
fn leaving_acks_puts_back_and_removes() {
    let mut bench = Bench::with("me");
    bench.push("work", &[b"waits"]);
    let held = bench.record("me", 1, "work", &[b"1".to_vec(), b"2".to_vec(), b"done".to_vec()]);
    let newest_first = [held[1].clone(), held[0].clone()];
    assert_eq!(
        bench.try_leave("me", &held[2..], &newest_first).unwrap(),
        Fenced::Alive(0)
    );
    assert_eq!(queue(&bench.server, "work"), [&b"1"[..], b"2", b"waits"]);
    assert_at_rest(&bench.server);
    let before = bench.everything();
    assert_eq!(bench.try_leave("me", &held[2..], &newest_first).unwrap(), Fenced::Lost);
    assert_eq!(bench.everything(), before);
}

#[test]
fn what_a_leaving_instance_does_not_know_is_due_at_once() {
    let mut bench = Bench::with("me");
    bench.register("other");
    let held = bench.record("me", 1, "work", &[b"1".to_vec(), b"2".to_vec()]);
    assert_eq!(bench.try_leave("me", &[], &held[..1]).unwrap(), Fenced::Alive(1));
    assert_eq!(bench.lease_end("me"), Some(0.0));
    assert_eq!(bench.beat("me"), Fenced::Lost);
    assert_eq!(bench.due(), Some("me".into()));
    assert_eq!(bench.reap_fields("me"), vec![held[1].as_bytes().to_vec()]);
    assert_eq!(
        bench.recover("me", &held[1..]),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert_eq!(queue(&bench.server, "work"), [b"2", b"1"]);
}

// --- a Redis in trouble ---

#[test]
fn every_script_works_when_memory_is_full() {
    let mut bench = Bench::on(Options::default().maxmemory("64mb").start());
    let orphans = bench.dead("dead", &[b"1".to_vec(), b"2".to_vec()]);
    bench.register("me");
    bench.push("work", &[b"waits"]);
    let held = bench.record("me", 1, "work", &[b"a".to_vec(), b"b".to_vec()]);
    // Full, and no eviction.
    bench.server.config_set("maxmemory", "1mb");
    assert!(bench.connection.set::<_, _, ()>("k", "v").is_err());

    bench.register("new");
    bench.set_seen_by(-500);
    assert!(matches!(bench.beat("me"), Fenced::Alive(_)));
    let turn = Turn {
        counters: vec![],
        large: None,
        call: 2,
        acks: held[..1].to_vec(),
        requeues: vec![
            Requeue::Recorded(held[1].clone()),
            Requeue::Unrecorded {
                queue: b"other".to_vec(),
                payload: b"c"[..].into(),
            },
        ],
        marks: vec!["A".into()],
        records: vec![record("work", b"d")],
        claims: claims(&["work"], 2),
    };
    let done = bench.turn("me", &turn);
    assert_eq!(payloads(&done), [&b"b"[..], b"waits"]);
    assert_eq!(done.recorded.len(), 1);
    assert_eq!(
        bench.recover("dead", &orphans[..1]),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    bench.set_lease_end("dead", 0);
    assert!(matches!(bench.reap("dead"), Reaped::Fenced(_)));
    assert_eq!(
        bench.recover("dead", &orphans[1..]),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert_eq!(stat(&bench.server, "requeued"), 2);
    assert_eq!(journal(&bench.server).len(), 2);
    let held: Vec<Token> = done.claimed.into_iter().map(|(token, _)| token).collect();
    assert_eq!(bench.try_leave("me", &done.recorded, &held).unwrap(), Fenced::Alive(0));
    bench.set_seen_by(-500);
    assert_eq!(bench.due(), None);
}

impl Bench {
    /// As `set_seen`, in a way that a full Redis allows.
    fn set_seen_by(&mut self, ms: i64) {
        let max: Vec<String> = redis::cmd("CONFIG")
            .arg("GET")
            .arg("maxmemory")
            .query(&mut self.connection)
            .unwrap();
        self.server.config_set("maxmemory", "0");
        self.set_seen(ms);
        self.server.config_set("maxmemory", &max[1]);
    }

    fn set_lease_end(&mut self, identity: &str, end: u64) {
        let max: Vec<String> = redis::cmd("CONFIG")
            .arg("GET")
            .arg("maxmemory")
            .query(&mut self.connection)
            .unwrap();
        self.server.config_set("maxmemory", "0");
        let () = self.connection.zadd(self.keys.instances(), identity, end).unwrap();
        self.server.config_set("maxmemory", &max[1]);
    }
}

#[test]
fn a_redis_that_refuses_writes_does_nothing_by_halves_and_its_clock_stands() {
    let mut bench = Bench::start();
    let orphans = bench.dead("dead", &[b"1".to_vec()]);
    bench.register("late");
    bench.register("me");
    bench.push("work", &[b"waits"]);
    let held = bench.record("me", 1, "work", &[b"a".to_vec(), b"b".to_vec()]);
    bench.set_lease_end("late", 1);
    bench.set_seen(-5000);

    bench.server.config_set("min-replicas-to-write", "1");
    assert_all_refused(&mut bench, &orphans, &held, "NOREPLICAS");
    bench.server.config_set("min-replicas-to-write", "0");
    bench.server.break_saves();
    assert_all_refused(&mut bench, &orphans, &held, "MISCONF");
    bench.server.mend_saves();
    // All is as it was, and goes on.
    assert!(matches!(bench.beat("me"), Fenced::Alive(_)));
}

fn assert_all_refused(bench: &mut Bench, orphans: &[Token], held: &[Token], code: &str) {
    let before = bench.everything();
    let turn = Turn {
        counters: vec![],
        large: None,
        call: 2,
        acks: held[..1].to_vec(),
        requeues: vec![Requeue::Recorded(held[1].clone())],
        marks: vec!["A".into()],
        records: vec![record("work", b"c")],
        claims: claims(&["work"], 1),
    };
    let refusals = [
        refusal(scripts::register(&mut bench.link, &bench.keys, "new", PACE, &[])),
        refusal(bench.try_beat("me")),
        refusal(bench.try_turn("me", &turn)),
        refusal(bench.try_reap("late")),
        refusal(scripts::due(&mut bench.link, &bench.keys, PACE)),
        refusal(bench.try_recover("dead", orphans)),
        refusal(bench.try_leave("me", held, &[])),
    ];
    for text in refusals {
        assert!(text.contains(code), "{text}");
    }
    assert_eq!(bench.everything(), before, "{code}");
}

/// A key of ours that somebody has overwritten.
fn overwrite(bench: &mut Bench, key: &str) {
    let () = bench.connection.del(key).unwrap();
    let () = bench.connection.set(key, "not ours").unwrap();
}

#[test]
fn a_registration_that_fails_leaves_nothing_behind() {
    for key in [keys().clock(), keys().instances()] {
        let mut bench = Bench::with("me");
        overwrite(&mut bench, &key);
        let before = bench.all_but_the_clock();
        let text = refusal(scripts::register(&mut bench.link, &bench.keys, "new", PACE, &[]));
        assert!(text.contains("WRONGTYPE"), "{text}");
        assert_eq!(bench.all_but_the_clock(), before, "{key}");
        // Other settings take another way.
        let other = Pace {
            ttl: PACE.ttl * 2,
            ..PACE
        };
        refusal(scripts::register(&mut bench.link, &bench.keys, "new", other, &[]));
        assert_eq!(bench.all_but_the_clock(), before, "{key}");
    }
}

#[test]
fn an_overwritten_key_costs_no_jobs() {
    let (clock, instances) = (keys().clock(), keys().instances());
    let (inflight, info) = (keys().inflight("me"), keys().info("me"));
    for key in [
        &clock,
        &instances,
        &inflight,
        &info,
        &keys().stats(),
        &keys().journal(),
        &"queues".to_owned(),
    ] {
        let mut bench = Bench::start();
        let orphans = bench.dead("dead", &[b"1".to_vec()]);
        bench.register("me");
        bench.push("work", &[b"waits"]);
        let held = bench.record("me", 1, "work", &[b"a".to_vec(), b"b".to_vec()]);
        overwrite(&mut bench, key);
        let turn = Turn {
            call: 2,
            acks: held[..1].to_vec(),
            requeues: vec![Requeue::Recorded(held[1].clone())],
            records: vec![record("work", b"c")],
            claims: claims(&["work"], 2),
            ..Turn::default()
        };
        let turned = bench.try_turn("me", &turn);
        let beaten = bench.try_beat("me");
        let recovered = bench.try_recover("dead", &orphans);
        if *key == inflight {
            // It holds no lease any more. What is there is not ours to touch.
            assert_eq!(turned.unwrap(), Turned::Lost);
            assert_eq!(beaten.unwrap(), Fenced::Lost);
            assert_eq!(bench.try_leave("me", &held, &held).unwrap(), Fenced::Lost);
            assert_eq!(bench.connection.get::<_, String>(key).unwrap(), "not ours");
            assert_eq!(queue(&bench.server, "work"), [&b"1"[..], b"waits"]);
            continue;
        }
        let done = match turned.unwrap() {
            Turned::Done(done) => done,
            other => panic!("{key}: {other:?}"),
        };
        assert_eq!(payloads(&done), [&b"b"[..], b"waits"], "{key}");
        if *key == clock || *key == instances {
            assert!(refusal(beaten).contains("WRONGTYPE"), "{key}");
        } else {
            assert!(matches!(beaten.unwrap(), Fenced::Alive(_)), "{key}");
        }
        // The orphan is back, or still in flight.
        let back = queue(&bench.server, "work") == [b"1"];
        let still = bench.fields("dead").contains(&orphans[0].as_bytes().to_vec());
        assert!(back != still, "{key}: {recovered:?}");
        if ![&clock, &instances].contains(&key) {
            let noted = ![&keys().stats(), &keys().journal()].contains(&key);
            let outcomes = vec![Outcome::Ended(End::Requeued)];
            let settled = recovered.unwrap().expect("it is fenced");
            assert_eq!((settled.outcomes, settled.noted), (outcomes, noted), "{key}");
        }
    }
}

#[test]
fn an_overwritten_hash_does_not_stop_the_recovery_of_others() {
    let mut bench = Bench::with("broken");
    bench.outlive_leases();
    bench.register("dead");
    let orphans = bench.record("dead", 1, "work", &[b"1".to_vec()]);
    bench.outlive_leases();
    overwrite(&mut bench, &keys().inflight("broken"));
    assert_eq!(bench.due(), Some("broken".into()));
    // It must not be named for ever, and what it holds is not ours to delete.
    assert_eq!(bench.reap("broken"), Reaped::Overwritten);
    assert_eq!(bench.due(), Some("dead".into()));
    assert!(matches!(bench.reap("dead"), Reaped::Fenced(_)));
    assert_eq!(
        bench.recover("dead", &orphans),
        Some(vec![Outcome::Ended(End::Requeued)])
    );
    assert!(bench.exists(&keys().inflight("broken")));
    assert!(bench.lease_end("broken").is_some());
}

#[test]
fn a_server_that_forgot_the_scripts_is_given_them_again() {
    let mut bench = Bench::with("me");
    for call in 1..=3 {
        redis::cmd("SCRIPT").arg("FLUSH").exec(&mut bench.connection).unwrap();
        bench.record("me", call, "work", &[b"a".to_vec()]);
        redis::cmd("SCRIPT").arg("FLUSH").exec(&mut bench.connection).unwrap();
        bench.beat("me");
    }
    assert_eq!(bench.fields("me").len(), 4);
    assert_eq!(bench.link.generation(), 1);
}

#[test]
fn the_tests_know_the_scripts_by_the_hashes_that_are_sent() {
    let mut bench = Bench::with("me");
    bench.beat("me");
    bench.record("me", 1, "work", &[b"a".to_vec()]);
    bench.outlive_leases();
    bench.reap("me");
    let tokens: Vec<Token> = bench.fields("me").into_iter().filter_map(Token::read).collect();
    bench.recover("me", &tokens);
    bench.try_leave("me", &[], &[]).unwrap();
    for script in [
        &lua::REGISTER,
        &lua::BEAT,
        &lua::TURN,
        &lua::REAP,
        &lua::RECOVER,
        &lua::LEAVE,
    ] {
        let known: Vec<bool> = redis::cmd("SCRIPT")
            .arg("EXISTS")
            .arg(script.get_hash())
            .query(&mut bench.connection)
            .unwrap();
        assert_eq!(known, [true]);
    }
}
