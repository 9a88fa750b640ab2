//! Crews, and threads of theirs that wait for jobs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::redis_server::RedisServer;
use super::tracker::{Tracker, SOON};
use super::wait::eventually;
use processing_tracker_core::crew::Plan;
use processing_tracker_core::parker::{Parker, Woken};
use processing_tracker_core::registry::Taken;
use redis::Commands;

/// Less than the pause between two looks at empty queues: what comes sooner has not come by such a look.
pub const QUICK: Duration = Duration::from_millis(3500);

/// A crew that takes from these queues in this order.
pub fn crew(tracker: &Tracker, queues: &[&str]) -> usize {
    let queues = queues.iter().map(|queue| queue.as_bytes().to_vec());
    tracker.engine().add_crew(Plan::new(queues, true)).unwrap()
}

/// Sidekiq's client pushes these.
pub fn push(server: &RedisServer, queue: &str, jobs: &[Vec<u8>]) {
    let () = server.connect().lpush(format!("queue:{queue}"), jobs).unwrap();
}

/// A line of Redis' INFO.
pub fn info(server: &RedisServer, section: &str, field: &str) -> String {
    let info: String = redis::cmd("INFO").arg(section).query(&mut server.connect()).unwrap();
    let value = info.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    value.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

/// How many claims wait in Redis.
pub fn blocked(server: &RedisServer) -> usize {
    info(server, "clients", "blocked_clients").parse().unwrap()
}

/// Waits until so many claims wait in Redis.
#[track_caller]
pub fn until_blocked(server: &RedisServer, count: usize) {
    eventually(SOON, &format!("{count} claims wait in Redis"), || {
        blocked(server) == count
    });
}

/// One look of a thread: a job, or a place to wait.
pub fn look(tracker: &Tracker, crew: usize) -> Result<Taken, Arc<Parker>> {
    loop {
        if let Some(taken) = tracker.engine().take(crew) {
            return Ok(taken);
        }
        if let Some(parker) = tracker.engine().wait_for_work(crew) {
            return Err(parker);
        }
    }
}

/// A thread that waits for a job.
#[track_caller]
pub fn waits(tracker: &Tracker, crew: usize) -> Arc<Parker> {
    look(tracker, crew).expect_err("there is nothing to take")
}

/// The job that a thread that waits gets.
#[track_caller]
pub fn taken_by(tracker: &Tracker, crew: usize, parker: &Arc<Parker>, within: Duration) -> Taken {
    let woken = parker.wait(Some(Instant::now() + within));
    assert_eq!(woken, Woken::Done, "no job within {within:?}");
    tracker.engine().arrive(crew, parker).expect("a job")
}
