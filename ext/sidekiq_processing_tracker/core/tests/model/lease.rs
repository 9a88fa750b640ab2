//! The lease clock: outages, refusals, lost answers, failovers, server clocks set forward and back, other settings.
//!
//! Time goes in ticks, a fifth of the smallest step. One living instance is followed, `it`; all the others together are
//! whoever moves the clock and reaps at the worst moment. Assumed of a Redis that is up: a call arrives within a tick
//! and its answer within another.
//!
//! A Redis that refuses writes (memory, disk, replicas) is a case of [`Redis::Down`]: no script runs, and the caller may
//! learn so at once.

use crate::search::{Mix, Protocol};

/// Step and lease of a namespace, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The most that the clock moves at once.
    pub step: u8,
    /// How long a lease is.
    pub ttl: i16,
}

/// What a registration with other settings does to the leases that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// Nothing.
    Stay,
    /// They end at `now` + the new ttl.
    Anew,
    /// The same, but none ends earlier than before.
    Lengthened,
}

/// How long the clock goes on in the shorter steps after the step has grown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clamp {
    /// Until the last lease that runs is over.
    LastLease,
    /// For the ttl that held until now.
    OldTtl,
    /// Not at all.
    No,
}

/// So many registrations with other settings as there may be.
pub const ENDLESS: u8 = u8::MAX;

/// What there is, what may go wrong, and what is done wrongly on purpose.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The settings that there are. The first hold at the start, for all; each registration goes on to the next.
    pub settings: [Settings; 3],
    /// Times that Redis is stopped, down or refuses.
    pub outages: u8,
    /// Times that the server's clock is set, forward or back.
    pub jumps: u8,
    /// Calls or answers lost on the way.
    pub drops: u8,
    /// Failovers to a server that is older, with a clock of its own.
    pub failovers: u8,
    /// Registrations with other settings, or [`ENDLESS`].
    pub changes: u8,
    /// `it` may be cut off, for ever.
    pub cut: bool,
    /// `it` dies at some moment; the others beat or register every step, the smallest there is.
    pub dies: bool,
    /// The clock is moved by all the server time that has passed.
    pub no_clamp: bool,
    /// A server clock set back leaves `seen` in the future.
    pub seen_stays: bool,
    /// What a registration with other settings does to the leases that run.
    pub running: Running,
    /// What it does to the clock, when the step grows.
    pub clamp: Clamp,
    /// A beat is given the greater of the namespace's ttl and the one that the sender works by.
    pub beat_says_ttl: bool,
    /// A job is handed to Ruby while the last answered beat was sent less than this ago.
    pub guard: u8,
    /// Ticks after its death in which `it` must be reaped.
    pub reaped_within: u8,
}

impl Config {
    /// A step of five ticks, a lease of five steps (the shortest there is), and nothing goes wrong.
    pub const CALM: Self = Self {
        settings: [Settings { step: 5, ttl: 25 }; 3],
        outages: 0,
        jumps: 0,
        drops: 0,
        failovers: 0,
        changes: 0,
        cut: false,
        dies: false,
        no_clamp: false,
        seen_stays: false,
        running: Running::Stay,
        clamp: Clamp::LastLease,
        beat_says_ttl: true,
        guard: 25,
        reaped_within: 0,
    };

    /// The same with leases of that many steps.
    pub const fn steps(self, steps: i16) -> Self {
        Self {
            settings: [Settings {
                step: 5,
                ttl: 5 * steps,
            }; 3],
            ..self
        }
    }
}

/// The lease clock and one instance that lives by it.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// What there is and what may go wrong.
    pub config: Config,
}

/// Far more than any lease.
const LONG: i16 = 250;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Redis {
    Up,
    /// Nothing arrives, and what is under way is lost.
    Down,
    /// Nothing runs, but what has arrived waits.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Call {
    None,
    Sent,
    Run,
    /// Lost, or its answer is; the sender does not know yet.
    Dead,
}

/// What Redis has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stored {
    /// From the clock's `now` to the end of the lease.
    remains: i16,
    /// From the clock's `seen` to the server's time.
    unseen: i16,
    /// Which settings hold.
    settings: u8,
    /// The most that the clock moves at once until `clamp_remains` is 0.
    clamp: u8,
    /// From the clock's `now` to the end of the clamp.
    clamp_remains: i16,
}

