//! The recoveries of dead instances, two at a time: while Redis works on one, the next step of the other is decided.
//!
//! Both use one connection. A call is sent before the answer to the one before it is read, so that Redis always has something to do.

use crate::error::Result;
use crate::events::Event;
use crate::link::{Asked, Link};
use crate::recovery::{Progress, Reaper, Recovery, Report};
use crate::scripts;
use std::collections::VecDeque;

/// How many go on at a time.
const TOGETHER: usize = 2;

#[derive(Default)]
pub(crate) struct Recoveries {
    /// Instances that were named as due together, and whose recoveries have not begun.
    named: VecDeque<Vec<u8>>,
    /// Those that are not over. First those whose calls are on their way, in the order of the answers.
    going: VecDeque<Going>,
    /// The connection that those calls were made on.
    generation: u64,
}

struct Going {
    recovery: Recovery,
    /// It had waited among the named while others were recovered.
    waited: bool,
    /// The call that is on its way.
    asked: Option<Asked>,
}

/// What is told of them.
pub(crate) enum News {
    /// This came of a call.
    Events(Vec<Event>),
    /// A call was answered as it should be.
    Answered,
    /// The recovery of this instance is over.
    Over(Vec<u8>, Report),
}

/// What came of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    /// More may be due.
    Worked,
    /// An instance that was named as due is not due any more, or cannot be recovered: a pause should come before the next round.
    InVain,
    /// No instance is due.
    Idle,
}

impl Recoveries {
    /// Whether none is under way.
    pub fn is_empty(&self) -> bool {
        self.going.is_empty()
    }

    /// Begins with this one, unless another is under way.
    pub fn begin(&mut self, recovery: Recovery) {
        if self.going.is_empty() {
            self.named.retain(|named| named != recovery.from());
            self.going.push_back(Going::new(recovery, false));
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.named.clear();
        self.going.clear();
    }

    /// Forgets the one whose call has failed. Answers whose recovery it was.
    pub fn give_up(&mut self) -> Option<Vec<u8>> {
        self.going.pop_front().map(|going| going.recovery.from().to_vec())
    }

    /// Goes on for as long as `may_go_on`, which is asked before each call with how many others are on their way, but not further than
    /// with those that are known to be due. Nothing is on its way when it comes back.
    ///
    /// # Errors
    /// As for every script; the connection is gone then. The call that failed is made again by the next round, before any other.
    pub fn round(
        &mut self,
        link: &mut Link,
        reaper: &Reaper,
        mut may_go_on: impl FnMut(usize) -> bool,
        mut tell: impl FnMut(News),
    ) -> Result<Round> {
        let round = self.work(link, reaper, &mut may_go_on, &mut tell);
        if round.is_err() {
            self.settle_the_others(link, reaper, &mut tell);
            // There may be another server, with other names.
            self.named.clear();
            self.lose_answers();
            link.discard();
        }
        round
    }

    /// The answer to the first call was none that helps. What else is on its way may be done, and is to be told, before the connection goes.
    fn settle_the_others(&mut self, link: &mut Link, reaper: &Reaper, tell: &mut impl FnMut(News)) {
        let Some(mut failed) = self.going.pop_front() else {
            return;
        };
        failed.asked = None;
        // Their success is none of the call that failed.
        let mut told = |news| match news {
            News::Answered => {}
            news => tell(news),
        };
        let mut round = Round::Worked;
        while link.is_connected() && self.on_their_way() > 0 {
            if self.receive(link, reaper, &mut told, &mut round).is_err() {
                break;
            }
        }
        self.going.push_front(failed);
    }

    fn work(
        &mut self,
        link: &mut Link,
        reaper: &Reaper,
        may_go_on: &mut impl FnMut(usize) -> bool,
        tell: &mut impl FnMut(News),
    ) -> Result<Round> {
        if self.going.is_empty() && self.named.is_empty() {
            self.named = scripts::due(link, &reaper.keys, reaper.pace)?.into();
            match self.named.pop_front() {
                None => return Ok(Round::Idle),
                Some(first) => self.going.push_back(Going::new(Recovery::new(first), false)),
            }
        }
        let mut round = Round::Worked;
        loop {
            while round == Round::Worked && may_go_on(self.on_their_way()) {
                if self.going.len() < TOGETHER {
                    let named = self.named.pop_front().map(Recovery::new);
                    self.going.extend(named.map(|recovery| Going::new(recovery, true)));
                }
                if !self.ask(link, reaper, tell, &mut round)? {
                    break;
                }
            }
            if self.on_their_way() == 0 {
                return Ok(round);
            }
            self.receive(link, reaper, tell, &mut round)?;
        }
    }

    fn on_their_way(&self) -> usize {
        self.going.iter().take_while(|going| going.asked.is_some()).count()
    }

    fn lose_answers(&mut self) {
        for going in &mut self.going {
            going.asked = None;
        }
    }

    /// Makes the next call. Answers whether there was one that can be made now.
    fn ask(
        &mut self,
        link: &mut Link,
        reaper: &Reaper,
        tell: &mut impl FnMut(News),
        round: &mut Round,
    ) -> Result<bool> {
        link.connect()?;
        if self.generation != link.generation() {
            self.generation = link.generation();
            self.lose_answers();
        }
        let position = self.on_their_way();
        let Some(going) = self.going.get_mut(position) else {
            return Ok(false);
        };
        if let Some(asked) = going.recovery.next(reaper) {
            link.call(&asked, false)?;
            going.asked = Some(asked);
        } else if position > 0 {
            return Ok(false);
        } else {
            let mut told = Vec::new();
            let progress = going.recovery.step(link, reaper, |event| told.push(event));
            self.proceed(progress, told, tell, round)?;
        }
        Ok(true)
    }

    /// Receives the answer to the first of the calls that are on their way.
    fn receive(
        &mut self,
        link: &mut Link,
        reaper: &Reaper,
        tell: &mut impl FnMut(News),
        round: &mut Round,
    ) -> Result<()> {
        let answer = link.answered()?;
        let Some(going) = self.going.front_mut() else {
            return Ok(());
        };
        if let Some(answer) = answer {
            let mut told = Vec::new();
            let progress = going.recovery.answered(reaper, answer, |event| told.push(event));
            return self.proceed(progress, told, tell, round);
        }
        // The server does not know the script: once more, behind the others.
        if let Some(asked) = &going.asked {
            link.call(asked, true)?;
            let others = self.on_their_way();
            self.going.make_contiguous()[..others].rotate_left(1);
        }
        Ok(())
    }

    /// The first one has come so far.
    fn proceed(
        &mut self,
        progress: Result<Progress>,
        told: Vec<Event>,
        tell: &mut impl FnMut(News),
        round: &mut Round,
    ) -> Result<()> {
        tell(News::Events(told));
        let progress = progress?;
        tell(News::Answered);
        let Some(mut going) = self.going.pop_front() else {
            return Ok(());
        };
        going.asked = None;
        match progress {
            Progress::More => self.going.push_back(going),
            Progress::Done(report) => {
                if report.idle {
                    // Others are at work here. If it had waited, then so may those have that wait behind it.
                    self.named.clear();
                    if !going.waited {
                        *round = Round::InVain;
                    }
                }
                tell(News::Over(going.recovery.from().to_vec(), report));
            }
        }
        Ok(())
    }
}

impl Going {
    fn new(recovery: Recovery, waited: bool) -> Self {
        Self {
            recovery,
            waited,
            asked: None,
        }
    }
}
