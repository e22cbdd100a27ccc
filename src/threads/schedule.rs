//! When a beat goes out. Values only: the heartbeat thread hands in the time, and so may a test.
//!
//! - A tick or a delta wants a beat, and the status thread is asked for a snapshot. The beat goes out when the snapshot
//!   arrives, or without one when patience ends, counted from the question: a source that owes an answer for long is
//!   not waited for again. The first beat waits up to a second for the topology, as the master would otherwise order it
//!   to be built again.
//! - A snapshot that comes later goes out in a beat of its own. A delta that comes while a snapshot is being made asks
//!   for another, since that one may have been begun before.
//! - After a failure nothing goes out until the backoff ends, whatever is wanted meanwhile; a refused host waits for
//!   its tick.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never};

use crate::limits;
use crate::master::Verdict;

/// Why a beat is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    First,
    Tick,
    Delta,
    Retry,
    /// Somebody waits until all is sent.
    Flush,
}

/// Whether the status thread is to be asked for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum SnapshotRequest {
    Ask,
    /// Nothing is wanted, or an answer is owed already.
    None,
}

/// What a timer that has fired is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerAction {
    /// Patience has ended: a beat goes out without a snapshot.
    Beat,
    /// The backoff has ended.
    Retry,
    /// Too early; there is nothing to do.
    Nothing,
}

/// What keeps beats from going out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendGate {
    Free,
    Until(Instant),
    NextTick,
}

#[derive(Debug)]
pub(crate) struct Schedule {
    interval: Duration,
    /// A beat is wanted, and goes out at the latest then.
    due: Option<Instant>,
    /// Since when the status thread has owed a snapshot.
    asked: Option<Instant>,
    /// The snapshot that is owed may have been begun before the last delta.
    ask_again: bool,
    hold: SendGate,
    backoff: Duration,
    /// Before then the first beat is not sent without its topology.
    topology_awaited_until: Option<Instant>,
}

impl Schedule {
    pub(crate) fn new(interval: Duration) -> Self {
        let backoff = limits::BACKOFF_START.min(interval);
        Self {
            interval,
            due: None,
            asked: None,
            ask_again: false,
            hold: SendGate::Free,
            backoff,
            topology_awaited_until: None,
        }
    }

    /// A beat is wanted.
    pub(crate) fn wish(&mut self, why: Trigger, now: Instant) -> SnapshotRequest {
        match self.hold {
            SendGate::Free => (),
            SendGate::Until(_) => return SnapshotRequest::None,
            SendGate::NextTick if why != Trigger::Tick => return SnapshotRequest::None,
            SendGate::NextTick => self.hold = SendGate::Free,
        }
        let (asked, question) = match self.asked {
            Some(asked) => {
                self.ask_again |= why == Trigger::Delta;
                (asked, SnapshotRequest::None)
            }
            None => {
                self.ask_again = false;
                (*self.asked.insert(now), SnapshotRequest::Ask)
            }
        };
        if why == Trigger::First {
            self.topology_awaited_until = Some(now + limits::TOPOLOGY_WAIT);
        }
        let due =
            (asked + self.patience(why)).max(now).max(self.topology_awaited_until.unwrap_or(now));
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
        question
    }

    fn patience(&self, why: Trigger) -> Duration {
        match why {
            Trigger::First | Trigger::Delta | Trigger::Retry | Trigger::Flush => {
                limits::DELTA_WAIT.min(self.interval / 2)
            }
            // Half an interval at the most, or a short one would be over before its beat went out.
            Trigger::Tick => limits::TICK_WAIT.min(self.interval / 2),
        }
    }

    /// The topology is known now: the first beat has no more to wait for than any other.
    pub(crate) fn topology_is_known(&mut self, now: Instant) {
        if self.topology_awaited_until.take().is_some() {
            let due = self.asked.map(|asked| (asked + self.patience(Trigger::First)).max(now));
            self.due = self.due.and(due).or(self.due);
        }
    }

