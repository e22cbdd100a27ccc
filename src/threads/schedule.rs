//! When a beat is sent. Values only: the heartbeat thread, or a test, passes the time in.
//!
//! - A tick or a delta triggers a beat, and the status thread is asked for a snapshot. The beat is
//!   sent when the snapshot arrives, or without one when the timeout ends. The timeout counts from
//!   the request, so a source that has not answered for long is not waited for again. The first
//!   beat waits up to a second for the topology, because the master orders a rebuild without it.
//! - A snapshot that arrives later is sent in a beat of its own. A delta that arrives while a
//!   snapshot is being made requests another one, because that snapshot may have been begun before.
//! - After a failure no beat is sent until the backoff ends, whatever triggers one. After a
//!   rejected host the next tick sends one.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never};

use crate::limits;
use crate::master::Verdict;

/// What triggers a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    First,
    Tick,
    Delta,
    Retry,
    /// A caller of `flush` waits.
    Flush,
}

/// Whether to request a snapshot from the status thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum SnapshotRequest {
    Needed,
    /// No beat will be sent, or a request is pending.
    NotNeeded,
}

/// What to do when a timer has fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerAction {
    /// The timeout has ended: send a beat without a snapshot.
    Beat,
    /// The backoff has ended: trigger a retry.
    Retry,
    /// Nothing is due.
    Nothing,
}

/// Whether beats may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendGate {
    Open,
    /// Closed until then.
    Until(Instant),
    /// Closed until the next tick.
    NextTick,
}

#[derive(Debug)]
pub(crate) struct Schedule {
    interval: Duration,
    /// A beat was triggered, and is sent at this time at the latest.
    beat_deadline: Option<Instant>,
    /// When the pending snapshot request was made.
    snapshot_requested: Option<Instant>,
    /// The pending snapshot may have been begun before the last delta.
    request_again: bool,
    gate: SendGate,
    backoff: Duration,
    /// Until then the first beat is not sent without its topology.
    topology_deadline: Option<Instant>,
}

