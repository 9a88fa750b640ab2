//! Connecting, and what is at the other end: which server, of which version, in which role, and what it lets us do.

use crate::error::{Error, Result};
use crate::keys::{self, Keys};
use crate::link::Link;
use crate::parker::lock;
use crate::password::Password;
use crate::scripts;
use crate::target::{Address, Target};
use crate::tls::{Tls, Verify};
use crate::wire::{Line, Wire};
use redis::io::tcp::TcpSettings;
use redis::{Client, Connection, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, Value};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::Duration;

/// The oldest version that has all that the scripts use.
const OLDEST: (u64, u64) = (6, 2);

/// What a connection tells Redis of us.
const LIBRARY: (&str, &str) = ("sidekiq-processing-tracker", env!("CARGO_PKG_VERSION"));

/// A connection that is ready for use.
pub(crate) struct Opened {
    pub line: Line,
    /// Compare with `Rendezvous::is_current`.
    pub visit: u64,
}

/// Which server the links that share a target talk to: the one that was reached last.
#[derive(Default)]
pub(crate) struct Rendezvous {
    server: Mutex<String>,
    visit: AtomicU64,
}

impl Rendezvous {
    /// A link has reached this server. Answers the number of the visit, the same for all that are at the same server.
    fn reached(&self, server: Option<&str>) -> u64 {
        let mut last = lock(&self.server);
        match server {
            Some(server) if *last != server => {
                server.clone_into(&mut last);
                self.visit.fetch_add(1, Ordering::AcqRel) + 1
            }
            _ => self.visit.load(Ordering::Acquire),
        }
    }

    /// Whether no link has reached another server since.
    pub fn is_current(&self, visit: u64) -> bool {
        self.visit.load(Ordering::Acquire) == visit
    }
}

/// How to get in.
pub(crate) struct Login<'a> {
    pub db: i64,
    pub username: Option<&'a str>,
    pub password: &'a Password,
}

/// Connects and looks whether this is a server to work with, however long name servers and the system take for it. `bare`: with a
/// socket that others may wait for, where it is not encrypted.
///
/// # Errors
/// `Error::Connection`; `Error::Refused`; `Error::Unfit`.
pub(crate) fn open(target: &Target, timeout: Duration, bare: bool) -> Result<Opened> {
    let (connect_within, reply_within) = (target.time_to_connect(timeout), target.time_to_reply(timeout));
    let login = Login {
        db: target.db,
        username: target.username.as_deref(),
        password: &target.password,
    };
    let tls = target.tls.as_ref();
    let reach = |address: ConnectionAddr| -> Result<(Line, Server)> {
        let mut line = if bare && tls.is_none() {
            connect_bare(&address, &login, connect_within, reply_within)?
        } else {
            Line::Library(connect(address, tls, &login, connect_within, reply_within)?)
        };
        let server = Server::examine(&mut line)?;
        Ok((line, server))
    };
    let (line, server) = match &target.address {
        Address::Unix(path) => reach(ConnectionAddr::Unix(path.clone()))?,
        Address::Tcp(host, port) => reach(tcp(host, *port, tls))?,
        Address::Sentinel(sentinels) => sentinels.open(connect_within, |host, port| {
            Ok(Some(reach(tcp(&host, port, tls))?).filter(|(_, server)| !server.is_replica))
        })?,
    };
    if server.is_replica {
        return Err(Error::Unfit(
            "this server is a replica, which takes no writes: the settings must lead to the master (or name the Sentinels)".into(),
        ));
    }
    Ok(Opened {
        line,
        visit: target.rendezvous.reached(server.run_id.as_deref()),
    })
}

pub(crate) fn tcp(host: &str, port: u16, tls: Option<&Tls>) -> ConnectionAddr {
    match tls {
        None => ConnectionAddr::Tcp(host.to_owned(), port),
        Some(tls) => ConnectionAddr::TcpTls {
            host: host.to_owned(),
            port,
            insecure: tls.verify == Verify::None,
            tls_params: None,
        },
    }
}

