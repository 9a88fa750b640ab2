//! Time as a process sees it.

use nix::time::{clock_gettime, ClockId};
use std::time::Duration;

#[cfg(target_os = "linux")]
const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
// Elsewhere the monotonic clock goes on while the machine is suspended.
#[cfg(not(target_os = "linux"))]
const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;

/// The time since some moment in the past, by a clock that nobody sets and that counts suspension: leases run out in
/// Redis while this machine sleeps.
#[must_use]
pub fn now() -> Duration {
    clock_gettime(CLOCK).map_or(Duration::ZERO, Duration::from)
}
