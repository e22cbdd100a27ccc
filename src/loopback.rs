//! A DECNET master on 127.0.0.1 with its own CA, for the demo, tests, benches and embedders' tests.
//!
//! It answers `POST /swarm/heartbeat` as the real master does, applies its rules to operations and
//! deckies, records its requests, and can be [scripted](LoopbackMaster::script) to fail. It runs on
//! its own threads, one that accepts and one for each connection. All of them end when it is
//! stopped or dropped.
//!
//! ```
//! use decnet_heartbeat::Heartbeat;
//! use decnet_heartbeat::loopback::LoopbackMaster;
//!
//! # let agent_dir = tempfile::tempdir()?;
//! let master = LoopbackMaster::start()?;
//! let worker = master.enrol(agent_dir.path())?;
//! let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
//! assert!(master.wait_for_beats(1, std::time::Duration::from_secs(5)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! It does not implement chunked request bodies (it answers 411), orders to build a topology again,
//! other paths (it answers 404), and the 500 that the real master answers to a `runtime` of the
//! wrong type.

mod certificates;
mod database;
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
pub use example::{Scratch, example, example_heartbeat};
pub use fault::{Answer, Effect, Fault};

use crate::credentials::enrolment::Enrolment;
use crate::error::Error;
use crate::limits;
use database::Database;
use server::{Shared, State, ThreadCount};

/// A running master. Dropping it stops it.
///
/// ```
/// use std::net::TcpStream;
/// use decnet_heartbeat::loopback::LoopbackMaster;
///
/// let master = LoopbackMaster::start()?;
/// let address = master.address();
/// assert!(TcpStream::connect(address).is_ok());
/// drop(master);
/// assert!(TcpStream::connect(address).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LoopbackMaster {
    authority: Authority,
    certificate: Issued,
    client_ca: String,
    offered: Offered,
    port: u16,
    shared: Arc<Shared>,
    /// The accept thread. `None`: the master is stopped.
    accepting: Option<JoinHandle<()>>,
    /// The worker's folder in an example. It is removed with the master.
    scratch: Option<Scratch>,
}

/// The options of a master. The defaults are those of a fresh installation.
///
/// ```
/// use decnet_heartbeat::loopback::{Authority, LoopbackMaster, Offered, Options, Role};
///
/// // An older master with a certificate for its host name.
/// let authority = Authority::new()?;
/// let master = LoopbackMaster::start_with(Options {
///     certificate: Some(authority.issue(Role::Named("master.lan".to_owned()))?),
///     authority: Some(authority),
///     offered: Offered::Tls12Only,
///     ..Options::default()
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    /// The CA that enrols workers. Default: a new one.
    pub authority: Option<Authority>,
    /// The certificate that the master presents. Default: [`Role::Master`] of the authority.
    pub certificate: Option<Issued>,
    /// The CA that client certificates must chain to, in PEM. Default: the authority's.
    pub client_ca: Option<String>,
    /// The TLS versions that the master offers. Default: 1.2 and 1.3.
    pub offered: Offered,
    /// How long a connection may be idle before it is closed. Default: 5 s, as under uvicorn.
    pub idle: Duration,
}

/// The TLS versions that a master offers.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::Heartbeat;
/// use decnet_heartbeat::loopback::{LoopbackMaster, Offered, Options, TlsVersion};
///
/// let options = Options { offered: Offered::Tls12Only, ..Options::default() };
/// let master = LoopbackMaster::start_with(options)?;
/// # let dir = tempfile::tempdir()?;
/// let worker = master.enrol(dir.path())?;
/// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
/// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
/// let handshake = master.connections().into_iter().find_map(|connection| connection.handshake);
/// assert_eq!(handshake.map(|handshake| handshake.version), Some(TlsVersion::Tls12));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offered {
    /// Both, as the real master does.
    #[default]
    Tls12And13,
    /// Only 1.2, as an older master does.
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

