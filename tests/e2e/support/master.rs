//! The real master as a child process. `tests/e2e/master.py` runs in it and documents the commands.

use super::commands;
use super::python;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fs::{File, read_to_string};
use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tempfile::TempDir;

/// A start takes about 3 s, and longer on a busy machine. Python's imports take half of it.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// A command takes less than a second. Only a master that does not respond reaches this.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A master with its own CA and database. The process ends when this value is dropped, and when the
/// test process ends.
pub struct RealMaster {
    // Before the folder: fields are dropped in this order.
    process: Mutex<Option<Process>>,
    folder: TempDir,
    port: u16,
}

struct Process {
    child: Child,
    requests: ChildStdin,
    answers: Receiver<String>,
}

/// An enrolled host.
#[derive(Debug, Deserialize)]
pub struct Worker {
    pub uuid: String,
    /// SHA-256 of its certificate, in lowercase hex.
    pub fingerprint: String,
}

/// The topology that the master expects on a host.
#[derive(Debug, Deserialize)]
pub struct Topology {
    pub id: String,
    /// The hash that the host must report.
    pub hash: String,
    /// The master has requested that it is pushed again.
    pub needs_resync: bool,
}

/// A TLS handshake on the server's side.
#[derive(Debug, Deserialize)]
pub struct Handshake {
    pub client_port: u16,
    pub version: String,
    pub resumed: bool,
    /// The fingerprint of the client's certificate in this session.
    pub fingerprint: Option<String>,
}

/// The answer to a request, and the connection's client port.
#[derive(Debug, Deserialize)]
pub struct Answer {
    pub client_port: u16,
    pub path: String,
    /// `None`: the client closed the connection before.
    pub status: Option<u16>,
    pub user_agent: String,
}

impl RealMaster {
    pub fn start() -> RealMaster {
        let folder = tempfile::tempdir().unwrap();
        let (process, port) = Process::start(folder.path(), None);
        RealMaster { process: Mutex::new(Some(process)), folder, port }
    }

    /// The port on 127.0.0.1. It stays the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The CA certificate that every worker trusts.
    pub fn ca(&self) -> std::path::PathBuf {
        self.folder.path().join(".decnet/ca/ca.crt")
    }

    /// Enrols a host and writes its bundle into `agent_dir`.
    pub fn enrol(&self, name: &str, agent_dir: &Path) -> Worker {
        self.ask(json!({"do": "enrol", "name": name, "dir": agent_dir}))
    }

    /// Gives an enrolled host a new certificate. Its uuid stays the same, and the old certificate
    /// is no longer pinned.
    pub fn enrol_again(&self, uuid: &str, name: &str, agent_dir: &Path) -> Worker {
        self.ask(json!({"do": "enrol", "name": name, "dir": agent_dir, "uuid": uuid}))
    }

    /// Writes a bundle of the same CA whose certificate is pinned to no host. Returns its
    /// fingerprint.
    pub fn issue(&self, name: &str, agent_dir: &Path) -> String {
        let issued: Value = self.ask(json!({"do": "issue", "name": name, "dir": agent_dir}));
        text(&issued["fingerprint"])
    }

    /// Removes the host's row.
    pub fn decommission(&self, uuid: &str) {
        let existed: bool = self.ask(json!({"do": "decommission", "uuid": uuid}));
        assert!(existed, "no host {uuid}");
    }

    /// Adds a row of `decky_lifecycle` that is newer than all others, and returns its id. A row
    /// with the status `pending` or `running` is open.
    pub fn open_lifecycle(&self, decky: &str, operation: &str, uuid: &str, status: &str) -> String {
        self.ask(json!({
            "do": "open_lifecycle", "decky": decky, "operation": operation, "uuid": uuid, "status": status,
        }))
    }

    /// Adds an active topology for this host.
    pub fn add_topology(&self, uuid: &str) -> Topology {
        self.ask(json!({"do": "add_topology", "uuid": uuid}))
    }

    pub fn topology(&self, id: &str) -> Topology {
        self.ask(json!({"do": "topology", "id": id}))
    }

    /// Withdraws the request to push it again.
    pub fn clear_resync(&self, id: &str) {
        self.ask(json!({"do": "clear_resync", "id": id}))
    }

    /// The rows of a table that have all values of the object `filter`, oldest first, with all
    /// columns.
    pub fn rows(&self, table: &str, filter: Value) -> Vec<Value> {
        self.ask(json!({"do": "rows", "table": table, "where": filter}))
    }

