//! A breadth-first search over explicit states, small and quick enough for an unoptimised test build.
//!
//! It keeps nothing but a table of fingerprints and an array of parents. `stateright` has no word for rest: here
//! *progress* and *faults* are told apart, so the search sees when a system has nothing left to do, and checks what must
//! then be true. That both visit the same states is a test (`the_search_agrees_with_stateright`).

use std::fmt::Debug;
use std::time::Instant;

/// What the search needs to know of a model.
pub trait Protocol {
    /// One state, plain data.
    type State: Copy;
    /// One step.
    type Action: Copy + Debug;
    /// The state everything starts from.
    fn init(&self) -> Self::State;
    /// Steps that the system itself takes. Where there is none, it is at rest.
    fn progress(&self, state: &Self::State, into: &mut Vec<Self::Action>);
    /// Steps that an unkind world may take, or not.
    fn faults(&self, state: &Self::State, into: &mut Vec<Self::Action>);
    /// The state after a step.
    fn next(&self, state: &Self::State, action: Self::Action) -> Self::State;
    /// The name of a promise that is broken in this state.
    fn broken(&self, state: &Self::State) -> Option<&'static str>;
    /// The name of a promise that is broken when the system has come to rest like this.
    fn broken_at_rest(&self, state: &Self::State) -> Option<&'static str>;
    /// False when time alone goes on for ever.
    fn rests(&self) -> bool {
        true
    }
    /// 64 bits that stand for the state.
    fn fingerprint(state: &Self::State) -> u64;
}

/// A promise that does not hold, and the shortest way there.
pub struct Violation<A> {
    /// The name of the promise.
    pub promise: &'static str,
    /// The steps from the start.
    pub trace: Vec<A>,
}

/// What a search found.
pub struct Outcome<A> {
    /// Different states seen.
    pub states: usize,
    /// States in which the system was at rest.
    pub at_rest: usize,
    /// Steps to the farthest state.
    pub depth: usize,
    /// How long it took.
    pub seconds: f64,
    /// The first violation, if there was one. The search ends there.
    pub violation: Option<Violation<A>>,
}

/// Fingerprints seen, in open addressing: std's hash set is slow without optimisation.
struct Seen {
    slots: Vec<u64>,
    mask: usize,
    len: usize,
}

impl Seen {
    fn new() -> Self {
        let size = 1 << 16;
        Self {
            slots: vec![0; size],
            mask: size - 1,
            len: 0,
        }
    }

    /// True when the fingerprint is new.
    fn insert(&mut self, fingerprint: u64) -> bool {
        let fingerprint = fingerprint.max(1);
        let mut at = (fingerprint as usize) & self.mask;
        loop {
            let slot = self.slots[at];
            if slot == fingerprint {
                return false;
            }
            if slot == 0 {
                break;
            }
            at = (at + 1) & self.mask;
        }
        self.slots[at] = fingerprint;
        self.len += 1;
        if self.len * 2 > self.slots.len() {
            self.grow();
        }
        true
    }

    fn grow(&mut self) {
        let size = self.slots.len() * 4;
        let old = std::mem::replace(&mut self.slots, vec![0; size]);
        self.mask = size - 1;
        for fingerprint in old {
            if fingerprint == 0 {
                continue;
            }
            let mut at = (fingerprint as usize) & self.mask;
            while self.slots[at] != 0 {
                at = (at + 1) & self.mask;
            }
            self.slots[at] = fingerprint;
        }
    }
}

impl<A: Debug> Outcome<A> {
    /// Prints what was searched, and fails when a promise is broken or when the search saw less than it must.
    pub fn holds(&self, name: &str, at_least: usize) {
        self.print(name);
        if let Some(violation) = &self.violation {
            panic!("{name}: {} is broken:\n{}", violation.promise, violation.steps());
        }
        assert!(
            self.states >= at_least,
            "{name}: only {} states, {at_least} or more were expected",
            self.states
        );
    }

