//! Waiting for work inside one process: the threads of its crews, the claims thread, the wake thread, and what Redis tells
//! of changes. Each holds the lock for one step; between any two of them anything else may happen.
//!
//! Nothing here looks after five seconds: so a push that is missed leaves the system at rest with a job in a queue and a
//! thread that waits for it. Time is left out: any step may come as late as it likes, so pauses (the deaf time after a
//! wake-up in vain, the grace of a job that nobody waits for) are steps like others. What is left out too: that a
//! connection dies without a sign, which nothing but the look after five seconds can find.

use crate::search::{Mix, Protocol};

/// Crews, and queues.
const CREWS: usize = 2;
const QUEUES: usize = 2;
/// Threads of a crew at most.
const THREADS: usize = 3;

/// What is done wrongly on purpose, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing.
    None,
    /// The claims thread hears of threads that wait in vain only from the first that begins to.
    FirstOnly,
    /// A crew that comes to wait for empty queues wakes nobody.
    NoNudge,
    /// Redis is asked to tell of changes, but what is there already is not looked at.
    WatchWithoutLook,
    /// What was told during a look is forgotten with its answer.
    AlarmForgotten,
    /// A wake-up is followed by a look and by no claim, and a look that finds something by neither.
    NoHope,
    /// Another listening connection is taken for the one that was to be told.
    AnyListener,
    /// Another claims connection is taken for the one that looked.
    AnyConnection,
    /// A thread that was woken wakes no other, whether it takes a job or has gone.
    NoChain,
    /// What is claimed for threads that have gone stays.
    NoGiveBack,
}

/// What there is and how much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Threads of each crew.
    pub threads: [usize; CREWS],
    /// By crew, a bit for each of its queues.
    pub queues: [u8; CREWS],
    /// Jobs pushed.
    pub pushes: u8,
    /// Jobs that other processes take.
    pub others: u8,
    /// Waits that end for another reason, and threads that take longer to come than the grace lasts.
    pub timeouts: u8,
    /// Threads that die while they wait.
    pub deaths: u8,
    /// Calls that break the claims connection.
    pub breaks: u8,
    /// Times that the listening connection breaks.
    pub deaf: u8,
    /// What is wrong.
    pub mutation: Mutation,
}

impl Config {
    /// Two crews, one of which shares a queue with the other.
    pub const CALM: Self = Self {
        threads: [2, 1],
        queues: [0b01, 0b11],
        pushes: 2,
        others: 0,
        timeouts: 0,
        deaths: 0,
        breaks: 0,
        deaf: 0,
        mutation: Mutation::None,
    };
}

