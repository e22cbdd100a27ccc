//! Docker's Engine API over its socket: two requests for each snapshot. Runs on the status thread.
//!
//! - Either request may fail by itself. A socket proxy may forbid one of them, and podman answers
//!   `/networks` with `null` if there is no network.
//! - The answer `null` is an error. If it counted as an empty list, the containers of all deckies
//!   would be reported as absent.
//! - Networks are requested first, so that the states of containers are as fresh as possible.
//! - An invalid entry (a state that is not a string, a name that is too long) affects only what
//!   depends on it: the decky of the container, or `observed` if it belongs to a topology.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::value::RawValue;
use ureq::Agent;
use ureq::config::{AutoHeaderValue, Config};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout};

use super::list::{BoundedVec, Object};
use crate::error::{http_problem, sanitize_path};
use crate::limits;
use crate::text::{counted, cut, sanitize};
use crate::transport::SocketTransport;

/// The containers and networks of Docker. Each error is text for people; it names the socket, the
/// request and the problem.
#[derive(Clone, Debug)]
pub(crate) struct DockerState {
    pub(crate) containers: Result<Containers, String>,
    pub(crate) networks: Result<Networks, String>,
}

/// All containers, including stopped ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Containers {
    /// The state of each container by its name. `None`: Docker's answer has no valid state.
    pub(crate) states: BTreeMap<String, Option<String>>,
    /// The containers that are left out because their names are too long: the first name,
    /// truncated, and their number.
    pub(crate) left_out: Option<(String, usize)>,
}

/// All bridge networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Networks {
    pub(crate) bridges: Vec<String>,
    /// As [`Containers::left_out`], or because the driver is not a string.
    pub(crate) left_out: Option<(String, usize)>,
}

impl DockerState {
    /// A description of the entries that were left out.
    pub(crate) fn left_out(&self) -> Option<String> {
        let describe = |left_out: &Option<(String, usize)>, one: &str, many: &str| {
            let (name, count) = left_out.as_ref()?;
            let entries = counted(*count, one, many);
            let name = sanitize(name);
            Some(format!("Docker: {entries} with an invalid name or driver left out: {name}"))
        };
        let containers = self.containers.as_ref().ok();
        let containers =
            containers.and_then(|it| describe(&it.left_out, "container", "containers"));
        let networks = self.networks.as_ref().ok();
        let networks = networks.and_then(|it| describe(&it.left_out, "network", "networks"));
        containers.into_iter().chain(networks).reduce(|some, more| format!("{some}; {more}"))
    }
}

impl Containers {
    /// The prefix of the names of topologies' containers.
    pub(crate) const OURS: &str = "decnet-";

    fn of(entries: Vec<Object<Container>>) -> Result<Self, String> {
        let mut containers = Self::default();
        for Object(Container { name, state }) in entries {
            match name {
                // It may be a container of any decky.
                Text::Invalid => return Err("a container without a valid name".to_owned()),
                Text::Cut(start) => {
                    if start.starts_with(Self::OURS) {
                        containers.states.insert(start.clone(), None);
                    }
                    count_in(&mut containers.left_out, start);
                }
                Text::Absent => (),
                Text::Whole(name) => drop(containers.states.insert(name, state.whole())),
            }
        }
        Ok(containers)
    }
}

impl Networks {
    /// The prefix of the names of topologies' networks.
    pub(crate) const OURS: &str = "decnet-topology-";

    fn of(entries: Vec<Object<Network>>) -> Result<Self, String> {
        let mut networks = Self::default();
        for Object(Network { name, driver }) in entries {
            let is_bridge = driver.whole().map(|driver| driver == "bridge");
            match (name, is_bridge) {
                (_, Some(false)) => (),
                (Text::Whole(name), Some(true)) => networks.bridges.push(name),
                (Text::Whole(name) | Text::Cut(name), _) if !name.starts_with(Self::OURS) => {
                    count_in(&mut networks.left_out, name);
                }
                (Text::Whole(name) | Text::Cut(name), _) => {
                    return Err(format!(
                        "the name or the driver of {} is not valid",
                        sanitize(&name)
                    ));
                }
                (Text::Invalid | Text::Absent, _) => {
                    return Err("a network without a valid name".to_owned());
                }
            }
        }
        Ok(networks)
    }
}

fn count_in(left_out: &mut Option<(String, usize)>, name: String) {
    left_out.get_or_insert((name, 0)).1 += 1;
}

