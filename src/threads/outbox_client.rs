//! The client of the outbox thread, for the other threads. Each call waits up to 1 s, or until the
//! caller's deadline.

#[cfg(feature = "cli")]
pub(crate) mod submit;

#[cfg(feature = "cli")]
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
#[cfg(any(test, feature = "cli"))]
use crossbeam_channel::bounded;

#[cfg(feature = "cli")]
use super::hand_over::HandOverRequest;
use super::request_queue::{BatchRequest, NotAnswered, Request, RequestQueue};
use super::requests::Generation;
use crate::error::Error;
use crate::limits;
#[cfg(feature = "cli")]
use crate::outbox::RowStates;
use crate::outbox::{NewRows, OutboxStats, QueuedDelta, RowChange, SharedOutboxStats, deadline};

/// Sends requests to the outbox thread, which ends when the last client is dropped.
#[derive(Debug)]
pub(crate) struct OutboxClient {
    queue: Arc<RequestQueue>,
    stats: Arc<SharedOutboxStats>,
    /// The outbox file; `None` for an outbox that is configured to be in memory.
    path: Option<PathBuf>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl OutboxClient {
    pub(super) fn new(
        queue: Arc<RequestQueue>,
        stats: Arc<SharedOutboxStats>,
        path: Option<PathBuf>,
        ended: Receiver<()>,
    ) -> Self {
        Self { queue, stats, path, ended }
    }

    /// Adds rows and returns the id of the first one. If the beginning of an operation is in doubt,
    /// its rows are removed again.
    pub(crate) fn add(&self, rows: NewRows) -> Result<i64, Error> {
        self.request(Request::NewRows(rows))
    }

    /// Makes a change that is never lost, and waits for the disk. An error means that the file does
    /// not have the change yet.
    pub(crate) fn change(&self, change: RowChange) -> Result<(), Error> {
        self.stats.record_answers(change.answered());
        self.request(Request::RowChange(change)).map(drop)
    }

    /// Records that the master has accepted or rejected deltas, without waiting for the disk. No
    /// later batch contains them.
    pub(crate) fn acknowledge(&self, change: RowChange) {
        self.stats.record_answers(change.answered());
        self.queue.send(Request::RowChange(change));
    }

    /// Requests the work that is due before a beat: see [`Request::Maintain`].
    pub(crate) fn maintain(&self) {
        self.queue.send(Request::Maintain);
    }

    pub(super) fn request_batch(&self, request: BatchRequest) {
        self.queue.send(Request::Batch(request));
    }

    /// The generation that a batch must have to be used unchanged.
    pub(super) fn generation(&self) -> Generation {
        self.queue.generation()
    }

    /// Removes the deltas, read in generation `read`, that something has held back since. Returns
    /// `false` if that is no longer known.
    pub(super) fn remove_held(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        self.queue.remove_held(read, deltas)
    }

    /// Waits until `deadline` for all deltas that may be sent now to be accepted or rejected.
    /// Returns whether they were.
    pub(crate) fn flush(&self, deadline: Instant) -> bool {
        self.queue.send_and_wait(Request::Flush, deadline).is_ok_and(|answer| answer.is_ok())
    }

    /// Lets another process deliver, and waits until `deadline` for earlier requests to be on the
    /// disk. Returns whether they are.
    pub(crate) fn release(&self, deadline: Instant) -> bool {
        self.stats.record_stop();
        self.queue.send_and_wait(Request::Release, deadline).is_ok()
    }

    #[cfg(feature = "cli")]
    pub(crate) fn is_overtaken(&self, delta: &QueuedDelta) -> Result<bool, Error> {
        self.request(Request::IsOvertaken(delta.clone())).map(|answer| answer == 1)
    }

    /// Whether a process that delivers listens for [`wake_deliverer`](Self::wake_deliverer).
    #[cfg(feature = "cli")]
    pub(crate) fn is_deliverer_listening(&self) -> bool {
        self.ask(HandOverRequest::Connect).unwrap_or(false)
    }

    /// Makes the process that delivers send at once what this one has added. Returns whether that
    /// process listens.
    #[cfg(feature = "cli")]
    pub(crate) fn wake_deliverer(&self) -> bool {
        self.ask(HandOverRequest::Wake).unwrap_or(false)
    }

    /// Whether another process delivers. Without an answer it may.
    #[cfg(feature = "cli")]
    pub(crate) fn has_deliverer(&self) -> bool {
        self.ask(HandOverRequest::HasDeliverer).unwrap_or(true)
    }

    /// The states of the rows with these ids.
    #[cfg(feature = "cli")]
    pub(crate) fn row_states(&self, ids: Range<i64>) -> Result<RowStates, Error> {
        let (sender, states) = bounded(1);
        self.ask(HandOverRequest::RowStates(ids, sender))?;
        states.try_recv().map_err(|_| self.error("has not returned the states of its rows"))
    }

    #[cfg(feature = "cli")]
    fn ask(&self, request: HandOverRequest) -> Result<bool, Error> {
        self.request(Request::HandOver(request)).map(|answer| answer == 1)
    }

    /// The counters as of the last transaction.
    pub(crate) fn stats(&self) -> OutboxStats {
        self.stats.read()
    }

    /// The number of deltas that may be sent, as of the last count.
    pub(crate) fn sendable(&self) -> u64 {
        let counts = self.stats().counts;
        counts.waiting.saturating_sub(counts.held)
    }

    /// The outbox file. `None`: the outbox is in memory now, or was not opened yet.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| self.stats.read().on_disk)
    }

