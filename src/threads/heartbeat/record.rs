//! What the log and the stats say of beats. Runs on the heartbeat thread.

use std::mem;
use std::time::{Instant, SystemTime};

use super::HeartbeatLoop;
use crate::credentials::link::Expiry;
use crate::limits;
use crate::master::{PostResult, Verdict};
use crate::panics::quietly;
use crate::stats::{Failure, Stats};

impl HeartbeatLoop {
    pub(super) fn note_next_beat(&self) {
        let next_beat = self.schedule.next_beat(self.ticks.next()).map(wall);
        self.stats.change(|stats| stats.next_beat = next_beat);
    }

    pub(super) fn note_overdue(&mut self) {
        let Some(since) = self.outbox.busy_since() else { return };
        if let Some(times) = self.repeats.count("overdue", "", Instant::now()) {
            self.overdue_said = true;
            let (host, seconds) = (self.link.host(), since.elapsed().as_secs_f64());
            quietly(|| {
                log::error!(
                    "the disk of the outbox does not answer, beating without deltas: host={host} seconds={seconds:.1} \
                     times={times}"
                );
            });
        }
    }

    pub(super) fn warn_of_expiry(&mut self) {
        let Some(expiry) = self.link.expiry_to_log(SystemTime::now()) else { return };
        let (level, what) = match expiry {
            Expiry::DaysLeft(_) => {
                (log::Level::Warn, "the certificate expires soon, enrol this host again")
            }
            Expiry::DaysExpired(_) => {
                (log::Level::Error, "the certificate has expired, enrol this host again")
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

    pub(super) fn accepted(&mut self, reply: &PostResult, deltas: usize) {
        let (ended, beats) =
            self.stats.change(|stats| (stats.accepted(reply, deltas), stats.beats));
        let (names, ms) = (self.link.names(), reply.took.as_secs_f64() * 1e3);
        let (class, resumed) = (&reply.class, reply.resumed);
        // What comes and goes with every second beat is not worth two lines each time.
        let ended = ended.filter(|_| mem::take(&mut self.failure_said));
        quietly(|| {
            match ended {
                Some(failure) => log::info!("beating again: {names} failures={}", failure.count),
                None if beats == 1 => log::info!("first beat accepted: {names}"),
                None => (),
            }
            log::debug!(
                "beat accepted: {names} class={class} ms={ms:.1} deltas={deltas} resumed={resumed}"
            );
        });
    }

    /// A beat that failed counts once, however many POSTs it made. What fails again is logged at a decreasing rate.
    pub(super) fn note(&mut self, reply: &PostResult) {
        if reply.verdict == Verdict::Accepted {
            return;
        }
        // The stop has cut the POST; this is no failure of the master or the network.
        let is_cut = self.link.is_interrupted()
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if is_cut && reply.verdict == Verdict::NoResponse {
            let names = self.link.names();
            return quietly(|| log::info!("beat interrupted by the stop: {names}"));
        }
        let Failure { count, class, detail, .. } = self.stats.change(|stats| stats.failed(reply));
        let (level, what) = match reply.verdict {
            // Nobody but an operator can mend this.
            Verdict::HostRejected if class == "http-404" => {
                (log::Level::Error, "the master does not know this host, enrol it again")
            }
            Verdict::HostRejected => {
                (log::Level::Error, "the master does not accept this host's certificate")
            }
            _ => (log::Level::Warn, "beat failed"),
        };
        let is_said = self.repeats.count("failure", &class, Instant::now()).is_some();
        self.failure_said |= is_said;
        let level = if is_said { level } else { log::Level::Debug };
        let (names, fingerprint) = (self.link.names(), self.link.fingerprint());
        quietly(|| {
            log::log!(
                level,
                "{what}: {names} class={class} fingerprint={fingerprint} failures={count} detail={detail:?}"
            );
        });
    }

    /// Whether the answers of the last intervals and the files say that this host is decommissioned.
    pub(super) fn note_decommission(&mut self, verdict: Verdict) {
        let says_so = verdict == Verdict::HostRejected && self.files_are_gone;
        let is_so = self.decommission.answered(says_so, Instant::now());
        let was_so = self.stats.change(|stats| mem::replace(&mut stats.decommissioned, is_so));
        if is_so && !was_so {
            let (names, fingerprint) = (self.link.names(), self.link.fingerprint());
            let intervals = limits::DECOMMISSIONED_INTERVALS;
            quietly(|| {
                log::error!(
                    "this host is decommissioned, its ini and bundle are gone and the master does not accept it: {names} \
                     fingerprint={fingerprint} intervals={intervals}"
                );
            });
        }
    }
}

/// A moment to come, by the clock that people read.
fn wall(at: Instant) -> SystemTime {
    SystemTime::now() + at.saturating_duration_since(Instant::now())
}

impl Stats {
    /// A POST was accepted, with so many deltas. The failures that it ends.
    pub(crate) fn accepted(&mut self, reply: &PostResult, deltas: usize) -> Option<Failure> {
        self.answered(reply);
        self.beats += 1;
        self.delivered += deltas as u64;
        self.last_success = Some(SystemTime::now());
        self.failure.take()
    }

    /// A beat was not accepted. The failure with this one in it.
    pub(crate) fn failed(&mut self, reply: &PostResult) -> Failure {
        self.answered(reply);
        let before = self.failure.take();
        let failure = Failure {
            count: before.as_ref().map_or(0, |before| before.count) + 1,
            since: before.as_ref().map_or_else(SystemTime::now, |before| before.since),
            class: reply.class.clone(),
            detail: reply.detail.clone(),
        };
        self.failure = Some(failure.clone());
        failure
    }

    fn answered(&mut self, reply: &PostResult) {
        self.round_trip = Some(reply.took);
        self.resumed = reply.resumed;
    }
}
