//! The turn: records, claims, acks and requeues in one round trip.

use super::answer::{bytes, token_of, whole, Answer};
use super::TURN;
use crate::entry::Token;
use crate::error::Result;
use crate::keys::Keys;
use crate::link::{Call, Link};
use std::sync::Arc;

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
    /// Payloads are known to be small, so that many may be claimed at once.
    pub bulk: bool,
    /// The names of the counters of jobs that are done (`Keys::recoveries`).
    pub counters: Vec<String>,
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
    call.count(turn.acks.len());
    for token in &turn.acks {
        call.arg(token.as_bytes());
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
    call.number(u8::from(turn.bulk)).count(turn.claims.len());
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

    let mut answer = Answer::to("turn", link.run(&TURN, &call)?)?;
    match answer.text()?.as_str() {
        "lost" => return Ok(Turned::Lost),
        "stale" => return Ok(Turned::Stale),
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
    Ok(Turned::Done(done))
}
