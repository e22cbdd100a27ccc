//! The deltas of a POST: which ones the outbox thread has read as sendable, and for how long that
//! is valid. A value of the heartbeat thread. It waits up to [`limits::BATCH_WAIT`] for a slow
//! disk, longer only after a stop; then the beat is sent without deltas.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::outbox_client::OutboxClient;
use super::request_queue::BatchRequest;
use super::requests::Generation;
use crate::credentials::Credentials;
use crate::limits;
use crate::outbox::QueuedDelta;
use crate::threads::content::{DeltaSelection, NothingToSend, Suspects};

/// The deltas that may be sent, as of one read of the outbox.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The number of the request, or [`OFFERED`].
    pub(super) number: u64,
    pub(super) generation: Generation,
    pub(super) read_at: Instant,
    pub(crate) deltas: Result<Vec<QueuedDelta>, NothingToSend>,
    /// Changed credentials.
    pub(crate) credentials: Option<Box<Credentials>>,
    /// The ini and the bundle do not exist.
    pub(crate) files_missing: bool,
}

/// The number of an offer: a batch that was not requested, because there are new deltas.
pub(super) const OFFERED: u64 = 0;

impl Batch {
    /// A batch without deltas, to carry changed credentials.
    pub(super) fn without_deltas() -> Self {
        Self {
            number: OFFERED,
            generation: Generation::default(),
            read_at: Instant::now(),
            deltas: Err(NothingToSend::NotAvailable),
            credentials: None,
            files_missing: false,
        }
    }

    fn is_offer(&self) -> bool {
        self.number == OFFERED
    }
}

/// An event of the outbox thread without deltas.
#[derive(Debug)]
pub(crate) enum OutboxEvent {
    /// There are new deltas that were not offered.
    Pushed,
    /// A caller of `flush` waits.
    Flush,
    /// No other process delivers any more, so this one does.
    DeliveryBegan,
}

/// The heartbeat thread's side of the outbox thread.
#[derive(Debug)]
pub(crate) struct Batches {
    client: Arc<OutboxClient>,
    pub(crate) events: Receiver<OutboxEvent>,
    /// Requested batches and offers.
    pub(crate) batches: Receiver<Batch>,
    /// The number of the last request.
    last_request: u64,
    /// The last request was for all deltas that may be sent.
    requested_all: bool,
    /// The last request was not answered in time, and its answer is no longer waited for.
    is_overdue: bool,
    /// All deltas that may be sent, as of the last offer or late answer.
    stored: Option<Batch>,
    /// An offer arrived while the answer to a request was waited for.
    has_new_offer: bool,
}

impl Batches {
    pub(super) fn new(
        client: Arc<OutboxClient>,
        events: Receiver<OutboxEvent>,
        batches: Receiver<Batch>,
    ) -> Self {
        Self {
            client,
            events,
            batches,
            last_request: 0,
            requested_all: false,
            is_overdue: false,
            stored: None,
            has_new_offer: false,
        }
    }

    /// Receives a batch that no beat waits for: an offer, or a late answer. Returns whether it has
    /// deltas to send.
    pub(crate) fn receive(&mut self, batch: Batch) -> bool {
        let is_offer = batch.is_offer();
        let is_late_answer = self.is_overdue && batch.number == self.last_request;
        self.is_overdue &= !is_late_answer;
        let has_deltas = batch.deltas.as_ref().is_ok_and(|deltas| !deltas.is_empty());
        if is_offer || is_late_answer && self.requested_all {
            self.store(batch);
        }
        (is_late_answer || is_offer) && has_deltas
    }

    /// Whether deltas were offered during the last beat. Its states may be older than these.
    pub(crate) fn take_new_offer(&mut self) -> bool {
        mem::take(&mut self.has_new_offer)
    }

    /// Makes the next request wait for its answer, also if an earlier answer is overdue.
    pub(crate) fn wait_again(&mut self) {
        self.is_overdue = false;
    }

    /// Stores the batch unless a newer one is stored.
    fn store(&mut self, batch: Batch) {
        let is_newer = self.stored.as_ref().is_none_or(|stored| stored.read_at <= batch.read_at);
        if is_newer && batch.deltas.is_ok() {
            self.stored = Some(batch);
        }
    }

