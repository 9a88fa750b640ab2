//! Where a Ruby thread waits for a native one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Locks, also when a thread has died with the lock. What is locked here is left consistent by every step, and a
/// tracker that goes on is worth more than one that stops with the first surprise.
///
/// The locks of this crate are those of std, not parking_lot's: parking_lot keeps one table for the whole process, which
/// a fork can leave locked for ever, also for locks that the child makes itself.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// What was waited for has come. Wins over an interrupt at the same time: a finished thing must not be dropped.
    Done,
    /// Somebody wants the waiting thread (a signal, `Thread#raise`, `Thread#kill`).
    Interrupted,
    /// The deadline has passed.
    TimedOut,
}

/// One thread waits, another ends the wait. Its lock is held for a few instructions only, so that Ruby may call
/// `interrupt` from wherever it likes.
#[derive(Debug, Default)]
pub struct Parker {
    flags: Mutex<Flags>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Flags {
    done: bool,
    interrupted: bool,
}

impl Parker {
    /// A parker on which nothing has happened yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Waits until `deadline`, for ever without one. An interrupt is reported once.
    pub fn wait(&self, deadline: Option<Instant>) -> Woken {
        let mut flags = lock(&self.flags);
        loop {
            if flags.done {
                return Woken::Done;
            }
            if std::mem::take(&mut flags.interrupted) {
                return Woken::Interrupted;
            }
            flags = match deadline {
                None => self.changed.wait(flags).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Woken::TimedOut;
                    }
                    self.changed
                        .wait_timeout(flags, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Ends the wait: what was waited for has come.
    pub fn unpark(&self) {
        self.settle();
        self.ring();
    }

    /// The first half of `unpark`, for who holds a lock that the woken thread needs at once: what was waited for has come.
    /// To be followed by `ring`.
    pub fn settle(&self) {
        lock(&self.flags).done = true;
    }

    /// The second half: wakes the thread.
    pub fn ring(&self) {
        self.changed.notify_all();
    }

    /// Whether `unpark` was called.
    #[must_use]
    pub fn is_done(&self) -> bool {
        lock(&self.flags).done
    }

    /// Ends the wait without a result.
    pub fn interrupt(&self) {
        lock(&self.flags).interrupted = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::{Parker, Woken};
    use std::time::{Duration, Instant};

    #[test]
    fn a_result_wins_over_an_interrupt() {
        let parker = Parker::new();
        parker.interrupt();
        assert_eq!(parker.wait(None), Woken::Interrupted);
        assert_eq!(parker.wait(Some(Instant::now())), Woken::TimedOut);
        parker.interrupt();
        parker.unpark();
        assert_eq!(parker.wait(None), Woken::Done);
        assert!(parker.is_done());
    }

    #[test]
    fn wakes_a_waiting_thread() {
        let parker = Parker::new();
        let other = parker.clone();
        let thread = std::thread::spawn(move || other.wait(Some(Instant::now() + Duration::from_secs(10))));
        parker.unpark();
        assert_eq!(thread.join().unwrap(), Woken::Done);
    }
}
