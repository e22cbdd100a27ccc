//! The heartbeat thread: events, and what a beat does. Everything here runs on that one thread.

mod posts;
mod record;

use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};

use crate::credentials::link::{MasterLink, PostInterrupt};
use crate::error::Error;
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::master::{PostResult, Verdict};
use crate::panics::{caught, quietly};
use crate::stats::{SharedStats, ThreadWatch};
use crate::status::{AppliedTopology, Snapshot, StatusSource};
use crate::threads::batches::{Batch, Batches, OutboxEvent};
use crate::threads::content::Content;
use crate::threads::decommission::Decommission;
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::{Schedule, SnapshotRequest, Ticks, TimerAction, Trigger};
use crate::threads::status::{StatusEvent, StatusThread};

/// Its name.
pub(crate) const NAME: &str = "decnet-heartbeat";

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
        self.at.elapsed() > limits::SNAPSHOT_AGE
    }

    /// The states of what runs here, fresh enough to be sent.
    fn are_known(&self) -> bool {
        !self.snapshot.is_unknown() && !self.are_stale()
    }
}

/// How the POSTs of a beat ended.
#[derive(Debug)]
struct BeatEnd {
    reply: PostResult,
    /// Deltas that the master accepted.
    delivered: usize,
}

/// What the heartbeat thread starts with.
pub(crate) struct Setup {
    pub(crate) link: MasterLink,
    pub(crate) outbox: Arc<OutboxClient>,
    pub(crate) batches: Batches,
    pub(crate) source: Box<dyn StatusSource>,
    pub(crate) stats: Arc<SharedStats>,
    pub(crate) agent_version: String,
    pub(crate) interval: Duration,
    pub(crate) ticks: Ticks,
}

/// The other threads' side of the heartbeat thread.
#[derive(Debug)]
pub(crate) struct HeartbeatThread {
    /// Stops it. The time by which it must have ended.
    pub(crate) stop: Sender<Instant>,
    /// A beat has ended, well or not.
    #[cfg_attr(
        not(feature = "loopback"),
        expect(dead_code, reason = "tests and the program's stats file want it")
    )]
    pub(crate) beats: Receiver<()>,
    /// Disconnected when the thread has ended.
    pub(crate) ended: Receiver<()>,
    /// Ends a POST that is under way.
    pub(crate) interrupt: Arc<PostInterrupt>,
}

/// Starts the heartbeat thread, and the status thread that it asks.
///
/// # Errors
///
/// The system refuses a thread.
pub(crate) fn spawn(setup: Setup) -> Result<HeartbeatThread, Error> {
    let (beaten, beats) = bounded(1);
    let (stop, stopped) = bounded(1);
    let (alive, ended) = bounded::<()>(0);
    let (interrupt, watch) = (setup.link.interrupt(), ThreadWatch::new(NAME, &setup.stats));
    let worker = HeartbeatLoop::new(setup, beaten, stopped)?;
    let run = move || {
        let _alive = alive;
        worker.run();
        watch.disarm();
    };
    let builder = thread::Builder::new().name(NAME.to_owned()).stack_size(limits::STACK);
    builder.spawn(run).map_err(|source| Error::thread(NAME, source))?;
    Ok(HeartbeatThread { stop, beats, ended, interrupt })
}

/// All that the heartbeat thread owns.
struct HeartbeatLoop {
    link: MasterLink,
    agent_version: String,
    outbox: Arc<OutboxClient>,
    batches: Batches,
    stats: Arc<SharedStats>,
    collector: StatusThread,
    schedule: Schedule,
    content: Content,
    decommission: Decommission,
    ticks: Ticks,
    /// Told after each beat, without waiting.
    beaten: Sender<()>,
    /// The time by which all must have ended.
    stop: Receiver<Instant>,
    /// Set by a stop.
    deadline: Option<Instant>,
    /// The last topology known, for the POSTs without states; inside, whether one is applied.
    topology: Option<Option<AppliedTopology>>,
    /// What the master failed on last, for the POSTs that leave it out.
    trouble: String,
    /// What it said of the states alone.
    states_trouble: String,
    /// The states rested, and are not accepted yet.
    states_rested: bool,
    /// The log has said that beats fail, and not yet that they do not any more.
    failure_said: bool,
    /// This beat has sent the states.
    states_sent: bool,
    repeats: LogThrottle,
    /// The log has said that the disk does not answer, and not yet that it does again.
    overdue_said: bool,
    /// The ini and the bundle do not exist, as of the last batch.
    files_are_gone: bool,
}

impl HeartbeatLoop {
    fn new(setup: Setup, beaten: Sender<()>, stop: Receiver<Instant>) -> Result<Self, Error> {
        let Setup { link, outbox, batches, source, stats, agent_version, interval, ticks } = setup;
        Ok(Self {
            collector: StatusThread::start(source, &stats)?,
            schedule: Schedule::new(interval),
            content: Content::new(interval),
            decommission: Decommission::new(interval),
            link,
            agent_version,
            outbox,
            batches,
            stats,
            ticks,
            beaten,
            stop,
            deadline: None,
            topology: None,
            trouble: String::new(),
            states_trouble: String::new(),
            states_rested: false,
            failure_said: false,
            states_sent: false,
            repeats: LogThrottle::default(),
            overdue_said: false,
            files_are_gone: false,
        })
    }

    /// Beats until it is stopped, then delivers what waits within the grace.
    fn run(mut self) {
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
            if let Err(said) = caught(|| self.link.replace_client()) {
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
                (stats.snapshot_pending_since, stats.pending_since) =
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
        self.stats
            .change(|stats| (stats.snapshot_pending_since, stats.pending_since) = (None, None));
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
            self.link.replace_credentials(*access);
            let (names, fingerprint) = (self.link.names(), self.link.fingerprint());
            quietly(|| {
                log::info!("took over changed credentials: {names} fingerprint={fingerprint}")
            });
            self.stats.change(|stats| self.link.describe(stats));
        }
        self.files_are_gone = batch.are_gone;
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
}
