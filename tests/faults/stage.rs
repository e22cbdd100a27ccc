//! A master, the network before it, an enrolled worker with its files and its Docker, and the process under test.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster, Options};
use serde_json::Value;

use crate::docker::Engine;
use crate::files::{Replacing, StateFile, TopologyFile};
use crate::gate::Gate;
use crate::subject::{Logger, Setup, Source};

/// Longer than anything a row waits for; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How late a busy machine may be.
pub const SLACK: Duration = Duration::from_secs(3);

/// What a row's world is like before anything goes wrong.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub interval: Duration,
    pub source: Source,
    /// It beats on its own ticks, or else when it is told to.
    pub ticks: bool,
    /// What the process may grow by, in KiB.
    pub growth: u64,
    pub logger: Logger,
}

impl Default for World {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            source: Source::Of(100),
            ticks: false,
            growth: 6 * 1024,
            logger: Logger::Stderr,
        }
    }
}

pub struct Stage {
    pub world: World,
    /// The thread that replaces the state file. Fields are dropped in order, so it ends before its folder is removed.
    pub replacing: Option<Replacing>,
    pub dir: tempfile::TempDir,
    pub master: LoopbackMaster,
    pub gate: Gate,
    pub worker: Enrolled,
    pub docker: Engine,
    bundle: [(&'static str, String, u32); 3],
    /// What keeps a file locked.
    pub locked: Option<rusqlite::Connection>,
}

impl Stage {
    pub fn new(world: World) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Connections end when a row says so.
        let master =
            LoopbackMaster::start_with(Options { idle: PATIENCE * 2, ..Options::default() })
                .unwrap();
        let gate = Gate::to(master.address());
        let mut worker = master.enrol(&dir.path().join("agent")).unwrap();
        worker.port = gate.port();
        worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
        let replacing = StateFile::GOOD.put(&dir.path().join("state.json"));
        TopologyFile::Good.put(&worker.agent_dir.join("topology.db"));
        let docker = Engine::start(&dir.path().join("docker.sock"));
        let bundle = [("ca.crt", 0o644), ("worker.crt", 0o644), ("worker.key", 0o600)].map(
            |(name, mode)| (name, fs::read_to_string(worker.agent_dir.join(name)).unwrap(), mode),
        );
        Self { world, replacing, dir, master, gate, worker, docker, bundle, locked: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn agent_file(&self, name: &str) -> PathBuf {
        self.worker.agent_dir.join(name)
    }

    pub fn setup(&self) -> Setup {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        Setup {
            ini: text(self.path("decnet.ini")),
            state_file: text(self.path("state.json")),
            docker_socket: text(self.path("docker.sock")),
            interval: self.world.interval,
            source: self.world.source,
            ticks: self.world.ticks,
            logger: self.world.logger,
        }
    }

    /// The process under test with these variables, whatever it says first.
    pub fn spawn(&self, variables: &[(&str, &str)]) -> Subject {
        Subject::spawn(&self.setup(), &self.path("log"), variables)
    }

    /// Writes the bundle as it was at the enrolment.
    pub fn write_bundle(&self) {
        for (name, content, mode) in &self.bundle {
            fs::write(self.agent_file(name), content).unwrap();
            fs::set_permissions(self.agent_file(name), Permissions::from_mode(*mode)).unwrap();
        }
    }

    /// The process under test, after its first beat.
    pub fn start(&self) -> Subject {
        let mut subject = self.spawn(&[]);
        assert_eq!(subject.answer(), "started");
        subject.until("the first beat", |stats| stats["beats"].as_u64() >= Some(1));
        subject
    }

    /// The deckies of the deltas that have arrived in requests that were answered like this, in order, each once.
    pub fn arrived(&self, answered: impl Fn(Option<u16>) -> bool) -> Vec<String> {
        let received = self.master.received();
        let bodies = received
            .iter()
            .filter(|request| answered(request.status))
            .filter_map(|it| it.json.as_ref());
        let deltas =
            bodies.flat_map(|json| json["lifecycle"].as_array().cloned().unwrap_or_default());
        let mut names: Vec<_> =
            deltas.map(|delta| delta["decky_name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// The last request's JSON.
    pub fn last(&self) -> Value {
        self.master.received().last().and_then(|request| request.json.clone()).unwrap_or_default()
    }
}

/// What a process costs.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub threads: u64,
    pub descriptors: usize,
    /// The most that it has ever had in memory, in KiB.
    pub peak: u64,
    /// What it has in memory now, in KiB.
    pub resident: u64,
}

impl Footprint {
    pub fn of(process: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
        };
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
        Self {
            threads: number("Threads"),
            descriptors,
            peak: number("VmHWM"),
            resident: number("VmRSS"),
        }
    }
}

/// The process under test, and what it says.
pub struct Subject {
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Receiver<String>,
    log: PathBuf,
}

impl Subject {
    fn spawn(setup: &Setup, log: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = command();
        command.arg("--subject").arg(serde_json::to_string(setup).unwrap());
        let log_file = File::options().create(true).append(true).open(log).unwrap();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .envs(variables.iter().copied());
        let mut child = command.spawn().unwrap();
        let (answer, answers) = unbounded();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| answer.send(line))
        });
        Self { stdin: child.stdin.take(), child, answers, log: log.to_owned() }
    }

    /// What it says next.
    pub fn answer(&mut self) -> Value {
        let line = self.answers.recv_timeout(PATIENCE);
        let line = line
            .unwrap_or_else(|error| panic!("the subject says nothing: {error}\n{}", self.log()));
        serde_json::from_str(&line).unwrap()
    }

    pub fn tell(&mut self, command: &str) -> Value {
        writeln!(self.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.answer()
    }

    pub fn push(&mut self, decky: &str) {
        assert_eq!(self.tell(&format!("push {decky}")), "pushed");
    }

    pub fn tick(&mut self) {
        self.tell("tick");
    }

    pub fn stats(&mut self) -> Value {
        self.tell("stats")
    }

    /// Waits until the stats are as `done` wants them.
    pub fn until(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let stats = self.stats();
            if done(&stats) {
                return stats;
            }
            assert!(Instant::now() < end, "waited for {what}: {stats:#}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops it; how, and how long it took.
    pub fn stop(&mut self, grace: Duration) -> Value {
        self.tell(&format!("stop {}", grace.as_millis()))
    }

    pub fn signal(&self, name: &str) {
        let kill =
            Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(kill.success());
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(self.child.id())
    }

    /// How often its threads have gone to sleep by themselves, and so woken up.
    pub fn sleeps(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let statuses =
            tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let switches = statuses.map(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .unwrap();
            line.trim().parse::<u64>().unwrap()
        });
        switches.sum()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        let start = log.len().saturating_sub(5_000);
        String::from_utf8_lossy(&log.as_bytes()[start..]).into_owned()
    }

    pub fn log_lines(&self, part: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
    }
}

/// This program. Root runs it without root's right to open everything, so that a file's mode means something.
fn command() -> Command {
    let program = std::env::current_exe().unwrap();
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-dac_override,-dac_read_search"]).arg(program);
    command
}

impl Drop for Subject {
    fn drop(&mut self) {
        // The end of its stdin is its end; one that hangs is killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
