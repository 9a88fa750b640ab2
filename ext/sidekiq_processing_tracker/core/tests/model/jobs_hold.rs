//! Without mistakes, every promise holds in every state.

use crate::jobs::{Config, Jobs, State};
use crate::search::{search, Protocol};
use std::fmt::Debug;
use std::hash::{Hash, Hasher};

const CALM: Config = Config::CALM;
const MIDDLEWARE: Config = Config {
    middleware: true,
    ..CALM
};

fn holds<const N: usize>(name: &str, config: Config, at_least: usize) {
    let found = search(&Jobs::<N> { config });
    found.holds(name, at_least);
    assert!(found.at_rest > 0, "{name}: the system never comes to rest");
}

#[test]
fn calls_lost_and_late() {
    holds::<2>("two timeouts", Config { timeouts: 2, ..CALM }, 5_000);
    holds::<2>(
        "two threads, a claim of an empty queue, a timeout",
        Config {
            threads: 2,
            idle: 1,
            timeouts: 1,
            ..CALM
        },
        5_000,
    );
}

#[test]
fn a_crash() {
    holds::<2>(
        "crash, two timeouts",
        Config {
            crashes: 1,
            timeouts: 2,
            ..CALM
        },
        100_000,
    );
    holds::<2>(
        "crash, timeout, claims of an empty queue",
        Config {
            crashes: 1,
            timeouts: 1,
            idle: 1,
            ..CALM
        },
        50_000,
    );
}

#[test]
fn two_crashes_the_reaper_too() {
    holds::<3>(
        "3 instances, two crashes, a slow reaper",
        Config {
            jobs: 1,
            crashes: 2,
            slow: 1,
            ..CALM
        },
        200_000,
    );
}

#[test]
fn a_pause() {
    holds::<2>("pause, 2 jobs", Config { pauses: 1, ..CALM }, 30_000);
    holds::<2>(
        "pause, timeout, 1 job",
        Config {
            jobs: 1,
            pauses: 1,
            timeouts: 1,
            ..CALM
        },
        200_000,
    );
}

#[test]
fn a_pause_with_a_beat_on_its_way() {
    holds::<2>(
        "pause, beat on its way, 1 job",
        Config {
            jobs: 1,
            pauses: 1,
            beats: 1,
            ..CALM
        },
        10_000,
    );
}

#[test]
fn cut_off() {
    holds::<2>("cut off, 2 jobs", Config { cuts: 1, ..CALM }, 30_000);
}

#[test]
fn leaving() {
    holds::<2>(
        "shutdown, two timeouts",
        Config {
            shutdowns: 1,
            timeouts: 2,
            ..CALM
        },
        10_000,
    );
    holds::<2>(
        "shutdown, pause, 1 job",
        Config {
            jobs: 1,
            shutdowns: 1,
            pauses: 1,
            ..CALM
        },
        10_000,
    );
    holds::<2>(
        "shutdown, crash, timeout",
        Config {
            jobs: 1,
            shutdowns: 1,
            crashes: 1,
            timeouts: 1,
            ..CALM
        },
        1_000,
    );
}

#[test]
fn registering() {
    holds::<2>(
        "first registration, two timeouts",
        Config {
            boot: true,
            timeouts: 2,
            ..CALM
        },
        10_000,
    );
    holds::<2>(
        "first registration, pause, 1 job",
        Config {
            boot: true,
            jobs: 1,
            pauses: 1,
            ..CALM
        },
        5_000,
    );
}

#[test]
fn a_thread_gone() {
    holds::<2>(
        "thread gone, timeout",
        Config {
            gone: 1,
            timeouts: 1,
            ..CALM
        },
        10_000,
    );
    holds::<2>(
        "thread gone, crash",
        Config {
            gone: 1,
            crashes: 1,
            sweeps: 1,
            ..CALM
        },
        10_000,
    );
}

#[test]
fn redis_comes_back_older() {
    holds::<2>("last 1 to 3 writes lost", Config { rollbacks: 1, ..CALM }, 50_000);
    holds::<2>(
        "last 1 to 3 writes lost, crash, 1 job",
        Config {
            jobs: 1,
            rollbacks: 1,
            crashes: 1,
            ..CALM
        },
        10_000,
    );
    holds::<2>(
        "last 1 to 3 writes lost, shutdown, 1 job",
        Config {
            jobs: 1,
            rollbacks: 1,
            shutdowns: 1,
            ..CALM
        },
        1_000,
    );
}