/// An enrolled worker, with its bundle in a folder.
///
/// ```
/// use decnet_heartbeat::loopback::LoopbackMaster;
///
/// # let dir = tempfile::tempdir()?;
/// let master = LoopbackMaster::start()?;
/// let worker = master.enrol(dir.path())?;
/// assert!(worker.agent_dir.join("worker.key").exists());
/// assert_eq!((worker.port, worker.fingerprint.len()), (master.port(), 64));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Enrolled {
    /// The host uuid.
    pub uuid: String,
    /// SHA-256 of the pinned certificate's DER in 64 lowercase hexadecimal digits.
    pub fingerprint: String,
    /// The master's port on 127.0.0.1.
    pub port: u16,
    /// The folder with `ca.crt`, `worker.crt` and `worker.key`.
    pub agent_dir: PathBuf,
}

impl Enrolled {
    /// The enrolment for a heartbeat of this worker.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Heartbeat;
    ///
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The agent dir is empty.
    pub fn enrolment(&self) -> Result<Enrolment, Error> {
        Enrolment::new(&self.uuid, Ipv4Addr::LOCALHOST.to_string(), &self.agent_dir)?
            .with_master_port(self.port)
    }

    /// Writes the worker's `decnet.ini` to `path`, as in an enrolment bundle.
    ///
    /// ```
    /// use decnet_heartbeat::EnrolmentSources;
    ///
    /// # let (dir, _master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let ini = dir.path().join("decnet.ini");
    /// worker.write_ini(&ini)?;
    /// let enrolment = EnrolmentSources::from_variables([("DECNET_CONFIG", &ini)]).read()?;
    /// assert_eq!(enrolment.host_uuid().value(), &worker.uuid);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_ini(&self, path: &Path) -> Result<(), Error> {
        certificates::write_file(path, &self.ini(), 0o644)
    }
}

