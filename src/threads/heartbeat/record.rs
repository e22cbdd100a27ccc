//! Records beats in the log and the stats. Runs on the heartbeat thread.

use std::mem;
use std::time::{Instant, SystemTime};

use super::HeartbeatLoop;
use crate::credentials::link::Expiry;
use crate::limits;
use crate::master::{PostResult, Verdict};
use crate::outbox::QueuedDelta;
use crate::panics::quietly;
use crate::stats::{Failure, Stats};
use crate::text::sanitize;

impl HeartbeatLoop {
    pub(super) fn record_next_beat(&self) {
        let next_beat = self.schedule.next_beat(self.ticks.next()).map(to_system_time);
        self.stats.change(|stats| stats.next_beat = next_beat);
    }

    pub(super) fn record_panic(&mut self, panic: &str) {
        self.stats.change(|stats| {
            stats.panics += 1;
            stats.record_failure(&PostResult::panicked(panic));
        });
        self.throttle.log("beat", panic, |times| {
            let names = self.link.names();
            log::error!("beat panicked, continuing: {names} times={times} panic={panic:?}");
        });
    }

    pub(super) fn record_source_panic(&mut self, panic: &str) {
        self.stats.change(|stats| stats.panics += 1);
        self.throttle.log("source", panic, |times| {
            let host = self.link.host();
            log::error!("status source panicked: host={host} times={times} panic={panic:?}");
        });
    }

    pub(super) fn record_suspended_delta(&mut self, delta: &QueuedDelta, reason: &str) {
        self.throttle.log("delta", reason, |times| {
            log::warn!(
                "delta suspended, the master fails on it: {} decky={:?} operation={} \
                 times={times} reason={reason:?}",
                self.link.names(),
                sanitize(delta.delta.decky()),
                delta.delta.operation(),
            );
        });
    }

    pub(super) fn record_suspended_states(&mut self, reason: String) {
        self.throttle.log("states", &reason, |times| {
            log::error!(
                "states suspended, the master fails on them: {} beats={} times={times} \
                 reason={reason:?}",
                self.link.names(),
                self.content.states_suspended_for().unwrap_or_default(),
            );
        });
        self.states_failure = Some(reason);
        let fault = self.why_no_states(None);
        self.stats.change(|stats| stats.status_fault = Some(fault));
    }

    pub(super) fn record_overdue_outbox(&mut self) {
        let Some(since) = self.outbox.busy_since() else { return };
        self.throttle.log("overdue", "", |times| {
            log::error!(
                "outbox disk does not answer; beats are sent without deltas: host={} \
                 seconds={:.1} times={times}",
                self.link.host(),
                since.elapsed().as_secs_f64(),
            );
        });
    }

    pub(super) fn warn_of_expiry(&mut self) {
        let Some(expiry) = self.link.expiry_to_log(SystemTime::now()) else { return };
        let (level, what) = match expiry {
            Expiry::DaysLeft(_) => {
                (log::Level::Warn, "certificate expires soon; enrol this host again")
            }
            Expiry::DaysExpired(_) => {
                (log::Level::Error, "certificate has expired; enrol this host again")
            }
        };
        quietly(|| {
            log::log!(
                level,
                "{what}: {} fingerprint={} {expiry}",
                self.link.names(),
                self.link.fingerprint()
            )
        });
    }

    /// Records a POST that was accepted.
    pub(super) fn record_success(&mut self, result: &PostResult, deltas: usize) {
        let (failure, beats) =
            self.stats.change(|stats| (stats.record_success(result, deltas), stats.beats));
        // A recovery is logged only if the failure was, or a failure of every second beat would
        // log two lines each time.
        let failure = failure.filter(|_| self.throttle.end("failure"));
        let names = self.link.names();
        quietly(|| {
            match failure {
                Some(failure) => {
                    log::info!("beats accepted again: {names} failures={}", failure.count);
                }
                None if beats == 1 => log::info!("first beat accepted: {names}"),
                None => (),
            }
            log::debug!(
                "beat accepted: {names} class={} ms={:.1} deltas={deltas} resumed={}",
                result.class,
                result.took.as_secs_f64() * 1e3,
                result.resumed,
            );
        });
    }

    /// Records a beat that failed. It counts once, however many POSTs it made.
    pub(super) fn record_failure(&mut self, result: &PostResult) {
        if result.verdict == Verdict::Accepted {
            return;
        }
        // The stop interrupted the POST. This is not a failure of the master or the network.
        let was_interrupted = self.link.is_interrupted()
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if was_interrupted && result.verdict == Verdict::NoResponse {
            let names = self.link.names();
            return quietly(|| log::info!("beat interrupted by the stop: {names}"));
        }
        let Failure { count, class, detail, .. } =
            self.stats.change(|stats| stats.record_failure(result));
        let (level, what) = match result.verdict {
            // Only an operator can fix these.
            Verdict::HostRejected if class == "http-404" => {
                (log::Level::Error, "master does not know this host; enrol it again")
            }
            Verdict::HostRejected => {
                (log::Level::Error, "master does not accept this host's certificate")
            }
            _ => (log::Level::Warn, "beat failed"),
        };
        let is_logged = self.throttle.count("failure", &class, Instant::now()).is_some();
        let level = if is_logged { level } else { log::Level::Debug };
        let names = self.link.names();
        let fingerprint = self.link.fingerprint();
        quietly(|| {
            log::log!(
                level,
                "{what}: {names} class={class} fingerprint={fingerprint} failures={count} \
                 detail={detail:?}"
            );
        });
    }

    /// Records whether this host counts as decommissioned after a POST with this verdict.
    pub(super) fn record_decommission(&mut self, verdict: Verdict) {
        let is_rejected = verdict == Verdict::HostRejected && self.files_missing;
        if !is_rejected {
            self.decommission.reset();
        }
        let is_decommissioned = is_rejected && self.decommission.record_rejection(Instant::now());
        let was_decommissioned =
            self.stats.change(|stats| mem::replace(&mut stats.decommissioned, is_decommissioned));
        if is_decommissioned && !was_decommissioned {
            quietly(|| {
                log::error!(
                    "host decommissioned; its ini and bundle do not exist and the master rejects \
                     it: {} fingerprint={} intervals={}",
                    self.link.names(),
                    self.link.fingerprint(),
                    limits::DECOMMISSIONED_INTERVALS,
                );
            });
        }
    }
}

/// Converts a time in the future to the system's clock.
fn to_system_time(at: Instant) -> SystemTime {
    SystemTime::now() + at.saturating_duration_since(Instant::now())
}

impl Stats {
    /// Records a POST that was accepted, with this number of deltas. Returns the failures before
    /// it.
    fn record_success(&mut self, result: &PostResult, deltas: usize) -> Option<Failure> {
        self.record_answer(result);
        self.beats += 1;
        self.delivered += deltas as u64;
        self.last_success = Some(SystemTime::now());
        self.failure.take()
    }

    /// Records a beat that failed. Returns the failures in a row, including this one.
    fn record_failure(&mut self, result: &PostResult) -> Failure {
        self.record_answer(result);
        let before = self.failure.take();
        let failure = Failure {
            count: before.as_ref().map_or(0, |before| before.count) + 1,
            since: before.as_ref().map_or_else(SystemTime::now, |before| before.since),
            class: result.class.clone(),
            detail: result.detail.clone(),
        };
        self.failure = Some(failure.clone());
        failure
    }

    fn record_answer(&mut self, result: &PostResult) {
        self.round_trip = Some(result.took);
        self.resumed = result.resumed;
    }
}
