//! The sockets of the master: one accept thread, and a thread for each connection. A thread ends
//! when its socket is shut down, which a stop does to all of them. All other waits are bounded.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustls::{HandshakeKind, ProtocolVersion, ServerConfig, ServerConnection, StreamOwned};

use super::fault::{Answer, Effect, Fault, Moment, first_header};
use super::http::{Head, encode, parse_head};
use super::{ConnectionReport, Handshake, Received, Seen, TlsVersion, certificates};
use crate::error::chain;
use crate::limits::loopback as limits;

/// The data that the threads and the master's handle share. It survives an outage.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Notified of every change of the state.
    pub(super) changed: Condvar,
    /// How long a connection may be idle.
    pub(super) idle: Duration,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) seen: Seen,
    pub(super) script: VecDeque<Fault>,
    pub(super) always: Option<Fault>,
    pub(super) stopping: bool,
    /// Threads that have not ended.
    pub(super) threads: usize,
    /// The sockets of the open connections by number, to shut them down.
    open: HashMap<u64, TcpStream>,
    /// The number of the newest connection.
    newest: u64,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is a single step, so the state is consistent after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits up to `timeout` until `done` returns true. Returns whether it did.
    pub(super) fn wait(&self, timeout: Duration, mut done: impl FnMut(&State) -> bool) -> bool {
        let (_state, wait) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        !wait.timed_out()
    }

    /// Cuts all connections, and lets the accept thread end when it wakes up.
    pub(super) fn cut_all(&self) {
        let mut state = self.lock();
        state.stopping = true;
        for socket in state.open.values() {
            // An error means that the connection is closed.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn report(&self, number: u64, change: impl FnOnce(&mut ConnectionReport)) {
        let mut state = self.lock();
        if let Some(report) =
            state.seen.connections.iter_mut().rev().find(|report| report.number == number)
        {
            change(report);
        }
        self.changed.notify_all();
    }

    fn next_fault(&self, moment: Moment) -> Option<Fault> {
        let mut state = self.lock();
        let fault = match state.script.front() {
            Some(next) if next.moment() == moment => state.script.pop_front(),
            Some(_) => None,
            None => state.always.clone().filter(|fault| fault.moment() == moment),
        };
        self.changed.notify_all();
        fault
    }
}

/// Counts a thread from before its start until all of its values are dropped.
pub(super) struct ThreadCount(Arc<Shared>);

impl ThreadCount {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.lock().threads += 1;
        Self(Arc::clone(shared))
    }
}

impl Drop for ThreadCount {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.changed.notify_all();
    }
}

/// Accepts connections until a stop.
pub(super) fn accept(listener: &TcpListener, tls: &Arc<ServerConfig>, shared: &Arc<Shared>) {
    for socket in listener.incoming() {
        if shared.lock().stopping {
            return;
        }
        let result = socket.and_then(|socket| start_connection(socket, Arc::clone(tls), shared));
        if result.is_err() {
            shared.wait(limits::ACCEPT_PAUSE, |state| state.stopping);
        }
    }
}

/// Starts the thread of a connection. A connection beyond [`limits::CONNECTIONS`] is closed.
fn start_connection(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let Some(open) = OpenConnection::new(&socket, shared)? else { return Ok(()) };
    thread::Builder::new().name("loopback-conn".into()).spawn(move || {
        if let Err(error) = serve(socket, tls, &open) {
            open.shared().report(open.number, |report| report.failure = Some(chain(&error)));
        }
    })?;
    Ok(())
}

/// An open connection in the state. It is removed when this is dropped, also by a panic.
struct OpenConnection {
    number: u64,
    thread_count: ThreadCount,
}

impl OpenConnection {
    fn new(socket: &TcpStream, shared: &Arc<Shared>) -> io::Result<Option<Self>> {
        let socket = socket.try_clone()?;
        let thread_count = ThreadCount::new(shared);
        let mut state = shared.lock();
        if state.stopping || state.open.len() >= limits::CONNECTIONS {
            return Ok(None);
        }
        state.newest += 1;
        let number = state.newest;
        state.open.insert(number, socket);
        state.seen.record_connection(ConnectionReport {
            number,
            at: Instant::now(),
            handshake: None,
            failure: None,
            requests: 0,
            open: true,
        });
        shared.changed.notify_all();
        drop(state);
        Ok(Some(Self { number, thread_count }))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.thread_count.0
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if let Some(socket) = self.shared().lock().open.remove(&self.number) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.shared().report(self.number, |report| report.open = false);
    }
}

