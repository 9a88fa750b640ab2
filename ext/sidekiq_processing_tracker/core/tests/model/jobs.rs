//! The job protocol: `register`, `beat`, `turn`, `reap`, `recover`, `leave`, the sweep and the hand-over.
//!
//! Redis runs one script at a time; everything else may be cut in two anywhere. So each call is three steps (sent, run
//! by Redis, answered) and between any two of them anything else may happen. Each kind of trouble has a budget, which
//! bounds the search; a budget spent nowhere is part of the search too.
//!
//! A turn without its script is not a call of its own here: either it does what the script would do, or nothing, since Redis watches
//! what the script looks at; and a call that does nothing, and is made again, is part of each search. That the watch does so is
//! tested on a real Redis (`tests/transactions.rs`); what it would mean if it did not is the mutation `NoFence`.
//!
//! Time is not modelled here but in `lease.rs`. What that model proves is assumed: a lease runs out only while its
//! owner is dead, paused, cut off, or does not use that identity.

use crate::search::{Mix, Protocol};

/// Identities that one instance may go through.
pub const GENERATIONS: usize = 4;
/// Threads of an instance, at most.
const THREADS: usize = 2;
/// Jobs that one hash may hold at once, and that one call may name.
const TOKENS: usize = 3;
/// Entries in the queue, at most. Mutations put jobs there twice.
const QUEUE: usize = 5;
/// Late copies under way at once.
const COPIES: usize = 2;
/// Writes that Redis may lose.
const HISTORY: usize = 3;

/// The link that carries turns, sweeps and `leave`.
pub const CLAIMS: usize = 0;
/// The link that carries beats, registrations and recovery.
pub const CONTROL: usize = 1;

/// What is done wrongly on purpose, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing: the protocol as it is.
    None,
    /// A turn runs whatever its number is.
    NoNumbering,
    /// A turn does not look for the fence.
    NoFence,
    /// The number is stored only when the claim found something.
    EmptyNotStored,
    /// The sweep has a connection of its own and does not wait for the outstanding turn.
    SweepElsewhere,
    /// A new connection is not followed by a sweep, nor is there one a minute.
    NoSweep,
    /// A forked child's `at_exit` says goodbye for its parent.
    NoPidCheck,
    /// A registration without an answer is sent again with the same nonce.
    RegisterTwice,
    /// After `lost` the numbers start anew, and acks of the old identity are still sent.
    NumbersRestart,
    /// A claimed job is handed to Ruby without a look at the last beat.
    NoHandOverGuard,
    /// The hand-over looks at when the last beat was answered, not at when it was sent.
    GuardByAnswer,
    /// `leave` removes the instance though tokens remain that it was not given.
    LeaveDropsUnknown,
    /// A beat renews the lease of an instance without looking at the fence.
    BeatWithoutFence,
    /// `recover` pushes a job whether its token is there or not.
    RecoverBlindly,
    /// `lost` is answered by a registration, but what runs is not given up.
    LostKeepsRunning,
}

/// How much may go wrong in one search, and what there is.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Jobs in the queue at the start, at most 3.
    pub jobs: u8,
    /// Threads an instance has, 1 or 2.
    pub threads: usize,
    /// The jobs are popped by another fetcher and only recorded by us.
    pub middleware: bool,
    /// Instance 0 has yet to register.
    pub boot: bool,
    /// Instances killed. One always lives on.
    pub crashes: u8,
    /// Instances stopped and continued.
    pub pauses: u8,
    /// Living instances that get no answer for longer than a lease.
    pub cuts: u8,
    /// Calls given up: sent again at once, while the first copy may run at any later moment, or never.
    pub timeouts: u8,
    /// Threads that die without an ack.
    pub gone: u8,
    /// Instances told to stop.
    pub shutdowns: u8,
    /// Failovers to a Redis that lacks the last 1 to 3 writes.
    pub rollbacks: u8,
    /// Claims sent though the queue is empty.
    pub idle: u8,
    /// Holds that run out under a reaper that is merely slow.
    pub slow: u8,
    /// Beats sent without need, which trouble then meets on their way.
    pub beats: u8,
    /// Sweeps without need (the one a minute).
    pub sweeps: u8,
    /// Recorded jobs that run before the record is answered (middleware mode).
    pub untracked: u8,
    /// Children forked that then exit.
    pub forks: u8,
    /// What is wrong.
    pub mutation: Mutation,
}

impl Config {
    /// Two jobs, one thread, native claims, and nothing goes wrong.
    pub const CALM: Self = Self {
        jobs: 2,
        threads: 1,
        middleware: false,
        boot: false,
        crashes: 0,
        pauses: 0,
        cuts: 0,
        timeouts: 0,
        gone: 0,
        shutdowns: 0,
        rollbacks: 0,
        idle: 0,
        slow: 0,
        beats: 0,
        sweeps: 0,
        untracked: 0,
        forks: 0,
        mutation: Mutation::None,
    };
}

/// The protocol among `N` instances.
#[derive(Clone, Copy, Debug)]
pub struct Jobs<const N: usize> {
    /// What there is and what may go wrong.
    pub config: Config,
}

/// A token: turn number × 4 + place. 0 is none.
type Token = u8;
/// Jobs are 1, 2, 3. 0 is none.
type Job = u8;

fn token(turn: u8, place: usize) -> Token {
    turn * 4 + u8::try_from(place).expect("a place is below 4")
}

/// A list in a fixed array: the entries, then zeros.
fn push<const K: usize>(list: &mut [u8; K], entry: u8) -> bool {
    for slot in list.iter_mut() {
        if *slot == 0 {
            *slot = entry;
            return true;
        }
    }
    false
}

fn take<const K: usize>(list: &mut [u8; K], at: usize) -> u8 {
    let entry = list[at];
    list.copy_within(at + 1.., at);
    list[K - 1] = 0;
    entry
}

fn find<const K: usize>(list: &[u8; K], entry: u8) -> Option<usize> {
    (0..K).find(|&at| list[at] == entry)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Lease {
    /// Not listed.
    None,
    Running,
    Due,
}

/// What Redis has of one identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    /// The member of `NS:instances`.
    lease: Lease,
    /// The field `call`, plus one; 0: fenced.
    call: u8,
    /// The other fields of the hash: token and job.
    tokens: [Token; TOKENS],
    jobs: [Job; TOKENS],
}

impl Identity {
    const NOTHING: Self = Self {
        lease: Lease::None,
        call: 0,
        tokens: [0; TOKENS],
        jobs: [0; TOKENS],
    };

    fn word(&self) -> u64 {
        let ([a, b, c], [d, e, f]) = (self.tokens, self.jobs);
        u64::from_le_bytes([self.lease as u8, self.call, a, b, c, d, e, f])
    }

    /// HDEL
    fn remove(&mut self, token: Token) -> Option<Job> {
        let at = find(&self.tokens, token)?;
        take(&mut self.tokens, at);
        Some(take(&mut self.jobs, at))
    }

