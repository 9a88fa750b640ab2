//! Deaths that are certain before a lease ends (docs/protocol.md, "Death"): the process of another instance on this host
//! has ended, or the instance's label was promised to be one process' alone.

use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::link::Link;
use crate::recovery::Recovery;
use crate::scripts::{self, Fenced, Info, Proof};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use sha1_smol::Sha1;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the system tells of processes. There is none on macOS: then nothing is certain, and leases decide.
pub const PROC: &str = "/proc";

/// How often the list of neighbours is read though it has not changed as far as a beat can tell.
const LIST_EVERY: Duration = Duration::from_secs(5 * 60);
/// How long the index of a host or a label outlives the last look at it. It is gone with its last entry; this is for entries
/// that nobody can remove.
const INDEX_LIVES: Duration = Duration::from_secs(24 * 60 * 60);
/// How many neighbours an instance keeps an eye on. Where there are more, each takes some at random, and somebody has each.
const MOST: usize = 64;

/// A process, so that another one on the same host can tell whether it still lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Which boot of which kernel.
    pub boot_id: String,
    /// The namespace that its pid is of.
    pub pid_namespace: String,
    /// All that must be the same for two processes to see each other as they see themselves, in one word.
    pub place: String,
    /// Its pid there.
    pub pid: u32,
    /// When it was started, in the kernel's ticks since boot: no clock that anybody sets.
    pub started: u64,
}

impl Process {
    /// This process, as `proc` tells of it. `None` where that is not there, or is the one of another pid namespace: what it
    /// says of a pid would then be said of another process.
    #[must_use]
    pub fn this(proc: &Path) -> Option<Self> {
        let text = |path: &str| {
            let text = fs::read_to_string(proc.join(path)).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        };
        let namespace = |path: &str| fs::read_link(proc.join(path)).ok()?.into_os_string().into_string().ok();
        let pid = std::process::id();
        // One number for each namespace from that of `proc` down to our own: a single one where they are the same.
        let status = text("self/status")?;
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        if pids.split_ascii_whitespace().collect::<Vec<_>>() != [pid.to_string()] {
            return None;
        }
        let stat = Stat::read(&proc.join("self/stat"))?;
        // An emulator (qemu-user) makes up what a process reads of itself there. Others would see what is true.
        let seen = Stat::read(&proc.join(format!("self/task/{pid}/stat")))?;
        if stat.pid != pid || (seen.pid, seen.started) != (pid, stat.started) {
            return None;
        }
        let (boot_id, pid_namespace) = (text("sys/kernel/random/boot_id")?, namespace("self/ns/pid")?);
        let hostname = text("sys/kernel/hostname")?;
        // Start times are told by the clock of the reader's time namespace. And machines that were cloned while they ran have
        // one boot id; their names mostly differ.
        let time_namespace = namespace("self/ns/time").unwrap_or_default();
        let place = [&boot_id, &pid_namespace, &time_namespace, &hostname].map(String::as_str);
        Some(Self {
            place: Sha1::from(place.join("\n")).digest().to_string(),
            boot_id,
            pid_namespace,
            pid,
            started: stat.started,
        })
    }

    /// What an instance's info says of its process.
    #[must_use]
    pub fn told(&self) -> [(String, String); 4] {
        [
            ("boot_id".into(), self.boot_id.clone()),
            ("pid_namespace".into(), self.pid_namespace.clone()),
            ("process".into(), format!("{} {}", self.pid, self.started)),
            ("host".into(), self.place.clone()),
        ]
    }
}

/// Whether a process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It does.
    Alive,
    /// It does not: nothing has its pid, or another process has, or only its remains are there.
    Dead,
    /// That cannot be told.
    Unknown,
}