impl Schedule {
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            beat_deadline: None,
            snapshot_requested: None,
            request_again: false,
            gate: SendGate::Open,
            backoff: limits::BACKOFF_START.min(interval),
            topology_deadline: None,
        }
    }

    /// Triggers a beat.
    pub(crate) fn trigger(&mut self, trigger: Trigger, now: Instant) -> SnapshotRequest {
        match self.gate {
            SendGate::Open => (),
            SendGate::Until(_) => return SnapshotRequest::NotNeeded,
            SendGate::NextTick if trigger != Trigger::Tick => return SnapshotRequest::NotNeeded,
            SendGate::NextTick => self.gate = SendGate::Open,
        }
        let (requested, request) = match self.snapshot_requested {
            Some(requested) => {
                self.request_again |= trigger == Trigger::Delta;
                (requested, SnapshotRequest::NotNeeded)
            }
            None => {
                self.request_again = false;
                (*self.snapshot_requested.insert(now), SnapshotRequest::Needed)
            }
        };
        if trigger == Trigger::First {
            self.topology_deadline = Some(now + limits::TOPOLOGY_WAIT);
        }
        let deadline = (requested + self.snapshot_timeout(trigger))
            .max(now)
            .max(self.topology_deadline.unwrap_or(now));
        self.beat_deadline =
            Some(self.beat_deadline.map_or(deadline, |earlier| earlier.min(deadline)));
        request
    }

    /// How long a beat waits for its snapshot.
    fn snapshot_timeout(&self, trigger: Trigger) -> Duration {
        match trigger {
            Trigger::First | Trigger::Delta | Trigger::Retry | Trigger::Flush => {
                limits::DELTA_WAIT.min(self.interval / 2)
            }
            // At most half an interval, or a short interval would end before its beat is sent.
            Trigger::Tick => limits::TICK_WAIT.min(self.interval / 2),
        }
    }

    /// The topology is known. The first beat no longer waits for it.
    pub(crate) fn topology_received(&mut self, now: Instant) {
        if self.topology_deadline.take().is_some() {
            let deadline = self
                .snapshot_requested
                .map(|requested| (requested + self.snapshot_timeout(Trigger::First)).max(now));
            self.beat_deadline = self.beat_deadline.and(deadline).or(self.beat_deadline);
        }
    }

    /// Until when the first beat waits for the topology. `None`: it does not wait.
    pub(crate) fn topology_deadline(&self) -> Option<Instant> {
        self.topology_deadline
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// How long one POST may take.
    pub(crate) fn post_limit(&self) -> Duration {
        (self.interval * 2 / 3).clamp(limits::MIN_POST, limits::POST)
    }

    /// The pending snapshot has arrived. Returns whether to send a beat with it now.
    pub(crate) fn snapshot_received(&mut self) -> bool {
        self.snapshot_requested = None;
        self.topology_deadline = None;
        let sends_beat = self.gate == SendGate::Open;
        if sends_beat {
            self.beat_deadline = None;
        }
        sends_beat
    }

    /// Requests another snapshot if a delta has arrived since the last one was requested. To be
    /// called after the beat with that one.
    pub(crate) fn request_again(&mut self, now: Instant) -> SnapshotRequest {
        if std::mem::take(&mut self.request_again)
            && self.gate == SendGate::Open
            && self.snapshot_requested.is_none()
        {
            self.snapshot_requested = Some(now);
            return SnapshotRequest::Needed;
        }
        SnapshotRequest::NotNeeded
    }

    /// Receives a message when [`timer_fired`](Self::timer_fired) is to be called.
    pub(crate) fn timer(&self) -> Receiver<Instant> {
        match (self.gate, self.beat_deadline) {
            (SendGate::Until(end), _) => at(end),
            (SendGate::Open, Some(deadline)) => at(deadline),
            _ => never(),
        }
    }

    pub(crate) fn timer_fired(&mut self, now: Instant) -> TimerAction {
        match (self.gate, self.beat_deadline) {
            (SendGate::Until(end), _) if end <= now => {
                self.gate = SendGate::Open;
                TimerAction::Retry
            }
            (SendGate::Open, Some(deadline)) if deadline <= now => {
                self.beat_deadline = None;
                self.topology_deadline = None;
                TimerAction::Beat
            }
            _ => TimerAction::Nothing,
        }
    }

    /// Records how a beat ended. `random` is from 0 to 1.
    pub(crate) fn beat_ended(&mut self, verdict: Verdict, now: Instant, random: f64) {
        self.beat_deadline = None;
        self.gate = match verdict {
            Verdict::Accepted => SendGate::Open,
            Verdict::BodyRejected | Verdict::HostRejected => SendGate::NextTick,
            // A little later than requested, or the whole fleet returns at the same time.
            Verdict::RetryLater(Some(wait)) => {
                SendGate::Until(now + wait.mul_f64(1.0 + random / 10.0))
            }
            // Jitter after the cap, because a fleet needs it most when the backoff has reached the
            // cap.
            Verdict::RetryLater(None) | Verdict::NoResponse => {
                SendGate::Until(now + self.backoff.mul_f64(0.5 + random / 2.0))
            }
        };
        self.backoff = match verdict {
            Verdict::RetryLater(_) | Verdict::NoResponse => (self.backoff * 2).min(self.interval),
            _ => limits::BACKOFF_START.min(self.interval),
        };
    }

    /// When the next beat is due, given the time of the next tick.
    pub(crate) fn next_beat(&self, tick: Option<Instant>) -> Option<Instant> {
        match self.gate {
            SendGate::Open => self.beat_deadline.into_iter().chain(tick).min(),
            SendGate::Until(end) => Some(end),
            SendGate::NextTick => tick,
        }
    }

    /// When the pending snapshot request was made.
    pub(crate) fn snapshot_requested(&self) -> Option<Instant> {
        self.snapshot_requested
    }
}

/// The ticks. The first one comes after a random part of the interval, then one every interval
/// exactly. So a fleet that starts together stays spread out.
#[derive(Debug)]
pub(crate) struct Ticks {
    receiver: Receiver<Instant>,
    /// The next tick and the interval. `None`: a test sends the ticks.
    every: Option<(Instant, Duration)>,
}

impl Ticks {
    /// `random` is from 0 to 1.
    pub(crate) fn every(interval: Duration, now: Instant, random: f64) -> Self {
        let first = now + interval.mul_f64(random);
        Self { receiver: at(first), every: Some((first, interval)) }
    }

    pub(crate) fn from_channel(receiver: Receiver<Instant>) -> Self {
        Self { receiver, every: None }
    }

    pub(crate) fn receiver(&self) -> &Receiver<Instant> {
        &self.receiver
    }

