//! The outbox as senders and tracked operations hold it. Runs on the agent's threads.

use std::sync::Arc;

use crate::error::{Error, chain};
use crate::forked::OfProcess;
use crate::outbox::{NewRows, QueuedDelta, RowChange, SentBy};
use crate::panics::quietly;
use crate::threads::outbox_client::OutboxClient;

/// A clone of the outbox's client, or nothing if the host is not enrolled.
#[derive(Clone, Debug)]
pub(super) struct OutboxHandle(Option<OfProcess<Arc<OutboxClient>>>);

impl OutboxHandle {
    pub(super) fn new(client: OfProcess<Arc<OutboxClient>>) -> Self {
        Self(Some(client))
    }

    pub(super) fn dormant() -> Self {
        Self(None)
    }

    /// Adds rows and returns the id of the first one. `Ok(None)`: the host is not enrolled.
    pub(super) fn add(&self, rows: NewRows) -> Result<Option<i64>, Error> {
        let Some(client) = &self.0 else { return Ok(None) };
        client.get()?.add(rows).map(Some)
    }

    pub(super) fn is_dormant(&self) -> bool {
        self.0.is_none()
    }

    /// # Errors
    ///
    /// This process was forked from the one that the handle belongs to.
    pub(super) fn check_process(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |client| client.get().map(drop))
    }

    /// Reports how operations ended. Their rows have been in the outbox since they began.
    pub(super) fn end(&self, ended: Vec<QueuedDelta>) {
        // In a forked process nothing is reported, and nothing is logged: the logger's lock may
        // never be released there.
        let Some(Ok(client)) = self.0.as_ref().map(OfProcess::get) else { return };
        if ended.is_empty() {
            return;
        }
        let change = RowChange::Ended(ended, SentBy::Deliverer);
        if let Err(error) = client.change(change) {
            // The guard may be dropped by a panic. A second panic, in the logger, would abort the
            // process.
            quietly(|| {
                log::error!(
                    "could not write the end of an operation; a restart would report it failed: \
                     error={:?}",
                    chain(&error)
                );
            });
        }
    }
}