impl LoopbackMaster {
    /// Starts a master with the default options, on a free port below the ephemeral ports.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::LoopbackMaster;
    ///
    /// let first = LoopbackMaster::start()?;
    /// let second = LoopbackMaster::start()?;
    /// assert_ne!(first.port(), second.port()); // tests can run in parallel
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A certificate or a thread cannot be created, or no port is free.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(Options::default())
    }

    /// Starts a master with these options, on a free port below the ephemeral ports.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Heartbeat;
    /// use decnet_heartbeat::loopback::{Authority, LoopbackMaster, Options, Role};
    ///
    /// let authority = Authority::new()?;
    /// let certificate = Some(authority.issue(Role::Expired)?);
    /// let options = Options { certificate, authority: Some(authority), ..Options::default() };
    /// let master = LoopbackMaster::start_with(options)?;
    /// # let dir = tempfile::tempdir()?;
    /// let worker = master.enrol(dir.path())?;
    /// let heartbeat = Heartbeat::builder().enrolment(worker.enrolment()?).start()?;
    /// heartbeat.beats().recv_timeout(Duration::from_secs(10))?;
    /// assert_eq!(heartbeat.stats().failure.map(|failure| failure.class).as_deref(), Some("tls"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`start`](Self::start). Or a certificate in the options cannot be used.
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
            scratch: None,
        };
        master.start_again()?;
        Ok(master)
    }

    /// The port. It stays the same after [`stop`](Self::stop) and
    /// [`start_again`](Self::start_again).
    ///
    /// ```
    /// # let (_dir, mut master, _worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let port = master.port();
    /// master.stop();
    /// master.start_again()?;
    /// assert_eq!(master.port(), port);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn port(&self) -> u16 {
        self.port
    }

    /// 127.0.0.1 and the port.
    ///
    /// ```
    /// # let (_dir, master, _worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// assert_eq!(master.address().to_string(), format!("127.0.0.1:{}", master.port()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// The URL that heartbeats are posted to.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::LoopbackMaster;
    ///
    /// # let master = LoopbackMaster::start()?;
    /// assert_eq!(master.url(), format!("https://127.0.0.1:{}/swarm/heartbeat", master.port()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn url(&self) -> String {
        format!("https://{}/swarm/heartbeat", self.address())
    }

    /// The master's CA, to issue certificates for other roles.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::Role;
    ///
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// // Another worker's certificate in this worker's bundle.
    /// let sibling = master.authority().issue(Role::Worker("worker-02".to_owned()))?;
    /// master.authority().write_bundle(&sibling, &worker.agent_dir)?;
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.received().iter().any(|beat| beat.status == Some(403))
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The certificate that the master presents.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::MasterIdentity;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let fingerprint = &master.certificate().fingerprint;
    /// let pinned: MasterIdentity = format!("sha256:{fingerprint}").parse()?;
    /// let heartbeat = builder.master_identity(pinned).start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn certificate(&self) -> &Issued {
        &self.certificate
    }

    /// Enrols a new worker: issues a certificate, pins it to a new host uuid, and writes the bundle
    /// to `agent_dir`.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::LoopbackMaster;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let master = LoopbackMaster::start()?;
    /// let first = master.enrol(&dir.path().join("first"))?;
    /// let second = master.enrol(&dir.path().join("second"))?;
    /// assert_ne!(first.uuid, second.uuid);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The certificate cannot be created, or the bundle cannot be written.
    pub fn enrol(&self, agent_dir: &Path) -> Result<Enrolled, Error> {
        self.re_enrol(&new_uuid(), agent_dir)
    }

    /// Pins a new certificate to this host uuid, and writes the bundle to `agent_dir`. Requests
    /// with the old certificate are answered 403 from then on.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// let worker = master.re_enrol(&worker.uuid, &worker.agent_dir)?;
    /// // The heartbeat uses the new certificate without a restart.
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     let mut handshakes = seen.connections().iter().filter_map(|it| it.handshake.as_ref());
    ///     handshakes.any(|handshake| handshake.fingerprint == worker.fingerprint)
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`enrol`](Self::enrol).
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

    /// Pins the certificate with this SHA-256 (hexadecimal) to a host uuid.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// master.pin(&worker.uuid, &"0".repeat(64)); // another certificate
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.received().iter().any(|beat| beat.status == Some(403))
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pin(&self, uuid: &str, fingerprint: &str) {
        self.shared.lock().seen.database.pin(uuid, fingerprint);
    }

    /// Removes a host. Its requests are answered 404 from then on.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.decommission(&worker.uuid);
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.received().iter().any(|beat| beat.status == Some(404))
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn decommission(&self, uuid: &str) {
        self.shared.lock().seen.database.unpin(uuid);
    }

    /// Opens a row, as the master does when it sends an operation (`deploy` or `mutate`) to a
    /// worker. Returns the row's id.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::RowStatus;
    ///
    /// # let (_dir, master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// let id = master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// assert_eq!(id, 1);
    /// assert_eq!(master.rows()[0].status, RowStatus::Running); // until the worker reports
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_operation(&self, uuid: &str, decky: &str, operation: &str) -> u64 {
        self.shared.lock().seen.database.open(uuid, decky, operation)
    }

    /// All rows. The oldest comes first.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::RowStatus;
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.rows()[1].status == RowStatus::Succeeded
    /// }));
    /// // A delta closes the newest open row.
    /// assert_eq!(master.rows()[0].status, RowStatus::Running);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rows(&self) -> Vec<LifecycleRow> {
        self.shared.lock().seen.rows().to_vec()
    }

    /// The reported deckies, by name.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Snapshot;
    /// use decnet_heartbeat::loopback::ShardState;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let decky = serde_json::json!({
    ///     "name": "decky-01", "ip": "10.0.0.7", "services": ["ssh"],
    ///     "distro": "debian", "base_image": "debian:12", "hostname": "files",
    /// });
    /// // The decky is not in `runtime`, so it is degraded.
    /// let status = serde_json::json!({"deployed": true, "deckies": [decky], "runtime": {}});
    /// let heartbeat = builder.status_source(move || Snapshot::new(&status)).start()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| !seen.shards().is_empty()));
    /// assert_eq!(master.shards()["decky-01"].state, ShardState::Degraded);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn shards(&self) -> BTreeMap<String, Shard> {
        self.shared.lock().seen.shards().clone()
    }

    /// The requests. The oldest comes first. At 20,000 requests or 256 MiB the older half is
    /// removed.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// let beat = &master.received()[0];
    /// assert_eq!(beat.path, "/swarm/heartbeat");
    /// assert_eq!(beat.status, Some(204));
    /// assert_eq!(beat.json.as_ref().ok_or("no JSON")?["host_uuid"], *worker.uuid);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn received(&self) -> Vec<Received> {
        self.shared.lock().seen.received().to_vec()
    }

    /// Returns the requests, the oldest first, and removes them, for tests with many requests.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// let bytes: usize = master.take_received().iter().map(|beat| beat.body.len()).sum();
    /// assert!(bytes > 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn take_received(&self) -> Vec<Received> {
        let mut state = self.shared.lock();
        state.seen.bytes = 0;
        std::mem::take(&mut state.seen.received)
    }

    /// The connections. The oldest comes first. At 20,000 the older half is removed.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_for_beats(3, Duration::from_secs(10)));
    /// assert!(master.connections().len() < 3); // beats reuse the connection
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn connections(&self) -> Vec<ConnectionReport> {
        self.shared.lock().seen.connections().to_vec()
    }

    /// Waits up to `timeout` until `done` returns true. Returns whether it did. `done` is called at
    /// every change, under the master's lock, so it must not call the master.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let has_error = master.wait_until(Duration::from_secs(10), |seen| {
    ///     let mut beats = seen.received().iter().filter_map(|beat| beat.json.as_ref());
    ///     beats.any(|beat| beat["status"]["error"].is_string())
    /// });
    /// assert!(has_error);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_until(&self, timeout: Duration, mut done: impl FnMut(&Seen) -> bool) -> bool {
        self.shared.wait(timeout, |state| done(&state.seen))
    }

    /// Waits up to `timeout` until `count` beats were applied since the master was created. Returns
    /// whether they were.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// assert!(!master.wait_for_beats(1, Duration::ZERO));
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_for_beats(&self, count: u64, timeout: Duration) -> bool {
        self.wait_until(timeout, |seen| seen.beats() >= count)
    }

    /// Adds faults to the script. Each takes effect once, in this order. After the last one
    /// requests are served normally.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::{Answer, Effect, Fault};
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let busy = Answer::status(503).into();
    /// master.script([busy, Fault::CutInBody, Fault::CutAfterBody(Effect::Lost)]);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// assert_eq!(master.faults_left(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        let faults: Vec<Fault> = faults.into_iter().collect();
        self.shared.lock().script.extend(faults);
    }

    /// Sets the fault that takes effect while the script is empty. `None`: requests are served
    /// normally.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::{Answer, Seen};
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.always(Some(Answer::status(500).into()));
    /// let failed = |seen: &Seen| {
    ///     seen.received().iter().filter(|beat| beat.status == Some(500)).count()
    /// };
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| failed(seen) > 2));
    /// master.always(None);
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.received().last().is_some_and(|beat| beat.status == Some(204))
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn always(&self, fault: Option<Fault>) {
        self.shared.lock().always = fault;
    }

    /// The number of faults in the script that have not taken effect.
    ///
    /// ```
    /// use decnet_heartbeat::loopback::{Fault, LoopbackMaster};
    ///
    /// # let master = LoopbackMaster::start()?;
    /// master.script([Fault::NeverHandshake, Fault::CutInBody]);
    /// assert_eq!(master.faults_left(), 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn faults_left(&self) -> usize {
        self.shared.lock().script.len()
    }

    /// Begins an outage: connections are cut, and new ones are refused. The CA, the pins, the rows,
    /// the script and the recorded requests stay. This has no effect on a stopped master.
    ///
    /// ```
    /// use std::{io::ErrorKind, net::TcpStream};
    /// use decnet_heartbeat::loopback::LoopbackMaster;
    ///
    /// # let mut master = LoopbackMaster::start()?;
    /// let address = master.address();
    /// master.stop();
    /// let error = TcpStream::connect(address).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.cut_all();
        // Wakes the accept thread. An error means that the thread and its listener are gone.
        drop(TcpStream::connect_timeout(&self.address(), limits::loopback::LINGER));
        if self.shared.wait(limits::loopback::STOP, |state| state.threads == 0) {
            // The thread has ended. An error means that it panicked, which closes the listener,
            // too.
            let _ = accepting.join();
        }
    }

    /// Ends an outage, on the same port. Earlier TLS sessions are not resumed, as after a restart
    /// of uvicorn. This has no effect on a running master.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (mut master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let address = master.address();
    /// master.stop();
    /// master.start_again()?;
    /// assert_eq!(master.address(), address);
    /// let before = master.received().len();
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| seen.received().len() > before));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Another process uses the port now, or a thread cannot be created.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if self.accepting.is_some() {
            return Ok(());
        }
        let error =
            |problem: &str, cause: std::io::Error| Error::loopback(problem).with_source(cause);
        let tls = certificates::server_config(&self.certificate, &self.client_ca, self.offered)?;
        let listener = self.listen().map_err(|cause| error("cannot listen on 127.0.0.1", cause))?;
        self.port =
            listener.local_addr().map_err(|cause| error("cannot read its port", cause))?.port();
        self.shared.lock().stopping = false;
        let thread_count = ThreadCount::new(&self.shared);
        let shared = Arc::clone(&self.shared);
        let accept = move || {
            server::accept(&listener, &tls, &shared);
            drop(listener);
            // Dropped last, because a stop relies on the closed listener.
            drop(thread_count);
        };
        let accepting = thread::Builder::new().name("loopback-accept".into()).spawn(accept);
        self.accepting = Some(accepting.map_err(|cause| Error::thread("loopback-accept", cause))?);
        Ok(())
    }
}