/// The process.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// What there is and what may happen.
    pub config: Config,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Thread {
    /// There is no such thread.
    None,
    /// Runs a job.
    Busy,
    /// About to take a job.
    Comes,
    /// Has found none, and is about to wait.
    Idle,
    Waits,
    Woken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Crew {
    threads: [Thread; THREADS],
    /// Claimed jobs that nobody has taken yet, by queue.
    ready: [u8; QUEUES],
    claimed: u8,
    dry: bool,
}

impl Crew {
    fn ready(&self) -> u8 {
        self.ready.iter().sum()
    }

    fn waiting(&self) -> u8 {
        let waits = |thread: &&Thread| matches!(thread, Thread::Waits | Thread::Woken);
        self.threads.iter().filter(waits).count() as u8
    }

    fn wanted(&self) -> u8 {
        self.waiting().saturating_sub(self.ready() + self.claimed)
    }

    fn is_idle(&self) -> bool {
        self.dry && self.wanted() > 0
    }

    /// A thread is about to look. The grace of a job that nobody waits for is longer than that takes, as a rule.
    fn has_one_coming(&self) -> bool {
        let comes = |thread: &Thread| matches!(thread, Thread::Comes | Thread::Idle);
        self.threads.iter().any(comes)
    }

    fn wake(&mut self) {
        if self.ready() == 0 || self.threads.contains(&Thread::Woken) {
            return;
        }
        if let Some(thread) = self.threads.iter_mut().rfind(|thread| **thread == Thread::Waits) {
            *thread = Thread::Woken;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Claims {
    /// Sleeps until somebody wakes it.
    Sleeps,
    /// About to see what there is to do.
    Awake,
    TurnSent,
    TurnDone,
    /// Is to look, and holds no lock.
    WillLook,
    LookSent,
    LookDone,
}

/// Everything there is at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    crews: [Crew; CREWS],
    queues: [u8; QUEUES],
    claims: Claims,
    /// A turn has no answer yet: how many jobs it asks for by crew, and those it goes to put back, by queue.
    outstanding: bool,
    asked: [u8; CREWS],
    puts_back: [u8; QUEUES],
    /// Redis has run it, and this came of it: jobs by crew and queue.
    ran: bool,
    got: [[u8; QUEUES]; CREWS],
    /// What the look is for, and whether it found something.
    look: u8,
    found: bool,
    /// It names the listening connection that there is.
    look_for_listener: bool,
    /// What gathers to be put back.
    back: [u8; QUEUES],
    /// An ack waits for the next turn.
    acks: bool,
    alarm: bool,
    watched: u8,
    /// The watch was asked for on this claims connection, and for this listening one.
    of_connection: bool,
    of_listener: bool,
    /// Keys of which Redis is to tell this process.
    tracked: u8,
    /// Something it has told is on its way.
    told: bool,
    /// The listening connection works; and this process thinks so.
    listens: bool,
    knows: bool,
    pushes: u8,
    others: u8,
    timeouts: u8,
    deaths: u8,
    breaks: u8,
    deaf: u8,
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A thread takes a job, or finds none.
    Take(usize, usize),
    /// A thread that has found none waits, unless there is one by now.
    Wait(usize, usize),
    /// A woken thread comes.
    Come(usize, usize),
    /// The claims thread sees what there is to do.
    See,
    /// It sends its look.
    SendLook,
    /// Redis runs what it was sent.
    Run,
    /// The answer is there.
    Answer,
    /// What Redis has told arrives.
    Hear,
    /// The wake thread notices that its connection is gone.
    Notice,
    /// It has another one.
    Listen,
    /// Jobs that nobody waits for go back.
    GiveBack(usize),
    /// A job comes into a queue.
    Push(usize),
    /// Another process takes one.
    Other(usize),
    /// A thread is done with its job.
    Finish(usize, usize),
    /// A thread's wait ends for another reason.
    Leave(usize, usize),
    /// A thread dies while it waits.
    Die(usize, usize),
    /// The claims connection breaks under a call.
    Break,
    /// The listening connection breaks.
    Deafen,
}

impl Waiting {
    fn is(&self, mutation: Mutation) -> bool {
        self.config.mutation == mutation
    }

    fn nudge(state: &mut State) {
        if state.claims == Claims::Sleeps {
            state.claims = Claims::Awake;
        }
    }

    fn is_hungry(crew: &Crew) -> bool {
        !crew.dry && crew.wanted() > 0
    }

    fn nudge_for(&self, state: &mut State, crew: usize, was_idle: bool) {
        let idle = match self.config.mutation {
            Mutation::FirstOnly => state.crews[crew].is_idle() && state.crews[crew].wanted() == 1,
            Mutation::NoNudge => false,
            _ => !was_idle && state.crews[crew].is_idle(),
        };
        if idle || state.crews.iter().any(Self::is_hungry) {
            Self::nudge(state);
        }
    }

    /// A key changes: Redis tells of it once.
    fn change(state: &mut State, queue: usize) {
        if state.tracked >> queue & 1 != 0 {
            state.tracked &= !(1 << queue);
            state.told |= state.listens;
        }
    }

    fn hope(&self, state: &mut State) {
        if !self.is(Mutation::NoHope) {
            state.crews.iter_mut().for_each(|crew| crew.dry = false);
        }
    }

    /// What is to be looked at for threads that wait in vain.
    fn queues_of_idle(&self, state: &State) -> u8 {
        (0..CREWS)
            .filter(|crew| state.crews[*crew].is_idle())
            .fold(0, |queues, crew| queues | self.config.queues[crew])
    }

    fn see(&self, state: &mut State) {
        if state.outstanding {
            state.claims = Claims::TurnSent;
            return;
        }
        if std::mem::take(&mut state.alarm) {
            state.watched = 0;
            self.hope(state);
        }
        let hungry = state.crews.iter().any(Self::is_hungry);
        if hungry || state.acks || state.back != [0; QUEUES] {
            state.outstanding = true;
            state.acks = false;
            state.puts_back = std::mem::take(&mut state.back);
            for (asked, crew) in state.asked.iter_mut().zip(&mut state.crews) {
                *asked = if crew.dry { 0 } else { crew.wanted() };
                crew.claimed += *asked;
            }
            state.claims = Claims::TurnSent;
            return;
        }
        let queues = self.queues_of_idle(state);
        let valid = state.of_connection && (state.of_listener || self.is(Mutation::AnyListener));
        if queues == 0 || (queues & !state.watched == 0 && valid) || !state.knows {
            state.claims = Claims::Sleeps;
        } else {
            state.look = queues;
            state.look_for_listener = true;
            state.claims = Claims::WillLook;
        }
    }

    fn run(&self, state: &mut State) {
        match state.claims {
            Claims::TurnSent => {
                state.claims = Claims::TurnDone;
                if std::mem::replace(&mut state.ran, true) {
                    return;
                }
                for queue in 0..QUEUES {
                    if state.puts_back[queue] > 0 {
                        state.queues[queue] += state.puts_back[queue];
                        Self::change(state, queue);
                    }
                }
                for crew in 0..CREWS {
                    let mut wants = state.asked[crew];
                    for queue in 0..QUEUES {
                        let takes = wants.min(state.queues[queue]);
                        if self.config.queues[crew] >> queue & 1 != 0 && takes > 0 {
                            state.queues[queue] -= takes;
                            state.got[crew][queue] += takes;
                            wants -= takes;
                            Self::change(state, queue);
                        }
                    }
                }
            }
            Claims::LookSent => {
                state.claims = Claims::LookDone;
                state.found = (0..QUEUES).any(|queue| state.look >> queue & 1 != 0 && state.queues[queue] > 0);
                state.found &= !self.is(Mutation::WatchWithoutLook);
                if state.look_for_listener && state.listens {
                    state.tracked |= state.look;
                }
            }
            _ => {}
        }
    }

    fn answer(&self, state: &mut State) {
        match std::mem::replace(&mut state.claims, Claims::Awake) {
            Claims::TurnDone => {
                state.outstanding = false;
                state.ran = false;
                state.puts_back = [0; QUEUES];
                for crew in 0..CREWS {
                    let (got, asked) = (
                        std::mem::take(&mut state.got[crew]),
                        std::mem::take(&mut state.asked[crew]),
                    );
                    let crew = &mut state.crews[crew];
                    crew.claimed -= asked;
                    crew.dry |= got.iter().sum::<u8>() < asked;
                    for (ready, got) in crew.ready.iter_mut().zip(got) {
                        *ready += got;
                    }
                    crew.wake();
                }
            }
            Claims::LookDone => {
                state.of_connection = true;
                state.of_listener = state.look_for_listener;
                let queues = std::mem::take(&mut state.look);
                if self.is(Mutation::AlarmForgotten) {
                    state.alarm = false;
                }
                if std::mem::take(&mut state.found) {
                    state.watched = 0;
                    self.hope(state);
                    if self.is(Mutation::NoHope) {
                        state.watched = queues;
                    }
                } else {
                    state.watched = queues;
                }
            }
            _ => {}
        }
    }
}

impl Protocol for Waiting {
    type State = State;
    type Action = Action;

    fn init(&self) -> State {
        let crews = self.config.threads.map(|count| {
            let mut threads = [Thread::None; THREADS];
            threads[..count].fill(Thread::Comes);
            Crew {
                threads,
                ready: [0; QUEUES],
                claimed: 0,
                dry: false,
            }
        });
        State {
            crews,
            queues: [0; QUEUES],
            claims: Claims::Sleeps,
            outstanding: false,
            asked: [0; CREWS],
            puts_back: [0; QUEUES],
            ran: false,
            got: [[0; QUEUES]; CREWS],
            look: 0,
            found: false,
            look_for_listener: false,
            back: [0; QUEUES],
            acks: false,
            alarm: false,
            watched: 0,
            of_connection: false,
            of_listener: false,
            tracked: 0,
            told: false,
            listens: true,
            knows: true,
            pushes: self.config.pushes,
            others: self.config.others,
            timeouts: self.config.timeouts,
            deaths: self.config.deaths,
            breaks: self.config.breaks,
            deaf: self.config.deaf,
        }
    }

    fn progress(&self, state: &State, into: &mut Vec<Action>) {
        for (crew, of) in state.crews.iter().enumerate() {
            for (thread, is) in of.threads.iter().enumerate() {
                match is {
                    Thread::Comes => into.push(Action::Take(crew, thread)),
                    Thread::Idle => into.push(Action::Wait(crew, thread)),
                    Thread::Woken => into.push(Action::Come(crew, thread)),
                    Thread::None | Thread::Busy | Thread::Waits => {}
                }
            }
            if of.ready() > of.waiting() && !of.has_one_coming() && !self.is(Mutation::NoGiveBack) {
                into.push(Action::GiveBack(crew));
            }
        }
        match state.claims {
            Claims::Sleeps => {}
            Claims::Awake => into.push(Action::See),
            Claims::WillLook => into.push(Action::SendLook),
            Claims::TurnSent | Claims::LookSent => into.push(Action::Run),
            Claims::TurnDone | Claims::LookDone => into.push(Action::Answer),
        }
        if state.told {
            into.push(Action::Hear);
        }
        if !state.listens {
            into.push(if state.knows { Action::Notice } else { Action::Listen });
        }
    }

    fn faults(&self, state: &State, into: &mut Vec<Action>) {
        for queue in 0..QUEUES {
            if state.pushes > 0 {
                into.push(Action::Push(queue));
            }
            if state.others > 0 && state.queues[queue] > 0 {
                into.push(Action::Other(queue));
            }
        }
        for (crew, of) in state.crews.iter().enumerate() {
            for (thread, is) in of.threads.iter().enumerate() {
                match is {
                    // A job may take for ever.
                    Thread::Busy => into.push(Action::Finish(crew, thread)),
                    Thread::Waits if state.timeouts > 0 => into.push(Action::Leave(crew, thread)),
                    _ => {}
                }
                if state.deaths > 0 && *is == Thread::Waits {
                    into.push(Action::Die(crew, thread));
                }
            }
        }
        for (crew, of) in state.crews.iter().enumerate() {
            if state.timeouts > 0 && of.ready() > of.waiting() && of.has_one_coming() {
                into.push(Action::GiveBack(crew));
            }
        }
        let calls = matches!(
            state.claims,
            Claims::TurnSent | Claims::TurnDone | Claims::LookSent | Claims::LookDone
        );
        if state.breaks > 0 && calls {
            into.push(Action::Break);
        }
        if state.deaf > 0 && state.listens {
            into.push(Action::Deafen);
        }
    }

    fn next(&self, state: &State, action: Action) -> State {
        let mut next = *state;
        let state = &mut next;
        match action {
            Action::Take(crew, thread) => {
                let was_idle = state.crews[crew].is_idle();
                let of = &mut state.crews[crew];
                of.threads[thread] = match of.ready.iter_mut().find(|ready| **ready > 0) {
                    Some(ready) => {
                        *ready -= 1;
                        if !self.is(Mutation::NoChain) {
                            of.wake();
                        }
                        Thread::Busy
                    }
                    None => Thread::Idle,
                };
                let took = of.threads[thread] == Thread::Busy;
                if took && !self.is(Mutation::FirstOnly) {
                    self.nudge_for(state, crew, was_idle);
                } else if took && state.crews.iter().any(Self::is_hungry) {
                    Self::nudge(state);
                }
            }
            Action::Wait(crew, thread) => {
                if state.crews[crew].ready() > 0 {
                    state.crews[crew].threads[thread] = Thread::Comes;
                } else {
                    let was_idle = state.crews[crew].is_idle();
                    state.crews[crew].threads[thread] = Thread::Waits;
                    self.nudge_for(state, crew, was_idle);
                }
            }
            Action::Come(crew, thread) => {
                state.crews[crew].threads[thread] = Thread::Comes;
                if !self.is(Mutation::NoChain) {
                    state.crews[crew].wake();
                }
            }
            Action::Leave(crew, thread) => {
                state.timeouts -= 1;
                state.crews[crew].threads[thread] = Thread::Comes;
                if !self.is(Mutation::NoChain) {
                    state.crews[crew].wake();
                }
            }
            Action::Die(crew, thread) => {
                state.deaths -= 1;
                state.crews[crew].threads[thread] = Thread::None;
                state.crews[crew].wake();
            }
            Action::See => self.see(state),
            Action::SendLook => {
                state.alarm = false;
                state.claims = Claims::LookSent;
            }
            Action::Run => self.run(state),
            Action::Answer => self.answer(state),
            Action::Hear => {
                state.told = false;
                state.alarm = true;
                Self::nudge(state);
            }
            Action::Notice => {
                state.knows = false;
                Self::nudge(state);
            }
            Action::Listen => {
                (state.listens, state.knows) = (true, true);
                // Whatever was asked was asked for another.
                (state.of_listener, state.look_for_listener) = (false, false);
                state.tracked = 0;
                Self::nudge(state);
            }
            Action::GiveBack(crew) => {
                state.timeouts -= u8::from(state.crews[crew].has_one_coming());
                let of = &mut state.crews[crew];
                let mut surplus = of.ready() - of.waiting();
                for queue in (0..QUEUES).rev() {
                    let goes = surplus.min(of.ready[queue]);
                    of.ready[queue] -= goes;
                    state.back[queue] += goes;
                    surplus -= goes;
                }
                Self::nudge(state);
            }
            Action::Push(queue) => {
                state.pushes -= 1;
                state.queues[queue] += 1;
                Self::change(state, queue);
            }
            Action::Other(queue) => {
                state.others -= 1;
                state.queues[queue] -= 1;
                Self::change(state, queue);
            }
            Action::Finish(crew, thread) => {
                state.crews[crew].threads[thread] = Thread::Comes;
                state.acks = true;
                Self::nudge(state);
            }
            Action::Break => {
                state.breaks -= 1;
                state.tracked = 0;
                if !self.is(Mutation::AnyConnection) {
                    state.of_connection = false;
                }
                (state.look, state.found) = (0, false);
                state.claims = Claims::Awake;
            }
            Action::Deafen => {
                state.deaf -= 1;
                state.listens = false;
                state.told = false;
            }
        }
        next
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        for (crew, threads) in state.crews.iter().zip(self.config.threads) {
            if usize::from(crew.ready() + crew.claimed) > threads {
                return Some("no more is claimed than threads wait");
            }
        }
        None
    }

    fn broken_at_rest(&self, state: &State) -> Option<&'static str> {
        for (crew, queues) in state.crews.iter().zip(self.config.queues) {
            if crew.ready() > crew.waiting() {
                return Some("at rest nothing is hoarded");
            }
            if crew.ready() > 0 {
                return Some("at rest no job is ready beside a thread that waits");
            }
            let has_work = (0..QUEUES).any(|queue| queues >> queue & 1 != 0 && state.queues[queue] > 0);
            if crew.waiting() > 0 && has_work {
                return Some("at rest nobody waits beside a queue with jobs");
            }
        }
        None
    }

    fn fingerprint(state: &State) -> u64 {
        let mut mix = Mix::new();
        for crew in &state.crews {
            let [a, b, c] = crew.threads.map(|thread| thread as u8);
            let [p, q] = crew.ready;
            mix.word(u64::from_le_bytes([a, b, c, p, q, crew.claimed, u8::from(crew.dry), 0]));
        }
        let ([a, b], [c, d], [e, f]) = (state.queues, state.asked, state.puts_back);
        mix.word(u64::from_le_bytes([a, b, c, d, e, f, state.claims as u8, state.look]));
        let ([[a, b], [c, d]], [e, f]) = (state.got, state.back);
        mix.word(u64::from_le_bytes([a, b, c, d, e, f, state.watched, state.tracked]));
        let flags = [
            state.outstanding,
            state.ran,
            state.found,
            state.look_for_listener,
            state.acks,
            state.alarm,
            state.of_connection,
            state.of_listener,
            state.told,
            state.listens,
            state.knows,
        ];
        let flags = flags.into_iter().fold(0_u16, |word, flag| word << 1 | u16::from(flag));
        let [low, high] = flags.to_le_bytes();
        mix.word(u64::from_le_bytes([
            low,
            high,
            state.pushes,
            state.others,
            state.timeouts,
            state.breaks,
            state.deaf,
            state.deaths,
        ]));
        mix.finish()
    }
}