/// Everything there is at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    redis: Redis,
    stored: Stored,
    /// What a replica has, once a failover may come.
    replica: Option<Stored>,
    /// The beat under way.
    call: Call,
    /// Ticks for which a Redis that is up has had it.
    lag: u8,
    /// The settings it was answered.
    answered: u8,
    /// The settings it works by.
    knows: u8,
    /// Since the last beat was sent.
    since_sent: u8,
    /// Beats that failed in a row, two at most.
    failed: u8,
    /// Since the last answered beat was sent.
    age: u8,
    cut: bool,
    /// Ticks since it died, plus one.
    dead: u8,
    /// Since one of the others beat.
    others: u8,
    outages: u8,
    jumps: u8,
    drops: u8,
    failovers: u8,
    changes: u8,
    reaped: bool,
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A fifth of a step goes by.
    Tick,
    /// It sends a beat.
    Send,
    /// Redis runs the beat.
    Run,
    /// The answer arrives.
    Answer,
    /// It learns that the beat failed, or stops waiting.
    Fail,
    /// Another instance beats, or reaps what is due.
    Others,
    /// Another instance registers with the next settings.
    Change,
    /// Redis stops running anything.
    Down,
    /// Redis is stopped (SIGSTOP).
    Stop,
    /// Redis is back.
    Up,
    /// The server's clock is set far forward.
    Forward,
    /// The server's clock is set far back.
    Back,
    /// The call or its answer is lost.
    Drop,
    /// From here on the replica gets no more writes.
    Lag,
    /// The replica takes over; its clock is far ahead, or far behind.
    Failover(bool),
    /// Nothing gets through to it or from it any more.
    Cut,
    /// It dies.
    Die,
}

impl Lease {
    fn settings(&self, which: u8) -> Settings {
        self.config.settings[which as usize]
    }

    /// The most that the clock moves at once.
    fn most(&self, stored: &Stored) -> u8 {
        let step = self.settings(stored.settings).step;
        if stored.clamp_remains > 0 {
            step.min(stored.clamp)
        } else {
            step
        }
    }

    /// What every beat, reap and registration begins with.
    fn move_clock(&self, stored: &mut Stored) {
        if stored.unseen < 0 && self.config.seen_stays {
            return;
        }
        let mut passed = stored.unseen.max(0);
        if !self.config.no_clamp {
            passed = passed.min(self.most(stored).into());
        }
        stored.remains = (stored.remains - passed).max(0);
        stored.clamp_remains = (stored.clamp_remains - passed).max(0);
        stored.unseen = 0;
    }

    fn reap_if_due(state: &mut State) {
        state.reaped |= state.stored.remains == 0;
    }

    fn change(&self, state: &mut State) {
        let stored = &mut state.stored;
        self.move_clock(stored);
        if stored.remains == 0 {
            return;
        }
        let most = self.most(stored);
        let old = self.settings(stored.settings);
        stored.settings = (stored.settings + 1) % 3;
        let new = self.settings(stored.settings);
        if new != old {
            let until = match self.config.clamp {
                Clamp::LastLease => stored.remains,
                Clamp::OldTtl => old.ttl,
                Clamp::No => 0,
            };
            (stored.clamp, stored.clamp_remains) = if new.step > most { (most, until) } else { (0, 0) };
            stored.remains = match self.config.running {
                Running::Stay => stored.remains,
                Running::Anew => new.ttl,
                Running::Lengthened => new.ttl.max(stored.remains),
            };
        }
    }

    /// The control link waits 0.6 steps for an answer.
    fn timeout(&self, state: &State) -> u8 {
        let step = self.settings(state.knows).step;
        step - step / 5 * 2
    }

    fn wait(&self, state: &State) -> u8 {
        let step = self.settings(state.knows).step;
        match state.failed {
            0 => step,
            1 => 0,
            _ => step / 5,
        }
    }
}

impl Protocol for Lease {
    type State = State;
    type Action = Action;

