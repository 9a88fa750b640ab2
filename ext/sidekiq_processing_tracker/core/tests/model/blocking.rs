//! Blocking claims: what a process, Redis and an unkind network make of claims that wait in Redis (docs/protocol.md,
//! "Blocking claims"). The process has one slot, and threads enough to claim while it runs something. Of the others it
//! matters only that they take what lies in the queue and do it, which is one step.
//!
//! A claim is two commands on one connection, and anything may happen between them. Turns, acks and recoveries are one step
//! each: what becomes of those is the matter of `model/jobs.rs`. Order is left out: whatever lies in the queue may be taken.
//! So are queues that are no lists, and keys that somebody removes.
//!
//! The numbers of hands, and of jobs that were brought, are used again once nobody knows them any more: that is the same as
//! new ones.

use crate::search::{Mix, Protocol};

/// Jobs, and identities that the process may have one after the other.
const JOBS: usize = 2;
const LIVES: usize = 2;
/// Hands of which anything is known.
const HANDS: usize = 6;
/// Hands that a slot is to close.
const OLD: usize = 3;
/// The slot's connection, and those that it has given up while something was on its way there.
const PIPES: usize = 5;
/// The token of a job that was in a hand when its lease was taken, or that nobody asks for any more.
const SEIZED: u8 = 15;

/// What is done wrongly on purpose, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing.
    None,
    /// A sweep takes what a `take` has just recorded, whose answer is not read yet, for nobody's.
    NothingHeld,
    /// A sweep does not look at the list of hands.
    SweepSeesNoHands,
    /// Who fences closes no hands.
    FenceDoesNotClose,
    /// Who fences does not look into the hands.
    NoSeize,
    /// A slot that opens another hand does not close those before it.
    OpenDoesNotClose,
    /// Nor does it ask whether the job that it knows has its token already.
    NoSearch,
    /// A slot whose connection broke makes no other.
    NoOwing,
    /// What asks on a new connection for rights moves what is in the hand back, and the hand may have been that of another connection.
    ProbesItsHand,
    /// A slot that has no connection keeps the mark of a lost lease.
    LostForGood,
    /// `take` closes no hand.
    NoGuard,
    /// Who leaves puts nothing back that it has not heard of.
    NothingBack,
    /// Who leaves closes no hands.
    LeaveDoesNotClose,
    /// Once it stands what `leave` is to do, a slot does not know any more what it has in its hand.
    LeaveForgets,
}

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Connections that break, also in the middle of a claim.
    pub breaks: u8,
    /// Claims whose wait ends before a job has come.
    pub timeouts: u8,
    /// Leases that end under the living process.
    pub fences: u8,
    /// Leases that it takes for lost before they end.
    pub losses: u8,
    /// It is killed.
    pub kills: u8,
    /// It leaves.
    pub leaves: u8,
    /// Sweeps that have nothing to find.
    pub sweeps: u8,
    /// Hands of which Redis forgets that they were closed.
    pub expiries: u8,
    /// What is wrong.
    pub mutation: Mutation,
}

impl Config {
    /// Nothing befalls anybody.
    pub const CALM: Self = Self {
        breaks: 0,
        timeouts: 0,
        fences: 0,
        losses: 0,
        kills: 0,
        leaves: 0,
        sweeps: 0,
        expiries: 0,
        mutation: Mutation::None,
    };
}

/// The process and Redis.
#[derive(Clone, Copy, Debug)]
pub struct Blocking {
    /// What may happen.
    pub config: Config,
}

/// A job that the process has been given out of a hand, and the number for its token. That is 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    index: u8,
    job: u8,
}

const UNKNOWN: Known = Known { index: 0, job: 0 };

/// A hand, and what is known to be in it. Its number is 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Old {
    hand: u8,
    known: Known,
}

const NO_OLD: Old = Old {
    hand: 0,
    known: UNKNOWN,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Nothing,
    Open,
    /// Asks whether the user may do what claims need.
    Probe,
    /// `take` alone.
    Take,
    /// `take` and BLMOVE.
    Claim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Sent,
    /// `take` is done. BLMOVE waits, or has not arrived.
    Waits,
    Over,
}

/// The answer of a script, until it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    None,
    Lost,
    Closed,
    Nothing,
    Recorded(u8),
    /// A bit for each old hand whose job has its token.
    Opened(u8),
}

/// How BLMOVE has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Nothing,
    Refused,
    Job(u8),
}

/// What is on its way on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pipe {
    what: What,
    stage: Stage,
    life: u8,
    hand: u8,
    /// What `take` is to record.
    index: u8,
    /// What `open` is to close.
    old: [Old; OLD],
    answer: Answer,
    moved: Moved,
}

const NO_PIPE: Pipe = Pipe {
    what: What::Nothing,
    stage: Stage::Over,
    life: 0,
    hand: 0,
    index: 0,
    old: [NO_OLD; OLD],
    answer: Answer::None,
    moved: Moved::Nothing,
};

/// See `src/slots.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    connected: bool,
    hand: u8,
    /// Claims have been made into it.
    used: bool,
    brought: Known,
    old: [Old; OLD],
    lost: bool,
    reopens: bool,
}

/// A job of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Job {
    /// 0 where it has no such job.
    index: u8,
    /// Its token is known.
    kept: bool,
    /// Its ack waits for the token, or for the next turn.
    ended: bool,
}

const NO_JOB: Job = Job {
    index: 0,
    kept: false,
    ended: false,
};

