//! Turns without their script: that they are used, what makes Redis do nothing of one, and that nothing is lost then.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use processing_tracker_core::engine::Recorded;
use processing_tracker_core::events::Event;
use processing_tracker_core::registry::Taken;
use redis::Commands;
use support::crews::{crew, info, look, push, taken_by, QUICK};
use support::proxy::{Action, At, End, OnRequest, Proxy, Request, When};
use support::redis_server::{Options, RedisServer, USER};
use support::tracker::{
    assert_at_rest, in_flight, is_lease_lost, job, keys, native, our_keys, queue, recover_all, settings, Tracker, SOON,
};
use support::wait::eventually;
use support::workers::{at_once, strict, weighted, Book, Crew, Perform, Workers};

fn is_warning(event: &Event) -> bool {
    matches!(event, Event::Warning(_))
}

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

/// Takes and acks jobs, one after the other, as a single thread, until this many have come without the script.
#[track_caller]
fn take_until_moved(server: &RedisServer, tracker: &Tracker, crew: usize, moved: u64) {
    let before = server.calls_of("lmove");
    while server.calls_of("lmove") < before + moved {
        next(tracker, crew);
    }
}

/// The next job of a single thread, which ends it at once.
#[track_caller]
fn next(tracker: &Tracker, crew: usize) -> Taken {
    let taken = match look(tracker, crew) {
        Ok(taken) => taken,
        Err(parker) => taken_by(tracker, crew, &parker, SOON),
    };
    tracker.engine().ack(taken.handle);
    taken
}

fn named(prefix: &str, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|number| job(&format!("{prefix}{number}"))).collect()
}

#[test]
fn what_comes_into_a_queue_that_goes_first_comes_first() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(native(settings(&server.socket_path(), "one")));
    let work = crew(&tracker, &["high", "higher than none", "low"]);
    push(&server, "low", &named("low", 3000));
    for round in 0..5 {
        take_until_moved(&server, &tracker, work, 5);
        let urgent = job(&format!("high{round}"));
        push(&server, "high", std::slice::from_ref(&urgent));
        assert_eq!(next(&tracker, work).payload[..], urgent[..]);
    }
    assert_eq!(tracker.count(is_warning), 0);
    assert!(tracker.leave(SOON));
}

#[test]
fn a_transaction_that_comes_after_its_instance_was_fenced_does_nothing() {
    let server = RedisServer::start();
    let armed = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let armed = armed.clone();
        move |request: &Request| {
            let is_due = request.is_transaction() && request.contains("LMOVE");
            if is_due && armed.swap(false, SeqCst) {
                // The client waits for an answer: nothing of the turn is done by the script meanwhile.
                Action {
                    request: OnRequest::Postpone(When::OnRelease, End::Silence),
                    ..Action::pass()
                }
            } else {
                Action::pass()
            }
        }
    });
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["work"]);
    let all = named("j", 100);
    push(&server, "work", &all);
    take_until_moved(&server, &tracker, work, 5);
    armed.store(true, SeqCst);
    proxy_holds(&tracker, work, &proxy);
    let call = || -> u64 {
        let inflight = keys().inflight(&tracker.identity());
        server.connect().hget(inflight, "call").unwrap()
    };
    let before = call();
    tracker.stop();
    assert_eq!(call(), before, "the turn was done in another way");
    recover_all(&settings(&server.socket_path(), "console")).unwrap();
    let waiting = queue(&server, "work");
    let before = our_keys(&server);
    assert_eq!(proxy.release_late(), 1);
    assert_eq!((queue(&server, "work"), our_keys(&server)), (waiting, before));
    let replies = proxy.late_log();
    assert!(
        replies[0].reply == b"*-1\r\n" || replies[0].reply == b"_\r\n",
        "{replies:?}"
    );
    assert_at_rest(&server);
}

/// Goes on until a turn is held up.
#[track_caller]
fn proxy_holds(tracker: &Tracker, crew: usize, proxy: &Proxy) {
    while proxy.late_waiting() == 0 {
        if let Ok(taken) = look(tracker, crew) {
            tracker.engine().ack(taken.handle);
        }
    }
}

/// A server whose user lacks rights.
fn without(rights: &[&str]) -> RedisServer {
    let server = RedisServer::start();
    change(
        &server,
        &rights.iter().map(|right| format!("-{right}")).collect::<Vec<_>>(),
    );
    server
}

fn change(server: &RedisServer, rules: &[String]) {
    let mut command = redis::cmd("ACL");
    command.arg("SETUSER").arg(USER).arg(rules);
    command.exec(&mut server.connect()).unwrap();
}

