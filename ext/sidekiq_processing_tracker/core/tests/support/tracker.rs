//! Engines in this process, and what they leave in Redis.

use std::ops::Deref;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use processing_tracker_core::decision::End;
use processing_tracker_core::engine::{Engine, Recorded};
use processing_tracker_core::events::{Event, Events, Next};
use processing_tracker_core::keys::Keys;
use processing_tracker_core::link::Link;
use processing_tracker_core::orphans;
use processing_tracker_core::parker::{Parker, Woken};
use processing_tracker_core::registry::Handle;
use processing_tracker_core::settings::{Fetch, Policy, Settings};
use processing_tracker_core::target::{Address, Target};
use processing_tracker_core::Result;
use redis::Commands;

use super::redis_server::{RedisServer, PASSWORD, USER};
use super::wait::{eventually, eventually_some};

/// For what a healthy engine does at once, and a recovery within its ttl. Long, since the machine may be busy.
pub const SOON: Duration = Duration::from_secs(20);
/// The lease in most tests.
pub const TTL: Duration = Duration::from_secs(1);
/// The interval in most tests, and so the step of the lease clock.
pub const STEP: Duration = Duration::from_millis(200);
/// The namespace of the tests.
pub const NAMESPACE: &str = "sidekiq_processing";

/// The server behind this unix socket.
pub fn target(socket: &Path) -> Target {
    let mut target = Target::new(Address::Unix(socket.to_owned()));
    target.username = Some(USER.into());
    target.password = PASSWORD.into();
    target
}

/// Quick settings for the server behind this unix socket.
pub fn settings(socket: &Path, instance_id: &str) -> Settings {
    Settings {
        namespace: NAMESPACE.into(),
        instance_id: instance_id.into(),
        interval: STEP,
        ttl: TTL,
        hold: Duration::from_secs(300),
        redis: target(socket),
        queues: None,
        info: vec![("hostname".into(), instance_id.into())],
        fetch: Fetch::Sidekiq,
        policy: Policy::default(),
        polls: false,
        keep_control: Duration::ZERO,
        blocks: false,
        proc: None,
        exclusive: false,
    }
}

/// Quick settings of those who forget recoveries at once: where jobs are orphaned again and again by the test itself, none
/// is to be suspected of it.
pub fn forgetful(socket: &Path, instance_id: &str) -> Settings {
    let mut settings = settings(socket, instance_id);
    settings.policy.recovery_window = Duration::from_millis(1);
    settings
}

/// The same of those who claim their jobs themselves.
pub fn native(mut settings: Settings) -> Settings {
    settings.fetch = Fetch::Native;
    settings
}

/// The same, where Redis hands jobs over as they come.
pub fn blocking(settings: Settings) -> Settings {
    let mut settings = native(settings);
    settings.blocks = true;
    settings
}

/// The keys of the tests' namespace.
pub fn keys() -> Keys {
    Keys::new(NAMESPACE)
}

/// A link straight to the server.
pub fn link(server: &RedisServer) -> Link {
    Link::new(target(&server.socket_path()), Duration::from_secs(10))
}

/// An engine and what it has told so far. Dropping it stops it where it is, without leaving.
pub struct Tracker {
    engine: Engine,
    told: Mutex<Vec<Event>>,
}

impl Tracker {
    /// Starts an engine.
    pub fn start(settings: Settings) -> Self {
        Self {
            engine: Engine::start(settings).expect("an engine"),
            told: Mutex::default(),
        }
    }

