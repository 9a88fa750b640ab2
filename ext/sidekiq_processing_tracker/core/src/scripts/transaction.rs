//! A turn without its script: the same commands in a transaction, at a third of the cost (docs/protocol.md, "Turns without a
//! script"). What the script looks at first, Redis watches here: nothing is done once the in-flight hash has changed.

use super::answer::{bytes, whole, Answer};
use super::turn::{Done, Turn, SMALL};
use crate::clock;
use crate::entry::{number, Token};
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::Link;
use redis::{RedisResult, Value};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Names of queues.
pub(crate) type Queues = BTreeSet<Arc<[u8]>>;

/// What a connection has seen of an instance, and has Redis watch since: the ground that a transaction stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footing {
    /// Which connection of the link that is.
    generation: u64,
    identity: String,
    /// The last turn done.
    call: u64,
    time: ServerTime,
    /// Queues that are empty.
    pub empty: Queues,
}

/// The server's time, and when that was here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ServerTime {
    ms: u64,
    at: Duration,
}

impl ServerTime {
    /// For so long it is not asked for again.
    const LASTS: Duration = Duration::from_secs(1);

    fn read(answer: Value) -> Result<Self> {
        let mut answer = Answer::to("TIME", answer)?;
        match (number(&answer.bytes()?), number(&answer.bytes()?)) {
            (Some(seconds), Some(micros)) => Ok(Self {
                ms: seconds.saturating_mul(1000).saturating_add(micros / 1000),
                at: clock::now(),
            }),
            _ => Err(Error::protocol("TIME", "two numbers were expected")),
        }
    }

    fn age(&self) -> Duration {
        clock::now().saturating_sub(self.at)
    }

    fn now_ms(&self) -> u64 {
        self.ms
            .saturating_add(u64::try_from(self.age().as_millis()).unwrap_or(0))
    }
}

/// What is asked behind a turn, so that the next one has a footing.
pub(crate) struct Ask {
    /// The turn.
    call: u64,
    /// Queues that may be empty.
    queues: Queues,
    /// The connection that it is to go over. Where it went over another, it is for nothing.
    generation: u64,
    /// It went by script. Then it is also to be seen whether this connection does transactions at all (where MULTI is refused, all
    /// that should wait for EXEC would be done at once), and may read the lists.
    by_script: bool,
    time: Option<ServerTime>,
}

impl Ask {
    /// Behind a turn by script.
    pub fn anew(link: &Link, call: u64, queues: Queues) -> Self {
        Self {
            call,
            queues,
            generation: link.generation(),
            by_script: true,
            time: None,
        }
    }

    /// What is to be sent.
    pub fn commands(&self, keys: &Keys, identity: &str) -> Vec<redis::Cmd> {
        let inflight = keys.inflight(identity);
        let mut commands = Vec::new();
        if self.by_script {
            // The end of all watches before, too: the script has changed what they are for.
            commands.extend([redis::cmd("MULTI"), redis::cmd("EXEC")]);
            // What may not be read must not be moved. No job ever has this number.
            let mut read = redis::cmd("LINDEX");
            read.arg(keys.payload(identity.as_bytes(), (0, 0))).arg(0);
            commands.push(read);
        }
        if self.time.is_none() {
            commands.push(redis::cmd("TIME"));
        }
        let (mut watch, mut call, mut exists) = (redis::cmd("WATCH"), redis::cmd("HGET"), redis::cmd("EXISTS"));
        watch.arg(&inflight);
        call.arg(&inflight).arg("call");
        for queue in &self.queues {
            watch.arg(keys.queue(queue));
            exists.arg(keys.queue(queue));
        }
        commands.extend([watch, call]);
        if !self.queues.is_empty() {
            commands.push(exists);
        }
        commands
    }

    /// Reads the answers. `None` where the turn was not the last one, so that the next must come by script.
    ///
    /// # Errors
    /// What Redis refused. `Error::Protocol` for what makes no sense.
    pub fn read(
        self,
        identity: &str,
        answers: impl IntoIterator<Item = RedisResult<Value>>,
    ) -> Result<Option<Footing>> {
        let answers: Vec<Value> = answers.into_iter().collect::<RedisResult<_>>()?;
        let mut answers = answers.into_iter().skip(if self.by_script { 3 } else { 0 });
        let mut next = || {
            answers
                .next()
                .ok_or_else(|| Error::protocol("WATCH", "it is too short"))
        };
        let time = match self.time {
            Some(time) => time,
            None => ServerTime::read(next()?)?,
        };
        next()?;
        let call = match next()? {
            Value::Nil => None,
            call => number(&bytes("HGET", call)?),
        };
        let are_empty = self.queues.is_empty() || whole("EXISTS", next()?)? == 0;
        Ok((call == Some(self.call)).then(|| Footing {
            generation: self.generation,
            identity: identity.to_owned(),
            call: self.call,
            time,
            empty: if are_empty { self.queues } else { Queues::new() },
        }))
    }
}

