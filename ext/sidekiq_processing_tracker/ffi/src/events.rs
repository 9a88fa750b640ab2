//! Events as Hashes with String keys.

use magnus::{encoding::EncodingCapable, Error, IntoValue, RHash, RString, Ruby};
use processing_tracker_core::decision::{End, Reason};
use processing_tracker_core::events::Event;

/// The Hash of an event.
///
/// # Errors
/// What Ruby raises when it is out of memory.
pub fn to_hash(ruby: &Ruby, event: Event) -> Result<RHash, Error> {
    let hash = ruby.hash_new();
    let set = |key: &str, value: magnus::Value| hash.aset(key, value);
    match event {
        Event::Started {
            identity,
            server,
            namespace,
            interval,
            ttl,
        } => {
            set("kind", "started".into_value_with(ruby))?;
            set("identity", identity.into_value_with(ruby))?;
            set("server", server.into_value_with(ruby))?;
            set("namespace", namespace.into_value_with(ruby))?;
            set("interval_ms", millis(interval).into_value_with(ruby))?;
            set("ttl_ms", millis(ttl).into_value_with(ruby))?;
        }
        Event::Settled(settled) => {
            set("kind", kind(settled.end).into_value_with(ruby))?;
            set("outcome", settled.end.name().into_value_with(ruby))?;
            set("reason", settled.reason.map(Reason::name).into_value_with(ruby))?;
            set("jid", settled.jid.into_value_with(ruby))?;
            set("job_class", settled.class.into_value_with(ruby))?;
            set("queue", text(ruby, &settled.queue)?.into_value_with(ruby))?;
            set("from", settled.from.into_value_with(ruby))?;
            set("by", settled.by.into_value_with(ruby))?;
            set("recoveries", settled.recoveries.into_value_with(ruby))?;
            set("at", settled.at_ms.into_value_with(ruby))?;
            let payload = settled.payload.map(|payload| text(ruby, &payload)).transpose()?;
            set("payload", payload.into_value_with(ruby))?;
        }
        Event::Outage { error } => {
            set("kind", "outage".into_value_with(ruby))?;
            set("error", error.into_value_with(ruby))?;
        }
        Event::OutageOver { lasted } => {
            set("kind", "outage_over".into_value_with(ruby))?;
            set("seconds", lasted.as_secs_f64().into_value_with(ruby))?;
        }
        Event::LeaseLost {
            identity,
            new_identity,
            jobs,
        } => {
            set("kind", "lease_lost".into_value_with(ruby))?;
            set("identity", identity.into_value_with(ruby))?;
            set("new_identity", new_identity.into_value_with(ruby))?;
            let list = ruby.ary_new();
            for job in jobs {
                let facts = job.facts();
                let hash = ruby.hash_new();
                hash.aset("jid", facts.jid)?;
                hash.aset("job_class", facts.class)?;
                hash.aset("queue", text(ruby, &job.queue)?)?;
                hash.aset("payload", text(ruby, &job.payload)?)?;
                list.push(hash)?;
            }
            set("jobs", list.into_value_with(ruby))?;
        }
        Event::Note(message) => {
            set("kind", "note".into_value_with(ruby))?;
            set("message", message.into_value_with(ruby))?;
        }
        Event::Warning(message) => {
            set("kind", "warning".into_value_with(ruby))?;
            set("message", message.into_value_with(ruby))?;
        }
        Event::Dropped(count) => {
            set("kind", "dropped".into_value_with(ruby))?;
            set("count", count.into_value_with(ruby))?;
        }
    }
    Ok(hash)
}

fn kind(end: End) -> &'static str {
    match end {
        End::Requeued => "recovered",
        other => other.name(),
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Text as it came: its bytes may be no UTF-8.
///
/// # Errors
/// What Ruby raises when it is out of memory.
pub fn text(ruby: &Ruby, bytes: &[u8]) -> Result<RString, Error> {
    let string = ruby.str_from_slice(bytes);
    string.enc_associate(ruby.utf8_encindex())?;
    Ok(string)
}
