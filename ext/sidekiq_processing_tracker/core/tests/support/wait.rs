//! Waiting for a condition, with a deadline. Nothing in the tests waits for mere time to pass.

use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at a condition.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Waits until `cond` holds. Panics, naming `what`, when it does not within `deadline`.
#[track_caller]
pub fn eventually(deadline: Duration, what: &str, mut cond: impl FnMut() -> bool) {
    eventually_some(deadline, what, || cond().then_some(()));
}

/// Waits until `look` finds something and returns it. Panics, naming `what`, when it does not within `deadline`.
#[track_caller]
pub fn eventually_some<T>(deadline: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        // A condition that came true during the last pause counts: so the look comes before the clock.
        let late = start.elapsed() >= deadline;
        if let Some(found) = look() {
            return found;
        }
        assert!(!late, "not within {deadline:?}: {what}");
        thread::sleep(LOOK_AGAIN);
    }
}
