//! How turns are sent: without their script where that can be, which costs Redis a third; else by it.

use crate::clock;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::Link;
use crate::scripts::{self, Ask, Footing, Queues, Transacted, Transaction, Turn, Turned};
use redis::Value;
use std::time::{Duration, Instant};

/// For so many turns at most it is not tried again, after it was tried in vain.
const LONGEST_REST: u32 = 64;

/// For so long it is not tried again, after it was refused.
const UNABLE_FOR: Duration = Duration::from_secs(60);

/// Turns with more bytes of payloads than that may not fit into what the system takes at once.
const AT_ONCE: usize = 4 << 10;

/// The same of acks.
const MANY: usize = 64;

/// Answers that come later tell of the past.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// A turn that is sent, and whose answers are on their way.
struct Begun {
    transaction: Transaction,
    identity: String,
    call: u64,
    /// On which connection.
    generation: u64,
    /// When, by a clock that counts suspension.
    sent: Duration,
    /// Those that have come.
    answers: Vec<Value>,
}

/// What has come of a turn that was not waited for.
pub(crate) enum Ended {
    /// It is done.
    Done(Turned),
    /// Its answers are on their way.
    NotYet,
    /// It is to be sent by `Turns::send`.
    NotSo,
}

/// What is known for the next turn.
#[derive(Default)]
pub(crate) struct Turns {
    footing: Option<Footing>,
    /// Queues that were found empty: Redis is asked whether they are, and to watch them.
    empty: Queues,
    /// So many turns go by script.
    rest: u32,
    /// So many will, after the next try in vain.
    next_rest: u32,
    /// Redis does no transactions. Until when that is not tried again.
    unable_until: Option<Instant>,
    /// Why it does not.
    refusal: Option<Error>,
    /// A turn that has not been waited for.
    begun: Option<Begun>,
    /// The last turn that was tried in vain.
    vain: u64,
}

impl Turns {
    /// Sends a turn, unless it is sent, and receives its answers. `plain`: by its script only.
    ///
    /// # Errors
    /// As for `scripts::turn`.
    pub fn send(&mut self, link: &mut Link, keys: &Keys, identity: &str, turn: &Turn, plain: bool) -> Result<Turned> {
        if let Some(mut begun) = self.begun.take() {
            if begun.is_of(link, identity, turn) {
                while begun.awaits() {
                    let answer = link.receive().inspect_err(|_| self.in_vain())?;
                    begun.answers.push(answer);
                }
                if let Some(turned) = self.end(link, keys, turn, begun)? {
                    return Ok(turned);
                }
            } else {
                // What comes over it would be answers to another turn.
                link.discard();
            }
        }
        let footing = self.footing.take();
        link.leave_if_elsewhere();
        if self.rest > 0 {
            // This very turn has been tried.
            self.rest -= u32::from(self.vain != turn.call);
        } else if let Some(footing) = footing.filter(|footing| footing.bears(link, identity, turn)) {
            let transaction = Transaction::new(link, keys, identity, turn, footing)?;
            let answers = link.converse(transaction.commands())?;
            let transacted = transaction.read(link, keys, identity, turn, answers)?;
            if let Some(turned) = self.transacted(link, transacted) {
                return Ok(turned);
            }
        }
        // After one that needs its script there mostly comes another of that kind.
        let is_suited = scripts::is_suited(link, turn) && !plain;
        let now = Instant::now();
        if !is_suited || self.rest > 0 || self.unable_until.is_some_and(|until| now < until) {
            return scripts::turn(link, keys, identity, turn);
        }
        let ask = Ask::anew(link, turn.call, self.empty.clone());
        let (turned, answers) = scripts::turn_and(link, keys, identity, turn, ask.commands(keys, identity))?;
        if !answers.is_empty() {
            match ask.read(identity, answers) {
                Ok(footing) => {
                    if footing.as_ref().is_some_and(|footing| footing.empty.is_empty()) {
                        self.empty.clear();
                    }
                    self.footing = footing;
                }
                Err(error) => self.refused(link, error),
            }
        }
        Ok(turned)
    }

