//! Waiting without the GVL, so that other Ruby threads run meanwhile. The calls into Ruby that need care with threads are here.

use magnus::{value::ReprValue, Error, Ruby, Value};
use processing_tracker_core::parker::{Parker, Woken};
use std::ffi::c_void;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait without a look at what Ruby wants of this thread.
const SLICE: Duration = Duration::from_millis(250);

/// The same for a wait that is none of the main thread's, in a process whose main thread waits in Ruby's own ways (as
/// Sidekiq's does) and so gets the signals.
pub const LONG_SLICE: Duration = Duration::from_secs(5);

/// How long a wait of this thread may go without such a look, where the main thread may wait natively too: it looks after signals itself.
///
/// # Errors
/// None that Ruby is known to raise.
pub fn longest_slice(ruby: &Ruby) -> Result<Duration, Error> {
    let main: Value = ruby.class_thread().funcall("main", ())?;
    let is_main = main.equal(ruby.thread_current())?;
    Ok(if is_main { SLICE } else { LONG_SLICE })
}

struct Wait<'a> {
    parker: &'a Parker,
    deadline: Option<Instant>,
    /// `None` when Ruby never called the function, since an interrupt was pending already.
    woken: Option<Woken>,
}

/// Waits until the parker is done (true) or the deadline has passed (false), without the GVL.
///
/// # Errors
/// Whatever another thread or a signal raises in this one (`Thread#raise`, `Thread#kill`, `Timeout`). An interrupt
/// that raises nothing, or is masked with `Thread.handle_interrupt`, does not end the wait; a parker that is done wins over both.
pub fn wait(ruby: &Ruby, parker: &Parker, deadline: Option<Instant>) -> Result<bool, Error> {
    wait_in(ruby, parker, deadline, SLICE)
}

/// The same, with a look at what Ruby wants of this thread at least so often.
///
/// # Errors
/// As for `wait`.
pub fn wait_in(ruby: &Ruby, parker: &Parker, deadline: Option<Instant>, longest: Duration) -> Result<bool, Error> {
    loop {
        if parker.is_done() {
            return Ok(true);
        }
        // In slices: Ruby passes a signal on by a thread that has the GVL or by a helper, which it starts only where the
        // waiting thread is alone from the beginning. With neither, a SIGTERM would wait for the end of the wait.
        let slice = Instant::now() + longest;
        let mut wait = Wait {
            parker,
            deadline: Some(deadline.map_or(slice, |deadline| deadline.min(slice))),
            woken: None,
        };
        let argument = std::ptr::from_mut(&mut wait).cast::<c_void>();
        // SAFETY: both functions take a `*mut Wait`, and `wait` outlives the call: Ruby calls neither after it returned.
        // The "2" variant raises nothing, so no longjmp passes over this frame.
        unsafe {
            rb_sys::rb_thread_call_without_gvl2(Some(wait_without_gvl), argument, Some(unblock), argument);
        }
        match wait.woken {
            Some(Woken::Done) => return Ok(true),
            Some(Woken::TimedOut) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(false),
            Some(Woken::TimedOut | Woken::Interrupted) | None => ruby.thread_check_ints()?,
        }
    }
}

/// SAFETY: called by Ruby with the `*mut Wait` of `wait`, on the waiting thread, which touches nothing else meanwhile.
unsafe extern "C" fn wait_without_gvl(argument: *mut c_void) -> *mut c_void {
    // SAFETY: see above. `unblock` only reads the `parker` reference, which nobody writes.
    let (parker, deadline) = unsafe {
        let wait = argument.cast::<Wait>();
        ((*wait).parker, (*wait).deadline)
    };
    let woken = catch_unwind(AssertUnwindSafe(|| parker.wait(deadline))).unwrap_or(Woken::TimedOut);
    // SAFETY: see above.
    unsafe { (*argument.cast::<Wait>()).woken = Some(woken) };
    std::ptr::null_mut()
}

/// SAFETY: called by Ruby with the `*mut Wait` of `wait`, from any thread, with a lock of Ruby's held: it only sets a flag, and wakes the thread.
unsafe extern "C" fn unblock(argument: *mut c_void) {
    // SAFETY: the waiting thread is inside `rb_thread_call_without_gvl2` still, so its `Wait` is alive.
    let parker = unsafe { (*argument.cast::<Wait>()).parker };
    let _ = catch_unwind(AssertUnwindSafe(|| parker.interrupt()));
}

/// What runs on a native thread, since it talks to Redis and may have to wait for it.
pub struct Call<T> {
    done: Arc<Parker>,
    cancel: Arc<Parker>,
    result: Arc<Mutex<Option<processing_tracker_core::Result<T>>>>,
}

impl<T> Call<T> {
    /// Nobody waits for it any more.
    pub fn cancel(&self) {
        self.cancel.unpark();
    }

    /// Waits for its end without the GVL. The result is there once.
    ///
    /// # Errors
    /// As for `wait`; and as the body's.
    pub fn result(&self, ruby: &Ruby) -> Result<T, Error> {
        wait(ruby, &self.done, None)?;
        let outcome = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        outcome
            .unwrap_or_else(|| Err(processing_tracker_core::Error::Internal("no result".into())))
            .map_err(|error| crate::errors::to_ruby(ruby, &error))
    }
}

/// Runs `body` on a native thread and waits for it without the GVL. `body` gets a parker that is done when nobody waits for
/// it any more.
///
/// # Errors
/// As for `wait`; and as `body`.
pub fn run<T: Send + 'static>(
    ruby: &Ruby,
    body: impl FnOnce(&Parker) -> processing_tracker_core::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let call = begin(ruby, body)?;
    let result = call.result(ruby);
    call.cancel();
    result
}

/// Begins to run `body` on a native thread. `body` gets a parker that is done when it is cancelled.
///
/// # Errors
/// Where no thread can be started.
pub fn begin<T: Send + 'static>(
    ruby: &Ruby,
    body: impl FnOnce(&Parker) -> processing_tracker_core::Result<T> + Send + 'static,
) -> Result<Call<T>, Error> {
    let (done, cancel, result) = (Parker::new(), Parker::new(), Arc::new(Mutex::new(None)));
    let (thread_done, thread_cancel, thread_result) = (done.clone(), cancel.clone(), result.clone());
    processing_tracker_core::threads::spawn("tracker-call", move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&thread_cancel))).unwrap_or_else(|_| {
            Err(processing_tracker_core::Error::Internal(
                "a native thread panicked".into(),
            ))
        });
        *thread_result.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        thread_done.unpark();
    })
    .map_err(|error| crate::errors::to_ruby(ruby, &error))?;
    Ok(Call { done, cancel, result })
}