    /// Starts an engine and waits until it is registered.
    pub fn registered(settings: Settings) -> Self {
        let tracker = Self::start(settings);
        tracker.wait_for("the engine is registered", |event| {
            matches!(event, Event::Started { .. })
        });
        tracker
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Its identity.
    pub fn identity(&self) -> String {
        self.engine.identity()
    }

    /// A job begins.
    pub fn track(&self, queue: &str, payload: &[u8]) -> Handle {
        self.engine.track(queue.into(), payload.into(), None)
    }

    /// A job begins, and its record is in Redis.
    #[track_caller]
    pub fn record(&self, queue: &str, payload: &[u8]) -> Handle {
        let handle = self.track(queue, payload);
        eventually(SOON, "the job is recorded", || self.is_recorded(handle, STEP));
        handle
    }

    /// Whether the job's record is in Redis, `within` this time.
    pub fn is_recorded(&self, handle: Handle, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            match self.engine.recorded(handle) {
                Recorded::Yes => return true,
                Recorded::No | Recorded::Lost => return false,
                Recorded::Wait(parker) => {
                    if Instant::now() >= deadline {
                        return false;
                    }
                    parker.wait(Some(deadline));
                }
            }
        }
    }

    /// All that the engine has told since its start.
    pub fn told(&self) -> Vec<Event> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        while let Next::Event(event) = self.engine.events().next() {
            told.push(event);
        }
        told.clone()
    }

    /// How many events of a kind it has told since its start.
    pub fn count(&self, kind: impl Fn(&Event) -> bool) -> usize {
        self.told().iter().filter(|event| kind(event)).count()
    }

    /// Waits until it has told this, and answers the first such event.
    #[track_caller]
    pub fn wait_for(&self, what: &str, kind: impl Fn(&Event) -> bool) -> Event {
        eventually_some(SOON, what, || self.told().into_iter().find(&kind))
    }

    /// Leaves and ends. False when that was not done in time.
    pub fn leave(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        self.engine.leave().wait(Some(deadline));
        self.stop();
        self.engine.has_left()
    }

    /// Ends the threads where they are, and waits for them.
    pub fn stop(&self) {
        for ended in self.engine.stop() {
            ended.wait(Some(Instant::now() + SOON));
        }
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} told ---\n{:#?}", self.identity(), self.told());
        }
        self.stop();
    }
}

/// An outage began.
pub fn is_outage(event: &Event) -> bool {
    matches!(event, Event::Outage { .. })
}

/// An outage ended.
pub fn is_outage_over(event: &Event) -> bool {
    matches!(event, Event::OutageOver { .. })
}

/// An instance was found dead before its lease ran out.
pub fn is_found_dead(event: &Event) -> bool {
    matches!(event, Event::Note(text) if text.starts_with("found dead before its lease ran out"))
}

/// A lease was lost.
pub fn is_lease_lost(event: &Event) -> bool {
    matches!(event, Event::LeaseLost { .. })
}

/// An orphan was put back.
pub fn is_recovered(event: &Event) -> bool {
    matches!(event, Event::Settled(settled) if settled.end == End::Requeued)
}

/// What lies in a queue, in the order in which Sidekiq takes it.
pub fn queue(server: &RedisServer, name: &str) -> Vec<Vec<u8>> {
    let mut jobs: Vec<Vec<u8>> = server.connect().lrange(format!("queue:{name}"), 0, -1).unwrap();
    jobs.reverse();
    jobs
}

