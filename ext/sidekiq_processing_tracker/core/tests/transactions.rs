//! Turns without their script: that they are used, what makes Redis do nothing of one, and that nothing is lost then.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use redis::Commands;
use support::crews::push;
use support::redis_server::RedisServer;
use support::tracker::{assert_at_rest, in_flight, native, queue, settings, Tracker, SOON};
use support::wait::eventually;
use support::workers::{at_once, strict, weighted, Book, Crew, Perform, Workers};

/// Jobs in these queues, so many each.
fn fill(server: &RedisServer, book: &Book, queues: &[&str], each: usize) {
    for name in queues {
        let jobs: Vec<_> = (0..each)
            .map(|number| book.enqueue(&format!("{name}-{number}"), name))
            .collect();
        push(server, name, &jobs);
    }
}

fn start(server: &RedisServer, crew: Crew, book: &Arc<Book>) -> Workers {
    let tracker = Tracker::registered(native(settings(&server.socket_path(), "one")));
    let perform: Arc<Perform> = Arc::new(at_once);
    Workers::start(tracker, &[crew], book, 0, 1, &perform)
}

#[track_caller]
fn finish(server: &RedisServer, workers: Workers, book: &Book) {
    eventually(SOON, "all is done", || book.is_done() && in_flight(server).is_empty());
    assert!(workers.leave());
    book.assert_exactly_once();
    assert_at_rest(server);
}

#[test]
fn jobs_of_full_queues_come_without_the_script_whatever_their_order() {
    for crew in [
        strict(&["a"], 5),
        strict(&["a", "b", "c", "d"], 5),
        weighted(&["a", "a", "a", "b", "b", "c", "d"], 5),
    ] {
        let (server, book) = (RedisServer::start(), Arc::new(Book::default()));
        fill(&server, &book, &crew.queues[..1], 1000);
        let others: std::collections::BTreeSet<_> = crew.queues.iter().filter(|name| **name != "a").copied().collect();
        fill(&server, &book, &others.into_iter().collect::<Vec<_>>(), 1000);
        let workers = start(&server, crew.clone(), &book);
        finish(&server, workers, &book);
        let (moved, jobs) = (server.calls_of("lmove") as usize, book.tally().0);
        assert!(moved > jobs * 9 / 10, "{moved} of {jobs}: {crew:?}");
    }
}
