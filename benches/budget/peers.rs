//! Two heartbeats in processes of their own, which read commands from stdin: the Python module that
//! this crate replaces, and an agent that embeds this crate.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use decnet_heartbeat::{DecnetStatus, Enrolment, Heartbeat, LifecycleDelta, Operation};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::process::{Killed, status_kb};
use crate::support::{self, RealMaster};

/// What a command cost.
#[derive(Serialize, Deserialize)]
pub struct Took {
    /// Seconds.
    pub wall: f64,
    /// Seconds of all threads.
    pub cpu: f64,
    pub resident_kb: f64,
    failures: Vec<String>,
}

/// The configuration of a heartbeat.
#[derive(Serialize, Deserialize)]
pub struct Setup {
    pub uuid: String,
    pub port: u16,
    pub agent_dir: String,
    pub state_file: String,
    pub docker_socket: String,
}

impl Setup {
    /// Enrols a host with this name at the real master.
    pub fn new(
        master: &RealMaster,
        name: &str,
        agent_dir: &Path,
        state_file: &Path,
        docker_socket: &Path,
    ) -> Self {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        Self {
            uuid: master.enrol(name, agent_dir).uuid,
            port: master.port(),
            agent_dir: text(agent_dir),
            state_file: text(state_file),
            docker_socket: text(docker_socket),
        }
    }
}

/// One of the two processes.
pub struct Peer {
    _process: Killed,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts this bench as a process that runs [`run_agent`].
    pub fn ours(setup: &Setup) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("--agent").arg(serde_json::to_string(setup).unwrap());
        Self::start(&mut command)
    }

    /// Starts `tests/e2e/heartbeat_peer.py`.
    pub fn python(setup: &Setup) -> Self {
        let mut command = Command::new(support::python());
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/heartbeat_peer.py"))
            .arg(&setup.state_file);
        command.current_dir(&setup.agent_dir).env("HOME", &setup.agent_dir);
        command.env("DECNET_TESTING", "1").env("DECNET_CONFIG", "/nowhere/decnet.ini");
        command.env("DECNET_JWT_SECRET", "j".repeat(40)).env("DECNET_BUS_ENABLED", "false");
        command.env("DECNET_HOST_UUID", &setup.uuid).env("DECNET_MASTER_HOST", "127.0.0.1");
        command
            .env("DECNET_SWARMCTL_PORT", setup.port.to_string())
            .env("DECNET_AGENT_DIR", &setup.agent_dir);
        command.env("DOCKER_HOST", format!("unix://{}", setup.docker_socket));
        Self::start(&mut command)
    }

    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { _process: Killed(child), stdin, stdout }
    }

    /// Sends the command `beat` or `push`, and waits for its end.
    pub fn command(&mut self, what: &str) -> Took {
        writeln!(self.stdin, "{what}").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        let took: Took =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{what}: {error}: {line:?}"));
        assert!(took.failures.is_empty(), "{what}: {:?}", took.failures);
        took
    }
}

/// The agent, which executes the commands from its stdin.
pub fn run_agent(setup: &str) {
    let setup: Setup = serde_json::from_str(setup).unwrap();
    let enrolment = Enrolment::new(&setup.uuid, "127.0.0.1", &setup.agent_dir).unwrap();
    let enrolment = enrolment.with_master_port(setup.port).unwrap();
    let source = DecnetStatus::new(Path::new(&setup.agent_dir));
    let source = source.state_file(&setup.state_file).docker_socket(&setup.docker_socket);
    let (tick, ticks) = unbounded();
    let builder = Heartbeat::builder().enrolment(enrolment).status_source(source).ticks(ticks);
    let heartbeat = builder.start().unwrap();
    let beats = heartbeat.beats();
    beats.recv().unwrap();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        while beats.try_recv().is_ok() {}
        let wall = Instant::now();
        let cpu = cpu_time();
        match line.as_str() {
            "beat" => tick.send(Instant::now()).unwrap(),
            _ => heartbeat
                .deltas()
                .push(LifecycleDelta::succeeded("decky-1", Operation::Deploy))
                .unwrap(),
        }
        beats.recv().unwrap();
        let wall = wall.elapsed().as_secs_f64();
        // Work that continues after the answer counts, too.
        thread::sleep(Duration::from_millis(5));
        let took = Took {
            wall,
            cpu: (cpu_time() - cpu).as_secs_f64(),
            resident_kb: status_kb(std::process::id(), "VmRSS:"),
            failures: heartbeat.stats().failure.map(|failure| failure.class).into_iter().collect(),
        };
        println!("{}", serde_json::to_string(&took).unwrap());
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}
