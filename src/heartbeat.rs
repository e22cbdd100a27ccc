//! The handle of a heartbeat, and its builder. Runs on the caller's threads.

#[cfg(feature = "cli")]
pub(crate) mod prepared;

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::credentials::current::CurrentCredentials;
use crate::credentials::enrolment::Enrolment;
use crate::delta::{Operation, from_micros};
use crate::deltas::DeltaSender;
use crate::deltas::operation::{IntoDeckies, IntoOutcome, TrackedOperation};
use crate::error::{Error, chain, sanitize_path};
use crate::forked::OfProcess;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::outbox::{OutboxLocation, OutboxStats, Role};
use crate::panics::quietly;
use crate::stats::{SharedStats, Stats};
use crate::status::StatusSource;
use crate::status::decnet::DecnetStatus;
use crate::threads::heartbeat::{self, HeartbeatThread, Setup};
use crate::threads::outbox_client::OutboxClient;
use crate::threads::schedule::Ticks;
use crate::threads::start::{self, Started};

/// A running heartbeat, or a dormant one if the host is not enrolled.
///
/// It runs on three threads: `decnet-heartbeat`, `decnet-status` and `decnet-outbox`. The outbox
/// thread ends with the last [`DeltaSender`] or [`TrackedOperation`]. While it delivers from a
/// file, a small fourth thread, `decnet-wake`, waits for other processes that add deltas. See
/// [`design`](crate::design).
///
/// Dropping the heartbeat stops it with a grace period of 2 s. [`stop`](Self::stop) takes the grace
/// period as an argument.
///
/// A heartbeat belongs to the process that started it. In a process that was forked later it does
/// nothing: methods that return a `Result` return an error, and dropping it does not affect the
/// parent's heartbeat, locks and rows.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// let heartbeat = builder.start()?; // sends the first beat at once
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let stopped = heartbeat.stop(Duration::from_secs(5)); // sends the queued deltas
/// assert_eq!(stopped.undelivered, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Heartbeat {
    /// `None`: dormant.
    running: Option<OfProcess<HeartbeatThread>>,
}

/// How a heartbeat stopped.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// # let (mut master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// master.stop(); // an outage
/// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
/// let stopped = heartbeat.stop(Duration::from_secs(5));
/// assert_eq!(stopped.undelivered, 1);
/// assert!(stopped.durable); // it is on the disk, and the next start sends it
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stopped {
    /// Deltas that the master has not accepted.
    pub undelivered: u64,
    /// Operations in flight, counted once for each decky. The next start reports how each of them
    /// ended. Those that the end of the process interrupts are reported failed.
    pub operations: u64,
    /// All of these deltas and operations are on the disk, and the next start delivers them.
    /// `false`: they are in memory and are lost with the process, or the disk has not answered in
    /// time.
    pub durable: bool,
    /// The heartbeat thread ended within the grace period. `false`: it is in a call that cannot be
    /// interrupted, and ends when that call returns.
    pub in_time: bool,
}

impl Heartbeat {
    /// Returns a builder. Every setting has a default: see [`HeartbeatBuilder`].
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Heartbeat;
    ///
    /// let error = Heartbeat::builder().interval(Duration::from_millis(1)).start().unwrap_err();
    /// assert_eq!(error.to_string(), "interval: is 1ms; it must be from 50 ms to 1 h");
    /// ```
    pub fn builder() -> HeartbeatBuilder {
        HeartbeatBuilder::default()
    }

