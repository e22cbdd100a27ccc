//! The outbox used by itself, for tests: each call is a transaction of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    DeliveryResult, NewRows, Outbox, OutboxLocation, OutboxStats, QueuedDelta, Role, RowChange,
    SentBy, deadline,
};
use crate::delta::LifecycleDelta;
#[cfg(test)]
use crate::delta::Operation;
use crate::error::Error;

impl Outbox {
    pub(crate) fn open_at(
        location: &OutboxLocation,
        agent_dir: &Path,
        role: Role,
    ) -> Result<(Self, Option<Error>), Error> {
        Self::open(location.path(agent_dir), role, Arc::default())
    }

    pub(crate) fn books(&self) -> OutboxStats {
        self.books.read()
    }

    /// The file, or `None` for an outbox that is in memory just now.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.store.path.as_deref().filter(|_| self.books().on_disk)
    }

    fn add(&mut self, add: NewRows) -> Result<i64, Error> {
        let added = self.commit(&[add], deadline()).added.remove(0);
        self.look_again();
        added
    }

    pub(crate) fn keep(&mut self, deltas: &[LifecycleDelta]) -> Result<(), Error> {
        self.add(NewRows::Deltas(deltas.to_vec(), SentBy::Deliverer)).map(drop)
    }

    #[cfg(all(test, feature = "cli"))]
    pub(crate) fn claim(&mut self, deltas: Vec<LifecycleDelta>) -> Result<Vec<QueuedDelta>, Error> {
        let first = self.add(NewRows::Deltas(deltas.clone(), SentBy::ThisProcess))?;
        Ok((first..).zip(deltas).map(|(id, delta)| QueuedDelta { id, delta }).collect())
    }

    #[cfg(test)]
    pub(crate) fn begin(
        &mut self,
        operation: Operation,
        deckies: &[String],
    ) -> Result<Vec<i64>, Error> {
        let first = self.add(NewRows::Operation(operation, deckies.to_vec()))?;
        Ok((first..).take(deckies.len()).collect())
    }

    #[cfg(test)]
    pub(crate) fn end(&mut self, ended: Vec<QueuedDelta>, poster: SentBy) -> Result<(), Error> {
        self.make(RowChange::Ended(ended, poster), deadline())
    }

    #[cfg(all(test, feature = "cli"))]
    pub(crate) fn release(&mut self, deltas: &[QueuedDelta]) -> Result<(), Error> {
        self.make(RowChange::Released(deltas.iter().map(|kept| kept.id).collect()), deadline())
    }

    pub(crate) fn settle(
        &mut self,
        deltas: &[QueuedDelta],
        settled: &DeliveryResult,
        by: Instant,
    ) -> Result<(), Error> {
        self.make(
            RowChange::Answered(deltas.iter().map(|kept| kept.id).collect(), settled.clone()),
            by,
        )
    }

    fn make(&mut self, change: RowChange, by: Instant) -> Result<(), Error> {
        self.note(change);
        let changed = self.commit(&[], by).changed;
        self.look_again();
        changed
    }

    pub(crate) fn deliverable(
        &mut self,
        most: usize,
        _: Instant,
    ) -> Result<Vec<QueuedDelta>, Error> {
        let found = self.deliverable_where(most, None);
        self.count();
        found
    }

    /// Ages the rows as if so much time had passed.
    pub(crate) fn pass(&mut self, time: Duration) -> Result<(), Error> {
        self.age_by(time)
    }
}