impl LoopbackMaster {
    /// Listens on the master's port, or chooses one. The port is below the ephemeral ports, so that
    /// during an outage the system gives it to no other socket, such as that of a client that tries
    /// to connect to it.
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
        let mut attempts = (0..limits::loopback::PORTS_TRIED).map(bind);
        attempts.find(Result::is_ok).unwrap_or_else(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
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

/// Everything that the master has recorded, for [`LoopbackMaster::wait_until`].
///
/// ```
/// use std::time::Duration;
///
/// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// // The values are consistent, unlike those of several calls on the master.
/// assert!(master.wait_until(Duration::from_secs(10), |seen| {
///     seen.beats() >= 1 && seen.received().len() >= 1 && seen.rows().is_empty()
/// }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Seen {
    received: Vec<Received>,
    /// Bytes of the bodies in `received`.
    bytes: usize,
    connections: Vec<ConnectionReport>,
    beats: u64,
    database: Database,
}

impl Seen {
    /// As [`LoopbackMaster::received`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| !seen.received().is_empty()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn received(&self) -> &[Received] {
        &self.received
    }

    /// As [`LoopbackMaster::connections`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| !seen.connections().is_empty()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn connections(&self) -> &[ConnectionReport] {
        &self.connections
    }

    /// As [`LoopbackMaster::rows`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (_dir, master, worker, _builder) = decnet_heartbeat::loopback::example()?;
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| seen.rows().len() == 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rows(&self) -> &[LifecycleRow] {
        &self.database.rows
    }

    /// As [`LoopbackMaster::shards`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let master = decnet_heartbeat::loopback::LoopbackMaster::start()?;
    /// assert!(master.wait_until(Duration::ZERO, |seen| seen.shards().is_empty()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn shards(&self) -> &BTreeMap<String, Shard> {
        &self.database.shards
    }

    /// The number of beats that were applied since the master was created, answered or not.
    /// Rejected ones do not count.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::loopback::Answer;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// master.script([Answer::status(503).into()]);
    /// let heartbeat = builder.start()?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.beats() >= 1 && seen.received().len() >= 2
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn beats(&self) -> u64 {
        self.beats
    }

    fn record_request(&mut self, received: Received) {
        self.bytes += received.body.len();
        self.received.push(received);
        if self.received.len() >= 2 * limits::loopback::HISTORY
            || self.bytes > limits::loopback::HISTORY_BYTES
        {
            remove_older_half(&mut self.received);
            self.bytes = self.received.iter().map(|request| request.body.len()).sum();
        }
    }

    fn record_connection(&mut self, report: ConnectionReport) {
        self.connections.push(report);
        if self.connections.len() >= 2 * limits::loopback::HISTORY {
            remove_older_half(&mut self.connections);
        }
    }
}

