//! What recovery needs to know of a job. A payload is read, never written again: its bytes go back as they came.

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha1_smol::Sha1;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// The facts that a payload tells about its job. All empty for one that cannot be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether it is a JSON object.
    pub readable: bool,
    /// The job's id.
    pub jid: Option<String>,
    /// Its class; for a job of ActiveJob the class that Sidekiq's wrapper wraps.
    pub class: Option<String>,
    /// The class that Sidekiq runs: for a job of ActiveJob the wrapper.
    pub runs: Option<String>,
    /// What it says about being tracked. It beats what the class says.
    pub processing: Option<bool>,
    /// It says that it is not to enter the dead set.
    pub undying: bool,
    /// The lock of sidekiq-unique-jobs that it may hold.
    pub lock: Option<Lock>,
}

/// A job's lock of sidekiq-unique-jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// When it is held.
    pub kind: LockKind,
    /// Its name, without the `:RUN` of the runtime lock.
    pub digest: String,
    /// How many jobs may hold it at a time.
    pub limit: u64,
    /// How long it lasts at most.
    pub ttl: Option<Duration>,
}

/// When a lock is held, as far as recovery cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// From the push to the start of the run; another one, the runtime lock, during the run.
    UntilAndWhileExecuting,
    /// From the push to the end of the run, or beyond it until it expires.
    UntilExecuted,
    /// Before the run or during it only, or one that is not known.
    Other,
}

/// Reads the facts. Where a field comes twice the last one counts, as in Ruby.
#[must_use]
pub fn read(payload: &[u8]) -> Facts {
    let mut json = serde_json::Deserializer::from_slice(payload);
    let facts = json.deserialize_map(FactsVisitor).unwrap_or_default();
    match json.end() {
        Ok(()) => facts,
        Err(_) => Facts::default(),
    }
}

/// The SHA1 of a payload, in hexadecimal digits.
#[must_use]
pub fn sha1(payload: &[u8]) -> String {
    Sha1::from(payload).digest().to_string()
}

/// The name under which a job's recoveries are counted: its id, or where it has none the SHA1 of its payload.
#[must_use]
pub fn counted_as(facts: &Facts, payload: &[u8]) -> String {
    match &facts.jid {
        Some(jid) if !jid.is_empty() => jid.clone(),
        _ => sha1(payload),
    }
}

/// Where a payload says when it was enqueued, or would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// There, the value.
    At(Range<usize>),
    /// Nowhere: before this closing brace.
    Missing(usize),
}

/// What is to be known of a job that goes to its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enqueuing {
    /// The queue.
    pub queue: String,
    /// The place of `enqueued_at`.
    pub enqueued_at: Place,
}

/// Reads a job that Sidekiq's client would push with no change but that of `enqueued_at`. `None` for any other: one that it
/// would refuse (no class, no arguments), add fields to (an id, one of its `defaults`), take fields from (`transient`), schedule
/// (`at`) or read in another way than it is written (a field that comes twice). In doubt that client decides.
#[must_use]
pub fn place_of_enqueued_at(payload: &[u8], defaults: &[String], transient: &[String]) -> Option<Enqueuing> {
    // Ruby refuses some of what can be skipped here without looking into it, and reads no bytes that are not UTF-8.
    let text = std::str::from_utf8(payload).ok()?;
    let fields: Fields = serde_json::from_str(text).ok()?;
    let is = |name: &str, kind: fn(&str) -> bool| fields.0.get(name).is_some_and(|value| kind(value.get()));
    let is_absent_or = |name: &str, kind: fn(&str) -> bool| fields.0.get(name).is_none_or(|value| kind(value.get()));
    let text_of = |name: &str| -> Option<String> {
        let value = serde_json::from_str::<String>(fields.0.get(name)?.get()).ok()?;
        Some(value).filter(|value| !value.is_empty())
    };
    let regular = text_of("class").is_some()
        && text_of("jid").is_some()
        && is("args", |value| value.starts_with('['))
        && is("created_at", |value| value != "null" && value != "false")
        && is_absent_or("tags", |value| {
            value == "null" || value == "false" || value.starts_with('[')
        })
        && is_absent_or("retry_for", |value| {
            value == "null" || value == "false" || value.parse::<u32>().is_ok_and(|seconds| seconds <= 1_000_000_000)
        })
        && !fields.0.contains_key("at")
        && !transient.iter().any(|name| fields.0.contains_key(&name[..]))
        && defaults.iter().all(|name| fields.0.contains_key(&name[..]))
        && serde_json::from_str::<serde_json::Value>(text).is_ok();
    let queue = text_of("queue").filter(|_| regular)?;
    let enqueued_at = match fields.0.get("enqueued_at") {
        Some(value) => {
            let start = value.get().as_ptr() as usize - text.as_ptr() as usize;
            Place::At(start..start + value.get().len())
        }
        None => Place::Missing(text.rfind('}')?),
    };
    Some(Enqueuing { queue, enqueued_at })
}

