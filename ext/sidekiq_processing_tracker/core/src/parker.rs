//! Where a Ruby thread waits for a native one.

use crate::wire::Bell;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For how long a thread does something else when it waits for ever.
const A_WHILE: Duration = Duration::from_secs(60);

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

/// Something to be waited for at a socket, which a thread that waits anyway does for another. Who has it sees to it that it ends with
/// `give_back`, or by itself.
pub(crate) trait Errand: Send {
    /// Waits until there may be something to do, the bell rings, or the deadline passes. Answers whether it was the first.
    fn wait(&self, deadline: Instant) -> bool;
    /// What wakes a thread out of `wait`.
    fn bell(&self) -> Arc<Bell>;
    /// There may be something to do. Answers the errand where it is not at its end. Never waits.
    fn go_on(self: Box<Self>, parker: &Parker) -> Option<Box<dyn Errand>>;
    /// The thread goes. Never waits.
    fn give_back(self: Box<Self>);
}

/// One thread waits, another ends the wait. Its lock is held for a few instructions only, so that Ruby may call
/// `interrupt` from wherever it likes.
#[derive(Default)]
pub struct Parker {
    flags: Mutex<Flags>,
    changed: Condvar,
}

#[derive(Default)]
struct Flags {
    done: bool,
    interrupted: bool,
    /// A thread is in `wait`, and not about to leave it.
    waits: bool,
    /// What that thread is to do meanwhile.
    errand: Option<Box<dyn Errand>>,
    /// It does that, and is woken in this way.
    bell: Option<Arc<Bell>>,
}

