//! Mistakes, each of which the models must find. What is listed first stands in the protocol's history; the rest is to
//! know that no rule of the text is there in vain.

use crate::jobs::{Config, Jobs, Mutation};
use crate::lease::{self, Clamp, Lease, Running};
use crate::lease_holds::{ALTERNATING, BOTH_WAYS, LONGER, SHORTER};
use crate::search::search;

const CALM: Config = Config::CALM;

fn breaks(mutation: Mutation, config: Config, promises: &[&str]) {
    let config = Config { mutation, ..config };
    search(&Jobs::<2> { config }).breaks(&format!("{mutation:?}"), promises);
}

fn lease_breaks(name: &str, config: lease::Config, promise: &str) {
    search(&Lease { config }).breaks(name, &[promise]);
}

const LOST: &str = "no job is lost";
const LEAKED: &str = "nothing is in flight that nobody holds";
const ROBBED: &str = "a live instance is never robbed";

#[test]
fn no_numbering() {
    breaks(Mutation::NoNumbering, Config { timeouts: 1, ..CALM }, &[LOST]);
}

#[test]
fn no_fence() {
    breaks(
        Mutation::NoFence,
        Config { pauses: 1, ..CALM },
        &["what is in flight is listed"],
    );
}

#[test]
fn number_not_stored_for_an_empty_claim() {
    breaks(
        Mutation::EmptyNotStored,
        Config {
            timeouts: 1,
            crashes: 1,
            ..CALM
        },
        &[LEAKED],
    );
}

#[test]
fn sweep_on_another_connection() {
    breaks(
        Mutation::SweepElsewhere,
        Config { sweeps: 1, ..CALM },
        &["a job that runs under a lease is in flight"],
    );
}

#[test]
fn no_sweep_after_lost_writes() {
    breaks(
        Mutation::NoSweep,
        Config { rollbacks: 1, ..CALM },
        &["at rest nothing is in flight"],
    );
}

#[test]
fn no_pid_check() {
    breaks(
        Mutation::NoPidCheck,
        Config { forks: 1, ..CALM },
        &["no false lease_lost"],
    );
}

#[test]
fn register_sent_twice_with_one_nonce() {
    breaks(
        Mutation::RegisterTwice,
        Config {
            boot: true,
            timeouts: 2,
            ..CALM
        },
        &[LOST],
    );
    let robbed = "a job that runs under a lease is in flight";
    breaks(
        Mutation::RegisterTwice,
        Config {
            boot: true,
            timeouts: 1,
            pauses: 1,
            ..CALM
        },
        &[robbed],
    );
}

#[test]
fn numbers_start_anew_after_lost() {
    let config = Config {
        pauses: 1,
        threads: 2,
        ..CALM
    };
    breaks(
        Mutation::NumbersRestart,
        config,
        &["an ack removes no job but its own", "an acked job never runs again"],
    );
}

#[test]
fn a_lease_of_two_or_three_steps() {
    for steps in [2, 3] {
        let config = lease::Config {
            outages: 1,
            ..lease::Config::CALM.steps(steps)
        };
        lease_breaks(&format!("a lease of {steps} steps"), config, ROBBED);
    }
}

#[test]
fn no_clamp_on_the_clock() {
    let config = lease::Config {
        no_clamp: true,
        ..lease::Config::CALM
    };
    lease_breaks("no clamp, outage", lease::Config { outages: 1, ..config }, ROBBED);
    lease_breaks("no clamp, clock set", lease::Config { jumps: 1, ..config }, ROBBED);
}

#[test]
fn no_hand_over_guard() {
    let promise = "no job starts without a lease";
    breaks(Mutation::NoHandOverGuard, Config { pauses: 1, ..CALM }, &[promise]);
    breaks(
        Mutation::NoHandOverGuard,
        Config {
            pauses: 1,
            middleware: true,
            ..CALM
        },
        &[promise],
    );
    breaks(
        Mutation::GuardByAnswer,
        Config {
            jobs: 1,
            pauses: 1,
            beats: 1,
            ..CALM
        },
        &[promise],
    );
}

#[test]
fn a_beat_that_does_not_look_at_the_fence() {
    // A lease without a hash runs for ever, or a job starts under one: whichever the search meets first.
    let promises = [
        "left in peace, the system comes to rest",
        "no job starts without a lease",
    ];
    breaks(Mutation::BeatWithoutFence, Config { pauses: 1, ..CALM }, &promises);
}

#[test]
fn leave_removes_what_it_was_not_given() {
    breaks(
        Mutation::LeaveDropsUnknown,
        Config {
            shutdowns: 1,
            gone: 1,
            ..CALM
        },
        &[LOST],
    );
}

#[test]
fn recover_pushes_without_a_token() {
    breaks(
        Mutation::RecoverBlindly,
        Config {
            crashes: 1,
            timeouts: 1,
            ..CALM
        },
        &["no job is in two places"],
    );
}

#[test]
fn lost_without_giving_up_what_runs() {
    breaks(
        Mutation::LostKeepsRunning,
        Config { pauses: 1, ..CALM },
        &["a job that runs under a lease is in flight"],
    );
}

#[test]
fn seen_stays_in_the_future() {
    let config = lease::Config {
        dies: true,
        jumps: 1,
        reaped_within: 35 + 1,
        seen_stays: true,
        ..lease::Config::CALM
    };
    lease_breaks(
        "a clock set back leaves `seen` be",
        config,
        "a dead instance is reaped in time",
    );
}

#[test]
fn a_guard_of_a_whole_lease() {
    let config = lease::Config {
        cut: true,
        jumps: 1,
        ..lease::Config::CALM
    };
    lease_breaks(
        "guard of ttl, clock set",
        config,
        "no job is handed over when the lease is gone",
    );
}

#[test]
fn settings_that_rob() {
    let config = lease::Config {
        settings: SHORTER,
        changes: 1,
        ..lease::Config::CALM
    };
    let anew = lease::Config {
        running: Running::Anew,
        ..config
    };
    lease_breaks("leases issued anew with the new ttl", anew, ROBBED);
    let silent = lease::Config {
        drops: 2,
        beat_says_ttl: false,
        ..config
    };
    lease_breaks(
        "a beat gets the namespace's ttl, its answer and the next are lost",
        silent,
        ROBBED,
    );
}

#[test]
fn a_step_that_grows_at_once_or_too_early() {
    let at_once = lease::Config {
        outages: 1,
        settings: LONGER,
        changes: 1,
        clamp: Clamp::No,
        ..lease::Config::CALM
    };
    lease_breaks("no clamp after the step has grown", at_once, ROBBED);
    let early = lease::Config {
        jumps: 1,
        settings: BOTH_WAYS,
        changes: 2,
        clamp: Clamp::OldTtl,
        ..lease::Config::CALM
    };
    lease_breaks("a clamp for the old ttl, settings changed twice", early, ROBBED);
}

#[test]
fn a_registration_lengthens_the_leases_of_the_dead() {
    let config = lease::Config {
        dies: true,
        settings: ALTERNATING,
        changes: 2,
        reaped_within: 55 + 1,
        running: Running::Lengthened,
        ..lease::Config::CALM
    };
    lease_breaks(
        "a registration lengthens running leases",
        config,
        "a dead instance is reaped in time",
    );
}
