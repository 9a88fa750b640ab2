//! The Redis protocol (docs/protocol.md), model-checked.
//!
//! * `model/jobs.rs`: the scripts, the instances and what may befall them. `model/jobs_hold.rs`: the promises hold.
//! * `model/lease.rs`: the lease clock. `model/lease_holds.rs`: no live instance is robbed.
//! * `model/waiting.rs`: waiting for work inside one process. `model/waiting_holds.rs`: no push is missed.
//! * `model/blocking.rs`: claims that wait in Redis. `model/blocking_holds.rs`: they lose nothing, and nothing runs twice by them.
//! * `model/mutations.rs`: each of these mistakes is found, so the model can fail.
//! * `model/search.rs`: the search itself.
//!
//! What is searched, in the `cargo test` profile without optimisation, on two cores: 46 tests, 10 million states,
//! some 26 s, more on a busy machine. `cargo test --test model -- --nocapture` shows states, depth and seconds of each search. No search is
//! cut short: all that the budgets allow is visited, late copies at any later moment included (two may be under way).
//!
//! The long searches are left out there. They take 69 million states and 130 s, and settings both ways 106 million and 130 s:
//! `cargo test --release --test model -- --ignored --nocapture --test-threads 1`
//!
//! | long search | states |
//! | --- | --- |
//! | crash, pause, timeout; 1 job | 1.0 M |
//! | pause, two timeouts; 1 job | 2.6 M |
//! | pause, timeout; 2 jobs | 1.1 M |
//! | cut off, timeout; 2 jobs | 1.5 M |
//! | two pauses, a beat on its way; 1 job | 1.1 M |
//! | 2 threads, 3 jobs, pause | 4.1 M |
//! | 2 threads, thread gone, crash, two timeouts | 8.7 M |
//! | 3 instances, two crashes, timeout | 9.8 M |
//! | last 1 to 3 writes lost, pause; 1 job | 4.7 M |
//! | last 1 to 3 writes lost, timeout | 0.4 M |
//! | middleware mode, pause, timeout, late record | 5.3 M |
//! | three breaks, a hand forgotten | 1.1 M |
//! | two breaks, a hand forgotten, lease taken for lost | 2.8 M |
//! | two breaks, a hand forgotten, sweep, leaves | 3.2 M |
//! | two breaks, a hand forgotten, lease lost | 3.9 M |
//! | two breaks, lease lost, leaves | 6.6 M |
//! | two breaks, lease lost, sweep | 11.3 M |
//! | settings both ways, a clamp until the last lease ends | 106 M |
//!
//! Not modelled: poison counts (`again`), unique locks, `reap` with the proof of a death, the 1 MB cut; several queues and
//! crews only in `model/waiting.rs`, without trouble between instances. `tests/claims.rs` has all of them at once, on a
//! real Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "model/blocking.rs"]
mod blocking;
#[path = "model/blocking_holds.rs"]
mod blocking_holds;
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
#[path = "model/waiting.rs"]
mod waiting;
#[path = "model/waiting_holds.rs"]
mod waiting_holds;
