//! Blocking claims: what two processes, Redis and an unkind network make of a claim that waits in Redis (docs/protocol.md,
//! "Blocking claims"). Each process has one thread and one slot.
//!
//! A claim is two commands on one connection, and anything may happen between them. Turns, acks and recoveries are one step
//! each here: what becomes of those is the matter of `model/jobs.rs`. A sweep does not fail, and is never late for good. Order is left out:
//! whatever lies in a list may be taken.

use crate::search::{Mix, Protocol};

/// Processes, jobs, and identities that a process may have one after the other.
const PROCESSES: usize = 2;
const JOBS: usize = 2;
const LIVES: usize = 2;

/// What is done wrongly on purpose, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing.
    None,
    /// A sweep takes what an outstanding claim has just recorded for nobody's.
    NothingHeld,
    /// Nobody puts back what lies aside.
    NoGather,
    /// A slot that connects anew does not say that its claims so far are past.
    NoSpend,
    /// A claim asks for no lease.
    TakesWithoutLease,
    /// Nobody sweeps after a claim without an answer.
    NoSweep,
    /// Who leaves puts nothing back that it has not heard of.
    NothingBack,
}

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Connections that break, also in the middle of a claim.
    pub breaks: u8,
    /// Claims whose wait ends before a job has come.
    pub timeouts: u8,
    /// Leases that end under living processes.
    pub fences: u8,
    /// Processes that are killed.
    pub kills: u8,
    /// Processes that leave.
    pub leaves: u8,
    /// Sweeps that nothing has called for.
    pub sweeps: u8,
    /// What is wrong.
    pub mutation: Mutation,
}

impl Config {
    /// Nothing befalls anybody.
    pub const CALM: Self = Self {
        breaks: 0,
        timeouts: 0,
        fences: 0,
        kills: 0,
        leaves: 0,
        sweeps: 0,
        mutation: Mutation::None,
    };
}

/// The processes and Redis.
#[derive(Clone, Copy, Debug)]
pub struct Blocking {
    /// What may happen.
    pub config: Config,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Job(u8),
    Nothing,
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    /// BLMOVE waits, or has not arrived.
    Waits,
    /// The script is next.
    Takes,
    Answered(Answer),
}

/// A claim on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pipe {
    stage: Stage,
    index: u8,
    life: usize,
    /// The script was torn off.
    torn: bool,
}

const NO_PIPE: Pipe = Pipe {
    stage: Stage::None,
    index: 0,
    life: 0,
    torn: false,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    alive: bool,
    registered: bool,
    life: usize,
    connected: bool,
    last: u8,
    outstanding: u8,
    /// Jobs that run, a bit each; and those whose lease was lost meanwhile.
    runs: u8,
    strays: u8,
    /// What a sweep has read and not yet compared.
    sweep: Option<[u8; JOBS]>,
    /// Its connection, and one that it has given up.
    pipes: [Pipe; 2],
}

/// What Redis has of one identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    lease: bool,
    spent: u8,
    /// By job: the index of the claim that recorded it, 0 for none.
    tokens: [u8; JOBS],
}

/// One state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    queue: u8,
    aside: u8,
    done: u8,
    held: [[Held; LIVES]; PROCESSES],
    processes: [Process; PROCESSES],
    left: [u8; 6],
    /// A job is in two places; a late claim has taken one, or one without a lease.
    twice: bool,
    late: bool,
    unleased: bool,
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Register(usize),
    Connect(usize),
    Claim(usize),
    /// BLMOVE moves this job, for this claim.
    Move(usize, usize, u8),
    /// It ends without one.
    End(usize, usize),
    /// The script; it may take this job.
    Take(usize, usize, u8),
    Read(usize),
    Finish(usize, u8),
    ReadHash(usize),
    /// The same, though there is nothing to find.
    Sweep(usize),
    Compare(usize),
    Expire(usize),
    Recover(usize, usize),
    Break(usize),
    Tear(usize),
    Fence(usize),
    Kill(usize),
    Leave(usize),
}

