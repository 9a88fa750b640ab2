//! The test support itself, against a real Redis: a fault that does not happen would prove nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use redis::{Commands, ErrorKind, RedisResult};
use support::proxy::{relay, Action, At, End, Faults, OnRequest, Plan, Proxy, Request, When};
use support::redis_server::{spawn, unix_now, Options, RedisServer};
use support::rng::Rng;
use support::wait::eventually;

const SOON: Duration = Duration::from_secs(10);
/// The client's own timeout, in tests where the link falls silent.
const IMPATIENT: Duration = Duration::from_millis(150);

/// A connection whose setup has been answered; later requests are what the test makes.
fn connect(url: &str) -> redis::Connection {
    try_connect(url).expect("a connection")
}

fn try_connect(url: &str) -> RedisResult<redis::Connection> {
    let connection = redis::Client::open(url)?.get_connection()?;
    connection.set_read_timeout(Some(SOON))?;
    connection.set_write_timeout(Some(SOON))?;
    Ok(connection)
}

/// A plan that does this to every INCR.
fn on_incr(action: Action) -> impl Plan {
    move |request: &Request| {
        if request.command() == "INCR" {
            action
        } else {
            Action::pass()
        }
    }
}

fn incr(connection: &mut redis::Connection) -> RedisResult<i64> {
    redis::cmd("INCR").arg("n").query(connection)
}

fn count(server: &RedisServer) -> i64 {
    server.connect().get::<_, Option<i64>>("n").unwrap().unwrap_or(0)
}

fn incr_by_hand() -> Vec<u8> {
    support::resp::encode(&[b"INCR", b"n"])
}

fn code(error: &redis::RedisError) -> &str {
    error.code().unwrap_or("")
}

// --- the server ---

#[test]
fn server_listens_on_socket_and_port_and_keeps_its_data_over_a_crash() {
    let mut server = Options::default().tcp().appendonly().start();
    let tcp = format!("redis://127.0.0.1:{}/0", server.port().unwrap());
    let () = connect(&tcp).set("k", "v").unwrap();
    server.crash();
    assert!(server.try_connect().is_err());
    server.start_again();
    assert_eq!(connect(&tcp).get::<_, String>("k").unwrap(), "v");
    server.restart();
    assert_eq!(server.connect().get::<_, String>("k").unwrap(), "v");
}

#[test]
fn server_stands_and_goes_on() {
    let mut server = RedisServer::start();
    let mut connection = server.connect();
    connection.set_read_timeout(Some(IMPATIENT)).unwrap();
    server.pause();
    assert!(redis::cmd("PING").exec(&mut connection).unwrap_err().is_timeout());
    server.resume();
    redis::cmd("PING").exec(&mut server.connect()).unwrap();
    server.pause();
    server.stop();
}

#[test]
fn server_refuses_writes_in_every_way() {
    let mut full = Options::default().maxmemory("3mb").start();
    let mut connection = full.connect();
    let big = vec![b'x'; 100_000];
    let refused = (0..100).find_map(|i| connection.set::<_, _, ()>(format!("k{i}"), &big).err());
    assert_eq!(code(&refused.expect("memory is full")), "OOM");
    full.crash();

    let lonely = RedisServer::start();
    lonely.config_set("min-replicas-to-write", "1");
    assert_eq!(
        code(&lonely.connect().set::<_, _, ()>("k", "v").unwrap_err()),
        "NOREPLICAS"
    );
    lonely.config_set("min-replicas-to-write", "0");
    let () = lonely.connect().set("k", "v").unwrap();

    lonely.break_saves();
    assert_eq!(
        code(&lonely.connect().set::<_, _, ()>("k", "v").unwrap_err()),
        "MISCONF"
    );
    lonely.mend_saves();
    let () = lonely.connect().set("k", "v").unwrap();
}

#[test]
fn server_clock_is_moved_while_it_runs() {
    let mut server = Options::default().fake_clock().start();
    let by_script = |server: &RedisServer| -> i64 {
        redis::cmd("EVAL")
            .arg("return tonumber(redis.call('time')[1])")
            .arg(0)
            .query(&mut server.connect())
            .unwrap()
    };
    assert!((by_script(&server) - unix_now()).abs() <= 2);
    server.set_clock(300);
    assert!((by_script(&server) - unix_now() - 300).abs() <= 2);
    server.set_clock(-600);
    assert!((by_script(&server) - unix_now() + 600).abs() <= 2);
    server.restart();
    assert!((by_script(&server) - unix_now() + 600).abs() <= 2);
}

