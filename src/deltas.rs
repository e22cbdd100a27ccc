//! The handle that pushes deltas and begins operations. It uses the outbox thread, and never waits
//! for the network. Runs on the agent's threads.

pub(crate) mod operation;
mod outbox_handle;

use std::error::Error as StdError;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::delta::{LifecycleDelta, Operation, check_decky};
use crate::error::Error;
use crate::forked::OfProcess;
use crate::outbox::{NewRows, SentBy};
use crate::panics::{caught, discard, quietly};
use crate::threads::outbox_client::OutboxClient;
use operation::{IntoDeckies, IntoOutcome, TrackedOperation, reason};
use outbox_handle::OutboxHandle;

/// Pushes deltas and begins operations. It can be cloned and sent to other threads.
///
/// A sender may outlive its heartbeat. A delta that is pushed after the stop is written to the
/// file, and the next heartbeat on that file sends it with its next beat. If the outbox is in
/// memory, a push after the stop is an error, because nothing would deliver the delta. The outbox
/// thread ends with the last sender and operation. In a process that was forked after the
/// heartbeat's start every call returns an error.
///
/// A [`StatusSource`](crate::StatusSource) may push, too. A delta that it pushes while it makes a
/// snapshot is sent with the next beat and does not cause one. A push on a thread that the source
/// starts causes a beat like any other push, and each beat asks the source again.
///
/// ```
/// use std::thread;
/// use decnet_heartbeat::{LifecycleDelta, Operation};
///
/// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// let threads = ["decky-01", "decky-02"].map(|decky| {
///     let deltas = heartbeat.deltas();
///     thread::spawn(move || deltas.push(LifecycleDelta::succeeded(decky, Operation::Mutate)))
/// });
/// for thread in threads {
///     thread.join().expect("the thread does not panic")?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct DeltaSender {
    outbox: OutboxHandle,
}

impl DeltaSender {
    pub(crate) fn new(outbox: OfProcess<Arc<OutboxClient>>) -> Self {
        Self { outbox: OutboxHandle::new(outbox) }
    }

    /// A sender for a host that is not enrolled. It drops every delta.
    pub(crate) fn dormant() -> Self {
        Self { outbox: OutboxHandle::dormant() }
    }

    /// Reports how an operation ended.
    ///
    /// Once this returns `Ok`, the delta is on the disk and stays there until the master has
    /// accepted it. This never waits for the network, and at most a second for the disk. If the
    /// file cannot be written (a full disk, a read-only file system), the delta is queued in
    /// memory; the log and [`Stats::outbox`](crate::Stats::outbox) report that. On a host that is
    /// not enrolled the delta is dropped.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// # let (mut master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.stop(); // an outage does not affect `push`
    /// let delta = LifecycleDelta::failed("decky-01", Operation::Deploy, "no such image");
    /// heartbeat.deltas().push(delta)?;
    /// assert_eq!(heartbeat.stats().waiting, 1);
    /// master.start_again()?;
    /// assert!(heartbeat.flush(Duration::from_secs(10)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - The name is not a valid name of a decky. Valid names consist of A-Z, a-z, 0-9, `_`, `.` and `-`, and
    ///   have at most 128 characters. Pushing again does not help.
    /// - The disk has not answered within a second. If [`Error::is_in_doubt`] is true, the delta is
    ///   sent when the disk answers, unless the process ends first, so do not push it again.
    ///   Otherwise nothing was queued, and the caller may push again.
    /// - This process was forked after the heartbeat's start. Nothing was queued.
    /// - The outbox cannot take the delta: another process has had it locked for a second,
    ///   operations in flight fill it, 1,024 requests are queued, or it is in memory and its
    ///   heartbeat has stopped. Nothing was queued, and the caller may push again.
    pub fn push(&self, delta: LifecycleDelta) -> Result<(), Error> {
        self.push_all([delta])
    }

