//! A proxy between a client and Redis that does to the link what networks do, and says what it did.
//!
//! It listens on a unix socket and on 127.0.0.1. It knows where a request and a reply end, so a fault hits a
//! known byte of a known call. What happens is decided for each request by a [`Plan`]: a closure of the test,
//! or [`Faults`], which draws from a seed.
//!
//! ```ignore
//! let proxy = Proxy::start(server.socket_path(), |request: &Request| match request.total {
//!     4 => Action::drop_reply(),                  // executed, the client never learns it
//!     7 => Action::postpone(When::OnRelease),     // arrives when the client has long given up
//!     _ => Action::pass(),
//! });
//! ```
//!
//! A request is one command, also where several come in one pipeline, or one transaction, from MULTI to EXEC. A late delivery has
//! a connection of its own, prepared with the AUTH, SELECT and HELLO that the original one had sent. But that of a transaction
//! comes over the original one: what it has Redis WATCH makes a late one harmless. So there is no copy of one, only a late
//! original.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use tempfile::TempDir;

use super::resp;
use super::rng::Rng;
use super::wait::{eventually, eventually_some};

/// How long a late delivery waits for its reply, and a close for the threads.
const PATIENCE: Duration = Duration::from_secs(10);

/// One complete request, on its way to Redis.
#[derive(Clone, Debug)]
pub struct Request {
    /// Number of the connection, from 1, in the order in which they were accepted.
    pub connection: u64,
    /// Its number on this connection, from 1.
    pub index: u64,
    /// Its number on this proxy, from 1.
    pub total: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Request {
    /// The arguments, the command's name first.
    pub fn args(&self) -> Vec<&[u8]> {
        resp::args(&self.bytes)
    }

    /// The command's name in capitals.
    pub fn command(&self) -> String {
        String::from_utf8_lossy(self.args().first().unwrap_or(&&b""[..])).to_ascii_uppercase()
    }

    /// Whether the bytes hold this text anywhere (a key, a script's SHA1).
    pub fn contains(&self, text: &str) -> bool {
        self.bytes.windows(text.len()).any(|window| window == text.as_bytes())
    }

    /// Whether it is a transaction that does something.
    pub fn is_transaction(&self) -> bool {
        self.command() == "MULTI" && self.contains("HSET")
    }

    /// Whether it prepares its connection only, and changes nothing in Redis.
    pub fn is_setup(&self) -> bool {
        matches!(
            self.command().as_str(),
            "AUTH" | "SELECT" | "HELLO" | "CLIENT" | "PING" | "SCRIPT" | "INFO" | "ROLE"
        )
    }
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Closed: the client reads the end of the stream.
    Close,
    /// With an RST on TCP. A unix socket has no such thing, there it is a close.
    Reset,
    /// Not at all: it stays open and silent, until the client closes it.
    Silence,
}

/// A place in a request or a reply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum At {
    /// After so many bytes (at most all of them).
    Byte(usize),
    /// This many bytes before the end.
    BeforeEnd(usize),
    /// After this share, from 0.0 to 1.0.
    Share(f64),
    /// After the last byte.
    End,
}

impl At {
    fn of(self, len: usize) -> usize {
        match self {
            At::Byte(n) => n.min(len),
            At::BeforeEnd(n) => len.saturating_sub(n),
            At::Share(share) => ((len as f64 * share) as usize).min(len),
            At::End => len,
        }
    }
}

/// When something late happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// This much later.
    After(Duration),
    /// When the test calls [`Proxy::release_late`].
    OnRelease,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OnRequest {
    /// It goes on at once.
    Pass,
    /// It goes on later; what follows it on this connection waits. Also when the client has gone meanwhile.
    Delay(Duration),
    /// Redis gets the bytes before this place, then the connection ends. `At::End`: Redis executes it.
    Cut(At, End),
    /// Redis gets it later, by a connection of its own, and nobody hears the reply. This one ends so.
    Postpone(When, End),
}

/// What happens to a reply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OnReply {
    /// It goes on at once.
    Pass,
    /// It goes on later.
    Delay(Duration),
    /// The client gets the bytes before this place, then the connection ends. Redis has executed the call.
    Cut(At, End),
    /// It goes on at once, and the connection is closed this much later, whatever it then does.
    CloseAfter(Duration),
}

