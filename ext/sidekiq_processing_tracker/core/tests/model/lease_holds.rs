//! No trouble that the protocol means to bear robs a live instance of its lease.

use crate::lease::{Config, Lease, Settings, ENDLESS};
use crate::search::search;

/// A lease of five steps, the shortest that settings allow.
const FIVE: Config = Config::CALM;
/// A lease of six steps, the default.
const SIX: Config = FIVE.steps(6);

fn holds(name: &str, config: Config, at_least: usize) {
    search(&Lease { config }).holds(name, at_least);
}

#[test]
fn outages() {
    holds(
        "5 steps, outage, a call lost",
        Config {
            outages: 1,
            drops: 1,
            ..FIVE
        },
        5_000,
    );
    holds(
        "5 steps, outage, two calls lost",
        Config {
            outages: 1,
            drops: 2,
            ..FIVE
        },
        10_000,
    );
    holds("6 steps, two outages", Config { outages: 2, ..SIX }, 5_000);
    holds("5 steps, three calls lost", Config { drops: 3, ..FIVE }, 1_000);
    holds(
        "6 steps, outage, clock set, a call lost",
        Config {
            outages: 1,
            jumps: 1,
            drops: 1,
            ..SIX
        },
        10_000,
    );
}

#[test]
fn the_server_clock_is_set() {
    holds("5 steps, clock set three times", Config { jumps: 3, ..FIVE }, 500);
    holds(
        "5 steps, outage, clock set",
        Config {
            outages: 1,
            jumps: 1,
            ..FIVE
        },
        5_000,
    );
}

#[test]
fn another_server() {
    holds(
        "5 steps, failover, a call lost",
        Config {
            failovers: 1,
            drops: 1,
            ..FIVE
        },
        5_000,
    );
    holds(
        "6 steps, failover, outage",
        Config {
            failovers: 1,
            outages: 1,
            ..SIX
        },
        20_000,
    );
}

/// Cut off, an instance may lose its lease, but hands no job to Ruby from then on.
#[test]
fn the_hand_over_of_an_instance_that_is_cut_off() {
    holds(
        "cut off, guard of ttl, outage",
        Config {
            cut: true,
            outages: 1,
            ..FIVE
        },
        20_000,
    );
    let guard = FIVE.guard - FIVE.settings[0].step;
    holds(
        "cut off, guard of ttl less a step, clock set",
        Config {
            cut: true,
            jumps: 1,
            guard,
            ..FIVE
        },
        20_000,
    );
}

/// A dead instance is reaped within its lease and one step of the others' beats.
#[test]
fn the_dead_are_reaped_in_time() {
    holds(
        "dead",
        Config {
            dies: true,
            reaped_within: 30 + 1,
            ..FIVE
        },
        1_000,
    );
    // A clock set back costs one step.
    holds(
        "dead, clock set",
        Config {
            dies: true,
            jumps: 1,
            reaped_within: 35 + 1,
            ..FIVE
        },
        10_000,
    );
}

/// Long steps, then short ones: a short lease is over before an instance with long steps beats again. Then a bit longer.
pub const SHORTER: [Settings; 3] = [
    Settings { step: 30, ttl: 150 },
    Settings { step: 5, ttl: 25 },
    Settings { step: 6, ttl: 30 },
];
/// Short steps, then long ones, then short ones.
pub const LONGER: [Settings; 3] = [
    Settings { step: 5, ttl: 25 },
    Settings { step: 30, ttl: 150 },
    Settings { step: 5, ttl: 25 },
];
/// Shorter by far, then longer by far: a lease of the first, less one of the second, is no more than a step of the last.
pub const BOTH_WAYS: [Settings; 3] = [
    Settings { step: 30, ttl: 150 },
    Settings { step: 5, ttl: 25 },
    Settings { step: 125, ttl: 625 },
];
/// Two settings, over and over.
pub const ALTERNATING: [Settings; 3] = [
    Settings { step: 5, ttl: 25 },
    Settings { step: 10, ttl: 50 },
    Settings { step: 5, ttl: 25 },
];

#[test]
fn another_instance_has_other_settings() {
    for (name, settings, changes) in [
        ("shorter", SHORTER, 2),
        ("longer", LONGER, 2),
        ("alternating", ALTERNATING, ENDLESS),
    ] {
        let config = Config {
            settings,
            changes,
            ..FIVE
        };
        holds(
            &format!("settings {name}, two calls lost"),
            Config { drops: 2, ..config },
            10_000,
        );
        holds(
            &format!("settings {name}, outage"),
            Config { outages: 1, ..config },
            10_000,
        );
    }
}

#[test]
#[ignore = "long: use --release"]
fn settings_both_ways() {
    let config = Config {
        settings: BOTH_WAYS,
        changes: 2,
        ..FIVE
    };
    holds(
        "settings shorter and longer, a call lost",
        Config { drops: 1, ..config },
        1_000_000,
    );
    holds(
        "settings shorter and longer, clock set",
        Config { jumps: 1, ..config },
        1_000_000,
    );
    holds(
        "settings shorter and longer, outage",
        Config { outages: 1, ..config },
        1_000_000,
    );
}

/// Whatever registers meanwhile, with whatever settings: within the longest lease and one step.
#[test]
fn the_dead_are_reaped_in_time_under_alternating_settings() {
    holds(
        "dead, settings alternating",
        Config {
            dies: true,
            settings: ALTERNATING,
            changes: ENDLESS,
            reaped_within: 55 + 1,
            ..FIVE
        },
        1_000,
    );
}
