//! What a master records: requests, connections, operations and deckies. Values only, for any
//! thread.

use std::time::{Instant, SystemTime};

use super::fault::first_header;

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
    /// The body. Only the first half of it with [`Fault::CutInBody`](super::Fault::CutInBody).
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
        first_header(&self.headers, name)
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
