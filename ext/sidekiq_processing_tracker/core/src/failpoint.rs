//! Places where a test makes the process kill itself. Without the cargo feature `failpoints` they are nothing.

/// Kills this process with SIGKILL when `PROCESSING_TRACKER_FAILPOINT` names this place, as `name` or, for its n-th
/// visit, `name:n`.
#[cfg(feature = "failpoints")]
pub(crate) fn reach(name: &str) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static VISITS: AtomicU64 = AtomicU64::new(0);

    let Ok(wanted) = std::env::var("PROCESSING_TRACKER_FAILPOINT") else {
        return;
    };
    let (place, visit) = match wanted.split_once(':') {
        Some((place, visit)) => (place, visit.parse().unwrap_or(1)),
        None => (wanted.as_str(), 1),
    };
    if place == name && VISITS.fetch_add(1, Ordering::SeqCst) + 1 == visit {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Nothing.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn reach(_name: &str) {}