/// The fields of an object, none of which comes twice.
struct Fields<'a>(HashMap<Cow<'a, str>, &'a RawValue>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EachFieldVisitor)
    }
}

struct EachFieldVisitor;

impl<'de> Visitor<'de> for EachFieldVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a job")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = HashMap::new();
        while let Some((name, value)) = map.next_entry::<Cow<'de, str>, &'de RawValue>()? {
            if fields.insert(name, value).is_some() {
                return Err(A::Error::custom("a field comes twice"));
            }
        }
        Ok(Fields(fields))
    }
}

struct FactsVisitor;

impl<'de> Visitor<'de> for FactsVisitor {
    type Value = Facts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a job")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Facts, A::Error> {
        let mut facts = Facts {
            readable: true,
            ..Facts::default()
        };
        let (mut wrapped, mut lock) = (None, LockFields::default());
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "jid" => facts.jid = text(map.next_value()?),
                "class" => facts.runs = text(map.next_value()?),
                "wrapped" => wrapped = text(map.next_value()?),
                "processing" => facts.processing = Some(map.next_value::<&RawValue>()?.get() == "true"),
                "dead" => facts.undying = map.next_value::<&RawValue>()?.get() == "false",
                "lock" => lock.kind = text(map.next_value()?),
                "lock_digest" => lock.digest = text(map.next_value()?),
                "unique_digest" => lock.digest_of_6 = text(map.next_value()?),
                "lock_limit" => lock.limit = whole(map.next_value()?),
                "lock_ttl" => lock.ttl = Some(whole(map.next_value()?)),
                "lock_expiration" => lock.expiration = whole(map.next_value()?),
                _ => {
                    // Skipped without looking into it, however deep it is and whatever its numbers and escapes mean.
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        facts.class = wrapped.or_else(|| facts.runs.clone());
        facts.lock = lock.read();
        Ok(facts)
    }
}

/// What sidekiq-unique-jobs writes into a payload.
#[derive(Default)]
struct LockFields {
    kind: Option<String>,
    digest: Option<String>,
    digest_of_6: Option<String>,
    limit: Option<u64>,
    /// The outer one: whether the field is there.
    ttl: Option<Option<u64>>,
    expiration: Option<u64>,
}

impl LockFields {
    fn read(self) -> Option<Lock> {
        let digest = self.digest.filter(|digest| !digest.is_empty()).or(self.digest_of_6)?;
        let digest = digest.strip_suffix(":RUN").unwrap_or(&digest);
        if digest.is_empty() {
            return None;
        }
        Some(Lock {
            kind: match self.kind.as_deref() {
                Some("until_and_while_executing") => LockKind::UntilAndWhileExecuting,
                Some("until_executed" | "until_expired") => LockKind::UntilExecuted,
                _ => LockKind::Other,
            },
            digest: digest.to_owned(),
            limit: self.limit.unwrap_or(1),
            ttl: self
                .ttl
                .unwrap_or(self.expiration)
                .filter(|ttl| *ttl > 0)
                .map(Duration::from_secs),
        })
    }
}