    /// Prints what was searched, and fails unless one of those promises is broken.
    pub fn breaks(&self, name: &str, promises: &[&str]) {
        self.print(name);
        let Some(violation) = &self.violation else {
            panic!("{name}: not found in {} states", self.states);
        };
        println!("  breaks `{}` in {} steps", violation.promise, violation.trace.len());
        assert!(
            promises.contains(&violation.promise),
            "{name}: found by `{}`:\n{}",
            violation.promise,
            violation.steps()
        );
    }

    fn print(&self, name: &str) {
        let (states, depth, rest, seconds) = (self.states, self.depth, self.at_rest, self.seconds);
        println!("{name}: {states} states, {depth} deep, {rest} at rest, {seconds:.2} s");
    }
}

impl<A: Debug> Violation<A> {
    fn steps(&self) -> String {
        self.trace.iter().map(|step| format!("  {step:?}\n")).collect()
    }
}

/// Visits every reachable state, or stops at the first broken promise.
pub fn search<P: Protocol>(model: &P) -> Outcome<P::Action> {
    let start = Instant::now();
    let mut seen = Seen::new();
    // Of each state, in the order found: its parent and the step that led here.
    let mut parents: Vec<(u32, Option<P::Action>)> = vec![(0, None)];
    let init = model.init();
    seen.insert(P::fingerprint(&init));
    let mut level = vec![(init, 0_u32)];
    let (mut at_rest, mut depth) = (0, 0);
    let mut violation = model.broken(&init).map(|promise| (promise, 0_u32));
    let mut actions = Vec::new();
    while !level.is_empty() && violation.is_none() {
        let mut following = Vec::new();
        'level: for (state, index) in &level {
            actions.clear();
            model.progress(state, &mut actions);
            if actions.is_empty() {
                at_rest += 1;
                if let Some(promise) = model.broken_at_rest(state) {
                    violation = Some((promise, *index));
                    break 'level;
                }
            }
            if *index % SAMPLE == 0 && !comes_to_rest(model, *state) {
                violation = Some(("left in peace, the system comes to rest", *index));
                break 'level;
            }
            model.faults(state, &mut actions);
            for action in &actions {
                let next = model.next(state, *action);
                if !seen.insert(P::fingerprint(&next)) {
                    continue;
                }
                let number = u32::try_from(parents.len()).expect("fewer than 2^32 states");
                parents.push((*index, Some(*action)));
                if let Some(promise) = model.broken(&next) {
                    violation = Some((promise, number));
                    break 'level;
                }
                following.push((next, number));
            }
        }
        depth += usize::from(!following.is_empty());
        level = following;
    }
    Outcome {
        states: seen.len,
        at_rest,
        depth,
        seconds: start.elapsed().as_secs_f64(),
        violation: violation.map(|(promise, index)| Violation {
            promise,
            trace: trace(&parents, index),
        }),
    }
}

/// Of so many states one is followed, without further trouble and each step in its turn, until nothing is left to do.
const SAMPLE: u32 = 97;
/// Steps in which the system must have come to rest.
const PATIENCE: usize = 600;

fn comes_to_rest<P: Protocol>(model: &P, mut state: P::State) -> bool {
    if !model.rests() {
        return true;
    }
    let mut actions = Vec::new();
    for step in 0..PATIENCE {
        actions.clear();
        model.progress(&state, &mut actions);
        if actions.is_empty() {
            return true;
        }
        state = model.next(&state, actions[step % actions.len()]);
    }
    false
}

fn trace<A: Copy>(parents: &[(u32, Option<A>)], mut index: u32) -> Vec<A> {
    let mut steps = Vec::new();
    while let (parent, Some(action)) = parents[index as usize] {
        steps.push(action);
        index = parent;
    }
    steps.reverse();
    steps
}

/// Mixes words into a fingerprint.
pub struct Mix(u64);

impl Mix {
    /// An empty one.
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// Takes one word in.
    pub fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0xe703_7ed1_a0b4_28db);
        self.0 = (mixed ^ (mixed >> 32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    /// The fingerprint.
    pub fn finish(mut self) -> u64 {
        self.word(0x8ebc_6af0_9c88_c6e3);
        self.0
    }
}