/// Removes half at once, because moving the list with every request would cost more than the
/// request.
fn remove_older_half<T>(list: &mut Vec<T>) {
    list.drain(..list.len() / 2);
}

/// A recorded request.
///
/// ```
/// use std::time::Duration;
///
/// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
/// let beat = &master.received()[0];
/// assert_eq!(beat.header("Content-Type"), Some("application/json"));
/// assert_eq!(beat.header("Content-Length"), Some(beat.body.len().to_string().as_str()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Received {
    /// When it was complete.
    pub at: Instant,
    /// The [number](ConnectionReport::number) of its connection.
    pub connection: u64,
    /// The method, which is `POST` for beats.
    pub method: String,
    /// The path, without a query.
    pub path: String,
    /// The headers in order.
    pub headers: Vec<(String, String)>,
    /// The body. Only the first half of it with [`Fault::CutInBody`].
    pub body: Vec<u8>,
    /// The body as JSON. `None`: it is not JSON.
    pub json: Option<serde_json::Value>,
    /// The status of the answer. `None`: a fault suppressed the answer.
    pub status: Option<u16>,
}

impl Received {
    /// The first header with this name, in any case.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
    /// assert_eq!(master.received()[0].header("Content-Type"), Some("application/json"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn header(&self, name: &str) -> Option<&str> {
        fault::first_header(&self.headers, name)
    }
}

