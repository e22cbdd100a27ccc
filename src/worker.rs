//! The heartbeat thread: events, and what a beat does. Everything here runs on that one thread.

use std::borrow::Cow;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, never, select};

use crate::body::{self, Body};
use crate::collector::{self, Collected, Collector};
use crate::error::chain;
use crate::limits;
use crate::link::Link;
use crate::master::{Reply, Verdict};
use crate::outbox::{self, Kept, Outbox, Settled};
use crate::repeats::Repeats;
use crate::schedule::{Fired, Question, Schedule, Ticks, Wish};
use crate::stats::{Failure, SharedStats};
use crate::status::{Observed, Snapshot, Topology};
use crate::text::printable;

/// What the heartbeat thread wakes for.
#[derive(Debug)]
enum Event {
    Tick,
    Delta,
    Collected(Collected),
    Timer,
}

/// All that the heartbeat thread owns.
pub(crate) struct Worker {
    pub(crate) link: Link,
    pub(crate) agent_version: String,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) stats: Arc<SharedStats>,
    pub(crate) collector: Collector,
    pub(crate) schedule: Schedule,
    pub(crate) ticks: Ticks,
    /// A delta is in the outbox.
    pub(crate) deltas: Receiver<()>,
    /// Told after each beat, without waiting.
    pub(crate) beaten: Sender<()>,
    /// The time by which all must have ended.
    pub(crate) stop: Receiver<Instant>,
    /// Set by a stop.
    pub(crate) deadline: Option<Instant>,
    /// The last topology known, for the beats that go out without a snapshot.
    pub(crate) topology: Option<Topology>,
    pub(crate) repeats: Repeats,
    /// The next beat has been tended to.
    pub(crate) tended: bool,
}

impl Worker {
    /// Beats until it is stopped, then delivers what waits within the grace.
    pub(crate) fn run(mut self) {
        self.wish(Wish::First);
        while let Some(event) = self.next_event() {
            self.guarded(|worker| worker.handle(event));
        }
        self.guarded(Self::flush);
        self.guarded(Self::finish);
        log::info!("heartbeat stopped: {} waiting={}", self.link.names(), self.outbox.books().counts.waiting);
    }

    /// Waits for what comes next. `None`: it is time to stop.
    fn next_event(&mut self) -> Option<Event> {
        let timer = self.schedule.timer();
        // Before all else: a thread that always has something to do must stop all the same.
        if let Ok(deadline) = self.stop.try_recv() {
            self.deadline = Some(deadline);
            return None;
        }
        select! {
            recv(self.stop) -> deadline => {
                self.deadline = Some(deadline.unwrap_or_else(|_| Instant::now()));
                None
            }
            recv(self.ticks.receiver()) -> tick => {
                match tick {
                    Ok(_) => self.ticks.ticked(Instant::now()),
                    Err(_) => self.ticks.ended(),
                }
                Some(Event::Tick)
            }
            recv(self.deltas) -> delta => {
                // Every sender is gone. What they pushed is in the outbox.
                if delta.is_err() {
                    self.deltas = never();
                }
                Some(Event::Delta)
            }
            recv(self.collector.collected) -> collected => match collected {
                Ok(collected) => Some(Event::Collected(collected)),
                Err(_) => {
                    self.collector.collected = never();
                    Some(Event::Collected(Collected::Panicked("the status thread has ended".to_owned())))
                }
            },
            recv(timer) -> _ => Some(Event::Timer),
        }
    }

