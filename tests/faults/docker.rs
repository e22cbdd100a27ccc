//! Docker's socket, and faults in its place.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

use crate::agent::Source;
use crate::fault_case::{Expect, Fault, FaultCase};
use crate::test_bed::Scenario;

/// What is at the socket's path, and how it answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DockerMode {
    /// An Engine with one container of the state file's decky, and one network.
    Works,
    Absent,
    RegularFile,
    /// No user may connect.
    NoPermission,
    /// Connections are not accepted, and the backlog is full.
    FullBacklog,
    NeverAnswers,
    /// It sends this and closes the connection.
    Answers(&'static str),
    /// It answers with this many containers.
    Containers(usize),
    /// It answers with this many bytes, all in one container.
    Bytes(usize),
    /// Names and states contain control characters.
    HostileNames,
    /// It sends this for the request for networks, and works for the other one.
    AnswersNetworks(&'static str),
    /// It does not answer the request for networks, and works for the other one.
    NeverAnswersNetworks,
    /// It sends this for the request for containers, and works for the other one.
    AnswersContainers(&'static str),
}

/// A Docker Engine as far as the heartbeat uses one. Each change of its mode replaces the socket,
/// as a restart of Docker does.
pub struct FakeDocker {
    socket: PathBuf,
    mode: Arc<Mutex<DockerMode>>,
    /// Connections, which are closed at the next change; and the ones that fill a backlog.
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl FakeDocker {
    pub fn start(socket: &Path) -> Self {
        let mode = Arc::new(Mutex::new(DockerMode::Absent));
        let docker = Self { socket: socket.to_owned(), mode, open: Arc::default() };
        docker.set_mode(DockerMode::Works);
        docker
    }

    pub fn set_mode(&self, mode: DockerMode) {
        *self.mode.lock().unwrap() = mode;
        let _ = std::fs::remove_file(&self.socket);
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        match mode {
            DockerMode::Absent => (),
            DockerMode::RegularFile => std::fs::write(&self.socket, "no socket").unwrap(),
            DockerMode::FullBacklog => self.fill_backlog(),
            DockerMode::NoPermission => {
                self.serve();
                std::fs::set_permissions(&self.socket, Permissions::from_mode(0o000)).unwrap();
            }
            _ => self.serve(),
        }
    }

    fn fill_backlog(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let connection = UnixStream::connect(&self.socket).unwrap();
        // The listener is kept open as if it were a connection.
        let listener = UnixStream::from(OwnedFd::from(listener));
        self.open.lock().unwrap().extend([connection, listener]);
    }

    fn serve(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let mode = Arc::clone(&self.mode);
        let open = Arc::clone(&self.open);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mode = Arc::clone(&mode);
                open.lock().unwrap().push(stream.try_clone().unwrap());
                thread::spawn(move || answer_requests(stream, &mode));
            }
        });
    }
}

/// Answers one request after another in the mode at that time. Returns when the connection is
/// closed.
fn answer_requests(mut stream: UnixStream, mode: &Mutex<DockerMode>) {
    let mut request = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut request) {
        let is_for_networks = request[..count].starts_with(b"GET /networks");
        let mode = *mode.lock().unwrap();
        let sent = match mode {
            DockerMode::NeverAnswers => Ok(()),
            DockerMode::NeverAnswersNetworks if is_for_networks => Ok(()),
            DockerMode::Answers(bytes) => {
                let _ = stream.write_all(bytes.as_bytes());
                return;
            }
            DockerMode::AnswersNetworks(bytes) if is_for_networks => {
                stream.write_all(bytes.as_bytes())
            }
            DockerMode::AnswersContainers(bytes) if !is_for_networks => {
                stream.write_all(bytes.as_bytes())
            }
            _ if is_for_networks => send(&mut stream, r#"[{"Name":"bridge","Driver":"bridge"}]"#),
            DockerMode::Containers(count) => {
                send(&mut stream, &format!("[{}]", vec![CONTAINER; count].join(",")))
            }
            DockerMode::Bytes(size) => send_bytes(&mut stream, size),
            DockerMode::HostileNames => send(&mut stream, HOSTILE),
            _ => send(&mut stream, &format!("[{CONTAINER}]")),
        };
        if sent.is_err() {
            return;
        }
    }
}

fn send(stream: &mut UnixStream, json: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{json}", json.len())
}