#[test]
fn middleware() {
    holds::<2>(
        "middleware, crash, timeout, late record",
        Config {
            crashes: 1,
            timeouts: 1,
            untracked: 1,
            ..MIDDLEWARE
        },
        30_000,
    );
    holds::<2>(
        "middleware, pause",
        Config {
            pauses: 1,
            ..MIDDLEWARE
        },
        30_000,
    );
    holds::<2>(
        "middleware, pause, late record, 1 job",
        Config {
            jobs: 1,
            pauses: 1,
            untracked: 1,
            ..MIDDLEWARE
        },
        2_000,
    );
    holds::<2>(
        "middleware, shutdown, timeout, late record",
        Config {
            shutdowns: 1,
            timeouts: 1,
            untracked: 1,
            ..MIDDLEWARE
        },
        20_000,
    );
    holds::<2>(
        "middleware, thread gone, timeout",
        Config {
            gone: 1,
            timeouts: 1,
            ..MIDDLEWARE
        },
        10_000,
    );
    holds::<2>(
        "middleware, last 1 to 3 writes lost",
        Config {
            rollbacks: 1,
            ..MIDDLEWARE
        },
        50_000,
    );
}

#[test]
#[ignore = "minutes: see the head of tests/model.rs"]
fn long() {
    holds::<2>(
        "crash, pause, timeout, 1 job",
        Config {
            jobs: 1,
            crashes: 1,
            pauses: 1,
            timeouts: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "pause, two timeouts, 1 job",
        Config {
            jobs: 1,
            pauses: 1,
            timeouts: 2,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "pause, timeout, 2 jobs",
        Config {
            pauses: 1,
            timeouts: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "cut off, timeout, 2 jobs",
        Config {
            cuts: 1,
            timeouts: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "two pauses, a beat on its way, 1 job",
        Config {
            jobs: 1,
            pauses: 2,
            beats: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "2 threads, 3 jobs, pause",
        Config {
            jobs: 3,
            threads: 2,
            pauses: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "2 threads, thread gone, crash, two timeouts",
        Config {
            threads: 2,
            gone: 1,
            crashes: 1,
            timeouts: 2,
            ..CALM
        },
        800_000,
    );
    holds::<3>(
        "3 instances, two crashes, timeout",
        Config {
            crashes: 2,
            timeouts: 1,
            ..CALM
        },
        800_000,
    );
    holds::<2>(
        "last 1 to 3 writes lost, pause, 1 job",
        Config {
            jobs: 1,
            rollbacks: 1,
            pauses: 1,
            ..CALM
        },
        300_000,
    );
    holds::<2>(
        "last 1 to 3 writes lost, timeout",
        Config {
            rollbacks: 1,
            timeouts: 1,
            ..CALM
        },
        300_000,
    );
    holds::<2>(
        "middleware, pause, timeout, late record",
        Config {
            pauses: 1,
            timeouts: 1,
            untracked: 1,
            ..MIDDLEWARE
        },
        800_000,
    );
}

/// The same model, shown to stateright. It stands for any state by the model's own fingerprint.
struct Shown(Jobs<2>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ShownState(State<2>);

impl Hash for ShownState {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hasher.write_u64(Jobs::<2>::fingerprint(&self.0));
    }
}

impl stateright::Model for Shown {
    type State = ShownState;
    type Action = crate::jobs::Action;

    fn init_states(&self) -> Vec<ShownState> {
        vec![ShownState(self.0.init())]
    }

    fn actions(&self, state: &ShownState, actions: &mut Vec<Self::Action>) {
        self.0.progress(&state.0, actions);
        self.0.faults(&state.0, actions);
    }

    fn next_state(&self, state: &ShownState, action: Self::Action) -> Option<ShownState> {
        Some(ShownState(self.0.next(&state.0, action)))
    }

    fn properties(&self) -> Vec<stateright::Property<Self>> {
        vec![stateright::Property::always(
            "every promise",
            |model: &Self, state: &ShownState| model.0.broken(&state.0).is_none(),
        )]
    }
}

#[test]
fn the_search_agrees_with_stateright() {
    use stateright::{Checker, Model};
    let model = Jobs {
        config: Config {
            crashes: 1,
            timeouts: 1,
            jobs: 1,
            ..CALM
        },
    };
    let ours = search(&model);
    ours.holds("crash, timeout, 1 job, as stateright sees it", 1_000);
    let theirs = Shown(model).checker().spawn_bfs().join();
    theirs.assert_properties();
    assert_eq!(theirs.unique_state_count(), ours.states);
}
