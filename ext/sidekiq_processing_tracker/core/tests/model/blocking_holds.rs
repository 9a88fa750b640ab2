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
    holds("calm", CALM, 100);
    let config = Config {
        timeouts: 1,
        sweeps: 1,
        kills: 1,
        ..CALM
    };
    holds("a wait ends, the process is killed", config, 1_000);
    let config = Config {
        breaks: 1,
        timeouts: 1,
        sweeps: 1,
        ..CALM
    };
    holds("a connection breaks, a wait ends", config, 10_000);
    let config = Config {
        breaks: 1,
        kills: 1,
        expiries: 1,
        ..CALM
    };
    holds("a connection breaks, the process is killed", config, 1_000);
    let config = Config {
        breaks: 1,
        leaves: 1,
        expiries: 1,
        ..CALM
    };
    holds("a connection breaks, the process leaves", config, 10_000);
    let config = Config {
        breaks: 2,
        expiries: 1,
        ..CALM
    };
    holds("two connections break, a closed hand is forgotten", config, 10_000);
}

#[test]
fn nothing_is_lost_by_claims_that_outlive_their_lease() {
    let config = Config {
        breaks: 1,
        fences: 1,
        expiries: 1,
        ..CALM
    };
    holds(
        "a connection breaks, a lease is lost, a closed hand is forgotten",
        config,
        100_000,
    );
    let config = Config {
        breaks: 1,
        losses: 1,
        ..CALM
    };
    holds("a connection breaks, a lease is taken for lost", config, 10_000);
    let config = Config {
        timeouts: 1,
        fences: 1,
        leaves: 1,
        expiries: 1,
        ..CALM
    };
    holds("a lease is lost, the process leaves", config, 10_000);
}

#[test]
#[ignore = "long: use --release"]
fn long() {
    let two = Config { breaks: 2, ..CALM };
    let forgotten = Config { expiries: 1, ..two };
    let three = Config { breaks: 3, ..forgotten };
    holds("three breaks, a hand forgotten", three, 1_000_000);
    let lost = Config { losses: 1, ..forgotten };
    holds("two breaks, a hand forgotten, lease taken for lost", lost, 1_000_000);
    let leaves = Config {
        sweeps: 1,
        leaves: 1,
        ..forgotten
    };
    holds("two breaks, a hand forgotten, sweep, leaves", leaves, 1_000_000);
    let fenced = Config { fences: 1, ..forgotten };
    holds("two breaks, a hand forgotten, lease lost", fenced, 1_000_000);
    let fenced = Config {
        fences: 1,
        leaves: 1,
        ..two
    };
    holds("two breaks, lease lost, leaves", fenced, 1_000_000);
    let swept = Config {
        fences: 1,
        sweeps: 1,
        ..two
    };
    holds("two breaks, lease lost, sweep", swept, 1_000_000);
}

#[test]
fn mistakes_are_found() {
    let breaking = Config { breaks: 1, ..CALM };
    let fenced = Config { fences: 1, ..CALM };
    let leaving = Config { leaves: 1, ..CALM };
    let (rest, record) = ("at rest all is done", "what runs is on record");
    let (late, lease) = ("a late claim takes nothing", "without a lease nothing is claimed");
    breaks(Mutation::NothingHeld, Config { sweeps: 1, ..CALM }, &[record]);
    breaks(Mutation::NoOwing, breaking, &[rest]);
    breaks(Mutation::NoSearch, breaking, &[record]);
    breaks(Mutation::ProbesItsHand, breaking, &[record]);
    breaks(Mutation::OpenDoesNotClose, breaking, &[late]);
    breaks(Mutation::FenceDoesNotClose, fenced, &[lease]);
    breaks(Mutation::NoSeize, fenced, &["a job is in no hand that nobody looks at"]);
    breaks(Mutation::LostForGood, Config { fences: 1, ..breaking }, &[record]);
    let forgetful = Config {
        expiries: 1,
        ..breaking
    };
    breaks(Mutation::NoGuard, forgetful, &[late]);
    breaks(Mutation::NoGuard, Config { expiries: 1, ..fenced }, &[lease]);
    breaks(Mutation::SweepSeesNoHands, Config { breaks: 2, ..forgetful }, &[rest]);
    breaks(Mutation::NothingBack, leaving, &["who leaves leaves nothing behind"]);
    breaks(Mutation::LeaveDoesNotClose, leaving, &[lease]);
    breaks(Mutation::LeaveForgets, Config { leaves: 1, ..breaking }, &[record]);
}