#[test]
fn without_the_rights_each_turn_is_a_script_and_a_person_is_told_once() {
    for right in ["multi", "exec", "watch", "lmove", "lindex"] {
        let (server, book) = (without(&[right]), Arc::new(Book::default()));
        fill(&server, &book, &["a"], 500);
        // Of one thread, the claim is the last but one command of a transaction.
        let workers = start(&server, strict(&["a"], if right == "lmove" { 1 } else { 3 }), &book);
        let tells = |event: &Event| matches!(event, Event::Warning(text) if text.contains("transactions"));
        workers.tracker().wait_for("it says so", tells);
        eventually(SOON, "all is done", || book.is_done());
        assert_eq!(workers.tracker().count(tells), 1, "{right}");
        assert_eq!(server.calls_of("lmove"), 0);
        let connections: u64 = info(&server, "stats", "total_connections_received").parse().unwrap();
        assert!(connections < 100, "{connections}");
        assert_eq!(
            workers.tracker().count(|event| matches!(event, Event::Outage { .. })),
            0,
            "{right}"
        );
        finish(&server, workers, &book);
    }
}

#[test]
fn rights_that_come_and_go_under_load_cost_no_job_and_double_none() {
    let (server, book) = (RedisServer::start(), Arc::new(Book::default()));
    let workers = start(&server, strict(&["a", "b"], 4), &book);
    let rights = ["multi", "exec", "watch", "lmove"];
    for (round, right) in rights.iter().cycle().take(10 * rights.len()).enumerate() {
        let jobs: Vec<_> = (0..200)
            .map(|number| book.enqueue(&format!("{round}-{number}"), "a"))
            .collect();
        let done = book.tally().1;
        push(&server, "a", &jobs);
        eventually(SOON, "some are done", || book.tally().1 > done + 20);
        change(&server, &[format!("-{right}")]);
        change(&server, &[format!("+{right}")]);
    }
    eventually(SOON, "all is done", || book.is_done());
    finish(&server, workers, &book);
}

#[test]
fn a_full_memory_makes_turns_scripts_and_stops_none() {
    let (server, book) = (Options::default().maxmemory("24mb").start(), Arc::new(Book::default()));
    fill(&server, &book, &["a"], 2000);
    server.config_set("maxmemory", "1mb");
    let workers = start(&server, strict(&["a"], 4), &book);
    eventually(SOON, "all is done", || book.is_done());
    assert_eq!(server.calls_of("lmove"), 0);
    server.config_set("maxmemory", "0");
    finish(&server, workers, &book);
}

#[test]
fn who_polls_sends_scripts_only() {
    let (server, book) = (RedisServer::start(), Arc::new(Book::default()));
    fill(&server, &book, &["a"], 500);
    let mut settings = native(settings(&server.socket_path(), "one"));
    settings.polls = true;
    let perform: Arc<Perform> = Arc::new(at_once);
    let workers = Workers::start(
        Tracker::registered(settings),
        &[strict(&["a"], 3)],
        &book,
        0,
        1,
        &perform,
    );
    finish(&server, workers, &book);
    assert_eq!((server.calls_of("lmove"), server.calls_of("multi")), (0, 0));
}

#[test]
fn a_queue_that_is_no_list_holds_up_no_other_and_is_told_of() {
    let (server, book) = (RedisServer::start(), Arc::new(Book::default()));
    let () = server.connect().set("queue:broken", "no list").unwrap();
    fill(&server, &book, &["b"], 2000);
    let workers = start(&server, strict(&["broken", "b"], 3), &book);
    eventually(SOON, "all is done", || book.is_done());
    let tells = |event: &Event| matches!(event, Event::Warning(text) if text.contains("queue:broken"));
    workers.tracker().wait_for("it says so", tells);
    let () = server.connect().del("queue:broken").unwrap();
    finish(&server, workers, &book);
}

#[test]
fn a_claim_whose_answer_was_lost_is_found_out_and_the_next_queue_tried_at_once() {
    let server = RedisServer::start();
    let armed = Arc::new(AtomicBool::new(false));
    let proxy = Proxy::start(server.socket_path(), {
        let armed = armed.clone();
        move |request: &Request| match request.is_transaction() && armed.swap(false, SeqCst) {
            true => Action::drop_reply(),
            false => Action::pass(),
        }
    });
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["a", "b"]);
    push(&server, "a", &named("a", 50));
    push(&server, "b", &named("b", 50));
    for round in 0..100 {
        armed.store(round % 3 == 0, SeqCst);
        let taken = match look(&tracker, work) {
            Ok(taken) => taken,
            Err(parker) => taken_by(&tracker, work, &parker, QUICK),
        };
        let expected = if round < 50 {
            format!("a{round}")
        } else {
            format!("b{}", round - 50)
        };
        assert_eq!(taken.payload[..], job(&expected)[..]);
        tracker.engine().ack(taken.handle);
    }
    assert!(proxy.counts().of("cut_reply") > 10, "{}", proxy.counts());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn acks_clear_no_counters_where_there_are_none() {
    let server = RedisServer::start();
    let clears = Arc::new(Mutex::new(Vec::new()));
    let proxy = Proxy::start(server.socket_path(), {
        let clears = clears.clone();
        move |request: &Request| {
            if request.is_transaction() {
                clears.lock().unwrap().push(request.contains(":recoveries:"));
            }
            Action::pass()
        }
    });
    let tracker = Tracker::registered(native(settings(&proxy.socket_path(), "one")));
    let work = crew(&tracker, &["a"]);
    push(&server, "a", &named("a", 60));
    (0..30).for_each(|_| drop(next(&tracker, work)));
    assert!(clears.lock().unwrap().iter().all(|clears| !clears));
    // And where there are some, they do.
    let () = server.connect().set(keys().counted(), 1).unwrap();
    (0..30).for_each(|_| drop(next(&tracker, work)));
    let seen = clears.lock().unwrap();
    assert!(seen.len() > 20 && seen.iter().any(|clears| *clears), "{seen:?}");
}

