//! The Redis protocol of sidekiq-processing-tracker, without any Ruby in it.
//!
//! docs/protocol.md says what is promised and why; each module here is one of its nouns.

mod blocking;
mod claims;
pub mod clock;
mod control;
mod courier;
pub mod crew;
pub mod dead_set;
pub mod decision;
pub mod due;
pub mod engine;
pub mod entry;
pub mod error;
pub mod events;
mod failpoint;
pub mod host;
pub mod identity;
pub mod keys;
pub mod legacy;
pub mod link;
pub mod orphans;
pub mod parker;
pub mod password;
pub mod payload;
mod recoveries;
pub mod recovery;
pub mod registry;
pub mod scripts;
pub mod sentinel;
pub mod server;
pub mod settings;
mod shared;
pub mod slots;
pub mod target;
pub mod threads;
pub mod tls;
mod turns;
mod wake;
pub mod watch;
mod wire;

pub use error::{Error, Result};
