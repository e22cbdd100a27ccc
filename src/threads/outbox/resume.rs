//! The beginning of an operation that takes over rows of processes that have ended. Runs on the
//! outbox thread.

use super::OutboxThread;
use crate::limits;
use crate::outbox::deadline;
use crate::threads::request_queue::{Caller, ResumeRequest};

impl OutboxThread {
    /// Has a transaction of its own. If the caller has given up, the rows that were taken over get
    /// their former owner again and the others are removed, so that the caller may try again.
    pub(super) fn resume(&mut self, caller: Caller, request: ResumeRequest) {
        let ResumeRequest { operation, deckies, begun } = request;
        let margin = limits::OUTBOX_MARGIN;
        let by =
            caller.waiter.deadline.and_then(|by| by.checked_sub(margin)).unwrap_or_else(deadline);
        let rows = match self.outbox.resume(operation, &deckies, by) {
            Ok(rows) => rows,
            Err(error) => {
                self.queue.answer(vec![(caller, Err(error))]);
                return;
            }
        };
        // It has room: this is its only message.
        let _ = begun.try_send(rows.clone());
        if self.queue.answer(vec![(caller, Ok(0))]) == [false] {
            self.outbox.undo_resume(&rows);
        }
        self.outbox.verify_after_commit();
    }
}
