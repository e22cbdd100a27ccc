//! Tracked operations. An operation is in the outbox as in flight from the moment it begins, so
//! that it ends in exactly one report, however it ends. Runs on the thread that has the guard.

use std::error::Error as StdError;
use std::sync::Arc;
use std::thread;

use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::error::{Error, chain};
use crate::forked::OfProcess;
use crate::limits;
use crate::outbox::{QueuedDelta, RowChange, SentBy};
use crate::panics::quietly;
use crate::text::{cut, layers, sanitize};
use crate::threads::outbox_client::OutboxClient;

/// The names of one or more deckies. See [`DeltaSender::begin`](crate::DeltaSender::begin).
///
/// The compiler infers `Kind`.
///
/// ```
/// use decnet_heartbeat::Operation;
///
/// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// heartbeat.begin(Operation::Deploy, "decky-01")?.succeed();
/// heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?.succeed();
/// heartbeat.begin(Operation::Deploy, (1..=2).map(|n| format!("decky-{n:02}")))?.succeed();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is neither the name of a decky nor a list of names",
    label = "expected a name or a list of names",
    note = "write a name, `\"decky-01\"`, or a list, `[\"decky-01\", \"decky-02\"]`"
)]
pub trait IntoDeckies<Kind>: kind::Sealed<Kind> {
    #[doc(hidden)]
    fn into_deckies(self) -> Vec<String>;
}

/// What the work of an operation returns: `()`, or a `Result<(), E>` whose error is the reason of
/// the failure. See [`DeltaSender::run`](crate::DeltaSender::run).
///
/// ```
/// use decnet_heartbeat::Operation;
///
/// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// heartbeat.run(Operation::Deploy, "decky-01", || println!("cannot fail"))?;
/// heartbeat.run(Operation::Deploy, "decky-02", || std::fs::create_dir_all("/tmp"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not the outcome of an operation",
    label = "this work must return `()` or a `Result<(), E>`",
    note = "end the work with `;` if it cannot fail, or with `.map(drop)` if it returns a `Result` with a value"
)]
pub trait IntoOutcome: kind::Sealed<kind::Work> {
    #[doc(hidden)]
    fn into_outcome(self) -> Result<(), Box<dyn StdError + Send + Sync>>;
}

/// Seals both traits, so that methods can be added later.
mod kind {
    use std::error::Error as StdError;

    pub trait Sealed<Kind> {}

    /// A single name.
    #[derive(Debug)]
    pub struct One;

    /// An iterator of names.
    #[derive(Debug)]
    pub struct Many;

    #[derive(Debug)]
    pub struct Work;

    impl<T: Into<String>> Sealed<One> for T {}
    impl<I: IntoIterator<Item: AsRef<str>>> Sealed<Many> for I {}
    impl Sealed<Work> for () {}
    impl<E: Into<Box<dyn StdError + Send + Sync>>> Sealed<Work> for Result<(), E> {}
}

impl<T: Into<String>> IntoDeckies<kind::One> for T {
    fn into_deckies(self) -> Vec<String> {
        vec![self.into()]
    }
}

