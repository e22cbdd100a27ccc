//! What the heartbeat knows of itself. Written on the heartbeat thread, read from any.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Serialize, Serializer};

use crate::limits;

/// What the heartbeat knows of itself, as of the last event.
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
    /// The host is not enrolled: nothing runs, nothing is sent, and `push` keeps nothing.
    pub dormant: bool,
    /// The master has not accepted this host for 20 intervals without a break (403 or 404), and all that time neither the ini
    /// nor a file of the bundle has existed: the host was decommissioned. The heartbeat goes on, in case it is enrolled again;
    /// the program's `run` ends.
    pub decommissioned: bool,
    /// Who we are to the master.
    pub host_uuid: Option<String>,
    /// Where the beats go.
    pub url: Option<String>,
    /// SHA-256 of our certificate's DER in lowercase hexadecimal, as the master pins it.
    pub fingerprint: Option<String>,
    /// The last moment in which our certificate is valid; the log warns from 30 days before it on.
    #[serde(serialize_with = "rfc3339")]
    pub certificate_expires: Option<SystemTime>,
    /// POSTs that the master accepted. A beat may take several, if the master fails on a body or refuses one.
    pub beats: u64,
    /// When the master last accepted a beat.
    #[serde(serialize_with = "rfc3339")]
    pub last_success: Option<SystemTime>,
    /// When the next beat is due, unless a delta or a stop comes first: at the next tick, or when a backoff ends.
    #[serde(serialize_with = "rfc3339")]
    pub next_beat: Option<SystemTime>,
    /// The failures since then.
    pub failure: Option<Failure>,
    /// From a beat's request to its answer, the last time.
    #[serde(serialize_with = "seconds")]
    pub round_trip: Option<Duration>,
    /// The last handshake resumed a TLS session.
    pub resumed: bool,
    /// Deltas that the master accepted.
    pub delivered: u64,
    /// Deltas that the master refused for good; they stay in the outbox with the reason.
    pub rejected: u64,
    /// Deltas in the outbox that the master has neither accepted nor refused for good, those of other processes too.
    pub waiting: u64,
    /// Of these, the ones held back: a newer operation of the same decky is in flight, or another process is posting. If more
    /// than 50 wait, it is as of the last beat.
    pub held: u64,
    /// When the operation ended that the oldest waiting delta tells of.
    #[serde(serialize_with = "rfc3339")]
    pub oldest_waiting: Option<SystemTime>,
    /// Operations in flight, counted for each decky, those of other processes too.
    pub operations: u64,
    /// Deltas that fell out of the outbox undelivered: beyond 10,000 the oldest, and after 7 days.
    pub dropped: u64,
    /// The outbox' file; `None` while something of it is in memory and would not survive the process. In JSON, which has no
    /// other text than Unicode, bytes of the path that are not UTF-8 are replaced by U+FFFD.
    #[serde(serialize_with = "lossy")]
    pub outbox: Option<PathBuf>,
    /// Snapshots that the status source gave.
    pub snapshots: u64,
    /// When it gave the last one: since then nothing new is known of what runs here.
    #[serde(serialize_with = "rfc3339")]
    pub last_snapshot: Option<SystemTime>,
    /// Since when the status source has owed a snapshot.
    #[serde(serialize_with = "rfc3339")]
    pub snapshot_owed_since: Option<SystemTime>,
    /// Since when the disk of the outbox has not answered. Beats go on without deltas meanwhile. `None`: nothing is asked of it.
    #[serde(serialize_with = "rfc3339")]
    pub outbox_busy_since: Option<SystemTime>,
    /// Why the last beat said less than all of what runs here: Docker or a file could not be read, or there was no fresh
    /// snapshot. `None`: it said all.
    pub status_fault: Option<String>,
    /// Of the waiting deltas, the ones that the master failed on when they were sent alone. Each is left out of 10 beats, and
    /// of twice as many each time that it fails again, up to a day; so are older deltas of its decky and operation.
    pub resting: u64,
    /// Panics caught, of the status source, of a beat and of the outbox thread.
    pub panics: u64,
    /// The thread that has ended although nobody stopped the heartbeat. `None`: all run. It should never be anything else;
    /// then the agent has to be started again.
    pub ended_thread: Option<&'static str>,
    /// Since when the heartbeat thread has been busy with one event.
    #[serde(skip)]
    pub(crate) working_since: Option<Instant>,
    /// As [`snapshot_owed_since`](Self::snapshot_owed_since), by a clock that nobody sets.
    #[serde(skip)]
    pub(crate) owed_since: Option<Instant>,
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
    /// How many.
    pub count: u64,
    /// When the first failed.
    #[serde(serialize_with = "rfc3339_always")]
    pub since: SystemTime,
    /// The last one's class, in a word.
    ///
    /// | class | what happened |
    /// | --- | --- |
    /// | `http-403`, `http-503`, … | the master, or what answers for it, gave this status |
    /// | `name` | the master's name could not be looked up, or has no address |
    /// | `timeout-resolve` | the lookup of the name has not ended within 5 s |
    /// | `refused` | nothing listens on the master's port |
    /// | `unreachable` | there is no route to the master |
    /// | `timeout-connect` | TCP and TLS were not there within 5 s |
    /// | `tls` | the handshake failed: a certificate, an alert, or what answers does not speak TLS |
    /// | `closed` | the connection ended before there was an answer |
    /// | `timeout-send-body` | the request was not taken within 5 s |
    /// | `timeout-receive-response` | the answer did not come within 10 s |
    /// | `timeout-global` | the whole exchange took longer than it may: 20 s, or two thirds of a short interval |
    /// | `not-http` | the answer was not HTTP/1.1, or longer than it may be |
    /// | `io` | the system refused something else, such as a socket |
    /// | `unwritten` | nothing was sent, as the body could not be written as JSON |
    pub class: String,
    /// What the master or the system said; foreign text, cut and escaped.
    pub detail: String,
}