#[test]
fn server_outlives_the_thread_that_started_it_but_not_a_panic() {
    let server = thread::spawn(RedisServer::start).join().unwrap();
    redis::cmd("PING").exec(&mut server.connect()).unwrap();
    let dir = server.dir().to_owned();
    let died = thread::spawn(move || {
        let _server = server;
        std::panic::resume_unwind(Box::new("as a failed test does"));
    });
    assert!(died.join().is_err());
    assert!(!dir.exists());
}

/// The process that `server_dies_with_its_process` kills.
#[test]
#[ignore = "the child of another test"]
fn child_with_a_server() {
    if env::var_os("TEST_SUPPORT_CHILD").is_none() {
        return;
    }
    let server = RedisServer::start();
    println!("\nsocket={}", server.url());
    thread::park();
}

#[test]
fn server_dies_with_its_process() {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child_with_a_server", "--ignored", "--nocapture"]);
    command
        .env("TEST_SUPPORT_CHILD", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = spawn(command).unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let url = lines
        .map(Result::unwrap)
        .find_map(|line| line.strip_prefix("socket=").map(String::from))
        .unwrap();
    redis::cmd("PING").exec(&mut connect(&url)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    eventually(SOON, "the child's server is gone", || try_connect(&url).is_err());
    let socket = url.strip_prefix("redis+unix://").unwrap();
    std::fs::remove_dir_all(std::path::Path::new(socket).parent().unwrap()).unwrap();
}

// --- the proxy, by plan ---

#[test]
fn proxy_relays_large_values_pipelines_and_pushes() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let big: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    for url in [proxy.url(), proxy.tcp_url()] {
        let mut connection = connect(&url);
        let () = connection.set("big", &big).unwrap();
        assert_eq!(connection.get::<_, Vec<u8>>("big").unwrap(), big);
        let mut pipe = redis::pipe();
        for _ in 0..500 {
            pipe.cmd("INCR").arg("n");
        }
        let replies: Vec<i64> = pipe.query(&mut connection).unwrap();
        assert_eq!(replies.len(), 500);
    }
    // Client-side tracking: its messages come unasked.
    let mut url = redis::Client::open(format!("{}?protocol=resp3", proxy.url()))
        .unwrap()
        .get_connection()
        .unwrap();
    url.set_read_timeout(Some(SOON)).unwrap();
    redis::cmd("CLIENT").arg("TRACKING").arg("ON").exec(&mut url).unwrap();
    let _: Option<i64> = url.get("n").unwrap();
    let () = server.connect().set("n", 5).unwrap();
    assert_eq!(url.get::<_, i64>("n").unwrap(), 5);
    eventually(SOON, "the message was relayed", || proxy.counts().of("pushes") == 1);
    assert_eq!(proxy.counts().faults(), 0, "{}", proxy.counts());
}

#[test]
fn proxy_cuts_a_request_at_every_byte() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let len = incr_by_hand().len();
    for cut in 0..=len {
        proxy.set_plan(on_incr(Action::cut_request(At::Byte(cut), End::Close)));
        let error = incr(&mut connect(&proxy.url())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        assert_eq!(proxy.counts().of("cut_request"), cut as u64 + 1);
    }
    // Only the complete one was executed.
    eventually(SOON, "the complete request is executed", || count(&server) == 1);
}

#[test]
fn proxy_cuts_a_reply_at_every_byte() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    for cut in 0..=4 {
        proxy.set_plan(on_incr(Action::cut_reply(At::Byte(cut), End::Close)));
        let reply = incr(&mut connect(&proxy.url()));
        assert_eq!(reply.is_ok(), cut == ":1\r\n".len(), "cut at {cut}: {reply:?}");
        // When the client knows, Redis has executed it.
        assert_eq!(count(&server), cut as i64 + 1);
    }
    assert_eq!(proxy.counts().of("cut_reply"), 5);
}

#[test]
fn proxy_resets_a_tcp_connection() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    for action in [
        Action::cut_reply(At::Byte(2), End::Reset),
        Action::cut_request(At::Byte(2), End::Reset),
    ] {
        proxy.set_plan(on_incr(action));
        let mut client = TcpStream::connect(proxy.tcp_addr()).unwrap();
        client.write_all(&incr_by_hand()).unwrap();
        let error = client.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert_eq!(count(&server), 1);
}

