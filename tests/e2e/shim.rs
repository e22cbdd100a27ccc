//! DECNET's own agent with the module that `shim` prints, against the real master. `tests/e2e/agent.py` runs the agent.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{EnrolledHost, commands, python};

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");
/// Most of it is Python's imports.
const START: Duration = Duration::from_secs(90);
const TIMEOUT: Duration = Duration::from_secs(30);

/// The agent of a worker. It ends with its test.
struct Agent<'a> {
    host: &'a EnrolledHost,
    folder: tempfile::TempDir,
    child: Child,
    lines: Receiver<String>,
    port: String,
}

impl<'a> Agent<'a> {
    fn start(host: &'a EnrolledHost) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let module = commands::run(Command::new(PROGRAM).arg("shim"));
        fs::create_dir(folder.path().join("shim")).unwrap();
        fs::write(folder.path().join("shim/sitecustomize.py"), module).unwrap();
        commands::run(Command::new("mkfifo").arg(folder.path().join("outcome")));
        let mut child = command(host, &folder).spawn().unwrap();
        let lines = commands::lines(child.stdout.take().unwrap());
        let port = lines.recv_timeout(START).expect("the agent starts");
        Self { host, folder, child, lines, port }
    }

    fn post(&self, path: &str, body: &Value) {
        let body = body.to_string();
        let length = body.len();
        let mut connection = TcpStream::connect(format!("127.0.0.1:{}", self.port)).unwrap();
        write!(
            connection,
            "POST {path} HTTP/1.1\r\nhost: agent\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    }

    /// Opens a row and orders a mutate, which fails because nothing is deployed.
    fn mutate(&self, decky: &str) -> String {
        let row = self.open(decky, "mutate");
        self.post_mutate(decky);
        row
    }

    fn post_mutate(&self, decky: &str) {
        self.post("/mutate", &json!({"decky_id": decky, "services": ["ssh"]}));
    }

    /// Opens rows and orders a deploy. Returns when the deploy has begun.
    fn deploy(&self, deckies: [&str; 2]) -> [String; 2] {
        let rows = deckies.map(|decky| self.open(decky, "deploy"));
        let deckies = deckies.map(|name| {
            json!({
                "name": name, "ip": "10.9.0.2", "services": ["ssh"], "distro": "debian",
                "base_image": "debian:12", "hostname": name,
            })
        });
        let config = json!({
            "mode": "unihost", "interface": "lo", "subnet": "10.9.0.0/24", "gateway": "10.9.0.1",
            "deckies": deckies,
        });
        self.post("/deploy", &json!({"config": config}));
        assert_eq!(self.lines.recv_timeout(TIMEOUT).as_deref(), Ok("deploying"));
        rows
    }

    /// Ends the deploy with an error, or without one.
    fn end_deploy(&self, problem: &str) {
        let mut fifo =
            File::options().write(true).open(self.folder.path().join("outcome")).unwrap();
        fifo.write_all(problem.as_bytes()).unwrap();
    }

    fn open(&self, decky: &str, operation: &str) -> String {
        self.host.master.open_lifecycle(decky, operation, &self.host.worker.uuid, "running")
    }

    /// The pid of the program that the agent has started. Waits until it is not `other`.
    fn pipe(&self, other: Option<u32>) -> u32 {
        let find = format!("pgrep -P {} -f 'heartbeat pipe$' || true", self.child.id());
        for _ in 0..3_000 {
            let found = commands::run(Command::new("sh").args(["-c", &find]));
            if let Some(pid) = found.lines().find_map(|pid| pid.parse().ok())
                && Some(pid) != other
            {
                return pid;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the agent has not started the program: {}", self.log());
    }

    /// Waits until the row is closed. Returns its status and its error.
    fn closed(&self, row: &str) -> Value {
        loop {
            let answers = self.host.master.answers(0).len();
            let found = self.host.lifecycle_row(row);
            if found["completed_at"].is_string() {
                return json!([found["status"], found["error"]]);
            }
            self.host.master.answers(answers + 1);
        }
    }

    /// Every request that the master has received is the program's.
    fn assert_beats_are_of_the_program(&self) {
        let beats = self.host.master.answers(1);
        for beat in beats {
            let ours = concat!("decnet-heartbeat/", env!("CARGO_PKG_VERSION"));
            assert_eq!((beat.path.as_str(), beat.user_agent.as_str()), ("/swarm/heartbeat", ours));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the agent's log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(host: &EnrolledHost, folder: &tempfile::TempDir) -> Command {
    let at = |name: &str| folder.path().join(name);
    let mut command = Command::new(python());
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/agent.py"))
        .arg(folder.path())
        .current_dir(folder.path())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", folder.path())
        .env("PYTHONPATH", at("shim"))
        .env("DECNET_HEARTBEAT_PROGRAM", PROGRAM)
        .env("DECNET_CONFIG", at("no-decnet.ini"))
        .env("DECNET_HOST_UUID", &host.worker.uuid)
        .env("DECNET_MASTER_HOST", "127.0.0.1")
        .env("DECNET_SWARMCTL_PORT", host.master.port().to_string())
        .env("DECNET_AGENT_DIR", host.agent_dir())
        .env("DECNET_TESTING", "1")
        .env("DECNET_JWT_SECRET", "j".repeat(40))
        .env("DECNET_ADMIN_PASSWORD", "p".repeat(40))
        .env("DECNET_BUS_ENABLED", "false")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(at("log")).unwrap());
    command
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_mutate_of_the_agent_closes_its_row_with_the_agents_error() {
    let host = EnrolledHost::new();
    let agent = Agent::start(&host);
    let row = agent.mutate("decky-01");
    let expected = json!(["failed", "no active deployment on this worker"]);
    assert_eq!(agent.closed(&row), expected);
    let rows = agent.deploy(["decky-01", "decky-02"]);
    agent.end_deploy("");
    for row in rows {
        assert_eq!(agent.closed(&row), json!(["succeeded", null]));
    }
    agent.assert_beats_are_of_the_program();
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn an_outcome_during_an_outage_closes_its_row_afterwards() {
    let host = EnrolledHost::new();
    let agent = Agent::start(&host);
    host.master.answers(1);
    let rows = agent.deploy(["decky-01", "decky-02"]);
    let mutate = agent.open("decky-03", "mutate");
    let pipe = agent.pipe(None);
    host.master.stop();
    agent.end_deploy("no such image");
    agent.post_mutate("decky-03");
    host.master.start_again();
    let expected = json!(["failed", "no active deployment on this worker"]);
    assert_eq!(agent.closed(&mutate), expected);
    for row in rows {
        assert_eq!(agent.closed(&row), json!(["failed", "RuntimeError: no such image"]));
    }
    assert_eq!(agent.pipe(None), pipe);
    agent.assert_beats_are_of_the_program();
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_deploy_of_an_agent_that_is_killed_fails_with_a_reason() {
    for (signal, is_for_pipe_too) in [("KILL", false), ("TERM", false), ("TERM", true)] {
        let host = EnrolledHost::new();
        let agent = Agent::start(&host);
        let rows = agent.deploy(["decky-01", "decky-02"]);
        // As a supervisor does that stops a group of processes.
        if is_for_pipe_too {
            commands::signal(signal, agent.pipe(None));
        }
        commands::signal(signal, agent.child.id());
        for row in rows {
            assert_eq!(agent.closed(&row), json!(["failed", "the agent ended during deploy"]));
        }
        agent.assert_beats_are_of_the_program();
    }
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_killed_pipe_is_restarted_and_nothing_is_lost() {
    let host = EnrolledHost::new();
    let agent = Agent::start(&host);
    let rows = agent.deploy(["decky-01", "decky-02"]);
    let pipe = agent.pipe(None);
    commands::signal("KILL", pipe);
    let mutate = agent.mutate("decky-03");
    assert_ne!(agent.pipe(Some(pipe)), pipe);
    let expected = json!(["failed", "no active deployment on this worker"]);
    assert_eq!(agent.closed(&mutate), expected);
    // Longer than the operations of dead processes are left in flight.
    std::thread::sleep(Duration::from_secs(6));
    agent.end_deploy("");
    for row in rows {
        assert_eq!(agent.closed(&row), json!(["succeeded", null]));
    }
    agent.assert_beats_are_of_the_program();
}
