//! The heartbeat thread: it waits for events and sends beats. Everything in this module runs on
//! that thread, except [`spawn`].

mod posts;
mod record;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvError, Sender, bounded, never, select};

use crate::credentials::current::{CurrentCredentials, PostInterrupt};
use crate::error::Error;
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::master::{PostResult, Verdict};
use crate::panics::{caught, quietly};
use crate::stats::SharedStats;
use crate::status::{AppliedTopology, Snapshot, StatusSource};
use crate::threads;
use crate::threads::batches::{Batch, Batches, OutboxEvent};
use crate::threads::content::Content;
use crate::threads::decommission::Decommission;
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::{Schedule, SnapshotRequest, Ticks, TimerAction, Trigger};
use crate::threads::status::{StatusEvent, StatusThread};

/// The name of the thread.
pub(crate) const NAME: &str = "decnet-heartbeat";

/// What wakes the heartbeat thread.
#[derive(Debug)]
enum Event {
    Tick,
    OutboxEvent(OutboxEvent),
    /// A batch that no beat waits for.
    Batch(Batch),
    StatusEvent(StatusEvent),
    Timer,
}

/// A snapshot, and when it was ready.
#[derive(Debug)]
struct States {
    snapshot: Snapshot,
    ready_at: Instant,
}

impl States {
    /// Whether they are too old to be sent.
    fn are_stale(&self) -> bool {
        self.ready_at.elapsed() > limits::SNAPSHOT_AGE
    }

    /// Whether they say what runs here, and are fresh enough to be sent.
    fn are_known(&self) -> bool {
        !self.snapshot.is_unknown() && !self.are_stale()
    }
}

/// How the POSTs of a beat ended.
#[derive(Debug)]
struct BeatResult {
    /// The result that counts for the beat.
    result: PostResult,
    /// The number of deltas that the master accepted.
    delivered: usize,
}

/// The parts that the heartbeat thread starts with.
pub(crate) struct Setup {
    pub(crate) credentials: CurrentCredentials,
    pub(crate) outbox: Arc<OutboxClient>,
    pub(crate) batches: Batches,
    pub(crate) source: Box<dyn StatusSource>,
    pub(crate) stats: Arc<SharedStats>,
    pub(crate) agent_version: String,
    pub(crate) interval: Duration,
    pub(crate) ticks: Ticks,
}

/// A handle to the heartbeat thread.
#[derive(Debug)]
pub(crate) struct HeartbeatThread {
    /// Stops the thread. The message is the time by which its POSTs must have ended.
    pub(crate) stop: Sender<Instant>,
    /// Receives a message after each beat, accepted or failed.
    #[cfg_attr(
        not(feature = "loopback"),
        expect(dead_code, reason = "used by tests and by the program's stats file")
    )]
    pub(crate) beats: Receiver<()>,
    /// Disconnected when the thread has ended.
    pub(crate) ended: Receiver<()>,
    /// Interrupts the current POST.
    pub(crate) interrupt: Arc<PostInterrupt>,
    pub(crate) outbox: Arc<OutboxClient>,
    pub(crate) stats: Arc<SharedStats>,
}

/// Starts the heartbeat thread and the status thread.
///
/// # Errors
///
/// The system refuses a thread.
pub(crate) fn spawn(setup: Setup) -> Result<HeartbeatThread, Error> {
    let (beat_ended, beats) = bounded(1);
    let (stop, stop_receiver) = bounded(1);
    let interrupt = setup.credentials.interrupt();
    let outbox = Arc::clone(&setup.outbox);
    let stats = Arc::clone(&setup.stats);
    let heartbeat_loop = HeartbeatLoop::new(setup, beat_ended, stop_receiver)?;
    let run = move || heartbeat_loop.run();
    let (_, ended) = threads::spawn(NAME, limits::STACK, Some(&stats), run)?;
    Ok(HeartbeatThread { stop, beats, ended, interrupt, outbox, stats })
}

/// The state of the heartbeat thread.
struct HeartbeatLoop {
    credentials: CurrentCredentials,
    agent_version: String,
    outbox: Arc<OutboxClient>,
    batches: Batches,
    stats: Arc<SharedStats>,
    status_thread: StatusThread,
    schedule: Schedule,
    content: Content,
    decommission: Decommission,
    ticks: Ticks,
    /// Receives a message after each beat, if it has room.
    beat_ended: Sender<()>,
    /// Receives the time by which the POSTs must have ended.
    stop: Receiver<Instant>,
    /// Set when the heartbeat is stopped.
    deadline: Option<Instant>,
    /// The last known topology, for POSTs without states. The inner value is the topology that is
    /// applied, if one is.
    topology: Option<Option<AppliedTopology>>,
    /// How the master failed on a body last, for the POSTs that carry less because of it.
    last_failure: String,
    /// How the master failed on the states alone, if it has not accepted them since.
    states_failure: Option<String>,
    /// A POST of this beat carried the states.
    states_sent: bool,
    throttle: LogThrottle,
    /// The ini and the bundle do not exist, as of the last batch.
    files_missing: bool,
}

