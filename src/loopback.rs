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
mod example;
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
#[doc(hidden)]
pub use example::{Scratch, example};
pub use fault::{Answer, Effect, Fault};

use crate::credentials::enrolment::Enrolment;
use crate::error::Error;
use crate::limits;
use book::Book;
use server::{Running, Shared, State};

/// The master. Dropping it stops it.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::net::TcpStream;
/// # use decnet_heartbeat::loopback::LoopbackMaster;
/// let master = LoopbackMaster::start()?;
/// let address = master.address();
/// assert!(TcpStream::connect(address).is_ok());
/// drop(master);
/// assert!(TcpStream::connect(address).is_err());
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use decnet_heartbeat::loopback::{Authority, LoopbackMaster, Offered, Options, Role};
///
/// // A master that is older, and that an operator has given a certificate of his own.
/// let authority = Authority::new()?;
/// let master = LoopbackMaster::start_with(Options {
///     certificate: Some(authority.issue(Role::Named("master.lan".to_owned()))?),
///     authority: Some(authority),
///     offered: Offered::Tls12Only,
///     ..Options::default()
/// })?;
/// assert_ne!(master.certificate().fingerprint, LoopbackMaster::start()?.certificate().fingerprint);
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::Heartbeat;
/// # use decnet_heartbeat::loopback::{LoopbackMaster, Offered, Options, TlsVersion};
/// # const SOON: Duration = Duration::from_secs(10);
/// let options = Options { offered: Offered::Tls12Only, ..Options::default() };
/// let master = LoopbackMaster::start_with(options)?;
/// # let dir = tempfile::tempdir()?;
/// # let worker = master.enrol(dir.path())?;
/// # let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
/// assert!(master.wait_for_beats(1, SOON));
/// let handshake = master.connections().into_iter().find_map(|connection| connection.handshake);
/// assert_eq!(handshake.map(|handshake| handshake.version), Some(TlsVersion::Tls12));
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::loopback::LoopbackMaster;
/// # let dir = tempfile::tempdir()?;
/// # let master = LoopbackMaster::start()?;
/// let worker = master.enrol(dir.path())?;
/// assert!(worker.agent_dir.join("worker.key").exists());
/// assert_eq!((worker.port, worker.fingerprint.len()), (master.port(), 64));
/// # Ok(())
/// # }
/// ```
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
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::Heartbeat;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the agent dir has no name.
    pub fn enrolment(&self) -> Result<Enrolment, Error> {
        Enrolment::new(&self.uuid, Ipv4Addr::LOCALHOST.to_string(), &self.agent_dir)?
            .with_master_port(self.port)
    }

    /// Writes the worker's `decnet.ini` to `path`, as an enrolment bundle has it.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::EnrolmentSources;
    /// # let (dir, _master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let ini = dir.path().join("decnet.ini");
    /// worker.write_ini(&ini)?;
    /// // As the agent reads it: `DECNET_CONFIG`, or `--config`.
    /// let enrolment = EnrolmentSources::from_variables([("DECNET_CONFIG", &ini)]).read()?;
    /// assert_eq!(enrolment.host_uuid().value(), &worker.uuid);
    /// # Ok(())
    /// # }
    /// ```
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
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::LoopbackMaster;
    /// let (one, other) = (LoopbackMaster::start()?, LoopbackMaster::start()?);
    /// assert_ne!(one.port(), other.port()); // so tests may run side by side
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When no certificate can be made, no port be had, or no thread be started.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(Options::default())
    }

    /// A master with these options, on a free port below the ones that systems hand out.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::Heartbeat;
    /// # use decnet_heartbeat::loopback::{Authority, LoopbackMaster, Options, Role};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// let authority = Authority::new()?;
    /// let certificate = Some(authority.issue(Role::Expired)?);
    /// let options = Options { certificate, authority: Some(authority), ..Options::default() };
    /// let master = LoopbackMaster::start_with(options)?;
    /// # let dir = tempfile::tempdir()?;
    /// # let worker = master.enrol(dir.path())?;
    /// # let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
    /// # heartbeat.beats().recv_timeout(SOON)?;
    /// assert_eq!(heartbeat.stats().failure.map(|failure| failure.class).as_deref(), Some("tls"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`start`](Self::start), and when the certificates in the options cannot be used.
    pub fn start_with(options: Options) -> Result<Self, Error> {
        let authority = options.authority.map_or_else(Authority::new, Ok)?;
        let certificate = options.certificate.map_or_else(|| authority.issue(Role::Master), Ok)?;
        let client_ca = options.client_ca.unwrap_or_else(|| authority.certificate());
        let shared = Shared {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            idle: options.idle,
        };
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
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, mut master, _worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let port = master.port();
    /// master.stop();
    /// master.start_again()?;
    /// assert_eq!(master.port(), port);
    /// # Ok(())
    /// # }
    /// ```
    pub fn port(&self) -> u16 {
        self.port
    }

    /// 127.0.0.1 and the port.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, _worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// assert_eq!(master.address().to_string(), format!("127.0.0.1:{}", master.port()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Where heartbeats are posted to.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::LoopbackMaster;
    /// # let master = LoopbackMaster::start()?;
    /// assert_eq!(master.url(), format!("https://127.0.0.1:{}/swarm/heartbeat", master.port()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn url(&self) -> String {
        format!("https://{}/swarm/heartbeat", self.address())
    }

    /// The CA, for certificates of other roles.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::Role;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// // Another worker's certificate in this one's bundle: stolen, or put there by mistake.
    /// let sibling = master.authority().issue(Role::Worker("worker-02".to_owned()))?;
    /// master.authority().write_bundle(&sibling, &worker.agent_dir)?;
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(SOON, |seen| seen.received().iter().any(|beat| beat.status == Some(403))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The certificate that it presents.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::MasterIdentity;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let pinned: MasterIdentity = format!("sha256:{}", master.certificate().fingerprint).parse()?;
    /// let heartbeat = builder.master_identity(pinned).start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// # Ok(())
    /// # }
    /// ```
    pub fn certificate(&self) -> &Issued {
        &self.certificate
    }

    // ---- who is enrolled ------------------------------------------------------------------------

    /// Enrols a new worker: issues a certificate, pins it to a new host uuid and writes the bundle into `agent_dir`.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::LoopbackMaster;
    /// # let dir = tempfile::tempdir()?;
    /// # let master = LoopbackMaster::start()?;
    /// let (one, other) = (master.enrol(&dir.path().join("one"))?, master.enrol(&dir.path().join("other"))?);
    /// assert_ne!((&one.uuid, &one.fingerprint), (&other.uuid, &other.fingerprint));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When no certificate can be made or the bundle cannot be written.
    pub fn enrol(&self, agent_dir: &Path) -> Result<Enrolled, Error> {
        self.re_enrol(&new_uuid(), agent_dir)
    }

    /// Pins a fresh certificate to this host uuid, known or not, and writes the bundle into `agent_dir`. From then on
    /// a worker that shows the old certificate is answered 403.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// # assert!(master.wait_for_beats(1, SOON));
    /// let again = master.re_enrol(&worker.uuid, &worker.agent_dir)?;
    /// // The agent is not restarted, and shows the new certificate.
    /// assert!(master.wait_until(SOON, |seen| {
    ///     let shown = seen.connections().last().and_then(|connection| connection.handshake.as_ref());
    ///     shown.is_some_and(|handshake| handshake.fingerprint == again.fingerprint)
    /// }));
    /// # Ok(())
    /// # }
    /// ```
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
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// master.pin(&worker.uuid, &"0".repeat(64)); // somebody else's
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(SOON, |seen| seen.received().iter().any(|beat| beat.status == Some(403))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn pin(&self, uuid: &str, fingerprint: &str) {
        self.shared.lock().seen.book.pin(uuid, fingerprint);
    }

    /// Forgets a host: from then on it is answered 404.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// master.decommission(&worker.uuid);
    /// assert!(master.wait_until(SOON, |seen| seen.received().iter().any(|beat| beat.status == Some(404))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn decommission(&self, uuid: &str) {
        self.shared.lock().seen.book.unpin(uuid);
    }

    // ---- operations -----------------------------------------------------------------------------

    /// Opens a row, as the master does when it sends an operation (`deploy` or `mutate`) to a worker; its id.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # let (_dir, master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let id = master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// assert_eq!((id, master.rows()[0].status), (1, RowStatus::Running)); // until the worker reports
    /// # Ok(())
    /// # }
    /// ```
    pub fn open_operation(&self, uuid: &str, decky: &str, operation: &str) -> u64 {
        self.shared.lock().seen.book.open(uuid, decky, operation)
    }

    /// All rows, oldest first.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # use decnet_heartbeat::{LifecycleDelta, Operation};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// master.open_operation(&worker.uuid, "decky-01", "deploy"); // once more, before the first has ended
    /// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[1].status == RowStatus::Succeeded));
    /// assert_eq!(master.rows()[0].status, RowStatus::Running); // a delta closes the newest open row
    /// # Ok(())
    /// # }
    /// ```
    pub fn rows(&self) -> Vec<LifecycleRow> {
        self.shared.lock().seen.rows().to_vec()
    }

    /// What is known of the deckies, by name.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::ShardState;
    /// # use decnet_heartbeat::Snapshot;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let decky = serde_json::json!({
    /// #     "name": "decky-01", "ip": "10.0.0.7", "services": ["ssh"],
    /// #     "distro": "debian", "base_image": "debian:12", "hostname": "files",
    /// # });
    /// // A decky, and no word on its services in `runtime`.
    /// let status = serde_json::json!({"deployed": true, "deckies": [decky], "runtime": {}});
    /// let heartbeat = builder.status_source(move || Snapshot::new(&status)).start()?;
    /// assert!(master.wait_until(SOON, |seen| !seen.shards().is_empty()));
    /// assert_eq!(master.shards()["decky-01"].state, ShardState::Degraded);
    /// # Ok(())
    /// # }
    /// ```
    pub fn shards(&self) -> BTreeMap<String, Shard> {
        self.shared.lock().seen.shards().clone()
    }

    // ---- what has come in -----------------------------------------------------------------------

    /// The requests, oldest first. From 20,000 requests or 256 MiB on the older half is forgotten.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// let beat = &master.received()[0];
    /// assert_eq!((beat.method.as_str(), beat.path.as_str(), beat.status), ("POST", "/swarm/heartbeat", Some(204)));
    /// assert_eq!(beat.json.as_ref().ok_or("no JSON")?["host_uuid"], *worker.uuid);
    /// # Ok(())
    /// # }
    /// ```
    pub fn received(&self) -> Vec<Received> {
        self.shared.lock().seen.received().to_vec()
    }

    /// The requests, oldest first, which it then forgets: for a test that goes on for longer than it remembers.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// let bytes: usize = master.take_received().iter().map(|beat| beat.body.len()).sum();
    /// assert!(bytes > 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_received(&self) -> Vec<Received> {
        let mut state = self.shared.lock();
        state.seen.bytes = 0;
        std::mem::take(&mut state.seen.received)
    }

    /// The connections, oldest first. From 20,000 on the older half is forgotten.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(3, SOON));
    /// assert!(master.connections().len() < 3); // kept open from beat to beat
    /// # Ok(())
    /// # }
    /// ```
    pub fn connections(&self) -> Vec<ConnectionReport> {
        self.shared.lock().seen.connections().to_vec()
    }

    /// Waits until `done` holds, at most `timeout`; whether it came to hold. `done` is asked at every change, with the
    /// master standing still: it must not call the master.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// // A beat that came with the reason why nothing is known.
    /// let came = master.wait_until(SOON, |seen| {
    ///     seen.received().iter().filter_map(|beat| beat.json.as_ref()).any(|beat| beat["status"]["error"].is_string())
    /// });
    /// assert!(came);
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_until(&self, timeout: Duration, mut done: impl FnMut(&Seen) -> bool) -> bool {
        self.shared.wait(timeout, |state| done(&state.seen))
    }

    /// Waits until `count` beats were accepted since the master was made, at most `timeout`; whether they were.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// assert!(!master.wait_for_beats(1, Duration::ZERO)); // nobody has started yet
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_for_beats(&self, count: u64, timeout: Duration) -> bool {
        self.wait_until(timeout, |seen| seen.beats() >= count)
    }

    // ---- what goes wrong ------------------------------------------------------------------------

    /// Adds faults to the script: each takes effect once, in this order. After the last, service is normal.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::{Answer, Effect, Fault};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// master.script([Answer::status(503).into(), Fault::CutInBody, Fault::CutAfterBody(Effect::Lost)]);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// assert_eq!(master.faults_left(), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        let faults: Vec<Fault> = faults.into_iter().collect();
        self.shared.lock().script.extend(faults);
    }

    /// The fault that takes effect whenever the script is empty; `None` for normal service.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::{Answer, Seen};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// master.always(Some(Answer::status(500).into()));
    /// let refused = |seen: &Seen| seen.received().iter().filter(|beat| beat.status == Some(500)).count();
    /// assert!(master.wait_until(SOON, |seen| refused(seen) > 2));
    /// master.always(None);
    /// assert!(master.wait_until(SOON, |seen| seen.received().last().is_some_and(|beat| beat.status == Some(204))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn always(&self, fault: Option<Fault>) {
        self.shared.lock().always = fault;
    }

    /// Faults in the script that have not taken effect.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::loopback::{Fault, LoopbackMaster};
    /// # let master = LoopbackMaster::start()?;
    /// master.script([Fault::NeverHandshake, Fault::CutInBody]);
    /// assert_eq!(master.faults_left(), 2); // nobody has come yet
    /// # Ok(())
    /// # }
    /// ```
    pub fn faults_left(&self) -> usize {
        self.shared.lock().script.len()
    }

    /// The outage: connections are cut, new ones are refused. Bounded, and without effect on a stopped master.
    ///
    /// The CA, the pins, the rows, the script and what was received stay.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::{io::ErrorKind, net::TcpStream};
    /// # use decnet_heartbeat::loopback::LoopbackMaster;
    /// # let mut master = LoopbackMaster::start()?;
    /// let address = master.address();
    /// master.stop();
    /// let error = TcpStream::connect(address).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    /// # Ok(())
    /// # }
    /// ```
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
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, mut master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// let address = master.address();
    /// master.stop();
    /// master.start_again()?;
    /// assert_eq!(master.address(), address);
    /// let before = master.received().len();
    /// assert!(master.wait_until(SOON, |seen| seen.received().len() > before)); // the agent has found it again
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the port was taken meanwhile, or no thread can be started.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if self.accepting.is_some() {
            return Ok(());
        }
        let cannot = |doing: &str, cause: std::io::Error| Error::loopback(doing).with_source(cause);
        let tls = certificates::server_config(&self.certificate, &self.client_ca, self.offered)?;
        let listener =
            self.listen().map_err(|cause| cannot("cannot listen on 127.0.0.1", cause))?;
        self.port =
            listener.local_addr().map_err(|cause| cannot("cannot tell its port", cause))?.port();
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
        let bind =
            |_| TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(limits::loopback::PORTS)));
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// // All of it as of one moment, which calls of `received` and `rows` in turn would not be.
/// assert!(master.wait_until(SOON, |seen| seen.beats() >= 1 && seen.received().len() >= 1 && seen.rows().is_empty()));
/// # Ok(())
/// # }
/// ```
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
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let soon = std::time::Duration::from_secs(10);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(soon, |seen| seen.received().iter().any(|beat| beat.status == Some(204))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn received(&self) -> &[Received] {
        &self.received
    }

    /// As [`LoopbackMaster::connections`].
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let soon = std::time::Duration::from_secs(10);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(soon, |seen| seen.connections().iter().any(|one| one.handshake.is_some())));
    /// # Ok(())
    /// # }
    /// ```
    pub fn connections(&self) -> &[ConnectionReport] {
        &self.connections
    }

    /// As [`LoopbackMaster::rows`].
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// # let soon = std::time::Duration::from_secs(10);
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// assert!(master.wait_until(soon, |seen| seen.rows().len() == 1));
    /// # Ok(())
    /// # }
    /// ```
    pub fn rows(&self) -> &[LifecycleRow] {
        &self.book.rows
    }

    /// As [`LoopbackMaster::shards`].
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let soon = std::time::Duration::from_secs(10);
    /// use decnet_heartbeat::Snapshot;
    /// use serde_json::json;
    ///
    /// // What is missing from `runtime` is written down as degraded.
    /// let decky = json!({"name": "decky-01", "services": ["ssh"], "ip": "10.0.0.7", "distro": "debian",
    ///     "base_image": "debian:12", "hostname": "files"});
    /// let status = move || Snapshot::new(&json!({"deployed": true, "deckies": [decky.clone()], "runtime": {}}));
    /// let heartbeat = builder.status_source(status).start()?;
    /// assert!(master.wait_until(soon, |seen| seen.shards().contains_key("decky-01")));
    /// # Ok(())
    /// # }
    /// ```
    pub fn shards(&self) -> &BTreeMap<String, Shard> {
        &self.book.shards
    }

    /// The beats that the master acted on since it was made, answered or not; refused ones do not count.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::Answer;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// master.script([Answer::status(503).into()]);
    /// let heartbeat = builder.start()?;
    /// // The first was refused, and does not count.
    /// assert!(master.wait_until(SOON, |seen| seen.beats() >= 1 && seen.received().len() >= 2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn beats(&self) -> u64 {
        self.beats
    }

    fn remember_request(&mut self, received: Received) {
        self.bytes += received.body.len();
        self.received.push(received);
        if self.received.len() >= 2 * limits::loopback::HISTORY
            || self.bytes > limits::loopback::HISTORY_BYTES
        {
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// assert!(master.wait_for_beats(1, SOON));
/// let beat = &master.received()[0];
/// assert_eq!(beat.header("Content-Type"), Some("application/json"));
/// assert_eq!(beat.header("Content-Length"), Some(beat.body.len().to_string().as_str()));
/// # Ok(())
/// # }
/// ```
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
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let soon = std::time::Duration::from_secs(10);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, soon));
    /// assert_eq!(master.received()[0].header("Content-Type"), Some("application/json"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn header(&self, name: &str) -> Option<&str> {
        fault::first_header(&self.headers, name)
    }
}

