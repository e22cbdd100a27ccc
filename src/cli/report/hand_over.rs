//! Hands deltas over to the process that delivers: the rows are committed without an owner, that
//! process is woken, and what becomes of the rows is read until the timeout. It sends them on its
//! open connection, with the status of the host. If it ends meanwhile, this process claims the rows
//! and posts them.

use std::ops::Range;
use std::time::Instant;

use super::{ReportResult, ReportWait, Reporter, SIGNAL};
use crate::delta::LifecycleDelta;
use crate::error::chain;
use crate::limits;
use crate::outbox::{NewRows, QueuedDelta, RowChange, RowStates, SentBy};

impl Reporter {
    /// Hands over deltas that have no row in the outbox yet.
    pub(super) fn hand_over_new(
        &mut self,
        deltas: &[LifecycleDelta],
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        match self.outbox.add(NewRows::Deltas(deltas.to_vec(), SentBy::Deliverer)) {
            Ok(first) => self.hand_over(&super::numbered(first, deltas.to_vec()), wait),
            // Nothing was queued.
            Err(error) if error.is_outbox() && !error.is_in_doubt() => {
                self.claim_and_post(deltas, wait)
            }
            Err(error) => ReportResult::failed(&error),
        }
    }

    /// Hands over deltas whose rows have no owner. Their ids follow each other.
    pub(super) fn hand_over(
        &self,
        deltas: &[QueuedDelta],
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        let ids = range(deltas);
        if !self.is_on_disk() {
            // The other process does not see them.
            self.claim(ids);
            return self.post(deltas, wait);
        }
        let mut is_listening = self.outbox.wake_deliverer();
        let mut next_check = Instant::now() + limits::REPORT_PAUSE;
        loop {
            let states = self.outbox.row_states(ids.clone());
            match &states {
                Ok(states) if states.waiting.is_empty() => return Self::delivered(states),
                Ok(states) if states.waiting == states.held => {
                    return ReportResult::Undelivered(super::HELD.to_owned());
                }
                Ok(_) => (),
                Err(error) => {
                    log::debug!("could not read the rows: error={:?}", chain(error));
                }
            }
            if wait.is_interrupted() {
                return ReportResult::Undelivered(SIGNAL.to_owned());
            }
            if !wait.has_time() {
                return ReportResult::Undelivered(NOT_IN_TIME.to_owned());
            }
            let is_check_due = !is_listening || Instant::now() >= next_check;
            if is_check_due && let Ok(states) = &states {
                if let Some(claimed) = self.claim_abandoned(deltas, states) {
                    return self.post_claimed(&claimed, states, wait);
                }
                is_listening = true;
                next_check = Instant::now() + limits::REPORT_PAUSE;
            }
            if wait.sleep(None, Instant::now() + limits::HAND_OVER_PAUSE).is_err() {
                return ReportResult::Undelivered(NOT_IN_TIME.to_owned());
            }
        }
    }

    fn delivered(states: &RowStates) -> ReportResult {
        match states.rejected.first() {
            None => ReportResult::Delivered,
            Some(reason) => ReportResult::Rejected(reason.clone()),
        }
    }

    /// Claims the rows that wait, if no process delivers. `None`: one does, and may have read the
    /// rows before they were claimed, so they are left to it.
    fn claim_abandoned(
        &self,
        deltas: &[QueuedDelta],
        states: &RowStates,
    ) -> Option<Vec<QueuedDelta>> {
        if self.outbox.has_deliverer() {
            return None;
        }
        self.claim(range(deltas));
        if self.outbox.has_deliverer() {
            let _ = self.outbox.change(RowChange::Released(states.waiting.clone()));
            return None;
        }
        let is_waiting = |queued: &&QueuedDelta| states.waiting.contains(&queued.id);
        Some(deltas.iter().filter(is_waiting).cloned().collect())
    }

    /// An error is logged by the report of the POST, which writes the change again.
    fn claim(&self, ids: Range<i64>) {
        let _ = self.outbox.change(RowChange::Claimed(ids));
    }

    fn post_claimed(
        &self,
        claimed: &[QueuedDelta],
        states: &RowStates,
        wait: &mut ReportWait<'_>,
    ) -> ReportResult {
        match (self.post(claimed, wait), states.rejected.first()) {
            (ReportResult::Delivered, Some(reason)) => ReportResult::Rejected(reason.clone()),
            (result, _) => result,
        }
    }
}

const NOT_IN_TIME: &str = "the running agent has not delivered it in time; its log says why";

/// The ids, which follow each other.
fn range(deltas: &[QueuedDelta]) -> Range<i64> {
    let first = deltas.first().map_or(0, |queued| queued.id);
    first..first + deltas.len() as i64
}