fn bits(of: u8) -> impl Iterator<Item = u8> {
    (0..JOBS as u8).filter(move |job| of & (1 << job) != 0)
}

impl State {
    fn put(&mut self, job: u8) {
        self.twice |= self.queue & (1 << job) != 0;
        self.queue |= 1 << job;
    }

    fn lay_back(&mut self, job: u8) {
        if self.aside & (1 << job) != 0 {
            self.aside &= !(1 << job);
            self.put(job);
        }
    }

    fn spend(&mut self, left: usize) {
        self.left[left] -= 1;
    }

    fn places(&self, job: u8) -> usize {
        let listed = [self.queue, self.aside, self.done]
            .into_iter()
            .filter(|list| *list & (1 << job) != 0);
        let held = self
            .held
            .iter()
            .flatten()
            .filter(|held| held.tokens[usize::from(job)] != 0);
        listed.count() + held.count()
    }

    /// Gives the connection up. What was sent on it may be late.
    fn give_up(&mut self, number: usize) {
        let process = &mut self.processes[number];
        let pipe = std::mem::replace(&mut process.pipes[0], NO_PIPE);
        if !matches!(pipe.stage, Stage::None | Stage::Answered(_)) {
            process.pipes[1] = pipe;
        }
        process.outstanding = 0;
        process.connected = false;
    }
}

const BREAKS: usize = 0;
const TIMEOUTS: usize = 1;
const FENCES: usize = 2;
const KILLS: usize = 3;
const LEAVES: usize = 4;
const SWEEPS: usize = 5;

impl Blocking {
    fn is(&self, mutation: Mutation) -> bool {
        self.config.mutation == mutation
    }

    fn has_something_to_sweep(&self, state: &State, number: usize) -> bool {
        let process = &state.processes[number];
        let held = &state.held[number][process.life];
        let nobodys = (0..JOBS).any(|job| {
            let token = held.tokens[job];
            token != 0 && process.runs & (1 << job) == 0 && token != process.outstanding
        });
        // While a script is on its way it may be its business.
        let mut pipes = state.processes.iter().flat_map(|process| process.pipes);
        let is_expected = pipes.any(|pipe| pipe.stage == Stage::Takes);
        let stray = state.aside != 0 && !is_expected && !self.is(Mutation::NoGather);
        (nobodys && !self.is(Mutation::NoSweep)) || stray
    }

    fn take(&self, state: &mut State, number: usize, which: usize, job: u8) {
        let pipe = state.processes[number].pipes[which];
        let held = state.held[number][pipe.life];
        let process = state.processes[number];
        let answer = if !held.lease && !self.is(Mutation::TakesWithoutLease) {
            state.lay_back(job);
            Answer::Lost
        } else if held.spent >= pipe.index {
            state.lay_back(job);
            Answer::Nothing
        } else {
            let from_aside = state.aside & (1 << job) != 0;
            if !from_aside && state.queue & (1 << job) == 0 {
                Answer::Nothing
            } else {
                state.aside &= !(1 << job);
                if !from_aside {
                    state.queue &= !(1 << job);
                }
                let record = &mut state.held[number][pipe.life];
                record.tokens[usize::from(job)] = pipe.index;
                record.spent = pipe.index;
                state.unleased |= !held.lease;
                state.late |= which == 1 && process.alive && process.connected && process.life == pipe.life;
                Answer::Job(job)
            }
        };
        let pipe = &mut state.processes[number].pipes[which];
        pipe.stage = if which == 0 {
            Stage::Answered(answer)
        } else {
            Stage::None
        };
    }