/// What a sweep has read and not yet compared: by job the tokens; and a bit for each hand. Redis is asked twice for that, but the one
/// has nothing to do with the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sweep {
    tokens: [u8; JOBS],
    hands: u8,
}

/// What `leave` is to do, by job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LastCall {
    /// With the hand, where the token is not known.
    acks: [Old; JOBS],
    requeues: [u8; JOBS],
    /// A hand that need not be closed.
    quiet: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    alive: bool,
    registered: bool,
    life: u8,
    jobs: [Job; JOBS],
    slot: Slot,
    sweep: Option<Sweep>,
    last_call: Option<LastCall>,
}

const NO_PROCESS: Process = Process {
    alive: false,
    registered: false,
    life: 0,
    jobs: [NO_JOB; JOBS],
    slot: Slot {
        connected: false,
        hand: 0,
        used: false,
        brought: UNKNOWN,
        old: [NO_OLD; OLD],
        lost: false,
        reopens: false,
    },
    sweep: None,
    last_call: None,
};

/// What Redis has of a hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hand {
    life: u8,
    listed: bool,
    closed: bool,
    /// The oldest first: each job's number and one, 0 for none.
    jobs: [u8; JOBS],
}

const NO_HAND: Hand = Hand {
    life: 0,
    listed: false,
    closed: false,
    jobs: [0; JOBS],
};

/// What Redis has of one identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    lease: bool,
    /// By job, 0 for none.
    tokens: [u8; JOBS],
}

/// One state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    queue: u8,
    done: u8,
    held: [Held; LIVES],
    hands: [Hand; HANDS],
    process: Process,
    pipes: [Pipe; PIPES],
    left: [u8; 8],
    /// A promise that the last step has broken.
    broken: Option<&'static str>,
}

/// One step. A connection goes by its place in `pipes`.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Register,
    /// A beat tells that the lease is lost.
    Hear,
    Connect,
    Take,
    Claim,
    /// The script, or what stands alone, is done in Redis.
    Arrive(usize),
    /// BLMOVE moves this job.
    Move(usize, u8),
    /// It finds that its hand is closed.
    Refuse(usize),
    /// It ends without a job, or is torn off.
    End(usize),
    Read,
    Finish(u8),
    Ack(u8),
    /// Another process takes this job and does it.
    Others(u8),
    ReadHash,
    /// The same, though there is nothing to find.
    Sweep,
    Compare,
    Fence(u8),
    Recover(u8),
    Break,
    /// What was sent on a connection that is given up does not arrive.
    Drop(usize),
    Lose,
    /// Redis forgets that this hand is closed.
    Expire(u8),
    Kill,
    /// It is drawn up what `leave` is to do.
    DrawUp,
    Leave,
    /// It has left, or has no lease to give up.
    Exit,
}

const ONE_PLACE: &str = "a job is in one place";
const SEEN: &str = "a job is in no hand that nobody looks at";
const NO_LEASE: &str = "without a lease nothing is claimed";
const LATE: &str = "a late claim takes nothing";
const ON_RECORD: &str = "what runs is on record";
const NOTHING_LEFT: &str = "who leaves leaves nothing behind";

const BREAKS: usize = 0;
const TIMEOUTS: usize = 1;
const FENCES: usize = 2;
const LOSSES: usize = 3;
const KILLS: usize = 4;
const LEAVES: usize = 5;
const SWEEPS: usize = 6;
const EXPIRIES: usize = 7;

const NUMBERS: std::ops::RangeInclusive<u8> = 1..=HANDS as u8;

fn bits(of: u8) -> impl Iterator<Item = u8> {
    (0..JOBS as u8).filter(move |job| of & (1 << job) != 0)
}

/// A bit for each hand, none for 0.
fn bit(hand: u8) -> u8 {
    (1 << hand) >> 1
}

/// The bits of these hands.
fn bits_of(old: &[Old]) -> u8 {
    let mut bits = 0;
    for old in old {
        bits |= bit(old.hand);
    }
    bits
}

fn knows(old: &[Old], index: u8) -> bool {
    old.iter().any(|old| old.known.index == index)
}

impl Hand {
    fn is_empty(&self) -> bool {
        self.jobs[0] == 0
    }

    fn push(&mut self, job: u8) {
        let free = self.jobs.iter_mut().find(|place| **place == 0);
        *free.expect("no more jobs than there are") = job + 1;
    }

    fn oldest(&self) -> Option<u8> {
        self.jobs[0].checked_sub(1)
    }

    fn pop(&mut self) -> Option<u8> {
        let oldest = self.oldest()?;
        self.jobs.rotate_left(1);
        self.jobs[JOBS - 1] = 0;
        Some(oldest)
    }

    fn close(&mut self) {
        self.closed |= self.is_empty();
    }
}

impl Pipe {
    fn is_free(&self) -> bool {
        self.what == What::Nothing
    }

    fn may_move(&self) -> bool {
        self.what == What::Claim && self.stage == Stage::Waits
    }

    fn word(&self) -> u64 {
        let answer = match self.answer {
            Answer::None => 0,
            Answer::Lost => 1,
            Answer::Closed => 2,
            Answer::Nothing => 3,
            Answer::Recorded(job) => 4 + job,
            Answer::Opened(recorded) => 8 + recorded,
        };
        let moved = match self.moved {
            Moved::Nothing => 0,
            Moved::Refused => 1,
            Moved::Job(job) => 2 + job,
        };
        let mut word = word_of(&self.old);
        for part in [self.what as u8 | self.life << 3, self.hand, self.index, answer] {
            word = word << 4 | u64::from(part);
        }
        word << 4 | u64::from(self.stage as u8 | moved << 2)
    }
}