/// Connects and logs in.
///
/// # Errors
/// `Error::Connection`; `Error::Refused`; `Error::Unfit` where certificates or keys cannot be read.
pub(crate) fn connect(
    address: ConnectionAddr,
    tls: Option<&Tls>,
    login: &Login,
    connect_within: Duration,
    reply_within: Duration,
) -> Result<Connection> {
    let mut settings = RedisConnectionInfo::default()
        .set_db(login.db)
        .set_lib_name(LIBRARY.0, LIBRARY.1);
    if let Some(password) = login.password.get(connect_within) {
        settings = settings.set_password(password);
        // With a user always: a server without a password takes any from its default user in this form, and so do
        // Ruby's clients.
        settings = settings.set_username(login.username.unwrap_or("default"));
    }
    let info = address
        .into_connection_info()?
        .set_redis_settings(settings)
        .set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let client = match tls {
        None => Client::open(info)?,
        Some(tls) => encrypted(info, tls)?,
    };
    let connection = client.get_connection_with_timeout(connect_within).map_err(|error| {
        let closed = ["unexpected end of file", "reset by peer"];
        if tls.is_none() && closed.iter().any(|sign| error.to_string().contains(sign)) {
            return Error::Connection("the server closed the connection at once. Does it want TLS (rediss://)?".into());
        }
        error.into()
    })?;
    // redis-rs has taken its timeouts off again after the login.
    connection.set_read_timeout(Some(reply_within))?;
    connection.set_write_timeout(Some(reply_within))?;
    Ok(connection)
}

/// The same, with a socket that others may wait for.
fn connect_bare(
    address: &ConnectionAddr,
    login: &Login,
    connect_within: Duration,
    reply_within: Duration,
) -> Result<Line> {
    let mut line = Line::Wire(Wire::connect(address, connect_within, reply_within)?);
    if let Some(password) = login.password.get(connect_within) {
        log_in(&mut line, &[login.username.unwrap_or("default"), &password])?;
    }
    let mut commands = redis::pipe();
    if login.db != 0 {
        commands.cmd("SELECT").arg(login.db);
    }
    let needed = commands.len();
    for (what, value) in [("LIB-NAME", LIBRARY.0), ("LIB-VER", LIBRARY.1)] {
        // Redis has it since 7.2.
        commands.cmd("CLIENT").arg("SETINFO").arg(what).arg(value);
    }
    let answers = line.ask(&commands.get_packed_pipeline(), commands.len())?;
    for answer in answers.into_iter().take(needed) {
        answer.extract_error()?;
    }
    Ok(line)
}

/// Tells nothing of what the server says to that: a proxy may repeat the password.
fn log_in(line: &mut Line, credentials: &[&str]) -> Result<()> {
    line.send(&redis::cmd("AUTH").arg(credentials).get_packed_command())?;
    match line.receive()?.extract_error() {
        Ok(_) => Ok(()),
        // Some proxies know of no users.
        Err(error)
            if credentials.len() == 2 && error.detail().is_some_and(|detail| detail.contains("wrong number")) =>
        {
            log_in(line, &credentials[1..])
        }
        Err(_) => Err(Error::Refused("Redis refused the username or password".into())),
    }
}

fn encrypted(info: redis::ConnectionInfo, tls: &Tls) -> Result<Client> {
    let unfit = |error: redis::RedisError| Error::Unfit(format!("TLS cannot be used as configured: {error}"));
    let client = Client::build_with_tls(info, tls.certificates()?).map_err(unfit)?;
    let info = client.get_connection_info().clone();
    let mut address = info.addr().clone();
    address.set_danger_accept_invalid_hostnames(tls.verify == Verify::Chain);
    Client::open(info.set_addr(address)).map_err(unfit)
}

/// What a server says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Server {
    /// Drawn anew with each start of a server. `None` where it does not tell.
    run_id: Option<String>,
    is_replica: bool,
}

