//! The real master as a child process. `tests/e2e/master.py` is the other half: what each command does is said there.

use super::process;
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

/// Starting takes about 3 s, half of it Python's imports; a busy machine gets a multiple.
const START: Duration = Duration::from_secs(90);
/// No command takes a second. Generous, as a test fails here only if the master hangs.
const COMMAND: Duration = Duration::from_secs(60);

/// A master with a CA and a database of its own. The process ends with this value, and with the test process.
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

/// What the master expects a host to run.
#[derive(Debug, Deserialize)]
pub struct Topology {
    pub id: String,
    /// The hash that the master wants to hear from the host.
    pub hash: String,
    /// The master has ordered that it be pushed again.
    pub needs_resync: bool,
}

/// A TLS connection, as the server saw it.
#[derive(Debug, Deserialize)]
pub struct Handshake {
    pub client_port: u16,
    pub version: String,
    pub resumed: bool,
    /// Of the certificate that the client presented, now or in the session that it resumed.
    pub fingerprint: Option<String>,
}

/// A request that the master has answered, and on which connection.
#[derive(Debug, Deserialize)]
pub struct Answer {
    pub client_port: u16,
    pub path: String,
    /// `None`: the client went away before.
    pub status: Option<u16>,
    pub user_agent: String,
}

impl RealMaster {
    pub fn start() -> RealMaster {
        let folder = tempfile::tempdir().unwrap();
        let (process, port) = Process::start(folder.path(), None);
        RealMaster { process: Mutex::new(Some(process)), folder, port }
    }

    /// On 127.0.0.1; the same for life, through stops and starts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate that every worker trusts.
    pub fn ca(&self) -> std::path::PathBuf {
        self.folder.path().join(".decnet/ca/ca.crt")
    }

    /// Enrols a host and writes its bundle into `agent_dir`.
    pub fn enrol(&self, name: &str, agent_dir: &Path) -> Worker {
        self.ask(json!({"do": "enrol", "name": name, "dir": agent_dir}))
    }

    /// Gives an enrolled host a new certificate: its uuid stays, and the old certificate is no longer pinned.
    pub fn enrol_again(&self, uuid: &str, name: &str, agent_dir: &Path) -> Worker {
        self.ask(json!({"do": "enrol", "name": name, "dir": agent_dir, "uuid": uuid}))
    }

    /// Writes a bundle that the same CA has issued, and that no host is pinned to; gives its fingerprint.
    pub fn issue(&self, name: &str, agent_dir: &Path) -> String {
        let issued: Value = self.ask(json!({"do": "issue", "name": name, "dir": agent_dir}));
        text(&issued["fingerprint"])
    }

    /// Removes the host's row.
    pub fn decommission(&self, uuid: &str) {
        let was_there: bool = self.ask(json!({"do": "decommission", "uuid": uuid}));
        assert!(was_there, "no host {uuid}");
    }

    /// Adds a row of `decky_lifecycle`, newer than all before, and gives its id. Open: `pending` or `running`.
    pub fn open_lifecycle(&self, decky: &str, operation: &str, uuid: &str, status: &str) -> String {
        self.ask(json!({
            "do": "open_lifecycle", "decky": decky, "operation": operation, "uuid": uuid, "status": status,
        }))
    }

    /// Adds an active topology that this host is expected to run.
    pub fn add_topology(&self, uuid: &str) -> Topology {
        self.ask(json!({"do": "add_topology", "uuid": uuid}))
    }

    pub fn topology(&self, id: &str) -> Topology {
        self.ask(json!({"do": "topology", "id": id}))
    }

    /// Takes the order to push it again back.
    pub fn clear_resync(&self, id: &str) {
        self.ask(json!({"do": "clear_resync", "id": id}))
    }

    /// Rows of a table, oldest first, with all the columns: those that have each of the values of the object `filter`.
    pub fn rows(&self, table: &str, filter: Value) -> Vec<Value> {
        self.ask(json!({"do": "rows", "table": table, "where": filter}))
    }

    /// Every TLS handshake that has succeeded since the process started.
    pub fn handshakes(&self) -> Vec<Handshake> {
        self.ask(json!({"do": "handshakes"}))
    }

    /// Every answer since the process started: waits until there are `at_least` so many, and panics if they don't come.
    pub fn answers(&self, at_least: usize) -> Vec<Answer> {
        self.ask(json!({"do": "answers", "at_least": at_least, "timeout": COMMAND.as_secs() / 2}))
    }

    /// Posts a body as the original agent would, with the bundle in `agent_dir`; gives the status and the body.
    pub fn post(&self, agent_dir: &Path, body: &str) -> (u16, String) {
        #[derive(Deserialize)]
        struct Response {
            status: u16,
            body: String,
        }
        let response: Response = self.ask(json!({"do": "post", "dir": agent_dir, "body": body}));
        (response.status, response.body)
    }

    /// What the original agent would send as `status`, from this state file and this Docker.
    pub fn executor_status(&self, state_file: &Path, docker_socket: &Path) -> Value {
        self.ask(json!({"do": "executor_status", "state_file": state_file, "docker_host": unix(docker_socket)}))
    }

    /// What the original agent would send as `topology`, from this `topology.db` and this Docker.
    pub fn topology_state(&self, db: &Path, docker_socket: &Path) -> Value {
        self.ask(json!({"do": "topology_state", "db": db, "docker_host": unix(docker_socket)}))
    }

    /// Writes `topology.db` as the original agent does when it has applied a topology, and then failed with `error`.
    pub fn put_topology(&self, db: &Path, id: &str, hash: &str, error: Option<&str>) {
        self.ask(json!({"do": "put_topology", "db": db, "id": id, "hash": hash, "error": error}))
    }

    /// Shuts it down in good order: connections are closed, the port refuses.
    pub fn stop(&self) {
        let mut process = self.process.lock().unwrap().take().expect("the master runs");
        writeln!(process.requests, "{}", json!({"do": "stop"})).unwrap();
        let status =
            process::end(&mut process.child, COMMAND).expect("the master stops when told to");
        assert!(status.success(), "the master stopped with {status}\n{}", self.log());
    }

    /// Ends it as a power cut would.
    pub fn kill(&self) {
        self.process.lock().unwrap().take().expect("the master runs");
    }

    /// Starts it again after `stop` or `kill`: the same CA, database and port, and a TLS that knows no session.
    pub fn start_again(&self) {
        let mut process = self.process.lock().unwrap();
        assert!(process.is_none(), "the master runs already");
        *process = Some(Process::start(self.folder.path(), Some(self.port)).0);
    }

    /// What it has logged, over all its starts.
    pub fn log(&self) -> String {
        log(self.folder.path())
    }

    fn ask<T: DeserializeOwned>(&self, request: Value) -> T {
        let mut process = self.process.lock().unwrap();
        let process = process.as_mut().expect("the master runs");
        writeln!(process.requests, "{request}").unwrap();
        let answer = process.answer(COMMAND, self.folder.path());
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
        let answers = process::lines(child.stdout.take().unwrap());
        let mut process = Process { child, requests, answers };
        let ready = process.answer(START, folder);
        let port = ready["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap();
        (process, port)
    }

    fn answer(&mut self, patience: Duration, folder: &Path) -> Value {
        let line = self.answers.recv_timeout(patience).unwrap_or_else(|error| {
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
