//! Where requests wait for the outbox thread and their callers for the answers. Nobody holds its lock while he blocks.

use std::cell::RefCell;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::held::{HeldDeltas, Hold};
use super::requests::{Generation, GivenUp, Requests, Taken, Ticket};
use crate::error::Error;
use crate::limits;
use crate::outbox::{NewRows, QueuedDelta, RowChange};
use crate::threads::content::{DeltaSelection, Suspects};

/// What is asked of the outbox thread.
#[derive(Debug)]
pub(crate) enum Request {
    NewRows(NewRows),
    RowChange(RowChange),
    /// To look whether the credentials' files exist, and to put the outbox in order: before each beat but one for deltas alone.
    Tend,
    /// The deltas of a POST.
    Batch(BatchRequest),
    /// To be told when all that may be sent now has been accepted or rejected.
    Flush,
    /// Another process may deliver.
    Release,
    /// Whether the master has to hear something newer first.
    #[cfg(feature = "cli")]
    IsOvertaken(QueuedDelta),
}

impl Request {
    fn hold(&self) -> Option<Hold> {
        match self {
            Self::NewRows(add) => Hold::of_added(add),
            Self::RowChange(change) => Hold::of_changed(change),
            _ => None,
        }
    }

    /// How many rows it changes.
    fn rows(&self) -> usize {
        match self {
            Self::NewRows(add) => add.rows(),
            Self::RowChange(change) => change.rows(),
            _ => 0,
        }
    }
}

/// The id of the first row that was added, 1 for yes and 0 for no or done. An error of a change means that the file does not
/// have it, not that it is lost.
pub(crate) type Answer = Result<i64, Error>;

/// Which deltas a POST is to carry.
#[derive(Clone, Debug)]
pub(crate) struct BatchRequest {
    pub(crate) number: u64,
    pub(crate) share: DeltaSelection,
    /// What they hold back stays out of it.
    pub(crate) suspects: Arc<Suspects>,
}

/// A request on its way.
#[derive(Debug)]
pub(crate) struct QueuedRequest {
    pub(crate) request: Request,
    /// Its deltas are to be sent at once.
    pub(crate) is_urgent: bool,
    pub(crate) waiter: Waiter,
}

/// Who waits for an answer, if anybody does.
#[derive(Debug, Default)]
pub(crate) struct Waiter {
    pub(crate) until: Option<Instant>,
    slot: Option<Arc<Slot>>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// Too many others wait. Nothing was done.
    Full,
    /// It was withdrawn. Nothing was done.
    Withdrawn,
    /// It will be done when the disk answers, unless the process ends first.
    InDoubt,
}

#[derive(Debug)]
pub(crate) struct RequestQueue {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Debug)]
struct State {
    requests: Requests<QueuedRequest>,
    holds: HeldDeltas,
    /// [`Request::Tend`] is queued. A disk that does not answer for days must not find thousands of them.
    is_to_tend: bool,
    /// The thread sleeps until so many are queued.
    wanted: usize,
    /// Nobody will ask for anything any more.
    is_closed: bool,
    /// Since when the thread has been at what it has taken.
    busy_since: Option<Instant>,
}

impl Default for BatchRequest {
    /// All that may be sent.
    fn default() -> Self {
        Self { number: 0, share: DeltaSelection::default(), suspects: Arc::default() }
    }
}

impl Default for RequestQueue {
    fn default() -> Self {
        let requests = Requests::new(limits::REQUESTS);
        // The thread opens the outbox first.
        let busy_since = Some(Instant::now());
        let holds = HeldDeltas::default();
        let state =
            State { requests, holds, is_to_tend: false, wanted: 1, is_closed: false, busy_since };
        Self { state: Mutex::new(state), work: Condvar::new() }
    }
}

impl RequestQueue {
    /// Asks for something, and waits for the answer until then. An addition is withdrawn if it was
    /// not taken by then.
    pub(crate) fn ask(
        &self,
        request: Request,
        is_urgent: bool,
        until: Instant,
    ) -> Result<Answer, Unanswered> {
        let slot = Slot::of_this_thread();
        let can_be_withdrawn = !matches!(request, Request::RowChange(_) | Request::Release);
        let (rows, hold) = (request.rows(), request.hold());
        let waiter = Waiter { until: Some(until), slot: Some(Arc::clone(&slot)) };
        let asked = QueuedRequest { request, is_urgent, waiter };
        let ticket = self.queue(|state| {
            let ticket = match can_be_withdrawn {
                true => state.requests.ask(rows, asked).map_err(|_| Unanswered::Full)?,
                false => state.requests.tell(rows, asked, true),
            };
            state.holds.note(state.requests.generation(), hold);
            Ok(ticket)
        })?;
        self.wait(ticket, &slot, until)
    }

