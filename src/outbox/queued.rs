//! What other threads know of the outbox: the deltas that it keeps, what may be added to it, and what may become of its rows.
//! Values only, for any thread; none of them knows of SQLite.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::delta::{LifecycleDelta, Operation};
use crate::text::sanitize;

/// A delta with its place in the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueuedDelta {
    pub(crate) id: i64,
    pub(crate) delta: LifecycleDelta,
}

/// What has become of a delta that is not sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryResult {
    /// It has it: it is gone from the outbox.
    Delivered,
    /// It will never take it: it is kept aside with the reason.
    Rejected(String),
}

/// Who posts the delta of an operation that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SentBy {
    /// Whoever delivers from the outbox.
    Deliverer,
    /// This process itself, until it releases it or ends.
    ThisProcess,
}

/// How much is in the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QueueCounts {
    /// Deltas that the master has neither accepted nor rejected.
    pub(crate) waiting: u64,
    /// Of these, the ones that must not be sent now: a process owns a newer row of the same decky and operation, or the row
    /// itself.
    pub(crate) held: u64,
    /// Rows of operations in flight.
    pub(crate) operations: u64,
    /// Rows that the master has rejected.
    pub(crate) rejected: u64,
    /// When the operation ended that the oldest waiting delta tells of, in microseconds since 1970.
    pub(crate) oldest: Option<i64>,
}

/// A row of which nobody can tell whether its owner still runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnjudgedRow {
    pub(crate) id: i64,
    pub(crate) decky: String,
    pub(crate) operation: String,
    /// For how long that cannot be told, to an hour, and while a process delivers.
    pub(crate) time: Duration,
}

impl fmt::Display for UnjudgedRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, decky, operation, time } = self;
        let (decky, operation, time) =
            (sanitize(decky), sanitize(operation), humantime::format_duration(*time));
        write!(f, "{operation} of {decky} (row {id}, for {time})")
    }
}

/// Rows that a thread wants to add: all of them, or none.
#[derive(Clone, Debug)]
pub(crate) enum NewRows {
    /// Deltas. The last is the newest.
    Deltas(Vec<LifecycleDelta>, SentBy),
    /// An operation that begins, on these deckies: a row in flight for each.
    Operation(Operation, Vec<String>),
}

impl NewRows {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Deltas(deltas, _) => deltas.len(),
            Self::Operation(_, deckies) => deckies.len(),
        }
    }

    /// This process owns the rows.
    pub(crate) fn is_owned(&self) -> bool {
        !matches!(self, Self::Deltas(_, SentBy::Deliverer))
    }
}

/// A change that must not be lost and cannot be refused: where the file does not take it, its copy does.
#[derive(Clone, Debug)]
pub(crate) enum RowChange {
    /// The master has accepted or rejected them.
    Answered(Vec<i64>, DeliveryResult),
    /// Operations that were in flight have ended, and who posts the deltas.
    Ended(Vec<QueuedDelta>, SentBy),
    /// Rows of an operation that never began: nobody heard of them in time.
    Withdrawn(Range<i64>),
    /// Their owner leaves these to whoever delivers.
    #[cfg(feature = "cli")]
    Released(Vec<i64>),
}

impl RowChange {
    /// How many rows it changes.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Answered(ids, _) => ids.len(),
            Self::Ended(ended, _) => ended.len(),
            Self::Withdrawn(ids) => ids.clone().count(),
            #[cfg(feature = "cli")]
            Self::Released(ids) => ids.len(),
        }
    }

    /// How many deltas the master has accepted or rejected.
    pub(crate) fn settled(&self) -> u64 {
        if let Self::Answered(ids, _) = self { ids.len() as u64 } else { 0 }
    }
}
