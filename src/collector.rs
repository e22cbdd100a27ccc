//! The status thread: it asks the [`StatusSource`] when the heartbeat thread wants a snapshot, and is the only place
//! where foreign code and slow reads run. It may hang or panic; the heartbeat thread never waits for it without end.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::error::Error;
use crate::status::{Snapshot, StatusSource, Topology};
use crate::text::printable;

/// What the status thread says.
#[derive(Debug)]
pub(crate) enum Collected {
    /// What is known of the topology before the first snapshot. Said at most once, first.
    Topology(Topology),
    /// The answer to a question, and when it was there.
    Snapshot(Snapshot, Instant),
    /// The source panicked when it was asked.
    Panicked(String),
}

/// The heartbeat thread's ends of the channels. Dropping them ends the status thread after what it is doing.
#[derive(Debug)]
pub(crate) struct Collector {
    /// Asks for one snapshot. One question is under way at a time, so there is always room.
    pub(crate) ask: Sender<()>,
    pub(crate) collected: Receiver<Collected>,
}

impl Collector {
    /// Starts the thread. It is never joined: it may be hanging in foreign code.
    pub(crate) fn start(source: Box<dyn StatusSource>) -> Result<Self, Error> {
        const NAME: &str = "decnet-status";
        let (ask, asked) = bounded(1);
        let (answer, collected) = unbounded();
        thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(move || run(source, &asked, &answer))
            .map_err(|source| Error::thread(NAME, source))?;
        Ok(Self { ask, collected })
    }
}

fn run(mut source: Box<dyn StatusSource>, asked: &Receiver<()>, answer: &Sender<Collected>) {
    let known = catch_unwind(AssertUnwindSafe(|| source.applied_topology()));
    let first = match known {
        Ok(topology) => topology.map(Collected::Topology),
        Err(panic) => Some(Collected::Panicked(message(panic.as_ref()))),
    };
    if let Some(first) = first {
        // An error means that the heartbeat thread is gone; then so is the next question.
        let _ = answer.send(first);
    }
    while let Ok(()) = asked.recv() {
        // A source that panics is asked again: what state it is in is its own matter, and safe code keeps it sound.
        let snapshot = match catch_unwind(AssertUnwindSafe(|| source.snapshot())) {
            Ok(snapshot) => Collected::Snapshot(snapshot, Instant::now()),
            Err(panic) => Collected::Panicked(message(panic.as_ref())),
        };
        let _ = answer.send(snapshot);
    }
}

/// What a panic said, safe to log.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    printable(said.unwrap_or("a panic without a message"))
}
