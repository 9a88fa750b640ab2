//! The blocking claim: Redis hands a job over in the moment in which it comes (docs/protocol.md, "Blocking claims").

use super::answer::{token_of, Answer};
use super::{Fenced, GATHER, SPEND, TAKE};
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::{Call, Link};
use redis::Value;
use std::sync::Arc;
use std::time::Duration;

/// A job that a blocking claim has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brought {
    /// Its name in the in-flight hash.
    pub token: Token,
    /// The job.
    pub payload: Vec<u8>,
    /// Whether its queue has more.
    pub more: bool,
    /// Whether there are jobs that were orphaned before: then an ack clears the job's counter.
    pub counted: bool,
}

/// How a blocking claim ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blocked {
    /// A job has come.
    Brought(Brought),
    /// One has come, and has gone again.
    Missed,
    /// None has come in time, or somebody has ended the wait.
    Nothing,
    /// Redis does not wait, for this reason; and there was none to take.
    Refused(Error),
}

/// A claim that waits in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The name of the queue.
    pub queue: Arc<[u8]>,
    /// Which of the places from which an instance makes such claims, one after the other.
    pub slot: usize,
    /// Its number: no other claim of this instance has it, and those before it from this slot have lower ones. It stands in the token.
    pub index: u64,
    /// How long it waits at most; 0: for ever.
    pub patience: Duration,
}

/// Waits in Redis for a job, and claims it. A claim without an answer is never sent again.
///
/// # Errors
/// As for `register`.
pub fn block(link: &mut Link, keys: &Keys, identity: &str, block: &Block) -> Result<Fenced<Blocked>> {
    let claim = begin_to_block(link, keys, identity, block)?;
    let replies = [link.receive()?, link.receive()?];
    end_block(link, &claim, replies)
}

/// The first half of `block`: sends it. Two replies will come.
///
/// # Errors
/// As for `register`.
pub(crate) fn begin_to_block(link: &mut Link, keys: &Keys, identity: &str, block: &Block) -> Result<Call> {
    let (aside, queue_key) = (keys.aside(&block.queue), keys.queue(&block.queue));
    let mut commands = redis::pipe();
    commands
        .cmd("BLMOVE")
        .arg(&queue_key[..])
        .arg(&aside[..])
        .arg("RIGHT")
        .arg("LEFT")
        .arg(block.patience.as_secs_f64());
    let mut take = Call::new([keys.inflight(identity), keys.info(identity)]);
    take.also(aside).also(queue_key).also(keys.queues());
    take.also(keys.counted().into_bytes());
    take.count(block.slot).number(block.index).arg(&block.queue[..]);
    commands.add_command(take.command("EVALSHA", TAKE.hash()));
    link.begin(&commands)?;
    Ok(take)
}

/// The second half: what the replies say. `claim`: what `begin_to_block` has answered.
///
/// # Errors
/// As for `register`.
pub(crate) fn end_block(link: &mut Link, claim: &Call, [waited, took]: [Value; 2]) -> Result<Fenced<Blocked>> {
    if lacks_script(&took) {
        let took = link.run(&TAKE, claim)?;
        return judge([waited, took]);
    }
    let judged = judge([waited, took]);
    if judged.is_err() {
        link.discard();
    }
    judged
}

/// Whether the server did not know the script (any more), so that the second half is to be done again.
fn lacks_script(took: &Value) -> bool {
    matches!(took, Value::ServerError(error) if error.code() == "NOSCRIPT")
}

/// Whether these replies bring a job.
pub(crate) fn brings([_, took]: &[Value; 2]) -> bool {
    let is_taken = |value: &Value| matches!(value, Value::BulkString(text) if text == b"taken");
    matches!(took, Value::Array(values) if values.first().is_some_and(is_taken))
}

/// What the replies say, where the server knew the script.
///
/// # Errors
/// As for `register`.
pub(crate) fn judge([waited, took]: [Value; 2]) -> Result<Fenced<Blocked>> {
    let mut answer = Answer::to("take", took.extract_error()?)?;
    match (answer.text()?.as_str(), waited.extract_error()) {
        ("lost", _) => Ok(Fenced::Lost),
        // Where Redis refuses to wait it may give all the same.
        ("taken", _) => Ok(Fenced::Alive(Blocked::Brought(Brought {
            token: token_of("take", answer.bytes()?)?,
            payload: answer.bytes()?,
            more: answer.number()? > 0,
            counted: answer.number()? == 1,
        }))),
        (_, Err(error)) => Ok(Fenced::Alive(Blocked::Refused(error.into()))),
        (_, Ok(Value::Nil)) => Ok(Fenced::Alive(Blocked::Nothing)),
        (_, Ok(_)) => Ok(Fenced::Alive(Blocked::Missed)),
    }
}

/// Prepares a connection for the claims of a slot. `block`: the last that it has made, on another connection; that one and all before
/// it take nothing any more. Answers the id of the connection, by which another can end its wait.
///
/// # Errors
/// As for `register`; `Error::Refused` where this user may not do what blocking claims need.
pub fn prepare_to_block(link: &mut Link, keys: &Keys, identity: &str, block: &Block) -> Result<i64> {
    let mut spend = Call::new([keys.inflight(identity), keys.info(identity)]);
    link.run(&SPEND, spend.count(block.slot).number(block.index))?;
    let mut commands = redis::pipe();
    commands.cmd("CLIENT").arg("ID");
    commands.cmd("CLIENT").arg("UNBLOCK").arg(0);
    commands
        .cmd("LMOVE")
        .arg(keys.aside(&block.queue))
        .arg(keys.queue(&block.queue))
        .arg("LEFT")
        .arg("RIGHT");
    let answers = link
        .pipeline(&commands)?
        .into_iter()
        .collect::<redis::RedisResult<Vec<_>>>()?;
    match answers.first() {
        Some(Value::Int(id)) => Ok(*id),
        _ => Err(Error::protocol("CLIENT ID", "a number was expected")),
    }
}

/// Ends the waits of these connections.
///
/// # Errors
/// As for `register`.
pub(crate) fn unblock(link: &mut Link, clients: &[i64]) -> Result<()> {
    if clients.is_empty() {
        return Ok(());
    }
    let mut commands = redis::pipe();
    for client in clients {
        commands.cmd("CLIENT").arg("UNBLOCK").arg(*client);
    }
    link.pipeline(&commands)?
        .into_iter()
        .collect::<redis::RedisResult<Vec<_>>>()?;
    Ok(())
}

/// What has been laid aside and not taken goes back to its queue, of these queues and of all that Redis lists. Answers how many
/// jobs did.
///
/// # Errors
/// As for `register`.
pub fn gather(link: &mut Link, keys: &Keys, identity: &str, queues: &[Arc<[u8]>]) -> Result<u64> {
    let mut call = Call::new([keys.inflight(identity).into_bytes(), keys.queues()]);
    call.arg(keys.aside(b"")).arg(keys.queue(b""));
    for queue in queues {
        call.arg(&queue[..]);
    }
    super::whole("gather", link.run(&GATHER, &call)?)
}