    fn init(&self) -> State {
        let config = &self.config;
        State {
            redis: Redis::Up,
            stored: Stored {
                remains: config.settings[0].ttl,
                unseen: 0,
                settings: 0,
                clamp: 0,
                clamp_remains: 0,
            },
            replica: None,
            call: Call::None,
            lag: 0,
            answered: 0,
            knows: 0,
            since_sent: 0,
            failed: 0,
            age: 0,
            cut: false,
            dead: 0,
            others: 0,
            outages: config.outages,
            jumps: config.jumps,
            drops: config.drops,
            failovers: config.failovers,
            changes: config.changes,
            reaped: false,
        }
    }

    fn progress(&self, state: &State, into: &mut Vec<Action>) {
        if state.reaped {
            return;
        }
        let step = self.settings(state.knows).step;
        let timeout = self.timeout(state);
        let up = state.redis == Redis::Up;
        // What must happen before the next tick.
        let smallest = self.config.settings.iter().map(|settings| settings.step).min();
        let mut urgent = self.config.dies && up && Some(state.others) >= smallest;
        if state.dead == 0 {
            match state.call {
                Call::None => {
                    let wait = self.wait(state);
                    urgent |= state.since_sent >= wait;
                    // A beat comes after 0.8 to 1.0 steps; the pauses after failures are exact.
                    let earliest = if state.failed == 0 { step - step / 5 } else { wait };
                    if state.since_sent >= earliest {
                        into.push(Action::Send);
                    }
                }
                Call::Sent | Call::Run => {
                    urgent |= up && state.lag >= 1 || state.since_sent >= timeout;
                    if up && state.call == Call::Sent {
                        into.push(Action::Run);
                    } else if state.call == Call::Run && !state.cut {
                        into.push(Action::Answer);
                    }
                    // Only a Redis that is stopped, or a network that is gone, outlasts the timeout.
                    if state.since_sent >= timeout {
                        into.push(Action::Fail);
                    }
                    if state.drops > 0 {
                        into.push(Action::Drop);
                    }
                }
                Call::Dead => {
                    urgent |= state.since_sent >= timeout;
                    into.push(Action::Fail);
                }
            }
        }
        if !urgent {
            into.push(Action::Tick);
        }
        if up && (state.stored.unseen != 0 || state.stored.remains == 0 || self.config.dies) {
            into.push(Action::Others);
        }
        if !up {
            into.push(Action::Up);
        }
    }

    fn faults(&self, state: &State, into: &mut Vec<Action>) {
        if state.reaped {
            return;
        }
        let up = state.redis == Redis::Up;
        if up && state.outages > 0 {
            into.extend([Action::Down, Action::Stop]);
        }
        if state.jumps > 0 {
            into.extend([Action::Forward, Action::Back]);
        }
        if up && state.failovers > 0 {
            match state.replica {
                None => into.push(Action::Lag),
                Some(_) => into.extend([Action::Failover(true), Action::Failover(false)]),
            }
        }
        if up && state.changes > 0 {
            into.push(Action::Change);
        }
        if self.config.cut && !state.cut {
            into.push(Action::Cut);
        }
        if self.config.dies && state.dead == 0 {
            into.push(Action::Die);
        }
    }

