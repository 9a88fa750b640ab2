//! No job is lost, run twice or left by claims that wait in Redis.

use crate::blocking::{Blocking, Config, Mutation};
use crate::search::search;

const CALM: Config = Config::CALM;

fn holds(name: &str, config: Config, at_least: usize) {
    search(&Blocking { config }).holds(name, at_least);
}

fn breaks(mutation: Mutation, config: Config, promises: &[&str]) {
    let config = Config { mutation, ..config };
    search(&Blocking { config }).breaks(&format!("{mutation:?}"), promises);
}

#[test]
fn nothing_is_lost_by_claims_that_wait() {
    holds("calm", CALM, 50);
    let config = Config {
        breaks: 1,
        timeouts: 1,
        sweeps: 1,
        ..CALM
    };
    holds("a connection breaks, a wait ends", config, 1_000);
    let config = Config {
        breaks: 1,
        fences: 1,
        ..CALM
    };
    holds("a connection breaks, a lease is lost", config, 1_000);
    let config = Config {
        breaks: 1,
        kills: 1,
        ..CALM
    };
    holds("a connection breaks, a process is killed", config, 1_000);
    let config = Config {
        breaks: 1,
        leaves: 1,
        ..CALM
    };
    holds("a connection breaks, a process leaves", config, 1_000);
}

#[test]
fn mistakes_are_found() {
    let breaking = Config { breaks: 1, ..CALM };
    let sweeping = Config { sweeps: 1, ..CALM };
    let rest = "at rest all is done";
    breaks(Mutation::NothingHeld, sweeping, &["what runs is on record", rest]);
    breaks(Mutation::NoGather, breaking, &[rest]);
    breaks(Mutation::NoSweep, breaking, &[rest]);
    breaks(Mutation::NoSpend, breaking, &["a late claim takes nothing"]);
    let fenced = Config { fences: 1, ..CALM };
    breaks(
        Mutation::TakesWithoutLease,
        fenced,
        &["without a lease nothing is claimed"],
    );
    let leaving = Config { leaves: 1, ..CALM };
    breaks(Mutation::NothingBack, leaving, &["a job is in one place"]);
}
