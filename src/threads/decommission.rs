//! Whether this host was decommissioned: its ini and its bundle do not exist, and the master
//! rejects it. A value of the heartbeat thread.

use std::time::{Duration, Instant};

use crate::limits;

/// Counts the rejections in a row.
#[derive(Debug)]
pub(crate) struct Decommission {
    interval: Duration,
    /// When the first rejection came, and the number of rejections.
    rejected: Option<(Instant, u32)>,
}

impl Decommission {
    pub(crate) fn new(interval: Duration) -> Self {
        Self { interval, rejected: None }
    }

    /// Records an answer that is 403 or 404 while the files do not exist.
    ///
    /// Returns whether the host counts as decommissioned: rejections without a break for
    /// [`limits::DECOMMISSIONED_INTERVALS`], and more answers than that, because a process that was
    /// suspended has not asked.
    pub(crate) fn record_rejection(&mut self, now: Instant) -> bool {
        let (since, count) =
            self.rejected.map_or((now, 1), |(since, count)| (since, count.saturating_add(1)));
        self.rejected = Some((since, count));
        count > limits::DECOMMISSIONED_INTERVALS
            && now.saturating_duration_since(since)
                >= self.interval * limits::DECOMMISSIONED_INTERVALS
    }

    /// Records any other result.
    pub(crate) fn reset(&mut self) {
        self.rejected = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(30);

    /// Whether the host is decommissioned after these answers, one in each interval.
    fn after(answers: &[bool]) -> bool {
        let mut decommission = Decommission::new(INTERVAL);
        let start = Instant::now();
        let mut is_decommissioned = false;
        for (n, is_rejected) in (0..).zip(answers) {
            is_decommissioned = *is_rejected && decommission.record_rejection(start + INTERVAL * n);
            if !is_rejected {
                decommission.reset();
            }
        }
        is_decommissioned
    }

    #[test]
    fn twenty_intervals_of_rejections_count() {
        assert!(!after(&[true; 20]) && after(&[true; 21]) && after(&[true; 40]));
    }

    #[test]
    fn any_other_result_starts_over() {
        for before in 0..21 {
            let broken =
                |after: usize| [vec![true; before], vec![false], vec![true; after]].concat();
            assert!(!after(&broken(20)) && after(&broken(21)), "{before}");
        }
    }

    #[test]
    fn needs_both_the_answers_and_the_time() {
        let mut decommission = Decommission::new(INTERVAL);
        let start = Instant::now();
        assert!((0..100).all(|_| !decommission.record_rejection(start)), "deltas cause beats, too");
        let mut decommission = Decommission::new(INTERVAL);
        assert!(!decommission.record_rejection(start));
        assert!(
            !decommission.record_rejection(start + INTERVAL * 100),
            "the process was suspended"
        );
    }
}
