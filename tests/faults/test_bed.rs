//! A master, a TCP proxy before it, an enrolled worker with its files and its Docker socket, and
//! the process under test.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use decnet_heartbeat::loopback::{Enrolled, LoopbackMaster, Options};
use serde_json::Value;

use crate::agent::{AgentSettings, Logger, Source};
use crate::agent_process::AgentProcess;
use crate::docker::FakeDocker;
use crate::files::{FileReplacer, StateFile, TopologyFile};
use crate::support::deckies;
use crate::tcp_proxy::TcpProxy;

/// Longer than any row waits. A row that reaches it fails.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How late a busy machine may be.
pub const SLACK: Duration = Duration::from_secs(3);

/// The settings of a row before its fault.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    pub interval: Duration,
    pub source: Source,
    /// What causes beats, besides deltas.
    pub ticks: Ticks,
    /// How much the process may grow, in KiB.
    pub growth: u64,
    pub logger: Logger,
}

/// Where ticks come from.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Ticks {
    /// The test sends them.
    FromTest,
    /// The heartbeat's own timer.
    FromTimer,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            source: Source::OfSize(100),
            ticks: Ticks::FromTest,
            growth: 6 * 1024,
            logger: Logger::Stderr,
        }
    }
}

pub struct TestBed {
    pub scenario: Scenario,
    /// The thread that replaces the state file. Fields are dropped in their order, so it ends
    /// before its folder is removed.
    pub replacer: Option<FileReplacer>,
    pub dir: tempfile::TempDir,
    pub master: LoopbackMaster,
    pub proxy: TcpProxy,
    pub worker: Enrolled,
    pub docker: FakeDocker,
    /// The name, content and mode of each file, as the enrolment wrote them.
    bundle: [(&'static str, String, u32); 3],
    /// A connection that keeps `topology.db` locked.
    pub lock: Option<rusqlite::Connection>,
}

impl TestBed {
    pub fn new(scenario: Scenario) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The master does not close idle connections; only faults close them.
        let options = Options { idle: TIMEOUT * 2, ..Options::default() };
        let master = LoopbackMaster::start_with(options).unwrap();
        let proxy = TcpProxy::start(master.address());
        let mut worker = master.enrol(&dir.path().join("agent")).unwrap();
        worker.port = proxy.port();
        worker.write_ini(&dir.path().join("decnet.ini")).unwrap();
        let replacer = StateFile::GOOD.put(&dir.path().join("state.json"));
        TopologyFile::Good.put(&worker.agent_dir.join("topology.db"));
        let docker = FakeDocker::start(&dir.path().join("docker.sock"));
        let bundle = [("ca.crt", 0o644), ("worker.crt", 0o644), ("worker.key", 0o600)].map(
            |(name, mode)| (name, fs::read_to_string(worker.agent_dir.join(name)).unwrap(), mode),
        );
        Self { scenario, replacer, dir, master, proxy, worker, docker, bundle, lock: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn agent_file(&self, name: &str) -> PathBuf {
        self.worker.agent_dir.join(name)
    }

    pub fn settings(&self) -> AgentSettings {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        AgentSettings {
            ini: text(self.path("decnet.ini")),
            state_file: text(self.path("state.json")),
            docker_socket: text(self.path("docker.sock")),
            interval: self.scenario.interval,
            source: self.scenario.source,
            ticks: self.scenario.ticks,
            logger: self.scenario.logger,
        }
    }

    /// Starts the process under test with these environment variables. Its first reply is not read
    /// yet.
    pub fn spawn(&self, variables: &[(&str, &str)]) -> AgentProcess {
        AgentProcess::spawn(&self.settings(), &self.path("log"), variables)
    }

    /// Writes the bundle as the enrolment wrote it.
    pub fn write_bundle(&self) {
        for (name, content, mode) in &self.bundle {
            fs::write(self.agent_file(name), content).unwrap();
            fs::set_permissions(self.agent_file(name), Permissions::from_mode(*mode)).unwrap();
        }
    }

    /// Starts the process under test and waits for its first beat.
    pub fn start(&self) -> AgentProcess {
        let mut agent = self.spawn(&[]);
        assert_eq!(agent.read_reply(), "started");
        agent.wait_for("the first beat", |stats| stats["beats"].as_u64() >= Some(1));
        agent
    }

    /// The deckies of the deltas in requests whose status satisfies the condition, sorted and
    /// without duplicates.
    pub fn deckies_in(&self, has_status: impl Fn(Option<u16>) -> bool) -> Vec<String> {
        let received = self.master.received();
        let requests = received.iter().filter(|request| has_status(request.status));
        let mut names: Vec<_> = requests.flat_map(deckies).collect();
        names.sort();
        names.dedup();
        names
    }

    /// The JSON of the last request.
    pub fn last_body(&self) -> Value {
        self.master.received().last().and_then(|request| request.json.clone()).unwrap_or_default()
    }
}