    fn read(state: &mut State, number: usize) {
        let pipe = std::mem::replace(&mut state.processes[number].pipes[0], NO_PIPE);
        let process = &mut state.processes[number];
        process.outstanding = 0;
        let Stage::Answered(answer) = pipe.stage else { return };
        let is_mine = process.registered && process.life == pipe.life;
        match answer {
            Answer::Job(job) if is_mine => process.runs |= 1 << job,
            Answer::Lost if is_mine => {
                process.registered = false;
                process.strays |= std::mem::take(&mut process.runs);
            }
            _ => {}
        }
    }

    fn compare(&self, state: &mut State, number: usize) {
        let process = state.processes[number];
        state.processes[number].sweep = None;
        let Some(found) = process.sweep else { return };
        if !state.held[number][process.life].lease {
            return;
        }
        for (job, index) in (0..JOBS).zip(found) {
            let held =
                process.runs & (1 << job) != 0 || (index == process.outstanding && !self.is(Mutation::NothingHeld));
            if index != 0 && !held && state.held[number][process.life].tokens[job] == index {
                state.held[number][process.life].tokens[job] = 0;
                state.put(job as u8);
            }
        }
        if !self.is(Mutation::NoGather) {
            (0..JOBS as u8).for_each(|job| state.lay_back(job));
        }
    }

    /// Every job of this list, or none, where that has nothing.
    fn choices(list: u8) -> impl Iterator<Item = u8> {
        let none = (list == 0).then_some(0);
        bits(list).chain(none)
    }
}

impl Protocol for Blocking {
    type State = State;
    type Action = Action;

    fn init(&self) -> State {
        let process = Process {
            alive: true,
            registered: true,
            life: 0,
            connected: true,
            last: 0,
            outstanding: 0,
            runs: 0,
            strays: 0,
            sweep: None,
            pipes: [NO_PIPE; 2],
        };
        let none = Held {
            lease: false,
            spent: 0,
            tokens: [0; JOBS],
        };
        let mut held = [[none; LIVES]; PROCESSES];
        held.iter_mut().for_each(|lives| lives[0].lease = true);
        let config = &self.config;
        State {
            queue: (1 << JOBS) - 1,
            aside: 0,
            done: 0,
            held,
            processes: [process; PROCESSES],
            left: [
                config.breaks,
                config.timeouts,
                config.fences,
                config.kills,
                config.leaves,
                config.sweeps,
            ],
            twice: false,
            late: false,
            unleased: false,
        }
    }

    fn progress(&self, state: &State, into: &mut Vec<Action>) {
        for (number, process) in state.processes.iter().enumerate() {
            for (which, pipe) in process.pipes.iter().enumerate() {
                match pipe.stage {
                    Stage::Waits => {
                        into.extend(bits(state.queue).map(|job| Action::Move(number, which, job)));
                        // Redis hears that nobody listens, or the time is over.
                        if which == 1 {
                            into.push(Action::End(number, which));
                        }
                    }
                    Stage::Takes => {
                        let list = if state.aside == 0 { state.queue } else { state.aside };
                        into.extend(Self::choices(list).map(|job| Action::Take(number, which, job)));
                    }
                    Stage::Answered(_) if process.alive => into.push(Action::Read(number)),
                    Stage::Answered(_) | Stage::None => {}
                }
            }
            for life in 0..LIVES {
                let held = &state.held[number][life];
                if !held.lease && held.tokens != [0; JOBS] {
                    into.push(Action::Recover(number, life));
                }
                if held.lease && !process.alive {
                    into.push(Action::Expire(number));
                }
            }
            if !process.alive {
                continue;
            }
            into.extend(bits(process.runs | process.strays).map(|job| Action::Finish(number, job)));
            if !process.registered {
                if process.life + 1 < LIVES {
                    into.push(Action::Register(number));
                }
                continue;
            }
            if !process.connected {
                into.push(Action::Connect(number));
            } else if process.outstanding == 0 && process.runs == 0 && process.pipes[0] == NO_PIPE {
                into.push(Action::Claim(number));
            }
            if process.sweep.is_some() {
                into.push(Action::Compare(number));
            } else if self.has_something_to_sweep(state, number) {
                into.push(Action::ReadHash(number));
            }
        }
    }

