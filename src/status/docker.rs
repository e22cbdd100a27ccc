//! Docker's Engine API over its socket: two requests a snapshot, whatever the number of containers. Runs on the
//! status thread.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::config::{AutoHeaderValue, Config};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, ShutdownHandle, Transport, time,
};

use crate::error::chain;
use crate::limits;
use crate::text::printable;

/// What Docker has, read in two requests.
#[derive(Debug)]
pub(crate) struct Engine {
    /// Every container's state by its name, stopped ones too.
    pub(crate) containers: BTreeMap<String, String>,
    /// The names of all bridge networks.
    pub(crate) bridges: Vec<String>,
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

    /// The error is for people: it names the socket, the request and what went wrong.
    pub(crate) fn engine(&self) -> Result<Engine, String> {
        let containers: Vec<Container> = self.get("/containers/json?all=true")?;
        let networks: Vec<Network> = self.get("/networks")?;
        let containers = containers.into_iter().filter_map(Container::into_entry).collect();
        let bridges = networks.into_iter().filter(|network| network.driver == "bridge").map(|it| it.name).collect();
        Ok(Engine { containers, bridges })
    }

    fn get<T: DeserializeOwned>(&self, what: &str) -> Result<T, String> {
        let failed = |problem: String| format!("Docker at {}: {what}: {problem}", self.socket.display());
        // The host is a formality: the connector knows only the socket.
        let mut answer = self.agent.get(format!("http://docker{what}")).call().map_err(|e| failed(explain(&e)))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().as_reader().take(limits::DOCKER_ANSWER);
        if status != 200 {
            let mut said = String::new();
            let _ = body.take(limits::LOG_TEXT as u64).read_to_string(&mut said);
            return Err(failed(format!("answered {status} {}", printable(&said))));
        }
        serde_json::from_reader(io::BufReader::new(body))
            .map_err(|error| failed(format!("not the JSON of a Docker Engine: {}", printable(&error.to_string()))))
    }
}

fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => printable(&error.to_string()),
        error => chain(error),
    }
}

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
    type Out = UnixTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        let stream = Arc::new(Socket(UnixStream::connect(&self.socket)?));
        let handle: Weak<Socket> = Arc::downgrade(&stream);
        (details.register_shutdown)(handle)?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(UnixTransport { stream, buffers }))
    }
}

struct Socket(UnixStream);

impl ShutdownHandle for Socket {
    fn shutdown(&self) {
        // An error means that it is closed already.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// HTTP over a Unix socket, after ureq's own TCP transport.
struct UnixTransport {
    stream: Arc<Socket>,
    buffers: LazyBuffers,
}

impl Transport for UnixTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        let mut stream = &self.stream.0;
        stream.set_write_timeout(left(timeout)?)?;
        stream.write_all(self.buffers.output().get(..amount).unwrap_or_default()).map_err(|e| timed_out(e, timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let mut stream = &self.stream.0;
        stream.set_read_timeout(left(timeout)?)?;
        let amount = stream.read(self.buffers.input_append_buf()).map_err(|e| timed_out(e, timeout))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        let mut stream = &self.stream.0;
        let waiting = stream.set_nonblocking(true).and_then(|()| stream.read(&mut [0]));
        let silent = waiting.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        silent && stream.set_nonblocking(false).is_ok()
    }
}

/// What is left of the budget. A socket takes no timeout of zero.
fn left(timeout: NextTimeout) -> Result<Option<Duration>, ureq::Error> {
    match timeout.after {
        time::Duration::Exact(left) if left.is_zero() => Err(ureq::Error::Timeout(timeout.reason)),
        time::Duration::Exact(left) => Ok(Some(left)),
        time::Duration::NotHappening => Ok(None),
    }
}

fn timed_out(error: io::Error, timeout: NextTimeout) -> ureq::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ureq::Error::Timeout(timeout.reason),
        _ => error.into(),
    }
}

impl fmt::Debug for UnixTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixTransport").finish_non_exhaustive()
    }
}
