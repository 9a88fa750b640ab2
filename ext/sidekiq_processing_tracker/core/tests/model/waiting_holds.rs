//! No push is missed, and nothing is hoarded.

use crate::search::search;
use crate::waiting::{Config, Mutation, Waiting};

const CALM: Config = Config::CALM;

fn holds(name: &str, config: Config, at_least: usize) {
    search(&Waiting { config }).holds(name, at_least);
}

fn breaks(mutation: Mutation, config: Config, promise: &str) {
    let config = Config { mutation, ..config };
    // One that looks again and again, and claims nothing, never rests.
    let promises = [promise, "left in peace, the system comes to rest"];
    search(&Waiting { config }).breaks(&format!("{mutation:?}"), &promises);
}

const MISSED: &str = "at rest nobody waits beside a queue with jobs";

#[test]
fn no_push_is_missed() {
    holds("2 pushes, others take 1", Config { others: 1, ..CALM }, 100_000);
}

#[test]
fn whoever_waits_and_goes() {
    holds("2 pushes, a wait ends", Config { timeouts: 1, ..CALM }, 10_000);
    let dies = Config {
        pushes: 1,
        deaths: 1,
        ..CALM
    };
    holds("a push, a thread dies", dies, 10_000);
    let one_crew = Config {
        threads: [3, 0],
        queues: [0b01, 0],
        pushes: 2,
        timeouts: 1,
        ..CALM
    };
    holds("3 threads, 2 pushes, a wait ends", one_crew, 10_000);
}

#[test]
fn whatever_breaks() {
    let config = Config {
        pushes: 1,
        breaks: 1,
        deaf: 1,
        ..CALM
    };
    holds("a push, the claims connection breaks, the other too", config, 10_000);
    holds(
        "2 pushes, the claims connection breaks",
        Config { breaks: 1, ..CALM },
        10_000,
    );
    holds(
        "2 pushes, the listening connection breaks",
        Config { deaf: 1, ..CALM },
        10_000,
    );
}

#[test]
#[ignore = "minutes: see the head of tests/model.rs"]
fn long() {
    let config = Config {
        threads: [2, 2],
        pushes: 3,
        others: 1,
        timeouts: 1,
        breaks: 1,
        deaf: 1,
        ..CALM
    };
    holds("4 threads, 3 pushes, everything once", config, 100_000);
    holds(
        "3 pushes, others take 2",
        Config {
            pushes: 3,
            others: 2,
            ..CALM
        },
        100_000,
    );
    holds("2 pushes, 2 waits end", Config { timeouts: 2, ..CALM }, 100_000);
}

#[test]
fn mistakes_are_found() {
    let one_crew = Config {
        threads: [3, 0],
        queues: [0b01, 0],
        pushes: 3,
        timeouts: 1,
        ..CALM
    };
    breaks(Mutation::FirstOnly, one_crew, MISSED);
    breaks(Mutation::NoNudge, one_crew, MISSED);
    breaks(Mutation::WatchWithoutLook, CALM, MISSED);
    breaks(Mutation::AlarmForgotten, CALM, MISSED);
    breaks(Mutation::NoHope, CALM, MISSED);
    breaks(Mutation::AnyListener, Config { deaf: 1, ..CALM }, MISSED);
    breaks(Mutation::AnyConnection, Config { breaks: 1, ..CALM }, MISSED);
    let ready = "at rest no job is ready beside a thread that waits";
    breaks(Mutation::NoChain, CALM, ready);
    let hoarded = "at rest nothing is hoarded";
    breaks(Mutation::NoGiveBack, Config { deaths: 1, ..CALM }, hoarded);
}