impl HeartbeatLoop {
    /// Starts the status thread.
    fn new(setup: Setup, beat_ended: Sender<()>, stop: Receiver<Instant>) -> Result<Self, Error> {
        let Setup { credentials, outbox, batches, source, stats, agent_version, interval, ticks } =
            setup;
        Ok(Self {
            status_thread: StatusThread::start(source, &stats)?,
            schedule: Schedule::new(interval),
            content: Content::new(interval),
            decommission: Decommission::new(interval),
            credentials,
            agent_version,
            outbox,
            batches,
            stats,
            ticks,
            beat_ended,
            stop,
            deadline: None,
            topology: None,
            last_failure: String::new(),
            states_failure: None,
            states_sent: false,
            throttle: LogThrottle::default(),
            files_missing: false,
        })
    }

    /// Sends beats until the heartbeat is stopped, then delivers the deltas that wait.
    fn run(mut self) {
        self.catch_panics(|this| this.request_beat(Trigger::First));
        while let Some(event) = self.next_event() {
            self.catch_panics(|this| this.handle(event));
        }
        self.catch_panics(Self::flush);
        let waiting = self.outbox.stats().counts.waiting;
        quietly(|| log::info!("heartbeat stopped: {} waiting={waiting}", self.credentials.names()));
    }

