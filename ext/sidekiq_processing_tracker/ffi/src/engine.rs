//! `Native::Engine`: the engine of this process.

use crate::{errors, events, gvl, settings};
use magnus::{
    encoding::{EncodingCapable, RbEncoding},
    value::ReprValue,
    Error, IntoValue, RArray, RHash, RString, Ruby, TryConvert, Value,
};
use processing_tracker_core as core;
use processing_tracker_core::crew::Plan;
use processing_tracker_core::due::{Claimed, Push, Straight};
use processing_tracker_core::engine::{Recorded, END_WITHIN};
use processing_tracker_core::events::Next;
use processing_tracker_core::registry::{Handle, Requeueing, Taken};
use std::time::{Duration, Instant};

/// The engine. It is never freed: in a forked child its locks may be held by threads that do not exist there, and a
/// process starts but a few.
#[magnus::wrap(class = "Sidekiq::ProcessingTracker::Native::Engine", free_immediately)]
pub struct Engine {
    inner: &'static core::engine::Engine,
}

impl Engine {
    /// `Engine.start(settings)`: starts the native threads, which connect and register by themselves.
    pub fn start(ruby: &Ruby, settings: RHash) -> Result<Self, Error> {
        errors::guard(ruby, || {
            let settings = settings::read(ruby, settings)?;
            let engine = core::engine::Engine::start(settings).map_err(|error| errors::to_ruby(ruby, &error))?;
            Ok(Self {
                inner: Box::leak(Box::new(engine)),
            })
        })
    }

    /// The engine, unless this is a forked child of the process that started it: a child touches nothing of its parent's.
    fn mine(&self) -> Option<&core::engine::Engine> {
        self.inner.is_of_this_process().then_some(self.inner)
    }

