//! A DECNET master on 127.0.0.1 with its own CA, for the demo, tests, benches and embedders' tests.
//! It runs on threads of its own, one that accepts and one for each connection; all end with a stop or a drop.
//!
//! It answers `POST /swarm/heartbeat` as the real master does, keeps operations and deckies by its rules, remembers
//! what it was sent, and does wrong what a test [scripts](LoopbackMaster::script).
//!
//! ```
//! use decnet_heartbeat::loopback::LoopbackMaster;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let agent_dir = std::env::temp_dir().join(format!("loopback-doc-{}", std::process::id()));
//! let master = LoopbackMaster::start()?;
//! let worker = master.enrol(&agent_dir)?;
//! let heartbeat = decnet_heartbeat::Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
//! assert!(master.wait_for_beats(1, std::time::Duration::from_secs(5)));
//! # drop(heartbeat);
//! # std::fs::remove_dir_all(&agent_dir)?;
//! # Ok(())
//! # }
//! ```
//!
//! What it leaves out of the real one: chunked request bodies (answered 411), topologies (read, never resynced), every
//! other path (404), and the 500 that a `runtime` of the wrong type brings about.

mod book;
mod certificates;
mod fault;
mod http;
mod server;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

pub use certificates::{Authority, Issued, Role};
pub use fault::{Answer, Effect, Fault};

use crate::enrolment::Enrolment;
use crate::error::Error;
use crate::limits;
use book::Book;
use server::{Running, Shared, State};

/// The master. Dropping it stops it.
pub struct LoopbackMaster {
    authority: Authority,
    certificate: Issued,
    client_ca: String,
    offered: Offered,
    port: u16,
    shared: Arc<Shared>,
    /// The accept thread; `None` during an outage.
    accepting: Option<JoinHandle<()>>,
}

/// How a master differs from a freshly installed one. The default is that one.
#[derive(Clone, Debug)]
pub struct Options {
    /// The CA that enrols workers. Default: a new one.
    pub authority: Option<Authority>,
    /// The certificate that it presents. Default: [`Role::Master`] from its authority.
    pub certificate: Option<Issued>,
    /// The CA that client certificates must chain to, PEM. Default: its authority's.
    pub client_ca: Option<String>,
    /// The TLS versions that it offers. Default: 1.2 and 1.3.
    pub offered: Offered,
    /// How long a connection may be idle before it is closed. Default: 5 s, as under uvicorn.
    pub idle: Duration,
}

/// The TLS versions that a master offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offered {
    /// Both, as the real one.
    #[default]
    Tls12And13,
    /// An older master.
    Tls12Only,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            authority: None,
            certificate: None,
            client_ca: None,
            offered: Offered::default(),
            idle: limits::loopback::IDLE,
        }
    }
}

/// A worker that the master knows, with its bundle in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Enrolled {
    /// The host uuid.
    pub uuid: String,
    /// The pinned certificate: SHA-256 of its DER, 64 lowercase hexadecimal digits.
    pub fingerprint: String,
    /// The master's port on 127.0.0.1.
    pub port: u16,
    /// The folder with `ca.crt`, `worker.crt` and `worker.key`.
    pub agent_dir: PathBuf,
}

impl Enrolled {
    /// The enrolment to start a heartbeat with.
    ///
    /// # Errors
    /// When the agent dir has no name.
    pub fn enrolment(&self) -> Result<Enrolment, Error> {
        Enrolment::new(&self.uuid, Ipv4Addr::LOCALHOST.to_string(), &self.agent_dir)?.with_master_port(self.port)
    }

    /// Writes the worker's `decnet.ini` to `path`, as an enrolment bundle has it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_ini(&self, path: &Path) -> Result<(), Error> {
        certificates::write_file(path, &self.ini(), 0o644)
    }
}