    /// HSET
    fn set(&mut self, token: Token, job: Job) -> bool {
        if let Some(at) = find(&self.tokens, token) {
            self.jobs[at] = job;
            return true;
        }
        push(&mut self.tokens, token) && push(&mut self.jobs, job)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Redis<const N: usize> {
    /// The last entry is the end that claims take from.
    queue: [Job; QUEUE],
    identities: [[Identity; GENERATIONS]; N],
}

impl<const N: usize> Redis<N> {
    fn mix(&self, mix: &mut Mix) {
        let [a, b, c, d, e] = self.queue;
        mix.word(u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]));
        for instance in &self.identities {
            for identity in instance {
                mix.word(identity.word());
            }
        }
    }

    fn has(&self, job: Job) -> bool {
        self.queue.contains(&job)
            || self
                .identities
                .iter()
                .flatten()
                .any(|identity| identity.jobs.contains(&job))
    }

    fn pop(&mut self) -> Option<Job> {
        let at = (0..QUEUE).rev().find(|&at| self.queue[at] != 0)?;
        Some(take(&mut self.queue, at))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Script {
    None,
    Register,
    Beat,
    Turn,
    Scan,
    Reap,
    Recover,
    Leave,
}

/// A call on its way, with all that it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    script: Script,
    instance: u8,
    generation: u8,
    /// The turn's number; of a beat: 1 when a lease's time has passed since it was sent.
    number: u8,
    claims: u8,
    acks: [Token; TOKENS],
    requeues: [Token; TOKENS],
    /// Payloads to requeue that have no record.
    payloads: [Job; THREADS],
    /// By thread, the job to be recorded.
    records: [Job; THREADS],
    /// Of `reap` and `recover`: instance and generation of the dead one. `recover`'s token is in `acks`.
    whose: (u8, u8),
}

impl Call {
    const NOTHING: Self = Self {
        script: Script::None,
        instance: 0,
        generation: 0,
        number: 0,
        claims: 0,
        acks: [0; TOKENS],
        requeues: [0; TOKENS],
        payloads: [0; THREADS],
        records: [0; THREADS],
        whose: (0, 0),
    };