/// A client for one socket. Its connection stays open between snapshots.
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

    /// A client with this connector.
    #[cfg(fuzzing)]
    pub(crate) fn behind(connector: impl Connector) -> Self {
        Self {
            agent: Agent::with_parts(config(), connector, NoResolver),
            socket: PathBuf::from("docker.sock"),
        }
    }

    /// Requests the networks, then the containers.
    pub(crate) fn query(&self) -> DockerState {
        let networks = self.get("/networks", limits::DOCKER_NETWORKS, Networks::of);
        let containers =
            self.get("/containers/json?all=true", limits::DOCKER_CONTAINERS, Containers::of);
        DockerState { containers, networks }
    }

    fn get<T: DeserializeOwned, A>(
        &self,
        what: &str,
        limit: Duration,
        read: impl Fn(Vec<Object<T>>) -> Result<A, String>,
    ) -> Result<A, String> {
        let failed = |problem: String| {
            format!("Docker at {}: {what}: {problem}", sanitize_path(&self.socket))
        };
        // The host name is not used, as the connector always opens the socket.
        let request = self
            .agent
            .get(format!("http://docker{what}"))
            .config()
            .timeout_global(Some(limit))
            .build();
        let mut answer = request.call().map_err(|error| failed(http_problem(&error)))?;
        let status = answer.status().as_u16();
        let mut body = answer.body_mut().as_reader().take(limits::DOCKER_ANSWER);
        if status != 200 {
            let mut text = Vec::new();
            let _ = body.take(limits::LOG_TEXT as u64).read_to_end(&mut text);
            return Err(failed(format!(
                "answered {status} {}",
                sanitize(&String::from_utf8_lossy(&text))
            )));
        }
        let list = serde_json::from_reader::<_, List<T>>(io::BufReader::new(&mut body)).map_err(
            |error| {
                let what =
                    if error.is_io() { "is incomplete" } else { "is not from a Docker Engine" };
                failed(match body.limit() {
                    0 => format!("the answer is larger than {} bytes", limits::DOCKER_ANSWER),
                    _ => format!("the answer {what}: {}", sanitize(&error.to_string())),
                })
            },
        )?;
        read(list.0)
            .map_err(|problem| failed(format!("the answer is not from a Docker Engine: {problem}")))
    }
}

type List<T> = BoundedVec<Object<T>, { limits::DOCKER_LIST }>;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    #[serde(default, rename = "Names", deserialize_with = "own_name")]
    name: Text,
    #[serde(default)]
    state: Text,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    #[serde(default)]
    name: Text,
    #[serde(default)]
    driver: Text,
}

/// A string in Docker's answer, or what is there instead.
#[derive(Debug, Default)]
enum Text {
    Whole(String),
    /// The start of a string that is too long.
    Cut(String),
    /// `null`, or an empty list of names.
    Absent,
    /// The key is missing, or the value is not a string.
    #[default]
    Invalid,
}

impl Text {
    fn whole(self) -> Option<String> {
        match self {
            Self::Whole(text) => Some(text),
            _ => None,
        }
    }

    fn of(text: String) -> Self {
        if text.len() <= limits::DOCKER_NAME {
            Self::Whole(text)
        } else {
            Self::Cut(cut(&text, limits::DOCKER_NAME / 4).to_owned())
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Raw first, so that a value of another type does not end the whole answer.
        let json = Box::<RawValue>::deserialize(deserializer)?;
        Ok(match serde_json::from_str::<Option<String>>(json.get()) {
            Ok(Some(text)) => Self::of(text),
            Ok(None) => Self::Absent,
            Err(_) => Self::Invalid,
        })
    }
}

type Names = BoundedVec<Text, { limits::DOCKER_LIST }>;

/// A container's own name. Names with a second slash are links from other containers. A container
/// that is being removed has no names.
fn own_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
    let json = Box::<RawValue>::deserialize(deserializer)?;
    let names = match serde_json::from_str::<Option<Names>>(json.get()) {
        Ok(names) => names.map_or_else(Vec::new, |names| names.0),
        Err(_) => return Ok(Text::Invalid),
    };
    let own = |name: &str| name.strip_prefix('/').unwrap_or(name).to_owned();
    Ok(names.into_iter().fold(Text::Absent, |found, name| match (found, name) {
        (known @ (Text::Whole(_) | Text::Cut(_)), _) => known,
        (found, Text::Whole(name) | Text::Cut(name)) if own(&name).contains('/') => found,
        (_, Text::Whole(name)) => Text::Whole(own(&name)),
        (_, Text::Cut(name)) => Text::Cut(own(&name)),
        (_, Text::Absent | Text::Invalid) => Text::Invalid,
    }))
}

fn config() -> Config {
    Config::builder()
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .accept_encoding(AutoHeaderValue::None)
        .timeout_global(Some(limits::DOCKER_CONTAINERS))
        .max_response_header_size(limits::ANSWER_HEADERS)
        .input_buffer_size(limits::HTTP_BUFFER)
        .output_buffer_size(1024)
        .max_idle_connections(1)
        .max_idle_age(limits::MAX_INTERVAL * 2)
        .build()
}