impl LoopbackMaster {
    /// A master as freshly installed, on a free port below the ones that systems hand out.
    ///
    /// # Errors
    /// When no certificate can be made, no port be had, or no thread be started.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(Options::default())
    }

    /// A master with these options, on a free port below the ones that systems hand out.
    ///
    /// # Errors
    /// As [`start`](Self::start), and when the certificates in the options cannot be used.
    pub fn start_with(options: Options) -> Result<Self, Error> {
        let authority = options.authority.map_or_else(Authority::new, Ok)?;
        let certificate = options.certificate.map_or_else(|| authority.issue(Role::Master), Ok)?;
        let client_ca = options.client_ca.unwrap_or_else(|| authority.certificate());
        let shared = Shared { state: Mutex::new(State::default()), changed: Condvar::new(), idle: options.idle };
        let mut master = Self {
            authority,
            certificate,
            client_ca,
            offered: options.offered,
            port: 0,
            shared: Arc::new(shared),
            accepting: None,
        };
        master.start_again()?;
        Ok(master)
    }

    /// The port, the same for as long as the master lives.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// 127.0.0.1 and the port.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Where heartbeats are posted to.
    pub fn url(&self) -> String {
        format!("https://{}/swarm/heartbeat", self.address())
    }

    /// The CA, for certificates of other roles.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The certificate that it presents.
    pub fn certificate(&self) -> &Issued {
        &self.certificate
    }

    // ---- who is enrolled ------------------------------------------------------------------------

    /// Enrols a new worker: issues a certificate, pins it to a new host uuid and writes the bundle into `agent_dir`.
    ///
    /// # Errors
    /// When no certificate can be made or the bundle cannot be written.
    pub fn enrol(&self, agent_dir: &Path) -> Result<Enrolled, Error> {
        self.re_enrol(&new_uuid(), agent_dir)
    }

    /// Pins a fresh certificate to this host uuid, known or not, and writes the bundle into `agent_dir`. From then on
    /// a worker that shows the old certificate is answered 403.
    ///
    /// # Errors
    /// As [`enrol`](Self::enrol).
    pub fn re_enrol(&self, uuid: &str, agent_dir: &Path) -> Result<Enrolled, Error> {
        let name = format!("worker-{}", uuid.get(..8).unwrap_or("x"));
        let worker = self.authority.issue(Role::Worker(name))?;
        self.pin(uuid, &worker.fingerprint);
        self.authority.write_bundle(&worker, agent_dir)?;
        Ok(Enrolled {
            uuid: uuid.to_owned(),
            fingerprint: worker.fingerprint,
            port: self.port,
            agent_dir: agent_dir.to_owned(),
        })
    }

    /// Pins the certificate with this SHA-256 (hexadecimal) to this host uuid.
    pub fn pin(&self, uuid: &str, fingerprint: &str) {
        self.shared.lock().seen.book.pin(uuid, fingerprint);
    }

    /// Forgets a host: from then on it is answered 404.
    pub fn decommission(&self, uuid: &str) {
        self.shared.lock().seen.book.unpin(uuid);
    }

    // ---- operations -----------------------------------------------------------------------------

    /// Opens a row, as the master does when it sends an operation (`deploy` or `mutate`) to a worker; its id.
    pub fn open_operation(&self, uuid: &str, decky: &str, operation: &str) -> u64 {
        self.shared.lock().seen.book.open(uuid, decky, operation)
    }

    /// All rows, oldest first.
    pub fn rows(&self) -> Vec<LifecycleRow> {
        self.shared.lock().seen.rows().to_vec()
    }

    /// What is known of the deckies, by name.
    pub fn shards(&self) -> BTreeMap<String, Shard> {
        self.shared.lock().seen.shards().clone()
    }

    // ---- what has come in -----------------------------------------------------------------------

    /// The requests, oldest first. From 20,000 requests or 256 MiB on the older half is forgotten.
    pub fn received(&self) -> Vec<Received> {
        self.shared.lock().seen.received().to_vec()
    }

    /// The requests, oldest first, which it then forgets: for a test that goes on for longer than it remembers.
    pub fn take_received(&self) -> Vec<Received> {
        let mut state = self.shared.lock();
        state.seen.bytes = 0;
        std::mem::take(&mut state.seen.received)
    }

    /// The connections, oldest first. From 20,000 on the older half is forgotten.
    pub fn connections(&self) -> Vec<ConnectionReport> {
        self.shared.lock().seen.connections().to_vec()
    }

    /// Waits until `done` holds, at most `timeout`; whether it came to hold. `done` is asked at every change, with the
    /// master standing still: it must not call the master.
    pub fn wait_until(&self, timeout: Duration, mut done: impl FnMut(&Seen) -> bool) -> bool {
        self.shared.wait(timeout, |state| done(&state.seen))
    }

    /// Waits until `count` beats were accepted since the master was made, at most `timeout`; whether they were.
    pub fn wait_for_beats(&self, count: u64, timeout: Duration) -> bool {
        self.wait_until(timeout, |seen| seen.beats() >= count)
    }

    // ---- what goes wrong ------------------------------------------------------------------------

    /// Adds faults to the script: each takes effect once, in this order. After the last, service is normal.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        let faults: Vec<Fault> = faults.into_iter().collect();
        self.shared.lock().script.extend(faults);
    }

    /// The fault that takes effect whenever the script is empty; `None` for normal service.
    pub fn always(&self, fault: Option<Fault>) {
        self.shared.lock().always = fault;
    }

    /// Faults in the script that have not taken effect.
    pub fn faults_left(&self) -> usize {
        self.shared.lock().script.len()
    }

    /// The outage: connections are cut, new ones are refused. Bounded, and without effect on a stopped master.
    ///
    /// The CA, the pins, the rows, the script and what was received stay.
    pub fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.cut_all();
        // Wakes the accept thread. If it is gone, so is the listener.
        drop(TcpStream::connect_timeout(&self.address(), limits::loopback::LINGER));
        if self.shared.wait(limits::loopback::STOP, |state| state.threads == 0) {
            // It has ended; had it panicked, the listener would be closed all the same.
            let _ = accepting.join();
        }
    }

    /// Ends the outage, on the same port. Sessions from before it do not resume, as with a restarted uvicorn. Without
    /// effect on a running master.
    ///
    /// # Errors
    /// When the port was taken meanwhile, or no thread can be started.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if self.accepting.is_some() {
            return Ok(());
        }
        let cannot = |doing: &str, cause: std::io::Error| Error::loopback(doing).because(cause);
        let tls = certificates::server_config(&self.certificate, &self.client_ca, self.offered)?;
        let listener = self.listen().map_err(|cause| cannot("cannot listen on 127.0.0.1", cause))?;
        self.port = listener.local_addr().map_err(|cause| cannot("cannot tell its port", cause))?.port();
        self.shared.lock().stopping = false;
        let running = Running::new(&self.shared);
        let shared = Arc::clone(&self.shared);
        let accept = move || {
            server::accept(&listener, &tls, &shared);
            drop(listener);
            // Last: a stop takes the listener to be gone.
            drop(running);
        };
        let accepting = thread::Builder::new().name("loopback-accept".into()).spawn(accept);
        self.accepting = Some(accepting.map_err(|cause| Error::thread("loopback-accept", cause))?);
        Ok(())
    }
}

