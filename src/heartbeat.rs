//! The handle: build, start, push, stop. Runs on the caller's threads.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::credentials::enrolment::Enrolment;
use crate::credentials::link::MasterLink;
use crate::delta::{Operation, from_micros};
use crate::deltas::DeltaSender;
use crate::deltas::operation::{IntoDeckies, IntoOutcome, TrackedOperation};
use crate::error::{Error, chain, sanitize_path};
use crate::forked::OfProcess;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::outbox::{OutboxLocation, OutboxStats};
use crate::panics::quietly;
use crate::stats::{SharedStats, Stats};
use crate::status::StatusSource;
use crate::status::decnet::DecnetStatus;
use crate::threads::heartbeat::{self, HeartbeatThread, Setup};
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::Ticks;
use crate::threads::start::{self, Started};

/// A running heartbeat, or a dormant one where the host is not enrolled.
///
/// It runs on three threads of its own, `decnet-heartbeat`, `decnet-status` and `decnet-outbox`, which ends with the last
/// [`DeltaSender`] or [`TrackedOperation`]: see [`design`](crate::design). Dropping it stops it, with 2 s for what still waits;
/// [`stop`](Self::stop) lets the caller choose.
///
/// It belongs to the process that started it. In one that was forked later it does nothing, and what returns a `Result` returns
/// an error; its drop there leaves the parent's heartbeat, locks and rows alone. See [`design`](crate::design).
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::{LifecycleDelta, Operation};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let heartbeat = builder.start()?; // the first beat goes out at once
/// assert!(master.wait_for_beats(1, SOON));
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let stopped = heartbeat.stop(Duration::from_secs(5)); // with what still waits
/// assert_eq!(stopped.undelivered, 0);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
pub struct Heartbeat {
    /// `None`: dormant.
    running: Option<OfProcess<Running>>,
}

#[derive(Debug)]
struct Running {
    thread: HeartbeatThread,
    outbox: Arc<OutboxClient>,
    stats: Arc<SharedStats>,
}

/// How a heartbeat stopped.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::{LifecycleDelta, Operation};
/// # let (_dir, mut master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// master.stop(); // an outage
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let stopped = heartbeat.stop(Duration::from_secs(5));
/// if !stopped.kept {
///     eprintln!("lost with this process: {} deltas, {} operations", stopped.undelivered, stopped.operations);
/// }
/// assert_eq!((stopped.undelivered, stopped.kept), (1, true)); // it waits on the disk for the next start
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stopped {
    /// Deltas that the master has not accepted.
    pub undelivered: u64,
    /// Operations still in flight, counted for each decky. Each waits for the next start once it has ended; if the
    /// process ends first, the next start reports it failed.
    pub operations: u64,
    /// All of these are on the disk, and the next start delivers them. False: they are in memory, and are lost with the
    /// process, or the disk has not answered in time.
    pub kept: bool,
    /// The heartbeat thread ended within the grace. False: it still hangs in a call that nothing interrupts, such as the
    /// lookup of a name, and ends with that.
    pub in_time: bool,
}

impl Heartbeat {
    /// Everything has a default: see [`HeartbeatBuilder`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::Heartbeat;
    /// let error = Heartbeat::builder().interval(Duration::from_millis(1)).start().unwrap_err();
    /// assert_eq!(error.to_string(), "interval: is 1ms; it must be from 50 ms to 1 h");
    /// ```
    pub fn builder() -> HeartbeatBuilder {
        HeartbeatBuilder::default()
    }