/// What happens to one request, its reply, and whether a copy follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Action {
    /// To the request.
    pub request: OnRequest,
    /// To the reply, where there is one.
    pub reply: OnReply,
    /// A second copy of the request reaches Redis then, by a connection of its own; nobody hears the reply.
    /// It is made whatever happens to the request itself. Not of a transaction.
    pub copy: Option<When>,
}

impl Action {
    /// Nothing is done to it.
    pub fn pass() -> Self {
        Action {
            request: OnRequest::Pass,
            reply: OnReply::Pass,
            copy: None,
        }
    }

    /// The request goes on later.
    pub fn delay(by: Duration) -> Self {
        Action {
            request: OnRequest::Delay(by),
            ..Self::pass()
        }
    }

    /// The reply goes on later.
    pub fn delay_reply(by: Duration) -> Self {
        Action {
            reply: OnReply::Delay(by),
            ..Self::pass()
        }
    }

    /// Redis gets nothing of it and the connection is closed.
    pub fn drop_request() -> Self {
        Self::cut_request(At::Byte(0), End::Close)
    }

    /// Redis executes it, the client gets nothing of the reply and the connection is closed.
    pub fn drop_reply() -> Self {
        Self::cut_reply(At::Byte(0), End::Close)
    }

    /// The connection ends in the request.
    pub fn cut_request(at: At, end: End) -> Self {
        Action {
            request: OnRequest::Cut(at, end),
            ..Self::pass()
        }
    }

    /// The connection ends in the reply.
    pub fn cut_reply(at: At, end: End) -> Self {
        Action {
            reply: OnReply::Cut(at, end),
            ..Self::pass()
        }
    }

    /// Nothing reaches Redis, nothing comes back, the connection stays open.
    pub fn stall() -> Self {
        Self::cut_request(At::Byte(0), End::Silence)
    }

    /// Redis executes it, nothing comes back, the connection stays open.
    pub fn stall_reply() -> Self {
        Self::cut_reply(At::Byte(0), End::Silence)
    }

    /// Redis gets it late, and the client's connection is closed at once.
    pub fn postpone(when: When) -> Self {
        Action {
            request: OnRequest::Postpone(when, End::Close),
            ..Self::pass()
        }
    }

    /// The same action, and a late copy.
    pub fn and_copy(self, when: When) -> Self {
        Action {
            copy: Some(when),
            ..self
        }
    }
}

/// What happens to a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConnect {
    /// It is relayed.
    Accept,
    /// It is closed at once.
    Close,
    /// It is accepted and never answered.
    Silence,
}

/// Decides what happens. A closure from `&Request` to [`Action`] is one.
pub trait Plan: Send {
    /// To the new connection with this number.
    fn connect(&mut self, _connection: u64) -> OnConnect {
        OnConnect::Accept
    }

    /// To this request and its reply.
    fn request(&mut self, request: &Request) -> Action;
}

impl<F: FnMut(&Request) -> Action + Send> Plan for F {
    fn request(&mut self, request: &Request) -> Action {
        self(request)
    }
}

/// A plan without faults.
pub fn relay(_request: &Request) -> Action {
    Action::pass()
}

/// The random plan. Every field but the seed and the durations is a probability, of a connection or a request.
/// What happens to request 7 of connection 3 depends on the seed alone.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Where the numbers come from.
    pub seed: u64,
    /// A new connection is closed at once.
    pub refuse: f64,
    /// A new connection stays silent.
    pub mute: f64,
    /// A connection ends in a request: before it, in it, or after its last byte, as often each.
    pub cut_request: f64,
    /// A connection ends in a reply: before it, in it, or after its last byte, as often each.
    pub cut_reply: f64,
    /// A request goes on later, `max_delay` at most.
    pub delay: f64,
    /// A reply goes on later, `max_delay` at most.
    pub delay_reply: f64,
    /// The connection falls silent before a request.
    pub stall: f64,
    /// The connection falls silent before a reply.
    pub stall_reply: f64,
    /// A request reaches Redis up to `max_late` later, its connection closed or silent.
    pub postpone: f64,
    /// A copy of a request reaches Redis up to `max_late` later.
    pub copy: f64,
    /// The connection is closed up to `max_late` after a reply, in whatever it then does.
    pub close_later: f64,
    /// The longest delay of a request or reply.
    pub max_delay: Duration,
    /// How late a late request is at most.
    pub max_late: Duration,
    /// Of which requests there may be copies. A network makes no copies: a late copy is a first try that a
    /// client gave up. So a call that is never tried again must not be copied.
    pub may_copy: fn(&Request) -> bool,
}