/// Records and ends a job.
#[track_caller]
fn run(tracker: &Tracker, name: &str) {
    let handle = tracker.record("work", &job(name));
    tracker.engine().ack(handle);
}

#[test]
fn a_thread_that_wants_its_record_sends_it_and_reads_the_answer_itself() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "one"));
    (0..5).for_each(|number| run(&tracker, &format!("first{number}")));
    let (scripts, mut jobs, mut at_once) = (server.calls_of("evalsha"), 0, 0);
    // On a busy machine another thread may come in between.
    eventually(SOON, "the record is there when the thread has asked for it", || {
        jobs += 1;
        let handle = tracker.track("work", &job(&format!("j{jobs}")));
        at_once += u64::from(matches!(tracker.engine().recorded(handle), Recorded::Yes));
        // Not so where the machine was so busy that the lease was lost.
        let _ = tracker.is_recorded(handle, SOON);
        tracker.engine().ack(handle);
        at_once >= 100
    });
    let scripts = server.calls_of("evalsha") - scripts;
    assert!(scripts < jobs / 2, "{scripts} scripts for {jobs} jobs");
    eventually(SOON, "the acks have gone", || in_flight(&server).is_empty());
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn a_thread_that_wants_its_record_never_waits_for_the_answer_where_it_asks() {
    for (what, action) in [
        ("late", Action::delay_reply(Duration::from_millis(300))),
        ("half of it", Action::cut_reply(At::Byte(9), End::Silence)),
        ("none, and the connection ends", Action::drop_reply()),
        ("nothing is done", Action::drop_request()),
    ] {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.socket_path(), move |request: &Request| {
            if request.is_transaction() && request.contains("held") {
                action
            } else {
                Action::pass()
            }
        });
        let tracker = Tracker::registered(settings(&proxy.socket_path(), "one"));
        (0..20).for_each(|number| run(&tracker, &format!("first{number}")));
        let held = tracker.track("work", &job("held"));
        assert!(
            !matches!(tracker.engine().recorded(held), Recorded::Yes | Recorded::Lost),
            "{what}: it has waited for the answer"
        );
        // What another thread wants meanwhile comes with the next turn.
        let other = tracker.track("work", &job("other"));
        assert!(!matches!(tracker.engine().recorded(other), Recorded::Lost), "{what}");
        for handle in [held, other] {
            eventually(SOON, "the job is recorded", || tracker.is_recorded(handle, SOON));
        }
        let mut found = in_flight(&server);
        found.sort();
        assert_eq!(found, [job("held"), job("other")], "{what}");
        assert_eq!(tracker.count(is_lease_lost), 0, "{what}");
        [held, other]
            .into_iter()
            .for_each(|handle| tracker.engine().ack(handle));
        (0..20).for_each(|number| run(&tracker, &format!("last{number}")));
        eventually(SOON, "the acks have gone", || in_flight(&server).is_empty());
        assert!(tracker.leave(SOON), "{what}");
        assert_at_rest(&server);
    }
}

#[test]
fn an_ack_goes_though_no_other_turn_comes() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "one"));
    for round in 0..50_u64 {
        // Sometimes the claims thread looks by itself just then, sometimes it has long gone to sleep.
        run(&tracker, &format!("j{round}"));
        // Long before the claims thread would look in any case.
        eventually(Duration::from_secs(2), "the ack has gone", || {
            in_flight(&server).is_empty()
        });
        std::thread::sleep(Duration::from_micros(round * 100));
    }
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}

#[test]
fn the_ack_of_a_large_payload_is_a_small_request() {
    let server = RedisServer::start();
    let tracker = Tracker::registered(settings(&server.socket_path(), "one"));
    let sent = || -> u64 { info(&server, "stats", "total_net_input_bytes").parse().unwrap() };
    let before = sent();
    let handle = tracker.record("work", &job(&"x".repeat(1 << 20)));
    assert!(sent() - before > 1 << 20);
    let before = sent();
    tracker.engine().ack(handle);
    eventually(SOON, "the ack has gone", || in_flight(&server).is_empty());
    let asked = sent() - before;
    assert!(asked < 64 << 10, "{asked} bytes");
    assert!(tracker.leave(SOON));
    assert_at_rest(&server);
}
