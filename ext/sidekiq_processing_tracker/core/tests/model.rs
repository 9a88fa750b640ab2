//! The Redis protocol (docs/protocol.md), model-checked.
//!
//! * `model/jobs.rs`: the scripts, the instances and what may befall them. `model/jobs_hold.rs`: the promises hold.
//! * `model/lease.rs`: the lease clock. `model/lease_holds.rs`: no live instance is robbed.
//! * `model/mutations.rs`: each of these mistakes is found, so the model can fail.
//! * `model/search.rs`: the search itself.
//!
//! See what was searched with `cargo test --test model -- --nocapture`. The long searches are left out there:
//! `cargo test --release --test model -- --ignored --nocapture --test-threads 1`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "model/jobs.rs"]
mod jobs;
#[path = "model/jobs_hold.rs"]
mod jobs_hold;
#[path = "model/lease.rs"]
mod lease;
#[path = "model/lease_holds.rs"]
mod lease_holds;
#[path = "model/mutations.rs"]
mod mutations;
#[path = "model/search.rs"]
mod search;
