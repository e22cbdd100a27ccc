//! The three threads, the values that they exchange, and the small thread that other processes
//! wake.

pub(crate) mod batches;
pub(crate) mod content;
pub(crate) mod decommission;
#[cfg(feature = "cli")]
pub(crate) mod hand_over;
pub(crate) mod heartbeat;
mod held;
mod outbox;
pub(crate) mod outbox_client;
pub(crate) mod request_queue;
mod requests;
pub(crate) mod schedule;
pub(crate) mod start;
pub(crate) mod status;
mod wake;

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, bounded};

use crate::error::Error;
use crate::stats::{SharedStats, ThreadWatch};

/// Starts a thread. The receiver is disconnected when the thread has ended. If it ends with a panic,
/// `stats` name it.
fn spawn(
    name: &'static str,
    stack: usize,
    stats: Option<&Arc<SharedStats>>,
    run: impl FnOnce() + Send + 'static,
) -> Result<(JoinHandle<()>, Receiver<()>), Error> {
    let (alive, ended) = bounded::<()>(0);
    let watch = stats.map(|stats| ThreadWatch::new(name, stats));
    let run = move || {
        let _watch = watch;
        let _alive = alive;
        run();
    };
    let builder = thread::Builder::new().name(name.to_owned()).stack_size(stack);
    let thread = builder.spawn(run).map_err(|source| Error::thread(name, source))?;
    Ok((thread, ended))
}