    fn next(&self, state: &State, action: Action) -> State {
        let mut next = *state;
        let state = &mut next;
        match action {
            Action::Tick => {
                let stored = &mut state.stored;
                // More than the clock can move at once says no more, unless nothing clamps it.
                let most = if self.config.no_clamp {
                    LONG
                } else {
                    self.most(stored).into()
                };
                // A clock set back stays so for longer than nobody looks at it.
                if stored.unseen >= 0 || self.config.seen_stays {
                    stored.unseen = (stored.unseen + 1).min(most);
                }
                if let Some(replica) = &mut state.replica {
                    replica.unseen = 0;
                }
                state.since_sent = (state.since_sent + 1).min(LONG as u8);
                state.age = if self.config.cut {
                    (state.age + 1).min(self.config.guard)
                } else {
                    0
                };
                state.others = if self.config.dies {
                    (state.others + 1).min(LONG as u8)
                } else {
                    0
                };
                if state.dead > 0 {
                    state.dead = (state.dead + 1).min(LONG as u8);
                }
                if state.redis == Redis::Up && matches!(state.call, Call::Sent | Call::Run) {
                    state.lag += 1;
                }
            }
            Action::Send => {
                let reaches = state.redis != Redis::Down && !state.cut;
                state.call = if reaches { Call::Sent } else { Call::Dead };
                (state.lag, state.since_sent) = (0, 0);
            }
            Action::Run => {
                self.move_clock(&mut state.stored);
                let mut ttl = self.settings(state.stored.settings).ttl;
                if self.config.beat_says_ttl {
                    ttl = ttl.max(self.settings(state.knows).ttl);
                }
                state.stored.remains = ttl;
                (state.call, state.lag, state.answered) = (Call::Run, 0, state.stored.settings);
            }
            Action::Answer => {
                (state.call, state.lag, state.failed) = (Call::None, 0, 0);
                state.knows = state.answered;
                state.age = if self.config.cut { state.since_sent } else { 0 };
            }
            Action::Fail => {
                (state.call, state.lag) = (Call::None, 0);
                state.failed = (state.failed + 1).min(2);
                // The pause after a failure begins now.
                state.since_sent = 0;
            }
            Action::Others => {
                self.move_clock(&mut state.stored);
                state.others = 0;
                Self::reap_if_due(state);
            }
            Action::Change => {
                state.changes -= u8::from(state.changes != ENDLESS);
                state.others = 0;
                self.change(state);
                Self::reap_if_due(state);
            }
            Action::Down => {
                state.outages -= 1;
                state.redis = Redis::Down;
                if state.call != Call::None {
                    state.call = Call::Dead;
                }
            }
            Action::Stop => {
                state.outages -= 1;
                state.redis = Redis::Stopped;
            }
            Action::Up => state.redis = Redis::Up,
            Action::Forward => {
                state.jumps -= 1;
                state.stored.unseen = LONG;
            }
            Action::Back => {
                state.jumps -= 1;
                state.stored.unseen = -LONG;
            }
            Action::Drop => {
                state.drops -= 1;
                state.call = Call::Dead;
            }
            Action::Lag => state.replica = Some(state.stored),
            Action::Failover(ahead) => {
                state.failovers -= 1;
                if let Some(replica) = state.replica.take() {
                    state.stored = Stored {
                        unseen: if ahead { LONG } else { -LONG },
                        ..replica
                    };
                }
                if state.call != Call::None {
                    state.call = Call::Dead;
                }
            }
            Action::Cut => {
                state.cut = true;
                if state.call != Call::None {
                    state.call = Call::Dead;
                }
            }
            Action::Die => {
                state.dead = 1;
                state.call = Call::None;
            }
        }
        next
    }

    fn broken(&self, state: &State) -> Option<&'static str> {
        if state.reaped && state.dead == 0 && !state.cut {
            return Some("a live instance is never robbed");
        }
        if state.reaped && state.cut && state.age < self.config.guard {
            return Some("no job is handed over when the lease is gone");
        }
        if self.config.reaped_within > 0 && !state.reaped && state.dead > self.config.reaped_within {
            return Some("a dead instance is reaped in time");
        }
        None
    }

    fn broken_at_rest(&self, state: &State) -> Option<&'static str> {
        (!state.reaped).then_some("time goes on")
    }

    fn rests(&self) -> bool {
        false
    }

    fn fingerprint(state: &State) -> u64 {
        let mut mix = Mix::new();
        let stored = |stored: &Stored| {
            let [a, b] = stored.remains.to_le_bytes();
            let [c, d] = stored.unseen.to_le_bytes();
            let [e, f] = stored.clamp_remains.to_le_bytes();
            u64::from_le_bytes([a, b, c, d, stored.settings + 1, stored.clamp, e, f])
        };
        mix.word(stored(&state.stored));
        mix.word(state.replica.as_ref().map_or(0, stored));
        let flags = u8::from(state.cut) | u8::from(state.reaped) << 1 | state.answered << 2 | state.knows << 4;
        mix.word(u64::from_le_bytes([
            state.redis as u8,
            state.call as u8,
            state.lag,
            flags,
            state.since_sent,
            state.failed,
            state.age,
            state.dead,
        ]));
        mix.word(u64::from_le_bytes([
            state.others,
            state.outages,
            state.jumps,
            state.drops,
            state.failovers,
            state.changes,
            0,
            0,
        ]));
        mix.finish()
    }
}