/// A connection.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::MasterIdentity;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let heartbeat = builder.master_identity(MasterIdentity::Fingerprint([0; 32])).start()?; // another master's
/// assert!(master.wait_until(SOON, |seen| seen.connections().iter().any(|connection| connection.failure.is_some())));
/// let connection = &master.connections()[0];
/// assert_eq!((connection.number, connection.requests), (1, 0)); // not a byte of a beat was sent
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::TlsVersion;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// assert!(master.wait_for_beats(1, SOON));
/// let handshake = master.connections()[0].handshake.clone().ok_or("no handshake")?;
/// assert_eq!((handshake.version, handshake.resumed), (TlsVersion::Tls13, false));
/// assert_eq!(handshake.fingerprint, worker.fingerprint);
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::loopback::TlsVersion;
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let soon = std::time::Duration::from_secs(10);
/// let heartbeat = builder.start()?;
/// assert!(master.wait_for_beats(1, soon));
/// let version = master.connections()[0].handshake.as_ref().map(|handshake| handshake.version);
/// assert_eq!(version, Some(TlsVersion::Tls13));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// An operation on one decky, as the master's `decky_lifecycle` has it.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::RowStatus;
/// # use decnet_heartbeat::{LifecycleDelta, Operation};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// master.open_operation(&worker.uuid, "decky-01", "mutate");
/// heartbeat.deltas().push(LifecycleDelta::failed("decky-01", Operation::Mutate, "no such service"))?;
/// assert!(master.wait_until(SOON, |seen| seen.rows()[0].completed_at.is_some()));
/// let row = &master.rows()[0];
/// assert_eq!((row.decky.as_str(), row.status), ("decky-01", RowStatus::Failed));
/// assert_eq!(row.error.as_deref(), Some("no such service"));
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::RowStatus;
/// # use decnet_heartbeat::Operation;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// # master.open_operation(&worker.uuid, "decky-01", "deploy");
/// assert_eq!(master.rows()[0].status, RowStatus::Running);
/// heartbeat.run(Operation::Deploy, ["decky-01"], || Ok::<(), std::io::Error>(()))?;
/// assert!(master.wait_until(SOON, |seen| seen.rows()[0].status != RowStatus::Running));
/// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::ShardState;
/// # use decnet_heartbeat::Snapshot;
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let decky = serde_json::json!({
/// #     "name": "decky-01", "ip": "10.0.0.7", "services": ["ssh"],
/// #     "distro": "debian", "base_image": "debian:12", "hostname": "files",
/// # });
/// let runtime = serde_json::json!({"decky-01": {"running": true, "services": {"ssh": "running"}}});
/// let status = serde_json::json!({"deployed": true, "deckies": [decky], "runtime": runtime});
/// let heartbeat = builder.status_source(move || Snapshot::new(&status)).start()?;
/// assert!(master.wait_until(SOON, |seen| !seen.shards().is_empty()));
/// let shard = &master.shards()["decky-01"];
/// assert_eq!((&shard.host_uuid, shard.state), (&worker.uuid, ShardState::Running));
/// # Ok(())
/// # }
/// ```
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
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::loopback::ShardState;
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let soon = std::time::Duration::from_secs(10);
/// use decnet_heartbeat::Snapshot;
/// use serde_json::json;
///
/// // What is missing from `runtime` is written down as degraded.
/// let decky = json!({"name": "decky-01", "services": ["ssh"], "ip": "10.0.0.7", "distro": "debian",
///     "base_image": "debian:12", "hostname": "files"});
/// let status = move || Snapshot::new(&json!({"deployed": true, "deckies": [decky.clone()], "runtime": {}}));
/// let heartbeat = builder.status_source(status).start()?;
/// assert!(master.wait_until(soon, |seen| {
///     seen.shards().get("decky-01").is_some_and(|shard| shard.state == ShardState::Degraded)
/// }));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// It runs.
    Running,
    /// It does not, or `runtime` does not name it.
    Degraded,
}

/// A random uuid (version 4).
fn new_uuid() -> String {
    let bits =
        (fastrand::u128(..) & !(0xf000 << 64) & !(0xc000 << 48)) | (0x4000 << 64) | (0x8000 << 48);
    let hex = format!("{bits:032x}");
    let part = |from, to| hex.get(from..to).unwrap_or_default();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}