/// 12 bits for each.
fn word_of(old: &[Old]) -> u64 {
    let mut word = 0;
    for old in old {
        word = word << 12 | u64::from(old.hand) << 8 | u64::from(old.known.index) << 4 | u64::from(old.known.job);
    }
    word
}

impl Slot {
    fn current(&self) -> Old {
        Old {
            hand: self.hand,
            known: self.brought,
        }
    }

    /// Where it has a job of this number.
    fn place_of(&self, index: u8) -> Option<Old> {
        let current = self.current();
        let mut all = self.old.iter().chain([&current]);
        all.find(|old| old.hand != 0 && old.known.index == index).copied()
    }

    fn hands(&self) -> u8 {
        bits_of(&self.old) | bit(self.hand)
    }

    fn has_old(&self) -> bool {
        self.old[0].hand != 0
    }

    fn add_old(&mut self, old: Old) {
        let free = self.old.iter_mut().find(|place| place.hand == 0);
        *free.expect("no more old hands than that") = old;
    }

    fn owes(&self) -> bool {
        !self.connected && (self.used || self.has_old())
    }
}

impl Process {
    fn is(&self, life: u8) -> bool {
        self.registered && self.life == life
    }

    fn is_stopping(&self) -> bool {
        self.last_call.is_some()
    }

    /// What was brought has its token, or is not there any more.
    fn took(&mut self, known: Known, recorded: bool) -> Option<&'static str> {
        let job = &mut self.jobs[usize::from(known.job)];
        if known.index == 0 || job.index != known.index {
            return None;
        }
        job.kept = recorded;
        (!recorded).then_some(ON_RECORD)
    }
}

/// What Redis does.
impl State {
    fn hand(&mut self, number: u8) -> &mut Hand {
        &mut self.hands[usize::from(number) - 1]
    }

    fn held(&mut self, life: u8) -> &mut Held {
        &mut self.held[usize::from(life)]
    }

    fn has_lease(&self, life: u8) -> bool {
        self.held[usize::from(life)].lease
    }

    fn token(&mut self, life: u8, job: u8) -> &mut u8 {
        &mut self.held(life).tokens[usize::from(job)]
    }

    fn put(&mut self, job: u8) {
        if self.queue & (1 << job) != 0 {
            self.broken = Some(ONE_PLACE);
        }
        self.queue |= 1 << job;
    }

    fn empty(&mut self, number: u8) {
        while let Some(job) = self.hand(number).pop() {
            self.put(job);
        }
    }

    fn record(&mut self, number: u8, life: u8, index: u8) -> Option<u8> {
        let job = self.hand(number).pop()?;
        if std::mem::replace(self.token(life, job), index) != 0 {
            self.broken = Some(ONE_PLACE);
        }
        Some(job)
    }

    /// Answers whether it has its token.
    fn record_known(&mut self, old: Old, life: u8, searches: bool) -> bool {
        let Known { index, job } = old.known;
        if index == 0 {
            return false;
        }
        let has_token = searches && self.held(life).tokens.contains(&index);
        has_token || self.hand(old.hand).oldest() == Some(job) && self.record(old.hand, life, index).is_some()
    }

    /// The hands that stand in the list of an identity, a bit each.
    fn listed(&self, life: u8) -> u8 {
        let mut listed = 0;
        for (number, hand) in (1..).zip(&self.hands) {
            if hand.listed && hand.life == life {
                listed |= bit(number);
            }
        }
        listed
    }

    fn seize(&mut self, life: u8, looks: bool, closes: impl Fn(u8) -> bool) {
        let listed = self.listed(life);
        for number in NUMBERS.filter(|number| listed & bit(*number) != 0) {
            while looks && self.record(number, life, SEIZED).is_some() {}
            if closes(number) {
                self.hand(number).close();
            }
            self.hand(number).listed = false;
        }
    }

    fn give_back(&mut self, life: u8, job: u8) {
        if std::mem::take(self.token(life, job)) != 0 {
            self.put(job);
        }
    }

    fn take_off(&mut self, life: u8, job: u8, index: u8) {
        let token = self.token(life, job);
        if *token == index {
            *token = 0;
            self.done |= 1 << job;
        }
    }

    /// Nobody listens to the answers on a connection that is given up.
    fn answered(&mut self, which: usize) {
        let pipe = &mut self.pipes[which];
        if which > 0 {
            pipe.answer = Answer::None;
            if pipe.stage == Stage::Over {
                *pipe = NO_PIPE;
            }
        }
    }

    fn ended(&mut self, which: usize, moved: Moved) {
        let pipe = &mut self.pipes[which];
        (pipe.stage, pipe.moved) = (Stage::Over, moved);
        self.answered(which);
    }
}

/// What is known of numbers.
impl State {
    fn knows_index(&self, index: u8) -> bool {
        let process = &self.process;
        let is_sent = |pipe: &Pipe| pipe.index == index || knows(&pipe.old, index);
        let is_last = |last: LastCall| knows(&last.acks, index) || last.requeues.contains(&index);
        self.held.iter().any(|held| held.tokens.contains(&index))
            || process.jobs.iter().any(|job| job.index == index)
            || process.slot.brought.index == index
            || knows(&process.slot.old, index)
            || process.sweep.is_some_and(|sweep| sweep.tokens.contains(&index))
            || process.last_call.is_some_and(is_last)
            || self.pipes.iter().any(is_sent)
    }

