//! The queue of requests to the outbox thread, and where their callers wait for the answers. Any
//! thread may use it. No thread holds its lock while it blocks.

#[cfg(feature = "cli")]
mod submitted;

use std::cell::RefCell;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

#[cfg(feature = "cli")]
use crossbeam_channel::Sender;

use super::held::{HeldDeltas, HoldCause};
use super::requests::{CallerState, Generation, GivenUp, Requests, Taken, Ticket};
#[cfg(feature = "cli")]
use crate::delta::Operation;
use crate::error::Error;
use crate::limits;
#[cfg(feature = "cli")]
use crate::outbox::resume::BegunRow;
use crate::outbox::{NewRows, QueuedDelta, RowChange};
use crate::threads::content::{DeltaSelection, Suspects};
#[cfg(feature = "cli")]
use crate::threads::hand_over::HandOverRequest;
use crate::threads::status::is_status_thread;
#[cfg(feature = "cli")]
pub(crate) use submitted::{Submitted, WakeEvent};

/// A request to the outbox thread.
#[derive(Debug)]
pub(crate) enum Request {
    NewRows(NewRows),
    RowChange(RowChange),
    /// Check whether the credentials' files exist, and maintain the outbox. Sent before each beat,
    /// except those for deltas alone.
    Maintain,
    /// Read the deltas of a POST.
    Batch(BatchRequest),
    /// Answer when all deltas that may be sent now have been accepted or rejected.
    Flush,
    /// Let another process deliver.
    Release,
    /// Offer to the heartbeat thread what other processes have added.
    OfferAdded,
    /// Check whether the outbox has a newer delta of the same decky and operation.
    #[cfg(feature = "cli")]
    IsOvertaken(QueuedDelta),
    /// Wake the process that delivers, or read what has become of rows that were left to it.
    #[cfg(feature = "cli")]
    HandOver(HandOverRequest),
    /// Begin an operation, and take over rows of processes that have ended.
    #[cfg(feature = "cli")]
    Resume(ResumeRequest),
}

/// The beginning of an operation that takes over rows.
#[cfg(feature = "cli")]
#[derive(Debug)]
pub(crate) struct ResumeRequest {
    pub(crate) operation: Operation,
    pub(crate) deckies: Vec<String>,
    /// Holds one message: the rows, before the answer.
    pub(crate) begun: Sender<Vec<BegunRow>>,
}

impl Request {
    /// The deltas that it holds back from batches that were read before.
    fn hold(&self) -> Option<HoldCause> {
        match self {
            Self::NewRows(rows) => HoldCause::of_new_rows(rows),
            Self::RowChange(change) => HoldCause::of_change(change),
            #[cfg(feature = "cli")]
            Self::Resume(resume) => {
                Some(HoldCause::Begun(resume.operation, resume.deckies.clone()))
            }
            _ => None,
        }
    }

    /// Whether its deltas are sent at once, and not with the next beat. That is so unless the
    /// status source pushes them while it makes a snapshot, because a beat would ask the source
    /// again.
    fn is_urgent(&self) -> bool {
        let has_deltas = matches!(
            self,
            Self::NewRows(NewRows::Deltas(..)) | Self::RowChange(RowChange::Ended(..))
        );
        has_deltas && !is_status_thread()
    }

    /// The number of rows that it changes.
    fn rows(&self) -> usize {
        match self {
            Self::NewRows(rows) => rows.rows(),
            Self::RowChange(change) => change.rows(),
            // More than a transaction has: it is taken alone, so that it keeps its place among
            // requests that add rows.
            #[cfg(feature = "cli")]
            Self::Resume(_) => limits::GROUP_ROWS + 1,
            _ => 0,
        }
    }
}

/// The deltas that a POST requests. By default, all that may be sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct BatchRequest {
    pub(crate) number: u64,
    pub(crate) selection: DeltaSelection,
    /// The deltas that these hold back are left out.
    pub(crate) suspects: Arc<Suspects>,
}

/// A request in the queue.
#[derive(Debug)]
pub(crate) struct QueuedRequest {
    pub(crate) request: Request,
    pub(crate) is_urgent: bool,
    pub(crate) waiter: Waiter,
}

/// The caller of a request, which may wait for the answer.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) ticket: Ticket,
    pub(crate) waiter: Waiter,
}

/// How a caller waits. By default it does not.
#[derive(Debug, Default)]
pub(crate) struct Waiter {
    pub(crate) deadline: Option<Instant>,
    slot: Option<Arc<Slot>>,
}