    /// Returns a handle that pushes deltas. It can be cloned, sent to other threads, and outlive
    /// the heartbeat.
    ///
    /// ```
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let deltas = heartbeat.deltas();
    /// let delta = LifecycleDelta::succeeded("decky-01", Operation::Deploy);
    /// let worker = std::thread::spawn(move || deltas.push(delta));
    /// worker.join().expect("the thread does not panic")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn deltas(&self) -> DeltaSender {
        let Some(running) = &self.running else { return DeltaSender::dormant() };
        DeltaSender::new(running.map(|running| Arc::clone(&running.outbox)))
    }

    /// Begins a tracked operation on `deckies`: see [`DeltaSender::begin`].
    ///
    /// ```
    /// use decnet_heartbeat::{Heartbeat, Operation};
    ///
    /// fn deploy(heartbeat: &Heartbeat) -> Result<(), Box<dyn std::error::Error>> {
    ///     let operation = heartbeat.begin(Operation::Deploy, ["decky-01"])?;
    ///     let port: u16 = "none".parse()?; // an early return: the guard reports the failure
    ///     println!("listening on {port}");
    ///     operation.succeed();
    ///     Ok(())
    /// }
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// assert!(deploy(&heartbeat).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`DeltaSender::begin`].
    pub fn begin<Kind>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
    ) -> Result<TrackedOperation, Error> {
        self.deltas().begin(operation, deckies)
    }

    /// Runs `work` on a new thread and reports how it ended: see [`DeltaSender::run`].
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Operation;
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.open_operation(&worker.uuid, "decky-01", "mutate");
    /// let work = || -> Result<(), std::io::Error> { panic!("no address left") };
    /// let thread = heartbeat.run(Operation::Mutate, ["decky-01"], work)?;
    /// thread.join().expect("the panic is caught and reported");
    /// assert!(heartbeat.flush(Duration::from_secs(10)));
    /// assert_eq!(master.rows()[0].error.as_deref(), Some("mutate panicked: no address left"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`DeltaSender::run`].
    pub fn run<Kind, R: IntoOutcome>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<JoinHandle<()>, Error> {
        self.deltas().run(operation, deckies, work)
    }

    /// Returns the state and the counters of the heartbeat. Never blocks on the network or the
    /// disk. In a process that was forked after the start only
    /// [`ended_thread`](Stats::ended_thread) is set, because its threads do not run there.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (_master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// heartbeat.beats().recv_timeout(Duration::from_secs(10))?; // a beat has ended
    /// let stats = heartbeat.stats();
    /// assert!(stats.beats >= 1 && stats.failure.is_none());
    /// assert_eq!(stats.waiting, 0);
    /// assert_eq!(stats.fingerprint, Some(worker.fingerprint)); // of the pinned certificate
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stats(&self) -> Stats {
        let Some(running) = &self.running else {
            return Stats { dormant: true, ..Stats::default() };
        };
        let Ok(running) = running.get() else {
            return Stats { ended_thread: Some(heartbeat::NAME), ..Stats::default() };
        };
        combined_stats(&running.outbox, &running.stats)
    }

    /// Whether a thread makes no progress, so that only a restart of the agent helps. This is for
    /// a watchdog. It is true if
    ///
    /// - the heartbeat thread has been busy with one event for over a minute,
    /// - the status source has not answered for over a minute,
    /// - a thread has ended, or
    /// - this process was forked after the start.
    ///
    /// While the source does not answer, beats are sent without a status, so the master does not
    /// receive the states of this host. A disk that does not answer does not count as a stall:
    /// beats are sent without deltas until it does, see [`Stats::outbox_busy_since`].
    ///
    /// ```
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// // In the loop that resets the watchdog:
    /// if heartbeat.is_stalled() {
    ///     std::process::abort(); // the supervisor restarts the agent
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_stalled(&self) -> bool {
        let Some(running) = &self.running else { return false };
        running.get().map_or(true, |running| running.stats.read().is_stalled())
    }

    /// Returns a channel that receives a message after each beat, accepted or failed, when
    /// [`stats`](Self::stats) includes it. This is for tests, and for programs that display the
    /// stats. The channel holds one message: while it is full, further beats add none.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// heartbeat.beats().recv_timeout(Duration::from_secs(10))?;
    /// assert!(heartbeat.stats().beats >= 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(feature = "loopback")]
    pub fn beats(&self) -> Receiver<()> {
        let running = self.running.as_ref().and_then(|running| running.get().ok());
        running.map_or_else(crossbeam_channel::never, |running| running.beats.clone())
    }

    /// Waits up to `timeout` (at most a day) until the master has accepted or rejected all deltas
    /// that may be sent now. Returns whether it has.
    ///
    /// This does not wait for deltas that are held, nor for deltas
    /// that are pushed during the call. It does not shorten a backoff. In a process that was forked
    /// after the start it returns `false` at once.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy))?;
    /// assert!(heartbeat.flush(Duration::from_secs(10)));
    /// assert_eq!(heartbeat.stats().delivered, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn flush(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout.min(limits::MAX_GRACE);
        let flush = |running: &OfProcess<HeartbeatThread>| {
            running.get().is_ok_and(|running| running.outbox.flush(until))
        };
        self.running.as_ref().is_none_or(flush)
    }

    /// Stops the heartbeat within `grace` (at most a day). The queued deltas are sent once more; the
    /// POST is interrupted when the grace period ends. If no delta is queued, a stop takes
    /// milliseconds.
    ///
    /// In a process that was forked after the start it returns at once and stops nothing, because
    /// the heartbeat belongs to the parent.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let since = Instant::now();
    /// let stopped = heartbeat.stop(Duration::from_secs(60));
    /// assert!(stopped.in_time && since.elapsed() < Duration::from_secs(30));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, grace: Duration) -> Stopped {
        self.shut_down(grace)
    }

    fn shut_down(&mut self, grace: Duration) -> Stopped {
        let Some(running) = self.running.take().and_then(OfProcess::into_ours) else {
            return Stopped { undelivered: 0, operations: 0, durable: true, in_time: true };
        };
        let HeartbeatThread { stop, ended, interrupt, outbox, .. } = running;
        let grace = grace.min(limits::MAX_GRACE);
        // The time that an interrupt takes is part of the grace period.
        let slack = (grace / 4).min(limits::INTERRUPT_SLACK);
        let end = Instant::now() + grace;
        let interrupt_at = end.checked_sub(slack).unwrap_or(end);
        // The channel has room: this is the only message that is ever sent.
        let _ = stop.try_send(interrupt_at);
        let mut in_time = has_ended(&ended, interrupt_at);
        if !in_time {
            interrupt.now();
            in_time = has_ended(&ended, end);
        }
        // No further POST is possible. Another heartbeat may deliver once the last acknowledgement
        // is on the disk.
        let is_written = outbox.release(end.max(Instant::now() + limits::RELEASE));
        let OutboxStats { counts, on_disk, .. } = outbox.stats();
        Stopped {
            undelivered: counts.waiting,
            operations: counts.operations,
            durable: on_disk && is_written,
            in_time,
        }
    }
}