    /// Sends a turn without its script, and without ever waiting, where that can be. Else it is to be sent by `send`. Where it has been, its
    /// answers are to be had by `end_at_once` or by `send`, before anything else is done with the link.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub fn begin_at_once(&mut self, link: &mut Link, keys: &Keys, identity: &str, turn: &Turn) -> Result<()> {
        let bytes: usize = turn.records.iter().map(|(_, payload)| payload.len()).sum();
        if bytes > AT_ONCE || turn.acks.len() > MANY || !turn.claims.is_empty() || !self.may_begin(link) {
            return Ok(());
        }
        link.leave_if_elsewhere();
        let bears = |footing: &mut Footing| footing.bears(link, identity, turn);
        let Some(footing) = self.footing.take_if(bears) else {
            return Ok(());
        };
        let transaction = Transaction::new(link, keys, identity, turn, footing)?;
        if link.begin_at_once(transaction.commands())? {
            self.begun = Some(Begun {
                answers: Vec::with_capacity(transaction.commands().len()),
                transaction,
                identity: identity.to_owned(),
                call: turn.call,
                generation: link.generation(),
                sent: clock::now(),
            });
        }
        Ok(())
    }

    /// Whether `begin_at_once` may send a turn, if that is suited.
    pub fn may_begin(&self, link: &Link) -> bool {
        self.rest == 0 && self.footing.is_some() && link.is_bare()
    }

    /// Receives the answers to a turn that has been sent by `begin_at_once`, as far as they have come. Never waits.
    ///
    /// # Errors
    /// As for `scripts::turn`.
    pub fn end_at_once(&mut self, link: &mut Link, keys: &Keys, identity: &str, turn: &Turn) -> Result<Ended> {
        let Some(mut begun) = self.begun.take_if(|begun| begun.is_of(link, identity, turn)) else {
            return Ok(Ended::NotSo);
        };
        while begun.awaits() {
            match link.try_receive()? {
                Some(answer) => begun.answers.push(answer),
                None => {
                    self.begun = Some(begun);
                    return Ok(Ended::NotYet);
                }
            }
        }
        Ok(match self.end(link, keys, turn, begun)? {
            Some(turned) => Ended::Done(turned),
            None => Ended::NotSo,
        })
    }

    /// Whether a turn is sent whose answers have not come yet.
    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    fn end(&mut self, link: &mut Link, keys: &Keys, turn: &Turn, begun: Begun) -> Result<Option<Turned>> {
        let transacted = begun
            .transaction
            .read(link, keys, &begun.identity, turn, begun.answers)?;
        let turned = self.transacted(link, transacted);
        if turned.is_none() {
            self.vain = turn.call;
        }
        if clock::now().saturating_sub(begun.sent) > TOLD_WITHIN {
            // What the server's time was is told too late.
            self.footing = None;
        }
        Ok(turned)
    }

    /// What has come of a transaction. `None`: the turn is not done, and goes by its script.
    fn transacted(&mut self, link: &mut Link, transacted: Transacted) -> Option<Turned> {
        match transacted {
            Transacted::Done {
                done,
                next,
                ends,
                broken,
            } => {
                match next {
                    Ok(footing) => self.footing = footing,
                    Err(error) => self.refused(link, error),
                }
                if broken {
                    self.in_vain();
                    self.rest += 1;
                    return Some(Turned::Done(*done));
                }
                self.next_rest = 0;
                if !ends.is_empty() {
                    // What other queues have is the script's to find out; and whether these stay empty will be seen then.
                    self.rest = 1;
                    self.empty.extend(ends);
                }
                return Some(Turned::Done(*done));
            }
            Transacted::Changed | Transacted::Refused => self.in_vain(),
            Transacted::Forbidden(error) => self.refused(link, error),
        }
        None
    }

    /// Why Redis does no transactions, if that is news.
    pub fn refusal(&mut self) -> Option<Error> {
        self.refusal.take()
    }

    /// A connection may be in the middle of a transaction now, whose end was refused: another one is made.
    fn refused(&mut self, link: &mut Link, error: Error) {
        link.discard();
        self.unable_until = Some(Instant::now() + UNABLE_FOR);
        self.refusal = Some(error);
    }

    /// A turn was tried without its script, in vain.
    pub fn in_vain(&mut self) {
        self.empty.clear();
        // This one is the first of them.
        self.rest = self.next_rest;
        self.next_rest = (2 * self.next_rest).clamp(1, LONGEST_REST);
    }
}

impl Begun {
    fn is_of(&self, link: &Link, identity: &str, turn: &Turn) -> bool {
        link.is_connected()
            && self.generation == link.generation()
            && self.identity == identity
            && self.call == turn.call
    }

    fn awaits(&self) -> bool {
        self.answers.len() < self.transaction.commands().len()
    }
}