    fn new_index(&self) -> u8 {
        let index = (1..SEIZED).find(|index| !self.knows_index(*index));
        index.expect("fewer jobs at a time")
    }

    /// The hands that anybody may still speak of.
    fn hands_known(&self) -> u8 {
        let process = &self.process;
        let mut known = process.slot.hands();
        for pipe in self.pipes.iter().filter(|pipe| !pipe.is_free()) {
            known |= bits_of(&pipe.old) | bit(pipe.hand);
        }
        if let Some(sweep) = &process.sweep {
            known |= sweep.hands;
        }
        if let Some(last) = &process.last_call {
            known |= bits_of(&last.acks) | bit(last.quiet);
        }
        known
    }

    fn new_hand(&self) -> u8 {
        let known = self.hands_known();
        let is_free = |number: &u8| self.hands[usize::from(*number) - 1] == NO_HAND && known & bit(*number) == 0;
        NUMBERS.into_iter().find(is_free).expect("fewer hands at a time")
    }

    /// Forgets what makes no difference any more.
    fn tidy(&mut self) {
        let known = self.hands_known();
        for (number, hand) in (1..).zip(&mut self.hands) {
            let is_listed = hand.listed && self.held[usize::from(hand.life)].lease;
            if known & bit(number) == 0 && hand.is_empty() && !is_listed {
                *hand = NO_HAND;
            }
        }
        for held in self.held.iter_mut().filter(|held| !held.lease) {
            held.tokens = held.tokens.map(|token| if token == 0 { 0 } else { SEIZED });
        }
    }

    /// What may be taken out of the queue. As long as nobody has heard of any, one job is like the other.
    fn takeable(&self) -> u8 {
        let all = (1 << JOBS) - 1;
        let process = &self.process;
        let is_untouched = self.queue == all
            && !(1..SEIZED).any(|index| self.knows_index(index))
            && !process.is_stopping()
            && self.pipes.iter().all(|pipe| {
                let has_job = matches!(pipe.answer, Answer::Recorded(_)) || matches!(pipe.moved, Moved::Job(_));
                !has_job
            });
        if is_untouched {
            1
        } else {
            self.queue
        }
    }

    fn places(&self, job: u8) -> usize {
        let mut places = usize::from(self.queue >> job & 1) + usize::from(self.done >> job & 1);
        for held in &self.held {
            places += usize::from(held.tokens[usize::from(job)] != 0);
        }
        for in_hand in self.hands.iter().flat_map(|hand| hand.jobs) {
            places += usize::from(in_hand == job + 1);
        }
        places
    }

    /// A job that the process has under this number has a token, or lies in this hand.
    fn is_on_record(&self, number: usize, index: u8, place: Option<Old>) -> bool {
        let process = &self.process;
        let is_there = |old: Old| old.hand != 0 && self.hands[usize::from(old.hand) - 1].oldest() == Some(number as u8);
        self.held[usize::from(process.life)].tokens[number] == index || place.is_some_and(is_there)
    }
}

/// What the process does.
impl State {
    fn is_outstanding(&self) -> bool {
        self.pipes[0].what == What::Claim
    }

    fn part(&mut self) {
        let is_outstanding = self.is_outstanding();
        let slot = &mut self.process.slot;
        if is_outstanding || slot.brought != UNKNOWN {
            return;
        }
        if slot.lost {
            (slot.lost, slot.hand, slot.used, slot.connected) = (false, 0, false, false);
        }
        if std::mem::take(&mut slot.reopens) {
            slot.connected = false;
        }
    }

    /// Gives the connection up. What was sent on it may be late.
    fn give_up(&mut self) {
        let pipe = std::mem::replace(&mut self.pipes[0], NO_PIPE);
        if !pipe.is_free() && pipe.stage != Stage::Over {
            let free = self.pipes[1..].iter_mut().find(|pipe| pipe.is_free());
            *free.expect("fewer connections at a time") = Pipe {
                answer: Answer::None,
                ..pipe
            };
        }
    }

    fn fail(&mut self) {
        self.give_up();
        let slot = &mut self.process.slot;
        slot.connected = false;
        if slot.lost {
            slot.brought = UNKNOWN;
        }
        self.part();
    }

    fn exit(&mut self) {
        self.give_up();
        self.process = Process {
            life: self.process.life,
            ..NO_PROCESS
        };
    }

    fn send(&mut self, what: What, life: u8, hand: u8, index: u8) {
        self.pipes[0] = Pipe {
            what,
            stage: Stage::Sent,
            life,
            hand,
            index,
            ..NO_PIPE
        };
    }

    /// With the hand that is there, and what is known to be in it.
    fn claim(&mut self, what: What) {
        let slot = &mut self.process.slot;
        slot.used |= what == What::Claim;
        let Old { hand, known } = slot.current();
        let life = self.hand(hand).life;
        self.send(what, life, hand, known.index);
    }

    fn brought(&mut self, job: u8) {
        let index = self.new_index();
        let process = &mut self.process;
        process.slot.brought = Known { index, job };
        // Nobody is there to run it any more.
        if !process.is_stopping() {
            process.jobs[usize::from(job)] = Job { index, ..NO_JOB };
        }
    }

