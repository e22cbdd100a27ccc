//! When this host counts as decommissioned: its ini and its bundle are gone, and the master does not accept it any more. A pure
//! value; the heartbeat thread asks it with each answer.

use std::time::{Duration, Instant};

use crate::limits;

/// The answers that say so in a row.
#[derive(Debug)]
pub(crate) struct Decommission {
    interval: Duration,
    /// When the first of them came, and how many there were.
    refused: Option<(Instant, u32)>,
}

impl Decommission {
    pub(crate) fn new(interval: Duration) -> Self {
        Self { interval, refused: None }
    }

    /// An answer has come, or a beat has ended without one. `says_so`: it is 403 or 404, and the files are gone. Whether the
    /// host is decommissioned by now: without a break for so many intervals, and in as many answers, since a process that was
    /// suspended has not asked.
    pub(crate) fn answered(&mut self, says_so: bool, now: Instant) -> bool {
        if !says_so {
            self.refused = None;
            return false;
        }
        let (since, count) =
            self.refused.map_or((now, 1), |(since, count)| (since, count.saturating_add(1)));
        self.refused = Some((since, count));
        count > limits::DECOMMISSIONED_INTERVALS
            && now.saturating_duration_since(since)
                >= self.interval * limits::DECOMMISSIONED_INTERVALS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(30);

    /// The answers of each interval, and whether the host is decommissioned after the last one.
    fn after(answers: &[bool]) -> bool {
        let (mut rule, start) = (Decommission::new(INTERVAL), Instant::now());
        (0..)
            .zip(answers)
            .map(|(n, says_so)| rule.answered(*says_so, start + INTERVAL * n))
            .last()
            .unwrap()
    }

    #[test]
    fn twenty_intervals_without_a_break_and_not_before() {
        assert!(!after(&[true; 20]) && after(&[true; 21]) && after(&[true; 40]));
    }

    #[test]
    fn each_break_starts_them_anew() {
        for before in 0..21 {
            let broken =
                |after: usize| [vec![true; before], vec![false], vec![true; after]].concat();
            assert!(!after(&broken(20)) && after(&broken(21)), "{before}");
        }
    }

    #[test]
    fn neither_many_answers_nor_a_long_time_suffices() {
        let (mut rule, start) = (Decommission::new(INTERVAL), Instant::now());
        assert!((0..100).all(|_| !rule.answered(true, start)), "deltas make beats, too");
        let mut rule = Decommission::new(INTERVAL);
        assert!(!rule.answered(true, start));
        assert!(!rule.answered(true, start + INTERVAL * 100), "the process was suspended");
    }
}
