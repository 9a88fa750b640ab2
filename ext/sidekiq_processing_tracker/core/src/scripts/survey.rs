//! Looks at instances, for people and for checks. They change nothing.

use super::answer::{bytes, whole, Answer};
use super::SURVEY;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::{Call, Link};

/// The lease clock as it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clock {
    /// When it was last moved, by itself.
    pub now: f64,
    /// When it was last looked at, by the server's time.
    pub seen: f64,
    /// How far it may move at once.
    pub step: f64,
    /// The lease.
    pub ttl: f64,
}

/// What a survey sees of one instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Sight {
    /// When its lease ends, or the hold of its reaper.
    pub lease_end: f64,
    /// Whether it has its lease.
    pub leased: bool,
    /// How many jobs it has in flight; `None` where somebody has overwritten its hash.
    pub in_flight: Option<u64>,
    /// The fields of its info that were asked for; all `None` where somebody has overwritten that.
    pub info: Vec<Option<Vec<u8>>>,
}

/// What a survey sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// The server's time, in ms since the epoch.
    pub server: f64,
    /// `None` where there is none that can be read.
    pub clock: Option<Clock>,
    /// One for each identity asked about; `None` for one that has gone.
    pub instances: Vec<Option<Sight>>,
}

/// Looks at instances. Changes nothing.
///
/// # Errors
/// As for `register`.
pub fn survey(link: &mut Link, keys: &Keys, identities: &[Vec<u8>], fields: &[&str]) -> Result<Survey> {
    let each = identities.iter().flat_map(|identity| {
        [
            keys.inflight_of(identity),
            keys.info_of(identity),
            keys.hands_of(identity),
        ]
    });
    let mut call = Call::new(
        [keys.clock().into_bytes(), keys.instances().into_bytes()]
            .into_iter()
            .chain(each),
    );
    call.count(fields.len());
    for field in fields {
        call.arg(*field);
    }
    for identity in identities {
        call.arg(&identity[..]);
    }
    let mut answer = Answer::to("survey", link.run(&SURVEY, &call)?)?;
    let server = answer.score()?;
    let mut clock = answer.list()?;
    let mut next = || clock.next().ok().and_then(|value| bytes("survey", value).ok());
    let mut number = || std::str::from_utf8(&next()?).ok()?.parse().ok();
    let clock = match (number(), number(), number(), number()) {
        (Some(now), Some(seen), Some(step), Some(ttl)) => Some(Clock { now, seen, step, ttl }),
        _ => None,
    };
    let mut instances = Vec::new();
    for instance in answer.rest() {
        let mut instance = Answer::to("survey", instance)?;
        if instance.is_empty() {
            instances.push(None);
            continue;
        }
        instances.push(Some(Sight {
            lease_end: instance.score()?,
            leased: instance.text()? == "leased",
            in_flight: u64::try_from(instance.integer()?).ok(),
            info: instance.rest().map(|value| bytes("survey", value).ok()).collect(),
        }));
    }
    if instances.len() == identities.len() {
        Ok(Survey {
            server,
            clock,
            instances,
        })
    } else {
        Err(Error::protocol(
            "survey",
            "another number of instances than of identities",
        ))
    }
}

/// Every instance and its lease end.
///
/// # Errors
/// As for `register`.
pub fn instances(link: &mut Link, keys: &Keys) -> Result<Vec<(Vec<u8>, f64)>> {
    let mut command = redis::cmd("ZRANGE");
    command.arg(keys.instances()).arg(0).arg(-1).arg("WITHSCORES");
    let mut answer = Answer::to("ZRANGE", link.command(&command)?)?;
    let mut instances = Vec::new();
    while !answer.is_empty() {
        instances.push((answer.bytes()?, answer.score()?));
    }
    Ok(instances)
}

/// Whether an instance has its lease, which is: the field `call`.
///
/// # Errors
/// As for `register`.
pub fn is_alive(link: &mut Link, keys: &Keys, identity: &[u8]) -> Result<bool> {
    let mut command = redis::cmd("HEXISTS");
    command.arg(keys.inflight_of(identity)).arg("call");
    match link.command(&command) {
        // A hash that somebody has overwritten holds no lease any more.
        Err(Error::Refused(text)) if text.contains("WRONGTYPE") => Ok(false),
        answer => Ok(whole("HEXISTS", answer?)? == 1),
    }
}