    fn draw_up(&mut self) {
        let process = &self.process;
        let slot = &process.slot;
        let mut last = LastCall {
            acks: [NO_OLD; JOBS],
            requeues: [0; JOBS],
            quiet: 0,
        };
        for (number, job) in (0_u8..).zip(process.jobs).filter(|(_, job)| job.index != 0) {
            let known = Known {
                index: job.index,
                job: number,
            };
            let number = usize::from(number);
            if job.ended {
                let place = slot.place_of(job.index).filter(|_| !job.kept);
                last.acks[number] = place.unwrap_or(Old { hand: 0, known });
            } else if job.kept {
                last.requeues[number] = job.index;
            }
        }
        if slot.connected && !self.is_outstanding() {
            last.quiet = slot.hand;
        }
        self.process.jobs = [NO_JOB; JOBS];
        self.process.last_call = Some(last);
    }
}

impl Blocking {
    fn is(&self, mutation: Mutation) -> bool {
        self.config.mutation == mutation
    }

    fn is_held(&self, process: &Process, job: usize, index: u8) -> bool {
        let Job { index: own, kept, .. } = process.jobs[job];
        kept && own == index || process.slot.place_of(index).is_some() && !self.is(Mutation::NothingHeld)
    }

    fn has_something_to_sweep(&self, state: &State) -> bool {
        let process = &state.process;
        let tokens = (0..).zip(state.held[usize::from(process.life)].tokens);
        let mut tokens = tokens.filter(|(_, token)| *token != 0);
        let slot = &process.slot;
        let is_to_reopen = slot.connected && slot.has_old() && !slot.reopens;
        let is_unknown = state.listed(process.life) & !slot.hands() != 0;
        tokens.any(|(job, token)| !self.is_held(process, job, token))
            || (is_to_reopen || is_unknown) && !self.is(Mutation::SweepSeesNoHands)
    }

    fn connect(&self, state: &mut State) {
        let mut slot = state.process.slot;
        if slot.used {
            let mut old = slot.current();
            if state.process.is_stopping() && self.is(Mutation::LeaveForgets) {
                old.known = UNKNOWN;
            }
            slot.add_old(old);
            slot.hand = 0;
        }
        let life = state.process.life;
        if slot.hand == 0 {
            slot.hand = state.new_hand();
            state.hand(slot.hand).life = life;
        }
        (slot.used, slot.brought) = (false, UNKNOWN);
        state.send(What::Open, life, slot.hand, 0);
        state.pipes[0].old = slot.old;
        state.process.slot = slot;
    }

    fn arrive(&self, state: &mut State, which: usize) {
        let pipe = state.pipes[which];
        let answer = match pipe.what {
            What::Open => self.open(state, &pipe),
            What::Take | What::Claim => self.take(state, &pipe),
            What::Nothing | What::Probe => {
                if self.is(Mutation::ProbesItsHand) {
                    state.empty(pipe.hand);
                }
                Answer::None
            }
        };
        let pipe = &mut state.pipes[which];
        pipe.answer = answer;
        pipe.stage = match pipe.what {
            What::Claim => Stage::Waits,
            _ => Stage::Over,
        };
        state.answered(which);
    }

    fn open(&self, state: &mut State, pipe: &Pipe) -> Answer {
        if !state.has_lease(pipe.life) {
            return Answer::Lost;
        }
        state.hand(pipe.hand).listed = true;
        let mut recorded = 0;
        for (at, old) in pipe.old.into_iter().enumerate() {
            // Of another identity there is no such key.
            if old.hand == 0 || state.hand(old.hand).life != pipe.life {
                continue;
            }
            let has_token = state.record_known(old, pipe.life, !self.is(Mutation::NoSearch));
            recorded |= u8::from(has_token) << at;
            state.empty(old.hand);
            if !self.is(Mutation::OpenDoesNotClose) {
                state.hand(old.hand).close();
            }
            state.hand(old.hand).listed = false;
        }
        Answer::Opened(recorded)
    }

    fn take(&self, state: &mut State, pipe: &Pipe) -> Answer {
        let guards = !self.is(Mutation::NoGuard);
        let has_lease = state.has_lease(pipe.life);
        if has_lease {
            let is_known = pipe.index != 0;
            if let Some(job) = is_known
                .then(|| state.record(pipe.hand, pipe.life, pipe.index))
                .flatten()
            {
                state.hand(pipe.hand).listed = true;
                return Answer::Recorded(job);
            }
            if state.hand(pipe.hand).listed {
                return Answer::Nothing;
            }
        } else {
            state.empty(pipe.hand);
        }
        if guards {
            state.hand(pipe.hand).close();
        }
        if has_lease {
            Answer::Closed
        } else {
            Answer::Lost
        }
    }

    fn moves(state: &mut State, which: usize, job: u8) {
        let Pipe { life, hand, .. } = state.pipes[which];
        state.queue &= !(1 << job);
        state.hand(hand).push(job);
        if !state.has_lease(life) {
            state.broken = Some(NO_LEASE);
        } else if !state.hand(hand).listed {
            state.broken = Some(LATE);
        }
        state.ended(which, Moved::Job(job));
    }

