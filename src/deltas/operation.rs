//! Tracked operations: in the outbox as in flight from the moment they begin, so that each ends in exactly one report,
//! however it ends. Runs on the thread that has the guard.

use std::error::Error as StdError;
use std::thread;

use crate::delta::{LifecycleDelta, Operation, Outcome};
use crate::deltas::DeltaSender;
use crate::error::Error;
use crate::limits;
use crate::outbox::QueuedDelta;
use crate::text::{cut, layers, sanitize};

/// One or more deckies: a name, or anything that gives names. See [`DeltaSender::begin`].
///
/// `Kind` is found out by the compiler and need not be written.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::Operation;
/// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// heartbeat.begin(Operation::Deploy, "decky-01")?.succeed();
/// heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?.succeed();
/// heartbeat.begin(Operation::Deploy, (1..=2).map(|n| format!("decky-{n:02}")))?.succeed();
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not name deckies",
    label = "neither a name nor names",
    note = "write a name, `\"decky-01\"`, or names, `[\"decky-01\", \"decky-02\"]`"
)]
pub trait IntoDeckies<Kind>: kind::Sealed<Kind> {
    #[doc(hidden)]
    fn into_deckies(self) -> Vec<String>;
}

/// What the work of an operation returns: `()`, or a `Result<(), E>` whose error says why it failed. See
/// [`DeltaSender::run`].
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use decnet_heartbeat::Operation;
/// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// heartbeat.run(Operation::Deploy, "decky-01", || println!("nothing can fail here"))?;
/// heartbeat.run(Operation::Deploy, "decky-02", || std::fs::create_dir_all("/tmp"))?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say how the operation ended",
    label = "this work must return `()` or a `Result<(), E>`",
    note = "end the work with `;` if it cannot fail, or with `.map(drop)` if it returns a `Result` with a value"
)]
pub trait IntoOutcome: kind::Sealed<kind::Work> {
    #[doc(hidden)]
    fn into_outcome(self) -> Result<(), Box<dyn StdError + Send + Sync>>;
}

/// Nobody else implements these traits, so they may grow.
mod kind {
    use std::error::Error as StdError;

    pub trait Sealed<Kind> {}

    /// One name.
    #[derive(Debug)]
    pub struct One;

    /// Several.
    #[derive(Debug)]
    pub struct Many;

    #[derive(Debug)]
    pub struct Work;

    impl Sealed<One> for &str {}
    impl Sealed<One> for String {}
    impl Sealed<One> for &String {}
    impl<I: IntoIterator<Item: AsRef<str>>> Sealed<Many> for I {}
    impl Sealed<Work> for () {}
    impl<E: Into<Box<dyn StdError + Send + Sync>>> Sealed<Work> for Result<(), E> {}
}

impl IntoDeckies<kind::One> for &str {
    fn into_deckies(self) -> Vec<String> {
        vec![self.to_owned()]
    }
}

impl IntoDeckies<kind::One> for String {
    fn into_deckies(self) -> Vec<String> {
        vec![self]
    }
}