    /// A handle to push deltas with. Clone it, send it to other threads, keep it as long as you like.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # use decnet_heartbeat::{LifecycleDelta, Operation};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// let deltas = heartbeat.deltas();
    /// let worker = std::thread::spawn(move || deltas.push(LifecycleDelta::succeeded("decky-01", Operation::Deploy)));
    /// worker.join().expect("it does not panic")?;
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Succeeded));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn deltas(&self) -> DeltaSender {
        let Some(running) = &self.running else { return DeltaSender::dormant() };
        DeltaSender::new(running.map(|running| Arc::clone(&running.outbox)))
    }

    /// Tracks an operation on `deckies`: see [`DeltaSender::begin`].
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # use decnet_heartbeat::{Heartbeat, Operation};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// fn deploy(heartbeat: &Heartbeat) -> Result<(), Box<dyn std::error::Error>> {
    ///     let operation = heartbeat.begin(Operation::Deploy, ["decky-01"])?;
    ///     let port: u16 = "none".parse()?; // an early return: the guard reports the failure
    ///     println!("it listens on {port}");
    ///     operation.succeed();
    ///     Ok(())
    /// }
    ///
    /// assert!(deploy(&heartbeat).is_err());
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Failed));
    /// assert_eq!(master.rows()[0].error.as_deref(), Some("deploy ended without a verdict"));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// As there.
    pub fn begin<Kind>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
    ) -> Result<TrackedOperation, Error> {
        self.deltas().begin(operation, deckies)
    }

    /// Does `work` on a thread of its own and reports how it ended: see [`DeltaSender::run`].
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # use decnet_heartbeat::Operation;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # master.open_operation(&worker.uuid, "decky-01", "mutate");
    /// let work = || -> Result<(), std::io::Error> { panic!("no address left") };
    /// let thread = heartbeat.run(Operation::Mutate, ["decky-01"], work)?;
    /// thread.join().expect("the panic is a report, and goes no further");
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[0].status == RowStatus::Failed));
    /// assert_eq!(master.rows()[0].error.as_deref(), Some("mutate panicked: no address left"));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// As there.
    pub fn run<Kind, R: IntoOutcome>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<JoinHandle<()>, Error> {
        self.deltas().run(operation, deckies, work)
    }

    /// What it knows of itself. Never blocks on the network or the disk. In a process that was forked after the start only
    /// [`ended_thread`](Stats::ended_thread) is set, as its threads do not run there.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # heartbeat.beats().recv_timeout(SOON)?;
    /// let stats = heartbeat.stats();
    /// assert!(stats.beats >= 1 && stats.failure.is_none());
    /// assert_eq!((stats.waiting, stats.dropped), (0, 0));
    /// assert_eq!(stats.fingerprint, Some(worker.fingerprint)); // what the master has pinned
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn stats(&self) -> Stats {
        let Some(running) = &self.running else {
            return Stats { dormant: true, ..Stats::default() };
        };
        let Ok(running) = running.get() else {
            return Stats { ended_thread: Some(heartbeat::NAME), ..Stats::default() };
        };
        let mut stats = running.stats.read();
        let OutboxStats { counts, dropped, .. } = running.outbox.books();
        (stats.waiting, stats.held, stats.operations) =
            (counts.waiting, counts.held, counts.operations);
        stats.oldest_waiting = counts.oldest.map(from_micros);
        (stats.dropped, stats.outbox) = (dropped, running.outbox.path().map(Into::into));
        stats.outbox_busy_since = running.outbox.busy_since().map(past);
        stats
    }

    /// Whether a thread makes no progress that a restart could help: the heartbeat thread has been at one event for over a
    /// minute, the status source has owed a snapshot for as long, or a thread has ended. A watchdog asks this. The beats go
    /// on without a source that hangs; what runs here is then no longer told. They go on without deltas while the disk of
    /// the outbox does not answer, which is no stall: see [`Stats::outbox_busy_since`]. In a process that was forked after the
    /// start it is always true.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// // In the loop that pets the watchdog:
    /// if heartbeat.is_stalled() {
    ///     std::process::abort(); // and the supervisor starts the agent again
    /// }
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn is_stalled(&self) -> bool {
        let Some(running) = &self.running else { return false };
        running.get().map_or(true, |running| running.stats.read().is_stalled())
    }

    /// Says that a beat has ended, well or not, and that [`stats`](Self::stats) has it: for tests, and for whoever shows
    /// the stats. There is one place in the channel, so what is not received in time is folded into one.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// let beats = heartbeat.beats();
    /// beats.recv_timeout(Duration::from_secs(10))?;
    /// assert!(heartbeat.stats().beats >= 1);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "loopback")]
    pub fn beats(&self) -> Receiver<()> {
        let running = self.running.as_ref().and_then(|running| running.get().ok());
        running.map_or_else(crossbeam_channel::never, |running| running.thread.beats.clone())
    }

    /// Waits until all deltas that may be sent now have been accepted or rejected by the master; at the longest for
    /// `timeout` (a day at the most). Whether they have been. What is held back by an operation in flight is not waited for,
    /// nor is what is pushed meanwhile. A beat that waits for the end of a backoff is not sent any earlier. In a process that was
    /// forked after the start it is always false, at once.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::loopback::RowStatus;
    /// # use decnet_heartbeat::{LifecycleDelta, Operation};
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
    /// assert!(heartbeat.flush(Duration::from_secs(10)));
    /// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn flush(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout.min(limits::MAX_GRACE);
        let flush = |running: &OfProcess<Running>| {
            running.get().is_ok_and(|running| running.outbox.flush(until))
        };
        self.running.as_ref().is_none_or(flush)
    }

    /// Stops within `grace` (a day at the most): the deltas that wait now are posted once more, and that is interrupted when
    /// the grace runs out. It takes no longer than it must: with nothing to post, milliseconds. In a process that was forked
    /// after the start it stops nothing and counts nothing, at once: what waits is the parent's.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Instant;
    /// # use std::time::Duration;
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// let since = Instant::now();
    /// // A bound, and not a wait.
    /// let stopped = heartbeat.stop(Duration::from_secs(60));
    /// assert!(stopped.in_time && since.elapsed() < Duration::from_secs(30));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn stop(mut self, grace: Duration) -> Stopped {
        self.shut_down(grace)
    }

    fn shut_down(&mut self, grace: Duration) -> Stopped {
        let Some(running) = self.running.take().and_then(OfProcess::into_ours) else {
            return Stopped { undelivered: 0, operations: 0, kept: true, in_time: true };
        };
        let Running { thread, outbox, .. } = running;
        let HeartbeatThread { stop, ended, interrupt, .. } = thread;
        let grace = grace.min(limits::MAX_GRACE);
        // What an interrupt needs to take effect comes out of the grace, too.
        let slack = (grace / 4).min(limits::INTERRUPT_SLACK);
        let end = Instant::now() + grace;
        let last_call = end.checked_sub(slack).unwrap_or(end);
        // There is room: this is the only message ever sent.
        let _ = stop.try_send(last_call);
        let mut in_time = has_ended(&ended, last_call);
        if !in_time {
            interrupt.now();
            in_time = has_ended(&ended, end);
        }
        // It can post no more, so another heartbeat may deliver once this one's last acknowledgement is on the disk.
        let is_written = outbox.release(end.max(Instant::now() + limits::RELEASE));
        let OutboxStats { counts, on_disk, .. } = outbox.books();
        let kept = on_disk && is_written;
        Stopped { undelivered: counts.waiting, operations: counts.operations, kept, in_time }
    }
}