/// Serves a connection until it is closed.
fn serve(mut socket: TcpStream, tls: Arc<ServerConfig>, open: &OpenConnection) -> io::Result<()> {
    let shared = open.shared();
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(limits::STALL))?;
    socket.set_write_timeout(Some(limits::STALL))?;
    match shared.next_fault(Moment::Connection) {
        Some(Fault::NeverHandshake) => return wait_for_close(&socket),
        Some(Fault::Banner(bytes)) => {
            socket.write_all(&bytes)?;
            return linger(&socket);
        }
        Some(_) => return Ok(()),
        None => {}
    }
    let mut session = ServerConnection::new(tls).map_err(io::Error::other)?;
    while session.is_handshaking() {
        if let Err(error) = session.complete_io(&mut socket) {
            // Lets the client read the alert.
            let _ = linger(&socket);
            return Err(error);
        }
    }
    let handshake = handshake_of(&session);
    shared.report(open.number, |report| report.handshake = Some(handshake.clone()));
    let stream = StreamOwned::new(session, socket);
    Connection {
        number: open.number,
        fingerprint: handshake.fingerprint,
        shared,
        stream,
        unread: Vec::new(),
    }
    .run()
}

fn handshake_of(session: &ServerConnection) -> Handshake {
    let leaf = session.peer_certificates().and_then(|chain| chain.first());
    Handshake {
        version: match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => TlsVersion::Tls12,
            _ => TlsVersion::Tls13,
        },
        resumed: session.handshake_kind() == Some(HandshakeKind::Resumed),
        fingerprint: leaf.map(|leaf| certificates::fingerprint(leaf)).unwrap_or_default(),
        server_name: session.server_name().map(str::to_owned),
    }
}

/// A connection after its handshake.
struct Connection<'a> {
    number: u64,
    fingerprint: String,
    shared: &'a Shared,
    stream: StreamOwned<ServerConnection, TcpStream>,
    /// The bytes that were received and are not part of a request yet.
    unread: Vec<u8>,
}

/// What follows a request.
enum Next {
    Another,
    Close,
    Cut,
}

impl Head {
    fn next(&self) -> Next {
        if self.keeps_alive { Next::Another } else { Next::Close }
    }
}

/// How a request that was read is handled.
enum Handling {
    /// It is applied and answered.
    Served,
    /// It is answered with this status, and not applied.
    Status(u16),
    /// It is not answered.
    NoAnswer(Effect),
}

