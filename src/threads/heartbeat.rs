//! The heartbeat thread: events, and what a beat does. Everything here runs on that one thread.

use std::borrow::Cow;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, never, select};

use serde_json::value::RawValue;

use crate::credentials::link::MasterLink;
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::master::body::{self, Body};
use crate::master::{PostResult, Verdict};
use crate::outbox::{DeliveryResult, QueuedDelta, RowChange};
use crate::panics::{caught, quietly};
use crate::stats::{Failure, SharedStats, Stats};
use crate::status::{AppliedTopology, Observed, Snapshot, Topology};
use crate::text::sanitize;
use crate::threads::batches::{Batch, Batches, OutboxEvent};
use crate::threads::content::{
    Cause, Consequence, Content, DeltaSelection, Nothing, Post, PostOutcome,
};
use crate::threads::decommission::Decommission;
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::{Schedule, SnapshotRequest, Ticks, TimerAction, Trigger};
use crate::threads::status::{StatusEvent, StatusThread};

/// What the heartbeat thread wakes for.
#[derive(Debug)]
enum Event {
    Tick,
    OutboxEvent(OutboxEvent),
    /// What the outbox thread says without being waited for.
    Batch(Batch),
    StatusEvent(StatusEvent),
    Timer,
}

/// What the source found, and when.
#[derive(Debug)]
struct States {
    snapshot: Snapshot,
    at: Instant,
}

impl States {
    /// They may not hold any more.
    fn are_stale(&self) -> bool {
        self.at.elapsed() > limits::FRESH
    }

    /// The states of what runs here, fresh enough to be sent.
    fn are_known(&self) -> bool {
        !self.snapshot.is_unknown() && !self.are_stale()
    }
}

/// A POST that was made.
#[derive(Debug)]
struct Sent {
    /// What it carried: less than it was to, where the states had grown old.
    post: Post,
    deltas: Vec<QueuedDelta>,
    reply: PostResult,
}

/// How the POSTs of a beat ended.
#[derive(Debug)]
struct BeatEnd {
    reply: PostResult,
    /// Deltas that the master accepted.
    delivered: usize,
}

/// All that the heartbeat thread owns.
pub(crate) struct Worker {
    pub(crate) link: MasterLink,
    pub(crate) agent_version: String,
    pub(crate) outbox: Arc<OutboxClient>,
    pub(crate) batches: Batches,
    pub(crate) stats: Arc<SharedStats>,
    pub(crate) collector: StatusThread,
    pub(crate) schedule: Schedule,
    pub(crate) content: Content,
    pub(crate) decommission: Decommission,
    pub(crate) ticks: Ticks,
    /// Told after each beat, without waiting.
    pub(crate) beaten: Sender<()>,
    /// The time by which all must have ended.
    pub(crate) stop: Receiver<Instant>,
    /// Set by a stop.
    pub(crate) deadline: Option<Instant>,
    /// The last topology known, for the POSTs without states; inside, whether one is applied.
    pub(crate) topology: Option<Option<AppliedTopology>>,
    /// What the master failed on last, for the POSTs that leave it out.
    pub(crate) trouble: String,
    /// What it said of the states alone.
    pub(crate) states_trouble: String,
    /// The states rested, and are not accepted yet.
    pub(crate) states_rested: bool,
    /// The log has said that beats fail, and not yet that they do not any more.
    pub(crate) failure_said: bool,
    /// This beat has sent the states.
    pub(crate) states_sent: bool,
    pub(crate) repeats: LogThrottle,
    /// The log has said that the disk does not answer, and not yet that it does again.
    pub(crate) overdue_said: bool,
    /// The ini and the bundle do not exist, as of the last batch.
    pub(crate) files_are_gone: bool,
}

