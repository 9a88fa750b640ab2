//! An orphan as an entry of Sidekiq's dead set.

use crate::decision::Reason;
use crate::entry::Token;
use crate::settings::{Policy, Timestamps};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// What is to be said when the dead set lost so many entries, since it was full or they were old.
#[must_use]
pub(crate) fn trimmed(entries: u64) -> Option<String> {
    (entries > 0).then(|| {
        format!("Sidekiq's dead set was trimmed (dead_max_jobs, dead_timeout_in_seconds): entries lost: {entries}")
    })
}

/// An orphan that goes to the dead set.
#[derive(Debug, Clone, Copy)]
pub struct Death<'a> {
    /// Why.
    pub reason: Reason,
    /// Its name in the in-flight hash.
    pub token: &'a Token,
    /// The dead instance.
    pub from: &'a [u8],
    /// How often it was orphaned, this time included.
    pub recoveries: u64,
    /// When, in ms since the epoch by Redis' clock.
    pub at_ms: u64,
}

impl Death<'_> {
    /// The entry: the payload with the fields in which Sidekiq's pages and API look for an error; all other bytes are the
    /// payload's. Without the field `queue` it could not be retried, so that is added where it is missing.
    ///
    /// What is no JSON at all goes as it is, like in Sidekiq, whose pages show it. But JSON that is no object would break
    /// those pages: it becomes the only argument of a job without a class.
    #[must_use]
    pub fn entry(&self, payload: &[u8], policy: &Policy) -> Vec<u8> {
        let Some(fields) = Fields::of(payload) else {
            return match serde_json::from_slice::<IgnoredAny>(payload) {
                Err(_) => payload.to_vec(),
                Ok(_) => {
                    let wrapped = [b"{\"args\":[", payload, b"]}"].concat();
                    self.with_error(&wrapped, &Fields::of(&wrapped).unwrap_or_default(), policy)
                }
            };
        };
        self.with_error(payload, &fields, policy)
    }

    fn with_error(&self, payload: &[u8], fields: &Fields, policy: &Policy) -> Vec<u8> {
        let failed_at = match policy.timestamps {
            Timestamps::Seconds => format!("{}.{:03}", self.at_ms / 1000, self.at_ms % 1000),
            Timestamps::Milliseconds => self.at_ms.to_string(),
        };
        let mut changes = vec![
            ("error_message", quoted(&self.message(policy)), &fields.error_message),
            ("error_class", quoted(self.error_class()), &fields.error_class),
            ("failed_at", failed_at, &fields.failed_at),
        ];
        if fields.queue.is_none() {
            changes.push(("queue", quoted(&String::from_utf8_lossy(self.token.queue())), &None));
        }
        let (mut replaced, mut added) = (Vec::new(), String::new());
        for (name, value, place) in changes {
            match place {
                Some(place) => replaced.push((place.clone(), value)),
                None => added.push_str(&format!(",\"{name}\":{value}")),
            }
        }
        let added = if fields.any {
            &added[..]
        } else {
            added.trim_start_matches(',')
        };
        replaced.push((fields.end..fields.end, added.to_owned()));
        replaced.sort_by_key(|(place, _)| place.start);

        let (mut entry, mut from) = (Vec::with_capacity(payload.len() + 500), 0);
        for (place, value) in replaced {
            entry.extend_from_slice(&payload[from..place.start]);
            entry.extend_from_slice(value.as_bytes());
            from = place.end;
        }
        entry.extend_from_slice(&payload[from..]);
        entry
    }

    /// The class of the error that the entry names.
    #[must_use]
    pub fn error_class(&self) -> &'static str {
        match self.reason {
            Reason::PoisonPill => "Sidekiq::ProcessingTracker::PoisonPill",
            Reason::Unmarked | Reason::Unreadable => "Sidekiq::ProcessingTracker::Orphaned",
        }
    }

    /// The error's message.
    #[must_use]
    pub fn message(&self, policy: &Policy) -> String {
        let from = String::from_utf8_lossy(self.from);
        let since = match self.token.taken_at_ms() {
            0 => "an unknown time".to_owned(),
            ms => utc(ms),
        };
        match self.reason {
            Reason::PoisonPill => format!(
                "Orphaned {} times, each within {} of the one before, the last time by the death of {from}, where it was in flight since {since}. \
                 It may be what kills the processes, so it is not put back again (max_recoveries is {})",
                self.recoveries,
                hours(policy.recovery_window),
                policy.max_recoveries.unwrap_or_default()
            ),
            Reason::Unmarked => format!(
                "Orphaned by the death of {from}, where it was in flight since {since}. It was not marked \
                 (processing: true), so it was not put back"
            ),
            Reason::Unreadable => format!(
                "Orphaned by the death of {from}, where it was in flight since {since}. It is no job that can be read, so \
                 nobody can tell whether it was marked, and it was not put back"
            ),
        }
    }
}

/// Where a payload has the fields that an entry sets.
#[derive(Default)]
struct Fields {
    error_message: Option<Range<usize>>,
    error_class: Option<Range<usize>>,
    failed_at: Option<Range<usize>>,
    queue: Option<Range<usize>>,
    /// Whether it has any field.
    any: bool,
    /// Where the closing brace is.
    end: usize,
}

