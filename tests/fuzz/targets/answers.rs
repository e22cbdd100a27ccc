//! HTTP answers of the master and of Docker with any content.

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use serde::de::IgnoredAny;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};

use super::{SEPARATOR, assert_sanitized, parts};
use crate::limits;
use crate::master::resolver::MasterResolver;
use crate::master::tls::SharedConnections;
use crate::master::{MasterClient, Verdict, parse_retry_after};
use crate::status::docker::{Docker, DockerState};
use crate::transport::SocketTransport;

/// Posts a beat to a master that sends these pieces, which are separated by NUL. If there are
/// several, the last one is repeated without end.
pub fn master(input: &[u8]) {
    let mut pieces: VecDeque<_> =
        input.split(|byte| *byte == SEPARATOR).map(<[u8]>::to_vec).collect();
    let repeated =
        if pieces.len() > 1 { pieces.pop_back().unwrap_or_default() } else { Vec::new() };
    let answer = [pieces.make_contiguous().concat(), repeated.repeat(2)].concat();
    let connector =
        InMemory { pieces, repeated, read: Arc::default(), connections: Default::default() };
    let read = Arc::clone(&connector.read);
    let connections = connector.connections.clone();
    let url = "https://127.0.0.1/swarm/heartbeat".to_owned();
    let resolver = MasterResolver::new("127.0.0.1", 1);
    let master = MasterClient::with_connector(connector, connections, url, resolver);
    let result = master.post(b"{}", limits::POST);
    assert_sanitized(&result.detail);
    assert_sanitized(&result.class);
    assert!(read.load(Ordering::Relaxed) <= MAX_READ, "{read:?} bytes of one answer");
    assert_eq!(result.class.starts_with("http-"), result.verdict != Verdict::NoResponse);
    match result.verdict {
        Verdict::Accepted => assert!(has_status(&answer, b"2") && result.detail.is_empty()),
        Verdict::RetryLater(Some(wait)) => assert_wait(wait),
        _ => (),
    }
}

/// Whether any part of it could be a status line whose status begins with this.
fn has_status(answer: &[u8], status: &[u8]) -> bool {
    answer
        .windows(9 + status.len())
        .any(|head| head.starts_with(b"HTTP/1.") && head.ends_with(&[b" ", status].concat()))
}

/// Parses a `Retry-After`.
pub fn retry_after(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // 6 November 1994, the date of RFC 9110's examples; and the earliest and the latest date.
    for now in
        [784_111_777, 0, 253_402_300_799].map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds))
    {
        if let Some(wait) = parse_retry_after(text, now) {
            assert_wait(wait);
        }
    }
}

fn assert_wait(wait: Duration) {
    let (min, max) = limits::RETRY_AFTER;
    assert!((min..=max).contains(&wait), "{wait:?}");
}

/// Queries a Docker whose two answers have these bodies, which are separated by NUL.
pub fn docker_json(input: &[u8]) {
    let answers: [&[u8]; 2] = parts(input);
    let ok = |json: &[u8]| {
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", json.len()).as_bytes(), json]
            .concat()
    };
    let valid = query(answers.map(ok));
    for (json, is_valid) in answers.into_iter().zip(valid) {
        // With an empty list every decky would be reported as degraded.
        assert!(is_array(json) || !is_valid, "an answer that is not a list was accepted");
    }
}

/// Queries a Docker that sends the first part on the first connection, and the part after a NUL on
/// the second.
pub fn docker_http(input: &[u8]) {
    let answers: [&[u8]; 2] = parts(input);
    // The rest of a connection that stays open is read for the second request.
    if query(answers.map(<[u8]>::to_vec)).contains(&true) {
        assert!(
            answers.into_iter().any(|answer| has_status(answer, b"200") && answer.contains(&b'['))
        );
    }
}

fn is_array(json: &[u8]) -> bool {
    serde_json::from_slice::<Vec<IgnoredAny>>(json).is_ok()
}

/// Whether these answers are valid: the first one about networks, and the second about containers.
fn query(answers: [Vec<u8>; 2]) -> [bool; 2] {
    let connector = Prepared { answers: Mutex::new(answers.into()), peers: Mutex::default() };
    let engine = Docker::behind(connector).query();
    engine.left_out().iter().for_each(|left_out| assert_sanitized(left_out));
    let DockerState { containers, networks } = engine;
    [networks.as_ref().err(), containers.as_ref().err()]
        .into_iter()
        .flatten()
        .for_each(|it| assert_sanitized(it));
    let is_own = |name: &String| !name.contains('/') && name.len() <= limits::DOCKER_NAME;
    assert!(
        containers.iter().all(|it| it.states.keys().all(is_own)),
        "the name of a link was read as a name of the container"
    );
    [networks.is_ok(), containers.is_ok()]
}

/// The maximum number of bytes that are read of one answer: its limit, and one buffer until that is
/// noticed.
const MAX_READ: usize = limits::ANSWER + limits::HTTP_BUFFER;

/// Connects to a master in memory.
#[derive(Debug)]
struct InMemory {
    pieces: VecDeque<Vec<u8>>,
    repeated: Vec<u8>,
    /// The number of bytes that were read.
    read: Arc<AtomicUsize>,
    connections: SharedConnections,
}

impl Connector for InMemory {
    type Out = InMemoryTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let buffers = LazyBuffers::new(
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        let pieces = self.pieces.clone();
        let read = Arc::clone(&self.read);
        // Single bytes would take seconds.
        let count = limits::HTTP_BUFFER / 4 / self.repeated.len().max(1) + 1;
        let repeated = self.repeated.repeat(count);
        Ok(Some(InMemoryTransport {
            buffers,
            pieces,
            repeated,
            read,
            connections: self.connections.clone(),
        }))
    }
}

#[derive(Debug)]
struct InMemoryTransport {
    buffers: LazyBuffers,
    /// The pieces before the repeated one that are not sent yet.
    pieces: VecDeque<Vec<u8>>,
    repeated: Vec<u8>,
    /// The number of bytes that were read.
    read: Arc<AtomicUsize>,
    connections: SharedConnections,
}

impl Transport for InMemoryTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, _: usize, _: NextTimeout) -> Result<(), ureq::Error> {
        Ok(())
    }

    fn await_input(&mut self, _: NextTimeout) -> Result<bool, ureq::Error> {
        let mut piece = self.pieces.pop_front().unwrap_or_else(|| self.repeated.clone());
        let input = self.buffers.input_append_buf();
        let amount = piece.len().min(input.len());
        input[..amount].copy_from_slice(&piece[..amount]);
        if amount < piece.len() {
            piece.drain(..amount);
            self.pieces.push_front(piece);
        }
        self.read.fetch_add(amount, Ordering::Relaxed);
        self.connections.update(|seen| seen.exchange.answer.add(&input[..amount]))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        false
    }

    fn is_tls(&self) -> bool {
        true
    }
}

/// Connects to a Docker whose answers are sent before the requests.
#[derive(Debug)]
struct Prepared {
    answers: Mutex<VecDeque<Vec<u8>>>,
    /// The other ends. If they were closed too early, the answers would be lost.
    peers: Mutex<Vec<UnixStream>>,
}

impl Connector for Prepared {
    type Out = SocketTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let (ours, mut peer) = UnixStream::pair()?;
        peer.write_all(&self.answers.lock().unwrap().pop_front().unwrap_or_default())?;
        peer.shutdown(Shutdown::Write)?;
        self.peers.lock().unwrap().push(peer);
        SocketTransport::over(OwnedFd::from(ours).into(), details).map(Some)
    }
}