    fn faults(&self, state: &State, into: &mut Vec<Action>) {
        for (number, process) in state.processes.iter().enumerate() {
            if process.pipes[1].stage == Stage::Waits && !process.pipes[1].torn && self.config.breaks > 0 {
                into.push(Action::Tear(number));
            }
            if !process.alive {
                continue;
            }
            let pipe = process.pipes[0].stage;
            if state.left[BREAKS] > 0 && pipe != Stage::None && process.pipes[1] == NO_PIPE {
                into.push(Action::Break(number));
            }
            if state.left[TIMEOUTS] > 0 && pipe == Stage::Waits {
                into.push(Action::End(number, 0));
            }
            if state.left[FENCES] > 0 && state.held[number][process.life].lease && process.life + 1 < LIVES {
                into.push(Action::Fence(number));
            }
            if state.left[SWEEPS] > 0 && process.registered && process.sweep.is_none() {
                into.push(Action::Sweep(number));
            }
            // One of them stays.
            let others = state.processes.iter().filter(|other| other.alive).count() > 1;
            if state.left[KILLS] > 0 && others && process.pipes[1] == NO_PIPE {
                into.push(Action::Kill(number));
            }
            if state.left[LEAVES] > 0 && others && process.runs == 0 && process.pipes[1] == NO_PIPE {
                into.push(Action::Leave(number));
            }
        }
    }

    fn next(&self, state: &State, action: Action) -> State {
        let mut next = *state;
        let state = &mut next;
        match action {
            Action::Register(number) => {
                let process = &mut state.processes[number];
                process.life += 1;
                process.registered = true;
                process.sweep = None;
                state.held[number][process.life].lease = true;
            }
            Action::Connect(number) => {
                let process = &mut state.processes[number];
                process.connected = true;
                let held = &mut state.held[number][process.life];
                if held.lease && !self.is(Mutation::NoSpend) {
                    held.spent = held.spent.max(process.last);
                }
            }
            Action::Claim(number) => {
                let process = &mut state.processes[number];
                process.last += 1;
                process.outstanding = process.last;
                process.pipes[0] = Pipe {
                    stage: Stage::Waits,
                    index: process.last,
                    life: process.life,
                    torn: false,
                };
            }
            Action::Move(number, which, job) => {
                state.queue &= !(1 << job);
                state.aside |= 1 << job;
                let pipe = &mut state.processes[number].pipes[which];
                pipe.stage = if pipe.torn { Stage::None } else { Stage::Takes };
            }
            Action::End(number, which) => {
                if which == 0 {
                    state.spend(TIMEOUTS);
                }
                let pipe = &mut state.processes[number].pipes[which];
                pipe.stage = if pipe.torn { Stage::None } else { Stage::Takes };
            }
            Action::Take(number, which, job) => self.take(state, number, which, job),
            Action::Read(number) => Self::read(state, number),
            Action::Finish(number, job) => {
                let process = &mut state.processes[number];
                let is_mine = process.runs & (1 << job) != 0;
                process.runs &= !(1 << job);
                process.strays &= !(1 << job);
                let held = &mut state.held[number][process.life];
                if is_mine && held.lease && held.tokens[usize::from(job)] != 0 {
                    held.tokens[usize::from(job)] = 0;
                    state.done |= 1 << job;
                }
            }
            Action::ReadHash(number) | Action::Sweep(number) => {
                if matches!(action, Action::Sweep(_)) {
                    state.spend(SWEEPS);
                }
                let process = &mut state.processes[number];
                process.sweep = Some(state.held[number][process.life].tokens);
            }
            Action::Compare(number) => self.compare(state, number),
            Action::Expire(number) => state.held[number].iter_mut().for_each(|held| held.lease = false),
            Action::Recover(number, life) => {
                for job in 0..JOBS as u8 {
                    if std::mem::take(&mut state.held[number][life].tokens[usize::from(job)]) != 0 {
                        state.put(job);
                    }
                }
            }
            Action::Break(number) => {
                state.spend(BREAKS);
                state.give_up(number);
            }
            Action::Tear(number) => state.processes[number].pipes[1].torn = true,
            Action::Fence(number) => {
                state.spend(FENCES);
                state.held[number][state.processes[number].life].lease = false;
            }
            Action::Kill(number) => {
                state.spend(KILLS);
                state.give_up(number);
                let process = &mut state.processes[number];
                process.alive = false;
                (process.runs, process.strays, process.sweep) = (0, 0, None);
            }
            Action::Leave(number) => {
                state.spend(LEAVES);
                state.give_up(number);
                let process = &mut state.processes[number];
                process.alive = false;
                (process.strays, process.sweep) = (0, None);
                let held = &mut state.held[number][process.life];
                if held.lease {
                    held.lease = false;
                    let tokens = std::mem::take(&mut held.tokens);
                    let unheard = (0..JOBS as u8).filter(|job| tokens[usize::from(*job)] != 0);
                    if !self.is(Mutation::NothingBack) {
                        unheard.for_each(|job| state.put(job));
                    }
                }
            }
        }
        next
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        if state.twice || (0..JOBS as u8).any(|job| state.places(job) != 1) {
            return Some("a job is in one place");
        }
        if state.late {
            return Some("a late claim takes nothing");
        }
        if state.unleased {
            return Some("without a lease nothing is claimed");
        }
        for (process, held) in state.processes.iter().zip(&state.held) {
            let held = &held[process.life];
            if process.registered && held.lease && bits(process.runs).any(|job| held.tokens[usize::from(job)] == 0) {
                return Some("what runs is on record");
            }
        }
        None
    }