impl Footing {
    /// Whether a turn can be done on it.
    pub fn bears(&self, link: &Link, identity: &str, turn: &Turn) -> bool {
        link.is_connected()
            && self.generation == link.generation()
            && self.identity == identity
            && self.call < turn.call
            && is_suited(link, turn)
    }
}

/// Whether a turn may go without its script. Records of small payloads only where threads read the answers themselves: else they are
/// woken one by one, each while another has the GVL, and all is slower (docs/performance.md, "What is in the way").
pub(crate) fn is_suited(link: &Link, turn: &Turn) -> bool {
    let is_large = |record: &(_, Arc<[u8]>)| record.1.len() > SMALL;
    let records = &turn.records;
    let are_suited = records.is_empty() || link.is_bare() || records.iter().any(is_large);
    turn.marks.is_empty() && turn.requeues.is_empty() && are_suited
}

/// What became of a transaction.
#[derive(Debug)]
pub(crate) enum Transacted {
    /// It is done.
    Done {
        /// As by script.
        done: Box<Done>,
        /// What to stand on next, if that is known.
        next: Result<Option<Footing>>,
        /// The queues of which it has found the end.
        ends: Queues,
        /// Something lies under a queue's key that is no list: the script knows what to say of it.
        broken: bool,
    },
    /// Nothing of it is done: something that was watched has changed.
    Changed,
    /// Nothing of it is done: Redis has refused a part of it.
    Refused,
    /// The same, and will do so again: a right is missing.
    Forbidden(Error),
}

/// A claim in a transaction.
struct Move {
    queue: Arc<[u8]>,
    token: Token,
}

/// A turn without its script, as it is sent, and what is known of it.
pub(crate) struct Transaction {
    commands: redis::Pipeline,
    /// What is asked behind it.
    ask: Ask,
    recorded: Vec<Token>,
    moves: Vec<Move>,
    /// A thread that should have a job gets none.
    untried: bool,
    /// Other keys than the in-flight hash go.
    deletes: bool,
    /// How many commands it has.
    queued: usize,
}

impl Transaction {
    /// For a turn that `footing` bears; with the question for the footing of the next one.
    ///
    /// # Errors
    /// `Error::Internal`, by a bug.
    pub fn new(link: &Link, keys: &Keys, identity: &str, turn: &Turn, footing: Footing) -> Result<Self> {
        let inflight = keys.inflight(identity);
        let now_ms = footing.time.now_ms();
        let token = |index: usize, plus: &str, queue: &[u8]| {
            let mut token = format!("{}-{index}{plus} {now_ms} ", turn.call).into_bytes();
            token.extend_from_slice(queue);
            Token::read(token).ok_or_else(|| Error::Internal("a token that is none was made".into()))
        };
        let (moves, untried) = moves(turn, &footing.empty, &token)?;
        let recorded: Vec<Token> = (1..)
            .zip(&turn.records)
            .map(|(index, (queue, _))| token(index, "", queue))
            .collect::<Result<_>>()?;

        let mut commands = redis::pipe();
        commands.cmd("MULTI");
        if !turn.acks.is_empty() {
            commands.cmd("HDEL").arg(&inflight);
            turn.acks.iter().for_each(|token| {
                commands.arg(token.as_bytes());
            });
        }
        let lists = turn.acks.iter().filter(|token| token.has_list());
        let mut goes: Vec<Vec<u8>> = lists
            .map(|token| keys.payload(identity.as_bytes(), token.order()))
            .collect();
        goes.extend(turn.counters.iter().map(|name| keys.recoveries(name).into_bytes()));
        if !goes.is_empty() {
            commands.cmd("DEL").arg(&goes);
        }
        commands.cmd("HSET").arg(&inflight).arg("call").arg(turn.call);
        for (token, (_, payload)) in recorded.iter().zip(&turn.records) {
            commands.arg(token.as_bytes()).arg(&payload[..]);
        }
        for moved in &moves {
            commands.arg(moved.token.as_bytes()).arg("");
        }
        for moved in &moves {
            commands
                .cmd("LMOVE")
                .arg(keys.queue(&moved.queue))
                .arg(keys.payload(identity.as_bytes(), moved.token.order()))
                .arg("RIGHT")
                .arg("LEFT");
        }
        commands.cmd("EXISTS").arg(keys.counted());
        commands.cmd("EXEC");
        let queued = commands.len() - 2;
        let ask = Ask {
            by_script: false,
            time: Some(footing.time).filter(|time| time.age() < ServerTime::LASTS),
            ..Ask::anew(link, turn.call, footing.empty)
        };
        for command in ask.commands(keys, identity) {
            commands.add_command(command);
        }
        Ok(Self {
            commands,
            ask,
            recorded,
            moves,
            untried,
            deletes: !goes.is_empty(),
            queued,
        })
    }