impl<I: IntoIterator<Item: AsRef<str>>> IntoDeckies<kind::Many> for I {
    fn into_deckies(self) -> Vec<String> {
        self.into_iter().map(|decky| decky.as_ref().to_owned()).collect()
    }
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Result<(), Box<dyn StdError + Send + Sync>> {
        Ok(())
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync>>> IntoOutcome for Result<(), E> {
    fn into_outcome(self) -> Result<(), Box<dyn StdError + Send + Sync>> {
        self.map_err(Into::into)
    }
}

/// An operation in flight on one or more deckies, from
/// [`DeltaSender::begin`](crate::DeltaSender::begin).
///
/// It ends with [`succeed`](Self::succeed) or [`fail`](Self::fail) on all deckies, or with
/// [`end`](Self::end) on one after the other. If it is dropped (a panic, an early return), it is
/// reported failed on the deckies that are still open. None of these calls waits for the network,
/// and each waits at most a second for the disk. If the outbox cannot be written, the end is written
/// with the next change.
///
/// In a process that was forked after the operation began, the guard reports nothing. The operation
/// belongs to the parent.
///
/// ```
/// use std::time::Duration;
/// use decnet_heartbeat::{Operation, Outcome};
///
/// # let (master, worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
/// master.open_operation(&worker.uuid, "decky-01", "deploy");
/// master.open_operation(&worker.uuid, "decky-02", "deploy");
/// let mut operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
/// operation.end("decky-01", Outcome::Succeeded)?;
/// assert_eq!(operation.open().collect::<Vec<_>>(), ["decky-02"]);
/// operation.fail("no such image"); // on decky-02
/// assert!(heartbeat.flush(Duration::from_secs(10)));
/// assert_eq!(master.rows()[1].error.as_deref(), Some("no such image"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it reports the operation failed"]
pub struct TrackedOperation {
    /// `None`: the host is not enrolled.
    outbox: Option<OfProcess<Arc<OutboxClient>>>,
    operation: Operation,
    /// The deckies on which the operation has not ended, with the ids of their rows.
    open: Vec<(String, i64)>,
}

impl TrackedOperation {
    pub(super) fn new(
        outbox: Option<OfProcess<Arc<OutboxClient>>>,
        operation: Operation,
        open: impl IntoIterator<Item = (String, i64)>,
    ) -> Self {
        Self { outbox, operation, open: open.into_iter().collect() }
    }

    /// The kind of operation.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The deckies on which the operation has not ended, sorted by name.
    pub fn open(&self) -> impl Iterator<Item = &str> {
        self.open.iter().map(|(decky, _)| decky.as_str())
    }

    /// Reports success on all deckies that are still open.
    pub fn succeed(mut self) {
        self.end_all(&Outcome::Succeeded);
    }

    /// Reports a failure on all deckies that are still open. The error is truncated to 2,000
    /// characters, as the master does.
    ///
    /// ```
    /// use decnet_heartbeat::Operation;
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// if let Err(error) = std::fs::read("/no/such/compose.yml") {
    ///     operation.fail(format!("compose.yml: {error}"));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fail(mut self, error: impl AsRef<str>) {
        // Truncated before it is cloned for each decky.
        self.end_all(&Outcome::Failed(cut(error.as_ref(), limits::DELTA_ERROR).to_owned()));
    }

    /// Reports how the operation ended on one of the deckies.
    ///
    /// ```
    /// use decnet_heartbeat::{Operation, Outcome};
    ///
    /// # let (_master, _worker, heartbeat) = decnet_heartbeat::loopback::example_heartbeat()?;
    /// let mut operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// operation.end("decky-01", Outcome::Failed("exited with 3".to_owned()))?;
    /// let error = operation.end("decky-01", Outcome::Succeeded).unwrap_err();
    /// assert_eq!(error.to_string(), r#"decky name: "decky-01" is not open in this deploy"#);
    /// operation.succeed(); // only on decky-02
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - The operation does not include this decky, or has already ended on it. The first outcome
    ///   counts.
    /// - This process was forked after the operation began.
    pub fn end(&mut self, decky: &str, outcome: Outcome) -> Result<(), Error> {
        self.outbox.as_ref().map_or(Ok(()), |outbox| outbox.get().map(drop))?;
        let Some(place) = self.open.iter().position(|(open, _)| open == decky) else {
            let name = sanitize(decky);
            return Err(Error::setting(
                "decky name",
                format!("{name:?} is not open in this {}", self.operation),
            ));
        };
        let (decky, id) = self.open.remove(place);
        self.write_end(vec![self.ended_delta(decky, id, &outcome)]);
        Ok(())
    }

    fn end_all(&mut self, outcome: &Outcome) {
        let open = std::mem::take(&mut self.open);
        let ended = open.into_iter().map(|(decky, id)| self.ended_delta(decky, id, outcome));
        self.write_end(ended.collect());
    }

    /// Changes the rows in flight, which have been in the outbox since the operation began.
    fn write_end(&self, ended: Vec<QueuedDelta>) {
        // In a forked process nothing is reported, and nothing is logged: the logger's lock may
        // never be released there.
        let Some(Ok(outbox)) = self.outbox.as_ref().map(OfProcess::get) else { return };
        if ended.is_empty() {
            return;
        }
        if let Err(error) = outbox.change(RowChange::Ended(ended, SentBy::Deliverer)) {
            // The guard may be dropped by a panic. A second panic, in the logger, would abort the
            // process.
            quietly(|| {
                log::error!(
                    "could not write the end of an operation; a restart would report it failed: \
                     error={:?}",
                    chain(&error)
                );
            });
        }
    }

    fn ended_delta(&self, decky: String, id: i64, outcome: &Outcome) -> QueuedDelta {
        QueuedDelta { id, delta: LifecycleDelta::new(decky, self.operation, outcome.clone()) }
    }
}

impl Drop for TrackedOperation {
    fn drop(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let ended = if thread::panicking() { "panicked" } else { "ended without a result" };
        self.end_all(&Outcome::Failed(format!("{} {ended}", self.operation)));
    }
}

/// The text of an error and its sources, for the master. A source is left out if the text so far
/// ends with its text. The result is truncated to the length of a delta's error.
pub(super) fn reason(error: &dyn StdError) -> String {
    let mut text = String::new();
    for layer in layers(error, limits::DELTA_ERROR) {
        if text.is_empty() {
            text = layer;
        } else if !text.ends_with(&layer) {
            text.push_str(": ");
            text.push_str(&layer);
        }
        if text.len() > 4 * limits::DELTA_ERROR {
            break;
        }
    }
    text.truncate(cut(&text, limits::DELTA_ERROR).len());
    text.shrink_to_fit();
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;
    use crate::error::chain;

    /// An error whose text has the given number of characters, and its source.
    #[derive(Debug)]
    struct Long(usize, Option<Box<Long>>);

    impl fmt::Display for Long {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            (0..self.0).try_for_each(|_| f.write_str("ä"))
        }
    }

    impl StdError for Long {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            self.1.as_deref().map(|source| source as &(dyn StdError + 'static))
        }
    }

    #[test]
    fn reason_is_cut_to_the_length_of_a_deltas_error() {
        let sources = |length: usize, count: usize| {
            (0..count).fold(Long(length, None), |it, _| Long(length, Some(Box::new(it))))
        };
        for error in
            [sources(10_000_000, 0), sources(100_000, 10), sources(0, 1_000), sources(7, 1_000)]
        {
            for text in [reason(&error), chain(&error)] {
                assert!(text.chars().count() <= 32 * 302, "{}", text.len());
            }
            let text = reason(&error);
            assert!(text.chars().count() <= limits::DELTA_ERROR, "{}", text.len());
            assert!(text.capacity() <= 4 * limits::DELTA_ERROR, "{}", text.capacity());
        }
    }

    #[test]
    fn reason_leaves_out_a_repeated_source() {
        let error = Error::setting("a", "b").with_source(Error::setting("c", "d"));
        assert_eq!(reason(&error), "a: b: c: d");
        let wrapped = Long(3, Some(Box::new(Long(3, None))));
        assert_eq!(reason(&wrapped), "äää");
    }
}
