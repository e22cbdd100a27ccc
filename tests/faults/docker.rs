//! Docker's socket, and what may be at its place.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::row::{Fault, Right, Row};
use crate::stage::World;
use crate::subject::Source;

/// What answers at the socket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Docker {
    /// An Engine with one container of the stage's decky, and one that is none of ours.
    Works,
    Absent,
    IsAFile,
    /// Nobody may connect.
    IsForbidden,
    /// Connections are never accepted, and there is no room for one more.
    IsFull,
    NeverReplies,
    /// This, and the connection is closed.
    Says(&'static str),
    /// So many containers.
    Has(usize),
    /// An answer of so many bytes, all of one container.
    Pours(usize),
    /// Names that are meant for a terminal.
    IsHostile,
    /// The request for networks is answered with this, and the other one as ever.
    SaysOfNetworks(&'static str),
    /// The request for networks is never answered.
    HangsForNetworks,
    /// The request for containers is answered with this, and the other one as ever.
    SaysOfContainers(&'static str),
}

/// The socket. It is another one after each change, as after a restart of Docker.
pub struct Engine {
    socket: PathBuf,
    docker: Arc<Mutex<Docker>>,
    /// Connections, which end with the Engine; and what keeps a full socket full.
    held: Arc<Mutex<Vec<UnixStream>>>,
}

impl Engine {
    pub fn start(socket: &Path) -> Self {
        let docker = Arc::new(Mutex::new(Docker::Absent));
        let engine = Self { socket: socket.to_owned(), docker, held: Arc::default() };
        engine.set(Docker::Works);
        engine
    }

    pub fn set(&self, docker: Docker) {
        *self.docker.lock().unwrap() = docker;
        let _ = std::fs::remove_file(&self.socket);
        for stream in self.held.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        match docker {
            Docker::Absent => (),
            Docker::IsAFile => std::fs::write(&self.socket, "no socket").unwrap(),
            Docker::IsFull => self.fill(),
            Docker::IsForbidden => {
                self.serve();
                std::fs::set_permissions(&self.socket, Permissions::from_mode(0o000)).unwrap();
            }
            _ => self.serve(),
        }
    }

    fn fill(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let first = UnixStream::connect(&self.socket).unwrap();
        self.held
            .lock()
            .unwrap()
            .extend([first, UnixStream::from(std::os::fd::OwnedFd::from(listener))]);
    }

    fn serve(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (docker, held) = (Arc::clone(&self.docker), Arc::clone(&self.held));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let docker = Arc::clone(&docker);
                held.lock().unwrap().push(stream.try_clone().unwrap());
                thread::spawn(move || answer_all(stream, &docker));
            }
        });
    }
}

/// Answers one request after another, as the Engine is at that time.
fn answer_all(mut stream: UnixStream, docker: &Mutex<Docker>) {
    let mut request = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut request) {
        let asks_for_networks = request[..count].starts_with(b"GET /networks");
        let docker = *docker.lock().unwrap();
        let done = match docker {
            Docker::NeverReplies => {
                thread::sleep(Duration::from_secs(120));
                return;
            }
            Docker::Says(bytes) => {
                let _ = stream.write_all(bytes.as_bytes());
                return;
            }
            Docker::SaysOfNetworks(bytes) if asks_for_networks => {
                stream.write_all(bytes.as_bytes())
            }
            Docker::SaysOfContainers(bytes) if !asks_for_networks => {
                stream.write_all(bytes.as_bytes())
            }
            Docker::HangsForNetworks if asks_for_networks => {
                thread::sleep(Duration::from_secs(120));
                return;
            }
            _ if asks_for_networks => send(&mut stream, r#"[{"Name":"bridge","Driver":"bridge"}]"#),
            Docker::Has(count) => {
                send(&mut stream, &format!("[{}]", vec![CONTAINER; count].join(",")))
            }
            Docker::Pours(size) => pour(&mut stream, size),
            Docker::IsHostile => send(&mut stream, HOSTILE),
            _ => send(&mut stream, &format!("[{CONTAINER}]")),
        };
        if done.is_err() {
            return;
        }
    }
}

fn send(stream: &mut UnixStream, json: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{json}", json.len())
}

