//! The connector that puts TLS under ureq. Handshakes run on the heartbeat thread.
//!
//! ureq takes no rustls configuration of ours, and its own connector panics on a key that does not fit its
//! certificate. So `verifier` builds the configuration from a proven bundle, and the connector is a thin layer
//! between our socket and ureq's HTTP.

use std::fmt;
use std::io::{Read, Write};
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, StreamOwned};
use ureq::http::StatusCode;
use ureq::unversioned::transport::time::{Duration, Instant};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use crate::first_bytes::FirstBytes;
use crate::limits;
use crate::socket::SocketTransport;

/// What the connections of one [`TlsConnector`] were like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Connections {
    /// How many were tried. Unchanged over a request: it went out on a connection that was there.
    pub(crate) tried: u64,
    /// The last handshake resumed a session.
    pub(crate) resumed: bool,
    /// The answer to the last request, as far as it has come.
    pub(crate) answer: Answer,
}

/// What is known of an answer, whether or not there will ever be all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Its beginning, as much as a status line needs.
    head: Vec<u8>,
    /// Bytes that have come.
    length: usize,
}

impl Answer {
    /// `HTTP/1.1 204 `
    const HEAD: usize = 13;

    /// More of it has come. An error: it is too much.
    pub(crate) fn add(&mut self, input: &[u8]) -> Result<(), ureq::Error> {
        self.head.extend(input.iter().take(Self::HEAD.saturating_sub(self.head.len())));
        self.length += input.len();
        match self.length {
            0..=limits::ANSWER => Ok(()),
            length => Err(ureq::Error::LargeResponseHeader(length, limits::ANSWER)),
        }
    }

    /// Its status, once that is there. An interim one is none.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        let head = std::str::from_utf8(&self.head).ok()?;
        let line = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "))?;
        let (code, end) = line.split_at_checked(3)?;
        let status = StatusCode::from_bytes(code.as_bytes()).ok()?;
        (end.starts_with([' ', '\r', '\n']) && !status.is_informational()).then_some(status)
    }
}

/// Connects by TCP, and puts TLS on top.
pub(crate) struct TlsConnector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    connections: Arc<Mutex<Connections>>,
}

impl TlsConnector {
    pub(crate) fn new(config: Arc<ClientConfig>, name: ServerName<'static>) -> Self {
        Self { config, name, connections: Arc::default() }
    }

    /// A view of the connections to come.
    pub(crate) fn connections(&self) -> Arc<Mutex<Connections>> {
        Arc::clone(&self.connections)
    }

    fn note(&self, change: impl FnOnce(&mut Connections)) {
        note(&self.connections, change);
    }
}

fn note<T>(connections: &Mutex<Connections>, change: impl FnOnce(&mut Connections) -> T) -> T {
    change(&mut connections.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Connector for TlsConnector {
    type Out = TlsTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        self.note(|connections| connections.tried += 1);
        let tcp = SocketTransport::tcp(details)?;
        let mut tls = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| ureq::Error::Other(Box::new(error)))?;
        let mut tcp = TransportAdapter::new(tcp, Arc::clone(&details.current_time));
        tcp.set_timeout(rest_of(details));
        let mut first = FirstBytes::of(&mut tcp);
        tls.complete_io(&mut first).map_err(|error| first.name(error))?;
        self.note(|connections| connections.resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed));
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        let stream = StreamOwned::new(tls, tcp);
        Ok(Some(TlsTransport { buffers, stream, begins: true, unsent: Vec::new(), connections: self.connections() }))
    }
}

/// What is left of the connect timeout once TCP is connected: one budget for both.
fn rest_of(details: &ConnectionDetails<'_>) -> NextTimeout {
    let mut timeout = details.timeout;
    if let (Duration::Exact(limit), Instant::Exact(now), Instant::Exact(start)) =
        (timeout.after, (details.current_time)(), details.now)
    {
        timeout.after = Duration::Exact(limit.saturating_sub(now.saturating_duration_since(start)));
    }
    timeout
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnector").field("name", &self.name).finish_non_exhaustive()
    }
}

/// TLS over TCP.
pub(crate) struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter<SocketTransport>>,
    /// The next output is a request's head.
    begins: bool,
    /// What is not sent yet.
    unsent: Vec<u8>,
    connections: Arc<Mutex<Connections>>,
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    /// The head waits for the body, which every request of ours has: apart they would be two records, and wake the master
    /// twice.
    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.unsent.extend_from_slice(self.buffers.output().get(..amount).unwrap_or_default());
        if mem::take(&mut self.begins) {
            return Ok(());
        }
        self.stream.get_mut().set_timeout(timeout);
        self.stream.write_all(&mem::take(&mut self.unsent))?;
        self.stream.flush()?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.begins = true;
        self.stream.get_mut().set_timeout(timeout);
        let input = self.buffers.input_append_buf();
        let amount = self.stream.read(input)?;
        note(&self.connections, |connections| connections.answer.add(input.get(..amount).unwrap_or_default()))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTransport").field("tcp", &self.stream.sock.inner()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_line_is_known_as_soon_as_it_is_there() {
        for (head, status) in [
            ("HTTP/1.1 204 No Content\r\n", Some(204)),
            ("HTTP/1.0 503\r\n", Some(503)),
            ("HTTP/1.1 204", None),
            ("HTTP/1.1 2040 ", None),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n", None),
            ("HTTP/2 204 ", None),
            ("HTTP/1. 204 No Content\r\n", None),
            ("HTTP/1.x 204 ", None),
            ("HTTP/1.1  204 ", None),
            ("SSH-2.0-OpenSSH", None),
        ] {
            let mut answer = Answer::default();
            head.as_bytes().chunks(2).for_each(|some| answer.add(some).unwrap());
            assert_eq!(answer.status().map(|status| status.as_u16()), status, "{head}");
        }
    }

    #[test]
    fn an_answer_has_its_bytes_and_no_more() {
        let mut answer = Answer::default();
        answer.add(&vec![0; limits::ANSWER - 1]).unwrap();
        let error = answer.add(&[0; 2]).unwrap_err();
        assert_eq!(error.to_string(), "response header is too big: 65537 > 65536");
    }
}