fn text(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

/// A whole number, also of one with a fraction, an exponent or in quotes, as Ruby's `to_i` reads it.
fn whole(raw: &RawValue) -> Option<u64> {
    let text = raw.get();
    if let Some(quoted) = text.strip_prefix('"') {
        return quoted.split(|other: char| !other.is_ascii_digit()).next()?.parse().ok();
    }
    text.parse().ok().or_else(|| {
        let number: f64 = text.parse().ok()?;
        // What `u64` cannot hold is none.
        format!("{:.0}", number.trunc()).parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::{counted_as, read, Facts, Lock, LockKind};
    use std::time::Duration;

    #[track_caller]
    fn assert_tells(payload: &[u8], jid: &str, class: &str) {
        let facts = read(payload);
        assert_eq!((facts.jid.as_deref(), facts.class.as_deref()), (Some(jid), Some(class)));
        assert!(facts.readable);
    }

    #[test]
    fn tells_the_job() {
        assert_tells(
            br#" {"class":"A","args":[1e400,123456789012345678901234567890,"\ud800"],"jid":"a1"} "#,
            "a1",
            "A",
        );
        let wrapped = br#"{"class":"Wrapper","wrapped":"B","jid":"b\u0031","jid":"b2"}"#;
        assert_tells(wrapped, "b2", "B");
        assert_eq!(read(wrapped).runs.as_deref(), Some("Wrapper"));
        let deep = format!(
            r#"{{"class":"A","args":{}{},"jid":"x"}}"#,
            "[".repeat(5000),
            "]".repeat(5000)
        );
        assert_tells(deep.as_bytes(), "x", "A");
    }

    #[test]
    fn tells_whether_it_is_marked_and_may_die() {
        assert_eq!(read(b"{}").processing, None);
        assert_eq!(read(br#"{"processing":true}"#).processing, Some(true));
        for other in ["false", "null", "1", "\"true\""] {
            let facts = read(format!(r#"{{"processing" : {other} }}"#).as_bytes());
            assert_eq!(facts.processing, Some(false), "{other}");
        }
        assert!(read(br#"{"dead":false}"#).undying);
        for other in [r#"{"dead":true}"#, r#"{"dead":null}"#, "{}"] {
            assert!(!read(other.as_bytes()).undying, "{other}");
        }
    }

    #[test]
    fn tells_the_lock() {
        let lock = |fields: &str| read(format!(r#"{{"jid":"a",{fields}}}"#).as_bytes()).lock;
        let plain = Lock {
            kind: LockKind::Other,
            digest: "uniquejobs:1".into(),
            limit: 1,
            ttl: None,
        };
        assert_eq!(lock(r#""lock":"until_executed""#), None);
        assert_eq!(lock(r#""lock_digest":"""#), None);
        assert_eq!(lock(r#""lock_digest":"uniquejobs:1""#), Some(plain.clone()));
        // As `clear_unique_jobs_lock` chooses.
        assert_eq!(
            lock(r#""lock_digest":"","unique_digest":"uniquejobs:1""#),
            Some(plain.clone())
        );
        assert_eq!(
            lock(r#""lock":"while_executing","lock_digest":"uniquejobs:1:RUN","lock_ttl":null,"lock_expiration":9"#),
            Some(plain.clone())
        );
        assert_eq!(
            lock(r#""lock":"until_expired","unique_digest":"uniquejobs:1","lock_limit":"3","lock_ttl":1.5"#),
            Some(Lock {
                kind: LockKind::UntilExecuted,
                limit: 3,
                ttl: Some(Duration::from_secs(1)),
                ..plain.clone()
            })
        );
        assert_eq!(
            lock(r#""lock":"until_and_while_executing","lock_digest":"uniquejobs:1","lock_expiration":60"#),
            Some(Lock {
                kind: LockKind::UntilAndWhileExecuting,
                ttl: Some(Duration::from_secs(60)),
                ..plain
            })
        );
    }

    #[test]
    fn reads_whole_numbers_as_ruby_does() {
        let limit = |value: &str| {
            let payload = format!(r#"{{"lock_digest":"uniquejobs:1","lock_limit":{value}}}"#);
            read(payload.as_bytes()).lock.unwrap().limit
        };
        for (value, is) in [
            ("10", 10),
            ("2.9", 2),
            ("1e1", 10),
            ("1.55E+1", 15),
            ("150e-1", 15),
            (r#""3""#, 3),
            (r#""1e1""#, 1),
            ("null", 1),
            ("-2", 1),
            (r#""many""#, 1),
        ] {
            assert_eq!(limit(value), is, "{value}");
        }
    }

    #[test]
    fn knows_nothing_of_what_it_cannot_read() {
        for payload in [
            &b"not json"[..],
            b"",
            b"null",
            b"5",
            b"[]",
            b"{\"jid\":\"a\"",
            b"{\"jid\":\"\xff\"}",
            b"{} {}",
        ] {
            assert_eq!(read(payload), Facts::default());
        }
        let odd = read(br#"{"jid":5,"class":null,"lock_digest":7}"#);
        assert_eq!((odd.readable, odd.jid, odd.class, odd.lock), (true, None, None, None));
    }

    #[test]
    fn counts_a_job_without_an_id_by_its_bytes() {
        let name = |payload: &[u8]| counted_as(&read(payload), payload);
        assert_eq!(name(br#"{"jid":"a"}"#), "a");
        assert_eq!(name(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(name(br#"{"jid":""}"#).len(), 40);
    }
}
