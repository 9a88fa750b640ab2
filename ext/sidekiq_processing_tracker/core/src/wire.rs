//! A connection whose socket others may wait for: redis-rs shows nobody its own.
//!
//! What goes over it is redis-rs' work here too: it writes the commands and reads the replies. A thread can wait until there is
//! something to read, beside other things that it waits for, and read it without ever being held up by half a reply.

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
#[cfg(target_os = "linux")]
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use redis::{Connection, ConnectionAddr, Parser, RedisError, RedisResult, Value};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connection with a socket of its own, not encrypted.
pub(crate) struct Wire {
    stream: Stream,
    parser: Parser,
    /// How long one reply may take, or the writing of a command.
    within: Duration,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    /// Connects. Says nothing to the server yet.
    ///
    /// # Errors
    /// `Error::Connection`; `Error::Internal` for an address of a kind that takes more than a socket.
    pub fn connect(address: &ConnectionAddr, connect_within: Duration, within: Duration) -> Result<Self> {
        let stream = match address {
            ConnectionAddr::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            ConnectionAddr::Tcp(host, port) => connect_tcp(host, *port, connect_within).map(Stream::Tcp),
            _ => return Err(Error::Internal("a wire leads to plain sockets only".into())),
        }
        .map_err(RedisError::from)?;
        stream.never_block().map_err(RedisError::from)?;
        Ok(Self {
            stream,
            parser: Parser::new(),
            within,
        })
    }

    fn send(&mut self, mut bytes: &[u8]) -> RedisResult<()> {
        let deadline = self.deadline();
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !is_ready(self.stream.as_fd(), PollFlags::POLLOUT, deadline)? {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends a command; never waits.
    ///
    /// # Errors
    /// When the connection is gone, or takes not all of it now: then it is of no use any more.
    fn send_at_once(&mut self, mut bytes: &[u8]) -> RedisResult<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next reply, as far as it has come; never waits. `None`: there is more to come.
    ///
    /// # Errors
    /// When the connection is gone, or what comes over it is no reply.
    pub fn try_receive(&mut self) -> RedisResult<Option<Value>> {
        match self.parser.parse_value(&mut self.stream) {
            Err(error) if error.is_timeout() => Ok(None),
            reply => reply.map(Some),
        }
    }

    /// The next reply, if it comes before then.
    ///
    /// # Errors
    /// As for `try_receive`.
    pub fn receive_until(&mut self, deadline: Instant) -> RedisResult<Option<Value>> {
        loop {
            let reply = self.try_receive()?;
            if reply.is_some() || !is_ready(self.stream.as_fd(), PollFlags::POLLIN, deadline)? {
                return Ok(reply);
            }
        }
    }

    /// Sends a command and receives its reply.
    ///
    /// # Errors
    /// When the connection is gone, what comes over it is no reply, or nothing comes in time.
    pub fn ask(&mut self, packed: &[u8]) -> RedisResult<Value> {
        self.send(packed)?;
        self.receive()
    }

    /// Waits for something to come that nobody has asked for, but not for longer, nor once the bell has rung. Answers whether it has come.
    ///
    /// # Errors
    /// As for `try_receive`.
    pub fn hear(&mut self, bell: &Bell, longest: Duration) -> Result<bool> {
        let mut came = self.try_receive()?;
        if came.is_none()
            && bell
                .wait_beside(self.as_fd(), Instant::now() + longest)
                .map_err(RedisError::from)?
        {
            came = self.try_receive()?;
        }
        Ok(came.is_some())
    }

    fn receive(&mut self) -> RedisResult<Value> {
        let reply = self.receive_until(self.deadline())?;
        reply.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut).into())
    }

    /// Until when a reply should have come to what is sent now.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.within
    }
}

/// Something to poll for what can be read.
impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Stream {
    fn never_block(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => stream.read(buffer),
                Self::Unix(stream) => stream.read(buffer),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first of a host's addresses that answers.
fn connect_tcp(host: &str, port: u16, within: Duration) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "this host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, within) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Waits until this socket is ready for that. Answers whether it is.
fn is_ready(socket: BorrowedFd, what: PollFlags, deadline: Instant) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, what)];
    wait_for(&mut polled, deadline)?;
    Ok(polled[0].any().unwrap_or(true))
}

