//! The random faults of the long runs.

use std::time::{Duration, Instant};

use super::lua;
use super::proxy::{Action, Counts, Faults, OnConnect, Plan, Request, When};

/// How long a run lasts: `FAULT_SECONDS`, or so many.
pub fn seconds(default: u64) -> Duration {
    Duration::from_secs(std::env::var("FAULT_SECONDS").map_or(default, |text| text.parse().unwrap()))
}

/// Many cuts, few of which cost a client its timeout.
pub fn faults(seed: u64) -> Faults {
    Faults {
        refuse: 0.05,
        mute: 0.002,
        cut_request: 0.05,
        cut_reply: 0.05,
        delay: 0.02,
        delay_reply: 0.02,
        stall: 0.0005,
        stall_reply: 0.0005,
        postpone: 0.02,
        copy: 0.04,
        close_later: 0.005,
        max_delay: Duration::from_millis(10),
        max_late: Duration::from_millis(1500),
        may_copy: lua::may_repeat,
        ..Faults::none(seed)
    }
}

/// The random faults, and now and then one engine that is cut off for longer than its lease.
pub struct CutOff {
    faults: Faults,
    victims: Vec<String>,
    start: Instant,
}

impl CutOff {
    /// By this seed. An engine is known by what its identities hold.
    pub fn new(seed: u64, victims: Vec<String>) -> Self {
        Self {
            faults: faults(seed),
            victims,
            start: Instant::now(),
        }
    }

    /// Whose calls do not get through at the moment: nobody's for a second, then one engine's for two leases.
    fn victim(&self) -> Option<&str> {
        let at = self.start.elapsed().as_millis() as usize;
        (at % 3000 >= 1000).then(|| self.victims[at / 3000 % self.victims.len()].as_str())
    }
}

impl Plan for CutOff {
    fn connect(&mut self, connection: u64) -> OnConnect {
        self.faults.connect(connection)
    }

    fn request(&mut self, request: &Request) -> Action {
        // What follows a turn in the same write: a cut there is one in the answer.
        if matches!(request.command().as_str(), "WATCH" | "TIME" | "HGET") {
            return Action::pass();
        }
        // Others may recover it meanwhile.
        let recovery = [&lua::REAP, &lua::PEEK, &lua::RECOVER];
        match self.victim() {
            Some(victim)
                if request.contains(victim) && !recovery.iter().any(|script| lua::is_call(request, script)) =>
            {
                // Some of what it sends still arrives when the cut is over.
                let may_be_late = lua::may_repeat(request) || request.is_transaction();
                if request.total.is_multiple_of(8) && may_be_late {
                    Action::postpone(When::After(Duration::from_millis(2000)))
                } else {
                    Action::drop_request()
                }
            }
            _ => self.faults.request(request),
        }
    }
}

/// Fails unless all kinds of faults were met.
#[track_caller]
pub fn assert_all_kinds(seed: u64, counts: &Counts) {
    for fault in [
        "refused",
        "cut_request",
        "cut_reply",
        "delayed",
        "delayed_reply",
        "postponed",
        "copied",
    ] {
        assert!(counts.of(fault) > 0, "seed {seed}: no {fault} in {counts}");
    }
}
