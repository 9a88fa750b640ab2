//! A real `redis-server` of the test's own, in a temporary directory, gone with the test.
//!
//! `REDIS_SERVER` names another program (an older Redis, Valkey). It is started through `setpriv --pdeathsig`
//! where that exists, so it dies with the test process, however that ends.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{mpsc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::wait::{eventually, eventually_some};

/// Whom the instances of the tests log in as. It may do what docs/operations.md says that it must, and nothing else.
pub const USER: &str = "tracker";
/// Its password.
pub const PASSWORD: &str = "of-the-tracker";

/// What docs/operations.md gives a user of the tracker's own, as in an ACL.
fn rules() -> String {
    let docs = include_str!("../../../../../docs/operations.md");
    let begin = docs.find("ACL SETUSER tracker ").expect("a user in docs/operations.md");
    let command = docs[begin..].split("\n```").next().expect("a block");
    let words = command.split_whitespace().filter(|word| *word != "\\").skip(3);
    words
        .filter(|word| *word != "on" && !word.starts_with('>'))
        .collect::<Vec<_>>()
        .join(" ")
}

/// For everything that a healthy server does at once. Long, since the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a server is to be started. Everything off: in memory only, one unix socket.
#[derive(Clone, Debug, Default)]
pub struct Options {
    config: Vec<(String, String)>,
    tcp: bool,
    fake_clock: bool,
    sentinel: bool,
}

impl Options {
    /// Starts as a sentinel.
    pub fn sentinel(mut self) -> Self {
        self.sentinel = true;
        self
    }

    /// Also listens on a free port of 127.0.0.1.
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// Lets the test move the server's clock, see [`RedisServer::set_clock`]. Needs the package `faketime`.
    pub fn fake_clock(mut self) -> Self {
        self.fake_clock = true;
        self
    }

    /// Memory limit as Redis reads it (`"10mb"`), with the policy `noeviction`.
    pub fn maxmemory(self, limit: &str) -> Self {
        self.config("maxmemory", limit).config("maxmemory-policy", "noeviction")
    }

    /// Keeps an append-only file, so what was answered survives [`RedisServer::crash`].
    pub fn appendonly(self) -> Self {
        self.config("appendonly", "yes")
    }

    /// Refuses writes (NOREPLICAS) while fewer than `count` replicas are there: with none, from the start.
    pub fn min_replicas_to_write(self, count: u32) -> Self {
        self.config("min-replicas-to-write", &count.to_string())
    }

    /// When to write the RDB file, such as `"3600 1"`. `stop` then writes it too.
    pub fn save(self, points: &str) -> Self {
        self.config("save", points)
    }

    /// Any line of redis.conf.
    pub fn config(mut self, name: &str, value: &str) -> Self {
        self.config.retain(|(known, _)| known != name);
        self.config.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the server and waits until it answers.
    pub fn start(self) -> RedisServer {
        RedisServer::with(self)
    }
}

/// A running (or stopped, or killed) server and its directory. Dropping it removes both.
pub struct RedisServer {
    dir: TempDir,
    options: Options,
    port: Option<u16>,
    child: Option<Child>,
}

impl RedisServer {
    /// A server with default options.
    pub fn start() -> Self {
        Options::default().start()
    }

    fn with(options: Options) -> Self {
        let dir = TempDir::with_prefix("tracker-redis-").expect("a temporary directory");
        let port = options.tcp.then(free_port);
        let mut server = RedisServer {
            dir,
            options,
            port,
            child: None,
        };
        if server.options.fake_clock {
            server.write_clock(0);
        }
        server.launch();
        server
    }

    /// The unix socket.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// The directory with configuration, log and data.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The port on 127.0.0.1, where one was asked for.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Url of the unix socket, database 0.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket_path().display())
    }