/// A recorded connection.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::MasterIdentity;
///
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let other = MasterIdentity::Fingerprint([0; 32]); // another certificate
/// let heartbeat = builder.master_identity(other).start()?;
/// assert!(master.wait_until(Duration::from_secs(10), |seen| {
///     seen.connections().iter().any(|connection| connection.failure.is_some())
/// }));
/// let connection = &master.connections()[0];
/// assert_eq!(connection.requests, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionReport {
    /// Counted from 1.
    pub number: u64,
    /// When it was accepted.
    pub at: Instant,
    /// The result of the handshake. `None`: it is not complete, or failed.
    pub handshake: Option<Handshake>,
    /// Why the connection failed, for example an invalid client certificate.
    pub failure: Option<String>,
    /// The number of requests.
    pub requests: usize,
    /// Whether the connection is open.
    pub open: bool,
}

/// The result of a TLS handshake.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::TlsVersion;
///
/// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
/// let handshake = master.connections()[0].handshake.clone().ok_or("no handshake")?;
/// assert_eq!((handshake.version, handshake.resumed), (TlsVersion::Tls13, false));
/// assert_eq!(handshake.fingerprint, worker.fingerprint);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handshake {
    /// The TLS version.
    pub version: TlsVersion,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
    /// SHA-256 of the client certificate's DER in 64 lowercase hexadecimal digits, also in a
    /// resumed session.
    pub fingerprint: String,
    /// The server name that the client requested.
    pub server_name: Option<String>,
}

