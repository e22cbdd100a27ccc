//! Requests that the program's `pipe` submits, and fetches the answers of. See [`Submitted`].

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};

use super::OutboxClient;
use crate::delta::Operation;
use crate::error::Error;
use crate::outbox::resume::BegunRow;
use crate::outbox::{NewRows, RowChange, deadline};
use crate::threads::request_queue::{Request, ResumeRequest, Submitted, WakeEvent};

/// The beginning of an operation that takes over rows of processes that have ended.
#[derive(Debug)]
pub(crate) struct SubmittedResume {
    submitted: Submitted,
    /// Receives the rows before the answer arrives.
    rows: Receiver<Vec<BegunRow>>,
}

impl OutboxClient {
    /// Adds rows. The answer is the id of the first one. Deltas are sent at once.
    pub(crate) fn submit_new_rows(
        &self,
        rows: NewRows,
        event: &Arc<WakeEvent>,
    ) -> Result<Submitted, Error> {
        self.submit(Request::NewRows(rows), event)
    }

    /// Makes a change that is never lost. Its deltas are sent at once.
    pub(crate) fn submit_change(
        &self,
        change: RowChange,
        event: &Arc<WakeEvent>,
    ) -> Result<Submitted, Error> {
        self.submit(Request::RowChange(change), event)
    }

    /// Begins an operation, and takes over the rows that a process which has ended has in flight
    /// for it.
    pub(crate) fn submit_resume(
        &self,
        operation: Operation,
        deckies: Vec<String>,
        event: &Arc<WakeEvent>,
    ) -> Result<SubmittedResume, Error> {
        let (begun, rows) = bounded(1);
        let request = Request::Resume(ResumeRequest { operation, deckies, begun });
        Ok(SubmittedResume { submitted: self.submit(request, event)?, rows })
    }

    fn submit(&self, request: Request, event: &Arc<WakeEvent>) -> Result<Submitted, Error> {
        self.queue.submit(request, deadline(), event).map_err(|why| self.not_answered(why))
    }

    /// The answer to a request. `None`: there is none yet, and its second is not over.
    pub(crate) fn fetch(&self, submitted: &Submitted) -> Option<Result<i64, Error>> {
        let answer = self.queue.fetch(submitted)?;
        Some(answer.unwrap_or_else(|why| Err(self.not_answered(why))))
    }

    /// As [`fetch`](Self::fetch). Returns the rows, sorted by decky.
    pub(crate) fn fetch_resumed(
        &self,
        resume: &SubmittedResume,
    ) -> Option<Result<Vec<BegunRow>, Error>> {
        let answer = self.fetch(&resume.submitted)?;
        // The rows were sent before the answer.
        Some(answer.map(|_| resume.rows.try_recv().unwrap_or_default()))
    }
}

impl SubmittedResume {
    pub(crate) fn deadline(&self) -> Instant {
        self.submitted.deadline()
    }
}