    /// The time of the next tick, if it is known.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.every.map(|(tick, _)| tick)
    }

    /// A tick was received. Ticks that were missed, in a suspended process for example, are left
    /// out, because one beat carries everything.
    pub(crate) fn tick_received(&mut self, now: Instant) {
        if let Some((tick, interval)) = &mut self.every {
            let missed =
                now.saturating_duration_since(*tick).as_nanos() / interval.as_nanos().max(1);
            *tick += *interval * (u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1));
            self.receiver = at(*tick);
        }
    }

    /// The channel is disconnected. No further tick will come.
    pub(crate) fn disconnected(&mut self) {
        self.receiver = never();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(30);

    fn start() -> (Schedule, Instant) {
        (Schedule::new(INTERVAL), Instant::now())
    }

    fn after(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn tick_waits_ten_seconds_for_its_snapshot() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.trigger(Trigger::Tick, t), SnapshotRequest::Needed);
        assert_eq!(schedule.timer_fired(after(t, 9.9)), TimerAction::Nothing);
        assert_eq!(schedule.timer_fired(after(t, 10.0)), TimerAction::Beat);
        assert_eq!(schedule.timer_fired(after(t, 10.0)), TimerAction::Nothing, "one beat, not two");
    }

    #[test]
    fn delta_shortens_the_timeout_of_a_tick_to_a_quarter_second() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.trigger(Trigger::Tick, t), SnapshotRequest::Needed);
        assert_eq!(
            schedule.trigger(Trigger::Delta, after(t, 0.1)),
            SnapshotRequest::NotNeeded,
            "one request at a time"
        );
        assert_eq!(schedule.timer_fired(after(t, 0.24)), TimerAction::Nothing);
        assert_eq!(schedule.timer_fired(after(t, 0.25)), TimerAction::Beat);
    }

    #[test]
    fn first_beat_waits_up_to_a_second_for_the_topology() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.trigger(Trigger::First, t), SnapshotRequest::Needed);
        assert_eq!(schedule.trigger(Trigger::Delta, after(t, 0.1)), SnapshotRequest::NotNeeded);
        assert_eq!(
            schedule.timer_fired(after(t, 0.99)),
            TimerAction::Nothing,
            "a delta does not shorten this"
        );
        assert_eq!(schedule.timer_fired(after(t, 1.0)), TimerAction::Beat);
        for known in [0.1, 0.4] {
            let (mut schedule, t) = start();
            let _ = schedule.trigger(Trigger::First, t);
            schedule.topology_received(after(t, known));
            assert_eq!(
                schedule.timer_fired(after(t, f64::max(known, 0.25) - 0.01)),
                TimerAction::Nothing
            );
            assert_eq!(schedule.timer_fired(after(t, f64::max(known, 0.25))), TimerAction::Beat);
        }
        let (mut schedule, t) = start();
        let _ = schedule.trigger(Trigger::First, t);
        assert!(schedule.snapshot_received(), "the snapshot includes the topology");
    }

    #[test]
    fn blocked_source_is_not_waited_for_twice() {
        let (mut schedule, t) = start();
        let _ = schedule.trigger(Trigger::Tick, t);
        assert_eq!(schedule.timer_fired(after(t, 10.0)), TimerAction::Beat);
        assert_eq!(schedule.trigger(Trigger::Tick, after(t, 30.0)), SnapshotRequest::NotNeeded);
        assert_eq!(schedule.timer_fired(after(t, 30.0)), TimerAction::Beat);
    }

    #[test]
    fn late_snapshot_is_sent_in_a_beat_of_its_own() {
        let (mut schedule, t) = start();
        let _ = schedule.trigger(Trigger::Retry, t);
        assert_eq!(schedule.timer_fired(after(t, 0.25)), TimerAction::Beat);
        schedule.beat_ended(Verdict::Accepted, after(t, 0.3), 0.0);
        assert!(schedule.snapshot_received());
    }

    #[test]
    fn delta_during_a_snapshot_requests_another_one() {
        let (mut schedule, t) = start();
        let _ = schedule.trigger(Trigger::Tick, t);
        let _ = schedule.trigger(Trigger::Delta, after(t, 0.1));
        assert!(schedule.snapshot_received());
        schedule.beat_ended(Verdict::Accepted, after(t, 0.2), 0.0);
        assert_eq!(schedule.request_again(after(t, 0.2)), SnapshotRequest::Needed);
        assert!(schedule.snapshot_received());
        assert_eq!(schedule.request_again(after(t, 0.3)), SnapshotRequest::NotNeeded);
    }

    #[test]
    fn no_beat_is_sent_until_the_backoff_ends() {
        let (mut schedule, t) = start();
        schedule.beat_ended(Verdict::NoResponse, t, 1.0);
        assert_eq!(schedule.trigger(Trigger::Tick, after(t, 0.1)), SnapshotRequest::NotNeeded);
        assert_eq!(schedule.trigger(Trigger::Delta, after(t, 0.1)), SnapshotRequest::NotNeeded);
        assert!(!schedule.snapshot_received(), "the snapshot would be stale when the backoff ends");
        assert_eq!(schedule.timer_fired(after(t, 0.9)), TimerAction::Nothing);
        assert_eq!(schedule.timer_fired(after(t, 1.0)), TimerAction::Retry);
        assert_eq!(schedule.trigger(Trigger::Retry, after(t, 1.0)), SnapshotRequest::Needed);
    }

    #[test]
    fn backoff_doubles_up_to_the_interval_with_jitter_after_the_cap() {
        for (random, expected) in [
            (1.0, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
            (0.0, [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]),
        ] {
            let (mut schedule, t) = start();
            for wait in expected {
                schedule.beat_ended(Verdict::NoResponse, t, random);
                assert_eq!(schedule.gate, SendGate::Until(after(t, wait)));
            }
            schedule.beat_ended(Verdict::Accepted, t, random);
            schedule.beat_ended(Verdict::RetryLater(None), t, random);
            assert_eq!(
                schedule.gate,
                SendGate::Until(after(t, expected[0])),
                "a success resets it"
            );
        }
    }

    #[test]
    fn retry_is_never_earlier_than_retry_after() {
        let (mut schedule, t) = start();
        for random in [0.0, 0.5, 1.0] {
            schedule.beat_ended(Verdict::RetryLater(Some(Duration::from_secs(100))), t, random);
            assert_eq!(schedule.timer_fired(after(t, 99.9)), TimerAction::Nothing);
            assert_eq!(schedule.timer_fired(after(t, 110.0)), TimerAction::Retry);
        }
    }

    #[test]
    fn post_limit_is_shorter_than_the_interval() {
        for (interval, limit) in [(1, 1.0), (6, 4.0), (30, 20.0), (3_600, 20.0)] {
            let schedule = Schedule::new(Duration::from_secs(interval));
            assert_eq!(schedule.post_limit(), Duration::from_secs_f64(limit), "{interval} s");
        }
    }

    #[test]
    fn rejected_host_is_retried_with_the_next_tick() {
        let (mut schedule, t) = start();
        schedule.beat_ended(Verdict::HostRejected, t, 0.0);
        assert_eq!(schedule.trigger(Trigger::Delta, t), SnapshotRequest::NotNeeded);
        assert_eq!(schedule.timer_fired(after(t, 29.0)), TimerAction::Nothing);
        assert_eq!(schedule.trigger(Trigger::Tick, after(t, 30.0)), SnapshotRequest::Needed);
    }

    #[test]
    fn ticks_are_one_interval_apart() {
        let t = Instant::now();
        let mut ticks = Ticks::every(INTERVAL, t, 0.5);
        assert_eq!(ticks.every, Some((after(t, 15.0), INTERVAL)));
        ticks.tick_received(after(t, 15.004));
        assert_eq!(ticks.every, Some((after(t, 45.0), INTERVAL)));
        ticks.tick_received(after(t, 45.0));
        assert_eq!(ticks.every, Some((after(t, 75.0), INTERVAL)));
    }

    #[test]
    fn missed_ticks_are_left_out() {
        let t = Instant::now();
        let mut ticks = Ticks::every(INTERVAL, t, 0.0);
        ticks.tick_received(after(t, 3_601.0));
        assert_eq!(ticks.every, Some((after(t, 3_630.0), INTERVAL)));
    }

    #[test]
    fn next_beat_is_the_earliest_of_deadline_and_tick_unless_the_gate_is_closed() {
        let (mut schedule, t) = start();
        let tick = Some(after(t, 12.0));
        assert_eq!((schedule.next_beat(tick), schedule.next_beat(None)), (tick, None));
        assert_eq!(schedule.trigger(Trigger::Delta, t), SnapshotRequest::Needed);
        assert_eq!(schedule.next_beat(tick), Some(t + limits::DELTA_WAIT));
        schedule.beat_ended(Verdict::RetryLater(Some(Duration::from_secs(20))), t, 0.0);
        assert_eq!(schedule.next_beat(tick), Some(after(t, 20.0)), "a tick does not open the gate");
        schedule.beat_ended(Verdict::HostRejected, t, 0.0);
        assert_eq!(schedule.next_beat(tick), tick);
    }
}