impl Stats {
    /// The heartbeat thread or the status thread has been at one thing for far longer than it takes, or is gone.
    pub(crate) fn is_stalled(&self) -> bool {
        let mut busy = [self.working_since, self.owed_since].into_iter().flatten();
        self.ended_thread.is_some() || busy.any(|since| since.elapsed() > limits::STALLED)
    }
}

/// [`Stats`] that threads share. The lock is held to copy or to change a few fields, never longer.
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

/// Held by a thread. Dropped by a panic that nothing has caught, it says in the stats that the thread is gone.
#[derive(Debug)]
pub(crate) struct ThreadWatch {
    name: &'static str,
    /// `None`: the thread has ended as it should.
    stats: Option<Arc<SharedStats>>,
}

impl ThreadWatch {
    pub(crate) fn new(name: &'static str, stats: &Arc<SharedStats>) -> Self {
        Self { name, stats: Some(Arc::clone(stats)) }
    }

    pub(crate) fn has_ended_as_wanted(mut self) {
        self.stats = None;
    }
}

impl Drop for ThreadWatch {
    fn drop(&mut self) {
        if let Some(stats) = &self.stats {
            stats.change(|stats| stats.ended_thread = Some(self.name));
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
    fn a_thread_that_is_gone_is_a_stall_at_once() {
        let stats = Arc::new(SharedStats::default());
        ThreadWatch::new("decnet-status", &stats).has_ended_as_wanted();
        assert_eq!((stats.read().ended_thread, stats.read().is_stalled()), (None, false));
        let watch = ThreadWatch::new("decnet-heartbeat", &stats);
        std::thread::spawn(move || {
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
    fn either_thread_that_makes_no_progress_is_a_stall() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let (long, short) = (
            now.checked_sub(limits::STALLED + second),
            now.checked_sub(limits::STALLED - second * 5),
        );
        assert!(long.is_some() && short.is_some());
        for (working_since, owed_since, stalled) in [
            (None, None, false),
            (short, short, false),
            (long, None, true),
            (None, long, true),
            (short, long, true),
        ] {
            let stats = Stats { working_since, owed_since, ..Stats::default() };
            assert_eq!(stats.is_stalled(), stalled, "{working_since:?} {owed_since:?}");
        }
    }
}