    /// What is to be sent.
    pub fn commands(&self) -> &redis::Pipeline {
        &self.commands
    }

    /// Reads the answers, one for each command.
    ///
    /// # Errors
    /// `Error::Protocol` with one that makes no sense: the turn may be done or not, and is to be sent again, by script. `Error::Connection`
    /// where something had to be put right, and could not be: so too.
    pub fn read(
        self,
        link: &mut Link,
        keys: &Keys,
        identity: &str,
        turn: &Turn,
        answers: Vec<Value>,
    ) -> Result<Transacted> {
        let (queued, mut untried) = (self.queued, self.untried);
        let mut answers = answers.into_iter();
        // It was done before on this connection. If it is refused now, each of the commands was done by itself, and the repetition of
        // the turn finds that.
        answers.next().map(Value::extract_error).transpose()?;
        let put: Vec<Value> = answers.by_ref().take(queued).collect();
        let refused = put.into_iter().find_map(|value| value.extract_error().err());
        let mut done = match (answers.next().unwrap_or(Value::Nil), refused) {
            (Value::Nil, None) => return Ok(Transacted::Changed),
            (Value::Array(done), None) if done.len() == queued => done.into_iter(),
            (Value::ServerError(_), Some(error)) if error.code() == Some("NOPERM") => {
                return Ok(Transacted::Forbidden(error.into()))
            }
            (Value::ServerError(_), _) => return Ok(Transacted::Refused),
            _ => return Err(Error::protocol("EXEC", "another answer was expected")),
        };
        let next = self.ask.read(identity, answers.map(Value::extract_error));

        let mut answer = Done {
            recorded: self.recorded,
            ..Done::default()
        };
        // Each of these may be refused by itself, where a right has gone in this very moment: then it is done with the next turn.
        if !turn.acks.is_empty() && is_refused(done.next()) {
            answer.vain.extend(turn.acks.iter().cloned());
        }
        if self.deletes && is_refused(done.next()) {
            answer.vain = turn.acks.clone();
        }
        let unrecorded = is_refused(done.next());
        let (mut ends, mut broken, mut moved) = (Queues::new(), false, Vec::new());
        for (claim, found) in self.moves.into_iter().zip(done.by_ref()) {
            match found {
                Value::BulkString(payload) => moved.push((claim, payload)),
                found => {
                    broken |= is_refused(Some(found));
                    untried |= broken || turn.has_choice();
                    ends.insert(claim.queue);
                    answer.vain.push(claim.token);
                }
            }
        }
        if unrecorded {
            put_back(link, keys, identity, &moved)?;
            return Ok(Transacted::Refused);
        }
        let jobs = moved.into_iter().map(|(claim, payload)| (claim.token, payload));
        answer.claimed.extend(jobs);
        answer.untried = untried;
        answer.counted = !matches!(done.next(), Some(Value::Int(0)));
        Ok(Transacted::Done {
            done: Box::new(answer),
            next,
            ends,
            broken,
        })
    }
}

/// For each thread the first queue in its order that is not known to be empty. And whether a thread got none that should have one.
fn moves(
    turn: &Turn,
    empty: &Queues,
    token: &impl Fn(usize, &str, &[u8]) -> Result<Token>,
) -> Result<(Vec<Move>, bool)> {
    let (mut moves, mut untried, mut index) = (Vec::new(), false, turn.records.len());
    for claim in &turn.claims {
        for thread in 0..claim.threads {
            index += 1;
            let order = claim.orders.get(thread).or_else(|| claim.orders.first());
            match order.and_then(|order| order.iter().find(|queue| !empty.contains(*queue))) {
                Some(queue) if moves.len() < turn.most() => moves.push(Move {
                    queue: queue.clone(),
                    token: token(index, "+", queue)?,
                }),
                Some(_) => untried = true,
                None => {}
            }
        }
    }
    Ok((moves, untried))
}

fn is_refused(answer: Option<Value>) -> bool {
    matches!(answer, None | Some(Value::ServerError(_)))
}

/// What was claimed and has no token: to the end it came from, the newest first. (It takes an administrator who removes a right between
/// two commands of one transaction to come here. Should the connection break in this moment, too, these jobs stay in their lists,
/// for a person to put back.)
fn put_back(link: &mut Link, keys: &Keys, identity: &str, moved: &[(Move, Vec<u8>)]) -> Result<()> {
    let mut commands = redis::pipe();
    for (claim, _) in moved.iter().rev() {
        commands
            .cmd("LMOVE")
            .arg(keys.payload(identity.as_bytes(), claim.token.order()))
            .arg(keys.queue(&claim.queue))
            .arg("LEFT")
            .arg("RIGHT");
    }
    if !moved.is_empty() {
        for answer in link.converse(&commands)? {
            answer.extract_error()?;
        }
    }
    Ok(())
}
