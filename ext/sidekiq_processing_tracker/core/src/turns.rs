//! How turns are sent: without their script where that can be, which costs Redis a third; else by it.

use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::Link;
use crate::scripts::{self, Ask, Footing, Queues, Transacted, Turn, Turned};
use std::time::{Duration, Instant};

/// For so many turns at most it is not tried again, after it was tried in vain.
const LONGEST_REST: u32 = 64;

/// For so long it is not tried again, after it was refused.
const UNABLE_FOR: Duration = Duration::from_secs(60);

/// What is known for the next turn.
#[derive(Debug, Default)]
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
}

impl Turns {
    /// Sends a turn. `plain`: by its script only.
    ///
    /// # Errors
    /// As for `scripts::turn`.
    pub fn send(&mut self, link: &mut Link, keys: &Keys, identity: &str, turn: &Turn, plain: bool) -> Result<Turned> {
        let footing = self.footing.take();
        link.leave_if_elsewhere();
        if self.rest > 0 {
            self.rest -= 1;
        } else if let Some(footing) = footing.filter(|footing| footing.bears(link, identity, turn)) {
            match scripts::transact(link, keys, identity, turn, footing)? {
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
                        return Ok(Turned::Done(*done));
                    }
                    self.next_rest = 0;
                    if !ends.is_empty() {
                        // What other queues have is the script's to find out; and whether these stay empty will be seen then.
                        self.rest = 1;
                        self.empty.extend(ends);
                    }
                    return Ok(Turned::Done(*done));
                }
                Transacted::Changed | Transacted::Refused => self.in_vain(),
                Transacted::Forbidden(error) => self.refused(link, error),
            }
        }
        // After one that needs its script there mostly comes another of that kind.
        let is_suited = scripts::is_suited(turn) && !plain;
        let now = Instant::now();
        if !is_suited || self.rest > 0 || self.unable_until.is_some_and(|until| now < until) {
            return scripts::turn(link, keys, identity, turn);
        }
        let ask = Ask::anew(link, keys, identity, turn.call, self.empty.clone());
        let (turned, answers) = scripts::turn_and(link, keys, identity, turn, ask.commands())?;
        if !answers.is_empty() {
            match ask.read(answers) {
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

    fn in_vain(&mut self) {
        self.empty.clear();
        // This one is the first of them.
        self.rest = self.next_rest;
        self.next_rest = (2 * self.next_rest).clamp(1, LONGEST_REST);
    }
}