/// Waits until one of these is ready, or the deadline has passed.
///
/// # Errors
/// Where the system refuses that.
fn wait_for(polled: &mut [PollFd], deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Not to wake up a moment too early, and once more.
        let left = left.as_millis() + u128::from(!left.subsec_nanos().is_multiple_of(1_000_000));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(polled, timeout) {
            Ok(0) if Instant::now() < deadline => {}
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Wakes a thread that waits for a socket.
#[derive(Debug)]
pub(crate) struct Bell {
    rope: UnixStream,
    sound: UnixStream,
}

impl Bell {
    /// # Errors
    /// `Error::Internal` where the system has no sockets left.
    pub fn new() -> Result<Self> {
        let make = || {
            let (rope, sound) = UnixStream::pair()?;
            rope.set_nonblocking(true)?;
            sound.set_nonblocking(true)?;
            Ok(Self { rope, sound })
        };
        make().map_err(|error: io::Error| Error::Internal(format!("no pair of sockets to wake a thread with: {error}")))
    }

    /// The next or the present wait ends. Never waits itself.
    pub fn ring(&self) {
        // Where nothing more goes in, there is enough in to be heard.
        let _ = (&self.rope).write(&[1]);
    }

    /// What it has rung so far is heard.
    fn hear(&self) {
        let mut heard = [0; 64];
        while matches!((&self.sound).read(&mut heard), Ok(count) if count == heard.len()) {}
    }

    /// Waits until there is something to read at this socket (true), or the bell rings, or the deadline passes.
    ///
    /// # Errors
    /// Where the system refuses that.
    pub fn wait_beside(&self, socket: BorrowedFd, deadline: Instant) -> io::Result<bool> {
        let mut polled = [
            PollFd::new(socket, PollFlags::POLLIN),
            PollFd::new(self.sound.as_fd(), PollFlags::POLLIN),
        ];
        wait_for(&mut polled, deadline)?;
        if polled[1].any().unwrap_or(true) {
            self.hear();
        }
        Ok(polled[0].any().unwrap_or(true))
    }
}

/// Wakes one thread, once, at a time that another has said: at the cost of setting a timer, not of waking a thread, which takes twenty
/// times as long.
#[cfg(target_os = "linux")]
pub(crate) struct Alarm(TimerFd);

#[cfg(target_os = "linux")]
impl Alarm {
    /// # Errors
    /// `Error::Internal` where the system has no timers left.
    pub fn new() -> Result<Self> {
        TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)
            .map(Self)
            .map_err(|error| Error::Internal(format!("no timer to wake a thread with: {error}")))
    }

    /// The thread is to be woken then. Never waits.
    pub fn set(&self, after: Duration) {
        // A time of 0 would take the alarm off.
        let time = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        let _ = self.0.set(Expiration::OneShot(time), TimerSetTimeFlags::empty());
    }

    /// Waits for it.
    pub fn wait(&self) {
        let _ = self.0.wait();
    }
}

/// Without such timers it wakes at once.
#[cfg(not(target_os = "linux"))]
pub(crate) struct Alarm(Bell);

#[cfg(not(target_os = "linux"))]
impl Alarm {
    pub fn new() -> Result<Self> {
        Bell::new().map(Self)
    }

    pub fn set(&self, _after: Duration) {
        self.0.ring();
    }

    pub fn wait(&self) {
        let _ = is_ready(
            self.0.sound.as_fd(),
            PollFlags::POLLIN,
            Instant::now() + Duration::from_secs(60),
        );
        self.0.hear();
    }
}

/// A connection of either kind.
pub(crate) enum Line {
    /// All of it is redis-rs'.
    Library(Connection),
    /// Its socket can be waited for.
    Wire(Wire),
}

impl Line {
    /// From now on one reply may take so long.
    ///
    /// # Errors
    /// Where the system refuses that.
    pub fn set_timeout(&mut self, within: Duration) -> RedisResult<()> {
        match self {
            Self::Library(connection) => connection.set_read_timeout(Some(within)),
            Self::Wire(wire) => {
                wire.within = within;
                Ok(())
            }
        }
    }

    /// Sends commands as redis-rs packs them. Their replies are to be received.
    ///
    /// # Errors
    /// When the connection is gone or takes nothing any more.
    pub fn send(&mut self, packed: &[u8]) -> RedisResult<()> {
        match self {
            Self::Library(connection) => connection.send_packed_command(packed),
            Self::Wire(wire) => wire.send(packed),
        }
    }

    /// The same, without ever waiting. Answers whether that can be done on this connection.
    ///
    /// # Errors
    /// When the connection is gone, or takes not all of it now: then it is of no use any more.
    pub fn send_at_once(&mut self, packed: &[u8]) -> RedisResult<bool> {
        match self {
            Self::Library(_) => Ok(false),
            Self::Wire(wire) => wire.send_at_once(packed).map(|()| true),
        }
    }

    /// The next reply, if it has come; never waits for it, on a connection on which that can be done.
    ///
    /// # Errors
    /// As for `receive`.
    pub fn try_receive(&mut self) -> RedisResult<Option<Value>> {
        match self {
            Self::Library(_) => Ok(None),
            Self::Wire(wire) => wire.try_receive(),
        }
    }

    /// The next reply. An error that the server sends is one.
    ///
    /// # Errors
    /// When the connection is gone, what comes over it is no reply, or nothing comes in time.
    pub fn receive(&mut self) -> RedisResult<Value> {
        match self {
            Self::Library(connection) => connection.recv_response(),
            Self::Wire(wire) => wire.receive(),
        }
    }

    /// Sends commands, so many of them, and receives their replies.
    ///
    /// # Errors
    /// As for `send` and `receive`.
    pub fn ask(&mut self, packed: &[u8], count: usize) -> RedisResult<Vec<Value>> {
        self.send(packed)?;
        (0..count).map(|_| self.receive()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A wire, and the server's end of it.
    fn wire(within: Duration) -> (Wire, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let wire = Wire::connect(&ConnectionAddr::Unix(path), within, within).unwrap();
        (wire, listener.accept().unwrap().0)
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_reply_may_come_in_pieces_and_two_at_once() {
        let (mut wire, mut server) = wire(SOON);
        assert_eq!(wire.try_receive().unwrap(), None);
        server.write_all(b"*2\r\n:1\r\n$5\r\nhe").unwrap();
        assert_eq!(wire.try_receive().unwrap(), None);
        assert_eq!(wire.try_receive().unwrap(), None);
        server.write_all(b"llo\r\n-ERR no\r\n").unwrap();
        let hello = Value::Array(vec![Value::Int(1), Value::BulkString(b"hello".to_vec())]);
        assert_eq!(wire.receive().unwrap(), hello);
        assert!(matches!(wire.try_receive().unwrap(), Some(Value::ServerError(_))));
        assert_eq!(wire.try_receive().unwrap(), None);
    }

    #[test]
    fn silence_and_an_end_are_errors_in_time() {
        let (mut wire, mut server) = wire(Duration::from_millis(20));
        server.write_all(b"$5\r\nhe").unwrap();
        assert!(wire.receive().unwrap_err().is_timeout());
        drop(server);
        assert!(wire.try_receive().is_err());
        assert!(wire.ask(b"*1\r\n$4\r\nPING\r\n").is_err());
    }

    #[test]
    fn a_server_that_takes_nothing_is_an_error_in_time() {
        let (mut wire, _server) = wire(Duration::from_millis(20));
        assert!(wire.send(&vec![b'x'; 8 << 20]).unwrap_err().is_timeout());
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        let (mut wire, mut server) = wire(SOON);
        server.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        assert!(matches!(Error::from(wire.receive().unwrap_err()), Error::Connection(_)));
    }

    #[test]
    fn a_bell_ends_the_present_wait_or_the_next() {
        let (mut wire, mut server) = wire(SOON);
        let bell = Bell::new().unwrap();
        (0..1000).for_each(|_| bell.ring());
        assert!(!wire.hear(&bell, SOON).unwrap());
        assert!(!wire.hear(&bell, Duration::from_millis(1)).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring());
            assert!(!wire.hear(&bell, SOON).unwrap());
        });
        server.write_all(b"+news\r\n+more\r\n").unwrap();
        assert!(wire.hear(&bell, SOON).unwrap());
        assert!(wire.hear(&bell, SOON).unwrap());
    }

    #[test]
    fn an_alarm_wakes_once_and_not_too_early() {
        let alarm = Alarm::new().unwrap();
        alarm.set(Duration::ZERO);
        alarm.wait();
        let (since, after) = (Instant::now(), Duration::from_millis(20));
        alarm.set(after);
        alarm.wait();
        assert!(since.elapsed() >= after || !cfg!(target_os = "linux"));
    }

    #[test]
    fn a_host_of_which_nothing_is_known_is_an_error() {
        let address = ConnectionAddr::Tcp("no-such-host.invalid".into(), 1);
        assert!(matches!(Wire::connect(&address, SOON, SOON), Err(Error::Connection(_))));
        assert!(matches!(
            Wire::connect(&ConnectionAddr::Unix("/nowhere".into()), SOON, SOON),
            Err(Error::Connection(_))
        ));
    }
}