impl Drop for Heartbeat {
    /// Bounded by 2 s. What is undelivered stays in the outbox.
    fn drop(&mut self) {
        self.shut_down(limits::DROP_GRACE);
    }
}

fn has_ended(ended: &Receiver<()>, by: Instant) -> bool {
    ended.recv_deadline(by) == Err(RecvTimeoutError::Disconnected)
}

/// What a heartbeat is started with.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::{Heartbeat, MasterIdentity, OutboxLocation, Snapshot};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (dir, master, worker, _builder) = decnet_heartbeat::loopback::example()?;
/// let heartbeat = Heartbeat::builder()
///     .enrolment(worker.enrolment()?)
///     .status_source(|| Snapshot::new(&serde_json::json!({"deployed": false, "deckies": []})))
///     .agent_version("1.4.0")
///     .interval(Duration::from_secs(10))
///     .outbox(OutboxLocation::File(dir.path().join("outbox.db")))
///     .master_identity(MasterIdentity::Name)
///     .start()?;
/// assert!(master.wait_for_beats(1, SOON));
/// let beat = master.received()[0].json.clone().ok_or("no JSON")?;
/// assert_eq!(beat["agent_version"], "1.4.0");
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[derive(Default)]
pub struct HeartbeatBuilder {
    enrolment: Option<Enrolment>,
    source: Option<Box<dyn StatusSource>>,
    agent_version: Option<String>,
    interval: Option<Duration>,
    outbox: OutboxLocation,
    identity: Option<MasterIdentity>,
    ticks: Option<Receiver<Instant>>,
}

impl HeartbeatBuilder {
    /// Who this host is and where its master is. Default: [`Enrolment::from_env`].
    pub fn enrolment(mut self, enrolment: Enrolment) -> Self {
        self.enrolment = Some(enrolment);
        self
    }

    /// Where `status` and `topology` come from. Default: [`DecnetStatus`].
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::Snapshot;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let nothing = || Snapshot::new(&serde_json::json!({"deployed": false, "deckies": []}));
    /// let heartbeat = builder.status_source(nothing).start()?;
    /// assert!(master.wait_until(SOON, |seen| {
    ///     seen.received().iter().filter_map(|beat| beat.json.as_ref()).any(|beat| beat["status"]["deployed"] == false)
    /// }));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn status_source(mut self, source: impl StatusSource + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The agent's version, as the master shows it. Default: this crate's.
    pub fn agent_version(mut self, version: impl Into<String>) -> Self {
        self.agent_version = Some(version.into());
        self
    }

