//! The blocking claim: Redis hands a job over in the moment in which it comes (docs/protocol.md, "Blocking claims").

use super::answer::{bytes, token_of, Answer};
use super::{Fenced, OPEN, TAKE};
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::{Call, Link};
use redis::Value;
use std::sync::Arc;
use std::time::Duration;

/// Where a claim moves its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hand {
    /// No other hand of this instance has it.
    pub number: u64,
    /// The name of the queue from which its jobs come.
    pub queue: Arc<[u8]>,
}

/// What a process knows of a job that it has been given out of a hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// For its token.
    pub index: u64,
    /// The SHA1 of its payload, in hexadecimal digits.
    pub sha1: String,
}

/// What is to be done for a new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// The hand for its claims.
    pub hand: Hand,
    /// Those of the connections before it, by number, each with the job in it that this process knows of.
    pub old: Vec<(u64, Option<Known>)>,
}

/// What became of an old hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closing {
    /// The token of the job that was known there.
    pub token: Option<Token>,
    /// Whether it is closed; not so where something in it cannot go back to its queue.
    pub closed: bool,
}

/// A job that was brought has a record of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its name in the in-flight hash.
    pub token: Token,
    /// Whether its queue has more.
    pub more: bool,
    /// Whether there are jobs that were orphaned before: then an ack clears the job's counter.
    pub counted: bool,
}

/// What there was to record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Took {
    /// What was brought.
    Recorded(Recorded),
    /// Nothing.
    Nothing,
    /// Nor will there be: this hand takes no more.
    Closed,
}

/// How a blocking claim ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blocked {
    /// A job has come, and is in the hand.
    Brought(Vec<u8>),
    /// None has come in time, or somebody has ended the wait.
    Nothing,
    /// Redis does not wait, for this reason.
    Refused(Error),
}

/// Records what the last claim of this hand has brought, if `index` says that it has. The index will stand in the job's token; no other
/// claim of this instance has it.
///
/// # Errors
/// As for `register`.
pub fn take(link: &mut Link, keys: &Keys, identity: &str, hand: &Hand, index: Option<u64>) -> Result<Fenced<Took>> {
    took(link.run(&TAKE, &call(keys, identity, hand, index))?)
}

fn call(keys: &Keys, identity: &str, hand: &Hand, index: Option<u64>) -> Call {
    let mut take = Call::new([
        keys.inflight(identity),
        keys.hands(identity),
        keys.hand(identity, hand.number),
    ]);
    take.also(keys.queue(&hand.queue)).also(keys.queues());
    take.also(keys.counted().into_bytes());
    take.number(hand.number)
        .arg(&hand.queue[..])
        .arg(index.map(|index| index.to_string()).unwrap_or_default());
    take
}

/// The same, and a claim behind it that waits in Redis for the next job, for so long. Sends it. Two replies will come, for `took` and
/// `blocked`.
///
/// # Errors
/// As for `register`.
pub(crate) fn begin_to_block(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    hand: &Hand,
    index: Option<u64>,
    patience: Duration,
) -> Result<()> {
    let mut commands = redis::pipe();
    // Not by its hash: where the server did not know it, the claim would go ahead alone.
    commands.add_command(call(keys, identity, hand, index).command("EVAL", TAKE.source()));
    commands
        .cmd("BLMOVE")
        .arg(keys.queue(&hand.queue))
        .arg(keys.hand(identity, hand.number))
        .arg("RIGHT")
        .arg("LEFT")
        .arg(patience.as_secs_f64());
    link.begin(&commands)
}

/// What the reply to `take` says.
///
/// # Errors
/// As for `register`.
pub(crate) fn took(reply: Value) -> Result<Fenced<Took>> {
    let mut answer = Answer::to("take", reply.extract_error()?)?;
    Ok(match answer.text()?.as_str() {
        "lost" => Fenced::Lost,
        "taken" => Fenced::Alive(Took::Recorded(Recorded {
            token: token_of("take", answer.bytes()?)?,
            more: answer.number()? > 0,
            counted: answer.number()? == 1,
        })),
        "closed" => Fenced::Alive(Took::Closed),
        _ => Fenced::Alive(Took::Nothing),
    })
}