    /// Asks for something that cannot be withdrawn, and does not wait.
    pub(crate) fn tell(&self, request: Request) {
        let (rows, hold) = (request.rows(), request.hold());
        self.queue(|state| {
            if matches!(request, Request::Tend) && mem::replace(&mut state.is_to_tend, true) {
                return;
            }
            state.requests.tell(
                rows,
                QueuedRequest { request, is_urgent: false, waiter: Waiter::default() },
                false,
            );
            state.holds.note(state.requests.generation(), hold);
        });
    }

    fn queue<T>(&self, queue: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let queued = queue(&mut state);
        let is_enough = state.requests.len() >= state.wanted;
        drop(state);
        if is_enough {
            self.work.notify_one();
        }
        queued
    }

    fn wait(&self, ticket: Ticket, slot: &Slot, until: Instant) -> Result<Answer, Unanswered> {
        loop {
            if let Some(answer) = slot.take() {
                return Ok(answer);
            }
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                thread::park_timeout(left);
                continue;
            }
            let given_up = self.lock().requests.give_up(ticket);
            match given_up {
                // The payload is dropped here, without the lock.
                GivenUp::Withdrawn(_) => return Err(Unanswered::Withdrawn),
                GivenUp::InDoubt => {
                    // An answer may still be put into this one.
                    Slot::renew();
                    return Err(Unanswered::InDoubt);
                }
                // It was put there under the same lock.
                GivenUp::Answered => (),
            }
        }
    }

    /// What the thread does next, all that is queued of at most so many rows; `None`: nothing, ever. After a group of several
    /// it waits a moment for as many again: threads that push all the time come back for the same commit. With `within` it waits
    /// no longer than that, and there may be nothing in what is taken.
    pub(crate) fn next(
        &self,
        last: usize,
        within: Option<Duration>,
    ) -> Option<Taken<QueuedRequest>> {
        let mut state = self.lock();
        state.busy_since = None;
        if last > 1 && state.requests.len() < last {
            state.wanted = last;
            let is_waiting = |state: &mut State| state.requests.len() < last && !state.is_closed;
            let waited = self.work.wait_timeout_while(state, limits::GATHER, is_waiting);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.wanted = 1;
        let is_idle = |state: &mut State| state.requests.len() == 0 && !state.is_closed;
        let mut state = match within {
            Some(within) => {
                let waited = self.work.wait_timeout_while(state, within, is_idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.work.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner),
        };
        if state.requests.len() == 0 && state.is_closed {
            return None;
        }
        state.busy_since = Some(Instant::now());
        state.is_to_tend = false;
        Some(state.requests.take(limits::GROUP_ROWS))
    }

    /// Answers. Of each, whether its caller has waited for that.
    pub(crate) fn answer(&self, answers: Vec<(Ticket, Waiter, Answer)>) -> Vec<bool> {
        let mut waiting = Vec::with_capacity(answers.len());
        let mut state = self.lock();
        let put = |(ticket, waiter, answer): (Ticket, Waiter, Answer)| {
            let slot = waiter.slot.filter(|_| state.requests.answer(ticket));
            let is_heard = slot.is_some();
            waiting.extend(slot.inspect(|slot| slot.put(answer)));
            is_heard
        };
        let heard = answers.into_iter().map(put).collect();
        drop(state);
        waiting.iter().for_each(|slot| slot.thread.unpark());
        heard
    }

    pub(crate) fn generation(&self) -> Generation {
        self.lock().requests.generation()
    }

    /// Leaves of these deltas, which were read in that generation, what nothing holds back by now. `false`: that is not known.
    pub(crate) fn leave_free(&self, read: Generation, deltas: &mut Vec<QueuedDelta>) -> bool {
        self.lock().holds.leave_free(read, deltas)
    }

    /// Since when the thread has been at what it has taken; `None`: it waits for work.
    pub(crate) fn busy_since(&self) -> Option<Instant> {
        self.lock().busy_since
    }

    /// Nobody will ask any more. The thread ends when it has done what is queued.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.work.notify_one();
    }

    #[cfg(test)]
    pub(crate) fn queued(&self) -> usize {
        self.lock().requests.len()
    }

    /// A panic leaves it whole: each change is a single step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a thread finds its answer: one place, used again and again.
#[derive(Debug)]
struct Slot {
    thread: Thread,
    answer: Mutex<Option<Answer>>,
}

thread_local! {
    static SLOT: RefCell<Arc<Slot>> = RefCell::new(Slot::new());
}

impl Slot {
    fn new() -> Arc<Self> {
        Arc::new(Self { thread: thread::current(), answer: Mutex::new(None) })
    }

    fn of_this_thread() -> Arc<Self> {
        // A thread that is just ending has none any more.
        SLOT.try_with(|slot| Arc::clone(&slot.borrow())).unwrap_or_else(|_| Self::new())
    }

    /// This thread uses another one from now on.
    fn renew() {
        let _ = SLOT.try_with(|slot| slot.replace(Self::new()));
    }

    fn take(&self) -> Option<Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, answer: Answer) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::super::outbox_client::OutboxClient;
    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::SentBy;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(10);

    fn add() -> NewRows {
        NewRows::Deltas(vec![LifecycleDelta::succeeded("d", Operation::Deploy)], SentBy::Deliverer)
    }

    fn ask(desk: &RequestQueue, patience: Duration) -> Result<i64, Unanswered> {
        desk.ask(Request::NewRows(add()), false, Instant::now() + patience).map(Result::unwrap)
    }

    /// The one request that is queued.
    fn take(desk: &RequestQueue) -> (Ticket, Waiter) {
        let (ticket, asked) = desk.next(0, None).unwrap().requests.pop().unwrap();
        (ticket, asked.waiter)
    }

    #[test]
    fn nothing_is_kept_of_what_was_not_taken_in_time() {
        let desk = RequestQueue::default();
        assert_eq!(ask(&desk, SHORT), Err(Unanswered::Withdrawn));
        desk.close();
        assert!(desk.next(0, None).is_none());
    }

    #[test]
    fn the_answer_to_what_is_in_doubt_is_not_taken_for_the_next_ones() {
        let desk = RequestQueue::default();
        let (asks, may_answer) = bounded(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (ticket, waiter) = take(&desk);
                may_answer.recv().unwrap();
                assert_eq!(
                    desk.answer(vec![(ticket, waiter, Ok(1))]),
                    [false],
                    "nobody waits for it"
                );
                let (ticket, waiter) = take(&desk);
                assert_eq!(desk.answer(vec![(ticket, waiter, Ok(2))]), [true]);
            });
            // On a busy machine the other thread may not have come to it yet.
            while ask(&desk, SHORT) == Err(Unanswered::Withdrawn) {}
            asks.send(()).unwrap();
            assert_eq!(ask(&desk, LONG), Ok(2));
        });
    }

    #[test]
    fn a_full_queue_refuses_the_next_request_at_once_and_says_so() {
        let desk = Arc::new(RequestQueue::default());
        for _ in 0..limits::REQUESTS {
            let asked = QueuedRequest {
                request: Request::NewRows(add()),
                is_urgent: false,
                waiter: Waiter::default(),
            };
            assert!(desk.queue(|state| state.requests.ask(0, asked)).is_ok());
        }
        let (_, ended) = bounded(0);
        let path = Some("/agent/heartbeat.db".into());
        let client = OutboxClient::new(Arc::clone(&desk), Arc::default(), path, ended);
        let since = Instant::now();
        let error = client.add(add(), true).unwrap_err();
        assert!(since.elapsed() < limits::OUTBOX_BUSY, "{:?}", since.elapsed());
        assert!(error.is_outbox() && !error.is_in_doubt());
        assert_eq!(
            error.to_string(),
            "outbox /agent/heartbeat.db: has 1024 requests waiting for its disk; nothing was kept, try again later"
        );
        // There is always room for what must not be lost.
        desk.tell(Request::Tend);
        assert_eq!(desk.queued(), limits::REQUESTS + 1);
    }

    #[test]
    fn a_disk_that_does_not_answer_finds_one_question_to_put_the_outbox_in_order() {
        let desk = RequestQueue::default();
        (0..1_000).for_each(|_| desk.tell(Request::Tend));
        assert_eq!(desk.queued(), 1);
        assert_eq!(desk.next(0, None).map(|taken| taken.requests.len()), Some(1));
        desk.tell(Request::Tend);
        assert_eq!(desk.queued(), 1, "the next one is another one");
    }

    #[test]
    fn what_was_queued_before_the_end_is_done() {
        let desk = RequestQueue::default();
        assert!(desk.busy_since().is_some(), "the outbox is being opened");
        desk.tell(Request::Tend);
        desk.close();
        assert_eq!(desk.next(0, None).map(|taken| taken.requests.len()), Some(1));
        assert!(desk.busy_since().is_some());
        assert!(desk.next(1, None).is_none() && desk.busy_since().is_none());
    }

    #[test]
    fn where_there_is_something_to_look_after_the_wait_for_requests_has_an_end() {
        let desk = Arc::new(RequestQueue::default());
        let (waiting, (ended, ends)) = (Arc::clone(&desk), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            ended.send(waiting.next(0, Some(SHORT)).map(|taken| taken.requests.len()))
        });
        assert_eq!(ends.recv_timeout(LONG), Ok(Some(0)));
        desk.tell(Request::Tend);
        assert_eq!(desk.next(0, Some(LONG)).map(|taken| taken.requests.len()), Some(1));
        desk.close();
        assert!(desk.next(0, Some(LONG)).is_none());
    }

    #[test]
    fn a_group_is_not_waited_for_longer_than_a_moment() {
        let desk = RequestQueue::default();
        desk.tell(Request::Tend);
        let since = Instant::now();
        // After one of so many, none of which comes back.
        assert_eq!(desk.next(limits::GROUP_ROWS, None).map(|taken| taken.requests.len()), Some(1));
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    }
}
