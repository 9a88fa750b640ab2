//! Instances in processes of their own, for the tests to kill. See `instance.rs`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use super::redis_server::{has_setpriv, spawn};
use super::tracker::SOON;
use super::wait::eventually;

/// A process with an engine. Dropping it kills it.
pub struct Instance {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    events: Arc<Mutex<Vec<String>>>,
}

/// How an instance is started.
pub struct Options {
    arguments: Vec<String>,
    failpoint: Option<String>,
    within: Vec<String>,
    env: Vec<(String, String)>,
}

impl Options {
    /// One with quick settings, on the server behind this unix socket.
    pub fn new(socket: &Path) -> Self {
        Self {
            arguments: vec![format!("socket={}", socket.display())],
            failpoint: None,
            within: Vec::new(),
            env: Vec::new(),
        }
    }

    /// Another setting, see `instance.rs`.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.arguments.push(format!("{key}={}", value.to_string()));
        self
    }

    /// It kills itself there.
    pub fn failpoint(mut self, place: &str) -> Self {
        self.failpoint = Some(place.to_owned());
        self
    }

    /// It is started by this command, to which it is appended.
    pub fn within(mut self, command: &[&str]) -> Self {
        self.within = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// It has this in its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it. It registers by itself.
    pub fn start(self) -> Instance {
        let program = env!("CARGO_BIN_EXE_tracker-instance");
        let mut words = self.within;
        if has_setpriv() {
            words.splice(..0, ["setpriv", "--pdeathsig", "KILL"].map(String::from));
        }
        words.push(program.to_owned());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .envs(self.env)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command.env_remove("PROCESSING_TRACKER_FAILPOINT");
        if let Some(place) = self.failpoint {
            command.env("PROCESSING_TRACKER_FAILPOINT", place);
        }
        let mut child = spawn(command).expect("an instance");
        let stdin = child.stdin.take().expect("stdin");
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let (sender, answers) = channel();
        let events: Arc<Mutex<Vec<String>>> = Arc::default();
        thread::spawn({
            let events = Arc::clone(&events);
            move || {
                for line in stdout.lines().map_while(Result::ok) {
                    if let Some(event) = line.strip_prefix("event ") {
                        events
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(event.to_owned());
                    } else if sender.send(line).is_err() {
                        return;
                    }
                }
            }
        });
        Instance {
            child,
            stdin,
            answers,
            events,
        }
    }

    /// Starts it and waits until it is registered.
    pub fn registered(self) -> Instance {
        let instance = self.start();
        eventually(SOON, "the instance is registered", || instance.told("Started") > 0);
        instance
    }
}

impl Instance {
    /// The answer to a command, `None` when the process has died of it.
    pub fn try_ask(&mut self, command: &str) -> Option<String> {
        writeln!(self.stdin, "{command}")
            .and_then(|()| self.stdin.flush())
            .ok()?;
        match self.answers.recv_timeout(SOON) {
            Ok(answer) => Some(answer),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(timeout) => panic!("no answer to {:.40}: {timeout}", command),
        }
    }

    /// The answer to a command.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.try_ask(command).expect("the instance lives")
    }

    /// Its identity.
    pub fn identity(&mut self) -> String {
        self.ask("identity")
    }

    /// A job begins. Answers its handle.
    pub fn track(&mut self, queue: &str, payload: &[u8]) -> u64 {
        let command = format!("track {} {}", hex(queue.as_bytes()), hex(payload));
        self.ask(&command).parse().expect("a handle")
    }

    /// Whether the job is recorded within this time.
    pub fn is_recorded(&mut self, handle: u64, within: Duration) -> bool {
        self.ask(&format!("recorded {handle} {}", within.as_millis())) == "true"
    }

    /// A job begins, and its record is in Redis.
    #[track_caller]
    pub fn record(&mut self, queue: &str, payload: &[u8]) -> u64 {
        let handle = self.track(queue, payload);
        eventually(SOON, "the job is recorded", || self.is_recorded(handle, SOON));
        handle
    }

    /// Jobs begin, in this order, and their records are in Redis.
    #[track_caller]
    pub fn record_all(&mut self, queue: &str, payloads: &[Vec<u8>]) -> Vec<u64> {
        let handles: Vec<u64> = payloads.iter().map(|payload| self.track(queue, payload)).collect();
        for handle in &handles {
            eventually(SOON, "the job is recorded", || self.is_recorded(*handle, SOON));
        }
        handles
    }

    /// The job is done.
    pub fn ack(&mut self, handle: u64) {
        assert_eq!(self.ask(&format!("ack {handle}")), "ok");
    }

    /// Leaves; whether it has.
    pub fn leave(&mut self, within: Duration) -> bool {
        self.ask(&format!("leave {}", within.as_millis())) == "true"
    }

    /// What it has told, as `Debug` shows it.
    pub fn events(&self) -> Vec<String> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, all of it, once the process is dead.
    pub fn said(&mut self) -> Vec<String> {
        // The pipe holds what it wrote before it died.
        while self.answers.recv_timeout(SOON).is_ok() {}
        self.events()
    }

    /// How many events of this name it has told.
    pub fn told(&self, name: &str) -> usize {
        let is = |event: &&String| {
            event
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '(']))
        };
        self.events().iter().filter(is).count()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGSTOP. Returns when it stands.
    pub fn pause(&self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        kill(pid, Signal::SIGSTOP).expect("signal");
        eventually(SOON, "the instance stands", || {
            let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)).expect("wait");
            matches!(status, WaitStatus::Stopped(..))
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGCONT).expect("signal");
    }

    /// Whether it has died of SIGKILL, as at a failpoint. Panics when it ended in another way.
    pub fn is_killed(&mut self) -> bool {
        match self.child.try_wait().expect("wait") {
            Some(status) => {
                assert_eq!(status.signal(), Some(9), "{status}");
                true
            }
            None => false,
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- instance {} told ---\n{:#?}", self.child.id(), self.events());
        }
        self.kill();
    }
}

fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "-".into();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