    fn broken_at_rest(&self, state: &State) -> Option<&'static str> {
        (usize::from(state.done.count_ones() as u8) != JOBS).then_some("at rest all is done")
    }

    fn fingerprint(state: &State) -> u64 {
        let mut mix = Mix::new();
        let small = [
            state.queue,
            state.aside,
            state.done,
            u8::from(state.twice),
            u8::from(state.late) | u8::from(state.unleased) << 1,
        ];
        mix.word(
            small
                .iter()
                .chain(&state.left)
                .fold(0, |word, part| word << 6 | u64::from(*part)),
        );
        for (process, lives) in state.processes.iter().zip(&state.held) {
            for held in lives {
                mix.word(
                    held.tokens
                        .iter()
                        .chain([&held.spent, &u8::from(held.lease)])
                        .fold(0, |word, part| word << 8 | u64::from(*part)),
                );
            }
            let flags = [
                u8::from(process.alive),
                u8::from(process.registered),
                u8::from(process.connected),
                process.life as u8,
                process.last,
                process.outstanding,
                process.runs,
                process.strays,
            ];
            mix.word(u64::from_le_bytes(flags));
            mix.word(
                process
                    .sweep
                    .map_or(0, |found| 1 << 32 | u64::from(found[0]) << 8 | u64::from(found[1])),
            );
            for pipe in process.pipes {
                let stage = match pipe.stage {
                    Stage::None => 0,
                    Stage::Waits => 1,
                    Stage::Takes => 2,
                    Stage::Answered(Answer::Nothing) => 3,
                    Stage::Answered(Answer::Lost) => 4,
                    Stage::Answered(Answer::Job(job)) => 5 + job,
                };
                mix.word(u64::from_le_bytes([
                    stage,
                    pipe.index,
                    pipe.life as u8,
                    u8::from(pipe.torn),
                    0,
                    0,
                    0,
                    0,
                ]));
            }
        }
        mix.finish()
    }
}
