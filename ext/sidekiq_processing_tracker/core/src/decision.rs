//! What is to become of an orphan (docs/protocol.md, "Orphans settled"): decided here, done by the script `recover`.

use crate::entry::Token;
use crate::payload::Facts;
use crate::settings::Policy;
use sha1_smol::Sha1;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// How an orphan ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// It is back in its queue.
    Requeued,
    /// It is in Sidekiq's dead set.
    Dead,
    /// It would be in the dead set, but says itself that it must not.
    Discarded,
    /// Another job holds its unique lock: run again, it would have been dropped in silence.
    Superseded,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Requeued, Self::Dead, Self::Discarded, Self::Superseded];

    /// Its name in the journal and the totals.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requeued => "requeued",
            Self::Dead => "dead",
            Self::Discarded => "discarded",
            Self::Superseded => "superseded",
        }
    }
}

/// Why an orphan does not go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It was orphaned too often: it may be what kills the processes.
    PoisonPill,
    /// It is not marked, so nobody has said that it may run twice.
    Unmarked,
    /// It is no JSON object.
    Unreadable,
}

impl Reason {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PoisonPill => "poison_pill",
            Self::Unmarked => "unmarked",
            Self::Unreadable => "unreadable",
        }
    }
}

/// What is to become of an orphan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It goes back to its queue.
    Requeue,
    /// It is suspected to be what kills the processes: it goes back to its queue, after a pause and behind all others.
    RequeueLast,
    /// It goes to the dead set.
    Kill(Reason),
    /// It goes nowhere.
    Discard(Reason),
}

impl Decision {
    /// Why it does not go back.
    #[must_use]
    pub fn reason(self) -> Option<Reason> {
        match self {
            Self::Kill(reason) | Self::Discard(reason) => Some(reason),
            Self::Requeue | Self::RequeueLast => None,
        }
    }
}

/// What is known of the instance whose orphans are settled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// All its jobs are to go back, marked or not.
    all: bool,
    /// The classes whose jobs are marked though their payloads do not say so.
    marked: HashSet<Vec<u8>>,
    /// The identity by which Sidekiq knows the process.
    pub sidekiq_identity: Option<Vec<u8>>,
}

impl Source {
    /// Reads an instance's info. Where that says nothing of what the instance recorded (another version, or somebody has
    /// overwritten it), all jobs are to go back: in doubt a job runs.
    #[must_use]
    pub fn read(info: &HashMap<Vec<u8>, Vec<u8>>) -> Self {
        let field = |name: &str| info.get(name.as_bytes()).map(Vec::as_slice);
        let (track, fetch) = (field("track"), field("fetch"));
        Self {
            // Another fetcher's jobs are recorded by the middleware, and the marked ones only.
            all: track == Some(b"all") || fetch == Some(b"sidekiq") || (track.is_none() && fetch.is_none()),
            marked: info
                .keys()
                .filter_map(|name| name.strip_prefix(b"marked:"))
                .map(<[u8]>::to_vec)
                .collect(),
            sidekiq_identity: field("sidekiq_identity")
                .filter(|identity| !identity.is_empty())
                .map(<[u8]>::to_vec),
        }
    }

    fn marks(&self, facts: &Facts) -> bool {
        facts.processing.unwrap_or_else(|| {
            [&facts.runs, &facts.class]
                .into_iter()
                .flatten()
                .any(|class| self.marked.contains(class.as_bytes()))
        })
    }
}

/// Decides on an orphan that was orphaned `count` times before.
#[must_use]
pub fn decide(facts: &Facts, source: &Source, policy: &Policy, count: u64) -> Decision {
    let reason = if source.all || policy.track_all || source.marks(facts) {
        let is_pill = policy.max_recoveries.is_some_and(|most| count >= most);
        is_pill.then_some(Reason::PoisonPill)
    } else if facts.readable {
        Some(Reason::Unmarked)
    } else {
        Some(Reason::Unreadable)
    };
    match reason {
        Some(reason) if facts.undying => Decision::Discard(reason),
        Some(reason) => Decision::Kill(reason),
        None if count == 0 => Decision::Requeue,
        None => Decision::RequeueLast,
    }
}

/// The longest that the suspects of one instance wait together: those orphaned for the second time, and all of them.
const SECOND_TIME: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
const LATER_TIMES: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(300));

/// How long the first suspect of an instance waits for the second time, before jitter, and the most: the pause doubles with
/// each time, so that one that kills every process at once does not do so without end or rest.
const FIRST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));

/// A job that may be what kills the processes, since it was orphaned before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspect {
    /// Its name in the in-flight hash.
    pub token: Token,
    /// How often it was orphaned before.
    pub count: u64,
}

/// When suspects leave: all times on one clock, the lease clock for those of a dead instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timetable {
    /// Now.
    pub now: Duration,
    /// When the instance was fenced.
    pub since: Duration,
    /// When the last suspect left, if one did.
    pub last: Option<Duration>,
}

impl Timetable {
    /// One that begins now.
    #[must_use]
    pub fn beginning() -> Self {
        Self {
            now: Duration::ZERO,
            since: Duration::ZERO,
            last: None,
        }
    }

    /// How long each suspect has yet to wait, in the order in which they leave.
    ///
    /// They leave one at a time, so that the one that kills its process is soon alone in it: those that were orphaned less
    /// often first, else in an order that is another one for each instance. A gap before each lets the one before it
    /// finish. Many suspects get shorter gaps, so that all have left after a minute, or five. The first one waits too, from
    /// when the instance was fenced: jobs that die together must not come back together each time.
    #[must_use]
    pub fn waits(&self, from: &[u8], mut suspects: Vec<Suspect>) -> Vec<(Suspect, Duration)> {
        suspects.sort_by_cached_key(|suspect| (suspect.count, draw(from, &suspect.token)));
        let mut last = self.last.map(|last| last.min(self.now));
        let mut left = u32::try_from(suspects.len()).unwrap_or(u32::MAX);
        let mut waits = Vec::with_capacity(suspects.len());
        for suspect in suspects {
            let (gap, longest) = if suspect.count <= 1 { SECOND_TIME } else { LATER_TIMES };
            let at = match last {
                None => (self.since + first_pause(from, &suspect)).max(self.now),
                Some(last) => {
                    let rest = (self.since + longest).saturating_sub(last.max(self.now));
                    (last + gap.min(rest / left)).max(self.now)
                }
            };
            last = Some(at);
            left = left.saturating_sub(1).max(1);
            waits.push((suspect, at - self.now));
        }
        waits
    }
}

/// From half to one and a half of a pause that grows with the count.
fn first_pause(from: &[u8], suspect: &Suspect) -> Duration {
    let (pause, most) = FIRST;
    let doubled = u32::try_from(suspect.count.saturating_sub(1)).unwrap_or(u32::MAX);
    let pause = pause.saturating_mul(2_u32.saturating_pow(doubled)).min(most);
    // Not the bytes that decide on the order, in which the first is a low one.
    let drawn = draw(from, &suspect.token);
    let jitter = u16::from_be_bytes([drawn[18], drawn[19]]);
    pause / 2 + pause.mul_f64(f64::from(jitter) / f64::from(u16::MAX))
}

/// A number for the place of a token among others, the same for every reaper.
fn draw(from: &[u8], token: &Token) -> [u8; 20] {
    let mut hash = Sha1::new();
    hash.update(from);
    hash.update(b" ");
    hash.update(token.as_bytes());
    hash.digest().bytes()
}
