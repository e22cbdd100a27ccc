//! What holds back deltas that were read before: an operation that began since, or the master's
//! answer. A value, used by any thread under the lock of the request queue.

use std::collections::{HashSet, VecDeque};

use super::requests::Generation;
use crate::delta::Operation;
use crate::limits;
use crate::outbox::{NewRows, QueuedDelta, RowChange};

/// Why a request holds back deltas, and which.
#[derive(Debug)]
pub(super) enum HoldCause {
    Begun(Operation, Vec<String>),
    Answered(Vec<i64>),
}

impl HoldCause {
    pub(super) fn of_new_rows(rows: &NewRows) -> Option<Self> {
        match rows {
            NewRows::Operation(operation, deckies) => {
                Some(Self::Begun(*operation, deckies.clone()))
            }
            NewRows::Deltas(..) => None,
        }
    }

    pub(super) fn of_change(change: &RowChange) -> Option<Self> {
        if let RowChange::Answered(ids, _) = change {
            Some(Self::Answered(ids.clone()))
        } else {
            None
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Begun(_, deckies) => deckies.len(),
            Self::Answered(ids) => ids.len(),
        }
    }
}

/// The most recent holds, bounded in their rows.
#[derive(Debug, Default)]
pub(super) struct HeldDeltas {
    /// Each with the generation that it started.
    recent: VecDeque<(Generation, HoldCause)>,
    rows: usize,
    /// The holds up to this generation were dropped.
    forgotten: Generation,
}

impl HeldDeltas {
    /// Records the hold of a request that has just started generation `started`.
    pub(super) fn record(&mut self, started: Generation, hold: Option<HoldCause>) {
        let Some(hold) = hold else { return };
        self.rows += hold.rows();
        self.recent.push_back((started, hold));
        while self.rows > limits::RECENT_ROWS
            && let Some((forgotten, hold)) = self.recent.pop_front()
        {
            self.rows -= hold.rows();
            self.forgotten = forgotten;
        }
    }

    /// Removes the deltas, read in generation `read`, that something has held back since. Returns
    /// `false` if that is no longer known.
    pub(super) fn remove_held(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        let mut begun = HashSet::new();
        let mut answered = HashSet::<i64>::new();
        for (_, hold) in self.recent.iter().rev().take_while(|(started, _)| *started > read) {
            match hold {
                HoldCause::Begun(operation, deckies) => {
                    begun.extend(deckies.iter().map(|decky| (decky.as_str(), *operation)))
                }
                HoldCause::Answered(ids) => answered.extend(ids),
            }
        }
        deltas.retain(|QueuedDelta { id, delta }| {
            !answered.contains(id) && !begun.contains(&(delta.decky(), delta.operation()))
        });
        read >= self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::LifecycleDelta;
    use crate::outbox::DeliveryResult;

    fn begin(deckies: usize) -> Option<HoldCause> {
        HoldCause::of_new_rows(&NewRows::Operation(
            Operation::Deploy,
            (0..deckies).map(|n| format!("d{n}")).collect(),
        ))
    }

    /// The ids that remain of three deltas.
    fn remaining(holds: &HeldDeltas, read: u64) -> Option<Vec<i64>> {
        let delta = |(id, decky, operation)| QueuedDelta {
            id,
            delta: LifecycleDelta::succeeded(decky, operation),
        };
        let deltas = [
            (1, "d0", Operation::Deploy),
            (2, "d0", Operation::Mutate),
            (3, "e", Operation::Deploy),
        ];
        let mut deltas: Vec<_> = deltas.into_iter().map(delta).collect();
        let is_known = holds.remove_held(Generation(read), &mut deltas);
        is_known.then(|| deltas.into_iter().map(|queued| queued.id).collect())
    }

    #[test]
    fn only_deltas_of_a_begun_operation_and_answered_ones_are_removed() {
        let mut holds = HeldDeltas::default();
        assert_eq!(remaining(&holds, 0), Some(vec![1, 2, 3]));
        holds.record(Generation(1), begin(1));
        holds.record(
            Generation(2),
            HoldCause::of_change(&RowChange::Answered(vec![3], DeliveryResult::Delivered)),
        );
        holds.record(Generation(3), None);
        assert_eq!(
            [0, 1, 2].map(|read| remaining(&holds, read).unwrap()),
            [vec![2], vec![1, 2], vec![1, 2, 3]]
        );
    }

    #[test]
    fn dropped_holds_make_the_result_unknown() {
        let mut holds = HeldDeltas::default();
        holds.record(Generation(1), begin(1));
        holds.record(Generation(2), begin(limits::RECENT_ROWS));
        assert_eq!((remaining(&holds, 0), remaining(&holds, 1)), (None, Some(vec![2, 3])));
        holds.record(Generation(3), begin(limits::RECENT_ROWS + 1));
        assert_eq!((remaining(&holds, 2), remaining(&holds, 3)), (None, Some(vec![1, 2, 3])));
    }
}
