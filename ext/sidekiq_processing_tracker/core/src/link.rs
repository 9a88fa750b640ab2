//! A connection to Redis that is thrown away on any error.
//!
//! A redis-rs connection that has failed can be open and out of step, or seem open and be dead; so nothing is asked of it
//! again. The next call connects anew.

use crate::error::{Error, Result};
use crate::scripts::Script;
use crate::server::{self, Opened};
use crate::target::Target;
use crate::threads;
use crate::wire::{Line, Wire};
use redis::Value;
use std::sync::mpsc;
use std::time::Duration;

/// One connection, made when it is first needed.
pub struct Link {
    target: Target,
    timeout: Duration,
    connection: Option<Opened>,
    /// An attempt to connect that did not end in time (a name server that does not answer). The next call waits for it
    /// rather than start another.
    attempt: Option<mpsc::Receiver<Result<Opened>>>,
    made: u64,
    bare: bool,
    /// Which server the connection leads to that is lent.
    lent: Option<u64>,
}

impl Link {
    /// A link to `target`. No call on it takes much longer than `timeout` to connect, or to get a part of an answer.
    #[must_use]
    pub fn new(target: Target, timeout: Duration) -> Self {
        Self {
            target,
            timeout,
            connection: None,
            attempt: None,
            made: 0,
            bare: false,
            lent: None,
        }
    }

    /// The same, with connections whose sockets others may wait for (`lend`), where they are not encrypted.
    #[must_use]
    pub fn bare(target: Target, timeout: Duration) -> Self {
        Self {
            bare: true,
            ..Self::new(target, timeout)
        }
    }