impl Faults {
    /// No faults, to start from.
    pub fn none(seed: u64) -> Self {
        Faults {
            seed,
            refuse: 0.0,
            mute: 0.0,
            cut_request: 0.0,
            cut_reply: 0.0,
            delay: 0.0,
            delay_reply: 0.0,
            stall: 0.0,
            stall_reply: 0.0,
            postpone: 0.0,
            copy: 0.0,
            close_later: 0.0,
            max_delay: Duration::from_millis(20),
            max_late: Duration::from_millis(300),
            may_copy: |request| !request.is_setup(),
        }
    }

    /// Some of everything: about one request in eight is hit.
    pub fn some(seed: u64) -> Self {
        Faults {
            refuse: 0.05,
            mute: 0.005,
            cut_request: 0.03,
            cut_reply: 0.03,
            delay: 0.02,
            delay_reply: 0.02,
            stall: 0.002,
            stall_reply: 0.002,
            postpone: 0.01,
            copy: 0.02,
            close_later: 0.005,
            ..Self::none(seed)
        }
    }

    fn place(rng: &mut Rng) -> At {
        match rng.below(3) {
            0 => At::Byte(0),
            1 => At::Share(rng.unit()),
            _ => At::End,
        }
    }

    fn end(rng: &mut Rng) -> End {
        if rng.chance(0.5) {
            End::Close
        } else {
            End::Reset
        }
    }
}

/// Which of these probabilities, that exclude each other, comes true.
fn pick(rng: &mut Rng, probabilities: &[f64]) -> Option<usize> {
    let mut left = rng.unit();
    probabilities.iter().position(|p| {
        left -= p;
        left < 0.0
    })
}

impl Plan for Faults {
    fn connect(&mut self, connection: u64) -> OnConnect {
        let mut rng = Rng::at(self.seed, &[connection]);
        match pick(&mut rng, &[self.refuse, self.mute]) {
            Some(0) => OnConnect::Close,
            Some(_) => OnConnect::Silence,
            None => OnConnect::Accept,
        }
    }

    fn request(&mut self, request: &Request) -> Action {
        let rng = &mut Rng::at(self.seed, &[request.connection, request.index]);
        let on_request = match pick(rng, &[self.cut_request, self.delay, self.stall, self.postpone]) {
            Some(0) => OnRequest::Cut(Self::place(rng), Self::end(rng)),
            Some(1) => OnRequest::Delay(rng.up_to(self.max_delay)),
            Some(2) => OnRequest::Cut(At::Byte(0), End::Silence),
            Some(_) => {
                let end = if rng.chance(0.2) { End::Silence } else { Self::end(rng) };
                OnRequest::Postpone(When::After(rng.up_to(self.max_late)), end)
            }
            None => OnRequest::Pass,
        };
        let on_reply = match pick(
            rng,
            &[self.cut_reply, self.delay_reply, self.stall_reply, self.close_later],
        ) {
            Some(0) => OnReply::Cut(Self::place(rng), Self::end(rng)),
            Some(1) => OnReply::Delay(rng.up_to(self.max_delay)),
            Some(2) => OnReply::Cut(At::Byte(0), End::Silence),
            Some(_) => OnReply::CloseAfter(rng.up_to(self.max_late)),
            None => OnReply::Pass,
        };
        let late = rng.up_to(self.max_late);
        let copy = (rng.chance(self.copy) && (self.may_copy)(request)).then_some(When::After(late));
        Action {
            request: on_request,
            reply: on_reply,
            copy,
        }
    }
}

/// What a proxy has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<&'static str, u64>);

/// What is counted and is no fault.
const PLAIN: [&str; 6] = [
    "connections",
    "requests",
    "replies",
    "pushes",
    "late_delivered",
    "late_failed",
];

/// The faults that are counted.
const FAULTS: [&str; 13] = [
    "refused",
    "muted",
    "cut_request",
    "cut_reply",
    "delayed",
    "delayed_reply",
    "stalled",
    "stalled_reply",
    "postponed",
    "copied",
    "closed_later",
    "closed_all",
    "frozen",
];

impl Counts {
    /// How often this was done: `connections`, `requests`, `replies`, `pushes`, or one of the faults
    /// `refused`, `muted`, `cut_request`, `cut_reply`, `delayed`, `delayed_reply`, `stalled`, `stalled_reply`,
    /// `postponed`, `copied`, `closed_later`, `closed_all`, `frozen`; and `late_delivered`, `late_failed`.
    pub fn of(&self, what: &str) -> u64 {
        assert!(PLAIN.contains(&what) || FAULTS.contains(&what), "not counted: {what}");
        self.0.get(what).copied().unwrap_or(0)
    }