    /// Whether this process is to deliver and another one does.
    #[cfg(feature = "cli")]
    pub(crate) fn is_standby(&self) -> bool {
        self.stats.is_standby()
    }

    /// Since when the disk has not answered. `None`: no request waits for it, or not for longer
    /// than a batch may take.
    pub(crate) fn busy_since(&self) -> Option<Instant> {
        self.queue.busy_since().filter(|since| since.elapsed() >= limits::BATCH_WAIT)
    }

    /// Whether the thread is busy with a request.
    #[cfg(feature = "cli")]
    pub(crate) fn is_busy(&self) -> bool {
        self.queue.busy_since().is_some()
    }

    pub(super) fn error(&self, problem: &str) -> Error {
        Error::outbox(self.path.as_deref(), problem)
    }

    fn request(&self, request: Request) -> Result<i64, Error> {
        self.queue.send_and_wait(request, deadline()).map_err(|why| self.not_answered(why))?
    }

    fn not_answered(&self, why: NotAnswered) -> Error {
        let seconds = limits::OUTBOX_BUSY.as_secs();
        match why {
            NotAnswered::QueueFull => self.error(&format!(
                "{} requests wait for its disk; nothing was queued, try again later",
                limits::REQUESTS
            )),
            NotAnswered::Withdrawn => self.error(&format!(
                "its disk has not answered for {seconds} s; nothing was queued, try again later"
            )),
            NotAnswered::InDoubt => self
                .error(&format!(
                    "its disk has not answered for {seconds} s; the request will be done when the \
                     disk answers, unless the process ends first, so do not try again"
                ))
                .in_doubt(),
        }
    }
}

impl Drop for OutboxClient {
    /// Lets the thread end, and waits up to [`limits::RELEASE`] for it to close the file.
    fn drop(&mut self) {
        self.queue.close();
        let _ = self.ended.recv_timeout(limits::RELEASE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::SentBy;

    fn new_rows() -> NewRows {
        NewRows::Deltas(vec![LifecycleDelta::succeeded("d", Operation::Deploy)], SentBy::Deliverer)
    }

    #[test]
    fn full_queue_refuses_the_next_request_at_once() {
        let queue = Arc::new(RequestQueue::default());
        for _ in 0..limits::REQUESTS {
            assert!(queue.enqueue_without_waiting(Request::NewRows(new_rows())).is_ok());
        }
        let (_, ended) = bounded(0);
        let path = Some("/agent/heartbeat.db".into());
        let client = OutboxClient::new(Arc::clone(&queue), Arc::default(), path, ended);
        let since = Instant::now();
        let error = client.add(new_rows()).unwrap_err();
        assert!(since.elapsed() < limits::OUTBOX_BUSY, "{:?}", since.elapsed());
        assert!(error.is_outbox() && !error.is_in_doubt());
        assert_eq!(
            error.to_string(),
            "outbox /agent/heartbeat.db: 1024 requests wait for its disk; nothing was queued, try \
             again later"
        );
        // There is always room for a request that must not be lost.
        queue.send(Request::Maintain);
        assert_eq!(queue.queued(), limits::REQUESTS + 1);
    }
}
