//! The one error type of this crate.

use crate::target::Target;

/// What can go wrong. `ffi` maps each kind to a Ruby class, in one function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Redis could not be reached, or did not answer in time.
    #[error("{0}")]
    Connection(String),
    /// Redis has answered, with an error.
    #[error("{0}")]
    Refused(String),
    /// This server, or what is known of how to get to it, cannot be used, whether now or later.
    #[error("{0}")]
    Unfit(String),
    /// A reply from Redis makes no sense.
    #[error("Redis gave a reply to {call} that makes no sense: {what}. Is another program writing to these keys?")]
    Protocol {
        /// The script or command that was called.
        call: &'static str,
        /// What was wrong with the reply; never the reply's contents, which can be a job.
        what: String,
    },
    /// Something that cannot happen, did.
    #[error("internal error: {0}")]
    Internal(String),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The same, saying at which server.
    pub(crate) fn at(self, target: &Target) -> Self {
        match self {
            Self::Connection(text) => Self::Connection(format!("{target}: {text}")),
            Self::Refused(text) => Self::Refused(format!("{target}: {text}")),
            Self::Unfit(text) => Self::Unfit(format!("{target}: {text}")),
            other => other,
        }
    }

    pub(crate) fn protocol(call: &'static str, what: impl Into<String>) -> Self {
        Self::Protocol {
            call,
            what: what.into(),
        }
    }
}

impl From<redis::RedisError> for Error {
    /// Keeps what the server said, and nothing of what it sent: a value in a parse error could be a job.
    fn from(error: redis::RedisError) -> Self {
        let answered = matches!(
            error.kind(),
            redis::ErrorKind::Server(_) | redis::ErrorKind::Extension | redis::ErrorKind::AuthenticationFailed
        );
        let text = match error.kind() {
            redis::ErrorKind::Parse | redis::ErrorKind::UnexpectedReturnType => {
                "the reply is not Redis' protocol".to_owned()
            }
            redis::ErrorKind::AuthenticationFailed => "Redis refused the username or password".to_owned(),
            // What Redis says to a long call from one who should have logged in first.
            _ if error.detail().is_some_and(|detail| detail.contains("unauthenticated")) => {
                "Redis answered NOAUTH Authentication required".to_owned()
            }
            _ if matches!(error.code(), Some("MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT")) => {
                return Self::Unfit(
                    "Redis answers as a Redis Cluster does, on which Sidekiq itself is not safe: use a server without cluster mode".into(),
                );
            }
            // A master that has been demoted.
            _ if error.code() == Some("READONLY") => {
                return Self::Connection("this server has become a replica, which takes no writes (READONLY)".into());
            }
            _ if error.is_timeout() => "Redis did not answer in time".to_owned(),
            _ => match (error.code(), error.detail()) {
                // Which of its lines a script had come to tells nobody anything.
                (Some(code), Some(detail)) => {
                    let detail = detail.split(" script: ").next().unwrap_or(detail);
                    format!("Redis answered {code} {detail}")
                }
                _ => in_words(&error.to_string()),
            },
        };
        if answered {
            Self::Refused(text)
        } else {
            Self::Connection(text)
        }
    }
}

/// What goes wrong with connections, for people: what rustls and the system say is mostly clear, but not all of it.
fn in_words(text: &str) -> String {
    const WORDS: [(&str, &str); 7] = [
        (
            "UnknownIssuer",
            "the server's certificate is by no authority that is trusted (ca_file, ca_path)",
        ),
        (
            "CaUsedAsEndEntity",
            "the server's certificate is an authority's own: make it one of its own, by that authority",
        ),
        (
            "NotValidForName",
            "the server's certificate is not valid for the host that was asked for",
        ),
        (
            "UnsupportedCertVersion",
            "the server's certificate is of an old version (needed is X.509 version 3)",
        ),
        (
            "alert: CertificateRequired",
            "the server wants a certificate (cert, key)",
        ),
        (
            "alert: HandshakeFailure",
            "the server and the tracker have no way of encryption in common, or it wants a certificate (cert, key)",
        ),
        ("InvalidContentType", "the server does not speak TLS"),
    ];
    match WORDS.into_iter().find(|(sign, _)| text.contains(sign)) {
        Some((_, words)) => words.to_owned(),
        None => text.replacen(
            "invalid peer certificate: certificate",
            "the server's certificate is refused: certificate",
            1,
        ),
    }
}