impl Fields {
    /// `None` for what is no JSON object.
    fn of(payload: &[u8]) -> Option<Self> {
        let mut json = serde_json::Deserializer::from_slice(payload);
        let mut fields = json.deserialize_map(FieldsVisitor(payload)).ok()?;
        json.end().ok()?;
        fields.end = payload.iter().rposition(|byte| *byte == b'}')?;
        Some(fields)
    }
}

struct FieldsVisitor<'a>(&'a [u8]);

impl<'de> Visitor<'de> for FieldsVisitor<'_> {
    type Value = Fields;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a job")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key::<String>()? {
            fields.any = true;
            let field = match key.as_str() {
                "error_message" => &mut fields.error_message,
                "error_class" => &mut fields.error_class,
                "failed_at" => &mut fields.failed_at,
                "queue" => &mut fields.queue,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            // Where a field comes twice the last one counts, as in Ruby.
            let raw = map.next_value::<&RawValue>()?.get();
            let start = (raw.as_ptr() as usize).saturating_sub(self.0.as_ptr() as usize);
            *field = Some(start..start + raw.len());
        }
        Ok(fields)
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn hours(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds => format!("{seconds} s"),
    }
}

/// A moment for people: `2026-11-24T17:05:00Z`.
fn utc(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Howard Hinnant's days to civil date: years begin in March, so that leap days come last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::read(b"1-2 1700000000123 work".to_vec()).unwrap()
    }

    fn entry_as(reason: Reason, payload: &[u8], timestamps: Timestamps) -> String {
        let policy = Policy {
            timestamps,
            ..Policy::default()
        };
        let token = token();
        let death = Death {
            reason,
            token: &token,
            from: b"pod:7:\"x\"",
            recoveries: 4,
            at_ms: 1_700_000_050_007,
        };
        String::from_utf8_lossy(&death.entry(payload, &policy)).into_owned()
    }

    fn entry(payload: &str) -> String {
        entry_as(Reason::Unmarked, payload.as_bytes(), Timestamps::Seconds)
    }

    const MESSAGE: &str = r#""Orphaned by the death of pod:7:\"x\", where it was in flight since 2023-11-14T22:13:20Z. It was not marked (processing: true), so it was not put back""#;
    const CLASS: &str = r#""Sidekiq::ProcessingTracker::Orphaned""#;

    #[test]
    fn adds_what_is_missing() {
        assert_eq!(
            entry(" {\"queue\" : \"work\", \"args\":[1e400,\"\\ud800\", 12345678901234567890] }\n"),
            format!(
                " {{\"queue\" : \"work\", \"args\":[1e400,\"\\ud800\", 12345678901234567890] ,\
                 \"error_message\":{MESSAGE},\"error_class\":{CLASS},\"failed_at\":1700000050.007}}\n"
            )
        );
        assert_eq!(
            entry("{}"),
            format!(
                "{{\"error_message\":{MESSAGE},\"error_class\":{CLASS},\"failed_at\":1700000050.007,\"queue\":\"work\"}}"
            )
        );
    }

    #[test]
    fn replaces_what_is_there() {
        assert_eq!(
            entry(
                r#"{"failed_at":5,"queue":null,"error_class":"X","x":{"error_class":"Y"},"error_message": {"a":"}"} }"#
            ),
            format!(
                r#"{{"failed_at":1700000050.007,"queue":null,"error_class":{CLASS},"x":{{"error_class":"Y"}},"error_message": {MESSAGE} }}"#
            )
        );
        let milliseconds = entry_as(
            Reason::PoisonPill,
            br#"{"failed_at":5,"queue":"q","error_class":"X"}"#,
            Timestamps::Milliseconds,
        );
        assert!(milliseconds.starts_with(
            r#"{"failed_at":1700000050007,"queue":"q","error_class":"Sidekiq::ProcessingTracker::PoisonPill","error_message":"Orphaned 4 times, each within 72 h of the one before, "#
        ));
    }

    #[test]
    fn keeps_every_other_byte() {
        let payload = b"{\"queue\":\"q\",\"args\":[\"\xff\xfe\"],\"\\u0061\":1}";
        let token = token();
        let death = Death {
            reason: Reason::PoisonPill,
            token: &token,
            from: b"\xff",
            recoveries: 4,
            at_ms: 1,
        };
        let entry = death.entry(payload, &Policy::default());
        assert_eq!(entry[..payload.len() - 1], payload[..payload.len() - 1]);
        assert!(entry.ends_with(b"\"failed_at\":0.001}"));
    }

    #[test]
    fn leaves_alone_what_is_no_json_and_wraps_what_is_no_job() {
        for raw in ["no json", "", "{\"a\":", "{} {}"] {
            assert_eq!(entry(raw), raw);
        }
        for odd in ["null", "5", "[]", " \"text\" "] {
            let entry = entry(odd);
            assert!(
                entry.starts_with(&format!("{{\"args\":[{odd}],\"error_message\":")),
                "{entry}"
            );
            assert!(entry.ends_with(",\"queue\":\"work\"}"), "{entry}");
        }
    }

    #[test]
    fn tells_moments() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696_000), "2000-02-29T12:34:56Z");
        assert_eq!(utc(1_709_251_199_999), "2024-02-29T23:59:59Z");
        assert_eq!(utc(4_102_444_800_000), "2100-01-01T00:00:00Z");
    }
}