/// Why a request was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAnswered {
    /// The queue is full. Nothing was done.
    QueueFull,
    /// The request was withdrawn. Nothing was done.
    Withdrawn,
    /// It will be done when the disk answers, unless the process ends first.
    InDoubt,
}

#[derive(Debug)]
pub(crate) struct RequestQueue {
    state: Mutex<State>,
    /// Wakes the outbox thread.
    work: Condvar,
}

#[derive(Debug)]
struct State {
    requests: Requests<QueuedRequest>,
    holds: HeldDeltas,
    /// [`Request::Maintain`] is queued. It is queued once, or a disk that does not answer for days
    /// would find thousands of them.
    maintenance_is_queued: bool,
    /// [`Request::OfferAdded`] is queued. It is queued once, however many datagrams arrive.
    offer_is_queued: bool,
    /// The outbox thread sleeps until this many requests are queued.
    wake_at: usize,
    /// No further request will come.
    is_closed: bool,
    /// Since when the outbox thread has been busy with the requests that it has taken.
    busy_since: Option<Instant>,
}

impl State {
    fn enqueue(
        &mut self,
        request: Request,
        waiter: Waiter,
        caller: CallerState,
    ) -> Result<Ticket, NotAnswered> {
        let rows = request.rows();
        let hold = request.hold();
        let queued = QueuedRequest { is_urgent: request.is_urgent(), request, waiter };
        let ticket = self.requests.enqueue(rows, queued, caller);
        let ticket = ticket.map_err(|_| NotAnswered::QueueFull)?;
        self.holds.record(self.requests.generation(), hold);
        Ok(ticket)
    }
}

impl Default for RequestQueue {
    fn default() -> Self {
        let state = State {
            requests: Requests::new(limits::REQUESTS),
            holds: HeldDeltas::default(),
            maintenance_is_queued: false,
            offer_is_queued: false,
            wake_at: 1,
            is_closed: false,
            // The thread opens the outbox first.
            busy_since: Some(Instant::now()),
        };
        Self { state: Mutex::new(state), work: Condvar::new() }
    }
}

impl RequestQueue {
    /// Queues a request and waits for its answer until `deadline`. A request that adds or reads
    /// rows is withdrawn if it was not taken by then.
    ///
    /// The answer is the id of the first row that was added, 1 for yes, or 0 for no or done. The
    /// error of a change means that the file does not have the change yet; it is not lost.
    pub(crate) fn send_and_wait(
        &self,
        request: Request,
        deadline: Instant,
    ) -> Result<Result<i64, Error>, NotAnswered> {
        let slot = Slot::of_this_thread();
        let ticket = self.enqueue(request, deadline, &slot)?;
        self.wait(ticket, &slot, deadline)
    }

    /// Queues a request whose answer goes to `slot`.
    fn enqueue(
        &self,
        request: Request,
        deadline: Instant,
        slot: &Arc<Slot>,
    ) -> Result<Ticket, NotAnswered> {
        let waiter = Waiter { deadline: Some(deadline), slot: Some(Arc::clone(slot)) };
        let caller = match request {
            Request::RowChange(_) | Request::Release => CallerState::Waits,
            _ => CallerState::CanWithdraw,
        };
        self.update(|state| state.enqueue(request, waiter, caller))
    }

    /// Queues a request that cannot be withdrawn, and does not wait.
    pub(crate) fn send(&self, request: Request) {
        self.update(|state| {
            let is_queued = match request {
                Request::Maintain => mem::replace(&mut state.maintenance_is_queued, true),
                Request::OfferAdded => mem::replace(&mut state.offer_is_queued, true),
                _ => false,
            };
            if is_queued {
                return;
            }
            // Only a request that can be withdrawn may be refused.
            let _ = state.enqueue(request, Waiter::default(), CallerState::DoesNotWait);
        });
    }