impl Server {
    fn examine(line: &mut Line) -> Result<Self> {
        let mut questions = redis::pipe();
        // Everybody may say HELLO. Who may not ask INFO does without the run id.
        questions.cmd("HELLO");
        questions.cmd("INFO").arg("server");
        let answers = line.ask(&questions.get_packed_pipeline(), questions.len())?;
        let mut answers = answers.into_iter().map(Value::extract_error);
        let (hello, info) = (
            answers.next().unwrap_or(Ok(Value::Nil)),
            answers.next().unwrap_or(Ok(Value::Nil)),
        );
        match (hello, info) {
            // A password is wanted.
            (Err(_), Err(error)) if error.code() == Some("NOAUTH") => Err(error.into()),
            (hello, info) => Self::judge(
                &hello.map(fields).unwrap_or_default(),
                &info.map(text).map(|text| lines(&text)).unwrap_or_default(),
            ),
        }
    }

    fn judge(hello: &BTreeMap<String, String>, info: &BTreeMap<String, String>) -> Result<Self> {
        let version = info.get("redis_version").or_else(|| hello.get("version"));
        let numbers = |text: &String| {
            let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
            (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
        };
        // What answers neither question is older than both, or no server at all.
        if version.map_or((0, 0), numbers) < OLDEST {
            let version = version.map_or("of an unknown version", String::as_str);
            return Err(Error::Unfit(format!(
                "this Redis is {version}: needed is Redis 6.2, Valkey 7.2, or newer"
            )));
        }
        match hello.get("mode").or_else(|| info.get("redis_mode")).map(String::as_str) {
            Some("cluster") => Err(Error::Unfit(
                "this server is part of a Redis Cluster, on which Sidekiq itself is not safe: use a server without cluster mode"
                    .into(),
            )),
            Some("sentinel") => Err(Error::Unfit(
                "this is a Sentinel: name it under sentinels, and the master's name as host of the url or as name".into(),
            )),
            _ => Ok(Self {
                run_id: info.get("run_id").cloned(),
                is_replica: matches!(hello.get("role").map(String::as_str), Some("replica" | "slave")),
            }),
        }
    }
}

fn fields(reply: Value) -> BTreeMap<String, String> {
    let Value::Array(values) = reply else {
        return BTreeMap::new();
    };
    let texts: Vec<String> = values.into_iter().map(text).collect();
    texts
        .chunks_exact(2)
        .map(|pair| (pair[0].clone(), pair[1].clone()))
        .collect()
}

fn text(reply: Value) -> String {
    match reply {
        Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text,
        _ => String::new(),
    }
}

fn lines(info: &str) -> BTreeMap<String, String> {
    let pairs = info.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// What Redis throws away when its memory is full, if not nothing: `maxmemory-policy`.
///
/// # Errors
/// As for every command.
pub(crate) fn evicts(link: &mut Link) -> Result<Option<String>> {
    let memory = lines(&text(link.command(redis::cmd("INFO").arg("memory"))?));
    Ok(memory
        .get("maxmemory_policy")
        .filter(|policy| *policy != "noeviction")
        .cloned())
}

/// Commands, a key like those that they are for, and these in words.
type Rights = (&'static [&'static str], String, String);

fn right(commands: &'static [&'static str], key: &str, pattern: &str) -> Rights {
    (commands, key.to_owned(), pattern.to_owned())
}

/// What is done with locks of sidekiq-unique-jobs.
const LOCKS: &[&str] = &[
    "DEL", "EXISTS", "GET", "HDEL", "HEXISTS", "HLEN", "HSET", "LREM", "PEXPIRE", "SET", "ZADD", "ZREM",
];

/// What `deliver` does in Sidekiq's Redis where that is another one. docs/operations.md, "Two Redises", says it as an ACL.
fn rights_to_deliver() -> Vec<Rights> {
    vec![
        right(&["LPUSH", "RPUSH"], "queue:x", "queue:*"),
        right(&["SADD"], keys::QUEUES, keys::QUEUES),
        right(&["ZADD", "ZREMRANGEBYRANK", "ZREMRANGEBYSCORE"], keys::DEAD, keys::DEAD),
        right(LOCKS, "uniquejobs:x", "uniquejobs:*"),
        right(&["TIME"], "", "no key"),
    ]
}

