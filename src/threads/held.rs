//! What holds back a delta that was read a moment ago: an operation has begun since that is newer, or the master has answered.
//! A value, without a thread of its own.

use std::collections::{HashSet, VecDeque};

use super::requests::Generation;
use crate::delta::Operation;
use crate::limits;
use crate::outbox::{NewRows, QueuedDelta, RowChange};

/// What a request holds back.
#[derive(Debug)]
pub(super) enum Hold {
    Begun(Operation, Vec<String>),
    Answered(Vec<i64>),
}

impl Hold {
    pub(super) fn of_added(add: &NewRows) -> Option<Self> {
        match add {
            NewRows::Operation(operation, deckies) => {
                Some(Self::Begun(*operation, deckies.clone()))
            }
            NewRows::Deltas(..) => None,
        }
    }

    pub(super) fn of_changed(change: &RowChange) -> Option<Self> {
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

/// The last ones, of a bounded number of rows.
#[derive(Debug, Default)]
pub(super) struct HeldDeltas {
    /// Each with the generation that it began.
    last: VecDeque<(Generation, Hold)>,
    rows: usize,
    /// Older ones are not known any more.
    forgotten: Generation,
}

impl HeldDeltas {
    /// What a request holds back that was queued and began that generation.
    pub(super) fn note(&mut self, began: Generation, hold: Option<Hold>) {
        let Some(hold) = hold else { return };
        self.rows += hold.rows();
        self.last.push_back((began, hold));
        while self.rows > limits::RECENT_ROWS
            && let Some((forgotten, hold)) = self.last.pop_front()
        {
            self.rows -= hold.rows();
            self.forgotten = forgotten;
        }
    }

    /// Leaves of these deltas, which were read in that generation, what nothing holds back since. `false`: that is not known.
    pub(super) fn leave_free(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        let (mut begun, mut settled) = (HashSet::new(), HashSet::<i64>::new());
        for (_, hold) in self.last.iter().rev().take_while(|(began, _)| *began > read) {
            match hold {
                Hold::Begun(operation, deckies) => {
                    begun.extend(deckies.iter().map(|decky| (decky.as_str(), *operation)))
                }
                Hold::Answered(ids) => settled.extend(ids),
            }
        }
        deltas.retain(|QueuedDelta { id, delta }| {
            !settled.contains(id) && !begun.contains(&(delta.decky(), delta.operation()))
        });
        read >= self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::LifecycleDelta;
    use crate::outbox::DeliveryResult;

    fn begin(deckies: usize) -> Option<Hold> {
        Hold::of_added(&NewRows::Operation(
            Operation::Deploy,
            (0..deckies).map(|n| format!("d{n}")).collect(),
        ))
    }

    /// What is left of three deltas.
    fn left(holds: &HeldDeltas, read: u64) -> Option<Vec<i64>> {
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
        let is_known = holds.leave_free(Generation(read), &mut deltas);
        is_known.then(|| deltas.into_iter().map(|kept| kept.id).collect())
    }

    #[test]
    fn an_operation_that_began_since_and_an_answer_hold_back_these_deltas_and_no_others() {
        let mut holds = HeldDeltas::default();
        assert_eq!(left(&holds, 0), Some(vec![1, 2, 3]));
        holds.note(Generation(1), begin(1));
        holds.note(
            Generation(2),
            Hold::of_changed(&RowChange::Answered(vec![3], DeliveryResult::Delivered)),
        );
        holds.note(Generation(3), None);
        assert_eq!(
            [0, 1, 2].map(|read| left(&holds, read).unwrap()),
            [vec![2], vec![1, 2], vec![1, 2, 3]]
        );
    }

    #[test]
    fn what_is_forgotten_is_not_known() {
        let mut holds = HeldDeltas::default();
        holds.note(Generation(1), begin(1));
        holds.note(Generation(2), begin(limits::RECENT_ROWS));
        assert_eq!((left(&holds, 0), left(&holds, 1)), (None, Some(vec![2, 3])));
        holds.note(Generation(3), begin(limits::RECENT_ROWS + 1));
        assert_eq!((left(&holds, 2), left(&holds, 3)), (None, Some(vec![1, 2, 3])));
    }
}