/// Looks whether the process `pid` that was started at `started` lives. Only of use to one that is in the same place.
#[must_use]
pub fn look(proc: &Path, pid: u32, started: u64) -> Life {
    let Some(number) = i32::try_from(pid).ok().filter(|number| *number > 0) else {
        return Life::Unknown;
    };
    // The kernel answers this whatever `proc` hides (hidepid), and whoever the process belongs to.
    if kill(Pid::from_raw(number), None) == Err(Errno::ESRCH) {
        return Life::Dead;
    }
    match Stat::read(&proc.join(number.to_string()).join("stat")) {
        Some(stat) if stat.pid != pid => Life::Unknown,
        Some(stat) if stat.started != started || stat.has_ended() => Life::Dead,
        Some(_) => Life::Alive,
        None => Life::Unknown,
    }
}

/// What `stat` tells of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stat {
    pid: u32,
    state: u8,
    threads: u64,
    started: u64,
}

impl Stat {
    fn read(path: &Path) -> Option<Self> {
        // The name of the program is in there, and may be any bytes.
        Self::parse(&String::from_utf8_lossy(&fs::read(path).ok()?))
    }

    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let fields: Vec<&str> = after.split_ascii_whitespace().collect();
        Some(Self {
            pid: before.split_once(' ')?.0.parse().ok()?,
            state: *fields.first()?.as_bytes().first()?,
            threads: fields.get(17)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    /// Whether nothing of it runs any more, though its parent has not yet taken note. The first thread of a process may end
    /// before others do.
    fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x') && self.threads <= 1
    }
}

/// An instance as an index names it: when it was registered, and its process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    identity: Vec<u8>,
    registered_at: u64,
    /// Its pid, when it was started, and the place. `None` where that was not known.
    process: Option<(u32, u64, String)>,
}

impl Entry {
    /// Reads `<registered_at>[ <pid> <started> <place>]`.
    fn read(identity: Vec<u8>, value: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(value).ok()?.split(' ');
        let registered_at = parts.next()?.parse().ok()?;
        let process = match (parts.next(), parts.next(), parts.next()) {
            (Some(pid), Some(started), Some(place)) => {
                Some((pid.parse().ok()?, started.parse().ok()?, place.to_owned()))
            }
            _ => None,
        };
        Some(Self {
            identity,
            registered_at,
            process,
        })
    }
}

/// The indexes in which an instance stands, by its info.
#[must_use]
pub fn indexes(keys: &Keys, info: &Info) -> Vec<Vec<u8>> {
    let of = |field: &str, key: fn(&Keys, &str) -> String| {
        let name = std::str::from_utf8(info.get(field.as_bytes())?).ok()?;
        Some(key(keys, name).into_bytes())
    };
    [of("host", Keys::host), of("exclusive", Keys::label)]
        .into_iter()
        .flatten()
        .collect()
}

/// What the control thread knows of instances whose death it may be certain of.
pub(crate) struct Neighbours {
    proc: Option<PathBuf>,
    /// This process as it is registered.
    here: Option<Process>,
    /// The label that is promised to be this process' alone.
    exclusive: Option<String>,
    /// This process has just come: whoever had its label before is dead.
    takes_over: bool,
    known: Vec<Entry>,
    /// How many there were on this host when they were listed, and when that was.
    listed: Option<(Option<u64>, Instant)>,
    /// They are to be listed.
    list: bool,
    /// Those of the known that seem to be dead.
    suspects: Vec<Entry>,
    /// Those that had this process' label before.
    predecessors: Vec<Entry>,
}

/// What the next step came to.
pub(crate) enum Step {
    /// An instance that is dead for certain.
    Dead(Box<Recovery>),
    /// Somebody has the label that was promised to this process alone.
    NotAlone(String),
    /// Nothing yet.
    Nothing,
}

impl Neighbours {
    pub fn new(proc: Option<PathBuf>) -> Self {
        Self {
            proc,
            here: None,
            exclusive: None,
            takes_over: false,
            known: Vec::new(),
            listed: None,
            list: false,
            suspects: Vec::new(),
            predecessors: Vec::new(),
        }
    }