    /// How many connections this link has made so far: another number means that something may have been lost between.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.made
    }

    /// Sets the timeout of connections made from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        if timeout != self.timeout {
            self.timeout = timeout;
            self.connection = None;
            self.attempt = None;
        }
    }

    /// Whether there is a connection, as far as is known. There is none after an error.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Connects, unless there is a connection.
    ///
    /// # Errors
    /// `Error::Connection`, within the timeout; `Error::Refused`; `Error::Unfit`.
    pub fn connect(&mut self) -> Result<()> {
        self.leave_if_elsewhere();
        if self.connection.is_none() {
            let attempt = match self.attempt.take() {
                Some(attempt) => attempt,
                None => self.start_connecting()?,
            };
            let limit = self.target.time_to_connect(self.timeout);
            match attempt.recv_timeout(limit) {
                Ok(opened) => {
                    self.connection = Some(opened.map_err(|error| error.at(&self.target))?);
                    self.made += 1;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.attempt = Some(attempt);
                    // To a server that does not speak it, what TLS begins with is a command that has not come to its end.
                    let hint = if self.target.tls.is_some() {
                        ". Does it speak TLS there?"
                    } else {
                        ""
                    };
                    return Err(Error::Connection(format!(
                        "no connection to {} within {limit:?}{hint}",
                        self.target
                    )));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::Internal("the connecting thread died".into()));
                }
            }
        }
        Ok(())
    }

    /// Leaves the server that it is connected to, where others have gone to another one.
    pub(crate) fn leave_if_elsewhere(&mut self) {
        let rendezvous = &self.target.rendezvous;
        self.connection.take_if(|opened| !rendezvous.is_current(opened.visit));
    }

    /// A thread of its own: neither a name server nor a unix socket knows a timeout.
    fn start_connecting(&self) -> Result<mpsc::Receiver<Result<Opened>>> {
        let (sender, receiver) = mpsc::channel();
        let (target, timeout, bare) = (self.target.clone(), self.timeout, self.bare);
        threads::spawn("tracker-connect", move || {
            // Nobody listens any more when the link is gone; the connection is then closed.
            let _ = sender.send(server::open(&target, timeout, bare));
        })?;
        Ok(receiver)
    }

    /// Runs a script: by its hash, or whole where the server does not know it (any more).
    ///
    /// # Errors
    /// `Error::Connection`, `Error::Refused`; the connection is gone then.
    pub fn run(&mut self, script: &Script, call: &Call) -> Result<Value> {
        let answer = self.send(&call.command("EVALSHA", script.hash()))?;
        let unknown = matches!(&answer, Err(error) if error.code() == Some("NOSCRIPT"));
        let answer = if unknown {
            self.send(&call.command("EVAL", script.source()))?
        } else {
            answer
        };
        self.settle(answer)
    }

    /// The same, and these commands after it in one go. Where the server did not know the script, they came too soon: no answers.
    ///
    /// # Errors
    /// As for `run`.
    pub fn run_and(
        &mut self,
        script: &Script,
        call: &Call,
        commands: impl IntoIterator<Item = redis::Cmd>,
    ) -> Result<(Value, Vec<redis::RedisResult<Value>>)> {
        let mut pipeline = redis::pipe();
        pipeline.add_command(call.command("EVALSHA", script.hash()));
        for command in commands {
            pipeline.add_command(command);
        }
        let mut answers = self.pipeline(&pipeline)?;
        let rest = answers.split_off(answers.len().min(1));
        match answers.pop() {
            Some(Err(error)) if error.code() == Some("NOSCRIPT") => Ok((self.run(script, call)?, Vec::new())),
            Some(answer) => Ok((self.settle(answer)?, rest)),
            None => Err(Error::protocol("a pipeline", "an answer was expected")),
        }
    }

    /// Calls a script, by its hash or `whole`, on the connection that there is and on no other. The answer is what `answered` receives
    /// after the answers to the calls before it.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub(crate) fn call(&mut self, asked: &Asked, whole: bool) -> Result<()> {
        let command = if whole {
            asked.call.command("EVAL", asked.script.source())
        } else {
            asked.call.command("EVALSHA", asked.script.hash())
        };
        self.begin_packed(&command.get_packed_command())
    }

    /// The next answer to `call`. `None` where the server does not know the script (any more): it is to be called `whole`.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then. `Error::Refused`; the connection is there, and the answers to other calls come over it.
    pub(crate) fn answered(&mut self) -> Result<Option<Value>> {
        match self.receive()?.extract_error() {
            Err(error) if error.code() == Some("NOSCRIPT") => Ok(None),
            answer => Ok(Some(answer?)),
        }
    }

    /// Sends commands. Their replies are the next things to receive.
    ///
    /// # Errors
    /// As for `command`.
    pub(crate) fn begin(&mut self, commands: &redis::Pipeline) -> Result<()> {
        self.connect()?;
        self.begin_packed(&commands.get_packed_pipeline())
    }

    fn begin_packed(&mut self, packed: &[u8]) -> Result<()> {
        self.on_line(|line| line.send(packed))
    }

    /// Does something with the connection that there is. When it fails the connection is gone.
    fn on_line<T>(&mut self, act: impl FnOnce(&mut Line) -> redis::RedisResult<T>) -> Result<T> {
        let outcome = match &mut self.connection {
            Some(opened) => act(&mut opened.line),
            None => return Err(Error::Connection("the connection is gone".into())),
        };
        if outcome.is_err() {
            self.connection = None;
        }
        Ok(outcome?)
    }

    /// The next reply to what has begun.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub(crate) fn receive(&mut self) -> Result<Value> {
        self.on_line(Line::receive)
    }

    /// Whether sockets of this link's connections can be waited for, as far as they are not encrypted.
    pub(crate) fn is_bare(&self) -> bool {
        self.bare && self.target.tls.is_none()
    }

    /// Sends commands on the connection that there is, without ever waiting. Answers whether they are sent: not on every connection
    /// that can be done.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub(crate) fn begin_at_once(&mut self, commands: &redis::Pipeline) -> Result<bool> {
        self.on_line(|line| line.send_at_once(&commands.get_packed_pipeline()))
    }

    /// The next reply to what has begun, if it has come; never waits.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Value>> {
        self.on_line(Line::try_receive)
    }

    /// The connection, for another to receive with. Nothing may be done here until it is back.
    pub(crate) fn lend(&mut self) -> Option<Wire> {
        let opened = self.connection.take()?;
        match opened.line {
            Line::Wire(wire) => {
                self.lent = Some(opened.visit);
                Some(wire)
            }
            line => {
                self.connection = Some(Opened { line, ..opened });
                None
            }
        }
    }

    /// It is back.
    pub(crate) fn take_back(&mut self, wire: Wire) {
        if let Some(visit) = self.lent.take() {
            self.connection = Some(Opened {
                line: Line::Wire(wire),
                visit,
            });
        }
    }

    /// Has the connection wait for an answer for so much longer than others do, from now on.
    ///
    /// # Errors
    /// `Error::Connection`, where the system refuses that.
    pub fn wait_longer(&mut self, patience: Duration) -> Result<()> {
        let within = self.target.time_to_reply(self.timeout).saturating_add(patience);
        match &mut self.connection {
            Some(opened) => Ok(opened.line.set_timeout(within)?),
            None => Ok(()),
        }
    }

    /// Which server the connection leads to (`Rendezvous::is_current`).
    pub(crate) fn visit(&self) -> Option<u64> {
        self.connection.as_ref().map(|opened| opened.visit)
    }

    /// Sends a command.
    ///
    /// # Errors
    /// `Error::Connection`, `Error::Refused`; the connection is gone then.
    pub fn command(&mut self, command: &redis::Cmd) -> Result<Value> {
        let answer = self.send(command)?;
        self.settle(answer)
    }

    fn send(&mut self, command: &redis::Cmd) -> Result<redis::RedisResult<Value>> {
        self.connect()?;
        let Some(opened) = &mut self.connection else {
            return Err(Error::Internal("connected, but no connection".into()));
        };
        let answer = opened
            .line
            .send(&command.get_packed_command())
            .and_then(|()| opened.line.receive());
        // An error that the server sends is a value to redis-rs, until it is asked to tell.
        Ok(answer.and_then(Value::extract_error))
    }

    /// Sends commands in one go. An error that the server sends stands in its place among the answers.
    ///
    /// # Errors
    /// `Error::Connection`; the connection is gone then.
    pub fn pipeline(&mut self, commands: &redis::Pipeline) -> Result<Vec<redis::RedisResult<Value>>> {
        self.connect()?;
        let answers = self.converse(commands)?;
        Ok(answers.into_iter().map(Value::extract_error).collect())
    }

    /// The same, on the connection that there is and on no other. An error that the server sends is a value, wherever it stands.
    ///
    /// # Errors
    /// As for `pipeline`, also where there is no connection.
    pub(crate) fn converse(&mut self, commands: &redis::Pipeline) -> Result<Vec<Value>> {
        let count = commands.len();
        self.on_line(|line| line.ask(&commands.get_packed_pipeline(), count))
    }

    fn settle(&mut self, answer: redis::RedisResult<Value>) -> Result<Value> {
        if answer.is_err() {
            self.connection = None;
        }
        answer.map_err(Into::into)
    }

    /// What a key holds, `None` for a key that is not there.
    ///
    /// # Errors
    /// As for `command`; `Error::Protocol` when it holds no text.
    pub fn read(&mut self, key: &str) -> Result<Option<String>> {
        match self.command(redis::cmd("GET").arg(key))? {
            Value::Nil => Ok(None),
            Value::BulkString(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            _ => Err(Error::protocol("GET", "a text was expected")),
        }
    }

    /// Throws the connection away.
    pub fn discard(&mut self) {
        self.connection = None;
        self.lent = None;
    }
}