    /// Returns the deltas to send now. Waits up to `timeout`. `None`: the disk does not answer.
    ///
    /// The stored batch is used unchanged if no row has changed since and it is fresh, because
    /// another process may begin an operation at any time. An older one is used only if the disk
    /// does not answer, without the deltas that were held back since. Otherwise nothing would ever
    /// be sent from a slow disk while threads push all the time.
    pub(crate) fn get(
        &mut self,
        selection: DeltaSelection,
        suspects: &Arc<Suspects>,
        timeout: Duration,
    ) -> Option<Batch> {
        let is_usable = |batch: &Batch| {
            let is_fresh = batch.read_at.elapsed() < limits::BATCH_FRESH;
            selects_all(selection, suspects)
                && is_fresh
                && batch.generation == self.client.generation()
        };
        if self.stored.as_ref().is_some_and(is_usable) {
            return self.stored.take();
        }
        let answer =
            if self.is_overdue { None } else { self.request(selection, suspects, timeout) };
        let stored = self.stored.take();
        answer.or_else(|| self.without_held(stored?, selection, suspects))
    }

    /// Requests a batch and waits for it, or for an offer that is as good. If deltas were pushed
    /// before this thread received the answer, the request is repeated, but only once, because
    /// threads may push all the time.
    fn request(
        &mut self,
        selection: DeltaSelection,
        suspects: &Arc<Suspects>,
        timeout: Duration,
    ) -> Option<Batch> {
        let deadline = Instant::now() + timeout;
        let first = self.request_once(selection, suspects, deadline)?;
        if first.is_offer() || first.generation == self.client.generation() {
            return Some(first);
        }
        let Batch { credentials, .. } = first;
        let first = Batch { credentials: None, ..first };
        let batch = self
            .request_once(selection, suspects, deadline)
            .or_else(|| self.without_held(first, selection, suspects))
            .unwrap_or_else(Batch::without_deltas);
        Some(Batch { credentials: batch.credentials.or(credentials), ..batch })
    }

    fn request_once(
        &mut self,
        selection: DeltaSelection,
        suspects: &Arc<Suspects>,
        deadline: Instant,
    ) -> Option<Batch> {
        self.last_request += 1;
        self.requested_all = selects_all(selection, suspects);
        self.client.request_batch(BatchRequest {
            number: self.last_request,
            selection,
            suspects: Arc::clone(suspects),
        });
        let mut credentials = None;
        while let Ok(mut batch) = self.batches.recv_deadline(deadline) {
            credentials = batch.credentials.take().or(credentials);
            let is_offer = batch.is_offer() && batch.deltas.is_ok();
            self.has_new_offer |= is_offer;
            let is_as_good =
                is_offer && self.requested_all && batch.generation == self.client.generation();
            if batch.number == self.last_request || is_as_good {
                return Some(Batch { credentials, ..batch });
            }
            if is_offer {
                self.store(batch);
            }
        }
        self.is_overdue = true;
        // Changed credentials are used even if the answer did not arrive.
        credentials
            .map(|credentials| Batch { credentials: Some(credentials), ..Batch::without_deltas() })
    }

    /// Removes from an older batch the deltas that are held back now. The stored batch has all
    /// deltas that could be sent, so it can serve other selections, too.
    fn without_held(
        &self,
        mut batch: Batch,
        selection: DeltaSelection,
        suspects: &Suspects,
    ) -> Option<Batch> {
        let count = match selection {
            DeltaSelection::Newest(count) => count,
            DeltaSelection::One => 1,
            DeltaSelection::None | DeltaSelection::Only(_) | DeltaSelection::Same(_) => {
                return None;
            }
        };
        let deltas = batch.deltas.as_mut().ok()?;
        if batch.read_at.elapsed() >= limits::BATCH_USABLE
            || !self.client.remove_held(batch.generation, deltas)
        {
            return None;
        }
        let held_back = suspects.held_back();
        deltas.retain(|delta| !held_back.contains(delta));
        deltas.truncate(count);
        if deltas.is_empty() { None } else { Some(batch) }
    }
}