    /// This process as it is to be registered.
    pub fn this_process(&self) -> Option<Process> {
        self.proc.as_deref().and_then(Process::this)
    }

    /// The instance is registered, for the `first` time or with a new lease.
    pub fn registered(&mut self, here: Option<Process>, exclusive: Option<String>, first: bool) {
        let proc = self.proc.take();
        *self = Self {
            list: here.is_some() || exclusive.is_some(),
            takes_over: first && exclusive.is_some(),
            here,
            exclusive,
            ..Self::new(proc)
        };
    }

    /// The index of this host's instances, which a beat is asked about.
    pub fn host(&self) -> Option<&str> {
        self.here.as_ref().map(|here| &here.place[..])
    }

    /// A beat was answered, and there are so many instances on this host: time to look after them.
    pub fn beaten(&mut self, hosted: Option<u64>, now: Instant) {
        if self.here.is_none() && self.exclusive.is_none() {
            return;
        }
        let due = |at: Instant| now.duration_since(at) >= LIST_EVERY;
        self.list |= self.listed.is_none_or(|(count, at)| due(at) || hosted != count);
        self.look();
    }

    /// Looks whether those live that are known. It asks the system only.
    pub fn look(&mut self) {
        if self.suspects.is_empty() {
            self.suspects = self.known.iter().filter(|entry| self.is_dead(entry)).cloned().collect();
        }
    }

    fn is_dead(&self, entry: &Entry) -> bool {
        self.life(entry) == Life::Dead
    }

    fn life(&self, entry: &Entry) -> Life {
        match (&self.proc, &self.here, &entry.process) {
            (Some(proc), Some(here), Some((pid, started, place))) if *place == here.place => look(proc, *pid, *started),
            _ => Life::Unknown,
        }
    }

    /// Whether there is a step to take.
    pub fn is_busy(&self) -> bool {
        self.list || !self.suspects.is_empty() || !self.predecessors.is_empty()
    }

    /// What Redis refuses of this, it may refuse for ever: leases decide.
    pub fn give_up(&mut self) {
        self.list = false;
        self.suspects.clear();
        self.predecessors.clear();
        self.listed = Some((self.listed.and_then(|(count, _)| count), Instant::now()));
    }

    /// Takes the next step, a call or two.
    pub fn step(&mut self, link: &mut Link, keys: &Keys, identity: &str) -> Result<Step> {
        if self.list {
            self.list(link, keys, identity)?;
            return Ok(Step::Nothing);
        }
        if let Some(predecessor) = self.predecessors.last().cloned() {
            let step = self.take_over(link, keys, &predecessor)?;
            self.predecessors.pop();
            return Ok(step);
        }
        let Some(suspect) = self.suspects.last().cloned() else {
            return Ok(Step::Nothing);
        };
        // Before the proof: a beat that comes after this makes it void.
        let lease_end = Self::lease_end(link, keys, &suspect.identity)?;
        self.suspects.pop();
        let Some(lease_end) = lease_end else {
            self.gone(link, keys, &suspect)?;
            return Ok(Step::Nothing);
        };
        let Lease::Ends(lease_end) = lease_end else {
            return Ok(Step::Nothing);
        };
        if !self.has_ended(&suspect) {
            return Ok(Step::Nothing);
        }
        let pid = suspect.process.as_ref().map_or(0, |(pid, ..)| *pid);
        let proof = Proof {
            lease_end,
            process_ended: true,
            told: format!("its process {pid} has ended"),
        };
        Ok(Step::Dead(Box::new(Recovery::certain(suspect.identity, proof))))
    }

    /// Whether its process has ended for certain: somebody may have put another `proc` in the place of the one that was there.
    fn has_ended(&self, entry: &Entry) -> bool {
        self.this_process() == self.here && self.is_dead(entry)
    }

