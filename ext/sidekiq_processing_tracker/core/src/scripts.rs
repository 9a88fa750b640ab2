//! The scripts: what they are given and what they answer. What they do stands in `lua/`, one file each. Here are those of an
//! instance's life; the turn, recovery and looks have files of their own.

mod answer;
mod block;
mod recover;
mod survey;
mod transaction;
mod turn;

use crate::entry::Token;
use crate::error::{Error, Result};
use crate::host;
use crate::keys::Keys;
use crate::link::{Call, Link};
use crate::server;
use crate::settings::Pace;
use redis::Value;
use std::sync::LazyLock;
use std::time::Duration;

pub(crate) use answer::{bytes, whole, Answer};
pub use block::*;
pub(crate) use recover::lock_of;
pub use recover::*;
pub use survey::*;
pub(crate) use transaction::*;
pub use turn::*;

/// A script and its hash.
pub struct Script {
    pub(crate) source: &'static str,
    pub(crate) hash: LazyLock<String>,
}

impl Script {
    /// The text.
    #[must_use]
    pub fn source(&self) -> &str {
        self.source
    }

    /// The SHA1 of the text, by which Redis knows a script.
    #[must_use]
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// A script put together of files in `lua/`.
macro_rules! script {
    ($visibility:vis $name:ident, $($file:literal),+) => {
        $visibility static $name: Script = {
            const SOURCE: &str = concat!($(include_str!(concat!("lua/", $file, ".lua"))),+);
            Script {
                source: SOURCE,
                hash: LazyLock::new(|| redis::Script::new(SOURCE).get_hash().to_owned()),
            }
        };
    };
}

pub(crate) use script;

script!(REGISTER, "clock", "index", "register");
script!(ENLIST, "lease", "index", "enlist");
script!(BEAT, "lease", "clock", "beat");
script!(TURN, "lease", "payloads", "requeue", "turn");
script!(TAKE, "lease", "hands", "take");
script!(OPEN, "lease", "hands", "open");
script!(REAP, "clock", "payloads", "hands", "reap");
script!(PEEK, "payloads", "peek");
script!(
    RECOVER,
    "lease",
    "clock",
    "payloads",
    "requeue",
    "unique_locks",
    "dead_set",
    "recover"
);
script!(CLEAR_LOCK, "unique_locks", "clear_lock");
script!(LEAVE, "lease", "payloads", "requeue", "hands", "leave");
script!(SURVEY, "survey");
script!(RIGHTS, "rights");
script!(pub(crate) OUTBOX_LOOK, "outbox_look");
script!(pub(crate) OUTBOX_REMOVE, "outbox_remove");
script!(pub(crate) DELIVER, "requeue", "unique_locks", "dead_set", "deliver");

/// Computes what is computed once. To be called before a thread runs that may be in the middle of it when the process
/// forks: the child would wait for it for ever.
pub fn prepare() {
    let scripts = [
        &REGISTER,
        &ENLIST,
        &BEAT,
        &TURN,
        &TAKE,
        &OPEN,
        &REAP,
        &PEEK,
        &RECOVER,
        &CLEAR_LOCK,
        &LEAVE,
        &SURVEY,
        &RIGHTS,
        &OUTBOX_LOOK,
        &OUTBOX_REMOVE,
        &DELIVER,
    ];
    for script in scripts
        .into_iter()
        .chain(crate::legacy::SCRIPTS)
        .chain(crate::due::SCRIPTS)
    {
        LazyLock::force(&script.hash);
    }
}

/// What an instance is told when it has no lease any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced<T> {
    /// It has its lease, and this is the answer.
    Alive(T),
    /// It has lost its lease, whole and for good.
    Lost,
}

/// Begins an instance. Answers the pace that holds from now on.
///
/// # Errors
/// As for every script: `Error::Connection` without a proper answer, `Error::Protocol` with one that makes no sense.
pub fn register(link: &mut Link, keys: &Keys, identity: &str, pace: Pace, info: &[(String, String)]) -> Result<Pace> {
    let mut call = Call::new([
        keys.clock(),
        keys.instances(),
        keys.inflight(identity),
        keys.info(identity),
    ]);
    call.arg(identity).millis(pace.step).millis(pace.ttl);
    for (field, value) in info {
        call.arg(field.as_str()).arg(value.as_str());
    }
    let info = info
        .iter()
        .map(|(field, value)| (field.clone().into_bytes(), value.clone().into_bytes()));
    for index in host::indexes(keys, &info.collect()) {
        call.also(index);
    }
    let mut answer = Answer::to("register", link.run(&REGISTER, &call)?)?;
    answer.pace()
}

