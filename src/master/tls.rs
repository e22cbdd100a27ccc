//! The TLS connector for ureq. Handshakes run on the heartbeat thread.
//!
//! ureq does not accept a rustls configuration, and its own connector panics if the key does not
//! match the certificate. So `verifier` builds the configuration from a bundle that was checked,
//! and this connector is a thin layer between the socket and ureq's HTTP.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind, StreamOwned};
use ureq::http::StatusCode;
use ureq::unversioned::transport::time;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use crate::limits;
use crate::master::first_bytes::FirstBytes;
use crate::master::resolver::MasterResolver;
use crate::transport::{Deadline, SocketTransport};

/// The state of the connections of one [`TlsConnector`], shared by the connector, its transports
/// and their client.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedConnections(Arc<Mutex<Connections>>);

impl SharedConnections {
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Connections) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Default)]
pub(crate) struct Connections {
    /// Whether the last handshake resumed a session.
    pub(crate) resumed: bool,
    /// When the newest connection was opened.
    pub(crate) opened: Option<Instant>,
    /// Whether the master has accepted a body on the newest connection.
    pub(crate) has_accepted: bool,
    /// Whether the open connection must not be reused.
    pub(crate) close: bool,
    /// The number of consecutive answers that are not 2xx.
    pub(crate) bad_answers: u32,
    pub(crate) exchange: Exchange,
}

/// What has happened to the last request.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    /// A connection was opened for it.
    pub(crate) has_connected: bool,
    /// A part of its body was sent.
    pub(crate) body_sent: bool,
    /// The answer, as far as it was received.
    pub(crate) answer: Answer,
}

/// The part of an answer that was received. It may be incomplete.
#[derive(Debug, Default)]
pub(crate) struct Answer(Vec<u8>);

impl Answer {
    /// Appends input.
    ///
    /// # Errors
    /// If the answer is longer than [`limits::ANSWER`].
    pub(crate) fn add(&mut self, input: &[u8]) -> Result<(), ureq::Error> {
        let length = self.0.len() + input.len();
        let room = limits::ANSWER.saturating_sub(self.0.len());
        self.0.extend(input.iter().take(room));
        match length {
            0..=limits::ANSWER => Ok(()),
            length => Err(ureq::Error::LargeResponseHeader(length, limits::ANSWER)),
        }
    }

    /// Whether nothing was received.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The status, if its line was received. Interim answers (1xx) are skipped.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        self.last().map(|(status, _)| status)
    }

    /// The value of a header, if it was received.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let (_, rest) = self.last()?;
        let lines = rest.split(|byte| *byte == b'\n').skip(1).map(<[u8]>::trim_ascii);
        lines.take_while(|line| !line.is_empty()).find_map(|line| {
            let (key, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Whether the status line and all headers were received.
    pub(crate) fn has_whole_head(&self) -> bool {
        self.last().is_some_and(|(_, rest)| end_of_head(rest).is_some())
    }

    /// The received part of the body, with any transfer encoding.
    pub(crate) fn body(&self) -> &[u8] {
        self.last()
            .and_then(|(_, rest)| end_of_head(rest).and_then(|end| rest.get(end..)))
            .unwrap_or_default()
    }

    /// The status of the final answer, and its bytes from the status line on.
    fn last(&self) -> Option<(StatusCode, &[u8])> {
        let mut rest = self.0.as_slice();
        loop {
            rest = rest.trim_ascii_start();
            let status = status_of(rest)?;
            if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
                return Some((status, rest));
            }
            rest = rest.get(end_of_head(rest)?..)?;
        }
    }
}

/// The status of a status line, such as `HTTP/1.1 204 No Content`.
fn status_of(head: &[u8]) -> Option<StatusCode> {
    let line = head.strip_prefix(b"HTTP/1.1 ").or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    let (code, end) = line.split_at_checked(3)?;
    let status = StatusCode::from_bytes(code).ok()?;
    matches!(end.first(), Some(b' ' | b'\r' | b'\n')).then_some(status)
}

/// The position after the headers, where the body begins.
fn end_of_head(head: &[u8]) -> Option<usize> {
    let ends = |end: &[u8]| {
        head.windows(end.len()).position(|bytes| bytes == end).map(|at| at + end.len())
    };
    ends(b"\r\n\r\n").into_iter().chain(ends(b"\n\n")).min()
}

/// Opens a TCP connection and does the TLS handshake.
#[derive(Debug)]
pub(crate) struct TlsConnector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    resolver: MasterResolver,
    connections: SharedConnections,
}

impl TlsConnector {
    pub(crate) fn new(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        resolver: MasterResolver,
        connections: SharedConnections,
    ) -> Self {
        Self { config, name, resolver, connections }
    }
}

