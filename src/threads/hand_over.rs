//! How the program hands deltas over to the process that delivers: it wakes that process, and reads
//! what becomes of the rows. Runs on the outbox thread of a process that only adds rows.

use std::ops::Range;

use crossbeam_channel::Sender;

use crate::error::Error;
use crate::outbox::wake::Waker;
use crate::outbox::{Outbox, RowStates};

/// A request about the process that delivers. The answer is 1 for yes and 0 for no.
#[derive(Debug)]
pub(crate) enum HandOverRequest {
    /// Whether a process listens at the wake socket. The connection is kept for [`Self::Wake`].
    Connect,
    /// Wake the process that delivers. The answer is whether it listens.
    Wake,
    /// Whether a process delivers, listening or not.
    HasDeliverer,
    /// Read the states of these rows. The channel has room for the answer.
    RowStates(Range<i64>, Sender<RowStates>),
}

/// The connection to the process that delivers.
#[derive(Debug, Default)]
pub(super) struct HandOver {
    waker: Option<Waker>,
}

impl HandOver {
    pub(super) fn serve(
        &mut self,
        outbox: &mut Outbox,
        request: HandOverRequest,
    ) -> Result<bool, Error> {
        match request {
            HandOverRequest::Connect => {
                self.waker = outbox.connect_waker();
                Ok(self.waker.is_some())
            }
            HandOverRequest::Wake => Ok(self.wake(outbox)),
            HandOverRequest::HasDeliverer => Ok(outbox.has_deliverer()),
            HandOverRequest::RowStates(ids, states) => {
                // An error means that the caller has given up.
                let _ = states.try_send(outbox.row_states(ids)?);
                Ok(true)
            }
        }
    }

    /// Wakes the process that delivers. Connects again if the one that listened has ended.
    pub(super) fn wake(&mut self, outbox: &Outbox) -> bool {
        if self.waker.as_ref().is_some_and(|waker| waker.wake().is_ok()) {
            return true;
        }
        self.waker = outbox.connect_waker();
        self.waker.as_ref().is_some_and(|waker| waker.wake().is_ok())
    }
}