/// A resolver that returns no address, as the connector needs none.
#[derive(Debug)]
struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(
        &self,
        _: &ureq::http::Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// Connects to the Docker socket.
#[derive(Debug)]
struct UnixConnector {
    socket: PathBuf,
}

impl Connector for UnixConnector {
    type Out = SocketTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        SocketTransport::unix(&self.socket, details).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::Instant;

    use super::*;

    /// A client for a socket that answers each request with the next of these answers.
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
                    // An engine keeps its connections open, except after an incomplete answer.
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

    fn states(engine: &DockerState) -> Vec<(&str, Option<&str>)> {
        let containers = engine.containers.as_ref().unwrap();
        containers.states.iter().map(|(name, state)| (name.as_str(), state.as_deref())).collect()
    }

    /// The error for a Docker that answers both requests like this, without the socket's name.
    fn problems(answer: &str) -> [String; 2] {
        let (dir, docker) = answering(&[answer, answer]);
        let DockerState { containers, networks } = docker.query();
        [networks.unwrap_err(), containers.unwrap_err()]
            .map(|problem| problem.replace(&dir.path().display().to_string(), "DIR"))
    }

    #[test]
    fn requests_return_names_states_and_bridges() {
        let containers = r#"[{"Names":["/web/db","/db"],"State":"running","Other":{"x":[1]}},
            {"Names":["/cache"],"State":"exited"},{"Names":null,"State":"dead"},{"Names":[],"State":"dead"}]"#;
        let networks = r#"[{"Name":"b","Driver":"bridge"},{"Name":"h","Driver":"host"}]"#;
        let (_dir, docker) = answering(&[&ok(networks), &ok(containers)]);
        let engine = docker.query();
        assert_eq!(states(&engine), [("cache", Some("exited")), ("db", Some("running"))]);
        assert_eq!(
            (engine.networks.as_ref().unwrap().bridges.as_slice(), engine.left_out()),
            (&["b".to_owned()][..], None)
        );
    }

    #[test]
    fn chunked_answer_is_decoded() {
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[{\"\r\n21\r\nNames\":[\"/a\"],\"State\":\"running\"}]\r\n0\r\n\r\n";
        let (_dir, docker) = answering(&[&ok("[]"), chunked]);
        assert_eq!(states(&docker.query()), [("a", Some("running"))]);
    }

    #[test]
    fn client_reconnects_to_a_restarted_engine() {
        let (_dir, docker) = answering(&[
            &ok("[]"),
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[] ",
            &ok("[]"),
            &ok("[]"),
        ]);
        for _ in 0..2 {
            let DockerState { containers, networks } = docker.query();
            assert!(containers.is_ok() && networks.is_ok(), "{containers:?} {networks:?}");
        }
    }

    #[test]
    fn failed_request_does_not_affect_the_other_one() {
        let good_networks = ok(r#"[{"Name":"b","Driver":"bridge"}]"#);
        let good_containers = ok(r#"[{"Names":["/a"],"State":"running"}]"#);
        for bad in [
            "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden".to_owned(),
            "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n[]".to_owned(),
            ok("null"),
            ok("{}"),
            ok("[1]"),
            ok("[null]"),
            ok("[{}]"),
            ok(r#"[["b","bridge"]]"#),
            ok(r#"[[["/a"],"running"]]"#),
            ok(r#"[{"Name":7,"Names":7,"Driver":"bridge","State":"running"}]"#),
            ok(r#"[{"Names":[7],"State":"running"}]"#),
            ok(&format!("[{}]", vec!["{}"; limits::DOCKER_LIST + 1].join(","))),
            "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{\"Name\":\"b\",".to_owned(),
            String::new(),
        ] {
            let (_dir, docker) = answering(&[&bad, &good_containers]);
            let engine = docker.query();
            assert_eq!(states(&engine), [("a", Some("running"))], "{bad:.80}");
            assert!(engine.networks.unwrap_err().contains(": /networks: "), "{bad:.80}");
            let (_dir, docker) = answering(&[&good_networks, &bad]);
            let engine = docker.query();
            assert_eq!(engine.networks.unwrap().bridges, ["b"], "{bad:.80}");
            assert!(
                engine.containers.unwrap_err().contains(": /containers/json?all=true: "),
                "{bad:.80}"
            );
        }
    }

    #[test]
    fn blocked_request_for_networks_does_not_affect_the_containers() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            // The first connection stays open without an answer.
            let _blocked = listener.accept().unwrap();
            let mut second = listener.accept().unwrap().0;
            while second.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
                let _ = second.write_all(ok(r#"[{"Names":["/a"],"State":"running"}]"#).as_bytes());
            }
        });
        let since = Instant::now();
        let engine = Docker::new(socket).query();
        assert!(since.elapsed() < limits::DOCKER_CONTAINERS, "{:?}", since.elapsed());
        assert_eq!(states(&engine), [("a", Some("running"))]);
        assert!(engine.networks.unwrap_err().contains(": /networks: timeout: "));
        let both = limits::DOCKER_NETWORKS + limits::DOCKER_CONTAINERS + 2 * limits::TOPOLOGY_BUSY;
        assert!(both < limits::TICK_WAIT, "a tick's beat waits for the whole probe");
    }

    #[test]
    fn invalid_answer_is_an_error_and_not_an_empty_list() {
        for (answer, problem) in [
            ("HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nno\u{1b}\n", "answered 500 no\\u{1b}"),
            // Truncated in the middle of a character.
            (
                "HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nno \u{202e}",
                "answered 500 no \u{fffd}",
            ),
            (
                &ok("<html>"),
                "the answer is not from a Docker Engine: expected value at line 1 column 1",
            ),
            (
                &ok(r#"{"message":"x"}"#),
                "the answer is not from a Docker Engine: invalid type: map, expected a list of at most 25000 at line 1 column 1",
            ),
            (
                &ok("null"),
                "the answer is not from a Docker Engine: invalid type: null, expected a list of at most 25000 at line 1 column 4",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n[{\"Names\":[\"/a\"],",
                "the answer is incomplete: Peer disconnected at line 1 column 17",
            ),
            ("SSH-2.0-OpenSSH_9.2p1\r\n", "protocol: http parse fail: invalid HTTP version"),
        ] {
            let expected = ["/networks", "/containers/json?all=true"];
            let expected =
                expected.map(|what| format!("Docker at DIR/docker.sock: {what}: {problem}"));
            assert_eq!(problems(answer), expected, "{answer}");
        }
    }

    #[test]
    fn invalid_container_affects_only_its_own_state() {
        let long = "x".repeat(limits::DOCKER_NAME + 1);
        let invalid = [
            r#"{"Names":["/no-state"]}"#.to_owned(),
            r#"{"Names":["/null"],"State":null}"#.to_owned(),
            r#"{"Names":["/number"],"State":{"Status":"running"}}"#.to_owned(),
            format!(r#"{{"Names":["/long-state"],"State":"{long}"}}"#),
            format!(r#"{{"Names":["/{long}"],"State":"running"}}"#),
        ];
        let containers =
            format!(r#"[{},{{"Names":[7,"/a"],"State":"running"}}]"#, invalid.join(","));
        let (_dir, docker) = answering(&[&ok("[]"), &ok(&containers)]);
        let engine = docker.query();
        let unknown = ["long-state", "no-state", "null", "number"].map(|name| (name, None));
        assert_eq!(states(&engine), [&[("a", Some("running"))][..], &unknown[..]].concat());
        let left_out = engine.left_out().unwrap();
        assert!(
            left_out.starts_with("Docker: 1 container with an invalid name")
                && left_out.len() < 200,
            "{left_out}"
        );
    }

    #[test]
    fn invalid_network_is_left_out_unless_it_belongs_to_a_topology() {
        let long = "x".repeat(limits::DOCKER_NAME);
        let networks =
            |invalid: &str| ok(&format!(r#"[{invalid},{{"Name":"b","Driver":"bridge"}}]"#));
        for invalid in [
            format!(r#"{{"Name":"x{long}","Driver":"bridge"}}"#),
            r#"{"Name":"other"}"#.to_owned(),
            r#"{"Name":"other","Driver":1}"#.to_owned(),
        ] {
            let (_dir, docker) = answering(&[&networks(&invalid), &ok("[]")]);
            let engine = docker.query();
            assert_eq!(engine.networks.as_ref().unwrap().bridges, ["b"], "{invalid}");
            assert!(
                engine.left_out().unwrap().starts_with("Docker: 1 network with an invalid name"),
                "{invalid}"
            );
        }
        for invalid in [
            format!(r#"{{"Name":"decnet-topology-{long}","Driver":"bridge"}}"#),
            r#"{"Name":"decnet-topology-dmz"}"#.to_owned(),
            r#"{"Name":null,"Driver":"bridge"}"#.to_owned(),
        ] {
            let (_dir, docker) = answering(&[&networks(&invalid), &ok("[]")]);
            assert!(docker.query().networks.is_err(), "{invalid}");
        }
        let (_dir, docker) =
            answering(&[&networks(&format!(r#"{{"Name":"x{long}","Driver":"host"}}"#)), &ok("[]")]);
        assert_eq!(docker.query().left_out(), None, "it is not a bridge");
    }

    #[test]
    fn file_that_is_not_a_socket_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let DockerState { containers, networks } = Docker::new(path).query();
        for error in [containers.unwrap_err(), networks.unwrap_err()] {
            assert!(error.ends_with("Connection refused (os error 111)"), "{error}");
        }
    }
}