/// A TLS version.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::TlsVersion;
///
/// # let (master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// assert!(master.wait_for_beats(1, Duration::from_secs(10)));
/// let version = master.connections()[0].handshake.as_ref().map(|handshake| handshake.version);
/// assert_eq!(version, Some(TlsVersion::Tls13));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// An operation on one decky, as in the master's table `decky_lifecycle`.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::loopback::RowStatus;
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// master.open_operation(&worker.uuid, "decky-01", "mutate");
/// let delta = LifecycleDelta::failed("decky-01", Operation::Mutate, "no such service");
/// heartbeat.deltas().push(delta)?;
/// assert!(master.wait_until(Duration::from_secs(10), |seen| {
///     seen.rows()[0].completed_at.is_some()
/// }));
/// let row = &master.rows()[0];
/// assert_eq!((row.decky.as_str(), row.status), ("decky-01", RowStatus::Failed));
/// assert_eq!(row.error.as_deref(), Some("no such service"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LifecycleRow {
    /// Counted from 1, in the order in which rows are opened.
    pub id: u64,
    /// The host that the operation was sent to.
    pub host_uuid: String,
    /// The decky's name.
    pub decky: String,
    /// `deploy` or `mutate`.
    pub operation: String,
    /// The status of the operation.
    pub status: RowStatus,
    /// The reported error, at most 2,000 characters.
    pub error: Option<String>,
    /// When it ended: the reported time, or the master's time if none was reported.
    pub completed_at: Option<SystemTime>,
}

/// The status of an operation.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::Operation;
/// use decnet_heartbeat::loopback::RowStatus;
///
/// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// master.open_operation(&worker.uuid, "decky-01", "deploy");
/// assert_eq!(master.rows()[0].status, RowStatus::Running);
/// heartbeat.run(Operation::Deploy, ["decky-01"], || Ok::<(), std::io::Error>(()))?;
/// assert!(master.wait_until(Duration::from_secs(10), |seen| {
///     seen.rows()[0].status != RowStatus::Running
/// }));
/// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStatus {
    /// No end was reported.
    Running,
    /// Success was reported.
    Succeeded,
    /// A failure was reported.
    Failed,
}

/// A decky, as in the master's table `decky_shards`.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::Snapshot;
/// use decnet_heartbeat::loopback::ShardState;
///
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// let decky = serde_json::json!({
///     "name": "decky-01", "ip": "10.0.0.7", "services": ["ssh"],
///     "distro": "debian", "base_image": "debian:12", "hostname": "files",
/// });
/// let runtime = serde_json::json!({"decky-01": {"running": true}});
/// let status = serde_json::json!({"deployed": true, "deckies": [decky], "runtime": runtime});
/// let heartbeat = builder.status_source(move || Snapshot::new(&status)).start()?;
/// assert!(master.wait_until(Duration::from_secs(10), |seen| !seen.shards().is_empty()));
/// let shard = &master.shards()["decky-01"];
/// assert_eq!((&shard.host_uuid, shard.state), (&worker.uuid, ShardState::Running));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shard {
    /// The host that reported it last.
    pub host_uuid: String,
    /// Its services.
    pub services: Vec<String>,
    /// The last reported state.
    pub state: ShardState,
}

/// The reported state of a decky.
///
/// ```
/// use decnet_heartbeat::loopback::{LoopbackMaster, ShardState};
///
/// let master = LoopbackMaster::start()?;
/// let shards = master.shards();
/// assert!(shards.values().all(|shard| shard.state == ShardState::Running));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardState {
    /// It is running.
    Running,
    /// It is not running, or `runtime` does not contain it.
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
