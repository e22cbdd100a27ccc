//! Hands deltas over to the process that delivers: the rows are committed without an owner, that
//! process is woken, and what becomes of the rows is read until the timeout. It sends them on its
//! open connection, with the status of the host. If it ends meanwhile, this process claims the rows
//! and posts them.

use std::ops::Range;
use std::time::Instant;

use super::{ReportResult, ReportWait, Reporter, SIGNAL};
use crate::delta::LifecycleDelta;
use crate::error::{Error, chain};
use crate::limits;
use crate::outbox::{NewRows, QueuedDelta, RowChange, RowStates, SentBy};

impl Reporter {
    /// Whether another process delivers from the file, and listens.
    pub(super) fn can_hand_over(&self) -> bool {
        self.is_on_disk() && self.outbox.is_deliverer_listening()
    }

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
        let since = Instant::now();
        let mut next_check = since;
        if self.outbox.wake_deliverer() {
            next_check += limits::REPORT_PAUSE;
        }
        loop {
            let states = self.outbox.row_states(ids.clone());
            if let Some(result) = result(&states, wait) {
                return result;
            }
            if Instant::now() >= next_check {
                if let Some((claimed, states)) = self.claim_abandoned(deltas) {
                    return self.post_claimed(&claimed, &states, wait);
                }
                next_check = Instant::now() + limits::REPORT_PAUSE;
            }
            let pause = since.elapsed() / limits::HAND_OVER_READS;
            let pause = pause.clamp(limits::HAND_OVER_PAUSE, limits::REPORT_PAUSE);
            if wait.sleep(None, Instant::now() + pause).is_err() {
                return ReportResult::Undelivered(NOT_IN_TIME.to_owned());
            }
        }
    }

    /// Claims the deltas that wait, if no process listens or delivers. `None`: one does, and may
    /// have read the rows before they were claimed, so they are left to it. One that has begun to
    /// deliver since is woken. The second value has the rows after the claim: the process that has
    /// ended may have delivered some.
    fn claim_abandoned(&self, deltas: &[QueuedDelta]) -> Option<(Vec<QueuedDelta>, RowStates)> {
        if self.outbox.wake_deliverer() || self.outbox.has_deliverer() {
            return None;
        }
        let ids = range(deltas);
        self.claim(ids.clone());
        let states = self.outbox.row_states(ids).ok().filter(|_| !self.outbox.has_deliverer());
        let Some(states) = states else {
            let _ = self.outbox.change(RowChange::Released(super::ids(deltas)));
            return None;
        };
        let is_waiting = |queued: &&QueuedDelta| states.waiting.binary_search(&queued.id).is_ok();
        Some((deltas.iter().filter(is_waiting).cloned().collect(), states))
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
        match self.post(claimed, wait) {
            ReportResult::Delivered => delivered(states),
            result => result,
        }
    }
}

/// The result, if it is known or no time is left.
fn result(states: &Result<RowStates, Error>, wait: &mut ReportWait<'_>) -> Option<ReportResult> {
    match states {
        Ok(states) if states.waiting.is_empty() => return Some(delivered(states)),
        Ok(states) if states.waiting == states.held => {
            return Some(ReportResult::Undelivered(super::HELD.to_owned()));
        }
        Ok(_) => (),
        Err(error) => log::debug!("could not read the rows: error={:?}", chain(error)),
    }
    let why = if wait.is_interrupted() { SIGNAL } else { NOT_IN_TIME };
    (!wait.has_time()).then(|| ReportResult::Undelivered(why.to_owned()))
}

/// The result when no delta waits.
fn delivered(states: &RowStates) -> ReportResult {
    match states.rejected.first() {
        None => ReportResult::Delivered,
        Some(reason) => ReportResult::Rejected(reason.clone()),
    }
}

const NOT_IN_TIME: &str = "the running agent has not delivered it in time; its log says why";

/// The ids, which follow each other.
fn range(deltas: &[QueuedDelta]) -> Range<i64> {
    let first = deltas.first().map_or(0, |queued| queued.id);
    first..first + deltas.len() as i64
}