impl Connection<'_> {
    fn run(mut self) -> io::Result<()> {
        loop {
            match self.serve_request()? {
                Next::Another => {}
                Next::Close => return self.close(),
                Next::Cut => return Ok(()),
            }
        }
    }

    fn serve_request(&mut self) -> io::Result<Next> {
        if !self.await_request()? {
            return Ok(Next::Close);
        }
        let fault = self.shared.next_fault(Moment::Request);
        if fault == Some(Fault::CutBeforeRequest) {
            return Ok(Next::Cut);
        }
        let Some(head) = self.read_head()? else {
            return self.reject(400, "Invalid HTTP request received.");
        };
        let Some(length) = head.length else {
            return self.reject(411, "The loopback master requires a Content-Length.");
        };
        if length > limits::REQUEST_BODY {
            return self.reject(413, "The body is too long for the loopback master.");
        }
        if first_header(&head.headers, "expect")
            .is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
        {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if fault == Some(Fault::CutInBody) {
            let half = self.read_body(length / 2)?;
            self.record(&head, half, Handling::NoAnswer(Effect::Lost));
            return Ok(Next::Cut);
        }
        let body = self.read_body(length)?;
        let fault = match fault {
            Some(Fault::AnswerTo(part, answer)) => {
                contains(&body, &part).then_some(Fault::Answer(answer))
            }
            fault => fault,
        };
        self.answer(head, body, fault)
    }

    fn answer(&mut self, head: Head, body: Vec<u8>, fault: Option<Fault>) -> io::Result<Next> {
        match fault {
            Some(Fault::CutAfterBody(effect)) => {
                self.record(&head, body, Handling::NoAnswer(effect));
                Ok(Next::Cut)
            }
            Some(Fault::CutAfterSilence(silence)) => {
                self.record(&head, body, Handling::NoAnswer(Effect::Lost));
                self.shared.wait(silence, |state| state.stopping);
                Ok(Next::Cut)
            }
            Some(Fault::NeverAnswer(effect)) => {
                self.record(&head, body, Handling::NoAnswer(effect));
                wait_for_close(&self.stream.sock)?;
                Ok(Next::Cut)
            }
            Some(Fault::Answer(answer)) => {
                self.record(&head, body, Handling::Status(answer.status));
                self.stream.write_all(&encode(&answer))?;
                let close = answer
                    .first_header("connection")
                    .is_some_and(|value| value.eq_ignore_ascii_case("close"));
                Ok(if close { Next::Close } else { head.next() })
            }
            Some(Fault::Raw(bytes)) => {
                self.record(&head, body, Handling::NoAnswer(Effect::Lost));
                self.stream.write_all(&bytes)?;
                Ok(Next::Close)
            }
            Some(Fault::Endless(first, again, pause)) => {
                self.record(&head, body, Handling::NoAnswer(Effect::Lost));
                self.stream.write_all(&first)?;
                while !self.shared.wait(pause, |state| state.stopping) {
                    self.stream.write_all(&again)?;
                }
                Ok(Next::Cut)
            }
            Some(Fault::Slowly(pause)) => {
                let answer = self.record(&head, body, Handling::Served);
                for byte in encode(&answer) {
                    self.stream.write_all(&[byte])?;
                    if self.shared.wait(pause, |state| state.stopping) {
                        return Ok(Next::Cut);
                    }
                }
                Ok(head.next())
            }
            Some(Fault::CutAfterAnswer) => {
                let answer = self.record(&head, body, Handling::Served);
                self.stream.write_all(&encode(&answer))?;
                Ok(Next::Cut)
            }
            _ => {
                let answer = self.record(&head, body, Handling::Served);
                self.stream.write_all(&encode(&answer))?;
                Ok(head.next())
            }
        }
    }

    /// Records the request before it is answered, and applies it if `handling` requires that.
    fn record(&self, head: &Head, body: Vec<u8>, handling: Handling) -> Answer {
        let mut received = Received {
            at: Instant::now(),
            connection: self.number,
            method: head.method.clone(),
            path: head.path.clone(),
            headers: head.headers.clone(),
            json: serde_json::from_slice(&body).ok(),
            body,
            status: None,
        };
        let mut state = self.shared.lock();
        let answer = match handling {
            Handling::Served | Handling::NoAnswer(Effect::Applied) => {
                let answer = state.seen.database.handle(&received, &self.fingerprint);
                state.seen.beats += u64::from(answer.status == 204);
                answer
            }
            Handling::Status(status) => Answer::status(status),
            Handling::NoAnswer(Effect::Lost) => Answer::status(0),
        };
        if !matches!(handling, Handling::NoAnswer(_)) {
            received.status = Some(answer.status);
        }
        state.seen.record_request(received);
        drop(state);
        self.shared.report(self.number, |report| report.requests += 1);
        answer
    }

    /// Waits for the first byte of a request. Returns `false` if the client has closed the
    /// connection or has been idle for too long.
    fn await_request(&mut self) -> io::Result<bool> {
        if self.unread.is_empty() {
            self.stream.sock.set_read_timeout(Some(self.shared.idle))?;
            match self.read_some() {
                Ok(()) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                    ) =>
                {
                    return Ok(false);
                }
                Err(error) if is_timeout(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
            self.stream.sock.set_read_timeout(Some(limits::STALL))?;
        }
        Ok(true)
    }

    /// Reads a head. `None`: it is not HTTP/1, or too long.
    fn read_head(&mut self) -> io::Result<Option<Head>> {
        loop {
            match parse_head(&self.unread) {
                Err(_) => return Ok(None),
                Ok(Some((head, end))) => {
                    self.unread.drain(..end);
                    return Ok(Some(head));
                }
                Ok(None) if self.unread.len() > limits::REQUEST_HEAD => return Ok(None),
                Ok(None) => self.read_some()?,
            }
        }
    }

    fn read_body(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.unread.len() < length {
            self.read_some()?;
        }
        let rest = self.unread.split_off(length);
        Ok(std::mem::replace(&mut self.unread, rest))
    }

    /// Reads more bytes into `unread`. The end of the stream is an error.
    fn read_some(&mut self) -> io::Result<()> {
        let mut some = [0; 16 * 1024];
        let count = self.stream.read(&mut some)?;
        self.unread.extend_from_slice(some.get(..count).unwrap_or_default());
        if count == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn reject(&mut self, status: u16, reason: &str) -> io::Result<Next> {
        let answer = Answer::status(status)
            .header("content-type", "text/plain; charset=utf-8")
            .header("connection", "close")
            .body(reason);
        self.stream.write_all(&encode(&answer))?;
        Ok(Next::Close)
    }

    fn close(mut self) -> io::Result<()> {
        self.stream.conn.send_close_notify();
        // An error means that the client has closed the connection.
        let _ = self.stream.flush();
        linger(&self.stream.sock)
    }
}

/// Shuts down writing, and reads for [`limits::LINGER`]. A socket that is closed with unread data
/// resets the connection, and the client would lose the last answer.
fn linger(socket: &TcpStream) -> io::Result<()> {
    // An error means that the client or a stop has shut it down.
    let _ = socket.shutdown(Shutdown::Write);
    socket.set_read_timeout(Some(limits::LINGER))?;
    discard_until(socket, Some(Instant::now() + limits::LINGER));
    Ok(())
}

/// Reads without answering until the client closes the connection or a stop cuts it.
fn wait_for_close(socket: &TcpStream) -> io::Result<()> {
    socket.set_read_timeout(None)?;
    discard_until(socket, None);
    Ok(())
}

fn discard_until(mut socket: &TcpStream, end: Option<Instant>) {
    let mut scratch = [0; 16 * 1024];
    while end.is_none_or(|end| Instant::now() < end) {
        match socket.read(&mut scratch) {
            Ok(0) => return,
            Err(error) if error.kind() != ErrorKind::Interrupted => return,
            _ => {}
        }
    }
}

fn contains(body: &[u8], part: &[u8]) -> bool {
    part.is_empty() || body.windows(part.len()).any(|window| window == part)
}

/// The error of a read that timed out differs between systems.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
