//! `Native::Watch`: what people and exporters look at.

use crate::{errors, events::text, gvl, settings};
use magnus::{Error, IntoValue, RArray, RHash, RString, Ruby, Value};
use processing_tracker_core as core;
use processing_tracker_core::keys::Keys;
use processing_tracker_core::link::Link;
use processing_tracker_core::target::Target;
use processing_tracker_core::watch::{self, Instance, Line, State};
use std::sync::{Mutex, PoisonError};

/// A namespace to look at, and a link to its Redis that is kept from page to page.
#[magnus::wrap(class = "Sidekiq::ProcessingTracker::Native::Watch", free_immediately)]
pub struct Watch {
    target: Target,
    keys: Keys,
    /// With the process that made it. Held for a moment, by a thread that has the GVL, so no fork finds it held.
    link: Mutex<Option<(u32, Link)>>,
}

impl Watch {
    /// `Watch.new(redis, namespace)`: connects to nothing yet.
    pub fn new(ruby: &Ruby, redis: RHash, namespace: String) -> Result<Self, Error> {
        errors::guard(ruby, || {
            Ok(Self {
                target: settings::target(ruby, redis)?,
                keys: Keys::new(&namespace),
                link: Mutex::new(None),
            })
        })
    }

    /// `#instances`: a Hash each.
    pub fn instances(ruby: &Ruby, this: &Self) -> Result<RArray, Error> {
        errors::guard(ruby, || {
            let instances = this.ask(ruby, watch::instances)?;
            let list = ruby.ary_new();
            for instance in instances {
                list.push(instance_hash(ruby, instance)?)?;
            }
            Ok(list)
        })
    }

    /// `#identities`: of every instance.
    pub fn identities(ruby: &Ruby, this: &Self) -> Result<RArray, Error> {
        errors::guard(ruby, || {
            let list = ruby.ary_new();
            for identity in this.ask(ruby, watch::identities)? {
                list.push(text(ruby, &identity)?)?;
            }
            Ok(list)
        })
    }

    /// `#in_flight(identity, page)`: some jobs of an instance, a list each (jid, class, queue, since in ms), and the next
    /// page, nil after the last.
    pub fn in_flight(ruby: &Ruby, this: &Self, identity: RString, page: Option<String>) -> Result<RArray, Error> {
        errors::guard(ruby, || {
            // SAFETY: the bytes are copied before anything of Ruby's can run that would change or free them.
            let identity = unsafe { identity.as_slice().to_vec() };
            let page = page
                .map(|page| page.parse())
                .transpose()
                .map_err(|error| errors::to_ruby(ruby, &error))?;
            let (jobs, next) = this.ask(ruby, move |link, keys| watch::in_flight(link, keys, &identity, page))?;
            let list = ruby.ary_new();
            for job in jobs {
                let queue = text(ruby, &job.queue)?;
                list.push((job.facts.jid, job.facts.class, queue, job.since_ms).into_value_with(ruby))?;
            }
            let answer = ruby.ary_new();
            answer.push(list)?;
            answer.push(next.map(|page| page.to_string()))?;
            Ok(answer)
        })
    }

    /// `#journal(count)`: what became of the last orphans, a Hash each, the newest first.
    pub fn journal(ruby: &Ruby, this: &Self, count: usize) -> Result<RArray, Error> {
        errors::guard(ruby, || {
            let lines = this.ask(ruby, move |link, keys| watch::journal(link, keys, count))?;
            let list = ruby.ary_new();
            for line in lines {
                list.push(line_hash(ruby, &line)?)?;
            }
            Ok(list)
        })
    }

    /// `#totals`: by outcome, since ever.
    pub fn totals(ruby: &Ruby, this: &Self) -> Result<RHash, Error> {
        errors::guard(ruby, || {
            let hash = ruby.hash_new();
            for (outcome, total) in watch::OUTCOMES.into_iter().zip(this.ask(ruby, watch::totals)?) {
                hash.aset(outcome, total)?;
            }
            Ok(hash)
        })
    }

    /// Asks Redis on a native thread. The link is kept when all went well.
    fn ask<T: Send + 'static>(
        &self,
        ruby: &Ruby,
        question: impl FnOnce(&mut Link, &Keys) -> core::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let pid = std::process::id();
        let mut link = match self.kept().take() {
            Some((owner, link)) if owner == pid => link,
            inherited => {
                // Its socket is the parent's: closing it could say something there.
                std::mem::forget(inherited);
                Link::new(self.target.clone(), self.target.read_timeout)
            }
        };
        let keys = self.keys.clone();
        let (answer, link) = gvl::run(ruby, move |_| Ok((question(&mut link, &keys)?, link)))?;
        *self.kept() = Some((pid, link));
        Ok(answer)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Option<(u32, Link)>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn instance_hash(ruby: &Ruby, instance: Instance) -> Result<RHash, Error> {
    let state = match instance.state {
        State::Running => "running",
        State::Silent => "silent",
        State::Dead => "dead",
        State::Recovering => "recovering",
    };
    let hash = ruby.hash_new();
    hash.aset("identity", text(ruby, &instance.identity)?)?;
    hash.aset("instance_id", text(ruby, &instance.instance_id)?)?;
    hash.aset("hostname", optional(ruby, instance.hostname.as_deref())?)?;
    hash.aset("pid", instance.pid)?;
    hash.aset("started_at", instance.started_at_ms)?;
    hash.aset("last_beat_at", instance.last_beat_at_ms)?;
    hash.aset("state", state)?;
    hash.aset("in_flight", instance.in_flight)?;
    hash.aset("queues", optional(ruby, instance.queues.as_deref())?)?;
    hash.aset("concurrency", instance.concurrency)?;
    hash.aset(
        "sidekiq_identity",
        optional(ruby, instance.sidekiq_identity.as_deref())?,
    )?;
    Ok(hash)
}

fn line_hash(ruby: &Ruby, line: &Line) -> Result<RHash, Error> {
    let hash = ruby.hash_new();
    for (name, value) in &line.told {
        hash.aset(text(ruby, name)?, text(ruby, value)?)?;
    }
    hash.aset("at", line.at_ms)?;
    hash.aset("from", text(ruby, &line.from)?)?;
    hash.aset("by", text(ruby, &line.by)?)?;
    Ok(hash)
}

fn optional(ruby: &Ruby, bytes: Option<&[u8]>) -> Result<Value, Error> {
    Ok(match bytes {
        Some(bytes) => text(ruby, bytes)?.into_value_with(ruby),
        None => ruby.qnil().into_value_with(ruby),
    })
}