    fn list(&mut self, link: &mut Link, keys: &Keys, identity: &str) -> Result<()> {
        let (host, label) = (
            self.host().map(|host| keys.host(host)),
            self.exclusive.as_deref().map(|label| keys.label(label)),
        );
        let indexes: Vec<String> = host.iter().chain(&label).cloned().collect();
        let answer = scripts::enlist(link, keys, identity, &indexes, INDEX_LIVES, MOST)?;
        self.list = false;
        self.listed = Some((None, Instant::now()));
        let Fenced::Alive(lists) = answer else { return Ok(()) };
        let mut lists = lists.into_iter();
        let mut next = || -> (Option<u64>, Vec<Entry>) {
            let Some((count, entries)) = lists.next() else {
                return (None, Vec::new());
            };
            let entries = entries.into_iter();
            (
                count,
                entries
                    .filter_map(|(identity, value)| Entry::read(identity, &value))
                    .collect(),
            )
        };
        if host.is_some() {
            let (count, entries) = next();
            self.listed = Some((count, Instant::now()));
            self.known = entries;
            self.known.retain(|entry| entry.identity != identity.as_bytes());
            self.suspects = self.known.iter().filter(|entry| self.is_dead(entry)).cloned().collect();
        }
        if std::mem::take(&mut self.takes_over) {
            let (_, mut entries) = next();
            let own = entries.iter().find(|entry| entry.identity == identity.as_bytes());
            let since = own.map_or(0, |own| own.registered_at);
            // One that has come meanwhile is no predecessor: it takes over from us. Nor is this very process, which registered
            // before and got no answer.
            let here = self
                .here
                .as_ref()
                .map(|here| (here.pid, here.started, here.place.clone()));
            entries.retain(|entry| entry.registered_at < since && (here.is_none() || entry.process != here));
            self.predecessors = entries;
        }
        Ok(())
    }

    fn take_over(&mut self, link: &mut Link, keys: &Keys, predecessor: &Entry) -> Result<Step> {
        let Some(lease_end) = Self::lease_end(link, keys, &predecessor.identity)? else {
            self.gone(link, keys, predecessor)?;
            return Ok(Step::Nothing);
        };
        let Lease::Ends(lease_end) = lease_end else {
            return Ok(Step::Nothing);
        };
        let label = self.exclusive.as_deref().unwrap_or_default();
        if self.life(predecessor) == Life::Alive {
            let pid = predecessor.process.as_ref().map_or(0, |(pid, ..)| *pid);
            return Ok(Step::NotAlone(format!(
                "exclusive_instance_id is set, but another process works as {label}: process {pid} of this host, as {}. It \
                 keeps its jobs. Give each process an instance_id of its own, or leave exclusive_instance_id unset",
                String::from_utf8_lossy(&predecessor.identity)
            )));
        }
        let proof = Proof {
            lease_end,
            process_ended: self.has_ended(predecessor),
            told: format!("{label} is this process' alone (exclusive_instance_id)"),
        };
        Ok(Step::Dead(Box::new(Recovery::certain(
            predecessor.identity.clone(),
            proof,
        ))))
    }

    /// The lease end of an instance that has its lease. `None` where there is no such instance.
    fn lease_end(link: &mut Link, keys: &Keys, identity: &[u8]) -> Result<Option<Lease>> {
        let Some(lease_end) = scripts::lease_end(link, keys, identity)? else {
            return Ok(None);
        };
        // One that is fenced is in another reaper's hands: its hold, or the time for which suspects wait.
        match scripts::is_alive(link, keys, identity) {
            Ok(true) => Ok(Some(Lease::Ends(lease_end))),
            Ok(false) | Err(Error::Refused(_)) => Ok(Some(Lease::Taken)),
            Err(error) => Err(error),
        }
    }