impl LoopbackMaster {
    /// On its port, or on a first one. That is below the range from which systems take the ports of connections: during
    /// an outage nobody else must get it, least of all the client that tries to connect to it.
    fn listen(&self) -> std::io::Result<TcpListener> {
        if self.port != 0 {
            let end = Instant::now() + limits::loopback::REBIND;
            loop {
                match TcpListener::bind(self.address()) {
                    Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                        thread::sleep(limits::loopback::REBIND_PAUSE);
                    }
                    bound => return bound,
                }
            }
        }
        let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(limits::loopback::PORTS)));
        let mut tried = (0..limits::loopback::PORTS_TRIED).map(bind);
        tried.find(Result::is_ok).unwrap_or_else(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
    }
}

impl Drop for LoopbackMaster {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for LoopbackMaster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopbackMaster").field("address", &self.address()).finish_non_exhaustive()
    }
}

/// All that the master has seen, for [`LoopbackMaster::wait_until`].
#[derive(Debug, Default)]
pub struct Seen {
    received: Vec<Received>,
    /// Bytes of the bodies in `received`.
    bytes: usize,
    connections: Vec<ConnectionReport>,
    beats: u64,
    book: Book,
}

impl Seen {
    /// As [`LoopbackMaster::received`].
    pub fn received(&self) -> &[Received] {
        &self.received
    }

    /// As [`LoopbackMaster::connections`].
    pub fn connections(&self) -> &[ConnectionReport] {
        &self.connections
    }

