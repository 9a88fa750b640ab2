//! Encrypted connections: whom to trust, and who we are.
//!
//! Certificates and keys are read from their files for each connection, so that those which are renewed on the disk are used
//! from the next connection on.

use crate::error::{Error, Result};
use redis::{ClientTlsConfig, TlsCertificates};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Once;

/// How a connection is encrypted.
#[derive(Clone, Default)]
pub struct Tls {
    /// A file with the certificates of the authorities to trust. Without a file and a folder those of the system.
    pub ca_file: Option<PathBuf>,
    /// A folder with such files.
    pub ca_path: Option<PathBuf>,
    /// The client's certificate, and those that lead to an authority.
    pub cert: Option<Pem>,
    /// The client's private key.
    pub key: Option<Pem>,
    /// What is verified of the server.
    pub verify: Verify,
}

/// What is verified of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// That its certificate is valid, by an authority that is trusted, and for its name.
    #[default]
    Full,
    /// The same, but for the name.
    Chain,
    /// Nothing: whoever answers is trusted.
    None,
}

/// Something in the PEM format.
#[derive(Clone)]
pub enum Pem {
    /// In this file.
    File(PathBuf),
    /// This.
    Text(String),
}

/// Shows no key.
impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tls({:?})", self.verify)
    }
}

/// Chooses the cryptography for this process. To be called before there are threads that might do so when the process forks.
pub fn prepare() {
    static CHOSEN: Once = Once::new();
    CHOSEN.call_once(|| {
        // Fails where it has been chosen before.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

impl Tls {
    /// What redis-rs is to be given.
    ///
    /// # Errors
    /// `Error::Unfit`, naming the file that is missing or makes no sense.
    pub(crate) fn certificates(&self) -> Result<TlsCertificates> {
        let client_tls = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some(ClientTlsConfig {
                client_cert: cert.read("cert")?,
                client_key: key.read("key")?,
            }),
            _ => None,
        };
        Ok(TlsCertificates {
            client_tls,
            root_cert: self.authorities()?,
        })
    }

    fn authorities(&self) -> Result<Option<Vec<u8>>> {
        if self.verify == Verify::None || (self.ca_file.is_none() && self.ca_path.is_none()) {
            return Ok(None);
        }
        let mut text = Vec::new();
        if let Some(file) = &self.ca_file {
            text.extend(read("ca_file", file)?);
        }
        if let Some(folder) = &self.ca_path {
            for file in files_in(folder)? {
                // There may be other things in the folder.
                let content = std::fs::read(file).unwrap_or_default();
                if holds_certificate(&content) {
                    text.push(b'\n');
                    text.extend(content);
                }
            }
        }
        if holds_certificate(&text) {
            return Ok(Some(text));
        }
        let places: Vec<_> = [("ca_file", &self.ca_file), ("ca_path", &self.ca_path)]
            .into_iter()
            .filter_map(|(name, place)| place.as_ref().map(|place| format!("{name} {}", place.display())))
            .collect();
        Err(Error::Unfit(format!(
            "there is no certificate in PEM format in {}",
            places.join(" and ")
        )))
    }
}

impl Pem {
    fn read(&self, name: &str) -> Result<Vec<u8>> {
        match self {
            Self::Text(text) => Ok(text.clone().into_bytes()),
            Self::File(file) => read(name, file),
        }
    }
}

fn read(name: &str, file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|error| unreadable(name, file, &error))
}

/// The files in a folder, in an order that is always the same.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| unreadable("ca_path", folder, &error))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    Ok(files)
}

fn unreadable(name: &str, place: &Path, error: &std::io::Error) -> Error {
    Error::Unfit(format!("{name} {} cannot be read: {error}", place.display()))
}

fn holds_certificate(text: &[u8]) -> bool {
    const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
    text.windows(BEGIN.len()).any(|window| window == BEGIN)
}
