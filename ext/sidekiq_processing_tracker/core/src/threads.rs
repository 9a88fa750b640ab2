//! Starting native threads.

use crate::error::{Error, Result};
use nix::sys::signal::{SigSet, SigmaskHow};
use std::thread::JoinHandle;

/// Starts a thread that gets no signals: they are for Ruby's threads, and one that came in the middle of a read would
/// make redis-rs report an error. A new thread takes its mask from the one that starts it.
///
/// # Errors
/// `Error::Internal` when the system has no thread to give.
pub fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_BLOCK)
        .map_err(|error| Error::Internal(format!("cannot block signals: {error}")))?;
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    // The mask is the calling thread's own, and a Ruby thread's when it starts an engine.
    let restored = before.thread_set_mask();
    let thread = thread.map_err(|error| Error::Internal(format!("cannot start the thread {name}: {error}")))?;
    restored.map_err(|error| Error::Internal(format!("cannot restore the signal mask: {error}")))?;
    Ok(thread)
}
