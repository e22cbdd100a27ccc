//! The status thread: it asks the [`StatusSource`] when the heartbeat thread wants a snapshot, and is the only place
//! where foreign code and slow reads run. It may hang or panic; the heartbeat thread never waits for it without end.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::error::Error;
use crate::limits;
use crate::panics::{caught, discard};
use crate::stats::{SharedStats, ThreadWatch};
use crate::status::{Snapshot, StatusSource, Topology};

thread_local! {
    static IS_STATUS_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Whether this is a status thread. What a source pushes is sent with the next beat: a beat of its own would ask the source
/// again.
pub(crate) fn is_status_thread() -> bool {
    IS_STATUS_THREAD.try_with(Cell::get).unwrap_or_default()
}

/// What the status thread says.
#[derive(Debug)]
pub(crate) enum StatusEvent {
    /// What is known of the topology before the first snapshot, or that the source panicked when it was asked for that.
    /// Said at most once, first.
    Topology(Result<Topology, String>),
    /// The answer to a question, and when it was there.
    Snapshot(Snapshot, Instant),
    /// The source panicked when it was asked.
    Panicked(String),
}

/// The heartbeat thread's ends of the channels. Dropping them ends the status thread after what it is doing.
#[derive(Debug)]
pub(crate) struct StatusThread {
    /// Asks for one snapshot. One question is under way at a time, so there is always room.
    pub(crate) ask: Sender<()>,
    pub(crate) collected: Receiver<StatusEvent>,
}

impl StatusThread {
    /// Starts the thread. It is never joined: it may be hanging in foreign code.
    pub(crate) fn start(
        source: Box<dyn StatusSource>,
        stats: &Arc<SharedStats>,
    ) -> Result<Self, Error> {
        const NAME: &str = "decnet-status";
        let (ask, asked) = bounded(1);
        let (answer, collected) = unbounded();
        let watch = ThreadWatch::new(NAME, stats);
        let run = move || {
            run(source, &asked, &answer);
            watch.disarm();
        };
        let builder = thread::Builder::new().name(NAME.to_owned()).stack_size(limits::STATUS_STACK);
        builder.spawn(run).map_err(|source| Error::thread(NAME, source))?;
        Ok(Self { ask, collected })
    }
}

fn run(mut source: Box<dyn StatusSource>, asked: &Receiver<()>, answer: &Sender<StatusEvent>) {
    IS_STATUS_THREAD.set(true);
    let known = caught(|| source.applied_topology()).transpose();
    if let Some(known) = known {
        // An error means that the heartbeat thread is gone; then so is the next question.
        let _ = answer.send(StatusEvent::Topology(known));
    }
    while let Ok(()) = asked.recv() {
        // A source that panics is asked again: what state it is in is its own matter, and safe code keeps it sound.
        let snapshot = match caught(|| source.snapshot()) {
            Ok(snapshot) => StatusEvent::Snapshot(snapshot, Instant::now()),
            Err(said) => StatusEvent::Panicked(said),
        };
        let _ = answer.send(snapshot);
    }
    discard(source);
}