    /// Waits for the next event. `None`: the heartbeat is stopped.
    fn next_event(&mut self) -> Option<Event> {
        let timer = self.schedule.timer();
        // Checked first, so that a thread with a constant stream of events stops, too.
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
                    Ok(_) => self.ticks.tick_received(Instant::now()),
                    Err(_) => self.ticks.disconnected(),
                }
                Some(Event::Tick)
            }
            recv(self.batches.events) -> event => {
                let event = received(&mut self.batches.events, event);
                Some(Event::OutboxEvent(event.unwrap_or(OutboxEvent::Pushed)))
            }
            recv(self.batches.batches) -> batch => {
                let batch = received(&mut self.batches.batches, batch);
                Some(batch.map_or(Event::OutboxEvent(OutboxEvent::Pushed), Event::Batch))
            }
            recv(self.status_thread.events) -> event => {
                let event = received(&mut self.status_thread.events, event);
                let ended = || StatusEvent::Panicked("the status thread has ended".to_owned());
                Some(Event::StatusEvent(event.unwrap_or_else(ended)))
            }
            recv(timer) -> _ => Some(Event::Timer),
        }
    }

    /// Runs a step. A panic does not end the thread: it counts as a failed beat, and the connection
    /// is replaced, because it may be in any state.
    fn catch_panics(&mut self, step: impl FnOnce(&mut Self)) {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        if let Err(panic) = caught(|| step(self)) {
            self.record_panic(&panic);
            if let Err(panic) = caught(|| self.credentials.replace_client()) {
                let names = self.credentials.names();
                quietly(|| log::warn!("could not replace the connection: {names} panic={panic:?}"));
            }
            self.record_decommission(Verdict::NoResponse);
            self.schedule.beat_ended(Verdict::NoResponse, Instant::now(), fastrand::f64());
        }
        self.record_next_beat();
        self.stats.change(|stats| stats.working_since = None);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick => self.request_beat(Trigger::Tick),
            Event::OutboxEvent(OutboxEvent::Pushed) => self.request_beat(Trigger::Delta),
            // It began with the maintenance of a beat, and that beat has the deltas.
            Event::OutboxEvent(OutboxEvent::DeliveryBegan) => (),
            Event::OutboxEvent(OutboxEvent::Flush) => {
                // The deltas may have been sent since.
                if self.outbox.sendable() > 0 {
                    self.request_beat(Trigger::Flush);
                }
            }
            Event::Batch(batch) => self.receive_batch(batch),
            Event::StatusEvent(event) => self.handle_status(event),
            Event::Timer => match self.schedule.timer_fired(Instant::now()) {
                TimerAction::Beat => self.beat(None),
                TimerAction::Retry => self.request_beat(Trigger::Retry),
                TimerAction::Nothing => (),
            },
        }
    }

    fn handle_status(&mut self, event: StatusEvent) {
        match event {
            StatusEvent::Topology(Ok(topology)) => {
                self.topology = Some(topology.applied);
                self.schedule.topology_received(Instant::now());
            }
            StatusEvent::Topology(Err(panic)) => self.record_source_panic(&panic),
            StatusEvent::Snapshot(snapshot, ready_at) => {
                self.stats.change(|stats| {
                    stats.snapshots += 1;
                    stats.last_snapshot = Some(SystemTime::now());
                });
                self.receive_snapshot(States { snapshot, ready_at });
            }
            StatusEvent::Panicked(panic) => {
                self.record_source_panic(&panic);
                let snapshot = Snapshot::unknown(&format!("the status source panicked: {panic}"));
                self.receive_snapshot(States { snapshot, ready_at: Instant::now() });
            }
        }
    }

    /// Triggers a beat. While the status thread makes its snapshot, the outbox thread checks the
    /// credentials and maintains the outbox. A beat for deltas alone does without that.
    fn request_beat(&mut self, trigger: Trigger) {
        let request = self.schedule.trigger(trigger, Instant::now());
        self.request_snapshot(request);
        if !matches!(trigger, Trigger::Delta | Trigger::Flush) {
            self.outbox.maintain();
        }
    }

    fn request_snapshot(&self, request: SnapshotRequest) {
        if request == SnapshotRequest::Needed {
            // No other request is pending, so an error means that the status thread has ended.
            let _ = self.status_thread.requests.try_send(());
            self.stats.change(|stats| {
                stats.snapshot_pending_since = Some(SystemTime::now());
                stats.pending_since = Some(Instant::now());
            });
        }
    }

    fn receive_snapshot(&mut self, states: States) {
        self.stats.change(|stats| {
            stats.snapshot_pending_since = None;
            stats.pending_since = None;
        });
        self.store_topology(&states.snapshot);
        if self.schedule.snapshot_received() {
            if states.are_stale() {
                // It was ready during a POST that took long.
                return self.request_beat(Trigger::Tick);
            }
            self.beat(Some(&states));
        }
        let request = self.schedule.request_again(Instant::now());
        self.request_snapshot(request);
    }

    /// Sends one beat, with as many of the deltas that wait as fit into a body.
    fn beat(&mut self, states: Option<&States>) {
        self.warn_of_expiry();
        if let Some(beat) = self.send_posts(states) {
            self.end_beat(&beat);
        }
        if self.batches.take_new_offer() {
            self.request_beat(Trigger::Delta);
        }
    }

    fn end_beat(&mut self, BeatResult { result, delivered }: &BeatResult) {
        self.record_failure(result);
        self.schedule.beat_ended(result.verdict, Instant::now(), fastrand::f64());
        self.record_next_beat();
        // An error means that a message is unread, or that the handle was dropped.
        let _ = self.beat_ended.try_send(());
        if result.verdict == Verdict::Accepted
            && *delivered > 0
            && self.outbox.sendable() > self.content.suspended_deltas()
        {
            self.request_beat(Trigger::Delta);
        }
    }

    /// Receives a batch that no beat waits for: an offer, or a late answer.
    fn receive_batch(&mut self, mut batch: Batch) {
        let has_credentials = batch.credentials.is_some();
        self.take_credentials(&mut batch);
        let has_deltas = self.batches.receive(batch);
        if self.throttle.end("overdue") {
            quietly(|| log::info!("outbox disk answers again: host={}", self.credentials.host()));
        }
        if has_credentials {
            // A master that rejected the old credentials may accept these.
            self.request_beat(Trigger::Tick);
        } else if has_deltas {
            self.request_beat(Trigger::Delta);
        }
    }

    /// Reloads changed credentials from a batch.
    fn take_credentials(&mut self, batch: &mut Batch) {
        if let Some(credentials) = batch.credentials.take() {
            self.credentials.replace(*credentials);
            let names = self.credentials.names();
            let fingerprint = self.credentials.fingerprint();
            quietly(|| log::info!("credentials reloaded: {names} fingerprint={fingerprint}"));
            self.stats.change(|stats| self.credentials.describe(stats));
        }
        self.files_missing = batch.files_missing;
    }

    /// Sends the deltas that wait when the heartbeat is stopped, in as many beats as the grace has
    /// time for. Deltas that are pushed after the stop wait for the next start, or threads that
    /// push all the time would make every stop take the whole grace.
    fn flush(&mut self) {
        let mut left = self.outbox.sendable();
        if left > 0 {
            self.await_topology();
            self.batches.wait_again();
        }
        while left > 0 && !self.time_left().is_zero() {
            let Some(BeatResult { result, delivered }) = self.send_posts(None) else { return };
            self.record_failure(&result);
            if delivered == 0 || result.verdict != Verdict::Accepted {
                return;
            }
            left = left.saturating_sub(delivered as u64);
        }
    }

    /// Waits for the topology in a heartbeat that is stopped right after its start, because no POST
    /// may leave it out.
    fn await_topology(&mut self) {
        let Some(until) = self.schedule.topology_deadline() else { return };
        let by = self.deadline.map_or(until, |deadline| deadline.min(until));
        while let Ok(event) = self.status_thread.events.recv_deadline(by) {
            match event {
                // A snapshot follows.
                StatusEvent::Topology(Err(_)) => continue,
                StatusEvent::Topology(Ok(topology)) => self.topology = Some(topology.applied),
                StatusEvent::Snapshot(snapshot, _) => self.store_topology(&snapshot),
                StatusEvent::Panicked(_) => (),
            }
            return;
        }
    }

    fn store_topology(&mut self, snapshot: &Snapshot) {
        if let Some(topology) = snapshot.topology() {
            self.topology = Some(topology.applied.clone());
        }
    }
}

/// The message of another thread. `None`: it has ended, which the stats report, and is not received
/// from again.
fn received<T>(receiver: &mut Receiver<T>, message: Result<T, RecvError>) -> Option<T> {
    if message.is_err() {
        *receiver = never();
    }
    message.ok()
}