    fn words(&self) -> [u64; 2] {
        let (ids, whose) = (self.instance * 4 + self.generation, self.whose.0 * 4 + self.whose.1);
        let ([a, b, c], [d, e, f]) = (self.acks, self.requeues);
        let ([p, q], [r, s]) = (self.payloads, self.records);
        [
            u64::from_le_bytes([self.script as u8, ids, self.number, self.claims, a, b, c, whose]),
            u64::from_le_bytes([d, e, f, p, q, r, s, 0]),
        ]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok,
    Lost,
    Stale,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reply {
    status: Status,
    tokens: [Token; TOKENS],
    jobs: [Job; TOKENS],
}

impl Reply {
    const OK: Self = Self {
        status: Status::Ok,
        tokens: [0; TOKENS],
        jobs: [0; TOKENS],
    };

    const fn just(status: Status) -> Self {
        Self {
            status,
            tokens: [0; TOKENS],
            jobs: [0; TOKENS],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Idle,
    Sent,
    Run,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    stage: Stage,
    call: Call,
    reply: Reply,
}

impl Link {
    const IDLE: Self = Self {
        stage: Stage::Idle,
        call: Call::NOTHING,
        reply: Reply::OK,
    };

    fn send(&mut self, call: Call) {
        *self = Self {
            stage: Stage::Sent,
            call,
            reply: Reply::OK,
        };
    }

    fn mix(&self, mix: &mut Mix) {
        if self.stage == Stage::Idle {
            mix.word(0);
            return;
        }
        let [a, b] = self.call.words();
        mix.word(a);
        mix.word(b);
        let ([a, b, c], [d, e, f]) = (self.reply.tokens, self.reply.jobs);
        mix.word(u64::from_le_bytes([
            self.stage as u8,
            self.reply.status as u8,
            a,
            b,
            c,
            d,
            e,
            f,
        ]));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// There is no such thread, or it has ended.
    Gone,
    /// Waits for a job.
    Waiting,
    /// Its job has come, and is not yet handed to Ruby.
    Got,
    /// Popped by another fetcher, and waits for the record (middleware mode).
    Popped,
    /// Runs its job.
    Running,
    /// Runs on, but its job is reported lost.
    Lost,
    /// Killed while its record had no answer (middleware mode).
    Killed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thread {
    phase: Phase,
    token: Token,
    job: Job,
    /// The number of the turn that carries its record, while there is no answer.
    asked: u8,
}

impl Thread {
    const GONE: Self = Self {
        phase: Phase::Gone,
        token: 0,
        job: 0,
        asked: 0,
    };
    const WAITING: Self = Self {
        phase: Phase::Waiting,
        token: 0,
        job: 0,
        asked: 0,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Life {
    Running,
    Paused,
    Crashed,
    /// Told to stop: takes no more jobs, then says goodbye.
    Leaving,
    /// Has said goodbye.
    Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instance {
    life: Life,
    /// Gets no answers.
    cut: bool,
    generation: u8,
    registered: bool,
    /// The last answered beat was sent less than a lease ago.
    fresh: bool,
    /// The number of the next turn.
    next: u8,
    sweep: bool,
    /// What gathers for the next turn.
    acks: [Token; TOKENS],
    requeues: [Token; TOKENS],
    payloads: [Job; THREADS],
    threads: [Thread; THREADS],
    /// The dead one that is being recovered here, and its tokens to come.
    reaping: Option<(u8, u8)>,
    orphans: [Token; TOKENS],
    links: [Link; 2],
}

impl Instance {
    fn mix(&self, mix: &mut Mix) {
        let flags =
            u8::from(self.cut) | u8::from(self.registered) << 1 | u8::from(self.fresh) << 2 | u8::from(self.sweep) << 3;
        let ([a, b, c], [d, e, f]) = (self.acks, self.requeues);
        let reaping = self
            .reaping
            .map_or(0, |(instance, generation)| 1 + instance * 4 + generation);
        mix.word(u64::from_le_bytes([
            self.life as u8 | flags << 4,
            self.generation << 6 | self.next,
            a,
            b,
            c,
            d,
            e,
            f,
        ]));
        let ([p, q], [x, y, z]) = (self.payloads, self.orphans);
        mix.word(u64::from_le_bytes([p, q, x, y, z, reaping, 0, 0]));
        let [s, t] = self.threads;
        mix.word(u64::from_le_bytes([
            s.phase as u8,
            s.token,
            s.job,
            s.asked,
            t.phase as u8,
            t.token,
            t.job,
            t.asked,
        ]));
        for link in &self.links {
            link.mix(mix);
        }
    }

    fn acts(&self) -> bool {
        matches!(self.life, Life::Running | Life::Leaving)
    }

    fn lives(&self) -> bool {
        matches!(self.life, Life::Running | Life::Leaving | Life::Paused)
    }

    fn holds(&self, token: Token) -> bool {
        self.threads
            .iter()
            .any(|thread| thread.token == token && matches!(thread.phase, Phase::Got | Phase::Running))
            || self.acks.contains(&token)
            || self.requeues.contains(&token)
    }

    /// Has that dead one in hand.
    fn recovers(&self, whose: (u8, u8)) -> bool {
        let control = &self.links[CONTROL];
        let asks = control.stage != Stage::Idle && control.call.script == Script::Reap && control.call.whose == whose;
        self.lives() && (asks || self.reaping == Some(whose))
    }

    fn waiting(&self) -> u8 {
        self.threads
            .iter()
            .map(|thread| u8::from(thread.phase == Phase::Waiting))
            .sum()
    }
}

/// What is left of each budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Budgets {
    crashes: u8,
    pauses: u8,
    cuts: u8,
    timeouts: u8,
    gone: u8,
    shutdowns: u8,
    rollbacks: u8,
    idle: u8,
    slow: u8,
    beats: u8,
    sweeps: u8,
    untracked: u8,
    forks: u8,
}

/// Things that must never happen, noted when they do.
mod slip {
    pub const FALSE_LOST: u8 = 1;
    pub const STALE: u8 = 2;
    pub const TWO_RUN_IT: u8 = 4;
    pub const STARTED_WITHOUT_LEASE: u8 = 8;
    pub const RAN_AFTER_ACK: u8 = 16;
    pub const WRONG_ACK: u8 = 32;
    pub const OUT_OF_BOUNDS: u8 = 64;
}

/// Everything there is at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State<const N: usize> {
    redis: Redis<N>,
    instances: [Instance; N],
    /// Late copies.
    copies: [Call; COPIES],
    /// How Redis was before its last writes, newest first.
    history: [Redis<N>; HISTORY],
    remembered: u8,
    left: Budgets,
    /// By job, a bit: `perform` came to its end once.
    finished: u8,
    /// By job, a bit: acked in Redis.
    done: u8,
    /// By job, a bit: the text allows that it runs twice.
    twice: u8,
    /// By job, a bit: lost by the other fetcher before we heard of it.
    stock: u8,
    /// By instance and generation, a bit: a reaper has fenced it.
    reaped: u16,
    /// Redis has come back older.
    older: bool,
    slips: u8,
}

impl<const N: usize> State<N> {
    /// Whether the instance's lease is gone, as Redis has it.
    fn fenced(&self, index: usize) -> bool {
        let generation = self.instances[index].generation as usize;
        self.redis.identities[index][generation].call == 0
    }

    fn mark(&mut self, slip: u8) {
        self.slips |= slip;
    }
}

fn bit(job: Job) -> u8 {
    1 << job
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The instance sends `register`.
    Register(usize),
    /// It sends a beat.
    Beat(usize),
    /// It sends its next turn.
    Turn(usize),
    /// It reads its hash.
    Sweep(usize),
    /// It reads its hash over the control link (a mutation).
    SweepElsewhere(usize),
    /// It sends `reap` for that identity.
    Reap(usize, usize, usize),
    /// It sends `recover` for the next orphan.
    Recover(usize),
    /// It sends `leave`.
    Leave(usize),
    /// Redis runs what was sent on that link.
    Run(usize, usize),
    /// The answer arrives.
    Answer(usize, usize),
    /// The caller gives up on the answer, and a copy of the call may come late.
    Timeout(usize, usize),
    /// A late copy arrives.
    Late(usize),
    /// A job is handed to Ruby.
    Start(usize, usize),
    /// The other fetcher pops a job for that thread.
    Pop(usize, usize),
    /// A job starts before its record is answered.
    Untracked(usize, usize),
    /// `perform` ends.
    Finish(usize, usize),
    /// The hard shutdown kills the thread.
    Kill(usize, usize),
    /// The thread dies without an ack; Sidekiq puts another in its place.
    ThreadGone(usize, usize),
    /// SIGKILL
    Crash(usize),
    /// SIGSTOP
    Pause(usize),
    /// SIGCONT
    Resume(usize),
    /// The network no longer brings answers.
    Cut(usize),
    /// The network is back.
    Heal(usize),
    /// SIGTERM
    Shutdown(usize),
    /// That identity's lease, or the hold on it, runs out.
    Expire(usize, usize),
    /// Redis comes back without its last writes.
    Older(usize),
    /// A forked child's `at_exit` (a mutation).
    Fork(usize),
}

impl<const N: usize> Jobs<N> {
    fn is(&self, mutation: Mutation) -> bool {
        self.config.mutation == mutation
    }

    // The scripts. Each is one instant.

    fn run(&self, state: &mut State<N>, call: &Call) -> Reply {
        let before = state.redis;
        let reply = match call.script {
            Script::None => Reply::OK,
            Script::Register => Self::register(state, call),
            Script::Beat => self.beat(state, call),
            Script::Turn => self.turn(state, call),
            Script::Scan => Self::scan(state, call),
            Script::Reap => Self::reap(state, call),
            Script::Recover => self.recover(state, call),
            Script::Leave => self.leave(state, call),
        };
        if state.left.rollbacks > 0 && state.redis != before {
            state.history.copy_within(0..HISTORY - 1, 1);
            state.history[0] = before;
            state.remembered = (state.remembered + 1).min(HISTORY as u8);
        }
        reply
    }

    fn register(state: &mut State<N>, call: &Call) -> Reply {
        let own = &mut state.redis.identities[call.instance as usize][call.generation as usize];
        own.call = 1;
        own.lease = Lease::Running;
        Reply::OK
    }

    fn beat(&self, state: &mut State<N>, call: &Call) -> Reply {
        let own = &mut state.redis.identities[call.instance as usize][call.generation as usize];
        if own.call == 0 {
            if self.is(Mutation::BeatWithoutFence) {
                own.lease = Lease::Running;
                return Reply::OK;
            }
            return Reply::just(Status::Lost);
        }
        own.lease = Lease::Running;
        Reply::OK
    }

    fn turn(&self, state: &mut State<N>, call: &Call) -> Reply {
        let (instance, generation) = (call.instance as usize, call.generation as usize);
        let own = state.redis.identities[instance][generation];
        if own.call == 0 && !self.is(Mutation::NoFence) {
            return Reply::just(Status::Lost);
        }
        if !self.is(Mutation::NoNumbering) {
            if call.number + 1 < own.call {
                return Reply::just(Status::Stale);
            }
            if call.number + 1 == own.call {
                let mut reply = Reply::OK;
                for at in 0..TOKENS {
                    if own.tokens[at] / 4 == call.number && own.tokens[at] != 0 {
                        push(&mut reply.tokens, own.tokens[at]);
                        push(&mut reply.jobs, own.jobs[at]);
                    }
                }
                return reply;
            }
        }
        Self::put_back(state, call);
        let mut reply = Reply::OK;
        let mut taken = false;
        for thread in 0..THREADS {
            let job = call.records[thread];
            if job != 0 {
                Self::hold(state, &mut reply, call, token(call.number, thread), job);
            }
        }
        for place in 0..call.claims {
            let Some(job) = state.redis.pop() else { break };
            taken = true;
            Self::hold(
                state,
                &mut reply,
                call,
                token(call.number, THREADS + place as usize),
                job,
            );
        }
        if taken || call.claims == 0 || !self.is(Mutation::EmptyNotStored) {
            state.redis.identities[instance][generation].call = call.number + 1;
        }
        reply
    }

    fn hold(state: &mut State<N>, reply: &mut Reply, call: &Call, token: Token, job: Job) {
        let own = &mut state.redis.identities[call.instance as usize][call.generation as usize];
        let fits = own.set(token, job) & push(&mut reply.tokens, token) & push(&mut reply.jobs, job);
        if !fits {
            state.mark(slip::OUT_OF_BOUNDS);
        }
    }

    /// Acks, then requeues: what `turn` and `leave` begin with.
    fn put_back(state: &mut State<N>, call: &Call) {
        let own = &mut state.redis.identities[call.instance as usize][call.generation as usize];
        let mut fits = true;
        for ack in call.acks.iter().filter(|&&ack| ack != 0) {
            if let Some(job) = own.remove(*ack) {
                state.done |= bit(job);
                if state.finished & bit(job) == 0 {
                    state.slips |= slip::WRONG_ACK;
                }
            }
        }
        for token in call.requeues.iter().filter(|&&token| token != 0) {
            if let Some(job) = own.remove(*token) {
                fits &= push(&mut state.redis.queue, job);
            }
        }
        for job in call.payloads.iter().filter(|&&job| job != 0) {
            fits &= push(&mut state.redis.queue, *job);
        }
        if !fits {
            state.mark(slip::OUT_OF_BOUNDS);
        }
    }

    fn scan(state: &mut State<N>, call: &Call) -> Reply {
        let own = &state.redis.identities[call.instance as usize][call.generation as usize];
        if own.call == 0 {
            return Reply::just(Status::Lost);
        }
        Reply {
            status: Status::Ok,
            tokens: own.tokens,
            jobs: own.jobs,
        }
    }

    fn reap(state: &mut State<N>, call: &Call) -> Reply {
        let (instance, generation) = (call.whose.0 as usize, call.whose.1 as usize);
        let dead = &mut state.redis.identities[instance][generation];
        if dead.lease != Lease::Due {
            return Reply::just(Status::Refused);
        }
        dead.call = 0;
        dead.lease = Lease::Running;
        state.reaped |= 1 << (instance * GENERATIONS + generation);
        if dead.tokens[0] == 0 {
            *dead = Identity::NOTHING;
        }
        Reply {
            status: Status::Ok,
            tokens: dead.tokens,
            jobs: dead.jobs,
        }
    }

    fn recover(&self, state: &mut State<N>, call: &Call) -> Reply {
        let dead = &mut state.redis.identities[call.whose.0 as usize][call.whose.1 as usize];
        if dead.call != 0 {
            return Reply::just(Status::Refused);
        }
        let mut fits = true;
        if let Some(job) = dead.remove(call.acks[0]) {
            fits = push(&mut state.redis.queue, job);
        } else if self.is(Mutation::RecoverBlindly) {
            fits = push(&mut state.redis.queue, call.payloads[0]);
        }
        if dead.tokens[0] == 0 {
            *dead = Identity::NOTHING;
        } else {
            dead.lease = Lease::Running;
        }
        if !fits {
            state.mark(slip::OUT_OF_BOUNDS);
        }
        Reply::OK
    }

    fn leave(&self, state: &mut State<N>, call: &Call) -> Reply {
        let (instance, generation) = (call.instance as usize, call.generation as usize);
        if state.redis.identities[instance][generation].call == 0 {
            return Reply::just(Status::Lost);
        }
        Self::put_back(state, call);
        let own = &mut state.redis.identities[instance][generation];
        if own.tokens[0] == 0 || self.is(Mutation::LeaveDropsUnknown) {
            *own = Identity::NOTHING;
        } else {
            own.call = 0;
            own.lease = Lease::Due;
        }
        Reply::OK
    }

    // The instances.

    fn call(instance: &Instance, index: usize, script: Script) -> Call {
        Call {
            script,
            instance: index as u8,
            generation: instance.generation,
            ..Call::NOTHING
        }
    }

    /// The next turn, with all that gathered. Nothing when there is nothing to say.
    fn next_turn(&self, state: &State<N>, index: usize) -> Option<Call> {
        let instance = &state.instances[index];
        let mut call = Self::call(instance, index, Script::Turn);
        call.number = instance.next;
        (call.acks, call.requeues, call.payloads) = (instance.acks, instance.requeues, instance.payloads);
        for (record, thread) in call.records.iter_mut().zip(&instance.threads) {
            if thread.token == 0 && thread.asked == 0 && matches!(thread.phase, Phase::Popped | Phase::Running) {
                *record = thread.job;
            }
        }
        if !self.config.middleware {
            call.claims = instance.waiting();
        }
        let nothing = call.acks[0] == 0
            && call.requeues[0] == 0
            && call.payloads[0] == 0
            && call.records == [0; THREADS]
            && (call.claims == 0 || state.redis.queue[0] == 0);
        (!nothing).then_some(call)
    }

    fn send_turn(state: &mut State<N>, index: usize, call: Call) {
        let instance = &mut state.instances[index];
        for (thread, record) in instance.threads.iter_mut().zip(call.records) {
            if record != 0 {
                thread.asked = call.number;
            }
        }
        (instance.acks, instance.requeues, instance.payloads) = ([0; TOKENS], [0; TOKENS], [0; THREADS]);
        instance.next += 1;
        if instance.next > 60 {
            state.slips |= slip::OUT_OF_BOUNDS;
        }
        instance.links[CLAIMS].send(call);
    }

    /// Keeps a copy of a call that may come late.
    fn copy(state: &mut State<N>, call: Call) {
        if matches!(call.script, Script::None | Script::Scan) {
            return;
        }
        if let Some(slot) = state.copies.iter_mut().find(|copy| copy.script == Script::None) {
            *slot = call;
        }
        state
            .copies
            .sort_unstable_by_key(|copy| std::cmp::Reverse(copy.words()));
    }

    fn start(state: &mut State<N>, index: usize, place: usize) {
        let job = state.instances[index].threads[place].job;
        state.instances[index].threads[place].phase = Phase::Running;
        let Instance {
            generation, threads, ..
        } = state.instances[index];
        let fenced = state.redis.identities[index][generation as usize].call == 0;
        if fenced && threads[place].token == 0 && threads[place].asked != 0 {
            // Middleware mode: the record had no answer when the lease was lost.
            state.twice |= bit(job);
        }
        if state.older || state.twice & bit(job) != 0 {
            return;
        }
        if state.done & bit(job) != 0 {
            state.mark(slip::RAN_AFTER_ACK);
        }
        if fenced && threads[place].token != 0 {
            state.mark(slip::STARTED_WITHOUT_LEASE);
        }
        for (other_index, other) in state.instances.iter().enumerate() {
            let lease_held = state.redis.identities[other_index][other.generation as usize].call != 0;
            for (other_place, thread) in other.threads.iter().enumerate() {
                let same = (other_index, other_place) == (index, place);
                if !same && other.lives() && lease_held && thread.phase == Phase::Running && thread.job == job {
                    state.slips |= slip::TWO_RUN_IT;
                }
            }
        }
    }

    fn answer(&self, state: &mut State<N>, index: usize, link: usize) {
        let Link { call, reply, .. } = state.instances[index].links[link];
        state.instances[index].links[link] = Link::IDLE;
        let instance = &mut state.instances[index];
        let current = call.generation == instance.generation;
        match call.script {
            Script::None => {}
            Script::Register => {
                instance.registered = true;
                instance.fresh = call.number == 0;
            }
            Script::Beat if reply.status == Status::Lost => {
                if current && instance.registered {
                    self.lost(state, index);
                }
            }
            Script::Beat => {
                if current && (call.number == 0 || self.is(Mutation::GuardByAnswer)) {
                    instance.fresh = true;
                }
            }
            Script::Turn => self.turn_answered(state, index, &call, &reply),
            Script::Scan if reply.status == Status::Lost => {
                if current {
                    self.lost(state, index);
                }
            }
            Script::Scan => self.swept(state, index, &reply),
            Script::Reap => {
                if reply.status == Status::Ok && reply.tokens[0] != 0 {
                    instance.reaping = Some(call.whose);
                    instance.orphans = reply.tokens;
                    if self.is(Mutation::RecoverBlindly) {
                        instance.payloads[0] = 0;
                    }
                }
            }
            Script::Recover => {
                take(&mut instance.orphans, 0);
                if instance.orphans[0] == 0 || reply.status == Status::Refused {
                    instance.orphans = [0; TOKENS];
                    instance.reaping = None;
                }
            }
            Script::Leave => Self::gone(state, index),
        }
    }

    fn gone(state: &mut State<N>, index: usize) {
        let instance = &mut state.instances[index];
        let control = instance.links[CONTROL].call;
        *instance = Instance {
            life: Life::Left,
            cut: false,
            registered: false,
            fresh: false,
            next: 0,
            sweep: false,
            acks: [0; TOKENS],
            requeues: [0; TOKENS],
            payloads: [0; THREADS],
            threads: [Thread::GONE; THREADS],
            reaping: None,
            orphans: [0; TOKENS],
            links: [Link::IDLE; 2],
            generation: instance.generation,
        };
        Self::copy(state, control);
    }

    fn turn_answered(&self, state: &mut State<N>, index: usize, call: &Call, reply: &Reply) {
        if reply.status == Status::Lost {
            return self.lost(state, index);
        }
        if reply.status == Status::Stale {
            state.mark(slip::STALE);
            return self.lost(state, index);
        }
        let instance = &mut state.instances[index];
        for (&token, &job) in reply.tokens.iter().zip(&reply.jobs).filter(|(&token, _)| token != 0) {
            let place = usize::from(token % 4);
            let fits = if place < THREADS {
                let thread = &mut instance.threads[place];
                if thread.asked == call.number {
                    thread.asked = 0;
                    thread.token = token;
                    match thread.phase {
                        Phase::Killed => {
                            *thread = Thread::GONE;
                            push(&mut instance.requeues, token)
                        }
                        Phase::Popped => {
                            thread.phase = Phase::Got;
                            true
                        }
                        _ => true,
                    }
                } else {
                    push(&mut instance.acks, token)
                }
            } else if let Some(thread) = instance
                .threads
                .iter_mut()
                .find(|thread| thread.phase == Phase::Waiting)
            {
                *thread = Thread {
                    phase: Phase::Got,
                    token,
                    job,
                    asked: 0,
                };
                true
            } else {
                push(&mut instance.requeues, token)
            };
            if !fits {
                state.slips |= slip::OUT_OF_BOUNDS;
            }
        }
    }

    /// The lease is lost: what runs is reported, the rest dropped, a new nonce drawn.
    fn lost(&self, state: &mut State<N>, index: usize) {
        let generation = state.instances[index].generation;
        let reaped = state.reaped >> (index * GENERATIONS + generation as usize) & 1 != 0;
        // The answer to a beat may overtake the answer to `leave`: nothing is reported then.
        let saying_goodbye = state.instances[index].links[CLAIMS].call.script == Script::Leave;
        if saying_goodbye {
            return;
        }
        if !reaped && !state.older {
            state.mark(slip::FALSE_LOST);
        }
        let outstanding = state.instances[index].links[CLAIMS];
        if outstanding.stage == Stage::Sent {
            Self::copy(state, outstanding.call);
        }
        let mut twice = 0;
        let mut pushed = [0; THREADS];
        let instance = &mut state.instances[index];
        if self.is(Mutation::NumbersRestart) {
            instance.next = 1;
            for ack in outstanding.call.acks {
                if ack != 0 {
                    push(&mut instance.acks, ack);
                }
            }
        } else {
            instance.acks = [0; TOKENS];
        }
        instance.requeues = [0; TOKENS];
        instance.links[CLAIMS] = Link::IDLE;
        for (place, thread) in instance.threads.iter_mut().enumerate() {
            if thread.asked != 0 {
                twice |= bit(thread.job);
            }
            match thread.phase {
                Phase::Running if thread.token != 0 && !self.is(Mutation::LostKeepsRunning) => {
                    let token = if self.is(Mutation::NumbersRestart) {
                        thread.token
                    } else {
                        0
                    };
                    *thread = Thread {
                        phase: Phase::Lost,
                        token,
                        asked: 0,
                        ..*thread
                    };
                }
                Phase::Got => {
                    *thread = if instance.life == Life::Leaving {
                        Thread::GONE
                    } else {
                        Thread::WAITING
                    }
                }
                Phase::Killed => {
                    // The caller pushes what was never answered.
                    pushed[place] = thread.job;
                    *thread = Thread::GONE;
                }
                _ => thread.asked = 0,
            }
        }
        instance.sweep = false;
        instance.registered = false;
        instance.fresh = false;
        if instance.generation as usize + 1 < GENERATIONS {
            instance.generation += 1;
        } else {
            state.slips |= slip::OUT_OF_BOUNDS;
        }
        state.twice |= twice;
        for job in pushed.into_iter().filter(|&job| job != 0) {
            push(&mut state.redis.queue, job);
        }
    }

    fn swept(&self, state: &mut State<N>, index: usize, reply: &Reply) {
        let instance = &mut state.instances[index];
        for token in reply.tokens.into_iter().filter(|&token| token != 0) {
            if !instance.holds(token) && !push(&mut instance.requeues, token) {
                state.slips |= slip::OUT_OF_BOUNDS;
            }
        }
        if self.config.middleware {
            for thread in &mut instance.threads {
                if thread.phase == Phase::Running && thread.token != 0 && !reply.tokens.contains(&thread.token) {
                    thread.token = 0;
                }
            }
        }
    }

    fn timeout(&self, state: &mut State<N>, index: usize, link: usize) {
        let Link { stage, call, .. } = state.instances[index].links[link];
        let twice = self.is(Mutation::RegisterTwice);
        // TCP repeats nothing: a registration that has run has no copy left. All other calls bear one, so they get one.
        if call.script != Script::Register || stage == Stage::Sent || twice {
            Self::copy(state, call);
        }
        let instance = &mut state.instances[index];
        let resend = match call.script {
            Script::Turn | Script::Leave => true,
            Script::Register => {
                if !twice {
                    if (instance.generation as usize) + 1 < GENERATIONS {
                        instance.generation += 1;
                    } else {
                        state.slips |= slip::OUT_OF_BOUNDS;
                    }
                }
                twice
            }
            // A `recover` is sent again as it was: the next one is for the same orphan.
            _ => false,
        };
        if link == CLAIMS && !self.is(Mutation::NoSweep) {
            instance.sweep = true;
        }
        if resend {
            instance.links[link].send(call);
        } else {
            instance.links[link] = Link::IDLE;
        }
    }

    fn die(&self, state: &mut State<N>, index: usize) {
        let Instance {
            links,
            threads,
            payloads,
            ..
        } = state.instances[index];
        if self.config.middleware {
            let popped = threads
                .iter()
                .filter(|thread| thread.token == 0 || state.older)
                .map(|thread| thread.job);
            for job in popped.chain(payloads).chain(links[CLAIMS].call.payloads) {
                if job != 0 && !state.redis.has(job) {
                    state.stock |= bit(job);
                }
            }
        }
        Self::gone(state, index);
        state.instances[index].life = Life::Crashed;
        for link in links {
            if link.stage == Stage::Sent {
                Self::copy(state, link.call);
            }
        }
    }

    fn expire(state: &mut State<N>, index: usize, generation: usize) {
        state.redis.identities[index][generation].lease = Lease::Due;
        let owner = &mut state.instances[index];
        if owner.generation as usize == generation && owner.lives() {
            owner.fresh = false;
            let control = &mut owner.links[CONTROL];
            if matches!(control.call.script, Script::Beat | Script::Register) {
                control.call.number = 1;
            }
        }
    }

    fn older(&self, state: &mut State<N>, writes: usize) {
        state.redis = state.history[writes];
        state.older = true;
        state.copies = [Call::NOTHING; COPIES];
        state.left.rollbacks -= 1;
        for instance in state.instances.iter_mut().filter(|instance| instance.lives()) {
            instance.sweep = !self.is(Mutation::NoSweep);
            for link in &mut instance.links {
                if link.stage == Stage::Run {
                    let call = link.call;
                    link.send(call);
                }
            }
        }
    }

    fn forget_history(state: &mut State<N>) {
        if state.left.rollbacks == 0 {
            state.history = [state.redis; HISTORY];
            state.remembered = 0;
        }
    }
}

impl<const N: usize> Protocol for Jobs<N> {
    type State = State<N>;
    type Action = Action;

    fn init(&self) -> State<N> {
        let config = self.config;
        let mut redis = Redis {
            queue: [0; QUEUE],
            identities: [[Identity::NOTHING; GENERATIONS]; N],
        };
        for job in 1..=config.jobs {
            push(&mut redis.queue, job);
        }
        let mut threads = [Thread::GONE; THREADS];
        threads[..config.threads].fill(Thread::WAITING);
        let instance = Instance {
            life: Life::Running,
            cut: false,
            generation: 0,
            registered: true,
            fresh: true,
            next: 1,
            sweep: false,
            acks: [0; TOKENS],
            requeues: [0; TOKENS],
            payloads: [0; THREADS],
            threads,
            reaping: None,
            orphans: [0; TOKENS],
            links: [Link::IDLE; 2],
        };
        let mut instances = [instance; N];
        for (index, instance) in instances.iter_mut().enumerate() {
            if index == 0 && config.boot {
                (instance.registered, instance.fresh) = (false, false);
            } else {
                redis.identities[index][0] = Identity {
                    lease: Lease::Running,
                    call: 1,
                    ..Identity::NOTHING
                };
            }
        }
        State {
            redis,
            instances,
            copies: [Call::NOTHING; COPIES],
            history: [redis; HISTORY],
            remembered: 0,
            left: Budgets {
                crashes: config.crashes,
                pauses: config.pauses,
                cuts: config.cuts,
                timeouts: config.timeouts,
                gone: config.gone,
                shutdowns: config.shutdowns,
                rollbacks: config.rollbacks,
                idle: config.idle,
                slow: config.slow,
                beats: config.beats,
                sweeps: config.sweeps,
                untracked: config.untracked,
                forks: config.forks,
            },
            finished: 0,
            done: 0,
            twice: 0,
            stock: 0,
            reaped: 0,
            older: false,
            slips: 0,
        }
    }

    fn progress(&self, state: &State<N>, into: &mut Vec<Action>) {
        for (index, instance) in state.instances.iter().enumerate() {
            if !instance.lives() {
                continue;
            }
            for (number, link) in instance.links.iter().enumerate() {
                match link.stage {
                    Stage::Sent => into.push(Action::Run(index, number)),
                    Stage::Run if instance.acts() && !instance.cut => into.push(Action::Answer(index, number)),
                    _ => {}
                }
            }
            if instance.life == Life::Paused {
                into.push(Action::Resume(index));
                continue;
            }
            if instance.cut {
                into.push(Action::Heal(index));
            }
            if instance.links[CONTROL].stage == Stage::Idle {
                let leaving = instance.life == Life::Leaving;
                if !instance.registered && !leaving {
                    into.push(Action::Register(index));
                }
                // A beat a step: worth a state only where it changes or tells something.
                if instance.registered && (!instance.fresh || state.fenced(index)) {
                    into.push(Action::Beat(index));
                }
                if instance.reaping.is_some() {
                    into.push(Action::Recover(index));
                } else if !leaving {
                    for (dead, identities) in state.redis.identities.iter().enumerate() {
                        for (generation, identity) in identities.iter().enumerate() {
                            let own = dead == index && generation == instance.generation as usize;
                            if identity.lease == Lease::Due && !own {
                                into.push(Action::Reap(index, dead, generation));
                            }
                        }
                    }
                }
            }
            if instance.links[CLAIMS].stage == Stage::Idle {
                let all_gone = instance.threads.iter().all(|thread| thread.phase == Phase::Gone);
                if instance.life == Life::Leaving && all_gone {
                    into.push(Action::Leave(index));
                } else if instance.registered {
                    if instance.sweep {
                        into.push(Action::Sweep(index));
                    }
                    if self.next_turn(state, index).is_some() {
                        into.push(Action::Turn(index));
                    }
                }
            }
            for (place, thread) in instance.threads.iter().enumerate() {
                match thread.phase {
                    Phase::Got if instance.fresh || self.is(Mutation::NoHandOverGuard) => {
                        into.push(Action::Start(index, place))
                    }
                    Phase::Waiting
                        if self.config.middleware && instance.life == Life::Running && state.redis.queue[0] != 0 =>
                    {
                        into.push(Action::Pop(index, place));
                    }
                    Phase::Running | Phase::Lost => {
                        into.push(Action::Finish(index, place));
                        if instance.life == Life::Leaving {
                            into.push(Action::Kill(index, place));
                        }
                    }
                    _ => {}
                }
            }
        }
        for (index, identities) in state.redis.identities.iter().enumerate() {
            let owner = &state.instances[index];
            for (generation, identity) in identities.iter().enumerate() {
                if identity.lease != Lease::Running {
                    continue;
                }
                let whose = (index as u8, generation as u8);
                let nobody = !owner.lives() || owner.generation as usize != generation;
                let expires = if identity.call == 0 {
                    !state.instances.iter().any(|reaper| reaper.recovers(whose))
                } else {
                    nobody
                };
                if expires {
                    into.push(Action::Expire(index, generation));
                }
            }
        }
    }

    fn faults(&self, state: &State<N>, into: &mut Vec<Action>) {
        let left = &state.left;
        for (index, instance) in state.instances.iter().enumerate() {
            if !instance.lives() {
                continue;
            }
            let running = instance.life == Life::Running;
            let another = (0..N).any(|other| other != index && state.instances[other].life == Life::Running);
            if left.crashes > 0 && another {
                into.push(Action::Crash(index));
            }
            if left.pauses > 0 && running {
                into.push(Action::Pause(index));
            }
            if left.cuts > 0 && running && !instance.cut {
                into.push(Action::Cut(index));
            }
            if left.shutdowns > 0 && running && another {
                into.push(Action::Shutdown(index));
            }
            if left.timeouts > 0 && instance.acts() {
                for (number, link) in instance.links.iter().enumerate() {
                    if link.stage != Stage::Idle {
                        into.push(Action::Timeout(index, number));
                    }
                }
            }
            let generation = instance.generation as usize;
            if instance.life == Life::Paused || instance.cut {
                let own = &state.redis.identities[index][generation];
                if own.lease == Lease::Running && own.call != 0 {
                    into.push(Action::Expire(index, generation));
                }
            }
            if !running {
                continue;
            }
            for (place, thread) in instance.threads.iter().enumerate() {
                if left.gone > 0 && matches!(thread.phase, Phase::Got | Phase::Running) && thread.token != 0 {
                    into.push(Action::ThreadGone(index, place));
                }
                let others = instance
                    .threads
                    .iter()
                    .filter(|other| other.phase != Phase::Gone)
                    .count()
                    > 1;
                if left.gone > 0 && thread.phase == Phase::Waiting && others {
                    into.push(Action::ThreadGone(index, place));
                }
                if left.untracked > 0 && thread.phase == Phase::Popped {
                    into.push(Action::Untracked(index, place));
                }
            }
            if !instance.registered {
                continue;
            }
            if left.idle > 0
                && instance.links[CLAIMS].stage == Stage::Idle
                && instance.waiting() > 0
                && state.redis.queue[0] == 0
            {
                into.push(Action::Turn(index));
            }
            if left.beats > 0 && instance.fresh && !state.fenced(index) && instance.links[CONTROL].stage == Stage::Idle
            {
                into.push(Action::Beat(index));
            }
            if left.sweeps > 0 {
                if self.is(Mutation::SweepElsewhere) {
                    if instance.links[CONTROL].stage == Stage::Idle {
                        into.push(Action::SweepElsewhere(index));
                    }
                } else if instance.links[CLAIMS].stage == Stage::Idle && !instance.sweep {
                    into.push(Action::Sweep(index));
                }
            }
            if left.forks > 0 && self.is(Mutation::NoPidCheck) {
                into.push(Action::Fork(index));
            }
        }
        if left.slow > 0 {
            for (index, identities) in state.redis.identities.iter().enumerate() {
                for (generation, identity) in identities.iter().enumerate() {
                    if identity.lease == Lease::Running && identity.call == 0 {
                        into.push(Action::Expire(index, generation));
                    }
                }
            }
        }
        for (at, copy) in state.copies.iter().enumerate() {
            if copy.script != Script::None {
                into.push(Action::Late(at));
            }
        }
        if left.rollbacks > 0 {
            for writes in 0..state.remembered as usize {
                into.push(Action::Older(writes));
            }
        }
    }

    fn next(&self, state: &State<N>, action: Action) -> State<N> {
        let mut next = *state;
        let state = &mut next;
        match action {
            Action::Register(index) => {
                let call = Self::call(&state.instances[index], index, Script::Register);
                state.instances[index].links[CONTROL].send(call);
            }
            Action::Beat(index) => {
                if state.instances[index].fresh && !state.fenced(index) {
                    state.left.beats -= 1;
                }
                let call = Self::call(&state.instances[index], index, Script::Beat);
                state.instances[index].links[CONTROL].send(call);
            }
            Action::Turn(index) => {
                let call = self.next_turn(state, index).unwrap_or_else(|| {
                    state.left.idle -= 1;
                    let instance = &state.instances[index];
                    let call = Self::call(instance, index, Script::Turn);
                    Call {
                        number: instance.next,
                        claims: instance.waiting(),
                        ..call
                    }
                });
                Self::send_turn(state, index, call);
            }
            Action::Sweep(index) => {
                let call = Self::call(&state.instances[index], index, Script::Scan);
                if !state.instances[index].sweep {
                    state.left.sweeps -= 1;
                }
                state.instances[index].sweep = false;
                state.instances[index].links[CLAIMS].send(call);
            }
            Action::SweepElsewhere(index) => {
                state.left.sweeps -= 1;
                let call = Self::call(&state.instances[index], index, Script::Scan);
                state.instances[index].links[CONTROL].send(call);
            }
            Action::Reap(index, dead, generation) => {
                let call = Self::call(&state.instances[index], index, Script::Reap);
                let call = Call {
                    whose: (dead as u8, generation as u8),
                    ..call
                };
                state.instances[index].links[CONTROL].send(call);
            }
            Action::Recover(index) => {
                let instance = &mut state.instances[index];
                let whose = instance.reaping.unwrap_or_default();
                let mut call = Self::call(instance, index, Script::Recover);
                call.whose = whose;
                call.acks[0] = instance.orphans[0];
                if self.is(Mutation::RecoverBlindly) {
                    let dead = &state.redis.identities[whose.0 as usize][whose.1 as usize];
                    if let Some(at) = find(&dead.tokens, call.acks[0]) {
                        call.payloads[0] = dead.jobs[at];
                    }
                }
                instance.links[CONTROL].send(call);
            }
            Action::Leave(index) => {
                let instance = &state.instances[index];
                if instance.registered {
                    let mut call = Self::call(instance, index, Script::Leave);
                    (call.acks, call.requeues, call.payloads) = (instance.acks, instance.requeues, instance.payloads);
                    state.instances[index].links[CLAIMS].send(call);
                } else {
                    Self::gone(state, index);
                }
            }
            Action::Run(index, link) => {
                let call = state.instances[index].links[link].call;
                let reply = self.run(state, &call);
                let link = &mut state.instances[index].links[link];
                (link.stage, link.reply) = (Stage::Run, reply);
            }
            Action::Answer(index, link) => self.answer(state, index, link),
            Action::Timeout(index, link) => {
                state.left.timeouts -= 1;
                self.timeout(state, index, link);
            }
            Action::Late(at) => {
                let call = take_copy(&mut state.copies, at);
                self.run(state, &call);
            }
            Action::Start(index, place) => Self::start(state, index, place),
            Action::Pop(index, place) => {
                if let Some(job) = state.redis.pop() {
                    state.instances[index].threads[place] = Thread {
                        phase: Phase::Popped,
                        job,
                        ..Thread::WAITING
                    };
                }
            }
            Action::Untracked(index, place) => {
                state.left.untracked -= 1;
                Self::start(state, index, place);
            }
            Action::Finish(index, place) => {
                let instance = &mut state.instances[index];
                let thread = instance.threads[place];
                instance.threads[place] = if instance.life == Life::Leaving {
                    Thread::GONE
                } else {
                    Thread::WAITING
                };
                let fits = thread.token == 0 || push(&mut instance.acks, thread.token);
                state.finished |= bit(thread.job);
                if !fits {
                    state.mark(slip::OUT_OF_BOUNDS);
                }
            }
            Action::Kill(index, place) => {
                let instance = &mut state.instances[index];
                let thread = &mut instance.threads[place];
                let killed = *thread;
                *thread = Thread::GONE;
                let fits = match killed.phase {
                    Phase::Lost => true,
                    _ if killed.token != 0 => push(&mut instance.requeues, killed.token),
                    _ if killed.asked != 0 => {
                        *thread = Thread {
                            phase: Phase::Killed,
                            ..killed
                        };
                        true
                    }
                    _ => push(&mut instance.payloads, killed.job),
                };
                if !fits {
                    state.mark(slip::OUT_OF_BOUNDS);
                }
            }
            Action::ThreadGone(index, place) => {
                state.left.gone -= 1;
                let instance = &mut state.instances[index];
                match instance.threads[place].phase {
                    Phase::Waiting => instance.threads[place] = Thread::GONE,
                    Phase::Got => {
                        push(&mut instance.requeues, instance.threads[place].token);
                        instance.threads[place] = Thread::WAITING;
                    }
                    _ => {
                        instance.threads[place] = Thread::WAITING;
                        instance.sweep = true;
                    }
                }
            }
            Action::Crash(index) => {
                state.left.crashes -= 1;
                self.die(state, index);
            }
            Action::Pause(index) => {
                state.left.pauses -= 1;
                state.instances[index].life = Life::Paused;
            }
            Action::Resume(index) => state.instances[index].life = Life::Running,
            Action::Cut(index) => {
                state.left.cuts -= 1;
                state.instances[index].cut = true;
            }
            Action::Heal(index) => state.instances[index].cut = false,
            Action::Shutdown(index) => {
                state.left.shutdowns -= 1;
                let instance = &mut state.instances[index];
                instance.life = Life::Leaving;
                for thread in &mut instance.threads {
                    match thread.phase {
                        Phase::Waiting => *thread = Thread::GONE,
                        Phase::Got => {
                            push(&mut instance.requeues, thread.token);
                            *thread = Thread::GONE;
                        }
                        Phase::Popped if thread.asked == 0 => {
                            push(&mut instance.payloads, thread.job);
                            *thread = Thread::GONE;
                        }
                        Phase::Popped => thread.phase = Phase::Killed,
                        _ => {}
                    }
                }
            }
            Action::Expire(index, generation) => {
                let identity = &state.redis.identities[index][generation];
                let whose = (index as u8, generation as u8);
                if identity.call == 0 && state.instances.iter().any(|reaper| reaper.recovers(whose)) {
                    state.left.slow -= 1;
                }
                Self::expire(state, index, generation);
            }
            Action::Older(writes) => self.older(state, writes),
            Action::Fork(index) => {
                state.left.forks -= 1;
                let instance = &state.instances[index];
                let mut call = Self::call(instance, index, Script::Leave);
                for thread in instance.threads {
                    if thread.token != 0 {
                        push(&mut call.requeues, thread.token);
                    }
                }
                self.run(state, &call);
            }
        }
        Self::forget_history(state);
        next
    }

    fn broken(&self, state: &State<N>) -> Option<&'static str> {
        let slips = [
            (slip::FALSE_LOST, "no false lease_lost"),
            (slip::STALE, "the outstanding turn is never stale"),
            (slip::TWO_RUN_IT, "no two threads run one job"),
            (slip::STARTED_WITHOUT_LEASE, "no job starts without a lease"),
            (slip::RAN_AFTER_ACK, "an acked job never runs again"),
            (slip::WRONG_ACK, "an ack removes no job but its own"),
            (slip::OUT_OF_BOUNDS, "the model stays within its bounds"),
        ];
        if state.slips != 0 {
            return slips
                .iter()
                .find(|(slip, _)| state.slips & slip != 0)
                .map(|(_, promise)| *promise);
        }
        let mut places = [0_u8; 4];
        let mut held = 0;
        for &job in &state.redis.queue {
            places[job as usize] += 1;
        }
        for (index, instance) in state.instances.iter().enumerate() {
            for identity in &state.redis.identities[index] {
                if identity.lease == Lease::None && (identity.call != 0 || identity.tokens[0] != 0) {
                    return Some("what is in flight is listed");
                }
                for &job in &identity.jobs {
                    places[job as usize] += 1;
                }
            }
            if !instance.lives() {
                continue;
            }
            if self.config.middleware {
                for thread in &instance.threads {
                    if thread.token == 0 || state.older {
                        held |= bit(thread.job);
                    }
                }
                for job in instance
                    .payloads
                    .into_iter()
                    .chain(instance.links[CLAIMS].call.payloads)
                {
                    held |= bit(job);
                }
            }
            let own = &state.redis.identities[index][instance.generation as usize];
            if own.call == 0 || state.older {
                continue;
            }
            for thread in &instance.threads {
                if thread.phase == Phase::Running && thread.token != 0 && !own.tokens.contains(&thread.token) {
                    return Some("a job that runs under a lease is in flight");
                }
            }
            if instance.links[CLAIMS].stage == Stage::Idle && !instance.sweep {
                for &token in &own.tokens {
                    if token != 0 && !instance.holds(token) && !instance.links[CONTROL].call.requeues.contains(&token) {
                        return Some("nothing is in flight that nobody holds");
                    }
                }
            }
        }
        for job in 1..=self.config.jobs {
            let (bit, places) = (bit(job), places[job as usize]);
            if places == 0 && (state.finished | state.stock | held) & bit == 0 {
                return Some("no job is lost");
            }
            if places > 1 && state.twice & bit == 0 && !(self.config.middleware && state.older) {
                return Some("no job is in two places");
            }
            if places > 0 && state.done & bit != 0 && state.twice & bit == 0 && !state.older {
                return Some("an acked job is gone");
            }
        }
        None
    }

    fn broken_at_rest(&self, state: &State<N>) -> Option<&'static str> {
        let all = (1..=self.config.jobs).map(bit).sum::<u8>();
        if (state.finished | state.stock) & all != all {
            return Some("at rest every job is done");
        }
        if state.redis.queue[0] != 0 {
            return Some("at rest the queue is empty");
        }
        for (index, instance) in state.instances.iter().enumerate() {
            for (generation, identity) in state.redis.identities[index].iter().enumerate() {
                if identity.tokens[0] != 0 {
                    return Some("at rest nothing is in flight");
                }
                let current = instance.lives() && instance.registered && instance.generation as usize == generation;
                if current != (identity.lease != Lease::None) || current != (identity.call != 0) {
                    return Some("at rest only the living are listed");
                }
            }
        }
        None
    }

    fn fingerprint(state: &State<N>) -> u64 {
        let mut mix = Mix::new();
        state.redis.mix(&mut mix);
        for instance in &state.instances {
            instance.mix(&mut mix);
        }
        for copy in &state.copies {
            let [a, b] = copy.words();
            mix.word(a);
            mix.word(b);
        }
        for older in &state.history[..state.remembered as usize] {
            older.mix(&mut mix);
        }
        let left = &state.left;
        let budgets = [
            left.crashes,
            left.pauses,
            left.cuts,
            left.timeouts,
            left.gone,
            left.shutdowns,
            left.rollbacks,
            left.idle,
            left.slow,
            left.beats,
            left.sweeps,
            left.untracked,
            left.forks,
        ];
        mix.word(budgets.into_iter().fold(u64::from(state.remembered), |word, budget| {
            word << 4 | u64::from(budget)
        }));
        let [low, high] = state.reaped.to_le_bytes();
        mix.word(u64::from_le_bytes([
            state.finished,
            state.done,
            state.twice,
            state.stock,
            low,
            high,
            u8::from(state.older),
            state.slips,
        ]));
        mix.finish()
    }
}

fn take_copy(copies: &mut [Call; COPIES], at: usize) -> Call {
    let call = copies[at];
    copies.copy_within(at + 1.., at);
    copies[COPIES - 1] = Call::NOTHING;
    call
}