impl IntoDeckies<kind::One> for &String {
    fn into_deckies(self) -> Vec<String> {
        vec![self.clone()]
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

/// An operation in flight on one or more deckies. From [`DeltaSender::begin`].
///
/// It ends with [`succeed`](Self::succeed) or [`fail`](Self::fail) for all of them, or with
/// [`settle`](Self::settle) for one after the other. What is not settled when it is dropped (a panic, an early return)
/// is reported failed. None of this waits for the network, and none of it can fail: where the outbox cannot be written
/// just now, the end is remembered and written with the next change.
///
/// In a process that was forked after it began it reports nothing: it is still the parent's.
///
/// ```
/// # #[cfg(feature = "loopback")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::time::Duration;
/// # use decnet_heartbeat::loopback::RowStatus;
/// # use decnet_heartbeat::{Operation, Outcome};
/// # const SOON: Duration = Duration::from_secs(10);
/// # let (_dir, master, worker, builder) = decnet_heartbeat::loopback::example()?;
/// # let heartbeat = builder.start()?;
/// # for decky in ["decky-01", "decky-02"] {
/// #     master.open_operation(&worker.uuid, decky, "deploy");
/// # }
/// let mut operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
/// operation.settle("decky-01", Outcome::Succeeded)?;
/// assert_eq!(operation.open().collect::<Vec<_>>(), ["decky-02"]);
/// operation.fail("no such image"); // the rest of it
/// assert!(master.wait_until(SOON, |seen| seen.rows().iter().all(|row| row.completed_at.is_some())));
/// assert_eq!(master.rows()[0].status, RowStatus::Succeeded);
/// assert_eq!(master.rows()[1].error.as_deref(), Some("no such image"));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "loopback"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
#[must_use = "dropping it reports the operation failed"]
pub struct TrackedOperation {
    deltas: DeltaSender,
    operation: Operation,
    /// The deckies whose end is not reported yet, and their places in the outbox.
    open: Vec<(String, i64)>,
}

impl TrackedOperation {
    pub(crate) fn new(
        deltas: DeltaSender,
        operation: Operation,
        open: impl IntoIterator<Item = (String, i64)>,
    ) -> Self {
        Self { deltas, operation, open: open.into_iter().collect() }
    }

    /// What is being done.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The deckies that are not settled yet, in the order of their names.
    pub fn open(&self) -> impl Iterator<Item = &str> {
        self.open.iter().map(|(decky, _)| decky.as_str())
    }

    /// It succeeded, on all deckies that are not settled yet.
    pub fn succeed(mut self) {
        self.end_all(&Outcome::Succeeded);
    }

    /// It failed, on all deckies that are not settled yet. The error is cut to 2,000 characters, as the master does.
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
    /// # for decky in ["decky-01", "decky-02"] {
    /// #     master.open_operation(&worker.uuid, decky, "deploy");
    /// # }
    /// let operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// if let Err(error) = std::fs::read("/no/such/compose.yml") {
    ///     operation.fail(format!("compose.yml: {error}"));
    /// }
    /// assert!(master.wait_until(SOON, |seen| seen.rows().iter().all(|row| row.status == RowStatus::Failed)));
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    pub fn fail(mut self, error: impl AsRef<str>) {
        // Cut before it is copied for each decky.
        self.end_all(&Outcome::Failed(cut(error.as_ref(), limits::DELTA_ERROR).to_owned()));
    }

    /// How it ended on one of the deckies.
    ///
    /// ```
    /// # #[cfg(feature = "loopback")]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use decnet_heartbeat::{Operation, Outcome};
    /// # let (_dir, _master, _worker, builder) = decnet_heartbeat::loopback::example()?;
    /// # let heartbeat = builder.start()?;
    /// let mut operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"])?;
    /// operation.settle("decky-01", Outcome::Failed("exited with 3".to_owned()))?;
    /// let error = operation.settle("decky-01", Outcome::Succeeded).unwrap_err();
    /// assert_eq!(error.to_string(), r#"decky name: "decky-01" is not open in this deploy"#);
    /// operation.succeed(); // decky-02 alone
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "loopback"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// The operation does not have this decky, or it is settled already: the first verdict stands. Or this process was forked
    /// after the operation began.
    pub fn settle(&mut self, decky: &str, outcome: Outcome) -> Result<(), Error> {
        self.deltas.check_process()?;
        let Some(place) = self.open.iter().position(|(open, _)| open == decky) else {
            let name = sanitize(decky);
            return Err(Error::setting(
                "decky name",
                format!("{name:?} is not open in this {}", self.operation),
            ));
        };
        let (decky, id) = self.open.remove(place);
        self.deltas.end(vec![self.ended(decky, id, &outcome)]);
        Ok(())
    }

    fn end_all(&mut self, outcome: &Outcome) {
        let ended = std::mem::take(&mut self.open);
        self.deltas
            .end(ended.into_iter().map(|(decky, id)| self.ended(decky, id, outcome)).collect());
    }

    fn ended(&self, decky: String, id: i64, outcome: &Outcome) -> QueuedDelta {
        QueuedDelta { id, delta: LifecycleDelta::new(decky, self.operation, outcome.clone()) }
    }
}

impl Drop for TrackedOperation {
    fn drop(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let ended = if thread::panicking() { "panicked" } else { "ended without a verdict" };
        self.end_all(&Outcome::Failed(format!("{} {ended}", self.operation)));
    }
}

/// An error with its sources, for the master. A source that the text before it ends with is not said again. It ends where
/// a delta's error is cut, whatever the error is.
pub(crate) fn reason(error: &dyn StdError) -> String {
    let mut text = String::new();
    for said in layers(error, limits::DELTA_ERROR) {
        if text.is_empty() {
            text = said;
        } else if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
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

    /// Says so many characters, and has so many sources like it.
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
    fn a_reason_is_no_longer_than_a_deltas_error_whatever_the_error_is() {
        let sources = |said: usize, count: usize| {
            (0..count).fold(Long(said, None), |it, _| Long(said, Some(Box::new(it))))
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
    fn a_source_that_has_been_said_is_not_said_again() {
        let error = Error::setting("a", "b").with_source(Error::setting("c", "d"));
        assert_eq!(reason(&error), "a: b: c: d");
        let wrapped = Long(3, Some(Box::new(Long(3, None))));
        assert_eq!(reason(&wrapped), "äää");
    }
}