    /// All faults together.
    pub fn faults(&self) -> u64 {
        FAULTS.iter().map(|what| self.of(what)).sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(what, n)| format!("{what} {n}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// A late delivery that was made.
#[derive(Clone, Debug)]
pub struct Late {
    /// What was delivered.
    pub request: Request,
    /// What Redis answered.
    pub reply: Vec<u8>,
}

/// The running proxy. Dropping it closes everything.
pub struct Proxy {
    shared: Arc<Shared>,
    dir: TempDir,
    port: u16,
    listeners: Mutex<Vec<Listening>>,
    clock: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy before the server on this unix socket.
    pub fn start(server: impl Into<PathBuf>, plan: impl Plan + 'static) -> Self {
        let dir = TempDir::with_prefix("tracker-proxy-").expect("a temporary directory");
        let shared = Arc::new(Shared {
            server: server.into(),
            plan: Mutex::new(Box::new(plan)),
            calm: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            counts: Mutex::default(),
            open: Mutex::default(),
            kept: Mutex::default(),
            threads: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            late_done: Mutex::default(),
        });
        let clock = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.clock()
        });
        let mut proxy = Proxy {
            shared,
            dir,
            port: 0,
            listeners: Mutex::default(),
            clock: Some(clock),
        };
        proxy.port = proxy.listen();
        proxy
    }

    /// The unix socket that clients connect to.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("proxy.sock")
    }

    /// The address on 127.0.0.1 that clients connect to.
    pub fn tcp_addr(&self) -> SocketAddr {
        SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port))
    }

    /// Url of the unix socket, database 0.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket_path().display())
    }

    /// Url of the TCP port, database 0.
    pub fn tcp_url(&self) -> String {
        format!("redis://{}/0", self.tcp_addr())
    }

    /// Another plan, from the next request on.
    pub fn set_plan(&self, plan: impl Plan + 'static) {
        *lock(&self.shared.plan) = Box::new(plan);
    }

    /// No new faults by the plan. What stalls already stays so, what is late still comes.
    pub fn calm(&self) {
        self.shared.calm.store(true, SeqCst);
    }

    /// The plan decides again.
    pub fn storm(&self) {
        self.shared.calm.store(false, SeqCst);
    }

    /// Connections are refused by the kernel, as when nothing listens, until `listen_again`. Those that are
    /// open stay.
    pub fn refuse(&self) {
        for listening in lock(&self.listeners).drain(..) {
            listening.stop();
        }
    }

    /// Ends `refuse`.
    pub fn listen_again(&self) {
        if lock(&self.listeners).is_empty() {
            self.listen();
        }
    }

    /// Nothing goes through any more, in no direction; connections stay, new ones too. As a network that
    /// loses all packets.
    pub fn freeze(&self) {
        self.shared.count("frozen");
        lock(&self.shared.state).frozen = true;
    }

    /// Ends `freeze`. What was under way arrives now, also where its client has given up.
    pub fn thaw(&self) {
        lock(&self.shared.state).frozen = false;
        self.shared.changed.notify_all();
    }

    /// Ends every open connection.
    pub fn close_all(&self, end: End) {
        let open: Vec<Arc<Connection>> = lock(&self.shared.open).values().cloned().collect();
        for connection in open {
            self.shared.count("closed_all");
            self.shared.end(&connection, end);
        }
    }

    /// Delivers all late requests that wait (those with a time too), in their order, and returns how many.
    /// When it returns, Redis has answered them.
    pub fn release_late(&self) -> usize {
        let waiting: Vec<Waiting> = lock(&self.shared.state).late.drain(..).collect();
        let mut delivered = 0;
        for waiting in waiting {
            match waiting.what {
                Event::Deliver { request, way } => {
                    self.shared.deliver(request, &way);
                    delivered += 1;
                }
                Event::Close(connection) => self.shared.end(&connection, End::Close),
            }
        }
        delivered
    }

    /// Waits until no late request is due or under way. Those that wait for `release_late` do not count.
    pub fn wait_late(&self, deadline: Duration) {
        eventually(deadline, "late requests are delivered", || {
            let state = lock(&self.shared.state);
            state.delivering == 0 && state.late.iter().all(|waiting| waiting.due.is_none())
        });
    }

    /// How many late requests wait.
    pub fn late_waiting(&self) -> usize {
        let state = lock(&self.shared.state);
        state
            .late
            .iter()
            .filter(|waiting| matches!(waiting.what, Event::Deliver { .. }))
            .count()
    }

    /// The late deliveries made so far, with what Redis answered.
    pub fn late_log(&self) -> Vec<Late> {
        lock(&self.shared.late_done).clone()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        lock(&self.shared.counts).clone()
    }

    /// How many connections are open.
    pub fn open_connections(&self) -> usize {
        lock(&self.shared.open).len()
    }

    /// Listens on both sockets; returns the port, which stays the same.
    fn listen(&self) -> u16 {
        let path = self.socket_path();
        let _ = std::fs::remove_file(&path);
        let unix = UnixListener::bind(&path).expect("a unix socket");
        // The port may be in use for a moment: by a connection of somebody else that drew its number.
        let tcp = eventually_some(PATIENCE, "the proxy's port is free", || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).ok()
        });
        let address = tcp.local_addr().expect("an address");
        let mut listeners = lock(&self.listeners);
        listeners.push(Listening::start(&self.shared, Door::Unix(path), move || {
            unix.accept().map(|(s, _)| Stream::Unix(s))
        }));
        listeners.push(Listening::start(&self.shared, Door::Tcp(address), move || {
            let (stream, _) = tcp.accept()?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(stream))
        }));
        address.port()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse();
        self.shared.stopped.store(true, SeqCst);
        // Under the lock, so that no thread is between its look at `stopped` and its wait.
        drop(lock(&self.shared.state));
        self.shared.changed.notify_all();
        loop {
            // A thread that was starting up may have opened one more.
            for connection in lock(&self.shared.open).values() {
                connection.end(End::Close);
            }
            for connection in lock(&self.shared.kept).iter() {
                connection.server.shutdown(Shutdown::Both);
            }
            let Some(thread) = lock(&self.shared.threads).pop() else {
                break;
            };
            let _ = thread.join();
        }
        if let Some(clock) = self.clock.take() {
            let _ = clock.join();
        }
    }
}

