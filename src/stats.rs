//! The state of a heartbeat as numbers and times. The heartbeat thread writes it; any thread reads
//! it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::{Serialize, Serializer};

use crate::limits;

/// The state of a heartbeat as of its last event.
///
/// Serializes to JSON with times in RFC 3339 (UTC) and durations in seconds.
///
/// ```
/// use decnet_heartbeat::Stats;
///
/// /// For the agent's health page.
/// fn is_healthy(stats: &Stats) -> bool {
///     let failures = stats.failure.as_ref().map_or(0, |failure| failure.count);
///     stats.dormant || (failures < 3 && stats.outbox.is_some())
/// }
///
/// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// let stats = heartbeat.stats();
/// assert!(is_healthy(&stats));
/// let json = serde_json::to_value(&stats)?;
/// assert_eq!(json["waiting"], 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// The host is not enrolled: no thread runs, nothing is sent, and `push` discards its delta.
    pub dormant: bool,
    /// The host was decommissioned: for 20 intervals in a row, every answer was 403 or 404, and
    /// neither the ini nor a file of the bundle existed. The heartbeat continues, as the host may
    /// be enrolled again. The program's `run` exits.
    pub decommissioned: bool,
    /// The id of this host in the master's records.
    pub host_uuid: Option<String>,
    /// The URL to which beats are sent.
    pub url: Option<String>,
    /// SHA-256 of this host's certificate (DER) in lowercase hexadecimal. The master pins this
    /// value.
    pub fingerprint: Option<String>,
    /// When this host's certificate expires. The log warns from 30 days before.
    #[serde(serialize_with = "rfc3339")]
    pub certificate_expires: Option<SystemTime>,
    /// POSTs that the master accepted. A beat takes several POSTs if the master fails on a body or
    /// rejects one.
    pub beats: u64,
    /// When the master last accepted a beat.
    #[serde(serialize_with = "rfc3339")]
    pub last_success: Option<SystemTime>,
    /// When the next beat is due: at the next tick, or when the backoff ends. A delta or a stop
    /// causes an earlier one.
    #[serde(serialize_with = "rfc3339")]
    pub next_beat: Option<SystemTime>,
    /// The failures since [`last_success`](Self::last_success). `None`: the last beat was accepted.
    pub failure: Option<Failure>,
    /// How long the last POST took, from its request to its answer.
    #[serde(serialize_with = "seconds")]
    pub round_trip: Option<Duration>,
    /// Whether the last handshake resumed a TLS session.
    pub resumed: bool,
    /// Deltas that the master accepted.
    pub delivered: u64,
    /// Deltas that the master rejected. They stay in the outbox with the reason.
    pub rejected: u64,
    /// Queued deltas: in the outbox, and neither accepted nor rejected. Includes those of other
    /// processes.
    pub waiting: u64,
    /// Queued deltas that are held, because a newer operation on the same decky is in flight, or
    /// because another process is sending them. With more than 50 queued deltas, this is the
    /// number at the last beat.
    pub held: u64,
    /// When the operation of the oldest queued delta ended.
    #[serde(serialize_with = "rfc3339")]
    pub oldest_waiting: Option<SystemTime>,
    /// Operations in flight, one for each decky. Includes those of other processes.
    pub operations: u64,
    /// Deltas that were dropped undelivered: the oldest beyond 10,000 rows, and those older than 7
    /// days. Rejected deltas do not count.
    pub dropped: u64,
    /// The outbox file. `None` while part of the outbox is in memory only, and would be lost with
    /// the process. In JSON, bytes of the path that are not UTF-8 are replaced by U+FFFD.
    #[serde(serialize_with = "lossy")]
    pub outbox: Option<PathBuf>,
    /// Snapshots that the status source returned.
    pub snapshots: u64,
    /// When the status source returned the last snapshot.
    #[serde(serialize_with = "rfc3339")]
    pub last_snapshot: Option<SystemTime>,
    /// When the snapshot was requested that has not been returned yet. `None`: none is pending.
    #[serde(serialize_with = "rfc3339")]
    pub snapshot_pending_since: Option<SystemTime>,
    /// Since when the disk of the outbox has not answered. Beats are sent without deltas until it
    /// does. `None`: it answers, or there is no request for it.
    #[serde(serialize_with = "rfc3339")]
    pub outbox_busy_since: Option<SystemTime>,
    /// Why the status of the last beat was incomplete: Docker or a file could not be read, or there
    /// was no fresh snapshot. `None`: it was complete.
    pub status_fault: Option<String>,
    /// Queued deltas that are suspended, because the master failed on each when it was sent alone.
    /// A suspended delta is left out of 10 beats. The number doubles each time that it fails again,
    /// up to a day. Older deltas of its decky and operation are left out with it.
    pub suspended: u64,
    /// Panics that were caught: in the status source, in a beat and in the outbox thread.
    pub panics: u64,
    /// The thread that ended although the heartbeat was not stopped. `None`: all threads are
    /// running. If it is set, restart the agent.
    pub ended_thread: Option<&'static str>,
    /// Since when the heartbeat thread has been busy with one event.
    #[serde(skip)]
    pub(crate) working_since: Option<Instant>,
    /// As [`snapshot_pending_since`](Self::snapshot_pending_since), by the monotonic clock.
    #[serde(skip)]
    pub(crate) pending_since: Option<Instant>,
}