    /// Changes the queue, and wakes the outbox thread if enough requests are queued.
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        let wakes = state.requests.len() >= state.wake_at;
        drop(state);
        if wakes {
            self.work.notify_one();
        }
        result
    }

    fn wait(
        &self,
        ticket: Ticket,
        slot: &Slot,
        deadline: Instant,
    ) -> Result<Result<i64, Error>, NotAnswered> {
        loop {
            if let Some(answer) = slot.take() {
                return Ok(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                thread::park_timeout(left);
                continue;
            }
            let given_up = self.lock().requests.give_up(ticket);
            match given_up {
                // The payload is dropped here, where the lock is not held.
                GivenUp::Withdrawn(_) => return Err(NotAnswered::Withdrawn),
                GivenUp::InDoubt => {
                    // The answer may still be put into the old slot.
                    Slot::replace();
                    return Err(NotAnswered::InDoubt);
                }
                // The answer was put into the slot under the same lock: take it.
                GivenUp::Answered => (),
            }
        }
    }

    /// Waits for requests, and takes up to a transaction of them. Returns `None` when the queue is
    /// closed and empty.
    ///
    /// After a group of several requests (`last_group`) this waits up to [`limits::GATHER`] for as
    /// many again, so that threads that push all the time share a commit. With `timeout` it returns
    /// an empty group if none is queued by then.
    pub(crate) fn take_group(
        &self,
        last_group: usize,
        timeout: Option<Duration>,
    ) -> Option<Taken<QueuedRequest>> {
        let mut state = self.lock();
        state.busy_since = None;
        if last_group > 1 && state.requests.len() < last_group {
            state.wake_at = last_group;
            let is_small =
                |state: &mut State| state.requests.len() < last_group && !state.is_closed;
            let waited = self.work.wait_timeout_while(state, limits::GATHER, is_small);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.wake_at = 1;
        let is_idle = |state: &mut State| state.requests.len() == 0 && !state.is_closed;
        let timeout = timeout.unwrap_or(Duration::MAX);
        let waited = self.work.wait_timeout_while(state, timeout, is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if state.requests.len() == 0 && state.is_closed {
            return None;
        }
        state.busy_since = Some(Instant::now());
        state.maintenance_is_queued = false;
        state.offer_is_queued = false;
        Some(state.requests.take(limits::GROUP_ROWS))
    }

    /// Answers requests. Returns for each of them whether its caller has received the answer.
    pub(crate) fn answer(&self, answers: Vec<(Caller, Result<i64, Error>)>) -> Vec<bool> {
        let mut waiting = Vec::with_capacity(answers.len());
        let mut state = self.lock();
        let put = |(caller, answer): (Caller, Result<i64, Error>)| {
            let slot = caller.waiter.slot.filter(|_| state.requests.answer(caller.ticket));
            let is_received = slot.is_some();
            waiting.extend(slot.inspect(|slot| slot.put(answer)));
            is_received
        };
        let received = answers.into_iter().map(put).collect();
        drop(state);
        waiting.iter().for_each(|slot| slot.wake());
        received
    }

    pub(crate) fn generation(&self) -> Generation {
        self.lock().requests.generation()
    }

    /// Removes the deltas, read in generation `read`, that something has held back since. Returns
    /// `false` if that is no longer known.
    pub(crate) fn remove_held(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        self.lock().holds.remove_held(read, deltas)
    }

    /// Since when the outbox thread has been busy with requests. `None`: it waits for some.
    pub(crate) fn busy_since(&self) -> Option<Instant> {
        self.lock().busy_since
    }

    /// No further request will come. The outbox thread ends after those that are queued.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.work.notify_one();
    }

    /// Queues a request that can be withdrawn, as [`send_and_wait`](Self::send_and_wait) does.
    #[cfg(test)]
    pub(super) fn enqueue_without_waiting(&self, request: Request) -> Result<Ticket, NotAnswered> {
        self.update(|state| state.enqueue(request, Waiter::default(), CallerState::CanWithdraw))
    }

    #[cfg(test)]
    pub(crate) fn queued(&self) -> usize {
        self.lock().requests.len()
    }

    /// A panic cannot leave the state inconsistent, because each change is a single step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a thread receives its answers. Each thread that waits for one at a time reuses its slot.
#[derive(Debug)]
struct Slot {
    waiting: Waiting,
    answer: Mutex<Option<Result<i64, Error>>>,
}

/// How a caller waits for its answer.
#[derive(Debug)]
enum Waiting {
    Parked(Thread),
    #[cfg(feature = "cli")]
    Event(Arc<WakeEvent>),
}

thread_local! {
    static SLOT: RefCell<Arc<Slot>> = RefCell::new(Slot::new_of_this_thread());
}

impl Slot {
    fn new(waiting: Waiting) -> Self {
        Self { waiting, answer: Mutex::new(None) }
    }

    fn new_of_this_thread() -> Arc<Self> {
        Arc::new(Self::new(Waiting::Parked(thread::current())))
    }

    fn wake(&self) {
        match &self.waiting {
            Waiting::Parked(thread) => thread.unpark(),
            #[cfg(feature = "cli")]
            Waiting::Event(event) => event.set(),
        }
    }

    fn of_this_thread() -> Arc<Self> {
        // The thread-local value is gone in a thread that is ending.
        let slot = SLOT.try_with(|slot| Arc::clone(&slot.borrow()));
        slot.unwrap_or_else(|_| Self::new_of_this_thread())
    }

    /// Gives this thread a new slot.
    fn replace() {
        let _ = SLOT.try_with(|slot| slot.replace(Self::new_of_this_thread()));
    }

    fn take(&self) -> Option<Result<i64, Error>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, answer: Result<i64, Error>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::SentBy;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(10);

    fn new_rows() -> NewRows {
        NewRows::Deltas(vec![LifecycleDelta::succeeded("d", Operation::Deploy)], SentBy::Deliverer)
    }

    fn send(queue: &RequestQueue, timeout: Duration) -> Result<i64, NotAnswered> {
        queue
            .send_and_wait(Request::NewRows(new_rows()), Instant::now() + timeout)
            .map(Result::unwrap)
    }

    /// Takes the only queued request.
    fn take(queue: &RequestQueue) -> Caller {
        let (ticket, request) = queue.take_group(0, None).unwrap().requests.pop().unwrap();
        Caller { ticket, waiter: request.waiter }
    }

    #[test]
    fn request_that_was_not_taken_in_time_is_withdrawn() {
        let queue = RequestQueue::default();
        assert_eq!(send(&queue, SHORT), Err(NotAnswered::Withdrawn));
        queue.close();
        assert!(queue.take_group(0, None).is_none());
    }

    #[test]
    fn late_answer_is_not_taken_for_the_next_one() {
        let queue = RequestQueue::default();
        let (next_request, may_answer) = bounded(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                let caller = take(&queue);
                may_answer.recv().unwrap();
                assert_eq!(queue.answer(vec![(caller, Ok(1))]), [false], "its caller has given up");
                let caller = take(&queue);
                assert_eq!(queue.answer(vec![(caller, Ok(2))]), [true]);
            });
            // On a busy machine the other thread may not have taken it in time.
            while send(&queue, SHORT) == Err(NotAnswered::Withdrawn) {}
            next_request.send(()).unwrap();
            assert_eq!(send(&queue, LONG), Ok(2));
        });
    }

    #[test]
    fn maintenance_is_queued_once() {
        let queue = RequestQueue::default();
        (0..1_000).for_each(|_| queue.send(Request::Maintain));
        assert_eq!(queue.queued(), 1);
        assert_eq!(queue.take_group(0, None).map(|taken| taken.requests.len()), Some(1));
        queue.send(Request::Maintain);
        assert_eq!(queue.queued(), 1, "it is queued again after it was taken");
    }

    #[test]
    fn requests_queued_before_close_are_done() {
        let queue = RequestQueue::default();
        assert!(queue.busy_since().is_some(), "the outbox is being opened");
        queue.send(Request::Maintain);
        queue.close();
        assert_eq!(queue.take_group(0, None).map(|taken| taken.requests.len()), Some(1));
        assert!(queue.busy_since().is_some());
        assert!(queue.take_group(1, None).is_none() && queue.busy_since().is_none());
    }

    #[test]
    fn take_group_with_a_timeout_returns_an_empty_group() {
        let queue = Arc::new(RequestQueue::default());
        let waiting = Arc::clone(&queue);
        let (ended, ends) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            ended.send(waiting.take_group(0, Some(SHORT)).map(|taken| taken.requests.len()))
        });
        assert_eq!(ends.recv_timeout(LONG), Ok(Some(0)));
        queue.send(Request::Maintain);
        assert_eq!(queue.take_group(0, Some(LONG)).map(|taken| taken.requests.len()), Some(1));
        queue.close();
        assert!(queue.take_group(0, Some(LONG)).is_none());
    }

    #[test]
    fn wait_for_another_group_is_bounded() {
        let queue = RequestQueue::default();
        queue.send(Request::Maintain);
        let since = Instant::now();
        // After a full group whose callers send no further requests.
        assert_eq!(
            queue.take_group(limits::GROUP_ROWS, None).map(|taken| taken.requests.len()),
            Some(1)
        );
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    }
}