/// What the reply to the claim itself says.
///
/// # Errors
/// As for `register`.
pub(crate) fn blocked(reply: Value) -> Result<Blocked> {
    match reply.extract_error() {
        Err(error) => Ok(Blocked::Refused(error.into())),
        Ok(Value::Nil) => Ok(Blocked::Nothing),
        Ok(payload) => Ok(Blocked::Brought(bytes("BLMOVE", payload)?)),
    }
}

/// Records what was brought, and waits in Redis for the next job. A claim without an answer is never sent again.
///
/// # Errors
/// As for `register`.
pub fn block(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    hand: &Hand,
    index: Option<u64>,
    patience: Duration,
) -> Result<(Fenced<Took>, Blocked)> {
    begin_to_block(link, keys, identity, hand, index, patience)?;
    let (taken, claimed) = (link.receive()?, link.receive()?);
    Ok((took(taken)?, blocked(claimed)?))
}

/// Opens a hand for the claims of one connection, and closes those before it. Answers what became of each. What nobody knows of that is
/// in them goes back.
///
/// # Errors
/// As for `register`.
pub fn open(link: &mut Link, keys: &Keys, identity: &str, opening: &Opening) -> Result<Fenced<Vec<Closing>>> {
    let hand = &opening.hand;
    let mut call = Call::new([
        keys.inflight(identity).into_bytes(),
        keys.hands(identity).into_bytes(),
        keys.queues(),
        keys.queue(&hand.queue),
    ]);
    call.arg(&hand.queue[..]).number(hand.number);
    for (number, known) in &opening.old {
        call.also(keys.hand(identity, *number).into_bytes()).number(*number);
        match known {
            Some(known) => call.number(known.index).arg(known.sha1.as_str()),
            None => call.arg("").arg(""),
        };
    }
    let mut answer = Answer::to("open", link.run(&OPEN, &call)?)?;
    if answer.text()? == "lost" {
        return Ok(Fenced::Lost);
    }
    let mut closings = Vec::new();
    while !answer.is_empty() {
        let token = answer.bytes()?;
        closings.push(Closing {
            token: match &token[..] {
                [] => None,
                _ => Some(token_of("open", token)?),
            },
            closed: answer.number()? == 1,
        });
    }
    Ok(Fenced::Alive(closings))
}

/// The open hands of an instance, by number, and the queue of each.
///
/// # Errors
/// As for `register`.
pub fn hands(link: &mut Link, keys: &Keys, identity: &str) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut command = redis::cmd("HGETALL");
    let mut answer = match link.command(command.arg(keys.hands(identity))) {
        // Somebody has overwritten it.
        Err(Error::Refused(text)) if text.contains("WRONGTYPE") => return Ok(Vec::new()),
        answer => Answer::to("HGETALL", answer?)?,
    };
    let mut hands = Vec::new();
    while !answer.is_empty() {
        let (number, queue) = (answer.text()?, answer.bytes()?);
        hands.extend(number.parse().ok().map(|number| (number, queue)));
    }
    Ok(hands)
}

/// The id of this connection, by which another can end its wait.
///
/// # Errors
/// As for `register`; `Error::Refused` where this user may not do what blocking claims need.
pub fn prepare_to_block(link: &mut Link, keys: &Keys, identity: &str, queue: &[u8]) -> Result<i64> {
    let mut commands = redis::pipe();
    commands.cmd("CLIENT").arg("ID");
    commands.cmd("CLIENT").arg("UNBLOCK").arg(0);
    // No hand has this number: one that comes late must find nothing.
    commands
        .cmd("LMOVE")
        .arg(keys.hand(identity, 0))
        .arg(keys.queue(queue))
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