enum Door {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// A listening socket and its thread.
struct Listening {
    door: Door,
    closing: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Listening {
    fn start(shared: &Arc<Shared>, door: Door, accept: impl Fn() -> io::Result<Stream> + Send + 'static) -> Self {
        let closing = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (shared, closing) = (Arc::clone(shared), Arc::clone(&closing));
            move || loop {
                let stream = accept();
                if closing.load(SeqCst) {
                    return;
                }
                // A client that has gone before it was accepted is no reason to end.
                if let Ok(stream) = stream {
                    shared.accept(stream);
                }
            }
        });
        Listening { door, closing, thread }
    }

    fn stop(self) {
        self.closing.store(true, SeqCst);
        // Wakes the thread from its accept.
        let _ = match &self.door {
            Door::Unix(path) => UnixStream::connect(path).map(drop),
            Door::Tcp(address) => TcpStream::connect(address).map(drop),
        };
        let _ = self.thread.join();
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// At least one byte; 0 at the end, be it by error.
    fn read_into(&self, buf: &mut Vec<u8>) -> usize {
        let mut part = [0; 65_536];
        let n = loop {
            let read = match self {
                Stream::Unix(s) => (&mut &*s).read(&mut part),
                Stream::Tcp(s) => (&mut &*s).read(&mut part),
            };
            match read {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other.unwrap_or(0),
            }
        };
        buf.extend_from_slice(&part[..n]);
        n
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Unix(s) => (&mut &*s).write_all(bytes),
            Stream::Tcp(s) => (&mut &*s).write_all(bytes),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Stream::Unix(s) => s.shutdown(how),
            Stream::Tcp(s) => s.shutdown(how),
        };
    }
}

/// One relayed connection.
struct Connection {
    number: u64,
    client: Stream,
    server: Stream,
    ended: AtomicBool,
    /// What to do with the replies to the requests that Redis was sent, in their order.
    replies: Mutex<VecDeque<OnReply>>,
    /// AUTH, SELECT and HELLO of this connection.
    setup: Mutex<Vec<u8>>,
    /// A late transaction is to come over it, though its client has gone. And the replies that it then got.
    kept: AtomicBool,
    late_replies: Mutex<Vec<Vec<u8>>>,
}