fn send_bytes(stream: &mut UnixStream, size: usize) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n[{{\"Id\":\"")?;
    (0..size / 1_000).try_for_each(|_| stream.write_all(&[b'x'; 1_000]))
}

/// About as large as a real one.
const CONTAINER: &str = r#"{"Id":"8a9f0c3b7d","Names":["/d1-ssh"],"Image":"decnet/ssh","Labels":{"a":"b","c":"d"},
    "State":"running","Status":"Up 3 hours","HostConfig":{"NetworkMode":"none"},"NetworkSettings":{"Networks":{}},
    "Mounts":[{"Type":"bind","Source":"/a","Destination":"/b","Mode":"","RW":true,"Propagation":"rprivate"}],
    "Ports":[{"IP":"0.0.0.0","PrivatePort":22,"PublicPort":2222,"Type":"tcp"}]}"#;

const HOSTILE: &str = r#"[{"Names":["/decnet-\"'$(reboot)\n\u001b]0;owned\u0007\u202e"],"State":"running"},
    {"Names":["/d1-ssh"],"State":"\u001b[2Jrunning\n"}]"#;

const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden";

const NULL: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull";

/// A container of the decky, and another one without a state.
const OTHER_WITHOUT_STATE: &str = concat!(
    "HTTP/1.1 200 OK\r\nContent-Length: 65\r\n\r\n",
    r#"[{"Names":["/d1-ssh"],"State":"running"},{"Names":["/x"],"Id":1}]"#
);

/// A container of the decky without a state.
const OWN_WITHOUT_STATE: &str = concat!(
    "HTTP/1.1 200 OK\r\nContent-Length: 36\r\n\r\n",
    r#"[{"Names":["/d1-ssh"],"State":null}]"#
);

const HTML: &str = "HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>no engine</html>";

const TRUNCATED: &str =
    "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{\"Names\":[\"/d1-ssh\"],\"Sta";

const ERROR_500: &str = "HTTP/1.1 500 Oops\r\nContent-Length: 12\r\n\r\nno\u{1b}[31m\nway\u{202e}";

pub fn cases() -> Vec<FaultCase> {
    let case = |name: &str, mode, expect| {
        let scenario =
            Scenario { source: Source::Decnet, growth: 40 * 1024, ..Scenario::default() };
        FaultCase::new(format!("docker/{name}"), Fault::Docker(mode), expect).in_scenario(scenario)
    };
    let error = |name, mode, errors| case(name, mode, Expect::StatusError(errors));
    let running = |name, mode| {
        case(name, mode, Expect::Field("/status/runtime/d1/services/ssh", json!("running")))
    };
    let answers = DockerMode::Answers;
    let networks = DockerMode::AnswersNetworks;
    let containers = DockerMode::AnswersContainers;
    vec![
        error("absent", DockerMode::Absent, &["No such file or directory"]),
        error("regular_file", DockerMode::RegularFile, &["Connection refused"]),
        error("no_permission", DockerMode::NoPermission, &["Permission denied"]),
        error("full_backlog", DockerMode::FullBacklog, &["timeout: "]),
        error("no_answer", DockerMode::NeverAnswers, &["timeout: "]),
        error("truncated_answer", answers(TRUNCATED), &["the answer is incomplete"]),
        error("status_500", answers(ERROR_500), &["answered 500 no\\u{1b}[31m\\u{a}way"]),
        error("html", answers(HTML), &["the answer is not from a Docker Engine"]),
        // On a busy machine a debug build may not reach the limit within its eight seconds.
        error(
            "answer_of_100_mb",
            DockerMode::Bytes(100_000_000),
            &["the answer is larger than 33554432 bytes", "timeout: "],
        ),
        error("60000_containers", DockerMode::Containers(60_000), &["a list of more than 25000"]),
        running("10000_containers", DockerMode::Containers(10_000)),
        running("networks_403", networks(FORBIDDEN)),
        case(
            "networks_403_is_logged",
            networks(FORBIDDEN),
            Expect::Warns("/networks: answered 403 Forbidden"),
        ),
        running("networks_null", networks(NULL)),
        running("networks_truncated", networks(TRUNCATED)),
        running("networks_without_answer", DockerMode::NeverAnswersNetworks),
        error("containers_403", containers(FORBIDDEN), &["answered 403 Forbidden"]),
        error("containers_null", containers(NULL), &["invalid type: null"]),
        running("container_of_no_decky_without_state", containers(OTHER_WITHOUT_STATE)),
        error(
            "container_of_decky_without_state",
            containers(OWN_WITHOUT_STATE),
            &["no usable state of"],
        ),
        case(
            "hostile_names",
            DockerMode::HostileNames,
            Expect::Field("/status/runtime/d1/running", json!(false)),
        ),
    ]
}
