//! What comes back over HTTP: the master's answers and Docker's, whatever they are.

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

use super::{SEPARATOR, assert_sayable, parts};
use crate::limits;
use crate::master::resolver::MasterResolver;
use crate::master::tls::SharedConnections;
use crate::master::{MasterClient, Verdict, parse_retry_after};
use crate::status::docker::{Docker, DockerState};
use crate::transport::SocketTransport;

/// Posts a beat to a master that says this, in pieces with a NUL between each two. The last of several it says again and
/// again, without end.
pub fn master(input: &[u8]) {
    let mut pieces: VecDeque<_> =
        input.split(|byte| *byte == SEPARATOR).map(<[u8]>::to_vec).collect();
    let forever = if pieces.len() > 1 { pieces.pop_back().unwrap_or_default() } else { Vec::new() };
    let said = [pieces.make_contiguous().concat(), forever.repeat(2)].concat();
    let connector =
        InMemory { pieces, forever, taken: Arc::default(), connections: Default::default() };
    let (taken, connections) = (Arc::clone(&connector.taken), connector.connections.clone());
    let url = "https://127.0.0.1/swarm/heartbeat".to_owned();
    let resolver = MasterResolver::new("127.0.0.1", 1);
    let reply = MasterClient::with_connector(connector, connections, url, resolver)
        .post(b"{}", limits::POST);
    assert_sayable(&reply.detail);
    assert_sayable(&reply.class);
    assert!(taken.load(Ordering::Relaxed) <= MOST_TAKEN, "{taken:?} bytes of one answer");
    assert_eq!(reply.class.starts_with("http-"), reply.verdict != Verdict::NoResponse);
    match reply.verdict {
        Verdict::Accepted => assert!(has_status(&said, b"2") && reply.detail.is_empty()),
        Verdict::RetryLater(Some(wait)) => assert_wait(wait),
        _ => (),
    }
}

/// Whether any line of it could be that of an answer whose status begins like this.
fn has_status(answer: &[u8], status: &[u8]) -> bool {
    answer
        .windows(9 + status.len())
        .any(|head| head.starts_with(b"HTTP/1.") && head.ends_with(&[b" ", status].concat()))
}

/// Reads a `Retry-After`.
pub fn retry_after(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // 6 November 1994, the date of RFC 9110's examples; and as early and as late as there are dates.
    for now in
        [784_111_777, 0, 253_402_300_799].map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds))
    {
        if let Some(wait) = parse_retry_after(text, now) {
            assert_wait(wait);
        }
    }
}

fn assert_wait(wait: Duration) {
    let (least, most) = limits::RETRY_AFTER;
    assert!((least..=most).contains(&wait), "{wait:?}");
}

/// Asks a Docker whose two answers have these bodies, with a NUL between them.
pub fn docker_json(input: &[u8]) {
    let answers: [&[u8]; 2] = parts(input);
    let ok = |json: &[u8]| {
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", json.len()).as_bytes(), json]
            .concat()
    };
    let found = ask(answers.map(ok));
    for (json, found) in answers.into_iter().zip(found) {
        assert!(
            is_array(json) || !found,
            "an engine without containers would count every decky as degraded"
        );
    }
}

/// Asks a Docker that says this on the first connection and, after a NUL, that on the second.
pub fn docker_http(input: &[u8]) {
    let answers: [&[u8]; 2] = parts(input);
    // A connection that is kept gives its rest to the second request.
    if ask(answers.map(<[u8]>::to_vec)).contains(&true) {
        assert!(
            answers.into_iter().any(|answer| has_status(answer, b"200") && answer.contains(&b'['))
        );
    }
}

fn is_array(json: &[u8]) -> bool {
    serde_json::from_slice::<Vec<IgnoredAny>>(json).is_ok()
}

/// Whether these answers are an engine's: the first about networks, the second about containers.
fn ask(answers: [Vec<u8>; 2]) -> [bool; 2] {
    let connector = Answering { answers: Mutex::new(answers.into()), peers: Mutex::default() };
    let engine = Docker::behind(connector).engine();
    engine.left_out().iter().for_each(|left_out| assert_sayable(left_out));
    let DockerState { containers, networks } = engine;
    [networks.as_ref().err(), containers.as_ref().err()]
        .into_iter()
        .flatten()
        .for_each(|it| assert_sayable(it));
    let is_own = |name: &String| !name.contains('/') && name.len() <= limits::DOCKER_NAME;
    assert!(
        containers.iter().all(|it| it.states.keys().all(is_own)),
        "a link's name is none of its own"
    );
    [networks.is_ok(), containers.is_ok()]
}

/// What may be taken of one answer, and what was read in one go before that was noticed.
const MOST_TAKEN: usize = limits::ANSWER + limits::HTTP_BUFFER;

/// Connects to a master in memory.
#[derive(Debug)]
struct InMemory {
    pieces: VecDeque<Vec<u8>>,
    forever: Vec<u8>,
    taken: Arc<AtomicUsize>,
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
        let (pieces, taken) = (self.pieces.clone(), Arc::clone(&self.taken));
        // Of single bytes there would be so many that it takes seconds.
        let forever = self.forever.repeat(limits::HTTP_BUFFER / 4 / self.forever.len().max(1) + 1);
        Ok(Some(InMemoryTransport {
            buffers,
            pieces,
            forever,
            taken,
            connections: self.connections.clone(),
        }))
    }
}

#[derive(Debug)]
struct InMemoryTransport {
    buffers: LazyBuffers,
    /// What is still to be said before that which never ends.
    pieces: VecDeque<Vec<u8>>,
    forever: Vec<u8>,
    taken: Arc<AtomicUsize>,
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
        let mut piece = self.pieces.pop_front().unwrap_or_else(|| self.forever.clone());
        let input = self.buffers.input_append_buf();
        let amount = piece.len().min(input.len());
        input[..amount].copy_from_slice(&piece[..amount]);
        if amount < piece.len() {
            piece.drain(..amount);
            self.pieces.push_front(piece);
        }
        self.taken.fetch_add(amount, Ordering::Relaxed);
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

/// Connects to a Docker that has answered before it is asked.
#[derive(Debug)]
struct Answering {
    answers: Mutex<VecDeque<Vec<u8>>>,
    /// The other ends. Closed too early, they would take the answers with them.
    peers: Mutex<Vec<UnixStream>>,
}

impl Connector for Answering {
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