impl Connection {
    /// Ends both sides. Threads that wait on the proxy's condition are not woken, see `Shared::end`.
    fn end(&self, end: End) {
        // The first end is the one: a close after a reset would send a FIN before the RST.
        if end == End::Silence || self.ended.swap(true, SeqCst) {
            return;
        }
        if !self.kept.load(SeqCst) {
            self.server.shutdown(Shutdown::Both);
        }
        match (&self.client, end) {
            (Stream::Tcp(stream), End::Reset) => {
                // The RST goes out when the last owner drops the socket; the thread that reads from it must wake
                // up for that, without a FIN going out first.
                let now = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                let _ = setsockopt(stream, sockopt::Linger, &now);
                self.client.shutdown(Shutdown::Read);
            }
            _ => self.client.shutdown(Shutdown::Both),
        }
    }
}

#[derive(Default)]
struct State {
    frozen: bool,
    late: Vec<Waiting>,
    /// Timed deliveries under way.
    delivering: usize,
}

struct Waiting {
    /// `None`: by `release_late` only.
    due: Option<Instant>,
    what: Event,
}

enum Event {
    Deliver { request: Request, way: Way },
    Close(Arc<Connection>),
}

/// How a late request comes to Redis.
enum Way {
    /// By a connection of its own, after this.
    New(Vec<u8>),
    /// By its own, which gets so many replies.
    Own(Arc<Connection>, usize),
}

struct Shared {
    server: PathBuf,
    plan: Mutex<Box<dyn Plan>>,
    calm: AtomicBool,
    stopped: AtomicBool,
    connections: AtomicU64,
    requests: AtomicU64,
    counts: Mutex<Counts>,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    /// Those over which a late transaction is to come, or came.
    kept: Mutex<Vec<Arc<Connection>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    state: Mutex<State>,
    /// Something that a thread may wait for has changed: frozen, late, an end.
    changed: Condvar,
    late_done: Mutex<Vec<Late>>,
}

