//! The turn: records, claims, acks and requeues in one round trip.

use super::answer::{bytes, token_of, whole, Answer};
use super::TURN;
use crate::entry::Token;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::{Call, Link};
use redis::Value;
use std::collections::HashMap;
use std::sync::Arc;

/// Payloads up to so many bytes are popped many at once by a script: as many as there are threads make no large answer. Larger ones
/// must not become strings of Lua's.
pub(crate) const SMALL: usize = 16 << 10;
/// What a claim brings at most, in bytes; the script knows it too.
const MOST_BYTES: usize = 1 << 20;
/// How many lists are read at once where their payloads were not at hand.
const LISTS_AT_ONCE: usize = 4;

/// A job that goes back to its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requeue {
    /// One that has a record.
    Recorded(Token),
    /// One that has none: it is with this process alone.
    Unrecorded {
        /// The queue's name.
        queue: Vec<u8>,
        /// The job.
        payload: Arc<[u8]>,
    },
}

/// One turn: all that an instance wants done with jobs. It is sent until it is answered, unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turn {
    /// Its number.
    pub call: u64,
    /// Jobs that are done.
    pub acks: Vec<Token>,
    /// Jobs that go back.
    pub requeues: Vec<Requeue>,
    /// Classes whose jobs are marked though their payloads do not say so.
    pub marks: Vec<String>,
    /// Jobs that another fetcher has popped, queue and payload.
    pub records: Vec<(Vec<u8>, Arc<[u8]>)>,
    /// Jobs that threads wait for.
    pub claims: Vec<Claim>,
    /// Where payloads are large, how many bytes one may have: then each that is claimed gets a list of its own, where Redis can do
    /// that. Else many are claimed at once.
    pub large: Option<usize>,
    /// The names of the counters of jobs that are done (`Keys::recoveries`).
    pub counters: Vec<String>,
}

impl Turn {
    /// How many jobs of the size that was told fit into an answer.
    pub(super) fn most(&self) -> usize {
        match self.large {
            Some(size) => MOST_BYTES.div_ceil(size.max(1)),
            None => usize::MAX,
        }
    }

    /// Whether any thread may have a job of more than one queue.
    pub(super) fn has_choice(&self) -> bool {
        let mut orders = self.claims.iter().flat_map(|claim| &claim.orders);
        orders.any(|order| order.len() > 1)
    }
}

/// Jobs that are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// For how many threads.
    pub threads: usize,
    /// One order of queues for all threads, or one for each: a thread gets a job of the first queue that has one. All
    /// orders begin with the same queue.
    pub orders: Vec<Vec<Arc<[u8]>>>,
}

/// The answer to a turn that was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// The positions of the requeues that could not be done: something else lies under the queue's key.
    pub undone: Vec<usize>,
    /// The tokens of the records.
    pub recorded: Vec<Token>,
    /// The claimed jobs.
    pub claimed: Vec<(Token, Vec<u8>)>,
    /// The queues that nothing can be taken from.
    pub refused: Vec<Vec<u8>>,
    /// Whether there are jobs that were orphaned before: then an ack clears the job's counter.
    pub counted: bool,
    /// Tokens that stand for nothing, to be taken away: a claim found nothing, or the list is gone. Or an ack was not done.
    pub vain: Vec<Token>,
    /// A thread got nothing, and not all of its queues were tried.
    pub untried: bool,
}

/// What became of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turned {
    /// It is done, by this call or by an earlier copy of it.
    Done(Done),
    /// The instance has no lease.
    Lost,
    /// A later turn has been done: somebody else lives under this identity.
    Stale,
}

/// Sends a turn.
///
/// # Errors
/// As for `register`.
pub fn turn(link: &mut Link, keys: &Keys, identity: &str, turn: &Turn) -> Result<Turned> {
    turn_and(link, keys, identity, turn, Vec::new()).map(|(turned, _)| turned)
}

