//! An instance in a process of its own, for the tests to kill: `tracker-instance key=value...`, see `settings`.
//!
//! It reads commands from stdin, one a line, and answers each with one line on stdout; payloads and queues are in hex.
//! A line that begins with `event` comes unasked. When stdin ends, so does the process, at once and without leaving.
//!
//! With `work=<threads>,<strict or weighted>,<queue>,<queue>...` (as often as there are to be crews) threads take jobs
//! and tell so, in a line before each step: `event Begun <queue> <payload>`, then `event Done <payload>` before the ack,
//! or nothing where the thread drops the job.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use processing_tracker_core::crew::Plan;
use processing_tracker_core::due::Push;
use processing_tracker_core::engine::{Engine, Recorded};
use processing_tracker_core::events::Next;
use processing_tracker_core::parker::Woken;
use processing_tracker_core::registry::Requeueing;
use processing_tracker_core::settings::{Fetch, Policy, Settings};
use processing_tracker_core::target::{Address, Target};
use processing_tracker_core::Result;
use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

#[allow(dead_code)]
#[path = "rng.rs"]
mod rng;

fn main() {
    let engine = Arc::new(Engine::start(settings()).expect("an engine"));
    for crew in std::env::args().filter_map(|argument| argument.strip_prefix("work=").map(str::to_owned)) {
        start_crew(&engine, &crew);
    }
    thread::spawn({
        let engine = Arc::clone(&engine);
        move || tell_events(&engine)
    });
    for line in io::stdin().lock().lines() {
        let line = line.expect("a line of text");
        let words: Vec<&str> = line.split(' ').collect();
        say(&answer(&engine, &words));
    }
}

fn settings() -> Settings {
    let mut settings = Settings {
        namespace: "sidekiq_processing".into(),
        instance_id: "child".into(),
        interval: Duration::from_millis(200),
        ttl: Duration::from_secs(1),
        hold: Duration::from_secs(300),
        redis: Target::new(Address::Unix("/nowhere".into())),
        queues: None,
        info: vec![("hostname".into(), "child".into())],
        fetch: Fetch::Sidekiq,
        policy: Policy::default(),
        polls: false,
        keep_control: Duration::ZERO,
        blocks: false,
        proc: None,
        exclusive: false,
    };
    for argument in std::env::args().skip(1) {
        settings.redis.username = Some("tracker".into());
        settings.redis.password = "of-the-tracker".into();
        let (key, value) = argument.split_once('=').expect("key=value");
        match key {
            "socket" => settings.redis.address = Address::Unix(value.into()),
            "queues" => {
                let mut queues = Target::new(Address::Unix(value.into()));
                queues.username.clone_from(&settings.redis.username);
                queues.password = settings.redis.password.clone();
                settings.queues = Some(queues);
            }
            "proc" => settings.proc = Some(value.into()),
            "exclusive" => settings.exclusive = value == "true",
            "namespace" => settings.namespace = value.into(),
            "instance_id" => settings.instance_id = value.into(),
            "interval_ms" => settings.interval = millis(value),
            "ttl_ms" => settings.ttl = millis(value),
            "hold_ms" => settings.hold = millis(value),
            "work" => settings.fetch = Fetch::Native,
            "blocks" => settings.blocks = value == "true",
            "recovery_window_ms" => settings.policy.recovery_window = millis(value),
            other => panic!("unknown setting {other}"),
        }
    }
    settings
}

fn start_crew(engine: &Arc<Engine>, crew: &str) {
    let words: Vec<&str> = crew.split(',').collect();
    let queues = words[2..].iter().map(|queue| queue.as_bytes().to_vec());
    let number = engine
        .add_crew(Plan::new(queues, words[1] == "strict"))
        .expect("a crew");
    for thread in 0..words[0].parse().expect("a number of threads") {
        let (engine, rng) = (
            Arc::clone(engine),
            rng::Rng::at(u64::from(std::process::id()), &[number as u64, thread]),
        );
        thread::spawn(move || work(&engine, number, rng));
    }
}