    /// Host and port, where it listens on one.
    pub fn tcp_url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port.expect("a port"))
    }

    /// The process id. Panics when the server does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running server").id()
    }

    /// A new connection, straight to the server. One that a Sentinel tells of another role closes all that it has, also those
    /// that are being made.
    pub fn connect(&self) -> redis::Connection {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match self.try_connect() {
                Err(error) if error.is_connection_dropped() && Instant::now() < deadline => {}
                connection => return connection.expect("a connection to the test's Redis"),
            }
        }
    }

    /// A new connection, straight to the server, or why there is none.
    pub fn try_connect(&self) -> redis::RedisResult<redis::Connection> {
        redis::Client::open(self.url())?.get_connection()
    }

    /// Sets one configuration parameter of the running server.
    pub fn config_set(&self, name: &str, value: &str) {
        redis::cmd("CONFIG")
            .arg("SET")
            .arg(name)
            .arg(value)
            .exec(&mut self.connect())
            .expect("CONFIG SET");
    }

    /// How often this command was called, as Redis counts; from scripts too.
    pub fn calls_of(&self, command: &str) -> u64 {
        let stats: String = redis::cmd("INFO")
            .arg("commandstats")
            .query(&mut self.connect())
            .expect("INFO");
        let name = format!("cmdstat_{command}:calls=");
        let line = stats.lines().find_map(|line| line.strip_prefix(name.as_str()));
        line.map_or(0, |line| {
            line.split(',').next().expect("a number").parse().expect("a number")
        })
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("redis.log")).unwrap_or_default()
    }

    /// SIGTERM, and waits for the end. Redis then writes what it is configured to keep.
    pub fn stop(&mut self) {
        let Some(child) = self.child.as_mut() else {
            return;
        };
        signal(child, Signal::SIGTERM);
        // A stopped process would never see the TERM.
        signal(child, Signal::SIGCONT);
        eventually(DEADLINE, "redis-server ends on TERM", || {
            child.try_wait().expect("wait").is_some()
        });
        self.child = None;
    }

    /// SIGKILL, and waits for the end.
    pub fn crash(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// Starts again after `stop` or `crash`, same socket, port, directory; waits until it answers.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "the server still runs");
        self.launch();
    }

    /// `stop`, then `start_again`.
    pub fn restart(&mut self) {
        self.stop();
        self.start_again();
    }

    /// SIGSTOP: connections stay, nothing is answered. Returns when the process stands.
    pub fn pause(&self) {
        let child = self.child.as_ref().expect("a running server");
        signal(child, Signal::SIGSTOP);
        let pid = Pid::from_raw(child.id() as i32);
        eventually(DEADLINE, "redis-server stands", || {
            let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)).expect("wait");
            matches!(status, WaitStatus::Stopped(..))
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        signal(self.child.as_ref().expect("a running server"), Signal::SIGCONT);
    }

    /// Sets the server's clock this many seconds after (or, negative, before) the true time. Returns when
    /// `TIME` shows it. Needs [`Options::fake_clock`]. A server that stands or is down sees it later.
    pub fn set_clock(&self, seconds: i64) {
        assert!(self.options.fake_clock, "started without fake_clock()");
        self.write_clock(seconds);
        if self.child.is_none() {
            return;
        }
        let mut connection = self.connect();
        eventually(DEADLINE, "TIME shows the new clock", || {
            let (now, _): (i64, i64) = redis::cmd("TIME").query(&mut connection).expect("TIME");
            (now - unix_now() - seconds).abs() <= 2
        });
    }

    /// Makes the server refuse writes with MISCONF, as on a full disk: its last save failed.
    pub fn break_saves(&self) {
        // A directory where the file belongs: fails for root as well.
        let rdb = self.dir.path().join("dump.rdb");
        let _ = fs::remove_file(&rdb);
        fs::create_dir_all(rdb.join("in the way")).expect("a directory");
        self.config_set("save", "3600 1");
        self.save_until("err");
    }

    /// Lets saves, and so writes, succeed again after `break_saves`.
    pub fn mend_saves(&self) {
        fs::remove_dir_all(self.dir.path().join("dump.rdb")).expect("the directory is there");
        self.save_until("ok");
    }

    fn save_until(&self, status: &str) {
        let mut connection = self.connect();
        let mut info = || -> String {
            redis::cmd("INFO")
                .arg("persistence")
                .query(&mut connection)
                .expect("INFO")
        };
        eventually(DEADLINE, "no save under way", || {
            info().contains("rdb_bgsave_in_progress:0")
        });
        redis::cmd("BGSAVE").exec(&mut self.connect()).expect("BGSAVE");
        eventually(DEADLINE, &format!("the save ends: {status}"), || {
            let text = info();
            text.contains("rdb_bgsave_in_progress:0") && text.contains(&format!("rdb_last_bgsave_status:{status}"))
        });
    }

    fn launch(&mut self) {
        let file = self.dir.path().join("redis.conf");
        fs::write(&file, self.config_file(&file)).expect("redis.conf");
        // A socket file of a killed server would look like a living one.
        let _ = fs::remove_file(self.socket_path());
        let mut line: Vec<String> = Vec::new();
        if has_setpriv() {
            line.extend(["setpriv", "--pdeathsig", "KILL"].map(String::from));
        }
        if self.options.fake_clock {
            // libfaketime allocates while jemalloc, which Redis is linked to, starts up and asks for the time:
            // they wait for each other for ever. With libc's own malloc in front they do not meet.
            line.push("env".into());
            line.push(format!("LD_PRELOAD={}:libc.so.6", faketime_library().display()));
            line.push(format!("FAKETIME_TIMESTAMP_FILE={}", self.clock_file().display()));
            line.extend(["FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"].map(String::from));
        }
        line.push(std::env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".into()));
        line.push(file.display().to_string());
        if self.options.sentinel {
            line.push("--sentinel".into());
        }
        let mut command = Command::new(&line[0]);
        command
            .args(&line[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = spawn(command).unwrap_or_else(|e| panic!("cannot start {}: {e}", line.join(" ")));
        let ended = eventually_some(DEADLINE, "redis-server answers", || {
            if let Some(status) = child.try_wait().expect("wait") {
                return Some(Some(status));
            }
            let mut connection = self.try_connect().ok()?;
            match redis::cmd("PING").query::<String>(&mut connection) {
                Ok(pong) => (pong == "PONG").then_some(None),
                // Asking for a password is an answer too.
                Err(error) => (error.code() == Some("NOAUTH")).then_some(None),
            }
        });
        if let Some(status) = ended {
            panic!("redis-server ended at once ({status}):\n{}", self.log());
        }
        self.child = Some(child);
    }

    fn config_file(&self, file: &Path) -> String {
        let dir = self.dir.path().display();
        let mut text = format!(
            "port {}\nbind 127.0.0.1\nunixsocket \"{}\"\ndir \"{dir}\"\nlogfile \"{dir}/redis.log\"\ndaemonize no\n",
            self.port.unwrap_or(0),
            self.socket_path().display(),
        );
        if !self.options.sentinel {
            text.push_str(&format!("user {USER} on >{PASSWORD} {}\n", rules()));
        }
        if !self.options.sentinel && !self.options.config.iter().any(|(name, _)| name == "save") {
            text.push_str("save \"\"\n");
        }
        for (name, value) in &self.options.config {
            text.push_str(&format!("{name} {}\n", if value.is_empty() { "\"\"" } else { value }));
        }
        if self.options.sentinel && file.exists() {
            // It writes down what it learns, and comes back with that.
            return fs::read_to_string(file).expect("redis.conf");
        }
        text
    }

    fn clock_file(&self) -> PathBuf {
        self.dir.path().join("clock")
    }

    fn write_clock(&self, seconds: i64) {
        // By rename: the server reads the file at every look at the clock, and must never see half of it.
        let new = self.dir.path().join("clock.new");
        fs::write(&new, format!("{seconds:+}\n")).expect("clock file");
        fs::rename(new, self.clock_file()).expect("clock file");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of the test's Redis ---\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Seconds since 1970 by this machine's clock.
pub fn unix_now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_secs() as i64
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).expect("signal");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port()
}

/// Whether `setpriv` is there, which makes a child die with its parent.
pub fn has_setpriv() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let status = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "true"])
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|s| s.success())
    })
}

fn faketime_library() -> PathBuf {
    if let Ok(path) = std::env::var("FAKETIME_LIB") {
        return path.into();
    }
    let mut places: Vec<PathBuf> = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    places.extend(["/usr/lib", "/usr/lib64", "/usr/local/lib"].map(PathBuf::from));
    let files = places.into_iter().map(|p| p.join("faketime/libfaketimeMT.so.1"));
    files
        .into_iter()
        .find(|f| f.exists())
        .expect("libfaketime: install the package `faketime` (or set FAKETIME_LIB)")
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a process from a thread that lives as long as this process does. The kernel sends the death signal
/// when the *thread* that started a process ends, and each test has a thread of its own.
pub fn spawn(command: Command) -> io::Result<Child> {
    static STARTER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, child) = mpsc::channel();
    starter
        .lock()
        .unwrap_or_else(|e| e.into_inner())
        .send((command, answer))
        .expect("the starter lives");
    child.recv().expect("the starter lives")
}
