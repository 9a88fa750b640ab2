//! What an engine is started with.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Where Redis is and how to get in.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    /// The server's address.
    pub address: Address,
    /// The database's number.
    pub db: i64,
    /// The user of an ACL.
    pub username: Option<String>,
    /// The password.
    pub password: Option<String>,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How long a reply may take.
    pub read_timeout: Duration,
}

/// A server's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String, u16),
}

/// Shows the server and the database, never the credentials.
impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(formatter, "unix:{} db {}", path.display(), self.db),
            Address::Tcp(host, port) if host.contains(':') => write!(formatter, "redis://[{host}]:{port}/{}", self.db),
            Address::Tcp(host, port) => write!(formatter, "redis://{host}:{port}/{}", self.db),
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Target({self})")
    }
}

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
    /// What the instance tells about itself.
    pub info: Vec<(String, String)>,
    /// Look for work from time to time, rather than be told of it by Redis.
    pub polls: bool,
}

/// No step is shorter: at some point beats are all that a process does, and in this namespace all others too.
const SHORTEST_STEP: Duration = Duration::from_millis(50);

impl Settings {
    /// `step`: the pace of the lease clock, the lesser of the interval and a fifth of the ttl.
    #[must_use]
    pub fn pace(&self) -> Pace {
        Pace {
            step: self.interval.min(self.ttl / 5).max(SHORTEST_STEP),
            ttl: self.ttl,
        }
    }
}

/// The namespace's step and ttl. Each instance brings its own; the last that registered decides for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How far the lease clock may move at once; an instance beats every 0.8 to 1.0 steps.
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_no_credentials() {
        let target = Target {
            address: Address::Tcp("::1".into(), 6379),
            db: 2,
            username: Some("joe".into()),
            password: Some("secret".into()),
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(1),
        };
        assert_eq!(format!("{target:?}"), "Target(redis://[::1]:6379/2)");
    }
}