fn work(engine: &Engine, crew: usize, mut rng: rng::Rng) {
    loop {
        let Some(taken) = engine.take(crew) else {
            if let Some(parker) = engine.wait_for_work(crew) {
                parker.wait(Some(Instant::now() + Duration::from_millis(100)));
                engine.stop_waiting(crew, &parker);
            } else if !engine.gives_work(crew) {
                return;
            }
            continue;
        };
        let payload: String = taken.payload.iter().map(|byte| format!("{byte:02x}")).collect();
        say(&format!(
            "event Begun {} {payload}",
            String::from_utf8_lossy(&taken.queue)
        ));
        if rng.chance(0.1) {
            thread::sleep(rng.up_to(Duration::from_millis(50)));
        }
        if rng.chance(0.05) {
            engine.release(taken.handle);
        } else {
            say(&format!("event Done {payload}"));
            engine.ack(taken.handle);
        }
    }
}

fn answer(engine: &Engine, words: &[&str]) -> String {
    match *words {
        ["identity"] => engine.identity(),
        ["track", queue, payload] => engine
            .track(from_hex(queue), from_hex(payload).into(), None)
            .to_string(),
        ["recorded", handle, within] => recorded(engine, number(handle), Instant::now() + millis(within)).to_string(),
        ["ack", handle] => {
            engine.ack(number(handle));
            "ok".into()
        }
        ["release", handle] => {
            engine.release(number(handle));
            "ok".into()
        }
        ["requeue", handle, within] => match engine.requeue(number(handle)) {
            Requeueing::Settled => "settled".into(),
            Requeueing::Unrecorded => {
                assert!(engine.take_back(number(handle)));
                "unrecorded".into()
            }
            Requeueing::Under(parker) => {
                let woken = parker.wait(Some(Instant::now() + millis(within)));
                match (engine.take_back(number(handle)), woken) {
                    (true, _) => "unrecorded".into(),
                    (false, Woken::Done) => "requeued".into(),
                    (false, _) => "late".into(),
                }
            }
        },
        // Pushes what is due, each job to the queue `work`; how many, or that it did not work.
        ["poll", set] => poll(engine, set).map_or_else(|error| format!("failed {error}"), |pushed| pushed.to_string()),
        ["leave", within] => {
            let deadline = Instant::now() + millis(within);
            engine.leave().wait(Some(deadline));
            for ended in engine.stop() {
                ended.wait(Some(deadline));
            }
            engine.has_left().to_string()
        }
        _ => panic!("unknown command {words:?}"),
    }
}

fn poll(engine: &Engine, set: &str) -> Result<u64> {
    let mut pushed = 0;
    loop {
        let claimed = engine.claim_due(set.as_bytes(), b"1000", None)?;
        let pushes: Vec<_> = claimed
            .jobs
            .into_iter()
            .map(|(token, payload)| (token, Push::Queue(b"work".to_vec(), payload)))
            .collect();
        pushed += engine.settle_due(&pushes)?;
        if !claimed.more {
            engine.end_due()?;
            return Ok(pushed);
        }
    }
}

fn recorded(engine: &Engine, handle: u64, deadline: Instant) -> bool {
    loop {
        match engine.recorded(handle) {
            Recorded::Yes => return true,
            Recorded::No | Recorded::Lost => return false,
            Recorded::Wait(parker) => {
                if parker.wait(Some(deadline)) == Woken::TimedOut {
                    engine.waited_in_vain();
                    return false;
                }
            }
        }
    }
}

fn tell_events(engine: &Engine) {
    loop {
        match engine.events().next() {
            Next::Event(event) => say(&format!("event {event:?}")),
            Next::Wait(parker) => {
                parker.wait(None);
            }
            Next::Closed => return,
        }
    }
}

/// One line, whole: two threads speak.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn millis(text: &str) -> Duration {
    Duration::from_millis(number(text))
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

fn from_hex(text: &str) -> Vec<u8> {
    // `-` stands for nothing, which a line of words cannot show.
    if text == "-" {
        return Vec::new();
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex"))
        .collect()
}