impl fmt::Debug for Parker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Parker({})", if self.is_done() { "done" } else { "waits" })
    }
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
        // Of an errand that has died of a bug.
        flags.bell = None;
        loop {
            let is_over = deadline.is_some_and(|deadline| deadline <= Instant::now());
            let woken = if flags.done {
                Some(Woken::Done)
            } else if std::mem::take(&mut flags.interrupted) {
                Some(Woken::Interrupted)
            } else {
                is_over.then_some(Woken::TimedOut)
            };
            if let Some(woken) = woken {
                flags.waits = false;
                let errand = flags.errand.take();
                drop(flags);
                if let Some(errand) = errand {
                    errand.give_back();
                }
                return woken;
            }
            flags.waits = true;
            flags = match (flags.errand.take(), deadline) {
                (Some(errand), _) => self.run(errand, deadline, flags),
                (None, None) => self.changed.wait(flags).unwrap_or_else(PoisonError::into_inner),
                (None, Some(deadline)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let waited = self.changed.wait_timeout(flags, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Does one step of an errand: waits once.
    fn run<'a>(
        &'a self,
        errand: Box<dyn Errand>,
        deadline: Option<Instant>,
        mut flags: MutexGuard<'a, Flags>,
    ) -> MutexGuard<'a, Flags> {
        flags.bell = Some(errand.bell());
        drop(flags);
        let deadline = deadline.unwrap_or_else(|| Instant::now() + A_WHILE);
        let errand = if errand.wait(deadline) {
            errand.go_on(self)
        } else {
            Some(errand)
        };
        let mut flags = lock(&self.flags);
        flags.bell = None;
        flags.errand = errand;
        flags
    }

    /// Gives the waiting thread something to do meanwhile. Answers it where no thread waits, or it has something to do.
    pub(crate) fn lend(&self, errand: Box<dyn Errand>) -> Option<Box<dyn Errand>> {
        let mut flags = lock(&self.flags);
        let is_free =
            flags.waits && !flags.done && !flags.interrupted && flags.errand.is_none() && flags.bell.is_none();
        if !is_free {
            return Some(errand);
        }
        flags.errand = Some(errand);
        drop(flags);
        self.changed.notify_all();
        None
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
        let bell = lock(&self.flags).bell.clone();
        match bell {
            Some(bell) => bell.ring(),
            None => self.changed.notify_all(),
        }
    }

    /// Whether `unpark` was called.
    #[must_use]
    pub fn is_done(&self) -> bool {
        lock(&self.flags).done
    }

    /// Whether the waiting thread does something else meanwhile.
    #[must_use]
    pub fn has_errand(&self) -> bool {
        let flags = lock(&self.flags);
        flags.errand.is_some() || flags.bell.is_some()
    }

    /// Ends the wait without a result.
    pub fn interrupt(&self) {
        lock(&self.flags).interrupted = true;
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::{Errand, Parker, Woken};
    use crate::wire::Bell;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    const SOON: Duration = Duration::from_secs(10);

    /// Waits for a byte, which ends the parker's wait.
    struct ForByte {
        socket: UnixStream,
        bell: Arc<Bell>,
        given_back: Arc<AtomicUsize>,
    }

    impl Errand for ForByte {
        fn wait(&self, deadline: Instant) -> bool {
            self.bell.wait_beside(self.socket.as_fd(), deadline).unwrap()
        }

        fn bell(&self) -> Arc<Bell> {
            self.bell.clone()
        }

        fn go_on(self: Box<Self>, parker: &Parker) -> Option<Box<dyn Errand>> {
            parker.settle();
            None
        }

        fn give_back(self: Box<Self>) {
            self.given_back.fetch_add(1, SeqCst);
        }
    }

    fn errand() -> (Box<ForByte>, UnixStream, Arc<AtomicUsize>) {
        let (far, socket) = UnixStream::pair().unwrap();
        let given_back = Arc::new(AtomicUsize::new(0));
        let errand = ForByte {
            socket,
            bell: Arc::new(Bell::new().unwrap()),
            given_back: given_back.clone(),
        };
        (Box::new(errand), far, given_back)
    }

    /// A thread that waits, and has something to do meanwhile.
    fn occupied(
        within: Duration,
    ) -> (
        Arc<Parker>,
        std::thread::JoinHandle<Woken>,
        UnixStream,
        Arc<AtomicUsize>,
    ) {
        let (errand, far, given_back) = errand();
        let mut errand: Box<dyn Errand> = errand;
        let parker = Parker::new();
        let other = parker.clone();
        let thread = std::thread::spawn(move || other.wait(Some(Instant::now() + within)));
        while let Some(refused) = parker.lend(errand) {
            errand = refused;
            std::thread::yield_now();
        }
        assert!(parker.has_errand());
        (parker, thread, far, given_back)
    }

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
        let thread = std::thread::spawn(move || other.wait(Some(Instant::now() + SOON)));
        parker.unpark();
        assert_eq!(thread.join().unwrap(), Woken::Done);
    }

    #[test]
    fn a_thread_that_does_not_wait_does_nothing_else() {
        let parker = Parker::new();
        let (errand, _far, given_back) = errand();
        assert!(parker.lend(errand).is_some());
        parker.unpark();
        assert_eq!(parker.wait(None), Woken::Done);
        assert!(parker.lend(self::errand().0).is_some());
        assert_eq!(given_back.load(SeqCst), 0);
    }

    #[test]
    fn a_waiting_thread_ends_its_wait_by_itself() {
        let (parker, thread, mut far, given_back) = occupied(SOON);
        assert!(parker.lend(errand().0).is_some());
        far.write_all(b".").unwrap();
        assert_eq!(thread.join().unwrap(), Woken::Done);
        assert!(!parker.has_errand());
        assert_eq!(given_back.load(SeqCst), 0);
    }

    #[test]
    fn whatever_ends_the_wait_gives_back_what_it_did_meanwhile() {
        let (parker, thread, _far, given_back) = occupied(SOON);
        parker.interrupt();
        assert_eq!(thread.join().unwrap(), Woken::Interrupted);
        assert_eq!(given_back.load(SeqCst), 1);

        let (parker, thread, _far, given_back) = occupied(SOON);
        parker.unpark();
        assert_eq!(thread.join().unwrap(), Woken::Done);
        assert_eq!(given_back.load(SeqCst), 1);

        let (_parker, thread, _far, given_back) = occupied(Duration::from_millis(20));
        assert_eq!(thread.join().unwrap(), Woken::TimedOut);
        assert_eq!(given_back.load(SeqCst), 1);
    }

    #[test]
    fn an_old_ring_ends_nothing() {
        let (errand, mut far, given_back) = errand();
        errand.bell.ring();
        let parker = Parker::new();
        let other = parker.clone();
        let thread = std::thread::spawn(move || other.wait(Some(Instant::now() + SOON)));
        let mut errand: Box<dyn Errand> = errand;
        while let Some(refused) = parker.lend(errand) {
            errand = refused;
            std::thread::yield_now();
        }
        far.write_all(b".").unwrap();
        assert_eq!(thread.join().unwrap(), Woken::Done);
        assert_eq!(given_back.load(SeqCst), 0);
    }
}
