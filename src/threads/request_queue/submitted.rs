//! Requests whose answers are fetched later, by a thread that polls files: the program's `pipe`
//! reads its next line while the disk writes. Nothing here blocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::{NotAnswered, Request, RequestQueue, Slot, Waiting};
use crate::error::Error;
use crate::threads::requests::{GivenUp, Ticket};

/// A request that was queued, and where its answer arrives.
#[derive(Debug)]
pub(crate) struct Submitted {
    ticket: Ticket,
    slot: Arc<Slot>,
    deadline: Instant,
}

/// Wakes a thread in `poll`. Any thread may set it.
#[derive(Debug)]
pub(crate) struct WakeEvent {
    file: OwnedFd,
    /// The file is readable, or is about to be. A thousand answers at once write to it once.
    is_set: AtomicBool,
}

impl WakeEvent {
    pub(crate) fn new() -> io::Result<Self> {
        let file = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { file, is_set: AtomicBool::new(false) })
    }

    pub(crate) fn set(&self) {
        if !self.is_set.swap(true, Ordering::SeqCst) {
            // It fails only for a counter at its maximum, which is readable.
            let _ = rustix::io::write(&self.file, &1_u64.to_ne_bytes());
        }
    }

    /// Clears it. What was done before a `set` that came before is visible afterwards.
    pub(crate) fn clear(&self) {
        // An error means that it is not readable.
        let _ = rustix::io::read(&self.file, &mut [0; 8]);
        self.is_set.swap(false, Ordering::SeqCst);
    }
}

impl AsFd for WakeEvent {
    /// Readable while it is set.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Submitted {
    /// When the request is given up if it is not answered.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl RequestQueue {
    /// Queues a request and returns at once. `event` is set when it is answered.
    pub(crate) fn submit(
        &self,
        request: Request,
        deadline: Instant,
        event: &Arc<WakeEvent>,
    ) -> Result<Submitted, NotAnswered> {
        // A slot of its own, as the caller waits for many requests.
        let slot = Arc::new(Slot::new(Waiting::Event(Arc::clone(event))));
        let ticket = self.enqueue(request, deadline, &slot)?;
        Ok(Submitted { ticket, slot, deadline })
    }

    /// The answer. `None`: there is none yet. After the deadline the request is withdrawn, or is in
    /// doubt.
    pub(crate) fn fetch(
        &self,
        submitted: &Submitted,
    ) -> Option<Result<Result<i64, Error>, NotAnswered>> {
        if let Some(answer) = submitted.slot.take() {
            return Some(Ok(answer));
        }
        if Instant::now() < submitted.deadline {
            return None;
        }
        let given_up = self.lock().requests.give_up(submitted.ticket);
        match given_up {
            // The payload is dropped here, where the lock is not held.
            GivenUp::Withdrawn(_) => Some(Err(NotAnswered::Withdrawn)),
            GivenUp::InDoubt => Some(Err(NotAnswered::InDoubt)),
            // The answer was put into the slot under the same lock.
            GivenUp::Answered => submitted.slot.take().map(Ok),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Caller, QueuedRequest};
    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::{NewRows, SentBy};

    const LONG: Duration = Duration::from_secs(10);

    fn event() -> Arc<WakeEvent> {
        Arc::new(WakeEvent::new().unwrap())
    }

    fn submit(queue: &RequestQueue, timeout: Duration, event: &Arc<WakeEvent>) -> Submitted {
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        let request = Request::NewRows(NewRows::Deltas(vec![delta], SentBy::Deliverer));
        queue.submit(request, Instant::now() + timeout, event).unwrap()
    }

    fn is_readable(event: &WakeEvent) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn submitted_requests_share_a_group_and_keep_their_answers() {
        let (queue, event) = (RequestQueue::default(), event());
        let submitted = [(); 3].map(|()| submit(&queue, LONG, &event));
        let taken = queue.take_group(0, None).unwrap();
        assert_eq!(taken.requests.len(), 3);
        assert!(queue.fetch(&submitted[0]).is_none() && !is_readable(&event));
        // The answers arrive in any order.
        let answers = (1..).zip(taken.requests);
        let caller = |ticket, queued: QueuedRequest| Caller { ticket, waiter: queued.waiter };
        let answers = answers.map(|(id, (ticket, queued))| (caller(ticket, queued), Ok(id)));
        let mut answers: Vec<_> = answers.collect();
        answers.reverse();
        assert_eq!(queue.answer(answers), [true; 3]);
        assert!(is_readable(&event));
        event.clear();
        assert!(!is_readable(&event));
        let ids = submitted.map(|submitted| queue.fetch(&submitted).unwrap().unwrap().unwrap());
        assert_eq!(ids, [1, 2, 3]);
    }

    #[test]
    fn submitted_request_is_withdrawn_or_in_doubt_after_its_deadline() {
        let (queue, event) = (RequestQueue::default(), event());
        let taken = submit(&queue, Duration::ZERO, &event);
        assert_eq!(queue.take_group(0, None).map(|taken| taken.requests.len()), Some(1));
        let queued = submit(&queue, Duration::ZERO, &event);
        let why = |submitted| queue.fetch(submitted).unwrap().map(Result::unwrap).unwrap_err();
        assert_eq!(why(&taken), NotAnswered::InDoubt);
        assert_eq!(why(&queued), NotAnswered::Withdrawn);
    }
}
