//! What agents hold: it pushes deltas and begins operations, by way of the outbox thread. It never waits for the network.

pub(crate) mod operation;

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::delta::{LifecycleDelta, Operation, check_decky};
use crate::deltas::operation::{IntoDeckies, IntoOutcome, TrackedOperation, reason};
use crate::error::{Error, chain};
use crate::forked::OfProcess;
use crate::outbox::{NewRows, QueuedDelta, RowChange, SentBy};
use crate::panics::{caught, discard, quietly};
use crate::threads::outbox_client::OutboxClient;
use crate::threads::status::is_status_thread;

/// Pushes deltas and begins operations. Clone it, send it to other threads.
///
/// It may outlive its heartbeat. What it pushes after the stop is kept in the file as before, and the next heartbeat on that
/// file sends it with its next beat; nothing wakes that one. If the outbox is in memory, a push after the stop is an error,
/// since nobody would deliver it. The outbox thread ends with the last sender and operation. In a process that was forked after the
/// heartbeat's start every call returns an error.
///
/// A [`StatusSource`](crate::StatusSource) may push, too. What it pushes while it is asked for a snapshot is sent with the next
/// beat, and does not ask for one. A thread that the source starts counts as any other: each push there makes a beat, which asks
/// the source again.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::thread;
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::RowStatus;
/// # use decnet_heartbeat::{LifecycleDelta, Operation};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// # for decky in ["decky-01", "decky-02"] {
/// #     master.open_operation(&worker.uuid, decky, "mutate");
/// # }
/// // Every thread that does something has its own.
/// let threads = ["decky-01", "decky-02"].map(|decky| {
///     let deltas = heartbeat.deltas();
///     thread::spawn(move || deltas.push(LifecycleDelta::succeeded(decky, Operation::Mutate)))
/// });
/// for thread in threads {
///     thread.join().expect("it does not panic")?;
/// }
/// assert!(master.wait_until(SOON, |seen| seen.rows().iter().all(|row| row.status == RowStatus::Succeeded)));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[derive(Clone, Debug)]
pub struct DeltaSender {
    /// `None`: dormant.
    outbox: Option<OfProcess<Arc<OutboxClient>>>,
}

impl DeltaSender {
    pub(crate) fn new(outbox: OfProcess<Arc<OutboxClient>>) -> Self {
        Self { outbox: Some(outbox) }
    }

    /// For a host that is not enrolled: there is no master to tell.
    pub(crate) fn dormant() -> Self {
        Self { outbox: None }
    }