fn pour(stream: &mut UnixStream, size: usize) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n[{{\"Id\":\"")?;
    (0..size / 1_000).try_for_each(|_| stream.write_all(&[b'x'; 1_000]))
}

/// About what a real one takes.
const CONTAINER: &str = r#"{"Id":"8a9f0c3b7d","Names":["/d1-ssh"],"Image":"decnet/ssh","Labels":{"a":"b","c":"d"},
    "State":"running","Status":"Up 3 hours","HostConfig":{"NetworkMode":"none"},"NetworkSettings":{"Networks":{}},
    "Mounts":[{"Type":"bind","Source":"/a","Destination":"/b","Mode":"","RW":true,"Propagation":"rprivate"}],
    "Ports":[{"IP":"0.0.0.0","PrivatePort":22,"PublicPort":2222,"Type":"tcp"}]}"#;

const HOSTILE: &str = r#"[{"Names":["/decnet-\"'$(reboot)\n\u001b]0;owned\u0007\u202e"],"State":"running"},
    {"Names":["/d1-ssh"],"State":"\u001b[2Jrunning\n"}]"#;

const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden";

const NULL: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull";

/// One of ours, and somebody else's, which has no state.
const ODD_ONE_OF_OTHERS: &str = concat!(
    "HTTP/1.1 200 OK\r\nContent-Length: 65\r\n\r\n",
    r#"[{"Names":["/d1-ssh"],"State":"running"},{"Names":["/x"],"Id":1}]"#
);

/// One of ours, without a state.
const ODD_ONE_OF_OURS: &str = concat!(
    "HTTP/1.1 200 OK\r\nContent-Length: 36\r\n\r\n",
    r#"[{"Names":["/d1-ssh"],"State":null}]"#
);

pub fn rows() -> Vec<Row> {
    let row = |name: &str, docker, right| {
        let world = World { source: Source::Decnet, growth: 40 * 1024, ..World::default() };
        Row::new(format!("docker/{name}"), Fault::Docker(docker), right).with(world)
    };
    let running = || Right::Tells("/status/runtime/d1/services/ssh", json!("running"));
    let html = "HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>no engine</html>";
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{\"Names\":[\"/d1-ssh\"],\"Sta";
    let oops = "HTTP/1.1 500 Oops\r\nContent-Length: 12\r\n\r\nno\u{1b}[31m\nway\u{202e}";
    vec![
        row("absent", Docker::Absent, Right::Says("No such file or directory")),
        row("not_a_socket", Docker::IsAFile, Right::Says("Connection refused")),
        row("without_permission", Docker::IsForbidden, Right::Says("Permission denied")),
        row("full", Docker::IsFull, Right::Says("timeout: ")),
        row("never_replies", Docker::NeverReplies, Right::Says("timeout: ")),
        row("half_a_reply", Docker::Says(half), Right::Says("the answer is incomplete")),
        row("500", Docker::Says(oops), Right::Says("answered 500 no\\u{1b}[31m\\u{a}way")),
        row("html", Docker::Says(html), Right::Says("the answer is not from a Docker Engine")),
        // A debug build on a busy machine may be too slow to come to the cap in its eight seconds.
        row(
            "of_100_mb",
            Docker::Pours(100_000_000),
            Right::Says("the answer is larger than 33554432 bytes|timeout: "),
        ),
        row("of_60000_containers", Docker::Has(60_000), Right::Says("a list of more than 25000")),
        row("of_10000_containers", Docker::Has(10_000), running()),
        row("networks_403", Docker::SaysOfNetworks(FORBIDDEN), running()),
        row(
            "networks_403_is_said",
            Docker::SaysOfNetworks(FORBIDDEN),
            Right::Warns("/networks: answered 403 Forbidden"),
        ),
        row("networks_null", Docker::SaysOfNetworks(NULL), running()),
        row("networks_half_a_reply", Docker::SaysOfNetworks(half), running()),
        row("networks_never_reply", Docker::HangsForNetworks, running()),
        row(
            "containers_403",
            Docker::SaysOfContainers(FORBIDDEN),
            Right::Says("answered 403 Forbidden"),
        ),
        row("containers_null", Docker::SaysOfContainers(NULL), Right::Says("invalid type: null")),
        row("an_odd_container_of_others", Docker::SaysOfContainers(ODD_ONE_OF_OTHERS), running()),
        row(
            "an_odd_container_of_ours",
            Docker::SaysOfContainers(ODD_ONE_OF_OURS),
            Right::Says("no usable state of"),
        ),
        row(
            "hostile_names",
            Docker::IsHostile,
            Right::Tells("/status/runtime/d1/running", json!(false)),
        ),
    ]
}