#[test]
fn proxy_delays_requests_and_replies() {
    let server = RedisServer::start();
    let by = Duration::from_millis(100);
    for action in [Action::delay(by), Action::delay_reply(by)] {
        let proxy = Proxy::start(server.socket_path(), on_incr(action));
        let mut connection = connect(&proxy.url());
        let start = Instant::now();
        incr(&mut connection).unwrap();
        assert!(start.elapsed() >= by);
        assert_eq!(proxy.counts().faults(), 1);
    }
}

#[test]
fn proxy_stalls_until_the_client_gives_up() {
    let server = RedisServer::start();
    for (action, executed) in [(Action::stall(), 0), (Action::stall_reply(), 1)] {
        let proxy = Proxy::start(server.socket_path(), on_incr(action));
        let mut connection = connect(&proxy.url());
        connection.set_read_timeout(Some(IMPATIENT)).unwrap();
        assert!(incr(&mut connection).unwrap_err().is_timeout());
        assert_eq!(count(&server), executed);
        assert_eq!(proxy.open_connections(), 1);
        drop(connection);
        eventually(SOON, "the connection is forgotten", || proxy.open_connections() == 0);
    }
}

#[test]
fn proxy_delivers_a_given_up_request_late_in_its_own_database() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), on_incr(Action::postpone(When::OnRelease)));
    let mut connection = connect(&format!("{}?db=3", proxy.url()));
    assert_eq!(incr(&mut connection).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(proxy.late_waiting(), 1);
    drop(connection);
    proxy.calm();
    // The client has come back and done the same again; then the first try arrives.
    let mut again = connect(&format!("{}?db=3", proxy.url()));
    assert_eq!(incr(&mut again).unwrap(), 1);
    assert_eq!(proxy.release_late(), 1);
    assert_eq!(again.get::<_, i64>("n").unwrap(), 2);
    assert_eq!(count(&server), 0);
    let late = proxy.late_log();
    assert_eq!(
        (late.len(), late[0].request.command().as_str(), late[0].reply.as_slice()),
        (1, "INCR", &b":2\r\n"[..])
    );
}

#[test]
fn proxy_delivers_a_copy_after_its_time() {
    let server = RedisServer::start();
    let when = When::After(Duration::from_millis(30));
    let proxy = Proxy::start(server.socket_path(), on_incr(Action::drop_reply().and_copy(when)));
    assert!(incr(&mut connect(&proxy.url())).is_err());
    proxy.wait_late(SOON);
    assert_eq!(count(&server), 2);
    assert_eq!(proxy.counts().of("late_delivered"), 1);
}

#[test]
fn proxy_refuses_and_listens_again() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let mut open = connect(&proxy.url());
    proxy.refuse();
    for url in [proxy.url(), proxy.tcp_url()] {
        let error = try_connect(&url).err().expect("refused");
        assert!(error.is_connection_refusal(), "{error}");
    }
    incr(&mut open).unwrap();
    proxy.listen_again();
    incr(&mut connect(&proxy.url())).unwrap();
    incr(&mut connect(&proxy.tcp_url())).unwrap();
    eventually(SOON, "the closed ones are forgotten", || proxy.open_connections() == 1);
    proxy.close_all(End::Close);
    assert!(incr(&mut open).is_err());
    assert_eq!(count(&server), 3);
}

#[test]
fn proxy_freezes_and_what_was_under_way_arrives_after() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.socket_path(), relay);
    let mut connection = connect(&proxy.url());
    connection.set_read_timeout(Some(IMPATIENT)).unwrap();
    proxy.freeze();
    assert!(incr(&mut connection).unwrap_err().is_timeout());
    drop(connection);
    assert_eq!(count(&server), 0);
    proxy.thaw();
    eventually(SOON, "the request of a client that has gone arrives", || {
        count(&server) == 1
    });
}

