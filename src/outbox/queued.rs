//! The values that other threads exchange with the outbox thread: its role, queued deltas, new rows,
//! and changes of rows. For any thread. None of them depends on SQLite.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::delta::{LifecycleDelta, Operation};
use crate::limits;
use crate::text::sanitize;

/// A delta with the id of its row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueuedDelta {
    pub(crate) id: i64,
    pub(crate) delta: LifecycleDelta,
}

/// The master's answer to a delta, which is not sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryResult {
    /// Accepted. The row is deleted.
    Delivered,
    /// Rejected. The row stays, with the reason.
    Rejected(String),
}

/// What a process does with an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It delivers, and recovers the rows of processes that have ended: one process at a time.
    Deliver,
    /// It will deliver when no other process does.
    DeliverLater,
    /// As `Deliver`, or as `DeliverLater` if another process delivers. Rows of processes that have
    /// ended are recovered only after [`limits::RESUME_TIME`](crate::limits::RESUME_TIME), so that
    /// this process may take them over.
    Resume,
    /// It only adds rows.
    Contribute,
}

/// What has become of deltas of one addition.
#[cfg(feature = "cli")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RowStates {
    /// Those that wait.
    pub(crate) waiting: Vec<i64>,
    /// Those of them that must not be sent now.
    pub(crate) held: Vec<i64>,
    /// The reasons for which the master has rejected the others.
    pub(crate) rejected: Vec<String>,
}

/// Which process sends a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SentBy {
    /// The process that delivers from the outbox.
    Deliverer,
    /// This process, until it releases the delta or ends.
    ThisProcess,
}

/// The number of rows in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QueueCounts {
    /// Deltas that the master has neither accepted nor rejected.
    pub(crate) waiting: u64,
    /// Those of them that must not be sent now: a process owns the row, or a newer one of the same
    /// decky and operation.
    pub(crate) held: u64,
    /// Rows of operations in flight.
    pub(crate) operations: u64,
    /// Rows that the master has rejected.
    pub(crate) rejected: u64,
    /// The completion time of the oldest waiting delta, in microseconds since 1970.
    pub(crate) oldest: Option<i64>,
}

/// A row whose owner cannot be checked: it is unknown whether that process is running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StuckRow {
    pub(crate) id: i64,
    pub(crate) decky: String,
    pub(crate) operation: String,
    /// For how long, rounded to an hour. Only time in which a process delivers is counted.
    pub(crate) duration: Duration,
}

impl StuckRow {
    /// The first rows, as text for people.
    pub(crate) fn list(rows: &[Self]) -> String {
        let rows = rows.iter().take(limits::OUTBOX_STUCK_NAMED).map(Self::to_string);
        rows.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for StuckRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = sanitize(&self.operation);
        let decky = sanitize(&self.decky);
        let duration = humantime::format_duration(self.duration);
        write!(f, "{operation} of {decky} (row {}, for {duration})", self.id)
    }
}

/// Rows to add. Either all are added, or none.
#[derive(Clone, Debug)]
pub(crate) enum NewRows {
    /// Deltas. The last one is the newest.
    Deltas(Vec<LifecycleDelta>, SentBy),
    /// An operation that begins: a row in flight for each of its deckies.
    Operation(Operation, Vec<String>),
}

impl NewRows {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Deltas(deltas, _) => deltas.len(),
            Self::Operation(_, deckies) => deckies.len(),
        }
    }

    /// Whether this process owns the rows.
    pub(crate) fn is_owned(&self) -> bool {
        !matches!(self, Self::Deltas(_, SentBy::Deliverer))
    }
}

/// A change of rows that is never lost. If the file cannot be written, the change is made in
/// memory.
#[derive(Clone, Debug)]
pub(crate) enum RowChange {
    /// The master has accepted or rejected the deltas with these ids.
    Answered(Vec<i64>, DeliveryResult),
    /// Operations in flight have ended.
    Ended(Vec<QueuedDelta>, SentBy),
    /// An operation is cancelled, because its caller has not received the answer to its begin.
    Withdrawn(Range<i64>),
    /// This process no longer owns these rows. The process that delivers sends them.
    #[cfg(feature = "cli")]
    Released(Vec<i64>),
    /// This process now sends the deltas with these ids that nobody owns.
    #[cfg(feature = "cli")]
    Claimed(Range<i64>),
}

impl RowChange {
    /// The number of rows that it changes.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Answered(ids, _) => ids.len(),
            Self::Ended(ended, _) => ended.len(),
            Self::Withdrawn(ids) => ids.clone().count(),
            #[cfg(feature = "cli")]
            Self::Released(ids) => ids.len(),
            #[cfg(feature = "cli")]
            Self::Claimed(ids) => ids.clone().count(),
        }
    }

    /// The number of deltas that the master has accepted or rejected.
    pub(crate) fn answered(&self) -> u64 {
        if matches!(self, Self::Answered(..)) { self.rows() as u64 } else { 0 }
    }
}