/// The answer to a beat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// The pace that holds from now on.
    pub pace: Pace,
    /// How many instances are on its host, where that was asked.
    pub hosted: Option<u64>,
    /// How many instances there are.
    pub instances: u64,
    /// Whether this beat moved the clock.
    pub moved: bool,
    /// An instance whose lease has run out; looked for only when this beat moved the clock.
    pub due: Option<Vec<u8>>,
}

/// Renews the lease. `host`: the place by which the instance is known on its host, to be told how many are there.
///
/// # Errors
/// As for `register`.
pub fn beat(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    pace: Pace,
    progress: bool,
    host: Option<&str>,
) -> Result<Fenced<Beat>> {
    let mut call = Call::new([
        keys.clock(),
        keys.instances(),
        keys.inflight(identity),
        keys.info(identity),
    ]);
    call.arg(identity)
        .millis(pace.step)
        .millis(pace.ttl)
        .number(u8::from(progress));
    if let Some(host) = host {
        call.also(keys.host(host).into_bytes());
    }
    let mut answer = Answer::to("beat", link.run(&BEAT, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let (pace, hosted) = (answer.pace()?, u64::try_from(answer.integer()?).ok());
    let (instances, moved) = (answer.number()?, !answer.is_empty());
    let due = if moved { Some(answer.bytes()?) } else { None };
    Ok(Fenced::Alive(Beat {
        pace,
        hosted,
        instances,
        moved,
        due: due.filter(|due| !due.is_empty()),
    }))
}

/// What is left to be done for jobs when an instance leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastCall {
    /// Those that are done.
    pub acks: Vec<Token>,
    /// Those that are done and have no token yet, as far as is known, and the hand into which each was brought.
    pub acks_in_hand: Vec<(Hand, Known)>,
    /// Those that go back, the newest first.
    pub requeues: Vec<Token>,
    /// The hands for which no claim is on its way: they need not be closed.
    pub quiet: Vec<u64>,
}

/// Leaves for good: does the last call, puts back what it has not heard of, gives up the lease, and leaves the indexes in which it
/// stands. Answers how many jobs stay for the next reaper.
///
/// # Errors
/// As for `register`.
pub fn leave(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    indexes: &[Vec<u8>],
    last: &LastCall,
) -> Result<Fenced<u64>> {
    let mut call = Call::new([
        keys.instances().into_bytes(),
        keys.inflight(identity).into_bytes(),
        keys.info(identity).into_bytes(),
        keys.queues(),
        keys.due(identity).into_bytes(),
        keys.hands(identity).into_bytes(),
    ]);
    for index in indexes {
        call.also(index.clone());
    }
    call.arg(identity).arg(keys.queue(b""));
    call.count(indexes.len()).count(last.quiet.len());
    for number in &last.quiet {
        call.number(*number);
    }
    call.count(last.acks.len());
    for token in &last.acks {
        call.arg(token.as_bytes());
    }
    call.count(last.acks_in_hand.len());
    for (hand, known) in &last.acks_in_hand {
        call.number(hand.number).number(known.index);
        call.arg(known.sha1.as_str()).arg(&hand.queue[..]);
    }
    call.count(last.requeues.len());
    for token in &last.requeues {
        call.arg(token.as_bytes())
            .key(keys.queue(token.queue()))
            .arg(token.queue());
    }
    let mut answer = Answer::to("leave", link.run(&LEAVE, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    Ok(Fenced::Alive(answer.number()?))
}

/// Which of these commands the user may not do, each on a key, and by the number that was given with it. None before Redis
/// 7.0, which does not tell.
///
/// # Errors
/// As for `register`.
pub(crate) fn forbidden<'a>(
    link: &mut Link,
    wanted: impl Iterator<Item = (&'a str, &'a str, usize)>,
) -> Result<Vec<(String, usize)>> {
    let mut call = Call::default();
    for (command, key, number) in wanted {
        call.arg(command).arg(key).count(number);
    }
    let mut answer = Answer::to("rights", link.run(&RIGHTS, &call)?)?;
    let mut forbidden = Vec::new();
    while !answer.is_empty() {
        let (command, number) = (answer.text()?, answer.text()?);
        let number = number
            .parse()
            .map_err(|_| Error::protocol("rights", "a number was expected"))?;
        forbidden.push((command, number));
    }
    Ok(forbidden)
}

/// What stands in an index: how many instances (`None` where somebody has overwritten it), and of some of them the identity and the entry.
pub type Index = (Option<u64>, Vec<(Vec<u8>, Vec<u8>)>);

/// Keeps an instance in the indexes in which others look for it, for as long as `lives` from now on. Answers for each what
/// stands there, `most` instances at most and its own.
///
/// # Errors
/// As for `register`.
pub fn enlist(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    indexes: &[String],
    lives: Duration,
    most: usize,
) -> Result<Fenced<Vec<Index>>> {
    let own = [keys.inflight(identity), keys.info(identity)];
    let mut call = Call::new(own.iter().chain(indexes).map(String::as_str));
    call.arg(identity).millis(lives).count(most);
    let mut answer = Answer::to("enlist", link.run(&ENLIST, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let mut found = Vec::with_capacity(indexes.len());
    while !answer.is_empty() {
        let (count, mut pairs) = (u64::try_from(answer.integer()?).ok(), answer.list()?);
        let mut entries = Vec::new();
        while !pairs.is_empty() {
            entries.push((pairs.bytes()?, pairs.bytes()?));
        }
        found.push((count, entries));
    }
    Ok(Fenced::Alive(found))
}

/// When an instance's lease ends, as Redis writes it. `None` for one that is not listed.
///
/// # Errors
/// As for `register`.
pub fn lease_end(link: &mut Link, keys: &Keys, identity: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut command = redis::cmd("ZSCORE");
    match link.command(command.arg(keys.instances()).arg(identity))? {
        Value::Nil => Ok(None),
        score => bytes("ZSCORE", score).map(Some),
    }
}

/// All fields of an instance's in-flight hash, or `Lost` when it has no lease.
///
/// # Errors
/// As for `register`.
pub fn fields(link: &mut Link, keys: &Keys, identity: &str) -> Result<Fenced<Vec<Vec<u8>>>> {
    let mut command = redis::cmd("HKEYS");
    command.arg(keys.inflight(identity));
    let fields = match link.command(&command) {
        // Somebody has overwritten it.
        Err(Error::Refused(text)) if text.contains("WRONGTYPE") => return Ok(Fenced::Lost),
        fields => fields?,
    };
    let fields: Vec<Vec<u8>> = Answer::to("HKEYS", fields)?
        .rest()
        .map(|field| bytes("HKEYS", field))
        .collect::<Result<_>>()?;
    if fields.iter().any(|field| field == b"call") {
        Ok(Fenced::Alive(fields))
    } else {
        Ok(Fenced::Lost)
    }
}

/// The error, naming the key where Redis only says that some key holds something else.
#[must_use]
pub fn explain(link: &mut Link, keys: &Keys, identity: &str, error: &Error) -> Error {
    if let Some(explained) = server::explain(link, keys, error) {
        return explained;
    }
    if !matches!(error, Error::Refused(text) if text.contains("WRONGTYPE")) {
        return error.clone();
    }
    let expected = [
        (keys.clock(), "hash"),
        (keys.instances(), "zset"),
        (keys.inflight(identity), "hash"),
        (keys.info(identity), "hash"),
        (keys.hands(identity), "hash"),
    ];
    for (key, expected) in expected {
        let mut command = redis::cmd("TYPE");
        match link.command(command.arg(&key)).and_then(|kind| bytes("TYPE", kind)) {
            Ok(kind) if kind != expected.as_bytes() && kind != b"none" => {
                let kind = String::from_utf8_lossy(&kind);
                return Error::Refused(format!(
                    "the key {key} holds a {kind}, not a {expected}: somebody has overwritten it. Remove it (DEL)"
                ));
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    error.clone()
}
