//! Docker's Engine API over its socket: two requests a snapshot, whatever the number of containers. Runs on the
//! status thread.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::config::{AutoHeaderValue, Config};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout};

use super::list::AtMost;
use crate::error::{http_problem, printable_path};
use crate::limits;
use crate::socket::SocketTransport;
use crate::text::printable;

/// What Docker has, read in two requests.
#[derive(Debug)]
pub(crate) struct Engine {
    /// Every container's state by its name, stopped ones too.
    pub(crate) containers: BTreeMap<String, String>,
    /// The names of all bridge networks.
    pub(crate) bridges: Vec<String>,
}

impl Engine {
    fn texts(&self) -> impl Iterator<Item = &String> {
        self.containers.iter().flat_map(|(name, state)| [name, state]).chain(&self.bridges)
    }
}

/// A client for one socket. It keeps its connection between snapshots.
#[derive(Debug)]
pub(crate) struct Docker {
    socket: PathBuf,
    agent: Agent,
}

impl Docker {
    pub(crate) fn new(socket: PathBuf) -> Self {
        let connector = UnixConnector { socket: socket.clone() };
        Self { agent: Agent::with_parts(config(), connector, NoResolver), socket }
    }

    /// What answers behind this connector.
    #[cfg(fuzzing)]
    pub(crate) fn behind(connector: impl Connector) -> Self {
        Self { agent: Agent::with_parts(config(), connector, NoResolver), socket: PathBuf::from("docker.sock") }
    }

    /// The error is for people: it names the socket, the request and what went wrong.
    pub(crate) fn engine(&self) -> Result<Engine, String> {
        let containers: List<Container> = self.get("/containers/json?all=true")?;
        let networks: List<Network> = self.get("/networks")?;
        let containers = containers.0.into_iter().filter_map(Container::into_entry).collect();
        let bridges = networks.0.into_iter().filter(|network| network.driver == "bridge").map(|it| it.name);
        let engine = Engine { containers, bridges: bridges.collect() };
        if engine.texts().any(|text| text.len() > limits::DOCKER_NAME) {
            let socket = printable_path(&self.socket);
            return Err(format!("Docker at {socket}: a name or a state is longer than {} bytes", limits::DOCKER_NAME));
        }
        Ok(engine)
    }

    fn get<T: DeserializeOwned>(&self, what: &str) -> Result<T, String> {
        let failed = |problem: String| format!("Docker at {}: {what}: {problem}", printable_path(&self.socket));
        // The host is a formality: the connector knows only the socket.
        let mut answer =
            self.agent.get(format!("http://docker{what}")).call().map_err(|error| failed(http_problem(&error)))?;
        let status = answer.status().as_u16();
        let mut body = answer.body_mut().as_reader().take(limits::DOCKER_ANSWER);
        if status != 200 {
            let mut said = Vec::new();
            let _ = body.take(limits::LOG_TEXT as u64).read_to_end(&mut said);
            return Err(failed(format!("answered {status} {}", printable(&String::from_utf8_lossy(&said)))));
        }
        serde_json::from_reader(io::BufReader::new(&mut body)).map_err(|error| {
            let what = if error.is_io() { "broke off" } else { "is not a Docker Engine's" };
            failed(match body.limit() {
                0 => format!("the answer is larger than {} bytes", limits::DOCKER_ANSWER),
                _ => format!("the answer {what}: {}", printable(&error.to_string())),
            })
        })
    }
}

type List<T> = AtMost<T, { limits::DOCKER_LIST }>;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    names: Option<Vec<String>>,
    state: String,
}

impl Container {
    /// Its own name and state. Other names of it have a second slash: they are links from other containers.
    fn into_entry(self) -> Option<(String, String)> {
        let own = self.names?.into_iter().find_map(|name| {
            let name = name.strip_prefix('/').unwrap_or(&name);
            (!name.contains('/')).then(|| name.to_owned())
        })?;
        Some((own, self.state))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    name: String,
    driver: String,
}

fn config() -> Config {
    Config::builder()
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .accept_encoding(AutoHeaderValue::None)
        .timeout_global(Some(limits::DOCKER))
        .max_response_header_size(limits::ANSWER_HEADERS)
        .input_buffer_size(limits::HTTP_BUFFER)
        .output_buffer_size(1024)
        .max_idle_connections(1)
        .max_idle_age(limits::MAX_INTERVAL * 2)
        .build()
}

/// There is nothing to resolve.
#[derive(Debug)]
struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(&self, _: &ureq::http::Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// Connects to the one socket.
#[derive(Debug)]
struct UnixConnector {
    socket: PathBuf,
}

impl Connector for UnixConnector {
    type Out = SocketTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        SocketTransport::unix(&self.socket, details).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A socket that answers each request with the next of these, on one connection after another.
    fn answering(answers: &[&str]) -> (tempfile::TempDir, Docker) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let answers: Vec<String> = answers.iter().map(|answer| (*answer).to_owned()).collect();
        thread::spawn(move || {
            let mut answers = answers.into_iter().peekable();
            while answers.peek().is_some() {
                let (mut stream, _) = listener.accept().unwrap();
                while stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
                    let Some(answer) = answers.next() else { return };
                    stream.write_all(answer.as_bytes()).unwrap();
                    // An engine keeps its connections, unless it breaks off.
                    if !answer.ends_with(']') {
                        break;
                    }
                }
            }
        });
        (dir, Docker::new(socket))
    }