    /// The same, for a native thread.
    fn of_this_process(&self) -> Option<&'static core::engine::Engine> {
        self.inner.is_of_this_process().then_some(self.inner)
    }

    /// `#identity`: who this instance is; nil in a forked child.
    pub fn identity(ruby: &Ruby, this: &Self) -> Result<Option<String>, Error> {
        errors::guard(ruby, || Ok(this.mine().map(core::engine::Engine::identity)))
    }

    /// `#add_crew(queues, strict)`: threads will come that take jobs from these queues, in this order (strict), else in
    /// an order drawn anew for each job, with the queues that are named more than once likelier to be first. Answers
    /// the crew's number; nil in a forked child.
    pub fn add_crew(ruby: &Ruby, this: &Self, queues: RArray, strict: bool) -> Result<Option<usize>, Error> {
        errors::guard(ruby, || {
            let Some(engine) = this.mine() else { return Ok(None) };
            let mut names = Vec::new();
            for queue in queues {
                let queue = RString::try_convert(queue)?;
                // SAFETY: the bytes are copied before anything of Ruby's can run that would change or free them.
                names.push(unsafe { queue.as_slice().to_vec() });
            }
            engine
                .add_crew(Plan::new(names, strict))
                .map(Some)
                .map_err(|error| errors::to_ruby(ruby, &error))
        })
    }

    /// `#next_job(crew, timeout_ms, encoding)`: waits for a job that is claimed for the crew, without the GVL: its handle, its
    /// queue, its payload; nil when the time is over, false when no job will come any more. The payload's encoding is the one
    /// that is named, and without a name UTF-8, or binary where it is not valid as such. Raises what others raise into the
    /// thread only while it waits, never with a job in its hands.
    pub fn next_job(ruby: &Ruby, this: &Self, crew: usize, timeout_ms: u64, encoding: Value) -> Result<Value, Error> {
        errors::guard(ruby, || {
            let Some(engine) = this.mine() else {
                return Ok(ruby.qfalse().as_value());
            };
            if let Some(taken) = engine.take(crew) {
                return job(ruby, &taken, encoding);
            }
            let deadline = after(timeout_ms);
            while engine.gives_work(crew) {
                let taken = match engine.wait_for_work(crew) {
                    None => engine.take(crew),
                    Some(parker) => match gvl::wait_in(ruby, &parker, Some(deadline), gvl::LONG_SLICE) {
                        Ok(true) => engine.arrive(crew, &parker),
                        ended => {
                            engine.stop_waiting(crew, &parker);
                            return ended.map(|_| ruby.qnil().as_value());
                        }
                    },
                };
                if let Some(taken) = taken {
                    return job(ruby, &taken, encoding);
                }
            }
            Ok(ruby.qfalse().as_value())
        })
    }

    /// `#quiet(crew, dismiss)`: no job is claimed for the crew any more, and what is claimed and not taken goes back to its queue. With
    /// `dismiss` the threads that wait are sent away, and no other waits from now on. Never blocks.
    pub fn quiet(ruby: &Ruby, this: &Self, crew: usize, dismiss: bool) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(engine) = this.mine() {
                engine.be_quiet(crew, dismiss);
            }
            Ok(())
        })
    }

    /// `#mark(job_class, timeout_ms)`: jobs of this class are marked though their payloads do not say so. Waits without the
    /// GVL until Redis knows it; whether it does.
    pub fn mark(ruby: &Ruby, this: &Self, class: String, timeout_ms: u64) -> Result<bool, Error> {
        errors::guard(ruby, || {
            let Some(engine) = this.mine() else { return Ok(false) };
            match engine.mark(class) {
                Some(parker) => gvl::wait(ruby, &parker, Some(after(timeout_ms))),
                None => Ok(true),
            }
        })
    }

    /// `#track(queue, payload, marked_class)`: a job begins; its handle, or nil in a forked child. Never blocks.
    pub fn track(
        ruby: &Ruby,
        this: &Self,
        queue: RString,
        payload: RString,
        marked: Option<String>,
    ) -> Result<Option<Handle>, Error> {
        errors::guard(ruby, || {
            let Some(engine) = this.mine() else { return Ok(None) };
            // SAFETY: the bytes are copied before anything of Ruby's can run that would change or free them.
            let (queue, payload) = unsafe { (queue.as_slice().to_vec(), payload.as_slice().into()) };
            Ok(Some(engine.track(queue, payload, marked)))
        })
    }

    /// `#await(handle, timeout_ms)`: whether the job's record is in Redis, or `:lost` when others have the job and it must
    /// not run here. Sends the record itself, where it can without waiting for anything. Then waits without the GVL, but not while Redis is
    /// known not to answer.
    pub fn await_record(ruby: &Ruby, this: &Self, handle: Handle, timeout_ms: u64) -> Result<Value, Error> {
        errors::guard(ruby, || {
            let answer = |recorded: bool| Ok(recorded.into_value_with(ruby));
            let Some(engine) = this.mine() else {
                return answer(false);
            };
            let deadline = after(timeout_ms);
            loop {
                match engine.recorded(handle) {
                    Recorded::Yes => return answer(true),
                    Recorded::No => return answer(false),
                    Recorded::Lost => return Ok(ruby.to_symbol("lost").into_value_with(ruby)),
                    Recorded::Wait(parker) => {
                        if !gvl::wait(ruby, &parker, Some(deadline))? {
                            engine.waited_in_vain();
                            return answer(false);
                        }
                    }
                }
            }
        })
    }

    /// `#ack(handle)`: the job is done. Never blocks.
    pub fn ack(ruby: &Ruby, this: &Self, handle: Handle) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(engine) = this.mine() {
                engine.ack(handle);
            }
            Ok(())
        })
    }

    /// `#release(handle)`: the job's thread has gone without an ack. Never blocks.
    pub fn release(ruby: &Ruby, this: &Self, handle: Handle) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(engine) = this.mine() {
                engine.release(handle);
            }
            Ok(())
        })
    }

    /// `#requeue(handles, timeout_ms)`: puts jobs back and their records away. Answers a Hash: "unrecorded", the handles of
    /// those that have no record, which the caller must put back; "pending", of those that Redis has on record but has
    /// not put back in time, which come back when the lease has run out, if not before.
    pub fn requeue(ruby: &Ruby, this: &Self, handles: RArray, timeout_ms: u64) -> Result<RHash, Error> {
        errors::guard(ruby, || {
            // Not by Vec's own conversion: that holds on to the array's memory while to_int of an element may change it.
            let handles = handles
                .into_iter()
                .map(Handle::try_convert)
                .collect::<Result<Vec<_>, _>>()?;
            let Some(engine) = this.mine() else {
                return requeued(ruby, handles, Vec::new());
            };
            let deadline = after(timeout_ms);
            let requeueing: Vec<_> = handles
                .iter()
                .map(|handle| (*handle, engine.requeue(*handle)))
                .collect();
            let (mut unrecorded, mut pending) = (Vec::new(), Vec::new());
            for (handle, requeueing) in requeueing {
                if let Requeueing::Under(parker) = &requeueing {
                    let deadline = if engine.is_at_work() { deadline } else { Instant::now() };
                    match gvl::wait(ruby, parker, Some(deadline)) {
                        Ok(true) => {}
                        Ok(false) => pending.push(handle),
                        Err(raised) => {
                            engine.abandon(&handles);
                            return Err(raised);
                        }
                    }
                }
                if !matches!(requeueing, Requeueing::Settled) && engine.take_back(handle) {
                    unrecorded.push(handle);
                }
            }
            pending.retain(|handle| !unrecorded.contains(handle));
            requeued(ruby, unrecorded, pending)
        })
    }

    /// `#claim_due(set, until, defaults, transient, milliseconds)`: claims jobs of Sidekiq's set whose score is `until` at most. Answers
    /// whether there may be more, how many have gone to their queues, and token and payload of each that is the caller's to
    /// push. Some go to their queues at once where `defaults` is given: the fields that Sidekiq's client would add where they are
    /// missing, and `transient`, those that it would take out; it writes times in milliseconds, or seconds. nil where this process has no lease, so that nothing is its to claim. Waits
    /// without the GVL.
    pub fn claim_due(
        ruby: &Ruby,
        this: &Self,
        set: RString,
        until: RString,
        defaults: Option<RArray>,
        transient: RArray,
        milliseconds: bool,
    ) -> Result<Option<RArray>, Error> {
        errors::guard(ruby, || {
            let answer = ruby.ary_new_capa(3);
            let jobs = ruby.ary_new();
            let straight = defaults
                .map(|names| straight(names, transient, milliseconds))
                .transpose()?;
            let claimed = match this.of_this_process() {
                None => Claimed::default(),
                Some(engine) => {
                    let (set, until) = (bytes(set), bytes(until));
                    gvl::run(ruby, move |_| engine.claim_due(&set, &until, straight.as_ref()))?
                }
            };
            if !claimed.leased {
                return Ok(None);
            }
            for (token, payload) in &claimed.jobs {
                let job = ruby.ary_new_capa(2);
                job.push(ruby.str_from_slice(token))?;
                job.push(events::text(ruby, payload)?)?;
                jobs.push(job)?;
            }
            answer.push(claimed.more)?;
            answer.push(claimed.pushed)?;
            answer.push(jobs)?;
            Ok(Some(answer))
        })
    }

    /// `#settle_due(pushes)`: what has become of claimed jobs, each token, `"queue"`, `"set"` or `""` (it goes nowhere), the
    /// queue's name or the set's key, the score in the set, the payload. Each goes there in the moment in which it ceases to be
    /// claimed. How many were still this process'. Waits without the GVL.
    pub fn settle_due(ruby: &Ruby, this: &Self, pushes: RArray) -> Result<u64, Error> {
        errors::guard(ruby, || {
            let mut list = Vec::with_capacity(pushes.len());
            for push in pushes {
                let (token, kind, name, score, payload): (RString, String, RString, RString, RString) =
                    TryConvert::try_convert(push)?;
                let push = match kind.as_str() {
                    "queue" => Push::Queue(bytes(name), bytes(payload)),
                    "set" => Push::Set(bytes(name), bytes(score), bytes(payload)),
                    _ => Push::Nowhere,
                };
                list.push((bytes(token), push));
            }
            match this.of_this_process() {
                Some(engine) => gvl::run(ruby, move |_| engine.settle_due(&list)),
                None => Ok(0),
            }
        })
    }

    /// `#end_due`: a poll is over; what was claimed and not settled goes back. Waits without the GVL.
    pub fn end_due(ruby: &Ruby, this: &Self) -> Result<(), Error> {
        errors::guard(ruby, || match this.of_this_process() {
            Some(engine) => gvl::run(ruby, move |_| engine.end_due()),
            None => Ok(()),
        })
    }

    /// `#next_event(timeout_ms)`: a Hash, nil when there was none in time, `:stopped` when none will come.
    pub fn next_event(ruby: &Ruby, this: &Self, timeout_ms: u64) -> Result<Value, Error> {
        errors::guard(ruby, || {
            let deadline = after(timeout_ms);
            loop {
                let Some(engine) = this.mine() else {
                    return Ok(ruby.to_symbol("stopped").into_value_with(ruby));
                };
                match engine.events().next() {
                    Next::Event(event) => return Ok(events::to_hash(ruby, event)?.into_value_with(ruby)),
                    Next::Closed => return Ok(ruby.to_symbol("stopped").into_value_with(ruby)),
                    Next::Wait(parker) => {
                        if !gvl::wait_in(ruby, &parker, Some(deadline), gvl::longest_slice(ruby)?)? {
                            return Ok(ruby.qnil().into_value_with(ruby));
                        }
                    }
                }
            }
        })
    }

    /// `#touch`: Ruby has made progress.
    pub fn touch(ruby: &Ruby, this: &Self) -> Result<(), Error> {
        errors::guard(ruby, || {
            if let Some(engine) = this.mine() {
                engine.touch();
            }
            Ok(())
        })
    }

    /// `#leave(timeout_ms)`: the clean exit; whether Redis has taken it. Ends the native threads in any case.
    pub fn leave(ruby: &Ruby, this: &Self, timeout_ms: u64) -> Result<bool, Error> {
        errors::guard(ruby, || {
            let Some(engine) = this.mine() else { return Ok(false) };
            let left = gvl::wait(ruby, &engine.leave(), Some(after(timeout_ms)));
            let ending = engine.stop();
            left?;
            let deadline = Instant::now() + END_WITHIN;
            for thread in ending {
                gvl::wait(ruby, &thread, Some(deadline))?;
            }
            Ok(engine.has_left())
        })
    }
}