/// A test that panicked in a plan has said so; the proxy can still be taken down.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shared {
    fn count(&self, what: &'static str) {
        *lock(&self.counts).0.entry(what).or_default() += 1;
    }

    fn end(&self, connection: &Connection, end: End) {
        connection.end(end);
        // Under the lock, so that no thread is between its look at `ended` and its wait.
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    fn stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Whether nothing may go through this connection any more.
    fn over(&self, connection: &Connection) -> bool {
        self.stopped() || connection.ended.load(SeqCst)
    }

    fn run(self: &Arc<Self>, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let shared = Arc::clone(self);
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread::spawn(move || work(&shared)));
    }

    fn accept(self: &Arc<Self>, client: Stream) {
        let number = self.connections.fetch_add(1, SeqCst) + 1;
        self.count("connections");
        let decision = if self.calm.load(SeqCst) {
            OnConnect::Accept
        } else {
            lock(&self.plan).connect(number)
        };
        match decision {
            OnConnect::Close => self.count("refused"),
            OnConnect::Silence => {
                self.count("muted");
                self.relay(number, client, true);
            }
            OnConnect::Accept => self.relay(number, client, false),
        }
    }

    /// Connects to the server and starts the two threads of a connection.
    fn relay(self: &Arc<Self>, number: u64, client: Stream, mute: bool) {
        self.run(move |shared| {
            shared.while_frozen(None);
            // Without a server the client sees its connection closed.
            let Ok(server) = UnixStream::connect(&shared.server) else {
                return;
            };
            let connection = Arc::new(Connection {
                number,
                client,
                server: Stream::Unix(server),
                ended: AtomicBool::new(false),
                replies: Mutex::default(),
                setup: Mutex::default(),
                kept: AtomicBool::new(false),
                late_replies: Mutex::default(),
            });
            // In one step with the look at `stopped`, else the end of the proxy could miss it.
            let mut open = lock(&shared.open);
            if shared.stopped() {
                return;
            }
            open.insert(number, Arc::clone(&connection));
            drop(open);
            shared.run({
                let connection = Arc::clone(&connection);
                move |shared| shared.relay_replies(&connection)
            });
            if mute {
                discard(&connection.client);
            } else {
                shared.relay_requests(&connection);
            }
            shared.end(&connection, End::Close);
            lock(&shared.open).remove(&number);
        });
    }

    fn relay_requests(self: &Arc<Self>, connection: &Arc<Connection>) {
        let mut buf = Vec::new();
        let mut index = 0;
        while connection.client.read_into(&mut buf) > 0 {
            let mut at = 0;
            while let Some((len, replies)) = resp::request(&buf[at..]) {
                index += 1;
                let total = self.requests.fetch_add(1, SeqCst) + 1;
                let bytes = buf[at..at + len].to_vec();
                at += len;
                if !self.relay_request(
                    connection,
                    Request {
                        connection: connection.number,
                        index,
                        total,
                        bytes,
                    },
                    replies,
                ) {
                    return;
                }
            }
            buf.drain(..at);
        }
    }

    /// False when the connection has ended.
    fn relay_request(self: &Arc<Self>, connection: &Arc<Connection>, request: Request, replies: usize) -> bool {
        self.count("requests");
        let action = if self.calm.load(SeqCst) {
            Action::pass()
        } else {
            lock(&self.plan).request(&request)
        };
        let setup = lock(&connection.setup).clone();
        if matches!(request.command().as_str(), "AUTH" | "SELECT" | "HELLO") {
            lock(&connection.setup).extend_from_slice(&request.bytes);
        }
        if let (Some(when), false) = (action.copy, request.is_transaction()) {
            self.count("copied");
            self.later(
                when,
                Event::Deliver {
                    request: request.clone(),
                    way: Way::New(setup.clone()),
                },
            );
        }
        let mut part = request.bytes.len();
        let mut end = None;
        match action.request {
            OnRequest::Pass => {}
            OnRequest::Delay(by) => {
                self.count("delayed");
                self.nap(by, connection);
            }
            OnRequest::Cut(at, how) => {
                self.count(if how == End::Silence { "stalled" } else { "cut_request" });
                part = at.of(part);
                end = Some(how);
            }
            OnRequest::Postpone(when, how) => {
                self.count("postponed");
                let way = if request.is_transaction() {
                    connection.kept.store(true, SeqCst);
                    lock(&self.kept).push(Arc::clone(connection));
                    let pending = lock(&connection.replies).len();
                    Way::Own(Arc::clone(connection), pending + replies)
                } else {
                    Way::New(setup)
                };
                self.later(
                    when,
                    Event::Deliver {
                        request: request.clone(),
                        way,
                    },
                );
                part = 0;
                end = Some(how);
            }
        }
        self.while_frozen(Some(connection));
        if self.over(connection) {
            return false;
        }
        // Nobody hears the reply to a request after which the connection ends, so its fate is that end. In a transaction it is the
        // last reply's, that of EXEC.
        lock(&connection.replies).extend(std::iter::repeat_n(OnReply::Pass, replies - 1));
        lock(&connection.replies).push_back(end.map_or(action.reply, |end| OnReply::Cut(At::Byte(0), end)));
        let sent = connection.server.write(&request.bytes[..part]);
        match end {
            None => sent.is_ok(),
            Some(End::Silence) => {
                discard(&connection.client);
                false
            }
            Some(how) => {
                self.end(connection, how);
                false
            }
        }
    }

    fn relay_replies(self: &Arc<Self>, connection: &Arc<Connection>) {
        let mut buf = Vec::new();
        while connection.server.read_into(&mut buf) > 0 {
            let mut at = 0;
            while let Some(frame) = resp::frame(&buf[at..]) {
                let bytes = &buf[at..at + frame.len];
                at += frame.len;
                if connection.kept.load(SeqCst) {
                    lock(&connection.late_replies).push(bytes.to_vec());
                } else if !self.relay_reply(connection, bytes, frame.push) {
                    return;
                }
            }
            buf.drain(..at);
        }
        // The server has gone. What it said last is passed on as it is.
        self.while_frozen(Some(connection));
        if !self.over(connection) {
            let _ = connection.client.write(&buf);
        }
        self.end(connection, End::Close);
    }

    /// False when the connection has ended.
    fn relay_reply(self: &Arc<Self>, connection: &Arc<Connection>, bytes: &[u8], push: bool) -> bool {
        self.count(if push { "pushes" } else { "replies" });
        // A push belongs to no request. What else comes unasked (messages in RESP2) passes.
        let fate = if push {
            None
        } else {
            lock(&connection.replies).pop_front()
        };
        let mut part = bytes.len();
        let mut end = None;
        match fate.unwrap_or(OnReply::Pass) {
            OnReply::Pass => {}
            OnReply::Delay(by) => {
                self.count("delayed_reply");
                self.nap(by, connection);
            }
            OnReply::Cut(at, how) => {
                self.count(if how == End::Silence {
                    "stalled_reply"
                } else {
                    "cut_reply"
                });
                part = at.of(part);
                end = Some(how);
            }
            OnReply::CloseAfter(by) => {
                self.count("closed_later");
                self.later(When::After(by), Event::Close(Arc::clone(connection)));
            }
        }
        self.while_frozen(Some(connection));
        if self.over(connection) {
            return false;
        }
        let sent = connection.client.write(&bytes[..part]);
        match end {
            None if sent.is_ok() => true,
            None => {
                self.end(connection, End::Close);
                false
            }
            // The requests go on to Redis, whose replies nobody reads, until the client closes.
            Some(End::Silence) => {
                discard(&connection.server);
                false
            }
            Some(how) => {
                self.end(connection, how);
                false
            }
        }
    }

    /// Waits while the proxy is frozen.
    fn while_frozen(&self, connection: Option<&Connection>) {
        let mut state = lock(&self.state);
        while state.frozen && !self.stopped() && !connection.is_some_and(|c| c.ended.load(SeqCst)) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Waits this long, or until the connection has ended from our side.
    fn nap(&self, time: Duration, connection: &Connection) {
        let until = Instant::now() + time;
        let mut state = lock(&self.state);
        while !self.over(connection) {
            let Some(left) = until
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            else {
                return;
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .0;
        }
    }

    fn later(&self, when: When, what: Event) {
        let due = match when {
            When::After(time) => Some(Instant::now() + time),
            When::OnRelease => None,
        };
        lock(&self.state).late.push(Waiting { due, what });
        self.changed.notify_all();
    }

    /// The thread that does what is late, when it is due.
    fn clock(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        while !self.stopped() {
            let now = Instant::now();
            let first = state
                .late
                .iter()
                .enumerate()
                .filter_map(|(i, w)| Some((w.due?, i)))
                .min();
            match first {
                Some((due, i)) if due <= now => match state.late.remove(i).what {
                    Event::Close(connection) => {
                        // The lock is held here.
                        connection.end(End::Close);
                        self.changed.notify_all();
                    }
                    Event::Deliver { request, way } => {
                        state.delivering += 1;
                        // By a thread of its own: a Redis that stands must not hold up the next.
                        self.run(move |shared| {
                            shared.deliver(request, &way);
                            lock(&shared.state).delivering -= 1;
                        });
                    }
                },
                Some((due, _)) => {
                    state = self
                        .changed
                        .wait_timeout(state, due - now)
                        .unwrap_or_else(|p| p.into_inner())
                        .0;
                }
                None => state = self.changed.wait(state).unwrap_or_else(|p| p.into_inner()),
            }
        }
    }

    /// A late request reaches Redis.
    fn deliver(&self, request: Request, way: &Way) {
        let reply = match way {
            Way::New(setup) => self.ask(setup, &request.bytes),
            Way::Own(connection, replies) => ask_late(connection, &request.bytes, *replies),
        };
        match reply {
            Ok(reply) => {
                lock(&self.late_done).push(Late { request, reply });
                self.count("late_delivered");
            }
            Err(_) => self.count("late_failed"),
        }
    }

    fn ask(&self, setup: &[u8], request: &[u8]) -> io::Result<Vec<u8>> {
        let stream = UnixStream::connect(&self.server)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let server = Stream::Unix(stream);
        let mut left = 1;
        let mut at = 0;
        while let Some((len, replies)) = resp::request(&setup[at..]) {
            at += len;
            left += replies;
        }
        server.write(setup)?;
        server.write(request)?;
        let mut buf = Vec::new();
        loop {
            while let Some(frame) = resp::frame(&buf) {
                let reply: Vec<u8> = buf.drain(..frame.len).collect();
                left -= usize::from(!frame.push);
                if left == 0 {
                    return Ok(reply);
                }
            }
            if server.read_into(&mut buf) == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Over a connection whose client has gone. Answers the last reply.
fn ask_late(connection: &Connection, request: &[u8], replies: usize) -> io::Result<Vec<u8>> {
    connection.server.write(request)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = lock(&connection.late_replies);
        if found.len() >= replies {
            connection.server.shutdown(Shutdown::Both);
            return Ok(found[replies - 1].clone());
        }
        drop(found);
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Reads until the other side closes.
fn discard(stream: &Stream) {
    let mut buf = Vec::new();
    while stream.read_into(&mut buf) > 0 {
        buf.clear();
    }
}