/// The same, and these commands after it in one go. Answers theirs, too; none where they came too soon (`Link::run_and`).
///
/// # Errors
/// As for `register`.
pub(crate) fn turn_and(
    link: &mut Link,
    keys: &Keys,
    identity: &str,
    turn: &Turn,
    then: Vec<redis::Cmd>,
) -> Result<(Turned, Vec<redis::RedisResult<Value>>)> {
    let mut call = Call::new([
        keys.inflight(identity).into_bytes(),
        keys.info(identity).into_bytes(),
        keys.queues(),
        keys.counted().into_bytes(),
    ]);
    call.number(turn.call).count(turn.marks.len());
    for class in &turn.marks {
        call.arg(class.as_str());
    }
    for has_list in [false, true] {
        let acks = || turn.acks.iter().filter(|token| token.has_list() == has_list);
        call.count(acks().count());
        acks().for_each(|token| {
            call.arg(token.as_bytes());
        });
    }
    call.count(turn.counters.len());
    for name in &turn.counters {
        call.key(keys.recoveries(name).into_bytes());
    }
    call.count(turn.requeues.len());
    for requeue in &turn.requeues {
        match requeue {
            Requeue::Recorded(token) => {
                let queue = token.queue();
                call.arg(token.as_bytes()).key(keys.queue(queue)).arg(queue).arg("");
            }
            Requeue::Unrecorded { queue, payload } => {
                call.arg("").key(keys.queue(queue)).arg(&queue[..]).arg(&payload[..]);
            }
        }
    }
    call.count(turn.records.len());
    for (queue, payload) in &turn.records {
        call.arg(&queue[..]).arg(&payload[..]);
    }
    call.count(turn.large.unwrap_or(0)).count(turn.claims.len());
    for claim in &turn.claims {
        call.count(claim.threads).count(claim.orders.len());
        for order in &claim.orders {
            let indexes: Vec<String> = order
                .iter()
                .map(|queue| call.index_of(keys.queue(queue)).to_string())
                .collect();
            call.arg(indexes.join(" "));
        }
    }

    // On a new connection the turn may be a repetition, of one whose answer was too large for something on its way.
    let mut lists = Vec::new();
    if turn.large.is_some() && link.is_connected() {
        lists.extend(hoped_for(turn).map(|at| list(keys, identity.as_bytes(), at)));
    }
    let read = lists.len();
    let (answer, mut lists) = if read + then.len() > 0 {
        link.run_and(&TURN, &call, lists.into_iter().chain(then))?
    } else {
        (link.run(&TURN, &call)?, Vec::new())
    };
    let then = lists.split_off(lists.len().min(read));
    let mut answer = Answer::to("turn", answer)?;
    match answer.text()?.as_str() {
        "lost" => return Ok((Turned::Lost, Vec::new())),
        "stale" => return Ok((Turned::Stale, Vec::new())),
        _ => {}
    }
    let mut done = Done::default();
    for position in answer.list()?.rest() {
        let position = whole("turn", position)?;
        done.undone
            .push(usize::try_from(position.saturating_sub(1)).unwrap_or(usize::MAX));
    }
    for token in answer.list()?.rest() {
        done.recorded.push(token_of("turn", bytes("turn", token)?)?);
    }
    let mut claimed = answer.list()?;
    while !claimed.is_empty() {
        done.claimed
            .push((token_of("turn", claimed.bytes()?)?, claimed.bytes()?));
    }
    for queue in answer.list()?.rest() {
        done.refused.push(bytes("turn", queue)?);
    }
    done.counted = answer.number()? == 1;
    let lists = hoped_for(turn).zip(lists).filter_map(|(at, answer)| match answer {
        Ok(Value::BulkString(payload)) => Some((at, payload)),
        _ => None,
    });
    done.vain = read_lists(link, keys, identity.as_bytes(), &mut done.claimed, lists.collect())?;
    // It was done without the script, which would have tried the others.
    done.untried = !done.vain.is_empty() && turn.has_choice();
    Ok((Turned::Done(done), then))
}

/// The number of a job in flight: of the turn that took it, and its place there.
type Number = (u64, u64);

/// The jobs that this turn may claim, where all come that are wanted: as many as the script lets through.
fn hoped_for(turn: &Turn) -> impl Iterator<Item = Number> + '_ {
    let wanted: usize = turn.claims.iter().map(|claim| claim.threads).sum();
    let first = turn.records.len() + 1;
    (first..first + wanted.min(turn.most())).map(|place| (turn.call, place as u64))
}

fn list(keys: &Keys, identity: &[u8], number: Number) -> redis::Cmd {
    let mut command = redis::cmd("LINDEX");
    command.arg(keys.payload(identity, number)).arg(0);
    command
}

/// Puts the payloads in that have lists of their own. Those that are not at hand are read. A job whose list is gone is left out, and
/// its token answered: there was none, or it was recovered meanwhile, when this instance has lost its lease.
///
/// # Errors
/// As for `register`.
pub(crate) fn read_lists(
    link: &mut Link,
    keys: &Keys,
    identity: &[u8],
    jobs: &mut Vec<(Token, Vec<u8>)>,
    mut at_hand: HashMap<Number, Vec<u8>>,
) -> Result<Vec<Token>> {
    let missing: Vec<Number> = jobs
        .iter()
        .filter(|(token, _)| token.has_list() && !at_hand.contains_key(&token.order()))
        .map(|(token, _)| token.order())
        .collect();
    for some in missing.chunks(LISTS_AT_ONCE) {
        let mut commands = redis::pipe();
        for number in some {
            commands.add_command(list(keys, identity, *number));
        }
        for (number, answer) in some.iter().zip(link.pipeline(&commands)?) {
            match answer.map_err(Error::from) {
                Ok(Value::BulkString(payload)) => {
                    at_hand.insert(*number, payload);
                }
                Ok(_) => {}
                // Somebody has overwritten it.
                Err(Error::Refused(text)) if text.contains("WRONGTYPE") => {}
                Err(error) => return Err(error),
            }
        }
    }
    let mut gone = Vec::new();
    jobs.retain_mut(|(token, payload)| {
        if !token.has_list() {
            return true;
        }
        match at_hand.remove(&token.order()) {
            Some(found) => *payload = found,
            None => {
                gone.push(token.clone());
                return false;
            }
        }
        true
    });
    Ok(gone)
}