/// All that the scripts and commands do which the tracker cannot do without. docs/operations.md, "A user of its own", says it
/// as an ACL.
fn rights(keys: &Keys) -> Vec<Rights> {
    const OURS: &[&str] = &[
        "DEL",
        "EXISTS",
        "GET",
        "HDEL",
        "HEXISTS",
        "HGET",
        "HGETALL",
        "HINCRBY",
        "HKEYS",
        "HLEN",
        "HMGET",
        "HRANDFIELD",
        "HSCAN",
        "HSET",
        "MGET",
        "PEXPIRE",
        "SET",
        "SISMEMBER",
        "SMEMBERS",
        "SREM",
        "STRLEN",
        "TYPE",
        "XADD",
        "XREVRANGE",
        "ZADD",
        "ZCARD",
        "ZRANGE",
        "ZRANGEBYSCORE",
        "ZREM",
        "ZSCORE",
    ];
    const OUTBOX: &[&str] = &[
        "LPUSH",
        "LRANGE",
        "LREM",
        "RPUSH",
        "SADD",
        "ZREMRANGEBYRANK",
        "ZREMRANGEBYSCORE",
    ];
    const DUE: &[&str] = &["ZADD", "ZRANGEBYSCORE", "ZREM"];
    let ours = (OURS, keys.key("x"), keys.key("*"));
    if keys.has_outbox() {
        return vec![ours, (OUTBOX, keys.key("x"), keys.key("*"))];
    }
    vec![
        ours,
        right(&["RPOP"], &keys.key("x"), &keys.key("*")),
        right(&["EXISTS", "LPUSH", "RPOP", "RPUSH"], "queue:x", "queue:*"),
        right(&["SADD"], keys::QUEUES, keys::QUEUES),
        right(&["ZADD", "ZREMRANGEBYRANK", "ZREMRANGEBYSCORE"], keys::DEAD, keys::DEAD),
        right(DUE, "schedule", "schedule"),
        right(DUE, "retry", "retry"),
        right(&["SREM"], keys::PROCESSES, keys::PROCESSES),
        right(&["DEL", "PTTL"], "host:1:x", "*:*:* (Sidekiq's processes)"),
        right(LOCKS, "uniquejobs:x", "uniquejobs:*"),
    ]
}

/// What the user may not do and should, in words; `None` where nothing is missing, or Redis does not tell (before 7.0).
///
/// # Errors
/// As for every script.
pub(crate) fn missing_rights(link: &mut Link, keys: &Keys) -> Result<Option<String>> {
    missing(link, &rights(keys))
}

fn missing(link: &mut Link, wanted: &[Rights]) -> Result<Option<String>> {
    let each = wanted
        .iter()
        .enumerate()
        .flat_map(|(at, (commands, key, _))| commands.iter().map(move |command| (*command, key.as_str(), at)));
    let mut missing: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (command, at) in scripts::forbidden(link, each)? {
        missing.entry(at).or_default().push(command.to_lowercase());
    }
    let missing: Vec<String> = missing
        .into_iter()
        .filter_map(|(at, commands)| Some(format!("{} on {}", commands.join(", "), wanted.get(at)?.2)))
        .collect();
    Ok((!missing.is_empty()).then(|| missing.join("; ")))
}

/// The error, naming what the user may not do where Redis has refused something for that.
pub(crate) fn explain(link: &mut Link, keys: &Keys, error: &Error) -> Option<Error> {
    let text = match error {
        Error::Refused(text) if speaks_of_rights(text) => text,
        _ => return None,
    };
    let missing = missing_rights(link, keys).ok().flatten()?;
    Some(Error::Refused(format!(
        "{text}. This user lacks: {missing} (docs/operations.md, \"A user of its own\")"
    )))
}

/// Whether Redis refuses something for want of a right.
pub(crate) fn is_of_rights(error: &Error) -> bool {
    matches!(error, Error::Refused(text) if speaks_of_rights(text))
}

