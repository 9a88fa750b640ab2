//! What the integration tests share: a real Redis of their own, a proxy that breaks things, instances, waiting.
//!
//! A test file says `mod support;` and takes what it needs.

// Every test binary compiles this module and uses a part of it.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod crews;
pub mod lua;
#[cfg(feature = "failpoints")]
pub mod process;
pub mod proxy;
pub mod redis_server;
pub mod resp;
pub mod rng;
pub mod sentinel;
pub mod storm;
pub mod tracker;
pub mod wait;
pub mod workers;
