//! Sentinels: they name the server that is the master now.

use crate::error::{Error, Result};
use crate::parker::lock;
use crate::password::Password;
use crate::scripts::Answer;
use crate::server::{self, Login};
use crate::target::place;
use crate::tls::Tls;
use redis::{Connection, ConnectionLike, Value};
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

/// Sentinels that watch one master, as far as they are known: those that were named, and those that these have named.
pub struct Sentinels {
    master: String,
    /// The one that answered last comes first.
    nodes: Mutex<Vec<Node>>,
}

/// One sentinel.
#[derive(Clone)]
pub struct Node {
    /// Its host.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The user of its ACL.
    pub username: Option<String>,
    /// Its password. The master's is another.
    pub password: Password,
    /// How a connection to it is encrypted.
    pub tls: Option<Tls>,
}

impl Sentinels {
    /// Sentinels that know their master by this name.
    #[must_use]
    pub fn new(master: String, nodes: Vec<Node>) -> Self {
        Self {
            master,
            nodes: Mutex::new(nodes),
        }
    }

    /// The name of the master.
    #[must_use]
    pub fn master(&self) -> &str {
        &self.master
    }

    /// Opens a connection to the master: asks one sentinel after the other, until `open` has come to a server that says itself
    /// that it is the master. All answers together take about as long as `within`.
    pub(crate) fn open<T>(&self, within: Duration, open: impl Fn(String, u16) -> Result<Option<T>>) -> Result<T> {
        let nodes = lock(&self.nodes).clone();
        // One that does not answer must not use up all the time there is.
        let share = (within / u32::try_from(nodes.len() + 1).unwrap_or(u32::MAX)).max(SHORTEST);
        let mut reasons = Vec::new();
        for node in &nodes {
            let opened = node.ask(&self.master, share).and_then(|(answer, others)| {
                let (host, port) = answer
                    .ok_or_else(|| Error::Connection(format!("it knows no master by the name \"{}\"", self.master)))?;
                let named = place(&host, port);
                let opened = open(host, port).map_err(|error| match error {
                    Error::Connection(text) => Error::Connection(format!("it names {named}: {text}")),
                    error => error,
                })?;
                let opened =
                    opened.ok_or_else(|| Error::Connection(format!("it names {named}, which is a replica")))?;
                Ok((opened, others))
            });
            match opened {
                Ok((opened, others)) => {
                    self.learn(node, others);
                    return Ok(opened);
                }
                Err(Error::Connection(reason)) => reasons.push(format!("{node}: {reason}")),
                Err(error) => return Err(error),
            }
        }
        Err(Error::Connection(format!(
            "no Sentinel leads to the master ({})",
            reasons.join("; ")
        )))
    }

    fn learn(&self, answered: &Node, others: Vec<(String, u16)>) {
        let mut nodes = lock(&self.nodes);
        if let Some(at) = nodes.iter().position(|node| node.is_at(&answered.host, answered.port)) {
            nodes[..=at].rotate_right(1);
        }
        for (host, port) in others {
            if nodes.len() < MOST && !nodes.iter().any(|node| node.is_at(&host, port)) {
                nodes.push(Node {
                    host,
                    port,
                    ..answered.clone()
                });
            }
        }
    }
}

/// How many are kept. More than anybody has; but where their names change, new ones come for ever.
const MOST: usize = 32;
/// The shortest time in which a sentinel must answer.
const SHORTEST: Duration = Duration::from_millis(100);

type Place = (String, u16);

impl Node {
    fn is_at(&self, host: &str, port: u16) -> bool {
        self.host == host && self.port == port
    }

    /// Where the master is, and the other sentinels.
    fn ask(&self, master: &str, within: Duration) -> Result<(Option<Place>, Vec<Place>)> {
        let login = Login {
            db: 0,
            username: self.username.as_deref(),
            password: &self.password,
        };
        let address = server::tcp(&self.host, self.port, self.tls.as_ref());
        let answer = server::connect(address, self.tls.as_ref(), &login, within, within).and_then(|mut connection| {
            let found = master_of(&mut connection, master)?;
            // It need not say: then there are no others to know.
            let others = others_of(&mut connection, master).unwrap_or_default();
            Ok((found, others))
        });
        answer.map_err(|error| match error {
            // Another one may not refuse.
            Error::Refused(text) => Error::Connection(text),
            other => other,
        })
    }
}

impl fmt::Display for Node {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&place(&self.host, self.port))
    }
}

impl fmt::Debug for Sentinels {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Sentinels({})", self.master)
    }
}

fn sentinel(connection: &mut Connection, question: &str, master: &str) -> Result<Value> {
    let mut command = redis::cmd("SENTINEL");
    command.arg(question).arg(master);
    let answer = connection.req_command(&command).and_then(Value::extract_error)?;
    Ok(answer)
}

fn master_of(connection: &mut Connection, master: &str) -> Result<Option<Place>> {
    match sentinel(connection, "GET-MASTER-ADDR-BY-NAME", master)? {
        Value::Nil => Ok(None),
        answer => {
            let mut answer = Answer::to("SENTINEL", answer)?;
            let (host, port) = (answer.text()?, answer.text()?);
            let port = port
                .parse()
                .map_err(|_| Error::protocol("SENTINEL", "a port was expected"))?;
            Ok(Some((host, port)))
        }
    }
}

fn others_of(connection: &mut Connection, master: &str) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for other in Answer::to("SENTINEL", sentinel(connection, "SENTINELS", master)?)?.rest() {
        let mut fields = Answer::to("SENTINEL", other)?;
        let (mut host, mut port) = (None, None);
        while !fields.is_empty() {
            let (name, value) = (fields.text()?, fields.text()?);
            match name.as_str() {
                "ip" => host = Some(value),
                "port" => port = value.parse().ok(),
                _ => {}
            }
        }
        places.extend(host.zip(port));
    }
    Ok(places)
}