    fn ok(json: &str) -> String {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{json}", json.len())
    }

    /// What is said of a Docker that answers like this, without the socket's name.
    fn problem(answers: &[&str]) -> String {
        let (dir, docker) = answering(answers);
        docker.engine().unwrap_err().replace(&dir.path().display().to_string(), "DIR")
    }

    #[test]
    fn one_request_each_tells_names_states_and_bridges() {
        let containers = r#"[{"Names":["/web/db","/db"],"State":"running","Other":{"x":[1]}},
            {"Names":["/cache"],"State":"exited"},{"Names":null,"State":"dead"}]"#;
        let networks = r#"[{"Name":"b","Driver":"bridge"},{"Name":"h","Driver":"host"}]"#;
        let (_dir, docker) = answering(&[&ok(containers), &ok(networks)]);
        let engine = docker.engine().unwrap();
        let found: Vec<_> = engine.containers.iter().map(|(name, state)| (name.as_str(), state.as_str())).collect();
        assert_eq!(found, [("cache", "exited"), ("db", "running")]);
        assert_eq!(engine.bridges, ["b"]);
    }

    #[test]
    fn a_chunked_answer_is_understood() {
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[{\"\r\n21\r\nNames\":[\"/a\"],\"State\":\"running\"}]\r\n0\r\n\r\n";
        let (_dir, docker) = answering(&[chunked, &ok("[]")]);
        assert_eq!(docker.engine().unwrap().containers["a"], "running");
    }

    #[test]
    fn a_restarted_engine_is_connected_to_anew() {
        let (_dir, docker) =
            answering(&[&ok("[]"), "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[] ", &ok("[]"), &ok("[]")]);
        docker.engine().unwrap();
        docker.engine().unwrap();
    }

    #[test]
    fn nonsense_is_said_and_never_taken_for_an_engine_without_containers() {
        let what = "Docker at DIR/docker.sock: /containers/json?all=true";
        for (answer, said) in [
            ("HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nno\u{1b}\n", "answered 500 no\\u{1b}"),
            // Cut in the middle of a character.
            ("HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nno \u{202e}", "answered 500 no \u{fffd}"),
            (&ok("<html>"), "the answer is not a Docker Engine's: expected value at line 1 column 1"),
            (
                &ok(r#"{"message":"x"}"#),
                "the answer is not a Docker Engine's: invalid type: map, expected a sequence of at most 25000 at line 1 column 1",
            ),
            (
                &ok(r#"[{"Names":["/a"]}]"#),
                "the answer is not a Docker Engine's: missing field `State` at line 1 column 17",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{\"Names\":[\"/a\"],",
                "the answer broke off: Peer disconnected at line 1 column 17",
            ),
            ("SSH-2.0-OpenSSH_9.2p1\r\n", "protocol: http parse fail: invalid HTTP version"),
        ] {
            assert_eq!(problem(&[answer]), format!("{what}: {said}"), "{answer}");
        }
    }

    #[test]
    fn a_name_that_is_no_name_is_said() {
        let long = "x".repeat(limits::DOCKER_NAME + 1);
        let container = |name: &str, state: &str| ok(&format!(r#"[{{"Names":["/{name}"],"State":"{state}"}}]"#));
        let network = ok(&format!(r#"[{{"Name":"{long}","Driver":"bridge"}}]"#));
        for answers in [[container(&long, "running"), ok("[]")], [container("a", &long), ok("[]")], [ok("[]"), network]]
        {
            let said = problem(&answers.each_ref().map(String::as_str));
            assert_eq!(said, "Docker at DIR/docker.sock: a name or a state is longer than 255 bytes");
        }
    }

    #[test]
    fn what_is_no_socket_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let error = Docker::new(path).engine().unwrap_err();
        assert!(error.ends_with("Connection refused (os error 111)"), "{error}");
    }
}
