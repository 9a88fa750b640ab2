//! A master, a replica, and real sentinels that watch them.

use std::collections::BTreeSet;
use std::time::Duration;

use processing_tracker_core::password::Password;
use processing_tracker_core::sentinel::{Node, Sentinels};
use processing_tracker_core::target::{Address, Target};
use redis::Commands;

use super::redis_server::{Options, RedisServer};
use super::tracker::job;
use super::wait::{eventually, eventually_some};

/// The master's name.
pub const MASTER: &str = "main";
/// After which silence a sentinel takes a server for dead.
pub const DOWN_AFTER: Duration = Duration::from_millis(500);
/// For everything that the sentinels do. Long, since the machine may be busy.
pub const SOON: Duration = Duration::from_secs(60);

/// Two servers, the first of which is the master at first, and three sentinels.
pub struct Watched {
    pub servers: [RedisServer; 2],
    pub sentinels: Vec<RedisServer>,
}

impl Watched {
    /// Starts all, and waits until they know each other. `password`: the servers'; `sentinel_password`: the sentinels'.
    pub fn start(password: Option<&str>, sentinel_password: Option<&str>) -> Self {
        let server = |mut options: Options| {
            if let Some(password) = password {
                options = options.config("requirepass", password).config("masterauth", password);
            }
            options.tcp().config("repl-diskless-sync-delay", "0").start()
        };
        let master = server(Options::default());
        let port = master.port().expect("a port");
        let replica = server(Options::default().config("replicaof", &format!("127.0.0.1 {port}")));
        let sentinels = (0..3).map(|_| {
            let mut options = Options::default()
                .sentinel()
                .tcp()
                .config("sentinel monitor", &format!("{MASTER} 127.0.0.1 {port} 2"))
                .config(
                    "sentinel down-after-milliseconds",
                    &format!("{MASTER} {}", DOWN_AFTER.as_millis()),
                )
                .config("sentinel failover-timeout", &format!("{MASTER} 3000"));
            if let Some(password) = password {
                options = options.config("sentinel auth-pass", &format!("{MASTER} {password}"));
            }
            if let Some(password) = sentinel_password {
                options = options
                    .config("requirepass", password)
                    .config("sentinel sentinel-pass", password);
            }
            options.start()
        });
        let watched = Self {
            sentinels: sentinels.collect(),
            servers: [master, replica],
        };
        for sentinel in &watched.sentinels {
            let mut connection = sentinel.connect();
            if let Some(password) = sentinel_password {
                redis::cmd("AUTH").arg(password).exec(&mut connection).expect("a login");
            }
            eventually(SOON, "the sentinels know each other and the replica", || {
                let known: Vec<(String, String)> = redis::cmd("SENTINEL")
                    .arg("MASTER")
                    .arg(MASTER)
                    .query(&mut connection)
                    .expect("SENTINEL MASTER");
                let is = |name: &str, value: &str| known.iter().any(|(known, is)| known == name && is == value);
                is("num-slaves", "1") && is("num-other-sentinels", "2") && is("flags", "master")
            });
        }
        watched
    }

    /// What leads to the master.
    pub fn target(&self, password: Option<&str>, sentinel_password: Option<&str>) -> Target {
        let secret = |password: Option<&str>| password.map(Password::from).unwrap_or_default();
        let nodes = self.sentinels.iter().map(|sentinel| Node {
            host: "127.0.0.1".into(),
            port: sentinel.port().expect("a port"),
            username: None,
            password: secret(sentinel_password),
            tls: None,
        });
        let sentinels = Sentinels::new(MASTER.into(), nodes.collect());
        let mut target = Target::new(Address::Sentinel(sentinels.into()));
        target.password = secret(password);
        target
    }

    /// Waits until there is another master than the server at this port, which may stand still. Without passwords.
    pub fn wait_for_failover(&self, from: u16) -> &RedisServer {
        eventually_some(SOON, "the failover", || {
            let (_, port): (String, u16) = redis::cmd("SENTINEL")
                .arg("GET-MASTER-ADDR-BY-NAME")
                .arg(MASTER)
                .query(&mut self.sentinels[0].connect())
                .ok()?;
            let server = self.servers.iter().find(|server| server.port() == Some(port))?;
            if port == from {
                return None;
            }
            let role: (String, redis::Value, redis::Value) = redis::cmd("ROLE").query(&mut server.connect()).ok()?;
            (role.0 == "master").then_some(server)
        })
    }
}

/// Who pushes jobs, and what was answered.
#[derive(Default)]
pub struct Pusher {
    /// The jobs that a server has taken.
    pub taken: BTreeSet<String>,
    /// Those of them that the first server has taken, and no replica is known to have: a failover may lose them.
    pub at_risk: BTreeSet<String>,
    /// Of the connection that there is: those that no replica is known to have yet.
    unconfirmed: BTreeSet<String>,
    connection: Option<(usize, redis::Connection)>,
    number: usize,
}

impl Pusher {
    /// Pushes some to whichever of these is a master.
    pub fn push(&mut self, urls: &[String], queue: &str) {
        if self.connection.is_none() {
            self.connection = urls
                .iter()
                .enumerate()
                .find_map(|(server, url)| Some((server, master(url)?)));
        }
        let Some((server, connection)) = &mut self.connection else {
            std::thread::sleep(Duration::from_millis(20));
            return;
        };
        let jids: Vec<String> = (self.number..self.number + 10)
            .map(|number| format!("j{number}"))
            .collect();
        self.number += jids.len();
        let jobs: Vec<Vec<u8>> = jids.iter().map(|jid| job(jid)).collect();
        let pushed: redis::RedisResult<i64> = connection.lpush(format!("queue:{queue}"), jobs);
        let replicas = pushed.and_then(|_| {
            self.taken.extend(jids.iter().cloned());
            if *server == 0 {
                self.unconfirmed.extend(jids);
            }
            redis::cmd("WAIT").arg(1).arg(100).query::<i64>(connection)
        });
        match replicas {
            Ok(0) => {}
            // It has all that went over this connection before, too.
            Ok(_) => self.unconfirmed.clear(),
            Err(_) => self.disconnect(),
        }
    }

    /// Ends the connection: what is not confirmed by now never is.
    pub fn disconnect(&mut self) {
        self.connection = None;
        self.at_risk.append(&mut self.unconfirmed);
    }
}

fn master(url: &str) -> Option<redis::Connection> {
    let client = redis::Client::open(url).ok()?;
    let mut connection = client.get_connection_with_timeout(Duration::from_millis(200)).ok()?;
    connection.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
    let role: (String, redis::Value, redis::Value) = redis::cmd("ROLE").query(&mut connection).ok()?;
    (role.0 == "master").then_some(connection)
}
