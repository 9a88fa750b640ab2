//! `Native::Orphans`: one recovery on demand.

use crate::{errors, events, gvl, settings};
use magnus::{Error, IntoValue, RHash, Ruby, Value};
use processing_tracker_core as core;
use processing_tracker_core::events::{Events, Next};
use processing_tracker_core::orphans::Recovered;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A recovery that goes on on a native thread. Belongs to the process that started it.
#[magnus::wrap(class = "Sidekiq::ProcessingTracker::Native::Orphans", free_immediately)]
pub struct Orphans {
    call: gvl::Call<Recovered>,
    events: Arc<Events>,
    pid: u32,
}

impl Orphans {
    /// `Orphans.start(settings)`: begins.
    pub fn start(ruby: &Ruby, settings: RHash) -> Result<Self, Error> {
        errors::guard(ruby, || {
            let settings = settings::read(ruby, settings)?;
            let events = Arc::new(Events::default());
            let told = events.clone();
            let call = gvl::begin(ruby, move |cancel| {
                core::orphans::reenqueue_orphans(&settings, cancel, &told)
            })?;
            Ok(Self {
                call,
                events,
                pid: std::process::id(),
            })
        })
    }

    /// Whether this is the process that started it, and no forked child.
    fn is_mine(&self) -> bool {
        self.pid == std::process::id()
    }

    /// `#next_event(timeout_ms)`: waits without the GVL for what there is to tell: a Hash, nil when there was nothing in time,
    /// `:stopped` when nothing will come.
    pub fn next_event(ruby: &Ruby, this: &Self, timeout_ms: u64) -> Result<Value, Error> {
        errors::guard(ruby, || {
            let deadline = Instant::now() + Duration::from_millis(timeout_ms);
            while this.is_mine() {
                match this.events.next() {
                    Next::Event(event) => return Ok(events::to_hash(ruby, event)?.into_value_with(ruby)),
                    Next::Closed => break,
                    Next::Wait(parker) => {
                        if !gvl::wait(ruby, &parker, Some(deadline))? {
                            return Ok(ruby.qnil().into_value_with(ruby));
                        }
                    }
                }
            }
            Ok(ruby.to_symbol("stopped").into_value_with(ruby))
        })
    }

    /// `#counts`: waits without the GVL for the end; how many jobs there were of each outcome, once. Raises why it failed. Nil in a
    /// forked child.
    pub fn counts(ruby: &Ruby, this: &Self) -> Result<Option<RHash>, Error> {
        errors::guard(ruby, || {
            if !this.is_mine() {
                return Ok(None);
            }
            let recovered = this.call.result(ruby)?;
            let counts = ruby.hash_new();
            counts.aset("requeued", recovered.requeued)?;
            counts.aset("dead", recovered.dead)?;
            counts.aset("discarded", recovered.discarded)?;
            counts.aset("superseded", recovered.superseded)?;
            counts.aset("stuck", recovered.stuck)?;
            Ok(Some(counts))
        })
    }

    /// `#cancel`: it is to end after the step that it is at. Never blocks.
    pub fn cancel(ruby: &Ruby, this: &Self) -> Result<(), Error> {
        errors::guard(ruby, || {
            if this.is_mine() {
                this.call.cancel();
            }
            Ok(())
        })
    }
}