    /// There is no such instance any more: somebody has recovered it, or it has left.
    fn gone(&mut self, link: &mut Link, keys: &Keys, entry: &Entry) -> Result<()> {
        let host = self.host().map(|host| keys.host(host));
        let label = self.exclusive.as_deref().map(|label| keys.label(label));
        for index in host.iter().chain(&label) {
            link.command(redis::cmd("HDEL").arg(index).arg(&entry.identity))?;
        }
        self.known.retain(|known| known.identity != entry.identity);
        // Whoever was there goes on under another name, perhaps.
        self.list = true;
        Ok(())
    }
}

enum Lease {
    Ends(Vec<u8>),
    Taken,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    /// A `/proc` as somebody might find it.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn of_this_process() -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            let pid = std::process::id();
            fake.write("sys/kernel/random/boot_id", "3f0c-boot\n");
            fake.write("sys/kernel/hostname", "web-1\n");
            fake.write("self/status", &format!("Name:\truby\nNSpid:\t{pid}\n"));
            fake.write("self/stat", &stat(pid, 'S', 8, 4711));
            fake.write(&format!("self/task/{pid}/stat"), &stat(pid, 'R', 8, 4711));
            fake.link("self/ns/pid", "pid:[4026531836]");
            fake.link("self/ns/time", "time:[4026531834]");
            fake
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn link(&self, path: &str, target: &str) {
            let path = self.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = fs::remove_file(&path);
            symlink(target, path).unwrap();
        }

