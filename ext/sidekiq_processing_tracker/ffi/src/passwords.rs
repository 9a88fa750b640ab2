//! `Native::Passwords`: where native threads ask for passwords, and a Ruby thread answers.

use crate::{errors, gvl};
use magnus::{value::ReprValue, Error, IntoValue, RString, Ruby, TryConvert, Value};
use processing_tracker_core::password::{Asked, Desk};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Passwords that may change. Belongs to the process that made it.
#[magnus::wrap(class = "Sidekiq::ProcessingTracker::Native::Passwords", free_immediately)]
pub struct Passwords {
    desk: Arc<Desk>,
    pid: u32,
}

impl Passwords {
    /// `Passwords.new`: none yet.
    pub fn new(ruby: &Ruby) -> Result<Self, Error> {
        errors::guard(ruby, || {
            Ok(Self {
                desk: Arc::default(),
                pid: std::process::id(),
            })
        })
    }

    /// The desk, unless this is a forked child: somebody may have been at it when the process forked.
    fn mine(&self) -> Option<&Arc<Desk>> {
        (self.pid == std::process::id()).then_some(&self.desk)
    }

    /// The desk, for whoever is to ask there.
    pub fn desk(&self, ruby: &Ruby) -> Result<Arc<Desk>, Error> {
        let foreign = || {
            Error::new(
                ruby.exception_runtime_error(),
                "these passwords are the parent process's",
            )
        };
        self.mine().cloned().ok_or_else(foreign)
    }

    /// `#add(password)`: a password as it is now; what it is called from now on.
    pub fn add(ruby: &Ruby, this: &Self, password: Value) -> Result<usize, Error> {
        errors::guard(ruby, || Ok(this.desk(ruby)?.add(optional(password)?)))
    }

    /// `#wait(timeout_ms)`: waits without the GVL until one is asked for: its name, and how often it was asked for. nil when
    /// none was in time, `:closed` when none will be.
    pub fn wait(ruby: &Ruby, this: &Self, timeout_ms: u64) -> Result<Value, Error> {
        errors::guard(ruby, || {
            let deadline = Instant::now() + Duration::from_millis(timeout_ms);
            loop {
                match this.mine().map_or(Asked::Closed, |desk| desk.next()) {
                    Asked::Question(name, number) => return Ok((name, number).into_value_with(ruby)),
                    Asked::Closed => return Ok(ruby.to_symbol("closed").into_value_with(ruby)),
                    Asked::Wait(parker) => {
                        if !gvl::wait_in(ruby, &parker, Some(deadline), gvl::LONG_SLICE)? {
                            return Ok(ruby.qnil().into_value_with(ruby));
                        }
                    }
                }
            }
        })
    }

    /// `#answer(name, number, password)`: the password as it is now.
    pub fn answer(ruby: &Ruby, this: &Self, name: usize, number: u64, password: Value) -> Result<(), Error> {
        errors::guard(ruby, || {
            let password = optional(password)?;
            if let Some(desk) = this.mine() {
                desk.answer(name, number, Some(password));
            }
            Ok(())
        })
    }

    /// `#keep(name, number)`: nobody knows what it is now; what it was is tried.
    pub fn keep(ruby: &Ruby, this: &Self, name: usize, number: u64) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(desk) = this.mine() {
                desk.answer(name, number, None);
            }
            Ok(())
        })
    }

    /// `#close`: nobody answers any more.
    pub fn close(ruby: &Ruby, this: &Self) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(desk) = this.mine() {
                desk.close();
            }
            Ok(())
        })
    }
}

fn optional(password: Value) -> Result<Option<String>, Error> {
    if password.is_nil() {
        return Ok(None);
    }
    RString::try_convert(password)?.to_string().map(Some)
}