    /// Reports how an operation ended.
    ///
    /// Once this returns `Ok` the delta is on the disk, and stays there until the master has accepted it. It never
    /// waits for the network, and for the disk a second at most. Where the file cannot be written (a full disk, a
    /// read-only file system) it is kept in memory, which the log and [`Stats::outbox`](crate::Stats::outbox) say. On
    /// a host that is not enrolled there is no master to tell, and the delta is dropped.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::{LifecycleDelta, Operation};
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, mut master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let builder = builder.interval(Duration::from_millis(50));
    /// # let heartbeat = builder.start()?;
    /// # master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// master.stop(); // an outage: `push` does not even notice
    /// heartbeat.deltas().push(LifecycleDelta::failed("decky-01", Operation::Deploy, "no such image"))?;
    /// assert_eq!(heartbeat.stats().waiting, 1);
    /// master.start_again()?;
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[0].error.as_deref() == Some("no such image")));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// - No decky can have this name. DECNET's names are made of A-Z, a-z, 0-9, `_`, `.` and `-`, and have at most 128
    ///   characters. Trying again does not help.
    /// - The disk has not answered within a second. If [`Error::is_in_doubt`] the delta will be sent when it answers, unless the
    ///   process ends first, so it must not be pushed again. Otherwise nothing was kept, and the caller may try again.
    /// - This process was forked after the heartbeat's start. Nothing was kept.
    /// - The outbox cannot keep the delta: another process has it locked for a second, operations in flight fill it, 1,024
    ///   requests wait already, or it is in memory and its heartbeat has stopped. Nothing was kept; the caller may try again.
    pub fn push(&self, delta: LifecycleDelta) -> Result<(), Error> {
        self.push_all([delta])
    }

    /// Reports several at once, in one transaction: all of them are kept, or none. The last is the newest.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::{LifecycleDelta, Operation};
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// let ended = ["decky-01", ""].map(|decky| LifecycleDelta::succeeded(decky, Operation::Deploy));
    /// let error = heartbeat.deltas().push_all(ended).unwrap_err();
    /// assert_eq!(error.to_string(), "decky name: is empty; a delta needs the name of its decky");
    /// assert_eq!(heartbeat.stats().waiting, 0); // nor is the first one kept
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and when they are more than the outbox holds: 10,000.
    pub fn push_all(&self, deltas: impl IntoIterator<Item = LifecycleDelta>) -> Result<(), Error> {
        let deltas: Vec<_> = deltas.into_iter().collect();
        deltas.iter().try_for_each(LifecycleDelta::check)?;
        let Some(outbox) = &self.outbox else {
            quietly(|| log::debug!("not enrolled, deltas dropped: deltas={}", deltas.len()));
            return Ok(());
        };
        let outbox = outbox.get()?;
        if deltas.is_empty() {
            return Ok(());
        }
        outbox.add(NewRows::Deltas(deltas, SentBy::Deliverer), !is_status_thread()).map(drop)
    }

    /// Writes an operation down as in flight, and returns the guard that says how it ends.
    ///
    /// Until then, older deltas of the same deckies and operation are held back: the master would take them for this
    /// operation's. If this process dies first, the next start reports it failed. Of a decky that is named twice there
    /// is one operation. On a host that is not enrolled nothing is written.
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
    /// # fn compose_up() -> Result<(), std::io::Error> { Ok(()) }
    /// # for decky in ["decky-01", "decky-02"] {
    /// #     master.open_operation(&worker.uuid, decky, "deploy");
    /// # }
    /// let operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// match compose_up() {
    ///     Ok(()) => operation.succeed(),
    ///     Err(error) => operation.fail(error.to_string()),
    /// }
    /// assert!(master.wait_until(SOON, |seen| seen.rows().iter().all(|row| row.status == RowStatus::Succeeded)));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push), and when no decky is named.
    pub fn begin<Kind>(
        &self,
        operation: Operation,
        deckies: impl IntoDeckies<Kind>,
    ) -> Result<TrackedOperation, Error> {
        let deckies: BTreeSet<String> = deckies.into_deckies().into_iter().collect();
        deckies.iter().try_for_each(|decky| check_decky(decky))?;
        let mut deckies: Vec<String> = deckies.into_iter().collect();
        // They are kept as long as the operation is in flight.
        deckies.iter_mut().for_each(String::shrink_to_fit);
        if deckies.is_empty() {
            return Err(Error::setting(
                "deckies",
                "are none; an operation needs the name of a decky",
            ));
        }
        let first = match &self.outbox {
            Some(outbox) => {
                outbox.get()?.add(NewRows::Operation(operation, deckies.clone()), false)?
            }
            None => 0,
        };
        Ok(TrackedOperation::new(self.clone(), operation, deckies.into_iter().zip(first..)))
    }

    /// Does `work` on a thread of its own and reports how it ended, so that the caller can answer at once. An error is
    /// reported with its sources, a panic with its message. Work that cannot fail returns `()`. It goes on when the heartbeat
    /// stops, and its report waits for the next start.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// # use decnet_heartbeat::Operation;
    /// # const SOON: Duration = Duration::from_secs(10);
    /// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// # fn compose_up() -> Result<(), std::io::Error> { Err(std::io::Error::other("no space left")) }
    /// # master.open_operation(&worker.uuid, "decky-01", "deploy");
    /// heartbeat.run(Operation::Deploy, ["decky-01"], compose_up)?;
    /// // And to whoever asked: 202 Accepted. The master hears the rest of it later.
    /// assert!(master.wait_until(SOON, |seen| seen.rows()[0].error.as_deref() == Some("no space left")));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin), and when the system refuses a thread; the operation is then reported failed.
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
                Err(said) => tracked.fail(format!(
                    "{operation} failed, and its error panicked when it was read: {said}"
                )),
            },
            Err(said) => tracked.fail(format!("{operation} panicked: {said}")),
        };
        thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(run)
            .map_err(|source| Error::thread(NAME, source))
    }

    /// # Errors
    ///
    /// This process was forked from the one that the sender belongs to.
    pub(crate) fn check_process(&self) -> Result<(), Error> {
        self.outbox.as_ref().map_or(Ok(()), |outbox| outbox.get().map(drop))
    }

    /// Operations have ended; their rows are in the outbox since they began.
    pub(crate) fn end(&self, ended: Vec<QueuedDelta>) {
        // In a child there is nobody to hear of it, and no lock of a logger is touched.
        let Some(Ok(outbox)) =
            self.outbox.as_ref().filter(|_| !ended.is_empty()).map(OfProcess::get)
        else {
            return;
        };
        // The guard may be dropped by a panic, and a second one, of the logger, would end the process.
        if let Err(error) =
            outbox.change(RowChange::Ended(ended, SentBy::Deliverer), !is_status_thread())
        {
            let error = chain(&error);
            quietly(|| {
                log::error!(
                    "how an operation ended is not on the disk yet, a restart would report it failed: error={error:?}"
                );
            });
        }
    }
}

/// The error's own drop may panic, and its reason is known by then.
fn reason_and_drop(error: Box<dyn StdError + Send + Sync>) -> String {
    let reason = reason(error.as_ref());
    discard(error);
    reason
}