    /// No panic ends the thread. It counts as a beat without an answer, on a connection that cannot be trusted any more.
    fn guarded(&mut self, work: impl FnOnce(&mut Self)) {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(self))) {
            let said = collector::message(panic.as_ref());
            if let Some(times) = self.repeats.count("beat", &said, Instant::now()) {
                log::error!("a beat panicked, going on: {} times={times} panic={said:?}", self.link.names());
            }
            self.stats.change(|stats| stats.panics += 1);
            if let Err(error) = self.link.renew() {
                log::warn!("the connection cannot be made anew: {} error={:?}", self.link.names(), chain(&error));
            }
            self.schedule.ended(Verdict::NoAnswer, Instant::now(), fastrand::f64());
        }
        self.note_next_beat();
        self.stats.change(|stats| stats.working_since = None);
    }

    fn note_next_beat(&self) {
        let next_beat = self.schedule.next_beat(self.ticks.next()).map(wall);
        self.stats.change(|stats| stats.next_beat = next_beat);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick => self.wish(Wish::Tick),
            Event::Delta => self.wish(Wish::Delta),
            Event::Collected(Collected::Topology(topology)) => self.topology = Some(topology),
            Event::Collected(Collected::Snapshot(snapshot, at)) => {
                self.stats.change(|stats| {
                    stats.snapshots += 1;
                    stats.last_snapshot = Some(SystemTime::now());
                });
                self.collected(snapshot, at);
            }
            Event::Collected(Collected::Panicked(said)) => {
                if let Some(times) = self.repeats.count("source", &said, Instant::now()) {
                    log::error!("the status source panicked: host={} times={times} panic={said:?}", self.host());
                }
                self.stats.change(|stats| stats.panics += 1);
                self.collected(Snapshot::unknown(&format!("the status source panicked: {said}")), Instant::now());
            }
            Event::Timer => match self.schedule.fired(Instant::now()) {
                Fired::Beat => self.beat(None),
                Fired::Retry => self.wish(Wish::Retry),
                Fired::Nothing => (),
            },
        }
    }

    /// A beat is wanted. What else it needs is looked after while the status thread makes its snapshot.
    fn wish(&mut self, why: Wish) {
        let question = self.schedule.wish(why, Instant::now());
        self.put(question);
        if question == Question::Ask {
            self.tend();
            self.tended = true;
        }
    }

    fn put(&self, question: Question) {
        if question == Question::Ask {
            // The one question that may be under way is this one; an error means that the status thread is gone.
            let _ = self.collector.ask.try_send(());
            self.stats.change(|stats| {
                (stats.snapshot_owed_since, stats.owed_since) = (Some(SystemTime::now()), Some(Instant::now()));
            });
        }
    }

    fn collected(&mut self, snapshot: Snapshot, at: Instant) {
        self.stats.change(|stats| (stats.snapshot_owed_since, stats.owed_since) = (None, None));
        if let Some(topology) = snapshot.topology() {
            self.topology = Some(topology.clone());
        }
        match self.schedule.answered() {
            // What it says may not hold any more.
            true if at.elapsed() > limits::FRESH => return self.wish(Wish::Tick),
            true => self.beat(Some(snapshot)),
            false => (),
        }
        let question = self.schedule.ask_again(Instant::now());
        self.put(question);
    }

    /// One beat, with all the deltas that wait, up to a body's worth.
    fn beat(&mut self, snapshot: Option<Snapshot>) {
        if !mem::take(&mut self.tended) {
            self.tend();
        }
        let snapshot = snapshot.unwrap_or_else(|| self.without_snapshot());
        let (mut reply, deltas) = self.exchange(&snapshot, limits::DELTAS_PER_BODY);
        if reply.verdict == Verdict::BodyRefused {
            reply = self.leave_out(snapshot, deltas.len(), reply);
        }
        self.note(&reply);
        self.schedule.ended(reply.verdict, Instant::now(), fastrand::f64());
        self.note_next_beat();
        // Full: it has been told already. Gone: nobody asks.
        let _ = self.beaten.try_send(());
        if reply.verdict == Verdict::Accepted && !deltas.is_empty() && self.free() > 0 {
            self.wish(Wish::Delta);
        }
    }

    /// The body is refused, and would be again as it stands. Liveness goes first: it is tried without its deltas, so many,
    /// and then without its status. What the master cannot stomach may be in either.
    fn leave_out(&mut self, mut snapshot: Snapshot, deltas: usize, mut reply: Reply) -> Reply {
        if deltas > 0 {
            (reply, _) = self.exchange(&snapshot, 0);
        }
        if reply.verdict == Verdict::BodyRefused {
            let refusal = format!("{}: {}", reply.class, reply.detail);
            (snapshot, reply) = self.without_status(&refusal);
        }
        match reply.verdict {
            Verdict::Accepted if deltas > 0 => self.isolate(&snapshot, deltas),
            _ => reply,
        }
    }

    fn without_status(&mut self, refusal: &str) -> (Snapshot, Reply) {
        let snapshot = Snapshot::unknown(&format!("the master refuses the status: {refusal}"));
        let (reply, _) = self.exchange(&snapshot, 0);
        if reply.verdict == Verdict::Accepted
            && let Some(times) = self.repeats.count("status", refusal, Instant::now())
        {
            let names = self.link.names();
            log::error!("the master refuses the status, beating without it: {names} times={times} reason={refusal:?}");
        }
        (snapshot, reply)
    }

    /// Halves a refused body until the delta at fault stands alone, and puts that one aside with the reason. What is
    /// accepted on the way is delivered. If all of it is, none was at fault, or newer ones have come in between.
    fn isolate(&mut self, snapshot: &Snapshot, refused: usize) -> Reply {
        // It shrinks with every answer, so this ends.
        let mut suspects = refused;
        loop {
            let (reply, deltas) = self.exchange(snapshot, suspects.div_ceil(2));
            match (reply.verdict, deltas.as_slice()) {
                (Verdict::Accepted, [_, ..]) if self.stop.is_empty() && deltas.len() < suspects => {
                    suspects -= deltas.len();
                }
                (Verdict::BodyRefused, [_, _, ..]) => suspects = deltas.len(),
                (Verdict::BodyRefused, [delta]) => {
                    self.reject(delta, &reply);
                    return Reply { verdict: Verdict::Accepted, ..reply };
                }
                _ => return reply,
            }
        }
    }

    fn reject(&mut self, kept: &Kept, reply: &Reply) {
        let reason = format!("{}: {}", reply.class, reply.detail);
        let (decky, operation) = (printable(kept.delta.decky()), kept.delta.operation());
        log::error!(
            "the master refuses a delta for good, it is put aside: {} decky={decky:?} operation={operation} reason={reason:?}",
            self.link.names()
        );
        self.settle(std::slice::from_ref(kept), &Settled::Rejected(reason));
        self.stats.change(|stats| stats.rejected += 1);
    }

    /// One POST with the newest deltas that may go out, at most so many, and what follows if it is accepted: the deltas in it
    /// are forgotten. Where the connection had ended it is tried once more at once, with what may
    /// go out by then: an operation may have begun meanwhile that holds back some of it.
    fn exchange(&mut self, snapshot: &Snapshot, most: usize) -> (Reply, Vec<Kept>) {
        let end = Instant::now() + self.within();
        let (mut reply, mut deltas) = self.post(snapshot, most, end);
        if reply.stale && Instant::now() < end {
            log::debug!("the connection has ended, trying a fresh one: {} class={}", self.link.names(), reply.class);
            (reply, deltas) = self.post(snapshot, most, end);
        }
        if reply.verdict == Verdict::Accepted {
            if !deltas.is_empty() {
                self.settle(&deltas, &Settled::Delivered);
            }
            self.accepted(&reply, deltas.len());
        }
        (reply, deltas)
    }

    fn post(&mut self, snapshot: &Snapshot, most: usize, end: Instant) -> (Reply, Vec<Kept>) {
        self.stats.change(|stats| {
            stats.working_since = Some(Instant::now());
            stats.status_fault = snapshot.fault().map(str::to_owned);
        });
        let deltas = self.waiting(most);
        let reply = match self.body(snapshot, &deltas) {
            Ok(body) => self.link.master().post(&body, end.saturating_duration_since(Instant::now())),
            Err(error) => Reply::unwritten(&error),
        };
        (reply, deltas)
    }

    fn body(&self, snapshot: &Snapshot, deltas: &[Kept]) -> serde_json::Result<Vec<u8>> {
        let lifecycle: Vec<_> = deltas.iter().map(|kept| &kept.delta).collect();
        serde_json::to_vec(&Body {
            host_uuid: self.host(),
            agent_version: &self.agent_version,
            status: snapshot.raw_status(),
            topology: self.topology_of(snapshot).map(body::Topology::from),
            lifecycle: &lifecycle,
        })
    }

    /// The snapshot's topology; where it has none, the last one known: leaving it out would not be neutral.
    fn topology_of<'a>(&'a self, snapshot: &'a Snapshot) -> Option<&'a Topology> {
        snapshot.topology().or(self.topology.as_ref())
    }

    fn within(&self) -> Duration {
        let limit = self.schedule.post_limit();
        self.deadline.map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()).min(limit))
    }

    /// Up to when the outbox is waited for: at a stop no longer than its grace.
    fn patience(&self) -> Instant {
        let patience = outbox::deadline();
        self.deadline.map_or(patience, |deadline| deadline.min(patience))
    }

    fn waiting(&mut self, most: usize) -> Vec<Kept> {
        self.outbox.deliverable(most, self.patience()).unwrap_or_else(|error| {
            let problem = chain(&error);
            if let Some(times) = self.repeats.count("deliverable", &problem, Instant::now()) {
                let host = self.host();
                log::warn!(
                    "beating without deltas, they stay in the outbox: host={host} times={times} error={problem:?}"
                );
            }
            Vec::new()
        })
    }

    /// Deltas that may go out, as of the last look.
    fn free(&self) -> u64 {
        let counts = self.outbox.books().counts;
        counts.waiting.saturating_sub(counts.held)
    }

    fn settle(&mut self, deltas: &[Kept], settled: &Settled) {
        if let Err(error) = self.outbox.settle(deltas, settled, self.patience()) {
            let problem = chain(&error);
            if let Some(times) = self.repeats.count("settle", &problem, Instant::now()) {
                let host = self.host();
                log::error!("after a restart a delta may be sent again: host={host} times={times} error={problem:?}");
            }
        }
    }

    /// What a beat says when its snapshot is not there in time: nothing but why.
    fn without_snapshot(&mut self) -> Snapshot {
        let reason = match (self.deadline, self.schedule.asked()) {
            (Some(_), _) => Cow::Borrowed("no fresh snapshot: the agent is stopping"),
            (None, Some(asked)) => format!(
                "no fresh snapshot: the status source has not answered for {:.1} s",
                asked.elapsed().as_secs_f64()
            )
            .into(),
            (None, None) => "no fresh snapshot".into(),
        };
        if let Some(topology) = &mut self.topology {
            topology.observed = Observed::Unknown(reason.clone().into_owned());
        }
        Snapshot::unknown(&reason)
    }

    /// What is done before each beat: changed credentials are taken over, and the outbox is put in order.
    fn tend(&mut self) {
        self.refresh();
        self.warn_of_expiry();
        if let Err(error) = self.outbox.tend() {
            log::debug!("the outbox is as it was: host={} error={:?}", self.host(), chain(&error));
        }
    }

    fn refresh(&mut self) {
        if self.link.refresh() {
            log::info!("took over changed credentials: {} fingerprint={}", self.link.names(), self.link.fingerprint());
            self.stats.change(|stats| self.link.describe(stats));
        }
    }

    fn warn_of_expiry(&mut self) {
        let Some(days) = self.link.days_left(SystemTime::now()) else { return };
        let (level, what) = match days {
            0.. => (log::Level::Warn, "the certificate expires soon, enrol this host again"),
            _ => (log::Level::Error, "the certificate has expired, enrol this host again"),
        };
        log::log!(level, "{what}: {} fingerprint={} days={days}", self.link.names(), self.link.fingerprint());
    }

    /// The last beat: what waits now, within the grace, as often as it takes. What is pushed meanwhile is for the next
    /// start: threads that go on pushing must not make a stop as long as its grace.
    fn flush(&mut self) {
        let mut left = self.free();
        while left > 0 && !self.within().is_zero() {
            let snapshot = self.without_snapshot();
            let (reply, deltas) = self.exchange(&snapshot, limits::DELTAS_PER_BODY);
            self.note(&reply);
            if deltas.is_empty() || reply.verdict != Verdict::Accepted {
                return;
            }
            left = left.saturating_sub(deltas.len() as u64);
        }
    }

    /// What the outbox could not write down so far has no later beat to wait for.
    fn finish(&mut self) {
        if let Err(error) = self.outbox.finish(self.deadline.unwrap_or_else(Instant::now)) {
            let host = self.host();
            log::error!("what the outbox has in memory ends with this process: host={host} error={:?}", chain(&error));
        }
    }

    fn accepted(&self, reply: &Reply, deltas: usize) {
        let (ended, beats) = self.stats.change(|stats| (stats.accepted(reply, deltas), stats.beats));
        let (names, ms) = (self.link.names(), reply.took.as_secs_f64() * 1e3);
        match ended {
            Some(failure) => log::info!("beating again: {names} failures={}", failure.count),
            None if beats == 1 => log::info!("first beat accepted: {names}"),
            None => (),
        }
        let (class, resumed) = (&reply.class, reply.resumed);
        log::debug!("beat accepted: {names} class={class} ms={ms:.1} deltas={deltas} resumed={resumed}");
    }

    /// A beat that failed counts once, however often its body was tried. A change is logged at once, a repetition at a
    /// decreasing rate.
    fn note(&self, reply: &Reply) {
        if reply.verdict == Verdict::Accepted {
            return;
        }
        let (Failure { count, class, detail, .. }, changed) = self.stats.change(|stats| stats.failed(reply));
        let (level, what) = match reply.verdict {
            // Nobody but an operator can mend this.
            Verdict::HostRefused if class == "http-404" => {
                (log::Level::Error, "the master does not know this host, enrol it again")
            }
            Verdict::HostRefused => (log::Level::Error, "the master does not accept this host's certificate"),
            _ => (log::Level::Warn, "beat failed"),
        };
        let level = if changed || count.is_power_of_two() { level } else { log::Level::Debug };
        let (names, fingerprint) = (self.link.names(), self.link.fingerprint());
        log::log!(level, "{what}: {names} class={class} fingerprint={fingerprint} failures={count} detail={detail:?}");
    }

    fn host(&self) -> &str {
        self.link.enrolment().host_uuid().value()
    }
}

/// A moment to come, by the clock that people read.
fn wall(at: Instant) -> SystemTime {
    SystemTime::now() + at.saturating_duration_since(Instant::now())
}