    fn read(&self, state: &mut State) {
        let pipe = state.pipes[0];
        if pipe.stage == Stage::Over && (pipe.answer == Answer::None || pipe.what != What::Claim) {
            state.pipes[0] = NO_PIPE;
        }
        state.pipes[0].answer = Answer::None;
        let is_mine = state.process.is(pipe.life);
        match (pipe.what, pipe.answer, pipe.moved) {
            (What::Open, Answer::Opened(recorded), _) if is_mine => self.opened(state, &pipe, recorded),
            (What::Open, Answer::Opened(_), _) => state.fail(),
            (What::Open, ..) => self.lost(state, pipe.life),
            (What::Probe, ..) if is_mine => state.process.slot.connected = true,
            (What::Probe, ..) => state.fail(),
            (_, Answer::None, moved) => {
                state.part();
                match moved {
                    Moved::Nothing => {}
                    Moved::Job(job) if is_mine => state.brought(job),
                    // Where nobody has taken the lease, nobody else will look there.
                    _ => state.send(What::Take, pipe.life, pipe.hand, 0),
                }
            }
            (_, answer, _) => self.took(state, &pipe, answer),
        }
    }

    fn opened(&self, state: &mut State, pipe: &Pipe, recorded: u8) {
        let process = &mut state.process;
        for (at, old) in pipe.old.into_iter().enumerate().filter(|(_, old)| old.hand != 0) {
            state.broken = state.broken.or(process.took(old.known, recorded & (1 << at) != 0));
            process.slot.old.rotate_left(1);
            process.slot.old[OLD - 1] = NO_OLD;
        }
        state.send(What::Probe, pipe.life, pipe.hand, 0);
    }

    fn took(&self, state: &mut State, pipe: &Pipe, answer: Answer) {
        let is_mine = state.process.is(pipe.life);
        let known = std::mem::replace(&mut state.process.slot.brought, UNKNOWN);
        if is_mine && answer != Answer::Lost {
            let recorded = matches!(answer, Answer::Recorded(job) if job == known.job);
            state.broken = state.broken.or(state.process.took(known, recorded));
        }
        state.part();
        match answer {
            Answer::Lost => self.lost(state, pipe.life),
            Answer::Closed if is_mine => state.fail(),
            _ => {}
        }
    }

    fn lost(&self, state: &mut State, life: u8) {
        if state.process.is(life) {
            self.lose(state);
        }
        state.fail();
    }

    fn lose(&self, state: &mut State) {
        let process = &mut state.process;
        (process.registered, process.jobs, process.sweep) = (false, [NO_JOB; JOBS], None);
        let slot = &mut process.slot;
        (slot.lost, slot.reopens, slot.old) = (true, false, [NO_OLD; OLD]);
        if !slot.connected && !self.is(Mutation::LostForGood) {
            slot.brought = UNKNOWN;
        }
        state.part();
    }

    fn compare(&self, state: &mut State) {
        let life = state.process.life;
        let Some(found) = state.process.sweep.take().filter(|_| state.has_lease(life)) else {
            return;
        };
        for (job, index) in (0_u8..).zip(found.tokens).filter(|(_, index)| *index != 0) {
            if !self.is_held(&state.process, usize::from(job), index) && *state.token(life, job) == index {
                state.give_back(life, job);
            }
        }
        if self.is(Mutation::SweepSeesNoHands) {
            return;
        }
        let slot = &mut state.process.slot;
        let unknown = found.hands & !slot.hands();
        for hand in NUMBERS.filter(|hand| unknown & bit(*hand) != 0) {
            slot.add_old(Old { hand, ..NO_OLD });
        }
        if slot.has_old() {
            slot.reopens = slot.connected;
            state.part();
        }
    }

    fn leave(&self, state: &mut State) {
        let life = state.process.life;
        let Some(last) = state.process.last_call else { return };
        for ack in last.acks.into_iter().filter(|ack| ack.known.index != 0) {
            if ack.hand != 0 {
                state.record_known(ack, life, true);
            }
            state.take_off(life, ack.known.job, ack.known.index);
        }
        for (job, index) in (0..).zip(last.requeues).filter(|(_, index)| *index != 0) {
            if *state.token(life, job) == index {
                state.give_back(life, job);
            }
        }
        let closes = !self.is(Mutation::LeaveDoesNotClose);
        state.seize(life, true, |hand| closes && hand != last.quiet);
        if !self.is(Mutation::NothingBack) {
            (0..JOBS as u8).for_each(|job| state.give_back(life, job));
        }
        let held = state.held(life);
        held.lease = false;
        if held.tokens != [0; JOBS] {
            state.broken = Some(NOTHING_LEFT);
        }
    }

    /// Which of the budgets a step belongs to.
    fn budget_of(state: &State, action: Action) -> Option<usize> {
        match action {
            Action::Break => Some(BREAKS),
            Action::End(0) if !state.process.slot.reopens => Some(TIMEOUTS),
            Action::Fence(life) if state.process.is(life) => Some(FENCES),
            Action::Lose => Some(LOSSES),
            Action::Kill => Some(KILLS),
            Action::DrawUp => Some(LEAVES),
            Action::Sweep => Some(SWEEPS),
            Action::Expire(_) => Some(EXPIRIES),
            _ => None,
        }
    }