/// Whether a request is for all deltas that may be sent, as an offer is.
fn selects_all(selection: DeltaSelection, suspects: &Suspects) -> bool {
    selection == DeltaSelection::default() && suspects.is_empty()
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::{Sender, bounded, never, unbounded};

    use super::super::request_queue::{Request, RequestQueue};
    use super::*;
    use crate::delta::{LifecycleDelta, Operation};
    use crate::outbox::{NewRows, SentBy};

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(20);

    /// The heartbeat thread's side, and the outbox thread's.
    fn parts() -> (Batches, Arc<RequestQueue>, Sender<Batch>) {
        let queue = Arc::new(RequestQueue::default());
        let (batches, answers) = unbounded();
        let (_, ended) = bounded(0);
        let client = Arc::new(OutboxClient::new(Arc::clone(&queue), Arc::default(), None, ended));
        (Batches::new(client, never(), answers), queue, batches)
    }

    fn batch(number: u64, generation: Generation) -> Batch {
        Batch {
            number,
            generation,
            read_at: Instant::now(),
            deltas: Ok(Vec::new()),
            credentials: None,
            files_missing: false,
        }
    }

    fn any(number: u64) -> Batch {
        batch(number, Generation::default())
    }

    fn get(batches: &mut Batches, timeout: Duration) -> Option<u64> {
        batches.get(DeltaSelection::default(), &Arc::default(), timeout).map(|batch| batch.number)
    }

    fn push() -> Request {
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        Request::NewRows(NewRows::Deltas(vec![delta], SentBy::Deliverer))
    }

    fn begin() -> Request {
        Request::NewRows(NewRows::Operation(Operation::Deploy, vec!["d".to_owned()]))
    }

    /// Takes the queued batch requests and returns their numbers.
    fn requested(queue: &RequestQueue) -> Vec<u64> {
        let requests = if queue.queued() == 0 {
            Vec::new()
        } else {
            queue.take_group(0, None).unwrap().requests
        };
        let number = |request| match request {
            Request::Batch(request) => Some(request.number),
            _ => None,
        };
        requests.into_iter().filter_map(|(_, queued)| number(queued.request)).collect()
    }

    #[test]
    fn overdue_answer_is_not_waited_for_again() {
        let (mut batches, queue, answer) = parts();
        assert_eq!(get(&mut batches, SHORT), None);
        let since = Instant::now();
        assert_eq!((get(&mut batches, LONG), get(&mut batches, LONG)), (None, None));
        assert!(since.elapsed() < LONG);
        assert_eq!(requested(&queue), [1], "it is requested once");
        assert!(!batches.receive(any(7)), "it answers another request");
        assert!(!batches.receive(any(1)), "it has no deltas");
        assert_eq!(get(&mut batches, LONG), Some(1), "nothing has changed since");
        answer.send(any(2)).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(2));
        assert_eq!(requested(&queue), [2]);
        assert!(!batches.receive(any(2)), "it came in time");
    }

    #[test]
    fn offer_during_a_request_causes_another_beat() {
        let (mut batches, queue, answer) = parts();
        let queued =
            QueuedDelta { id: 1, delta: LifecycleDelta::succeeded("d", Operation::Deploy) };
        let offer = |queue: &RequestQueue| Batch {
            deltas: Ok(vec![queued.clone()]),
            ..batch(OFFERED, queue.generation())
        };
        assert!(batches.receive(offer(&queue)));
        assert!(!batches.receive(batch(OFFERED, queue.generation())), "it has no deltas");
        assert!(!batches.take_new_offer());
        queue.send(push());
        answer.send(offer(&RequestQueue::default())).unwrap();
        answer.send(batch(1, queue.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(1), "the offer is out of date");
        assert!(batches.take_new_offer() && !batches.take_new_offer());
    }

    #[test]
    fn offer_is_used_once_and_only_while_no_row_has_changed() {
        let (mut batches, queue, answer) = parts();
        batches.receive(batch(0, queue.generation()));
        assert_eq!(get(&mut batches, LONG), Some(0));
        answer.send(batch(1, queue.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(1), "it is used up");
        assert_eq!(requested(&queue), [1]);

        batches.receive(batch(0, queue.generation()));
        queue.send(push());
        answer.send(batch(2, queue.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(2), "a row change was requested");

        let old = Instant::now().checked_sub(limits::BATCH_FRESH).unwrap();
        batches.receive(Batch { read_at: old, ..batch(0, queue.generation()) });
        answer.send(batch(3, queue.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(3), "another process may have begun an operation");

        batches.receive(batch(0, queue.generation()));
        answer.send(batch(4, queue.generation())).unwrap();
        let one = batches.get(DeltaSelection::One, &Arc::default(), LONG).unwrap();
        assert_eq!(one.number, 4, "the selection is another one");
    }

    #[test]
    fn outdated_answer_is_requested_once_more() {
        for pushes in 1..3 {
            let (mut batches, queue, answer) = parts();
            let before = queue.generation();
            queue.send(push());
            answer.send(batch(1, before)).unwrap();
            answer.send(batch(2, if pushes == 1 { queue.generation() } else { before })).unwrap();
            assert_eq!((get(&mut batches, LONG), requested(&queue)), (Some(2), vec![1, 2]));
        }
    }

    #[test]
    fn only_a_current_offer_replaces_an_answer_for_all() {
        let (mut batches, queue, answer) = parts();
        let before = queue.generation();
        queue.send(push());
        answer.send(batch(0, before)).unwrap();
        answer.send(batch(0, queue.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(0));
        // The late answer to the first request does not answer the next one.
        answer.send(any(1)).unwrap();
        answer.send(batch(0, queue.generation())).unwrap();
        answer.send(batch(2, queue.generation())).unwrap();
        let one = batches.get(DeltaSelection::One, &Arc::default(), LONG).unwrap();
        assert_eq!((one.number, requested(&queue)), (2, vec![1, 2]));
    }

    /// The ids of the deltas that may be sent.
    fn sent(
        batches: &mut Batches,
        selection: DeltaSelection,
        suspects: &Arc<Suspects>,
    ) -> Vec<i64> {
        let batch = batches.get(selection, suspects, Duration::from_millis(1));
        batch
            .map(|batch| batch.deltas.unwrap().into_iter().map(|queued| queued.id).collect())
            .unwrap_or_default()
    }

    fn two(queue: &RequestQueue, at: Instant) -> Batch {
        let queued = |(id, decky)| QueuedDelta {
            id,
            delta: LifecycleDelta::succeeded(decky, Operation::Deploy),
        };
        let deltas = Ok([(2, "e"), (1, "d")].map(queued).to_vec());
        Batch { deltas, read_at: at, ..batch(1, queue.generation()) }
    }

    fn offered(batch: Batch) -> Batch {
        Batch { number: OFFERED, ..batch }
    }

    #[test]
    fn stored_batch_is_used_without_held_deltas_while_the_disk_is_slow() {
        for (change, expected) in [(push(), vec![2, 1]), (begin(), vec![2])] {
            let (mut batches, queue, _answer) = parts();
            assert_eq!(get(&mut batches, SHORT), None);
            // The snapshot took long.
            let at = Instant::now().checked_sub(limits::BATCH_FRESH * 10).unwrap();
            assert!(batches.receive(two(&queue, at)));
            queue.send(change);
            assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), expected);
            let too_old = Instant::now().checked_sub(limits::BATCH_USABLE).unwrap();
            batches.receive(offered(two(&queue, too_old)));
            assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), [0; 0]);
        }
    }

    #[test]
    fn stored_batch_serves_single_deltas_while_the_disk_is_slow() {
        let (mut batches, queue, _answer) = parts();
        batches.receive(offered(two(&queue, Instant::now())));
        assert_eq!(sent(&mut batches, DeltaSelection::One, &Arc::default()), [2]);
        batches.receive(offered(two(&queue, Instant::now())));
    }

    #[test]
    fn newer_of_two_batches_is_used() {
        let (mut batches, queue, _answer) = parts();
        let older = any(0);
        batches.receive(offered(two(&queue, Instant::now())));
        batches.receive(older);
        assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), [2, 1]);
    }
}