    /// As [`LoopbackMaster::rows`].
    pub fn rows(&self) -> &[LifecycleRow] {
        &self.book.rows
    }

    /// As [`LoopbackMaster::shards`].
    pub fn shards(&self) -> &BTreeMap<String, Shard> {
        &self.book.shards
    }

    /// The beats that the master acted on since it was made, answered or not; refused ones do not count.
    pub fn beats(&self) -> u64 {
        self.beats
    }

    fn remember_request(&mut self, received: Received) {
        self.bytes += received.body.len();
        self.received.push(received);
        if self.received.len() >= 2 * limits::loopback::HISTORY || self.bytes > limits::loopback::HISTORY_BYTES {
            forget_older_half(&mut self.received);
            self.bytes = self.received.iter().map(|request| request.body.len()).sum();
        }
    }

    fn remember_connection(&mut self, report: ConnectionReport) {
        self.connections.push(report);
        if self.connections.len() >= 2 * limits::loopback::HISTORY {
            forget_older_half(&mut self.connections);
        }
    }
}

/// Half at once: a list that moved up with every request would cost more than the request.
fn forget_older_half<T>(list: &mut Vec<T>) {
    list.drain(..list.len() / 2);
}

/// A request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Received {
    /// When all of it had arrived.
    pub at: Instant,
    /// The [number](ConnectionReport::number) of the connection that it came by.
    pub connection: u64,
    /// `POST`, usually.
    pub method: String,
    /// The path, without a query.
    pub path: String,
    /// The headers in their order.
    pub headers: Vec<(String, String)>,
    /// The body's bytes; the first half under [`Fault::CutInBody`].
    pub body: Vec<u8>,
    /// The body as JSON, if it is any.
    pub json: Option<serde_json::Value>,
    /// The status that it was answered; `None` where a fault left out the answer.
    pub status: Option<u16>,
}

impl Received {
    /// The first header of this name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        fault::first_header(&self.headers, name)
    }
}

/// A connection.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionReport {
    /// Counted from 1.
    pub number: u64,
    /// When it was accepted.
    pub at: Instant,
    /// What TLS came to; `None` before the handshake is over, and where it failed.
    pub handshake: Option<Handshake>,
    /// Why it ended, if not in order: what was wrong with the client's certificate, say.
    pub failure: Option<String>,
    /// Requests that came by it.
    pub requests: usize,
    /// Whether it is open.
    pub open: bool,
}

/// What a TLS handshake came to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handshake {
    /// The version.
    pub version: TlsVersion,
    /// Whether it resumed an earlier session.
    pub resumed: bool,
    /// The client's certificate, also in a resumed session: SHA-256 of its DER, 64 lowercase hexadecimal digits.
    pub fingerprint: String,
    /// The name that the client asked for.
    pub server_name: Option<String>,
}

/// A TLS version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// An operation on one decky, as the master's `decky_lifecycle` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LifecycleRow {
    /// Counted from 1 in the order of opening.
    pub id: u64,
    /// The host that was asked for it.
    pub host_uuid: String,
    /// The decky's name.
    pub decky: String,
    /// `deploy` or `mutate`.
    pub operation: String,
    /// How it stands.
    pub status: RowStatus,
    /// What was reported as the error, at most 2,000 characters.
    pub error: Option<String>,
    /// When it ended by the worker's clock; by the master's if the worker did not say.
    pub completed_at: Option<SystemTime>,
}

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// It is open.
    Running,
    /// It was reported as succeeded.
    Succeeded,
    /// It was reported as failed.
    Failed,
}

/// A decky, as the master's `decky_shards` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shard {
    /// The host that reported it last.
    pub host_uuid: String,
    /// Its services.
    pub services: Vec<String>,
    /// How it was reported last.
    pub state: ShardState,
}

/// How a decky was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// It runs.
    Running,
    /// It does not, or `runtime` does not name it.
    Degraded,
}

/// A random uuid (version 4).
fn new_uuid() -> String {
    let bits = (fastrand::u128(..) & !(0xf000 << 64) & !(0xc000 << 48)) | (0x4000 << 64) | (0x8000 << 48);
    let hex = format!("{bits:032x}");
    let part = |from, to| hex.get(from..to).unwrap_or_default();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}