impl Connector for TlsConnector {
    type Out = TlsTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        self.connections.update(|connections| {
            connections.exchange.has_connected = true;
            connections.close = false;
            connections.has_accepted = false;
            connections.opened = Some(Instant::now());
        });
        // The connect timeout covers TCP and TLS together.
        let deadline = Deadline::of(details.timeout);
        let (tcp, address) = SocketTransport::tcp(details)?;
        self.resolver.connected_to(address);
        let mut tls = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| ureq::Error::Other(Box::new(error)))?;
        let mut wire = Wire::new(TransportAdapter::new(tcp, Arc::clone(&details.current_time)));
        wire.tcp.set_timeout(deadline.timeout());
        let mut first = FirstBytes::of(&mut wire);
        tls.complete_io(&mut first).map_err(|error| first.classify(error))?;
        let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
        self.connections.update(|connections| connections.resumed = resumed);
        let buffers = LazyBuffers::new(
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        let stream = StreamOwned::new(tls, wire);
        Ok(Some(TlsTransport {
            buffers,
            stream,
            at_request_start: true,
            unsent: Vec::new(),
            connections: self.connections.clone(),
        }))
    }
}

/// The TCP stream under TLS. It limits the bytes that are read for one answer, TLS messages without
/// data included.
struct Wire<S> {
    tcp: S,
    /// The number of bytes that may still be read.
    allowed: usize,
    /// The number of bytes that were sent.
    sent: u64,
    /// The TLS record that is being read.
    record: Record,
}

impl<S> Wire<S> {
    fn new(tcp: S) -> Self {
        Self { tcp, allowed: limits::ANSWER_ON_THE_WIRE, sent: 0, record: Record::default() }
    }
}

impl Wire<TransportAdapter<SocketTransport>> {
    /// Whether the connection is open, nothing is waiting to be read, and the last record is
    /// complete.
    fn is_idle(&mut self) -> bool {
        let tcp = self.tcp.get_mut();
        self.record.is_complete() && tcp.buffers().input().is_empty() && tcp.is_open()
    }
}

impl<S: Read> Read for Wire<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(self.allowed);
        if room == 0 && !buffer.is_empty() {
            let most = limits::ANSWER_ON_THE_WIRE;
            let problem = format!("the peer sent more than {most} bytes without a complete answer");
            return Err(io::Error::new(ErrorKind::QuotaExceeded, problem));
        }
        let buffer = buffer.get_mut(..room).unwrap_or_default();
        let count = self.tcp.read(buffer)?;
        self.allowed -= count.min(self.allowed);
        self.record.add(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl<S: Write> Write for Wire<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.tcp.write(buffer)?;
        self.sent += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

/// Tracks the bounds of TLS records: a header of five bytes, which ends with the length of the
/// content, and the content.
#[derive(Debug, Default)]
struct Record {
    header: Vec<u8>,
    missing: usize,
}

impl Record {
    const HEADER: usize = 5;

    fn add(&mut self, mut input: &[u8]) {
        while !input.is_empty() {
            if self.missing > 0 {
                let skipped = self.missing.min(input.len());
                self.missing -= skipped;
                input = input.get(skipped..).unwrap_or_default();
                continue;
            }
            let (some, rest) = input.split_at(input.len().min(Self::HEADER - self.header.len()));
            self.header.extend_from_slice(some);
            input = rest;
            if let [.., high, low] = *self.header.as_slice()
                && self.header.len() == Self::HEADER
            {
                self.missing = usize::from(u16::from_be_bytes([high, low]));
                self.header.clear();
            }
        }
    }

    fn is_complete(&self) -> bool {
        self.header.is_empty() && self.missing == 0
    }
}

/// A TLS connection over TCP.
pub(crate) struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, Wire<TransportAdapter<SocketTransport>>>,
    /// Whether the next output is the head of a request.
    at_request_start: bool,
    /// Output that was not sent yet.
    unsent: Vec<u8>,
    connections: SharedConnections,
}

impl TlsTransport {
    fn send(&mut self) -> io::Result<()> {
        let unsent = mem::take(&mut self.unsent);
        let before = self.stream.sock.sent;
        let sent = self.stream.write_all(&unsent).and_then(|()| self.stream.flush());
        if self.stream.sock.sent > before {
            self.connections.update(|connections| connections.exchange.body_sent = true);
        }
        sent
    }