fn job(ruby: &Ruby, taken: &Taken, encoding: Value) -> Result<Value, Error> {
    let payload = ruby.str_from_slice(&taken.payload);
    if !encoding.is_nil() {
        payload.enc_associate(RbEncoding::try_convert(encoding)?)?;
    } else if std::str::from_utf8(&taken.payload).is_ok() {
        payload.enc_associate(ruby.utf8_encindex())?;
    }
    let job = ruby.ary_new_capa(3);
    job.push(taken.handle)?;
    job.push(events::text(ruby, &taken.queue)?)?;
    job.push(payload)?;
    Ok(job.as_value())
}

fn straight(defaults: RArray, transient: RArray, milliseconds: bool) -> Result<Straight, Error> {
    let names = |array: RArray| array.into_iter().map(String::try_convert).collect::<Result<_, _>>();
    Ok(Straight {
        defaults: names(defaults)?,
        transient: names(transient)?,
        milliseconds,
    })
}

/// A copy of the bytes.
fn bytes(string: RString) -> Vec<u8> {
    // SAFETY: the bytes are copied before anything of Ruby's can run that would change or free them.
    unsafe { string.as_slice().to_vec() }
}

fn requeued(ruby: &Ruby, unrecorded: Vec<Handle>, pending: Vec<Handle>) -> Result<RHash, Error> {
    let hash = ruby.hash_new();
    hash.aset("unrecorded", unrecorded)?;
    hash.aset("pending", pending)?;
    Ok(hash)
}

fn after(timeout_ms: u64) -> Instant {
    let now = Instant::now();
    now.checked_add(Duration::from_millis(timeout_ms)).unwrap_or(now)
}