impl Drop for Heartbeat {
    /// Stops the heartbeat with a grace period of 2 s. Undelivered deltas stay in the outbox.
    fn drop(&mut self) {
        self.shut_down(limits::DROP_GRACE);
    }
}

/// The stats of the heartbeat thread and of the outbox.
fn combined_stats(outbox: &OutboxClient, stats: &SharedStats) -> Stats {
    let OutboxStats { counts, dropped, .. } = outbox.stats();
    Stats {
        waiting: counts.waiting,
        held: counts.held,
        operations: counts.operations,
        oldest_waiting: counts.oldest.map(from_micros),
        dropped,
        outbox: outbox.path().map(Into::into),
        outbox_busy_since: outbox.busy_since().map(to_system_time),
        ..stats.read()
    }
}

fn has_ended(ended: &Receiver<()>, by: Instant) -> bool {
    ended.recv_deadline(by) == Err(RecvTimeoutError::Disconnected)
}

/// The settings of a heartbeat.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::{Heartbeat, MasterIdentity, OutboxLocation, Snapshot};
///
/// # let (dir, _master, worker, _builder) = decnet_heartbeat::loopback::example()?;
/// let heartbeat = Heartbeat::builder()
///     .enrolment(worker.enrolment()?)
///     .status_source(|| Snapshot::new(&serde_json::json!({"deployed": false, "deckies": []})))
///     .agent_version("1.4.0")
///     .interval(Duration::from_secs(10))
///     .outbox(OutboxLocation::File(dir.path().join("outbox.db")))
///     .master_identity(MasterIdentity::Name)
///     .start()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
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
    /// The identity of this host and the address of its master. Default: [`Enrolment::from_env`].
    pub fn enrolment(mut self, enrolment: Enrolment) -> Self {
        self.enrolment = Some(enrolment);
        self
    }

    /// The source of `status` and `topology`. Default: [`DecnetStatus`].
    ///
    /// ```
    /// use decnet_heartbeat::Snapshot;
    ///
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let nothing_deployed = serde_json::json!({"deployed": false, "deckies": []});
    /// let heartbeat = builder.status_source(move || Snapshot::new(&nothing_deployed)).start()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn status_source(mut self, source: impl StatusSource + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The agent's version, which the master displays. Default: the version of this crate.
    pub fn agent_version(mut self, version: impl Into<String>) -> Self {
        self.agent_version = Some(version.into());
        self
    }

    /// The time between two beats, from 50 ms to 1 h. Default: 30 s.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = Some(interval);
        self
    }

    /// Where deltas are queued. Default: `heartbeat.db` in the agent dir.
    pub fn outbox(mut self, location: OutboxLocation) -> Self {
        self.outbox = location;
        self
    }

    /// The rule for the master's certificate. Default: the rule of the enrolment, otherwise
    /// [`MasterIdentity::Name`].
    ///
    /// ```
    /// use decnet_heartbeat::MasterIdentity;
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// // Accepts only this certificate, and no other one of its CA.
    /// let fingerprint = &master.certificate().fingerprint;
    /// let pinned: MasterIdentity = format!("sha256:{fingerprint}").parse()?;
    /// let heartbeat = builder.master_identity(pinned).start()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn master_identity(mut self, identity: MasterIdentity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Sends a beat for each message of this channel instead of one every interval, so that tests
    /// do not depend on the clock.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    ///
    /// # let (_dir, master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let (tick, ticks) = crossbeam_channel::unbounded();
    /// let heartbeat = builder.ticks(ticks).start()?;
    /// assert!(master.wait_for_beats(1, Duration::from_secs(10))); // the first needs no tick
    /// tick.send(Instant::now())?;
    /// assert!(master.wait_for_beats(2, Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(any(test, feature = "loopback"))]
    pub fn ticks(mut self, ticks: Receiver<Instant>) -> Self {
        self.ticks = Some(ticks);
        self
    }

    /// Starts the three threads, and sends the first beat at once.
    ///
    /// This waits up to 5 s for the ini and the bundle, and up to 1 s for the outbox. If the disk
    /// of the outbox has not answered by then, the heartbeat starts without deltas and sends them
    /// once it answers. On a host that is not enrolled, `start` returns a dormant handle and leaves
    /// no thread, so callers need no special case.
    ///
    /// A process may start a heartbeat on an outbox whose previous heartbeat it has stopped while
    /// the disk does not answer. The new one beats at once, and delivers from the first tick after
    /// the last acknowledgement of the old one is on the disk.
    ///
    /// ```
    /// use decnet_heartbeat::Heartbeat;
    ///
    /// # let (_dir, _master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// let heartbeat = builder.start()?;
    /// // Two heartbeats on one outbox would deliver every delta twice.
    /// let error = Heartbeat::builder().enrolment(worker.enrolment()?).start().unwrap_err();
    /// assert!(error.is_outbox());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - A configured value or the bundle cannot be used, or cannot be read in time. The error
    ///   names the variable, the key or the file.
    /// - Another heartbeat, in this process or another one, delivers from the outbox. The error
    ///   names the process.
    /// - This process was forked from a process that had a heartbeat, a sender or an operation.
    /// - The system refuses a thread.
    ///
    /// No thread is left then, except one that waits for a disk that does not answer.
    pub fn start(mut self) -> Result<Heartbeat, Error> {
        let enrolment = self.enrolment.take();
        self.start_as(move || enrolment.map_or_else(Enrolment::from_env, Ok))
    }

    fn start_as(
        self,
        enrolment: impl FnOnce() -> Result<Enrolment, Error> + Send + 'static,
    ) -> Result<Heartbeat, Error> {
        let setup = self.prepare(Role::Deliver, enrolment)?;
        setup.map_or(Ok(Heartbeat { running: None }), start)
    }

    /// Starts the outbox thread. `None`: the host is not enrolled.
    fn prepare(
        self,
        role: Role,
        enrolment: impl FnOnce() -> Result<Enrolment, Error> + Send + 'static,
    ) -> Result<Option<Setup>, Error> {
        let interval = self.interval.unwrap_or(limits::INTERVAL);
        check_interval(interval)?;
        let stats = Arc::new(SharedStats::default());
        let location = self.outbox.absolute();
        let started = start::start(enrolment, self.identity, location, role, &stats);
        let Started { client, batches, credentials, problem } = match started {
            Ok(started) => started,
            Err(error) if error.is_not_enrolled() => {
                quietly(|| log::debug!("heartbeat dormant: error={:?}", chain(&error)));
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let agent_dir = credentials.enrolment.agent_dir().value().clone();
        let credentials = CurrentCredentials::new(credentials);
        if let Some((what, error)) = problem {
            quietly(|| log::error!("{what}: {} error={:?}", credentials.names(), chain(&error)));
        }
        Ok(Some(Setup {
            credentials,
            outbox: client,
            batches,
            source: self.source.unwrap_or_else(|| Box::new(DecnetStatus::new(&agent_dir))),
            stats,
            agent_version: self
                .agent_version
                .unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned()),
            interval,
            ticks: self.ticks.map_or_else(
                || Ticks::every(interval, Instant::now(), fastrand::f64()),
                Ticks::from_channel,
            ),
        }))
    }
}