    /// The time between two beats, from 50 ms to 1 h. Default: 30 s.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = Some(interval);
        self
    }

    /// Where deltas are kept. Default: `heartbeat.db` in the agent dir.
    pub fn outbox(mut self, location: OutboxLocation) -> Self {
        self.outbox = location;
        self
    }

    /// Who counts as the master. Default: what the enrolment says, otherwise [`MasterIdentity::Name`].
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::MasterIdentity;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// // This one certificate, and no other of its CA.
    /// let pinned: MasterIdentity = format!("sha256:{}", master.certificate().fingerprint).parse()?;
    /// let heartbeat = builder.master_identity(pinned).start()?;
    /// assert!(master.wait_for_beats(1, SOON));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn master_identity(mut self, identity: MasterIdentity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Beats on these ticks instead of an interval's: for tests, which then need no clock.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Instant;
    /// # use std::time::Duration;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let (tick, ticks) = crossbeam_channel::unbounded();
    /// let heartbeat = builder.ticks(ticks).start()?;
    /// assert!(master.wait_for_beats(1, SOON)); // the first one asks for no tick
    /// tick.send(Instant::now())?;
    /// assert!(master.wait_for_beats(2, SOON));
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(any(test, feature = "loopback"))]
    pub fn ticks(mut self, ticks: Receiver<Instant>) -> Self {
        self.ticks = Some(ticks);
        self
    }

    /// Starts the three threads; the first beat goes out at once. It waits 5 s at the longest for the ini and the bundle, and 1 s
    /// for the outbox, without which it goes on until the disk answers. On a host that is not enrolled no thread is left, and it
    /// returns a dormant handle, so that callers need no guard.
    ///
    /// While the disk of a heartbeat that this process has stopped does not answer, another one on the same outbox starts and
    /// beats. It delivers from the first tick on after the other one's last acknowledgement is on the disk.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::Heartbeat;
    /// # let (_dir, _master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = builder.start()?;
    /// // Two would deliver every delta twice.
    /// let error = Heartbeat::builder().enrolment(worker.enrolment()?).start().unwrap_err();
    /// assert!(error.is_outbox());
    /// assert!(error.to_string().contains(&format!("process {} already", std::process::id())));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// A configured value or the bundle cannot be used or read in time (the error names the variable, key or file), or another
    /// heartbeat, here or in another process, delivers from the outbox (the error says which), or this process was forked from
    /// one in which a heartbeat, a sender or an operation was left, or the system refuses a thread. No thread is left then, unless it waits for a disk that does not answer.
    pub fn start(mut self) -> Result<Heartbeat, Error> {
        let enrolment = self.enrolment.take();
        self.start_as(move || enrolment.map_or_else(Enrolment::from_env, Ok))
    }

    fn start_as(
        self,
        enrolment: impl FnOnce() -> Result<Enrolment, Error> + Send + 'static,
    ) -> Result<Heartbeat, Error> {
        let interval = self.interval.unwrap_or(limits::INTERVAL);
        check_interval(interval)?;
        let stats = Arc::new(SharedStats::default());
        let (enrolment, location) = (Box::new(enrolment), self.outbox.absolute());
        let setup = start::Start {
            enrolment,
            identity: self.identity,
            location,
            stats: Arc::clone(&stats),
        };
        let Started { client, batches, access, problem } = match start::start(setup) {
            Ok(started) => started,
            Err(error) if error.is_not_enrolled() => {
                quietly(|| log::debug!("heartbeat dormant: error={:?}", chain(&error)));
                return Ok(Heartbeat { running: None });
            }
            Err(error) => return Err(error),
        };
        let agent_dir = access.enrolment.agent_dir().value().clone();
        let link = MasterLink::new(access);
        if let Some((what, problem)) = problem {
            let (names, problem) = (link.names(), chain(&problem));
            quietly(|| log::error!("{what}: {names} error={problem:?}"));
        }
        let source = self.source.unwrap_or_else(|| Box::new(DecnetStatus::new(&agent_dir)));
        let ticks = self
            .ticks
            .map_or_else(|| Ticks::every(interval, Instant::now(), fastrand::f64()), Ticks::fed);
        let agent_version =
            self.agent_version.unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned());
        let outbox = client;
        start(Setup { link, outbox, batches, source, stats, agent_version, interval, ticks })
    }
}

/// Refuses an interval that is out of bounds.
pub(crate) fn check_interval(interval: Duration) -> Result<(), Error> {
    if (limits::MIN_INTERVAL..=limits::MAX_INTERVAL).contains(&interval) {
        return Ok(());
    }
    Err(Error::setting("interval", format!("is {interval:?}; it must be from 50 ms to 1 h")))
}