    /// Reads the part of an answer that has arrived. Called when sending fails: the master may have
    /// answered before it read the whole request.
    fn read_early_answer(&mut self) {
        let end = Instant::now() + limits::EARLY_ANSWER;
        let pause = NextTimeout {
            after: time::Duration::Exact(limits::EARLY_ANSWER_PAUSE),
            ..NextTimeout::default()
        };
        let tls = &mut self.stream.conn;
        let wire = &mut self.stream.sock;
        let mut some = [0; 4096];
        while Instant::now() < end {
            wire.tcp.set_timeout(pause);
            let arrived =
                matches!(tls.read_tls(wire), Ok(1..)) && tls.process_new_packets().is_ok();
            while let Ok(count @ 1..) = tls.reader().read(&mut some) {
                let input = some.get(..count).unwrap_or_default();
                let add = |connections: &mut Connections| connections.exchange.answer.add(input);
                if self.connections.update(add).is_err() {
                    return;
                }
            }
            if !arrived {
                return;
            }
        }
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    /// Sends the head of a request together with its body. Otherwise they would be two TLS records,
    /// which wake the master twice. Every request here has a body.
    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.unsent.extend_from_slice(self.buffers.output().get(..amount).unwrap_or_default());
        if mem::take(&mut self.at_request_start) {
            self.stream.sock.allowed = limits::ANSWER_ON_THE_WIRE;
            return Ok(());
        }
        self.stream.sock.tcp.set_timeout(timeout);
        if let Err(error) = self.send() {
            self.read_early_answer();
            return Err(error.into());
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.at_request_start = true;
        self.stream.sock.tcp.set_timeout(timeout);
        let input = self.buffers.input_append_buf();
        let amount = match self.stream.read(input) {
            Err(error) if error.kind() == ErrorKind::QuotaExceeded => {
                let most = limits::ANSWER_ON_THE_WIRE;
                return Err(ureq::Error::LargeResponseHeader(most + 1, most));
            }
            read => read?,
        };
        self.connections.update(|connections| {
            connections.exchange.answer.add(input.get(..amount).unwrap_or_default())
        })?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    /// Whether the next request may use this connection. Unread bytes, decrypted or not, would be
    /// taken for the next answer.
    fn is_open(&mut self) -> bool {
        if self.connections.update(|connections| connections.close) {
            return false;
        }
        let decrypted = self.stream.conn.process_new_packets();
        let nothing_left = decrypted
            .is_ok_and(|state| state.plaintext_bytes_to_read() == 0 && !state.peer_has_closed());
        nothing_left && self.stream.sock.is_idle()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTransport")
            .field("tcp", &self.stream.sock.tcp.inner())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_known_when_the_status_line_has_arrived() {
        for (head, status) in [
            ("HTTP/1.1 204 No Content\r\n", Some(204)),
            ("HTTP/1.0 503\r\n", Some(503)),
            ("HTTP/1.1 204", None),
            ("HTTP/1.1 2040 ", None),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n", Some(204)),
            ("HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 C\n\nHTTP/1.1 413 Too", Some(413)),
            ("HTTP/1.1 103 Early\r\nLink: x\r\n", None),
            ("HTTP/1.1 101 Switching\r\n\r\nHTTP/1.1 204 No Content\r\n", Some(101)),
            ("\r\nHTTP/1.1 204 No Content\r\n", Some(204)),
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
    fn incomplete_answer_is_read_as_far_as_it_has_arrived() {
        let parsed = |answer: &str| {
            let mut seen = Answer::default();
            seen.add(answer.as_bytes()).unwrap();
            (
                seen.header("retry-after").map(str::to_owned),
                String::from_utf8(seen.body().to_vec()).unwrap(),
            )
        };
        let of = |header: Option<&str>, body: &str| (header.map(str::to_owned), body.to_owned());
        assert_eq!(
            parsed("HTTP/1.1 429 No\r\nA: b\r\nRETRY-AFTER:  7 \r\n\r\nno: more"),
            of(Some("7"), "no: more")
        );
        assert_eq!(
            parsed("HTTP/1.1 102 P\r\nRetry-After: 1\r\n\r\nHTTP/1.1 429 No\nRetry-After: 2\n\nx"),
            of(Some("2"), "x")
        );
        assert_eq!(
            parsed("HTTP/1.1 429 No\r\n\r\nRetry-After: 3\r\n"),
            of(None, "Retry-After: 3\r\n")
        );
        assert_eq!(parsed("HTTP/1.1 429 No\r\nRetry-Aft"), of(None, ""));
        assert_eq!(parsed("HTTP/1.1 102 P\r\n\r\n"), of(None, ""));
    }

    #[test]
    fn bytes_read_for_one_answer_are_limited() {
        let mut wire = Wire::new(io::repeat(0));
        let mut read = 0;
        let error = loop {
            match wire.read(&mut [0; 5_000]) {
                Ok(count) => read += count,
                Err(error) => break error,
            }
        };
        assert_eq!(read, limits::ANSWER_ON_THE_WIRE);
        assert_eq!(
            error.to_string(),
            "the peer sent more than 262144 bytes without a complete answer"
        );
        assert_eq!(error.kind(), ErrorKind::QuotaExceeded);
    }

    #[test]
    fn incomplete_record_is_detected_at_every_byte() {
        let records =
            [&[23, 3, 3, 0, 3, 1, 2, 3][..], &[22, 3, 3, 0, 0], &[23, 3, 3, 1, 0], &[7; 256]]
                .concat();
        let ends = [0, 8, 13, records.len()];
        for step in [1, 2, 3, 7, records.len()] {
            let mut record = Record::default();
            let mut read = 0;
            for some in records.chunks(step) {
                record.add(some);
                read += some.len();
                assert_eq!(record.is_complete(), ends.contains(&read), "{read} by {step}");
            }
        }
    }

    #[test]
    fn answer_longer_than_the_limit_is_an_error() {
        let mut answer = Answer::default();
        answer.add(&vec![0; limits::ANSWER - 1]).unwrap();
        let error = answer.add(&[0; 2]).unwrap_err();
        assert_eq!(error.to_string(), "response header is too big: 65537 > 65536");
    }
}
