//! The status thread. It asks the [`StatusSource`] when the heartbeat thread requests a snapshot,
//! and is the only thread that runs foreign code and slow reads. The source may block or panic: the
//! heartbeat thread waits for it only up to a timeout.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::error::Error;
use crate::limits;
use crate::panics::{caught, discard};
use crate::stats::SharedStats;
use crate::status::{Snapshot, StatusSource, Topology};
use crate::threads;

thread_local! {
    static IS_STATUS_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Whether this is a status thread. A delta that a source pushes is sent with the next beat,
/// because a beat of its own would ask the source again.
pub(crate) fn is_status_thread() -> bool {
    IS_STATUS_THREAD.try_with(Cell::get).unwrap_or_default()
}

/// A message of the status thread.
#[derive(Debug)]
pub(crate) enum StatusEvent {
    /// The topology before the first snapshot, or the source's panic. Sent at most once, first.
    Topology(Result<Topology, String>),
    /// The answer to a request, and when it was ready.
    Snapshot(Snapshot, Instant),
    /// The source panicked when it was asked for a snapshot.
    Panicked(String),
}

/// The heartbeat thread's ends of the channels. When they are dropped, the status thread ends after
/// its current work.
#[derive(Debug)]
pub(crate) struct StatusThread {
    /// Requests one snapshot. At most one request is pending, so there is always room.
    pub(crate) requests: Sender<()>,
    pub(crate) events: Receiver<StatusEvent>,
}

impl StatusThread {
    /// Starts the thread. It is never joined, because it may be blocked in foreign code.
    pub(crate) fn start(
        source: Box<dyn StatusSource>,
        stats: &Arc<SharedStats>,
    ) -> Result<Self, Error> {
        const NAME: &str = "decnet-status";
        let (requests, requested) = bounded(1);
        let (sender, events) = unbounded();
        let run = move || run(source, &requested, &sender);
        threads::spawn(NAME, limits::STATUS_STACK, Some(stats), run)?;
        Ok(Self { requests, events })
    }
}

fn run(mut source: Box<dyn StatusSource>, requested: &Receiver<()>, events: &Sender<StatusEvent>) {
    IS_STATUS_THREAD.set(true);
    // An error of `send` means that the heartbeat thread has ended. The next `recv` fails, too.
    if let Some(topology) = caught(|| source.applied_topology()).transpose() {
        let _ = events.send(StatusEvent::Topology(topology));
    }
    while let Ok(()) = requested.recv() {
        // A source that has panicked is asked again. Safe code keeps it sound.
        let event = match caught(|| source.snapshot()) {
            Ok(snapshot) => StatusEvent::Snapshot(snapshot, Instant::now()),
            Err(panic) => StatusEvent::Panicked(panic),
        };
        let _ = events.send(event);
    }
    discard(source);
}
