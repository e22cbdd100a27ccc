//! What a master has seen. For any thread.

use std::collections::BTreeMap;

use super::database::Database;
use super::records::{ConnectionReport, LifecycleRow, Received, Shard};
use crate::limits;

/// Everything that the master has recorded, for [`LoopbackMaster::wait_until`](super::LoopbackMaster::wait_until).
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
    pub(super) connections: Vec<ConnectionReport>,
    pub(super) beats: u64,
    pub(super) database: Database,
}

impl Seen {
    /// As [`LoopbackMaster::received`](super::LoopbackMaster::received).
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

    /// As [`LoopbackMaster::connections`](super::LoopbackMaster::connections).
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

    /// As [`LoopbackMaster::rows`](super::LoopbackMaster::rows).
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

    /// As [`LoopbackMaster::shards`](super::LoopbackMaster::shards).
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

    pub(super) fn take_received(&mut self) -> Vec<Received> {
        self.bytes = 0;
        std::mem::take(&mut self.received)
    }

    pub(super) fn record_request(&mut self, received: Received) {
        self.bytes += received.body.len();
        self.received.push(received);
        if self.received.len() >= 2 * limits::loopback::HISTORY
            || self.bytes > limits::loopback::HISTORY_BYTES
        {
            remove_older_half(&mut self.received);
            self.bytes = self.received.iter().map(|request| request.body.len()).sum();
        }
    }

    pub(super) fn record_connection(&mut self, report: ConnectionReport) {
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