        fn place(&self) -> String {
            Process::this(self.path()).unwrap().place
        }
    }

    fn stat(pid: u32, state: char, threads: u32, started: u64) -> String {
        format!("{pid} (ruby ) (worker) {state} 1 2 2 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 {threads} 0 {started} 1 1 1\n")
    }

    fn child() -> Child {
        Command::new("sleep").arg("60").process_group(0).spawn().unwrap()
    }

    fn started(pid: u32) -> u64 {
        Stat::read(Path::new(&format!("/proc/{pid}/stat"))).unwrap().started
    }

    #[test]
    fn tells_this_process() {
        let fake = Fake::of_this_process();
        let this = Process::this(fake.path()).unwrap();
        assert_eq!((this.pid, this.started), (std::process::id(), 4711));
        assert_eq!(
            (&this.boot_id[..], &this.pid_namespace[..]),
            ("3f0c-boot", "pid:[4026531836]")
        );
        assert_eq!(Process::this(fake.path()), Some(this));
    }

    #[test]
    fn another_place_is_another_boot_namespace_or_machine() {
        let fake = Fake::of_this_process();
        let mut places = vec![fake.place()];
        fake.write("sys/kernel/random/boot_id", "another-boot\n");
        places.push(fake.place());
        fake.link("self/ns/pid", "pid:[4026532001]");
        places.push(fake.place());
        fake.link("self/ns/time", "time:[4026532002]");
        places.push(fake.place());
        fake.write("sys/kernel/hostname", "web-2\n");
        places.push(fake.place());
        let distinct: std::collections::HashSet<_> = places.iter().collect();
        assert_eq!(distinct.len(), 5, "{places:?}");
    }

    #[test]
    fn a_kernel_that_tells_nothing_makes_nothing_certain() {
        assert_eq!(Process::this(Path::new("/nowhere")), None);
        let task = format!("self/task/{}/stat", std::process::id());
        for missing in [
            "sys/kernel/random/boot_id",
            "sys/kernel/hostname",
            "self/status",
            "self/stat",
            "self/ns/pid",
            &task,
        ] {
            let fake = Fake::of_this_process();
            fs::remove_file(fake.path().join(missing)).unwrap();
            assert_eq!(Process::this(fake.path()), None, "{missing}");
        }
    }

    #[test]
    fn the_proc_of_another_pid_namespace_makes_nothing_certain() {
        let pid = std::process::id();
        for pids in [
            format!("4321\t{pid}"),
            format!("{pid}\t{pid}"),
            "4321".into(),
            String::new(),
        ] {
            let fake = Fake::of_this_process();
            fake.write("self/status", &format!("Name:\truby\nNSpid:\t{pids}\n"));
            assert_eq!(Process::this(fake.path()), None, "{pids}");
        }
        let fake = Fake::of_this_process();
        fake.write("self/status", "Name:\truby\n");
        assert_eq!(Process::this(fake.path()), None);
    }

    #[test]
    fn a_start_that_an_emulator_makes_up_makes_nothing_certain() {
        let pid = std::process::id();
        for (file, text) in [
            ("self/stat".to_owned(), stat(pid, 'S', 8, 0)),
            (format!("self/task/{pid}/stat"), stat(pid, 'S', 8, 4712)),
            (format!("self/task/{pid}/stat"), stat(pid + 1, 'S', 8, 4711)),
        ] {
            let fake = Fake::of_this_process();
            fake.write(&file, &text);
            assert_eq!(Process::this(fake.path()), None, "{file}: {text}");
        }
    }

    #[test]
    fn looks_whether_a_process_lives() {
        let proc = Path::new(PROC);
        let mut process = child();
        let (pid, since) = (process.id(), started(process.id()));
        assert_eq!(look(proc, pid, since), Life::Alive);
        // The pid is another process' by now.
        assert_eq!(look(proc, pid, since - 1), Life::Dead);
        process.kill().unwrap();
        // Its parent, which is this process, has not yet taken note of its end: what is left is a zombie.
        let deadline = Instant::now() + Duration::from_secs(20);
        while look(proc, pid, since) == Life::Alive && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(look(proc, pid, since), Life::Dead);
        assert_eq!(
            Stat::read(&proc.join(pid.to_string()).join("stat")).unwrap().state,
            b'Z'
        );
        process.wait().unwrap();
        assert_eq!(look(proc, pid, since), Life::Dead);
    }

    #[test]
    fn what_proc_hides_is_not_taken_for_dead() {
        let hidden = tempfile::tempdir().unwrap();
        let mut process = child();
        assert_eq!(look(hidden.path(), process.id(), started(process.id())), Life::Unknown);
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(look(hidden.path(), process.id(), 1), Life::Dead);
    }

    #[test]
    fn no_number_of_a_process_group_is_looked_at() {
        for pid in [0, u32::MAX, i32::MAX as u32 + 1] {
            assert_eq!(look(Path::new(PROC), pid, 1), Life::Unknown);
        }
    }

    #[test]
    fn a_first_thread_that_has_ended_before_the_others_is_no_death() {
        let fake = Fake::of_this_process();
        let pid = std::process::id();
        let file = format!("{pid}/stat");
        for (state, threads, life) in [
            ('Z', 1, Life::Dead),
            ('X', 0, Life::Dead),
            ('Z', 2, Life::Alive),
            ('T', 1, Life::Alive),
            ('D', 1, Life::Alive),
        ] {
            fake.write(&file, &stat(pid, state, threads, 4711));
            assert_eq!(look(fake.path(), pid, 4711), life, "{state} {threads}");
        }
        for cut in ["", "1", "1 (ruby) S 1", "1 (ruby", "x (ruby) S"] {
            fake.write(&file, cut);
            assert_eq!(look(fake.path(), pid, 4711), Life::Unknown, "{cut}");
        }
    }

    #[test]
    fn reads_the_entries_of_an_index() {
        let read = |value: &str| Entry::read(b"a".to_vec(), value.as_bytes());
        assert_eq!(
            read("12 34 56 place"),
            Some(Entry {
                identity: b"a".to_vec(),
                registered_at: 12,
                process: Some((34, 56, "place".into())),
            })
        );
        assert_eq!(read("12").unwrap().process, None);
        for other in ["", "x", "1 x 2 place", "1 2 x place", "1 -2 3 place"] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