    /// What goes on in Redis, whatever becomes of the process.
    fn progress_in_redis(state: &State, into: &mut Vec<Action>) {
        let process = &state.process;
        let takeable = state.takeable();
        into.extend(bits(takeable).map(Action::Others));
        for (which, pipe) in state.pipes.iter().enumerate().filter(|(_, pipe)| !pipe.is_free()) {
            match pipe.stage {
                Stage::Sent => into.push(Action::Arrive(which)),
                Stage::Waits if state.hands[usize::from(pipe.hand) - 1].closed => into.push(Action::Refuse(which)),
                Stage::Waits => {
                    into.extend(bits(takeable).map(|job| Action::Move(which, job)));
                    // No claim waits for ever, and this must have an end.
                    if which > 0 || process.slot.reopens {
                        into.push(Action::End(which));
                    }
                }
                Stage::Over => {}
            }
        }
        for (life, held) in (0..).zip(&state.held) {
            if !held.lease && held.tokens != [0; JOBS] {
                into.push(Action::Recover(life));
            }
            if held.lease && !process.is(life) {
                into.push(Action::Fence(life));
            }
        }
    }

    fn progress_of_slot(&self, state: &State, into: &mut Vec<Action>) {
        let process = &state.process;
        let slot = &process.slot;
        let pipe = &state.pipes[0];
        if !pipe.is_free() {
            if pipe.answer != Answer::None || pipe.stage == Stage::Over {
                into.push(Action::Read);
            }
            return;
        }
        if slot.connected && slot.brought != UNKNOWN {
            into.push(Action::Take);
        }
        if process.registered && slot.connected && !process.is_stopping() {
            into.push(Action::Claim);
        }
        if process.registered && !slot.connected && !(slot.owes() && self.is(Mutation::NoOwing)) {
            into.push(Action::Connect);
        }
    }
}

impl Protocol for Blocking {
    type State = State;
    type Action = Action;

    fn init(&self) -> State {
        let config = &self.config;
        let none = Held {
            lease: false,
            tokens: [0; JOBS],
        };
        let mut held = [none; LIVES];
        held[0].lease = true;
        State {
            queue: (1 << JOBS) - 1,
            done: 0,
            held,
            hands: [NO_HAND; HANDS],
            process: Process {
                alive: true,
                registered: true,
                ..NO_PROCESS
            },
            pipes: [NO_PIPE; PIPES],
            left: [
                config.breaks,
                config.timeouts,
                config.fences,
                config.losses,
                config.kills,
                config.leaves,
                config.sweeps,
                config.expiries,
            ],
            broken: None,
        }
    }

    fn progress(&self, state: &State, into: &mut Vec<Action>) {
        Self::progress_in_redis(state, into);
        let process = &state.process;
        if !process.alive {
            return;
        }
        self.progress_of_slot(state, into);
        let has_lease = state.has_lease(process.life);
        if process.is_stopping() {
            into.push(if has_lease { Action::Leave } else { Action::Exit });
            return;
        }
        for (number, job) in (0..).zip(process.jobs).filter(|(_, job)| job.index != 0) {
            if !job.ended {
                into.push(Action::Finish(number));
            } else if job.kept && process.sweep.is_none() {
                into.push(Action::Ack(number));
            }
        }
        if !process.registered {
            if usize::from(process.life) + 1 < LIVES {
                into.push(Action::Register);
            }
            return;
        }
        if !has_lease {
            into.push(Action::Hear);
        }
        if process.sweep.is_some() {
            into.push(Action::Compare);
        } else if self.has_something_to_sweep(state) {
            into.push(Action::ReadHash);
        }
    }

    fn faults(&self, state: &State, into: &mut Vec<Action>) {
        let is_left = |budget: usize| state.left[budget] > 0;
        for (which, pipe) in state.pipes.iter().enumerate().skip(1) {
            if pipe.stage == Stage::Sent {
                into.push(Action::Drop(which));
            }
        }
        if is_left(EXPIRIES) {
            // Before that a claim that has begun has ended.
            let waits = |number: u8| state.pipes.iter().any(|pipe| pipe.may_move() && pipe.hand == number);
            let closed = NUMBERS.zip(&state.hands).filter(|(_, hand)| hand.closed);
            let closed = closed.map(|(number, _)| number).filter(|number| !waits(*number));
            into.extend(closed.map(Action::Expire));
        }
        let process = &state.process;
        if !process.alive {
            return;
        }
        let pipe = &state.pipes[0];
        if is_left(BREAKS) && (!pipe.is_free() || process.slot.connected) {
            into.push(Action::Break);
        }
        if is_left(TIMEOUTS) && pipe.may_move() && !process.slot.reopens {
            into.push(Action::End(0));
        }
        if is_left(KILLS) {
            into.push(Action::Kill);
        }
        if !process.registered {
            return;
        }
        if is_left(FENCES) && state.has_lease(process.life) {
            into.push(Action::Fence(process.life));
        }
        if process.is_stopping() {
            return;
        }
        if is_left(LOSSES) {
            into.push(Action::Lose);
        }
        if is_left(SWEEPS) && process.sweep.is_none() {
            into.push(Action::Sweep);
        }
        if is_left(LEAVES) && process.sweep.is_none() {
            into.push(Action::DrawUp);
        }
    }