fn speaks_of_rights(text: &str) -> bool {
    ["NOPERM", "ACL failure", "can't run this command"]
        .iter()
        .any(|words| text.contains(words))
}

/// Looks whether a server can be used, before anything depends on it.
///
/// # Errors
/// `Error::Unfit` where it cannot; `Error::Connection` where nobody knows; `Error::Refused`, as while Redis loads its data.
pub fn examine(target: &Target, keys: &Keys, timeout: Duration) -> Result<()> {
    examine_for(target, &rights(keys), "A user of its own", timeout)
}

/// The same of Sidekiq's own server, where that is another one: whether jobs can be brought there.
///
/// # Errors
/// As for `examine`.
pub fn examine_queues(target: &Target, timeout: Duration) -> Result<()> {
    examine_for(target, &rights_to_deliver(), "Two Redises", timeout)
}

fn examine_for(target: &Target, wanted: &[Rights], listed: &str, timeout: Duration) -> Result<()> {
    let mut link = Link::new(target.clone(), timeout);
    let missing = match missing(&mut link, wanted) {
        // One who may not even run scripts.
        Err(Error::Refused(text)) if speaks_of_rights(&text) => Some(text),
        missing => missing?,
    };
    match missing {
        None => Ok(()),
        Some(missing) => Err(Error::Unfit(format!(
            "{target}: this user lacks rights that the tracker needs: {missing}. docs/operations.md lists them under \"{listed}\""
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn judge(hello: &[(&str, &str)], info: &str) -> Result<Server> {
        let hello = hello
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Server::judge(&hello.collect(), &lines(info))
    }

    // What these versions answer.
    #[test]
    fn the_rights_that_are_asked_for_are_those_that_the_scripts_need() {
        let keys = Keys::new("ns");
        let asked: BTreeSet<&str> = rights(&keys)
            .iter()
            .chain(&rights_to_deliver())
            .flat_map(|(commands, ..)| commands.iter().copied())
            // The last is needed where others have it (docs/operations.md).
            .chain(["LINDEX"])
            .collect();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lua");
        let mut found = 0;
        for file in std::fs::read_dir(folder).unwrap() {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            for call in text.split("redis.call('").skip(1) {
                let name = call.split('\'').next().unwrap();
                assert!(asked.contains(name), "{name} is asked for nowhere");
                found += 1;
            }
        }
        assert!(found > 100, "{found}");
    }

    #[test]
    fn takes_new_servers_and_refuses_old_ones() {
        let hello = [
            ("server", "redis"),
            ("version", "7.0.15"),
            ("mode", "standalone"),
            ("role", "master"),
        ];
        let info = "# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\nrun_id:51ab\r\n";
        let server = judge(&hello, info).unwrap();
        assert_eq!((server.run_id.as_deref(), server.is_replica), (Some("51ab"), false));
        // INFO is forbidden; Valkey.
        assert_eq!(judge(&hello, "").unwrap().run_id, None);
        assert!(judge(
            &[],
            "server_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:8.1.1\r\n"
        )
        .is_ok());
        assert!(judge(&[], "redis_version:6.2.0\r\n").is_ok());
        for old in ["redis_version:6.0.16\r\nrun_id:1\r\n", "redis_version:2.8.4\r\n"] {
            let error = judge(&[], old).unwrap_err().to_string();
            assert!(error.starts_with("this Redis is "), "{error}");
            assert!(error.contains("needed is Redis 6.2"), "{error}");
        }
        assert!(judge(&[], "")
            .unwrap_err()
            .to_string()
            .contains("of an unknown version"));
    }

    #[test]
    fn knows_replicas_clusters_and_sentinels() {
        let of = |mode, role| [("version", "7.0.15"), ("mode", mode), ("role", role)];
        assert!(judge(&of("standalone", "replica"), "").unwrap().is_replica);
        assert!(judge(&of("cluster", "master"), "")
            .unwrap_err()
            .to_string()
            .contains("Redis Cluster"));
        assert!(judge(&of("sentinel", "master"), "")
            .unwrap_err()
            .to_string()
            .contains("sentinels"));
    }
}
