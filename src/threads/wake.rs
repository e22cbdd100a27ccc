//! The wake thread, `decnet-wake`: it waits for datagrams of processes that have added deltas, and
//! asks the outbox thread to offer these. It runs while this process delivers from a file. Nothing
//! else wakes it. Everything in this module runs on the outbox thread, except [`forward`].

use std::error::Error as _;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::Receiver;

use super::request_queue::{Request, RequestQueue};
use crate::error::Error;
use crate::limits;
use crate::outbox::wake::WakeSocket;
use crate::threads;

/// The socket and its thread. Dropping it ends both.
#[derive(Debug)]
pub(super) struct WakeThread {
    socket: Arc<WakeSocket>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl WakeThread {
    /// Binds the socket of an outbox from which this process delivers, and starts the thread.
    pub(super) fn start(outbox: &Path, queue: &Arc<RequestQueue>) -> Result<Self, Error> {
        let socket = WakeSocket::bind(outbox).map(Arc::new).map_err(|source| {
            let problem = "cannot have a wake socket";
            Error::outbox(Some(outbox), problem).with_source(source)
        })?;
        let thread_socket = Arc::clone(&socket);
        let thread_queue = Arc::clone(queue);
        let run = move || forward(&thread_socket, &thread_queue);
        match threads::spawn("decnet-wake", limits::WAKE_STACK, None, run) {
            Ok((_, ended)) => Ok(Self { socket, ended }),
            Err(error) => {
                socket.close();
                Err(error)
            }
        }
    }

    pub(super) fn is_bound_for(&self, outbox: &Path) -> bool {
        self.socket.is_bound_for(outbox)
    }
}

impl Drop for WakeThread {
    fn drop(&mut self) {
        self.socket.close();
        let _ = self.ended.recv_timeout(limits::RELEASE);
    }
}

/// Runs until the socket is closed. However many datagrams arrive, one request is queued, and the
/// next one after a pause.
fn forward(socket: &WakeSocket, queue: &RequestQueue) {
    while socket.wait() {
        queue.send(Request::OfferAdded);
        thread::sleep(limits::WAKE_PAUSE);
    }
}

/// Whether the problem is one that a person must solve: something else is at the path.
pub(super) fn is_refused(error: &Error) -> bool {
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    source.is_some_and(|source| source.kind() == io::ErrorKind::InvalidInput)
}