    fn next(&self, state: &State, action: Action) -> State {
        let mut next = *state;
        let state = &mut next;
        if let Some(budget) = Self::budget_of(state, action) {
            state.left[budget] -= 1;
        }
        let life = state.process.life;
        match action {
            Action::Register => {
                state.process.life += 1;
                state.process.registered = true;
                state.held(life + 1).lease = true;
            }
            Action::Hear | Action::Lose => self.lose(state),
            Action::Connect => self.connect(state),
            Action::Take => state.claim(What::Take),
            Action::Claim => state.claim(What::Claim),
            Action::Arrive(which) => self.arrive(state, which),
            Action::Move(which, job) => Self::moves(state, which, job),
            Action::Refuse(which) => state.ended(which, Moved::Refused),
            Action::End(which) => state.ended(which, Moved::Nothing),
            Action::Read => self.read(state),
            Action::Finish(job) => state.process.jobs[usize::from(job)].ended = true,
            Action::Ack(job) => {
                let ended = std::mem::replace(&mut state.process.jobs[usize::from(job)], NO_JOB);
                if state.has_lease(life) {
                    state.take_off(life, job, ended.index);
                }
            }
            Action::Others(job) => {
                state.queue &= !(1 << job);
                state.done |= 1 << job;
            }
            Action::ReadHash | Action::Sweep => {
                let (tokens, hands) = (state.held(life).tokens, state.listed(life));
                state.process.sweep = Some(Sweep { tokens, hands });
            }
            Action::Compare => self.compare(state),
            Action::Fence(life) => {
                let closes = !self.is(Mutation::FenceDoesNotClose);
                state.seize(life, !self.is(Mutation::NoSeize), |_| closes);
                state.held(life).lease = false;
            }
            Action::Recover(life) => (0..JOBS as u8).for_each(|job| state.give_back(life, job)),
            Action::Break => state.fail(),
            Action::Drop(which) => state.pipes[which] = NO_PIPE,
            Action::Expire(number) => state.hand(number).closed = false,
            Action::Kill | Action::Exit => state.exit(),
            Action::DrawUp => state.draw_up(),
            Action::Leave => self.leave(state),
        }
        state.tidy();
        next
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        if state.broken.is_some() {
            return state.broken;
        }
        if (0..JOBS as u8).any(|job| state.places(job) != 1) {
            return Some(ONE_PLACE);
        }
        if state.hands.iter().any(|hand| !hand.listed && !hand.is_empty()) {
            return Some(SEEN);
        }
        let process = &state.process;
        if !process.registered || !state.has_lease(process.life) {
            return None;
        }
        for (number, job) in process.jobs.into_iter().enumerate().filter(|(_, job)| job.index != 0) {
            let place = process.slot.place_of(job.index).filter(|_| !job.kept);
            if !state.is_on_record(number, job.index, place) {
                return Some(ON_RECORD);
            }
        }
        let acks = process.last_call.into_iter().flat_map(|last| last.acks);
        let mut acks = acks.filter(|ack| ack.known.index != 0);
        let is_on_record = |ack: Old| state.is_on_record(usize::from(ack.known.job), ack.known.index, Some(ack));
        (!acks.all(is_on_record)).then_some(ON_RECORD)
    }

    fn broken_at_rest(&self, state: &State) -> Option<&'static str> {
        (state.done != (1 << JOBS) - 1).then_some("at rest all is done")
    }

    fn fingerprint(state: &State) -> u64 {
        let mut mix = Mix::new();
        mix.word(u64::from_le_bytes(state.left));
        let mut hands = u64::from(state.queue) << 2 | u64::from(state.done);
        for hand in &state.hands {
            let flags = u8::from(hand.listed) | u8::from(hand.closed) << 1 | hand.life << 2;
            hands = hands << 8 | u64::from(flags | hand.jobs[0] << 3 | hand.jobs[1] << 5);
        }
        mix.word(hands);
        let Process { jobs, slot, .. } = &state.process;
        let flags = [
            slot.connected,
            slot.used,
            slot.lost,
            slot.reopens,
            state.process.alive,
            state.process.registered,
            state.broken.is_some(),
        ];
        let mut word = u64::from(slot.hand) << 1 | u64::from(state.process.life);
        for flag in flags {
            word = word << 1 | u64::from(flag);
        }
        for held in &state.held {
            let tokens = u64::from(held.tokens[0] << 4 | held.tokens[1]);
            word = word << 9 | tokens << 1 | u64::from(held.lease);
        }
        for job in jobs {
            let job = job.index << 2 | u8::from(job.kept) << 1 | u8::from(job.ended);
            word = word << 6 | u64::from(job);
        }
        mix.word(word);
        let brought = Old {
            hand: 0,
            known: slot.brought,
        };
        mix.word(word_of(&slot.old) << 12 | word_of(&[brought]));
        let sweep = state.process.sweep.map_or(0, |sweep| {
            let tokens = u64::from(sweep.tokens[0] << 4 | sweep.tokens[1]);
            1 | u64::from(sweep.hands) << 1 | tokens << 8
        });
        let last_call = state.process.last_call.map_or(0, |last| {
            let requeues = u64::from(last.requeues[0] << 4 | last.requeues[1]);
            word_of(&last.acks) << 12 | requeues << 4 | u64::from(last.quiet) << 1 | 1
        });
        mix.word(sweep << 40 | last_call);
        mix.word(state.pipes[0].word());
        // Which of those was given up first makes no difference.
        let mut late = [0; PIPES];
        for (word, pipe) in late
            .iter_mut()
            .zip(&state.pipes[1..])
            .filter(|(_, pipe)| !pipe.is_free())
        {
            *word = pipe.word();
        }
        if late != [0; PIPES] {
            late.sort_unstable();
            late.into_iter()
                .filter(|word| *word != 0)
                .for_each(|word| mix.word(word));
        }
        mix.finish()
    }
}