fn start(setup: Setup) -> Result<Heartbeat, Error> {
    let (outbox, stats) = (Arc::clone(&setup.outbox), Arc::clone(&setup.stats));
    stats.change(|stats| setup.link.describe(stats));
    let place = outbox.path().map_or_else(|| "memory".to_owned(), sanitize_path);
    let waiting = outbox.books().counts.waiting;
    quietly(|| {
        let (names, fingerprint) = (setup.link.names(), setup.link.fingerprint());
        let interval = setup.interval;
        log::info!(
            "heartbeat starting: {names} fingerprint={fingerprint} interval={interval:?} outbox={place} waiting={waiting}"
        );
    });
    let thread = heartbeat::spawn(setup)?;
    Ok(Heartbeat { running: Some(OfProcess::new(Running { thread, outbox, stats })) })
}

/// A moment that has passed, by the clock that people read.
fn past(at: Instant) -> SystemTime {
    SystemTime::now() - at.elapsed()
}

impl fmt::Debug for HeartbeatBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeartbeatBuilder")
            .field("enrolment", &self.enrolment)
            .field("agent_version", &self.agent_version)
            .field("interval", &self.interval)
            .field("outbox", &self.outbox)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::delta::{LifecycleDelta, Outcome};

    #[test]
    fn a_host_that_is_not_enrolled_has_a_dormant_heartbeat_that_needs_no_guard() {
        let heartbeat =
            Heartbeat::builder().start_as(|| Err(Error::not_enrolled("no host uuid"))).unwrap();
        assert!(heartbeat.stats().dormant);
        let deltas = heartbeat.deltas();
        deltas.push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
        let error = deltas.push(LifecycleDelta::succeeded("", Operation::Deploy)).unwrap_err();
        assert_eq!(error.to_string(), "decky name: is empty; a delta needs the name of its decky");
        let nothing = Stopped { undelivered: 0, operations: 0, kept: true, in_time: true };
        assert_eq!(heartbeat.stop(Duration::ZERO), nothing);
    }

    #[test]
    fn a_dormant_heartbeat_does_the_work_and_reports_nothing() {
        let heartbeat =
            Heartbeat::builder().start_as(|| Err(Error::not_enrolled("no host uuid"))).unwrap();
        let mut operation = heartbeat.begin(Operation::Deploy, ["b", "a", "b"]).unwrap();
        assert_eq!(operation.open().collect::<Vec<_>>(), ["a", "b"]);
        operation.settle("a", Outcome::Succeeded).unwrap();
        let error = operation.settle("a", Outcome::Succeeded).unwrap_err();
        assert_eq!(error.to_string(), "decky name: \"a\" is not open in this deploy");
        operation.fail("nobody hears of it");
        heartbeat.begin(Operation::Mutate, ["d"]).unwrap().succeed();
        drop(heartbeat.begin(Operation::Mutate, ["d"]).unwrap());
        let error = heartbeat.begin(Operation::Mutate, [""]).unwrap_err();
        assert_eq!(error.to_string(), "decky name: is empty; a delta needs the name of its decky");
        let (done, works) = bounded(1);
        let work = move || done.send("worked");
        heartbeat.run(Operation::Deploy, ["d"], work).unwrap().join().unwrap();
        assert_eq!(works.recv(), Ok("worked"));
        let panics = || -> Result<(), Error> { panic!("on purpose") };
        heartbeat.run(Operation::Deploy, ["d"], panics).unwrap().join().unwrap();
        let stats = heartbeat.stats();
        assert_eq!((stats.waiting, stats.held, stats.operations, stats.outbox), (0, 0, 0, None));
        let nothing = Stopped { undelivered: 0, operations: 0, kept: true, in_time: true };
        assert_eq!(heartbeat.stop(Duration::ZERO), nothing);
    }

    #[test]
    fn an_enrolment_that_is_wrong_is_an_error_and_not_dormant() {
        let error = Heartbeat::builder()
            .start_as(|| Err(Error::config("DECNET_SWARMCTL_PORT", "is 0")))
            .unwrap_err();
        assert_eq!(error.to_string(), "DECNET_SWARMCTL_PORT: is 0");
    }

    #[test]
    fn an_interval_out_of_bounds_is_an_error() {
        for interval in [Duration::ZERO, Duration::from_millis(49), Duration::from_secs(3_601)] {
            let started =
                Heartbeat::builder().interval(interval).start_as(|| Err(Error::not_enrolled("")));
            let expected = format!("interval: is {interval:?}; it must be from 50 ms to 1 h");
            assert_eq!(started.unwrap_err().to_string(), expected);
        }
    }
}