#[test]
fn proxy_ends_with_everything_under_way() {
    let server = RedisServer::start();
    let hour = Duration::from_secs(3600);
    let proxy = Proxy::start(
        server.socket_path(),
        on_incr(Action::delay(hour).and_copy(When::After(hour))),
    );
    let mut connection = connect(&proxy.tcp_url());
    let waiting = thread::spawn(move || incr(&mut connection).is_err());
    eventually(SOON, "the request waits", || proxy.counts().of("delayed") == 1);
    let _idle = connect(&proxy.url());
    proxy.freeze();
    drop(proxy);
    assert!(waiting.join().unwrap());
    assert_eq!(count(&server), 0);
}

// --- the proxy, by seed ---

#[test]
fn random_faults_are_the_same_for_the_same_seed() {
    let plan = |seed: u64| -> Vec<Action> {
        let mut faults = Faults::some(seed);
        let places = (1..50).flat_map(|c| (1..50).map(move |i| (c, i)));
        let request = |(connection, index)| Request {
            connection,
            index,
            total: 0,
            bytes: incr_by_hand(),
        };
        places.map(|place| faults.request(&request(place))).collect()
    };
    assert_eq!(plan(7), plan(7));
    assert_ne!(plan(7), plan(8));
    let hit = plan(7).iter().filter(|action| **action != Action::pass()).count();
    assert!((150..600).contains(&hit), "{hit} of 2401");
}

#[test]
fn random_faults_happen_and_stop() {
    let seed = support::rng::seed();
    let server = RedisServer::start();
    let mut faults = Faults::some(seed);
    // Silence seldom: each time costs the client its timeout.
    (faults.stall, faults.stall_reply, faults.mute, faults.refuse) = (0.004, 0.004, 0.01, 0.1);
    (faults.max_delay, faults.max_late) = (Duration::from_millis(2), Duration::from_millis(20));
    let proxy = Proxy::start(server.socket_path(), faults);
    let workers: Vec<_> = (0..4)
        .map(|i| {
            let url = if i % 2 == 0 { proxy.url() } else { proxy.tcp_url() };
            thread::spawn(move || {
                let (mut done, mut given_up, mut connection) = (0, 0, None);
                while done < 500 {
                    let Some(open) = connection.as_mut() else {
                        let timeout = Duration::from_millis(30);
                        connection = redis::Client::open(url.as_str())
                            .and_then(|client| client.get_connection_with_timeout(timeout))
                            .and_then(|connection| connection.set_read_timeout(Some(timeout)).map(|()| connection))
                            .ok();
                        continue;
                    };
                    match incr(open) {
                        Ok(_) => done += 1,
                        Err(_) => {
                            given_up += 1;
                            connection = None;
                        }
                    }
                }
                (done, given_up)
            })
        })
        .collect();
    let (done, given_up) = workers
        .into_iter()
        .map(|w| w.join().unwrap())
        .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    proxy.wait_late(SOON);
    let counts = proxy.counts();
    println!("seed {seed}: {done} done, {given_up} given up; {counts}");
    for fault in [
        "refused",
        "cut_request",
        "cut_reply",
        "delayed",
        "delayed_reply",
        "postponed",
        "copied",
    ] {
        assert!(counts.of(fault) > 0, "seed {seed}: no {fault} in {counts}");
    }
    assert!(given_up > 0, "seed {seed}");
    let executed = count(&server);
    let most = done + given_up + counts.of("copied") as i64;
    assert!(
        (done..=most).contains(&executed),
        "seed {seed}: {executed} executed, {done} to {most}; {counts}"
    );

    proxy.calm();
    proxy.close_all(End::Close);
    let before = proxy.counts().faults();
    let mut connection = connect(&proxy.url());
    (0..200).for_each(|_| assert!(incr(&mut connection).is_ok()));
    assert_eq!(proxy.counts().faults(), before);
}

#[test]
fn random_numbers_are_spread() {
    let mut rng = Rng::new(1);
    let mut seen = [0; 10];
    (0..10_000).for_each(|_| seen[rng.below(10) as usize] += 1);
    assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
    // Places beside each other have nothing in common.
    let near: Vec<u64> = (0..4).map(|i| Rng::at(1, &[3, i]).next_u64()).collect();
    assert!(
        near.windows(2).all(|pair| (pair[0] ^ pair[1]).count_ones() > 10),
        "{near:x?}"
    );
    let whole = Faults::none(9).request(&Request {
        connection: 1,
        index: 1,
        total: 1,
        bytes: incr_by_hand(),
    });
    assert_eq!(whole.request, OnRequest::Pass);
}