/// All payloads in flight, of all instances.
pub fn in_flight(server: &RedisServer) -> Vec<Vec<u8>> {
    let mut connection = server.connect();
    // In one instant.
    let script = redis::Script::new(
        "local payloads = {}
         for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
           local fields = redis.call('TYPE', key).ok == 'hash' and redis.call('HGETALL', key) or {}
           for i = 1, #fields, 2 do
             local number = string.match(fields[i], '^(%d+%-%d+)%+ ')
             -- A claim that found nothing has a token without a list, for a moment.
             local payload = fields[i + 1]
             if number then payload = redis.call('LINDEX', key .. ':' .. number, 0) end
             if fields[i] ~= 'call' and payload then payloads[#payloads + 1] = payload end
           end
         end
         for _, key in ipairs(redis.call('KEYS', ARGV[2])) do
           for _, payload in ipairs(redis.call('TYPE', key).ok == 'list' and redis.call('LRANGE', key, 0, -1) or {}) do
             payloads[#payloads + 1] = payload
           end
         end
         return payloads",
    );
    script
        .arg(format!("{NAMESPACE}:inflight:*"))
        .arg(format!("{NAMESPACE}:hands:*"))
        .invoke(&mut connection)
        .unwrap()
}

/// Every instance that is listed.
pub fn instances(server: &RedisServer) -> Vec<String> {
    server.connect().zrange(keys().instances(), 0, -1).unwrap()
}

/// Our keys, without their namespace, sorted.
pub fn our_keys(server: &RedisServer) -> Vec<String> {
    let all: Vec<String> = server.connect().keys(format!("{NAMESPACE}:*")).unwrap();
    let mut keys: Vec<String> = all.iter().map(|key| key[NAMESPACE.len() + 1..].to_owned()).collect();
    keys.sort();
    keys
}

/// Fails unless only what may remain at rest remains.
#[track_caller]
pub fn assert_at_rest(server: &RedisServer) {
    // On a busy machine a registration may get no answer in time. Nobody uses what it made; it runs out.
    let is_unused = |identity: &String| {
        let fields: Vec<(String, String)> = server.connect().hgetall(keys().inflight(identity)).unwrap();
        fields == [("call".to_owned(), "0".to_owned())]
    };
    if instances(server).iter().any(is_unused) {
        recover_all(&settings(&server.socket_path(), "at rest")).unwrap();
    }
    let mut keys = our_keys(server);
    // Counters, and hands that are closed.
    let has_ttl = |key: &String| {
        let is_hand = key.starts_with("hands:") && key.split(':').count() == 5;
        key == "recoveries" || key.starts_with("recoveries:") || is_hand
    };
    for key in keys.iter().filter(|key| has_ttl(key)) {
        // It may have gone meanwhile.
        let ttl: i64 = server.connect().pttl(format!("{NAMESPACE}:{key}")).unwrap();
        assert!(ttl != -1, "{key} has no TTL");
    }
    keys.retain(|key| !matches!(key.as_str(), "clock" | "journal" | "stats") && !has_ttl(key));
    assert_eq!(keys, Vec::<String>::new(), "left behind");
}

/// What came of a recovery, and what it told.
#[derive(Debug, Default)]
pub struct Recovered {
    counts: orphans::Recovered,
    pub events: Vec<Event>,
}

impl Deref for Recovered {
    type Target = orphans::Recovered;

    fn deref(&self) -> &Self::Target {
        &self.counts
    }
}

/// `reenqueue_orphans`, with all that it told.
pub fn recover(settings: &Settings, cancel: &Parker) -> Result<Recovered> {
    let events = Events::default();
    std::thread::scope(|scope| {
        // It waits for a reader that is far behind.
        let reader = scope.spawn(|| {
            let mut told = Vec::new();
            loop {
                match events.next() {
                    Next::Event(event) => told.push(event),
                    Next::Wait(parker) => {
                        parker.wait(None);
                    }
                    Next::Closed => return told,
                }
            }
        });
        let counts = orphans::reenqueue_orphans(settings, cancel, &events);
        let events = reader.join().unwrap();
        Ok(Recovered {
            counts: counts?,
            events,
        })
    })
}

/// `reenqueue_orphans`, which a test must not wait for for ever.
#[track_caller]
pub fn recover_all(settings: &Settings) -> Result<Recovered> {
    let cancel = Parker::new();
    let watch = std::thread::spawn({
        let cancel = cancel.clone();
        move || match cancel.wait(Some(Instant::now() + SOON * 2)) {
            Woken::Done => true,
            _ => {
                cancel.unpark();
                false
            }
        }
    });
    let report = recover(settings, &cancel);
    cancel.unpark();
    assert!(watch.join().unwrap(), "recovery does not end: {report:?}");
    report
}

/// One total of the recoveries.
pub fn stat(server: &RedisServer, outcome: &str) -> u64 {
    let total: Option<u64> = server.connect().hget(keys().stats(), outcome).unwrap();
    total.unwrap_or(0)
}

/// One settled job in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalLine {
    pub from: String,
    pub by: String,
    pub jid: String,
    pub class: String,
    pub queue: String,
    pub outcome: String,
    pub reason: String,
    pub recoveries: u64,
    pub lock: String,
}

/// What the journal says, from its beginning.
pub fn journal(server: &RedisServer) -> Vec<JournalLine> {
    type Entry = (String, Vec<String>);
    let entries: Vec<Entry> = redis::cmd("XRANGE")
        .arg(keys().journal())
        .arg("-")
        .arg("+")
        .query(&mut server.connect())
        .unwrap();
    let mut lines = Vec::new();
    for (_, fields) in entries {
        let names: Vec<&str> = fields[..8].iter().step_by(2).map(String::as_str).collect();
        assert_eq!(names, ["from", "by", "piece", "outcomes"]);
        let moved = fields[7].bytes().filter(|letter| *letter != b'-').count();
        assert_eq!(fields[8..].len(), moved * 14, "{fields:?}");
        for job in fields[8..].chunks(14) {
            let names: Vec<&str> = job.iter().step_by(2).map(String::as_str).collect();
            assert_eq!(
                names,
                ["jid", "class", "queue", "outcome", "reason", "recoveries", "lock"]
            );
            lines.push(JournalLine {
                from: fields[1].clone(),
                by: fields[3].clone(),
                jid: job[1].clone(),
                class: job[3].clone(),
                queue: job[5].clone(),
                outcome: job[7].clone(),
                reason: job[9].clone(),
                recoveries: job[11].parse().unwrap(),
                lock: job[13].clone(),
            });
        }
    }
    lines
}

/// A job as Sidekiq writes it.
pub fn job(jid: &str) -> Vec<u8> {
    format!(r#"{{"class":"HardJob","args":[1],"jid":"{jid}","processing":true}}"#).into_bytes()
}

/// So many different jobs.
pub fn jobs(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| job(&format!("j{i}"))).collect()
}

/// Payloads that no JSON library reads and writes again unchanged, and some that none reads at all.
pub fn hostile_payloads() -> Vec<Vec<u8>> {
    let deep = format!(
        r#"{{"class":"A","jid":"deep","args":{}{}}}"#,
        "[".repeat(5000),
        "]".repeat(5000)
    );
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = format!(r#"{{"class":"A","jid":"large","args":["{}"]}}"#, "x".repeat(1 << 20));
    vec![
        br#"{"class":"A","jid":"surrogate","args":["\ud800","\udc00\ud800"]}"#.to_vec(),
        br#"{"class":"A","jid":"one","jid":"twice","args":[],"args":[1]}"#.to_vec(),
        deep.into_bytes(),
        b"{\"class\":\"A\",\"jid\":\"utf8\",\"args\":[\"\xff\xfe\xc0\x80\"]}".to_vec(),
        br#"{"class":"A","jid":"huge","args":[1e400,-1e400,1e-400,0.1e1,-0]}"#.to_vec(),
        br#"{"class":"A","jid":"big","args":[123456789012345678901234567890123456789012345678901234567890]}"#.to_vec(),
        large.into_bytes(),
        Vec::new(),
        b"null".to_vec(),
        b"this is no JSON \r\n at all".to_vec(),
        b"{\"class\":\"A\",\"jid\":\"cut".to_vec(),
        b" \t{ \"jid\" : \"spaces\" , \"class\" : \"A\" }\n".to_vec(),
        "{\"class\":\"Ä\",\"jid\":\"ü\\u00fc\u{2028}\u{1F600}\"}"
            .as_bytes()
            .to_vec(),
        every_byte,
    ]
}