impl Worker {
    /// Beats until it is stopped, then delivers what waits within the grace.
    pub(crate) fn run(mut self) {
        self.guarded(|worker| worker.wish(Trigger::First));
        while let Some(event) = self.next_event() {
            self.guarded(|worker| worker.handle(event));
        }
        self.guarded(Self::flush);
        let waiting = self.outbox.books().counts.waiting;
        quietly(|| log::info!("heartbeat stopped: {} waiting={waiting}", self.link.names()));
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
            recv(self.batches.news) -> news => Some(Event::OutboxEvent(news.unwrap_or_else(|_| {
                // Its thread is gone, which the stats say.
                self.batches.news = never();
                OutboxEvent::Pushed
            }))),
            recv(self.batches.answers) -> batch => Some(match batch {
                Ok(batch) => Event::Batch(batch),
                Err(_) => {
                    self.batches.answers = never();
                    Event::OutboxEvent(OutboxEvent::Pushed)
                }
            }),
            recv(self.collector.collected) -> collected => match collected {
                Ok(collected) => Some(Event::StatusEvent(collected)),
                Err(_) => {
                    self.collector.collected = never();
                    Some(Event::StatusEvent(StatusEvent::Panicked("the status thread has ended".to_owned())))
                }
            },
            recv(timer) -> _ => Some(Event::Timer),
        }
    }

    /// No panic ends the thread. It counts as a beat without an answer, on a connection that cannot be trusted any more.
    fn guarded(&mut self, work: impl FnOnce(&mut Self)) {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        if let Err(said) = caught(|| work(self)) {
            self.stats.change(|stats| {
                stats.panics += 1;
                stats.failed(&PostResult::panicked(&said));
            });
            if let Some(times) = self.repeats.count("beat", &said, Instant::now()) {
                let names = self.link.names();
                quietly(|| {
                    log::error!("a beat panicked, going on: {names} times={times} panic={said:?}")
                });
            }
            if let Err(said) = caught(|| self.link.renew()) {
                let names = self.link.names();
                quietly(|| {
                    log::warn!("the connection cannot be made anew: {names} panic={said:?}")
                });
            }
            self.note_decommission(Verdict::NoResponse);
            self.schedule.ended(Verdict::NoResponse, Instant::now(), fastrand::f64());
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
            Event::Tick => self.wish(Trigger::Tick),
            Event::OutboxEvent(OutboxEvent::Pushed) => self.wish(Trigger::Delta),
            // It may have been sent in the meantime.
            Event::OutboxEvent(OutboxEvent::Flush) if self.outbox.free() == 0 => (),
            Event::OutboxEvent(OutboxEvent::Flush) => self.wish(Trigger::Flush),
            Event::Batch(batch) => self.came(batch),
            Event::StatusEvent(StatusEvent::Topology(Ok(topology))) => {
                self.topology = Some(topology.applied);
                self.schedule.topology_is_known(Instant::now());
            }
            Event::StatusEvent(StatusEvent::Topology(Err(said))) => self.source_panicked(&said),
            Event::StatusEvent(StatusEvent::Snapshot(snapshot, at)) => {
                self.stats.change(|stats| {
                    stats.snapshots += 1;
                    stats.last_snapshot = Some(SystemTime::now());
                });
                self.collected(States { snapshot, at });
            }
            Event::StatusEvent(StatusEvent::Panicked(said)) => {
                self.source_panicked(&said);
                let snapshot = Snapshot::unknown(&format!("the status source panicked: {said}"));
                self.collected(States { snapshot, at: Instant::now() });
            }
            Event::Timer => match self.schedule.fired(Instant::now()) {
                TimerAction::Beat => self.beat(None),
                TimerAction::Retry => self.wish(Trigger::Retry),
                TimerAction::Nothing => (),
            },
        }
    }

    /// A beat is wanted. While the status thread makes its snapshot the outbox thread looks for changed credentials, and puts
    /// the outbox in order; not for deltas alone, which ask for as little as they can.
    fn wish(&mut self, why: Trigger) {
        let question = self.schedule.wish(why, Instant::now());
        self.put(question);
        if !matches!(why, Trigger::Delta | Trigger::Flush) {
            self.outbox.tend();
        }
    }

    fn put(&self, question: SnapshotRequest) {
        if question == SnapshotRequest::Ask {
            // The one question that may be under way is this one; an error means that the status thread is gone.
            let _ = self.collector.ask.try_send(());
            self.stats.change(|stats| {
                (stats.snapshot_owed_since, stats.owed_since) =
                    (Some(SystemTime::now()), Some(Instant::now()));
            });
        }
    }

    fn source_panicked(&mut self, said: &str) {
        self.stats.change(|stats| stats.panics += 1);
        if let Some(times) = self.repeats.count("source", said, Instant::now()) {
            let host = self.link.host();
            quietly(|| {
                log::error!("the status source panicked: host={host} times={times} panic={said:?}")
            });
        }
    }

    fn collected(&mut self, states: States) {
        self.stats.change(|stats| (stats.snapshot_owed_since, stats.owed_since) = (None, None));
        if let Some(topology) = states.snapshot.topology() {
            self.topology = Some(topology.applied.clone());
        }
        match self.schedule.answered() {
            // It waited behind a POST that took its time.
            true if states.are_stale() => return self.wish(Trigger::Tick),
            true => self.beat(Some(&states)),
            false => (),
        }
        let question = self.schedule.ask_again(Instant::now());
        self.put(question);
    }

    /// One beat, with all the deltas that wait, up to a body's worth.
    fn beat(&mut self, states: Option<&States>) {
        self.warn_of_expiry();
        if let Some(end) = self.make_posts(states) {
            self.beat_ended(&end);
        }
        if self.batches.take_news() {
            self.wish(Trigger::Delta);
        }
    }

    fn beat_ended(&mut self, BeatEnd { reply, delivered }: &BeatEnd) {
        self.note(reply);
        self.schedule.ended(reply.verdict, Instant::now(), fastrand::f64());
        self.note_next_beat();
        // Full: it has been told already. Gone: nobody asks.
        let _ = self.beaten.try_send(());
        if reply.verdict == Verdict::Accepted
            && *delivered > 0
            && self.outbox.free() > self.content.resting()
        {
            self.wish(Trigger::Delta);
        }
    }

    /// The POSTs of one beat. What each carries is decided when the one before it has ended.
    fn make_posts(&mut self, states: Option<&States>) -> Option<BeatEnd> {
        let (since, mut last, mut delivered) = (Instant::now(), None, 0);
        self.content.begin();
        self.states_sent = false;
        while last.is_none() || self.may_go_on(since) {
            let Some(post) = self.content.next(states.is_some_and(States::are_known)) else {
                break;
            };
            let Sent { post, deltas, reply } = match self.exchange(post, states) {
                Ok(sent) => sent,
                Err(nothing) => {
                    self.content.nothing_to_send(nothing);
                    continue;
                }
            };
            self.note_decommission(reply.verdict);
            if reply.verdict == Verdict::Accepted {
                delivered += deltas.len();
            }
            match self.ended(post, &deltas, &reply) {
                Consequence::QueueCounts => last = Some(reply),
                Consequence::Absorbed(cause) => self.absorb(cause, &reply, &deltas),
            }
        }
        let resting = self.content.resting();
        self.stats.change(|stats| stats.resting = resting);
        last.map(|reply| BeatEnd { reply, delivered })
    }

    /// The POSTs after the first must not delay the next beat: each may take two thirds of the interval.
    fn may_go_on(&self, since: Instant) -> bool {
        self.stop.is_empty()
            && since.elapsed() < self.schedule.post_limit() / 2
            && !self.within().is_zero()
    }

    fn ended(&mut self, post: Post, deltas: &[QueuedDelta], reply: &PostResult) -> Consequence {
        let outcome = match reply.verdict {
            Verdict::Accepted => PostOutcome::Accepted,
            // A gateway may answer any body with its page, so no delta is rejected because of one.
            Verdict::BodyRejected if reply.is_page && deltas.len() == 1 && !post.states => {
                PostOutcome::InDoubt
            }
            Verdict::BodyRejected => PostOutcome::Refused,
            Verdict::RetryLater(_) | Verdict::NoResponse if reply.in_doubt => PostOutcome::InDoubt,
            _ => PostOutcome::Unchanged,
        };
        if matches!(outcome, PostOutcome::InDoubt | PostOutcome::Refused) {
            self.in_trouble(reply);
        }
        let was_whole = self.content.is_whole();
        let consequence = self.content.ended(post, deltas, outcome);
        if self.content.is_whole() && !was_whole && self.states_rested {
            self.states_rested = false;
            quietly(|| log::info!("the master takes the states again: {}", self.link.names()));
        }
        consequence
    }

    /// What the POSTs that carry less say of it.
    fn in_trouble(&mut self, reply: &PostResult) {
        self.trouble = format!("{}: {}", reply.class, reply.detail);
    }

    /// The beat goes on without what the master does not take.
    fn absorb(&mut self, cause: Cause, reply: &PostResult, deltas: &[QueuedDelta]) {
        let reason = format!("{}: {}", reply.class, reply.detail);
        match (cause, deltas) {
            (Cause::DeltaRefused, [kept]) => self.reject(kept, &reason),
            (Cause::DeltaRests, [kept]) => {
                if let Some(times) = self.repeats.count("delta", &reason, Instant::now()) {
                    let (decky, operation) = (sanitize(kept.delta.decky()), kept.delta.operation());
                    let names = self.link.names();
                    quietly(|| {
                        log::warn!(
                            "the master fails on a delta, it rests: {names} decky={decky:?} operation={operation} \
                             times={times} reason={reason:?}"
                        );
                    });
                }
            }
            (Cause::StatesRest, _) => {
                self.states_rested = true;
                self.states_trouble.clone_from(&reason);
                let fault = self.why_no_states(None).into_owned();
                self.stats.change(|stats| stats.status_fault = Some(fault));
                if let Some(times) = self.repeats.count("states", &reason, Instant::now()) {
                    let (names, beats) =
                        (self.link.names(), self.content.states_rest_for().unwrap_or_default());
                    quietly(|| {
                        log::error!(
                            "the master fails on the states, beating without them: {names} beats={beats} \
                             times={times} reason={reason:?}"
                        );
                    });
                }
            }
            _ => (),
        }
    }

    fn reject(&mut self, kept: &QueuedDelta, reason: &str) {
        let (decky, operation) = (sanitize(kept.delta.decky()), kept.delta.operation());
        let names = self.link.names();
        quietly(|| {
            log::error!(
                "the master refuses a delta for good, it is put aside: {names} decky={decky:?} operation={operation} \
                 reason={reason:?}"
            );
        });
        self.settle(std::slice::from_ref(kept), DeliveryResult::Rejected(reason.to_owned()));
        self.stats.change(|stats| stats.rejected += 1);
    }

    /// One POST, and what follows if it is accepted: the deltas in it are forgotten. Where the connection had ended it is
    /// tried once more at once, with what may be sent by then: an operation may have begun meanwhile that holds back some
    /// of it, and the states may be old. A delta that is sent alone stays the same one.
    fn exchange(&mut self, post: Post, states: Option<&States>) -> Result<Sent, Nothing> {
        let end = Instant::now() + self.within();
        let mut sent = self.post(post, states, end)?;
        if sent.reply.stale && Instant::now() < end {
            let (names, class) = (self.link.names(), &sent.reply.class);
            quietly(|| {
                log::debug!("the connection has ended, trying a fresh one: {names} class={class}")
            });
            let deltas = match (post.deltas, sent.deltas.as_slice()) {
                (DeltaSelection::One | DeltaSelection::Only(_), [kept]) => {
                    DeltaSelection::Same(kept.id)
                }
                (share, _) => share,
            };
            if let Ok(mut again) = self.post(Post { deltas, ..post }, states, end) {
                again.reply.in_doubt |= sent.reply.in_doubt;
                if sent.reply.in_doubt && sent.post.states && !again.post.states {
                    self.in_trouble(&sent.reply);
                    self.content.states_in_doubt();
                }
                sent = again;
            }
        }
        if sent.reply.verdict == Verdict::Accepted {
            if !sent.deltas.is_empty() {
                self.settle(&sent.deltas, DeliveryResult::Delivered);
            }
            self.accepted(&sent.reply, sent.deltas.len());
        }
        Ok(sent)
    }

    fn post(&mut self, post: Post, states: Option<&States>, end: Instant) -> Result<Sent, Nothing> {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        let deltas = self.share(post.deltas)?;
        // Decided last: the outbox may have taken its time.
        let post = Post { states: post.states && states.is_some_and(States::are_known), ..post };
        if !post.states && self.content.wants_states_alone() {
            return Err(Nothing::NotNow);
        }
        if deltas.is_empty() && self.content.is_only_for_deltas() {
            return Err(Nothing::Gone);
        }
        self.note_status_fault(post, states);
        let reply = match self.body(post, states, &deltas) {
            Ok(body) => {
                self.link.master().post(&body, end.saturating_duration_since(Instant::now()))
            }
            Err(error) => PostResult::unwritten(&error),
        };
        Ok(Sent { post, deltas, reply })
    }

    /// What the beat does not say of what runs here. Once its states are sent, its other POSTs leave nothing out.
    fn note_status_fault(&mut self, post: Post, states: Option<&States>) {
        if self.states_sent
            && (post.states || post.deltas != DeltaSelection::Newest(limits::DELTAS_PER_BODY))
        {
            return;
        }
        self.states_sent = post.states;
        let fault = match states {
            Some(States { snapshot, .. }) if post.states => snapshot.fault().map(str::to_owned),
            _ => Some(self.why_no_states(states).into_owned()),
        };
        self.stats.change(|stats| stats.status_fault = fault);
    }

    fn body(
        &self,
        post: Post,
        states: Option<&States>,
        deltas: &[QueuedDelta],
    ) -> serde_json::Result<Vec<u8>> {
        let lifecycle: Vec<_> = deltas.iter().map(|kept| &kept.delta).collect();
        let fresh = states.filter(|states| !states.are_stale());
        let snapshot = fresh.map(|states| &states.snapshot);
        let why_not = self.why_no_states(states);
        let (missing, topology);
        // A snapshot without states says itself why, in its source's own words.
        let has_reason = |snapshot: &Snapshot| snapshot.is_unknown() && !self.content.states_rest();
        let status: &RawValue = match snapshot {
            Some(snapshot) if post.states || has_reason(snapshot) => snapshot.raw_status(),
            _ => {
                missing = Snapshot::unknown(&why_not);
                missing.raw_status()
            }
        };
        // What is observed is a part of the states: it may be as large, and grows as old.
        let observed = snapshot
            .filter(|_| post.states || self.content.is_whole())
            .and_then(Snapshot::topology);
        topology = match (observed, &self.topology) {
            (Some(topology), _) => Some(Cow::Borrowed(topology)),
            (None, Some(applied)) => {
                let has_states = post.states && snapshot.is_some();
                let why_not =
                    if has_states { "this snapshot has no topology".into() } else { why_not };
                let observed = Observed::Unknown(why_not.into_owned());
                Some(Cow::Owned(Topology { applied: applied.clone(), observed }))
            }
            (None, None) => None,
        };
        serde_json::to_vec(&Body {
            host_uuid: self.link.host(),
            agent_version: &self.agent_version,
            status,
            topology: topology.as_deref().map(body::Topology::from),
            lifecycle: &lifecycle,
        })
    }

    /// Why a POST has no states, for its `status.error`.
    fn why_no_states<'a>(&self, states: Option<&'a States>) -> Cow<'a, str> {
        let trouble = &self.trouble;
        if self.content.states_rest() {
            return format!(
                "the states are left out, as the master failed on them: {}",
                self.states_trouble
            )
            .into();
        }
        match states {
            Some(states) if states.are_stale() => {
                "no fresh snapshot: it grew old while it was sent".into()
            }
            Some(States { snapshot, .. }) if snapshot.is_unknown() => {
                snapshot.fault().unwrap_or_default().into()
            }
            Some(_) if self.content.is_whole() => "the states are in another POST".into(),
            Some(_) => format!(
                "the states are sent alone, as the master failed on a body with more: {trouble}"
            )
            .into(),
            None => self.no_snapshot().into(),
        }
    }

    fn within(&self) -> Duration {
        let limit = self.schedule.post_limit();
        self.deadline
            .map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()).min(limit))
    }

    /// The deltas of a POST. While the outbox does not answer a beat goes on without deltas.
    fn share(&mut self, share: DeltaSelection) -> Result<Vec<QueuedDelta>, Nothing> {
        if share == DeltaSelection::None {
            return Ok(Vec::new());
        }
        let patience = limits::BATCH_PATIENCE.min(self.schedule.interval() / 2).min(self.within());
        let deltas = match self.batches.get(share, self.content.suspects(), patience) {
            Some(mut batch) => {
                self.note_files(&mut batch);
                batch.deltas
            }
            None => {
                self.files_are_gone = false;
                self.note_overdue();
                Err(Nothing::NotNow)
            }
        };
        match (share, deltas) {
            (DeltaSelection::Newest(_), Err(Nothing::NotNow)) => Ok(Vec::new()),
            (_, deltas) => deltas,
        }
    }

    /// A batch that nobody waited for: an offer, or an answer that is late.
    fn came(&mut self, mut batch: Batch) {
        let has_new_access = batch.access.is_some();
        self.note_files(&mut batch);
        let has_deltas = self.batches.came(batch);
        if mem::take(&mut self.overdue_said) {
            quietly(|| {
                log::info!("the disk of the outbox answers again: host={}", self.link.host())
            });
        }
        match (has_new_access, has_deltas) {
            // A master that refused the old ones may accept these.
            (true, _) => self.wish(Trigger::Tick),
            (false, true) => self.wish(Trigger::Delta),
            (false, false) => (),
        }
    }

    /// What the ini and the bundle have become comes with a batch.
    fn note_files(&mut self, batch: &mut Batch) {
        if let Some(access) = batch.access.take() {
            self.link.take_over(*access);
            let (names, fingerprint) = (self.link.names(), self.link.fingerprint());
            quietly(|| {
                log::info!("took over changed credentials: {names} fingerprint={fingerprint}")
            });
            self.stats.change(|stats| self.link.describe(stats));
        }
        self.files_are_gone = batch.are_gone;
    }

    fn note_overdue(&mut self) {
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

    fn settle(&self, deltas: &[QueuedDelta], settled: DeliveryResult) {
        self.outbox.settle(RowChange::DeliveryResult(
            deltas.iter().map(|kept| kept.id).collect(),
            settled,
        ));
    }

    /// What a beat says when its snapshot is not there in time.
    fn no_snapshot(&self) -> String {
        match (self.deadline, self.schedule.asked()) {
            (Some(_), _) => "no fresh snapshot: the agent is stopping".to_owned(),
            (None, Some(asked)) => format!(
                "no fresh snapshot: the status source has not answered for {:.1} s",
                asked.elapsed().as_secs_f64()
            ),
            (None, None) => "no fresh snapshot".to_owned(),
        }
    }

    fn warn_of_expiry(&mut self) {
        let Some(days) = self.link.days_left(SystemTime::now()) else { return };
        let (level, what) = match days {
            0.. => (log::Level::Warn, "the certificate expires soon, enrol this host again"),
            _ => (log::Level::Error, "the certificate has expired, enrol this host again"),
        };
        quietly(|| {
            log::log!(
                level,
                "{what}: {} fingerprint={} days={days}",
                self.link.names(),
                self.link.fingerprint()
            )
        });
    }

    /// The last beat: what waits now, within the grace, as often as it takes. What is pushed meanwhile is for the next
    /// start: threads that go on pushing must not make a stop as long as its grace.
    fn flush(&mut self) {
        let mut left = self.outbox.free();
        if left > 0 {
            self.await_topology();
        }
        while left > 0 && !self.within().is_zero() {
            let Some(BeatEnd { reply, delivered }) = self.make_posts(None) else { return };
            self.note(&reply);
            if delivered == 0 || reply.verdict != Verdict::Accepted {
                return;
            }
            left = left.saturating_sub(delivered as u64);
        }
    }

    /// A heartbeat that is stopped right after its start has not heard of the topology yet, and must not leave it out.
    fn await_topology(&mut self) {
        while let Some(until) = self.schedule.topology_awaited_until() {
            let by = self.deadline.map_or(until, |deadline| deadline.min(until));
            let topology = match self.collector.collected.recv_deadline(by) {
                Ok(StatusEvent::Topology(Ok(topology))) => Some(topology.applied),
                Ok(StatusEvent::Topology(Err(_))) => continue,
                Ok(StatusEvent::Snapshot(snapshot, _)) => {
                    snapshot.topology().map(|topology| topology.applied.clone())
                }
                Ok(StatusEvent::Panicked(_)) | Err(_) => None,
            };
            self.topology = topology.or(self.topology.take());
            return;
        }
    }

    fn accepted(&mut self, reply: &PostResult, deltas: usize) {
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
    fn note(&mut self, reply: &PostResult) {
        if reply.verdict == Verdict::Accepted {
            return;
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
    fn note_decommission(&mut self, verdict: Verdict) {
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
