//! Where Redis is and how to get in.

use crate::password::Password;
use crate::sentinel::Sentinels;
use crate::server::Rendezvous;
use crate::tls::{self, Tls};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where Redis is and how to get in. Links made of clones of one target talk to one server: when one of them finds another
/// (a failover, a name that leads elsewhere now), the others leave theirs.
#[derive(Clone)]
pub struct Target {
    /// The server's address.
    pub address: Address,
    /// The database's number.
    pub db: i64,
    /// The user of an ACL.
    pub username: Option<String>,
    /// The password.
    pub password: Password,
    /// How the connection is encrypted; `None` for not at all.
    pub tls: Option<Tls>,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How long a reply may take.
    pub read_timeout: Duration,
    pub(crate) rendezvous: Arc<Rendezvous>,
}

/// A server's address.
#[derive(Debug, Clone)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String, u16),
    /// Whatever server these name.
    Sentinel(Arc<Sentinels>),
}

impl Target {
    /// Database 0 at this address, without a login. A second to connect, three for a reply.
    #[must_use]
    pub fn new(address: Address) -> Self {
        tls::prepare();
        Self {
            address,
            db: 0,
            username: None,
            password: Password::default(),
            tls: None,
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(3),
            rendezvous: Arc::default(),
        }
    }

    /// How long a connection may take to come about that is to be used with this timeout.
    pub(crate) fn time_to_connect(&self, timeout: Duration) -> Duration {
        timeout.min(self.connect_timeout)
    }

    /// How long a reply may take on a connection that is to be used with this timeout.
    pub(crate) fn time_to_reply(&self, timeout: Duration) -> Duration {
        timeout.min(self.read_timeout)
    }
}

/// Shows the server and the database, never the credentials.
impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "rediss" } else { "redis" };
        match &self.address {
            Address::Unix(path) => write!(formatter, "unix:{} db {}", path.display(), self.db),
            Address::Tcp(host, port) => write!(formatter, "{scheme}://{}/{}", place(host, *port), self.db),
            Address::Sentinel(sentinels) => {
                write!(formatter, "{scheme}://{}/{} (Sentinel)", sentinels.master(), self.db)
            }
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Target({self})")
    }
}

/// Host and port, as a person writes them.
pub(crate) fn place(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_no_credentials() {
        let mut target = Target::new(Address::Tcp("::1".into(), 6379));
        target.db = 2;
        target.username = Some("joe".into());
        target.password = "secret".into();
        assert_eq!(format!("{target:?}"), "Target(redis://[::1]:6379/2)");
        assert_eq!(format!("{:?}", target.password), "Password");
    }
}