    /// All successful TLS handshakes since the process started.
    pub fn handshakes(&self) -> Vec<Handshake> {
        self.ask(json!({"do": "handshakes"}))
    }

    /// Waits until the process has given `at_least` this many answers, and returns all. Panics
    /// after a timeout.
    pub fn answers(&self, at_least: usize) -> Vec<Answer> {
        self.ask(json!({"do": "answers", "at_least": at_least, "timeout": COMMAND_TIMEOUT.as_secs() / 2}))
    }

    /// Posts a body with the Python agent's TLS and the bundle in `agent_dir`. Returns the
    /// answer's status and body.
    pub fn post(&self, agent_dir: &Path, body: &str) -> (u16, String) {
        #[derive(Deserialize)]
        struct Response {
            status: u16,
            body: String,
        }
        let response: Response = self.ask(json!({"do": "post", "dir": agent_dir, "body": body}));
        (response.status, response.body)
    }

    /// The `status` of the Python agent for this state file and this Docker.
    pub fn executor_status(&self, state_file: &Path, docker_socket: &Path) -> Value {
        self.ask(json!({"do": "executor_status", "state_file": state_file, "docker_host": unix(docker_socket)}))
    }

    /// The `topology` of the Python agent for this `topology.db` and this Docker.
    pub fn topology_state(&self, db: &Path, docker_socket: &Path) -> Value {
        self.ask(json!({"do": "topology_state", "db": db, "docker_host": unix(docker_socket)}))
    }

    /// Writes `topology.db` as the Python agent does after it applied a topology and then failed
    /// with `error`.
    pub fn put_topology(&self, db: &Path, id: &str, hash: &str, error: Option<&str>) {
        self.ask(json!({"do": "put_topology", "db": db, "id": id, "hash": hash, "error": error}))
    }

    /// Shuts it down. Its connections are closed, and its port refuses new ones.
    pub fn stop(&self) {
        let mut process = self.process.lock().unwrap().take().expect("the master runs");
        writeln!(process.requests, "{}", json!({"do": "stop"})).unwrap();
        let status =
            commands::wait_for_exit(&mut process.child, COMMAND_TIMEOUT).expect("the master stops");
        assert!(status.success(), "the master stopped with {status}\n{}", self.log());
    }

    /// Kills it.
    pub fn kill(&self) {
        self.process.lock().unwrap().take().expect("the master runs");
    }

    /// Starts it again after `stop` or `kill`, with the same CA, database and port, and without TLS
    /// sessions.
    pub fn start_again(&self) {
        let mut process = self.process.lock().unwrap();
        assert!(process.is_none(), "the master runs already");
        *process = Some(Process::start(self.folder.path(), Some(self.port)).0);
    }

    /// The log of all its processes.
    pub fn log(&self) -> String {
        log(self.folder.path())
    }

    fn ask<T: DeserializeOwned>(&self, request: Value) -> T {
        let mut process = self.process.lock().unwrap();
        let process = process.as_mut().expect("the master runs");
        writeln!(process.requests, "{request}").unwrap();
        let answer = process.answer(COMMAND_TIMEOUT, self.folder.path());
        T::deserialize(&answer).unwrap_or_else(|error| panic!("{request}: {answer}: {error}"))
    }
}

impl Process {
    fn start(folder: &Path, port: Option<u16>) -> (Process, u16) {
        let log =
            File::options().create(true).append(true).open(folder.join("master.log")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/master.py");
        let mut child = Command::new(python())
            .arg(script)
            .arg(folder)
            .args(port.map(|port| port.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let requests = child.stdin.take().unwrap();
        let answers = commands::lines(child.stdout.take().unwrap());
        let mut process = Process { child, requests, answers };
        let ready = process.answer(START_TIMEOUT, folder);
        let port = ready["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap();
        (process, port)
    }

    fn answer(&mut self, timeout: Duration, folder: &Path) -> Value {
        let line = self.answers.recv_timeout(timeout).unwrap_or_else(|error| {
            panic!("no answer from the master ({error}); its log:\n{}", log(folder))
        });
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        match answer.get("error") {
            Some(error) => panic!("the master: {}", text(error)),
            None => answer["ok"].take(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log(folder: &Path) -> String {
    read_to_string(folder.join("master.log")).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}

fn unix(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}