/// A call of a script that is made, or is to be made.
pub(crate) struct Asked {
    pub script: &'static Script,
    pub call: Call,
}

impl Asked {
    /// Makes it.
    pub fn run(&self, link: &mut Link) -> Result<Value> {
        link.run(self.script, &self.call)
    }
}

/// The keys and arguments of a script.
#[derive(Debug, Clone, Default)]
pub struct Call {
    keys: Vec<Vec<u8>>,
    arguments: Vec<Vec<u8>>,
}

impl Call {
    /// A call with these keys.
    #[must_use]
    pub fn new<K: Into<Vec<u8>>>(keys: impl IntoIterator<Item = K>) -> Self {
        Self {
            keys: keys.into_iter().map(Into::into).collect(),
            arguments: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl Into<Vec<u8>>) -> &mut Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds a number as an argument.
    pub fn number(&mut self, number: impl Into<u64>) -> &mut Self {
        self.arg(number.into().to_string())
    }

    /// Adds how many things follow.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.arg(count.to_string())
    }

    /// Adds a duration in ms as an argument.
    pub fn millis(&mut self, duration: Duration) -> &mut Self {
        self.arg(duration.as_millis().to_string())
    }

    /// Adds a key, and no argument: the script knows by its place what it is.
    pub fn also(&mut self, key: Vec<u8>) -> &mut Self {
        self.keys.push(key);
        self
    }

    /// Adds a key, unless it is there, and as an argument its index in KEYS.
    pub fn key(&mut self, key: Vec<u8>) -> &mut Self {
        let index = self.index_of(key);
        self.count(index)
    }

    /// Adds a key, unless it is there. Answers its index in KEYS.
    pub fn index_of(&mut self, key: Vec<u8>) -> usize {
        let index = match self.keys.iter().position(|other| *other == key) {
            Some(index) => index,
            None => {
                self.keys.push(key);
                self.keys.len() - 1
            }
        };
        index + 1
    }

    /// Adds keys beside each other, and as an argument the index in KEYS of the first.
    pub fn keys(&mut self, keys: impl IntoIterator<Item = Vec<u8>>) -> &mut Self {
        let first = self.keys.len() + 1;
        self.keys.extend(keys);
        self.count(first)
    }

    pub(crate) fn command(&self, name: &str, script: &str) -> redis::Cmd {
        let mut command = redis::cmd(name);
        command.arg(script).arg(self.keys.len());
        for part in self.keys.iter().chain(&self.arguments) {
            command.arg(&part[..]);
        }
        command
    }
}