    /// Reports several deltas in one transaction: either all are queued, or none. The last one is
    /// the newest.
    ///
    /// ```
    /// use decnet_heartbeat::{LifecycleDelta, Operation};
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let deltas =
    ///     ["decky-01", ""].map(|decky| LifecycleDelta::succeeded(decky, Operation::Deploy));
    /// let error = heartbeat.deltas().push_all(deltas).unwrap_err();
    /// assert_eq!(error.to_string(), "decky name: is empty; a delta needs the name of its decky");
    /// assert_eq!(heartbeat.stats().waiting, 0); // the first one was not queued either
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`push`](Self::push), and more deltas than the outbox holds (10,000).
    pub fn push_all(&self, deltas: impl IntoIterator<Item = LifecycleDelta>) -> Result<(), Error> {
        let deltas: Vec<_> = deltas.into_iter().collect();
        deltas.iter().try_for_each(LifecycleDelta::check)?;
        if self.outbox.is_dormant() {
            quietly(|| log::debug!("not enrolled, deltas dropped: deltas={}", deltas.len()));
            return Ok(());
        }
        self.outbox.check_process()?;
        if deltas.is_empty() {
            return Ok(());
        }
        self.outbox.add(NewRows::Deltas(deltas, SentBy::Deliverer)).map(drop)
    }

    /// Writes to the outbox that an operation is in flight, and returns the guard that reports how
    /// it ends.
    ///
    /// While the operation is in flight, older deltas of the same deckies and operation are held,
    /// because the master would close the row of this operation with them. If this process ends
    /// first, the next start reports the operation failed. A decky that is named twice counts once. On a
    /// host that is not enrolled nothing is written.
    ///
    /// ```
    /// use decnet_heartbeat::Operation;
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// match std::fs::read("/srv/compose.yml") {
    ///     Ok(_) => operation.succeed(),
    ///     Err(error) => operation.fail(error.to_string()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`push`](Self::push), and an empty list of deckies.
    pub fn begin<Kind>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
    ) -> Result<TrackedOperation, Error> {
        let mut deckies = deckies.into_deckies();
        deckies.sort_unstable();
        deckies.dedup();
        deckies.iter().try_for_each(|decky| check_decky(decky))?;
        // The guard holds them for as long as the operation is in flight.
        deckies.iter_mut().for_each(String::shrink_to_fit);
        if deckies.is_empty() {
            return Err(Error::setting(
                "deckies",
                "the list is empty; an operation needs at least one decky",
            ));
        }
        let rows = NewRows::Operation(operation, deckies.clone());
        let first = self.outbox.add(rows)?.unwrap_or_default();
        let open = deckies.into_iter().zip(first..);
        Ok(TrackedOperation::new(self.outbox.clone(), operation, open))
    }

    /// Runs `work` on a new thread and reports how it ended, so that the caller can return at once.
    ///
    /// An error is reported with its sources, and a panic with its message. Work that cannot fail
    /// returns `()`. The work continues if the heartbeat stops; its report is then sent by the next
    /// start.
    ///
    /// ```
    /// use std::time::Duration;
    /// use decnet_heartbeat::Operation;
    ///
    /// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// let deploy = || Err::<(), _>(std::io::Error::other("no space left"));
    /// heartbeat.run(Operation::Deploy, ["decky-01"], deploy)?;
    /// assert!(master.wait_until(Duration::from_secs(10), |seen| {
    ///     seen.rows()[0].error.as_deref() == Some("no space left")
    /// }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`begin`](Self::begin). If the system refuses a thread, the operation is
    /// reported failed, and that is an error, too.
    pub fn run<Kind, R: IntoOutcome>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<JoinHandle<()>, Error> {
        const NAME: &str = "decnet-operation";
        let tracked = self.begin(operation, deckies)?;
        let run = move || match caught(|| work().into_outcome()) {
            Ok(Ok(())) => tracked.succeed(),
            Ok(Err(error)) => match caught(|| reason_and_drop(error)) {
                Ok(reason) => tracked.fail(reason),
                Err(panic) => tracked.fail(format!(
                    "{operation} failed, and its error panicked when it was read: {panic}"
                )),
            },
            Err(panic) => tracked.fail(format!("{operation} panicked: {panic}")),
        };
        thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(run)
            .map_err(|source| Error::thread(NAME, source))
    }
}

/// Reads the reason before the error is dropped, because that drop may panic.
fn reason_and_drop(error: Box<dyn StdError + Send + Sync>) -> String {
    let reason = reason(error.as_ref());
    discard(error);
    reason
}
