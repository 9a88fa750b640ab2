//! What recovery needs to know of a job. A payload is read, never written again: its bytes go back as they came.

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// The facts that a payload tells about its job. All empty for one that cannot be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The job's id.
    pub jid: Option<String>,
    /// Its class; for a job of ActiveJob the class that Sidekiq's wrapper wraps.
    pub class: Option<String>,
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

/// The name of the counter that tells how often a job was orphaned: its id, or what stands for the payload of a job that
/// has none.
#[must_use]
pub fn counter(payload: &[u8], jid: Option<&str>) -> String {
    match jid {
        Some(jid) if !jid.is_empty() => jid.to_owned(),
        _ => sha1_smol::Sha1::from(payload).digest().to_string(),
    }
}

struct FactsVisitor;

impl<'de> Visitor<'de> for FactsVisitor {
    type Value = Facts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a job")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Facts, A::Error> {
        let (mut jid, mut class, mut wrapped) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let field = match key.as_str() {
                "jid" => &mut jid,
                "class" => &mut class,
                "wrapped" => &mut wrapped,
                _ => {
                    // Skipped without looking into it, however deep it is and whatever its numbers and escapes mean.
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            *field = text(map.next_value::<&RawValue>()?);
        }
        Ok(Facts {
            jid,
            class: wrapped.or(class),
        })
    }
}

fn text(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

#[cfg(test)]
mod tests {
    use super::{read, Facts};

    fn facts(jid: &str, class: &str) -> Facts {
        Facts {
            jid: Some(jid.into()),
            class: Some(class.into()),
        }
    }

    #[test]
    fn tells_the_job() {
        assert_eq!(
            read(br#" {"class":"A","args":[1e400,123456789012345678901234567890,"\ud800"],"jid":"a1"} "#),
            facts("a1", "A")
        );
        assert_eq!(
            read(br#"{"class":"Wrapper","wrapped":"B","jid":"b\u0031","jid":"b2"}"#),
            facts("b2", "B")
        );
        let deep = format!(
            r#"{{"class":"A","args":{}{},"jid":"x"}}"#,
            "[".repeat(5000),
            "]".repeat(5000)
        );
        assert_eq!(read(deep.as_bytes()), facts("x", "A"));
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
        assert_eq!(read(br#"{"jid":5,"class":null}"#), Facts::default());
    }
}