/// Beats that failed in a row.
///
/// ```
/// use std::time::Duration;
///
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// master.decommission(&worker.uuid);
/// let heartbeat = builder.start()?;
/// heartbeat.beats().recv_timeout(Duration::from_secs(10))?;
/// let failure = heartbeat.stats().failure.ok_or("no failure")?;
/// assert_eq!(failure.class, "http-404");
/// assert!(failure.detail.contains("unknown host"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Failure {
    /// The number of failed beats.
    pub count: u64,
    /// When the first of them failed.
    #[serde(serialize_with = "rfc3339_always")]
    pub since: SystemTime,
    /// The class of the last failure.
    ///
    /// | class | what happened |
    /// | --- | --- |
    /// | `http-403`, `http-503`, … | the master, or a gateway in front of it, answered with this status |
    /// | `dns` | the lookup of the master's name failed, or found no address |
    /// | `timeout-resolve` | the lookup of the name took longer than 5 s |
    /// | `refused` | no process listens on the master's port |
    /// | `unreachable` | there is no route to the master |
    /// | `timeout-connect` | the TCP and TLS handshakes took longer than 5 s |
    /// | `tls` | the TLS handshake failed: a certificate, an alert, or the peer does not speak TLS |
    /// | `connection-closed` | the connection was closed before an answer arrived |
    /// | `timeout-send-body` | sending the request took longer than 5 s |
    /// | `timeout-receive-response` | no answer arrived within 10 s |
    /// | `timeout-global` | the whole POST took longer than 20 s, or two thirds of a shorter interval |
    /// | `invalid-response` | the answer was not HTTP/1.1, or was too long |
    /// | `io` | another error of the system, such as no free file descriptor |
    /// | `invalid-body` | nothing was sent, because the body could not be serialized as JSON |
    pub class: String,
    /// The answer of the master, or the error of the system, truncated and escaped.
    pub detail: String,
}

impl Stats {
    /// Whether the heartbeat thread or the status thread has ended, or has been busy with one task
    /// for longer than [`limits::STALLED`].
    pub(crate) fn is_stalled(&self) -> bool {
        let mut busy = [self.working_since, self.pending_since].into_iter().flatten();
        self.ended_thread.is_some() || busy.any(|since| since.elapsed() > limits::STALLED)
    }
}

/// [`Stats`] that threads share. The lock is held only to copy or to change fields.
#[derive(Debug, Default)]
pub(crate) struct SharedStats(Mutex<Stats>);

impl SharedStats {
    pub(crate) fn read(&self) -> Stats {
        self.lock().clone()
    }

    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Stats) -> T) -> T {
        change(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Stats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held by a thread. If a panic drops it, it sets [`Stats::ended_thread`].
#[derive(Debug)]
pub(crate) struct ThreadWatch {
    name: &'static str,
    stats: Arc<SharedStats>,
}

impl ThreadWatch {
    pub(crate) fn new(name: &'static str, stats: &Arc<SharedStats>) -> Self {
        Self { name, stats: Arc::clone(stats) }
    }
}

impl Drop for ThreadWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.stats.change(|stats| stats.ended_thread = Some(self.name));
        }
    }
}

fn rfc3339<S: Serializer>(at: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => rfc3339_always(at, serializer),
        None => serializer.serialize_none(),
    }
}

fn rfc3339_always<S: Serializer>(at: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let at = crate::delta::from_micros(crate::delta::micros(*at));
    serializer.collect_str(&humantime::format_rfc3339_millis(at))
}

fn seconds<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}

fn lossy<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_thread_counts_as_stalled_at_once() {
        let stats = Arc::new(SharedStats::default());
        drop(ThreadWatch::new("decnet-status", &stats));
        assert_eq!((stats.read().ended_thread, stats.read().is_stalled()), (None, false));
        let watch = ThreadWatch::new("decnet-heartbeat", &stats);
        thread::spawn(move || {
            let _watch = watch;
            panic!("on purpose");
        })
        .join()
        .unwrap_err();
        assert_eq!(
            (stats.read().ended_thread, stats.read().is_stalled()),
            (Some("decnet-heartbeat"), true)
        );
    }

    #[test]
    fn either_thread_without_progress_counts_as_stalled() {
        let now = Instant::now();
        let long = now.checked_sub(limits::STALLED + Duration::from_secs(1));
        let short = now.checked_sub(limits::STALLED - Duration::from_secs(5));
        assert!(long.is_some() && short.is_some());
        for (working_since, pending_since, stalled) in [
            (None, None, false),
            (short, short, false),
            (long, None, true),
            (None, long, true),
            (short, long, true),
        ] {
            let stats = Stats { working_since, pending_since, ..Stats::default() };
            assert_eq!(stats.is_stalled(), stalled, "{working_since:?} {pending_since:?}");
        }
    }
}