    /// Up to when the first beat waits for the topology. `None`: it is known, or has been waited for.
    pub(crate) fn topology_awaited_until(&self) -> Option<Instant> {
        self.topology_awaited_until
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// How long one POST may take.
    pub(crate) fn post_limit(&self) -> Duration {
        (self.interval * 2 / 3).clamp(limits::MIN_POST, limits::POST)
    }

    /// The snapshot that was owed is there. Whether a beat takes it along now.
    pub(crate) fn answered(&mut self) -> bool {
        self.asked = None;
        self.topology_awaited_until = None;
        let goes_out = self.hold == SendGate::Free;
        if goes_out {
            self.due = None;
        }
        goes_out
    }

    /// Whether a delta has come since the answered question was put. Asked after that answer's beat.
    pub(crate) fn ask_again(&mut self, now: Instant) -> SnapshotRequest {
        if std::mem::take(&mut self.ask_again)
            && self.hold == SendGate::Free
            && self.asked.is_none()
        {
            self.asked = Some(now);
            return SnapshotRequest::Ask;
        }
        SnapshotRequest::None
    }

    /// When [`fired`](Self::fired) is to be called.
    pub(crate) fn timer(&self) -> Receiver<Instant> {
        match (self.hold, self.due) {
            (SendGate::Until(end), _) => at(end),
            (SendGate::Free, Some(due)) => at(due),
            _ => never(),
        }
    }

    pub(crate) fn fired(&mut self, now: Instant) -> TimerAction {
        match (self.hold, self.due) {
            (SendGate::Until(end), _) if end <= now => {
                self.hold = SendGate::Free;
                TimerAction::Retry
            }
            (SendGate::Free, Some(due)) if due <= now => {
                self.due = None;
                self.topology_awaited_until = None;
                TimerAction::Beat
            }
            _ => TimerAction::Nothing,
        }
    }

    /// A beat has ended like this. `chance` is a random number from 0 to 1.
    pub(crate) fn ended(&mut self, verdict: Verdict, now: Instant, chance: f64) {
        self.due = None;
        self.hold = match verdict {
            Verdict::Accepted => SendGate::Free,
            Verdict::BodyRejected | Verdict::HostRejected => SendGate::NextTick,
            // A little later than it asks for, or the whole fleet is back in one moment.
            Verdict::RetryLater(Some(wait)) => {
                SendGate::Until(now + wait.mul_f64(1.0 + chance / 10.0))
            }
            // Jitter after the cap: it is at the cap that a fleet needs spreading most.
            Verdict::RetryLater(None) | Verdict::NoResponse => {
                SendGate::Until(now + self.backoff.mul_f64(0.5 + chance / 2.0))
            }
        };
        self.backoff = match verdict {
            Verdict::RetryLater(_) | Verdict::NoResponse => (self.backoff * 2).min(self.interval),
            _ => limits::BACKOFF_START.min(self.interval),
        };
    }

    /// When the next beat is due, the next tick being then.
    pub(crate) fn next_beat(&self, tick: Option<Instant>) -> Option<Instant> {
        match self.hold {
            SendGate::Free => self.due.into_iter().chain(tick).min(),
            SendGate::Until(end) => Some(end),
            SendGate::NextTick => tick,
        }
    }

    /// Since when a snapshot has been owed.
    pub(crate) fn asked(&self) -> Option<Instant> {
        self.asked
    }
}

/// The ticks: the first after a random part of the interval, then one every interval exactly, so that a fleet that
/// starts together is spread for good.
#[derive(Debug)]
pub(crate) struct Ticks {
    receiver: Receiver<Instant>,
    /// The next tick and the interval; `None` when a test hands the ticks in.
    every: Option<(Instant, Duration)>,
}

impl Ticks {
    /// `chance` is a random number from 0 to 1.
    pub(crate) fn every(interval: Duration, now: Instant, chance: f64) -> Self {
        let first = now + interval.mul_f64(chance);
        Self { receiver: at(first), every: Some((first, interval)) }
    }

    pub(crate) fn fed(receiver: Receiver<Instant>) -> Self {
        Self { receiver, every: None }
    }

    pub(crate) fn receiver(&self) -> &Receiver<Instant> {
        &self.receiver
    }

    /// The next one, where that is known.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.every.map(|(tick, _)| tick)
    }

