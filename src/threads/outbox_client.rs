//! What other threads have of the outbox thread. Each call is bounded: it waits for a second at most, or
//! until the moment that its caller names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::request_queue::{BatchRequest, Request, RequestQueue, Unanswered};
use super::requests::Generation;
use crate::error::Error;
use crate::limits;
use crate::outbox::{NewRows, OutboxStats, QueuedDelta, RowChange, SharedOutboxStats};

/// The outbox, by way of its thread, which ends with the last of these.
#[derive(Debug)]
pub(crate) struct OutboxClient {
    desk: Arc<RequestQueue>,
    books: Arc<SharedOutboxStats>,
    /// Where it belongs; `None` for one that is meant to be in memory.
    path: Option<PathBuf>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl OutboxClient {
    pub(super) fn new(
        desk: Arc<RequestQueue>,
        books: Arc<SharedOutboxStats>,
        path: Option<PathBuf>,
        ended: Receiver<()>,
    ) -> Self {
        Self { desk, books, path, ended }
    }

    /// Adds rows; the first one's id. The rows of an operation whose beginning is in doubt are removed again. `is_urgent`: they
    /// are to be sent at once, and not with the next beat.
    pub(crate) fn add(&self, add: NewRows, is_urgent: bool) -> Result<i64, Error> {
        self.desk
            .ask(Request::NewRows(add), is_urgent, in_time())
            .map_err(|why| self.no_answer(why))?
    }

    /// Makes a change that is never lost, and waits for the disk. An error says that the file does not have it yet.
    pub(crate) fn change(&self, change: RowChange, is_urgent: bool) -> Result<(), Error> {
        self.books.settle(change.settled());
        let answer = self.desk.ask(Request::RowChange(change), is_urgent, in_time());
        answer.map_err(|why| self.no_answer(why))?.map(drop)
    }

    /// The master has accepted or rejected deltas. Nobody waits for the disk to know it, and no later batch has them.
    pub(crate) fn settle(&self, change: RowChange) {
        self.books.settle(change.settled());
        self.desk.tell(Request::RowChange(change));
    }

    pub(crate) fn tend(&self) {
        self.desk.tell(Request::Tend);
    }

    pub(super) fn ask_for_batch(&self, question: BatchRequest) {
        self.desk.tell(Request::Batch(question));
    }

    /// What a batch must be of to be used as it is.
    pub(super) fn generation(&self) -> Generation {
        self.desk.generation()
    }

    /// Leaves of these deltas, which were read in that generation, what nothing holds back by now. `false`: that is not known.
    pub(super) fn leave_free(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        self.desk.leave_free(read, deltas)
    }

    /// Waits until all that may be sent now has been, at the longest until then. Whether it has.
    pub(crate) fn flush(&self, until: Instant) -> bool {
        self.desk.ask(Request::Flush, false, until).is_ok_and(|flushed| flushed.is_ok())
    }

    /// Lets another process deliver, and waits until then for what was asked for before to be on the disk. Whether it is.
    pub(crate) fn release(&self, until: Instant) -> bool {
        self.books.note_stop();
        self.desk.ask(Request::Release, false, until).is_ok()
    }

    #[cfg(feature = "cli")]
    pub(crate) fn is_overtaken(&self, kept: &QueuedDelta) -> Result<bool, Error> {
        let answer = self.desk.ask(Request::IsOvertaken(kept.clone()), false, in_time());
        answer.map_err(|why| self.no_answer(why))?.map(|is_so| is_so == 1)
    }

    /// As of the last transaction.
    pub(crate) fn books(&self) -> OutboxStats {
        self.books.read()
    }

    /// Deltas that may go out, as of the last look.
    pub(crate) fn free(&self) -> u64 {
        let counts = self.books().counts;
        counts.waiting.saturating_sub(counts.held)
    }

    /// The file, or `None` for an outbox that is in memory just now, or has not been opened yet.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref().filter(|_| self.books.read().on_disk)
    }

    /// Since when the disk has not answered. `None`: nothing is asked of it, or it is not slow.
    pub(crate) fn busy_since(&self) -> Option<Instant> {
        self.desk.busy_since().filter(|since| since.elapsed() >= limits::BATCH_WAIT)
    }

    /// The thread is at something that it has taken.
    #[cfg(feature = "cli")]
    pub(crate) fn is_busy(&self) -> bool {
        self.desk.busy_since().is_some()
    }

    pub(super) fn error(&self, problem: &str) -> Error {
        Error::outbox(self.path.as_deref(), problem)
    }

    fn no_answer(&self, why: Unanswered) -> Error {
        let seconds = limits::OUTBOX_BUSY.as_secs();
        match why {
            Unanswered::Full => {
                let most = limits::REQUESTS;
                self.error(&format!("has {most} requests waiting for its disk; nothing was kept, try again later"))
            }
            Unanswered::Withdrawn => {
                self.error(&format!("its disk has not answered for {seconds} s; nothing was kept, try again later"))
            }
            Unanswered::InDoubt => self
                .error(&format!(
                    "its disk has not answered for {seconds} s; it is done when the disk answers, unless the process ends \
                     first, so do not try again"
                ))
                .in_doubt(),
        }
    }
}

impl Drop for OutboxClient {
    /// The thread closes the file now; a disk that takes its time for that is not waited for.
    fn drop(&mut self) {
        self.desk.close();
        let _ = self.ended.recv_timeout(limits::RELEASE);
    }
}

fn in_time() -> Instant {
    Instant::now() + limits::OUTBOX_BUSY
}
