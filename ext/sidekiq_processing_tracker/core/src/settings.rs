//! What an engine is started with.

use crate::keys::Keys;
use crate::target::Target;
use std::path::PathBuf;
use std::time::Duration;

/// The settings of an engine. Ruby has validated them; the engine only keeps them within what it can work with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The prefix of all keys.
    pub namespace: String,
    /// The label that a person gave this instance.
    pub instance_id: String,
    /// `heartbeat_interval`.
    pub interval: Duration,
    /// `heartbeat_ttl`: the lease.
    pub ttl: Duration,
    /// `recovery_lock_ttl`: the most that a reaper may hold a dead instance.
    pub hold: Duration,
    /// Redis.
    pub redis: Target,
    /// Where Sidekiq's queues are, if not in `redis`. Then jobs are never fetched natively.
    pub queues: Option<Target>,
    /// What the instance tells about itself.
    pub info: Vec<(String, String)>,
    /// Look for work from time to time, rather than be told of it by Redis.
    pub polls: bool,
    /// Let Redis hand jobs over as they come, where it can.
    pub blocks: bool,
    /// How long the control thread keeps a connection of its own after it has last needed one; then its beats go over the claims
    /// link, as long as they come through there.
    pub keep_control: Duration,
    /// Whose fetch takes the jobs.
    pub fetch: Fetch,
    /// What is to become of orphans.
    pub policy: Policy,
    /// Where the system tells of processes, to be certain of deaths before leases end. `None`: only leases decide.
    pub proc: Option<PathBuf>,
    /// `exclusive_instance_id`: the label is this process' alone, so whoever had it before is dead.
    pub exclusive: bool,
}

/// Whose fetch takes jobs from the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fetch {
    /// The tracker's: every job is in flight from the moment it leaves its queue.
    Native,
    /// Sidekiq's, or another's: a job is in flight once it is recorded, and only marked jobs are.
    #[default]
    Sidekiq,
}

/// What is to become of orphans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `max_recoveries`: how often an orphan goes back before it is taken for a poison pill; `None` for no limit.
    pub max_recoveries: Option<u64>,
    /// `recovery_window`: for how long an orphan's recoveries are counted together.
    pub recovery_window: Duration,
    /// Every job is tracked, whether it is marked or not.
    pub track_all: bool,
    /// How the installed Sidekiq writes times into payloads.
    pub timestamps: Timestamps,
    /// The most entries that Sidekiq's dead set may hold.
    pub dead_max_jobs: u64,
    /// How long an entry stays in Sidekiq's dead set.
    pub dead_timeout: Duration,
}

impl Default for Policy {
    /// The gem's defaults and Sidekiq's.
    fn default() -> Self {
        Self {
            max_recoveries: Some(3),
            recovery_window: Duration::from_secs(72 * 60 * 60),
            track_all: false,
            timestamps: Timestamps::Seconds,
            dead_max_jobs: 10_000,
            dead_timeout: Duration::from_secs(180 * 24 * 60 * 60),
        }
    }
}

/// How a Sidekiq writes times into payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timestamps {
    /// Seconds with a fraction: Sidekiq before 8.
    Seconds,
    /// Whole milliseconds: Sidekiq 8.
    Milliseconds,
}

impl Timestamps {
    /// A time since the epoch, as JSON.
    #[must_use]
    pub fn text(self, time: Duration) -> String {
        match self {
            Self::Seconds => format!("{}.{:06}", time.as_secs(), time.subsec_micros()),
            Self::Milliseconds => time.as_millis().to_string(),
        }
    }
}

/// No step is shorter: at some point beats are all that a process does, and in this namespace all others too.
const SHORTEST_STEP: Duration = Duration::from_millis(50);

impl Settings {
    /// The usual `keep_control`.
    pub const KEEP_CONTROL: Duration = Duration::from_secs(2);

    /// The keys of the namespace.
    #[must_use]
    pub fn keys(&self) -> Keys {
        match self.queues {
            None => Keys::new(&self.namespace),
            Some(_) => Keys::with_outbox(&self.namespace),
        }
    }

    /// `step`: the pace of the lease clock, the lesser of the interval and a fifth of the ttl.
    #[must_use]
    pub fn pace(&self) -> Pace {
        Pace {
            step: self.interval.min(self.ttl / 5).max(SHORTEST_STEP),
            ttl: self.ttl,
        }
    }

    /// What the instance tells about itself, and what recovery needs to know of it: which jobs it records.
    #[must_use]
    pub fn told(&self) -> Vec<(String, String)> {
        let track = if self.policy.track_all { "all" } else { "marked" };
        let fetch = match self.fetch {
            Fetch::Native => "native",
            Fetch::Sidekiq => "sidekiq",
        };
        let mut told = self.info.clone();
        told.push(("track".into(), track.into()));
        told.push(("fetch".into(), fetch.into()));
        if self.exclusive {
            told.push(("exclusive".into(), self.instance_id.clone()));
        }
        told
    }
}

/// The namespace's step and ttl. Each instance brings its own; the last that registered decides for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How far the lease clock may move at once; an instance beats every 0.8 to 1.0 steps, in a large fleet less often.
    pub step: Duration,
    /// The lease.
    pub ttl: Duration,
}

impl Pace {
    /// How long to wait after a failure that came after another: a fifth of a step, 1 s at most.
    #[must_use]
    pub fn pause(&self) -> Duration {
        (self.step / 5).min(Duration::from_secs(1))
    }

    /// How much longer than in a small fleet it is from beat to beat with so many `instances`: up to twice as long, as far as the lease
    /// still has four steps then. Only where others keep the lease clock going.
    #[must_use]
    pub fn stretch(&self, instances: u64, moved_clock: bool) -> f64 {
        let spare = self.ttl.as_secs_f64() / self.step.as_secs_f64() - 4.0;
        if moved_clock || !spare.is_finite() {
            return 1.0;
        }
        let instances = u32::try_from(instances).unwrap_or(u32::MAX);
        (f64::from(instances) / f64::from(SMALL_FLEET))
            .min(2.0)
            .min(spare)
            .max(1.0)
    }
}

/// So many instances beat once in a step; more of them seldom enough that Redis has no more beats to answer, up to twice as many.
const SMALL_FLEET: u32 = 5_000;

#[cfg(test)]
mod tests {
    use super::Pace;
    use std::time::Duration;

    #[test]
    fn beats_are_seldom_in_large_fleets_only_and_never_so_that_a_lease_is_at_risk() {
        let stretch = |steps: u32, instances: u64, moved_clock: bool| {
            let step = Duration::from_secs(5);
            let ttl = step * steps;
            Pace { step, ttl }.stretch(instances, moved_clock)
        };
        for (steps, instances, moved_clock, is) in [
            (6, 1, false, 1.0),
            (6, 5_000, false, 1.0),
            (6, 7_500, false, 1.5),
            (6, 10_000, false, 2.0),
            (6, u64::MAX, false, 2.0),
            (5, 10_000, false, 1.0),
            (60, 10_000, false, 2.0),
            // Nobody else moves the clock: it must not go slower.
            (6, 10_000, true, 1.0),
        ] {
            let got = stretch(steps, instances, moved_clock);
            assert!((got - is).abs() < 1e-9, "{steps} steps, {instances} instances: {got}");
        }
        let odd = Pace {
            step: Duration::ZERO,
            ttl: Duration::ZERO,
        };
        assert!((odd.stretch(10_000, false) - 1.0).abs() < 1e-9);
    }
}