    /// A tick has been received. Ticks that were slept through are left out: one beat says all there is to say.
    pub(crate) fn ticked(&mut self, now: Instant) {
        if let Some((tick, interval)) = &mut self.every {
            let missed =
                now.saturating_duration_since(*tick).as_nanos() / interval.as_nanos().max(1);
            *tick += *interval * (u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1));
            self.receiver = at(*tick);
        }
    }

    /// No tick will come any more.
    pub(crate) fn ended(&mut self) {
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
    fn a_tick_waits_ten_seconds_for_its_snapshot() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.wish(Trigger::Tick, t), SnapshotRequest::Ask);
        assert_eq!(schedule.fired(after(t, 9.9)), TimerAction::Nothing);
        assert_eq!(schedule.fired(after(t, 10.0)), TimerAction::Beat);
        assert_eq!(schedule.fired(after(t, 10.0)), TimerAction::Nothing, "one beat, not two");
    }

    #[test]
    fn a_delta_waits_a_quarter_second_and_shortens_a_ticks_patience() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.wish(Trigger::Tick, t), SnapshotRequest::Ask);
        assert_eq!(
            schedule.wish(Trigger::Delta, after(t, 0.1)),
            SnapshotRequest::None,
            "one question at a time"
        );
        assert_eq!(schedule.fired(after(t, 0.24)), TimerAction::Nothing);
        assert_eq!(schedule.fired(after(t, 0.25)), TimerAction::Beat);
    }

    #[test]
    fn the_first_beat_waits_a_second_for_the_topology_and_no_longer_once_it_is_known() {
        let (mut schedule, t) = start();
        assert_eq!(schedule.wish(Trigger::First, t), SnapshotRequest::Ask);
        assert_eq!(schedule.wish(Trigger::Delta, after(t, 0.1)), SnapshotRequest::None);
        assert_eq!(
            schedule.fired(after(t, 0.99)),
            TimerAction::Nothing,
            "a delta does not leave it out either"
        );
        assert_eq!(schedule.fired(after(t, 1.0)), TimerAction::Beat);
        for known in [0.1, 0.4] {
            let (mut schedule, t) = start();
            let _ = schedule.wish(Trigger::First, t);
            schedule.topology_is_known(after(t, known));
            assert_eq!(
                schedule.fired(after(t, f64::max(known, 0.25) - 0.01)),
                TimerAction::Nothing
            );
            assert_eq!(schedule.fired(after(t, f64::max(known, 0.25))), TimerAction::Beat);
        }
        let (mut schedule, t) = start();
        let _ = schedule.wish(Trigger::First, t);
        assert!(schedule.answered(), "the snapshot says all there is to know");
    }

    #[test]
    fn a_source_that_hangs_is_not_waited_for_twice() {
        let (mut schedule, t) = start();
        let _ = schedule.wish(Trigger::Tick, t);
        assert_eq!(schedule.fired(after(t, 10.0)), TimerAction::Beat);
        assert_eq!(schedule.wish(Trigger::Tick, after(t, 30.0)), SnapshotRequest::None);
        assert_eq!(schedule.fired(after(t, 30.0)), TimerAction::Beat);
    }

    #[test]
    fn a_late_snapshot_goes_out_in_a_beat_of_its_own() {
        let (mut schedule, t) = start();
        let _ = schedule.wish(Trigger::Retry, t);
        assert_eq!(schedule.fired(after(t, 0.25)), TimerAction::Beat);
        schedule.ended(Verdict::Accepted, after(t, 0.3), 0.0);
        assert!(schedule.answered());
    }

    #[test]
    fn a_delta_that_comes_while_a_snapshot_is_made_asks_for_another() {
        let (mut schedule, t) = start();
        let _ = schedule.wish(Trigger::Tick, t);
        let _ = schedule.wish(Trigger::Delta, after(t, 0.1));
        assert!(schedule.answered());
        schedule.ended(Verdict::Accepted, after(t, 0.2), 0.0);
        assert_eq!(schedule.ask_again(after(t, 0.2)), SnapshotRequest::Ask);
        assert!(schedule.answered());
        assert_eq!(schedule.ask_again(after(t, 0.3)), SnapshotRequest::None);
    }

    #[test]
    fn after_a_failure_nothing_goes_out_until_the_backoff_ends() {
        let (mut schedule, t) = start();
        schedule.ended(Verdict::NoResponse, t, 1.0);
        assert_eq!(schedule.wish(Trigger::Tick, after(t, 0.1)), SnapshotRequest::None);
        assert_eq!(schedule.wish(Trigger::Delta, after(t, 0.1)), SnapshotRequest::None);
        assert!(!schedule.answered(), "a snapshot of before is stale by then");
        assert_eq!(schedule.fired(after(t, 0.9)), TimerAction::Nothing);
        assert_eq!(schedule.fired(after(t, 1.0)), TimerAction::Retry);
        assert_eq!(schedule.wish(Trigger::Retry, after(t, 1.0)), SnapshotRequest::Ask);
    }

    #[test]
    fn the_backoff_doubles_to_the_interval_and_is_spread_below_its_cap() {
        for (chance, expected) in [
            (1.0, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
            (0.0, [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]),
        ] {
            let (mut schedule, t) = start();
            for wait in expected {
                schedule.ended(Verdict::NoResponse, t, chance);
                assert_eq!(schedule.hold, SendGate::Until(after(t, wait)));
            }
            schedule.ended(Verdict::Accepted, t, chance);
            schedule.ended(Verdict::RetryLater(None), t, chance);
            assert_eq!(
                schedule.hold,
                SendGate::Until(after(t, expected[0])),
                "a success starts afresh"
            );
        }
    }

    #[test]
    fn retry_after_is_never_undercut() {
        let (mut schedule, t) = start();
        for chance in [0.0, 0.5, 1.0] {
            schedule.ended(Verdict::RetryLater(Some(Duration::from_secs(100))), t, chance);
            assert_eq!(schedule.fired(after(t, 99.9)), TimerAction::Nothing);
            assert_eq!(schedule.fired(after(t, 110.0)), TimerAction::Retry);
        }
    }

    #[test]
    fn a_post_ends_before_the_next_tick() {
        for (interval, limit) in [(1, 1.0), (6, 4.0), (30, 20.0), (3_600, 20.0)] {
            let schedule = Schedule::new(Duration::from_secs(interval));
            assert_eq!(schedule.post_limit(), Duration::from_secs_f64(limit), "{interval} s");
        }
    }

    #[test]
    fn a_refused_host_keeps_to_its_tick() {
        let (mut schedule, t) = start();
        schedule.ended(Verdict::HostRejected, t, 0.0);
        assert_eq!(schedule.wish(Trigger::Delta, t), SnapshotRequest::None);
        assert_eq!(schedule.fired(after(t, 29.0)), TimerAction::Nothing);
        assert_eq!(schedule.wish(Trigger::Tick, after(t, 30.0)), SnapshotRequest::Ask);
    }

    #[test]
    fn ticks_are_an_interval_apart_whatever_the_beats_take() {
        let t = Instant::now();
        let mut ticks = Ticks::every(INTERVAL, t, 0.5);
        assert_eq!(ticks.every, Some((after(t, 15.0), INTERVAL)));
        ticks.ticked(after(t, 15.004));
        assert_eq!(ticks.every, Some((after(t, 45.0), INTERVAL)));
        ticks.ticked(after(t, 45.0));
        assert_eq!(ticks.every, Some((after(t, 75.0), INTERVAL)));
    }

    #[test]
    fn ticks_that_were_slept_through_do_not_pile_up() {
        let t = Instant::now();
        let mut ticks = Ticks::every(INTERVAL, t, 0.0);
        ticks.ticked(after(t, 3_601.0));
        assert_eq!(ticks.every, Some((after(t, 3_630.0), INTERVAL)));
    }

    #[test]
    fn the_next_beat_is_the_first_of_what_is_due_and_what_holds_it() {
        let (mut schedule, t) = start();
        let tick = Some(after(t, 12.0));
        assert_eq!((schedule.next_beat(tick), schedule.next_beat(None)), (tick, None));
        assert_eq!(schedule.wish(Trigger::Delta, t), SnapshotRequest::Ask);
        assert_eq!(schedule.next_beat(tick), Some(t + limits::DELTA_WAIT));
        schedule.ended(Verdict::RetryLater(Some(Duration::from_secs(20))), t, 0.0);
        assert_eq!(
            schedule.next_beat(tick),
            Some(after(t, 20.0)),
            "a tick changes nothing meanwhile"
        );
        schedule.ended(Verdict::HostRejected, t, 0.0);
        assert_eq!(schedule.next_beat(tick), tick);
    }
}