/// Checks that an interval is from 50 ms to 1 h.
pub(crate) fn check_interval(interval: Duration) -> Result<(), Error> {
    if (limits::MIN_INTERVAL..=limits::MAX_INTERVAL).contains(&interval) {
        return Ok(());
    }
    Err(Error::setting("interval", format!("is {interval:?}; it must be from 50 ms to 1 h")))
}

fn start(setup: Setup) -> Result<Heartbeat, Error> {
    let outbox = &setup.outbox;
    setup.stats.change(|stats| setup.credentials.describe(stats));
    quietly(|| {
        log::info!(
            "heartbeat starting: {} fingerprint={} interval={:?} outbox={} waiting={}",
            setup.credentials.names(),
            setup.credentials.fingerprint(),
            setup.interval,
            outbox.path().map_or_else(|| "memory".to_owned(), sanitize_path),
            outbox.stats().counts.waiting,
        );
    });
    Ok(Heartbeat { running: Some(OfProcess::new(heartbeat::spawn(setup)?)) })
}

/// Converts a time in the past to the system's clock.
fn to_system_time(at: Instant) -> SystemTime {
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
    fn unenrolled_host_gets_a_dormant_heartbeat() {
        let heartbeat =
            Heartbeat::builder().start_as(|| Err(Error::not_enrolled("no host uuid"))).unwrap();
        assert!(heartbeat.stats().dormant);
        let deltas = heartbeat.deltas();
        deltas.push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
        let error = deltas.push(LifecycleDelta::succeeded("", Operation::Deploy)).unwrap_err();
        assert_eq!(error.to_string(), "decky name: is empty; a delta needs the name of its decky");
        let expected = Stopped { undelivered: 0, operations: 0, durable: true, in_time: true };
        assert_eq!(heartbeat.stop(Duration::ZERO), expected);
    }

    #[test]
    fn dormant_heartbeat_does_the_work_and_reports_nothing() {
        let heartbeat =
            Heartbeat::builder().start_as(|| Err(Error::not_enrolled("no host uuid"))).unwrap();
        let mut operation = heartbeat.begin(Operation::Deploy, ["b", "a", "b"]).unwrap();
        assert_eq!(operation.open().collect::<Vec<_>>(), ["a", "b"]);
        operation.end("a", Outcome::Succeeded).unwrap();
        let error = operation.end("a", Outcome::Succeeded).unwrap_err();
        assert_eq!(error.to_string(), "decky name: \"a\" is not open in this deploy");
        operation.fail("not reported");
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
        let expected = Stopped { undelivered: 0, operations: 0, durable: true, in_time: true };
        assert_eq!(heartbeat.stop(Duration::ZERO), expected);
    }

    #[test]
    fn invalid_enrolment_is_an_error() {
        let error = Heartbeat::builder()
            .start_as(|| Err(Error::config("DECNET_SWARMCTL_PORT", "is 0")))
            .unwrap_err();
        assert_eq!(error.to_string(), "DECNET_SWARMCTL_PORT: is 0");
    }

    #[test]
    fn interval_out_of_bounds_is_an_error() {
        for interval in [Duration::ZERO, Duration::from_millis(49), Duration::from_secs(3_601)] {
            let started =
                Heartbeat::builder().interval(interval).start_as(|| Err(Error::not_enrolled("")));
            let expected = format!("interval: is {interval:?}; it must be from 50 ms to 1 h");
            assert_eq!(started.unwrap_err().to_string(), expected);
        }
    }
}
