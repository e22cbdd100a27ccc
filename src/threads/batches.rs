//! The deltas of a POST: what the outbox thread says may be sent, and for how long that holds. A value of the heartbeat
//! thread, which waits a moment for a disk that is slow, and then goes on without deltas.

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
use crate::threads::content::{DeltaSelection, Nothing, Suspects};

/// What may be sent, as of one moment.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The question's.
    pub(super) number: u64,
    pub(super) generation: Generation,
    pub(super) at: Instant,
    pub(crate) deltas: Result<Vec<QueuedDelta>, Nothing>,
    /// Changed credentials.
    pub(crate) access: Option<Box<Credentials>>,
    /// The ini and the bundle do not exist.
    pub(crate) are_gone: bool,
}

/// The number of a batch that nobody asked for.
pub(super) const OFFERED: u64 = 0;

impl Batch {
    /// Without deltas, for what else a batch has.
    pub(super) fn nothing() -> Self {
        Self {
            number: OFFERED,
            generation: Generation::default(),
            at: Instant::now(),
            deltas: Err(Nothing::NotNow),
            access: None,
            are_gone: false,
        }
    }
}

/// What the outbox thread wakes the heartbeat thread for.
#[derive(Debug)]
pub(crate) enum OutboxEvent {
    /// There are new deltas that were not offered.
    Pushed,
    /// Somebody waits until all is sent.
    Flush,
}

/// The heartbeat thread's side of the outbox thread.
#[derive(Debug)]
pub(crate) struct Batches {
    client: Arc<OutboxClient>,
    pub(crate) news: Receiver<OutboxEvent>,
    /// Answers, and what was not asked for.
    pub(crate) answers: Receiver<Batch>,
    /// The question that was put last.
    asked: u64,
    /// It was for all that may be sent.
    was_for_all: bool,
    /// Its answer has not come yet, and nobody waits for it any more.
    is_overdue: bool,
    /// What may be sent, as of the last transaction, or of an answer that came late.
    at_hand: Option<Batch>,
    /// Something new was offered while an answer was waited for.
    has_news: bool,
}

impl Batches {
    pub(super) fn new(
        client: Arc<OutboxClient>,
        news: Receiver<OutboxEvent>,
        answers: Receiver<Batch>,
    ) -> Self {
        Self {
            client,
            news,
            answers,
            asked: 0,
            was_for_all: false,
            is_overdue: false,
            at_hand: None,
            has_news: false,
        }
    }

    /// A batch has come that nobody waited for. Whether there are deltas to send, new ones or because the disk answers again.
    pub(crate) fn came(&mut self, batch: Batch) -> bool {
        let (is_late, is_offer) =
            (self.is_overdue && batch.number == self.asked, batch.number == OFFERED);
        self.is_overdue &= !is_late;
        let has_deltas = batch.deltas.as_ref().is_ok_and(|deltas| !deltas.is_empty());
        if is_offer || is_late && self.was_for_all {
            self.keep(batch);
        }
        (is_late || is_offer) && has_deltas
    }

    /// Whether something new was offered during the last beat: its states may be older than that.
    pub(crate) fn take_news(&mut self) -> bool {
        mem::take(&mut self.has_news)
    }

    /// The newest one is at hand.
    fn keep(&mut self, batch: Batch) {
        let is_newer = self.at_hand.as_ref().is_none_or(|at_hand| at_hand.at <= batch.at);
        if is_newer && batch.deltas.is_ok() {
            self.at_hand = Some(batch);
        }
    }

    /// What is to be sent now, waited for so long. `None`: the disk does not answer.
    ///
    /// What is at hand is used as it is if it is fresh and nothing was changed since: other processes begin operations, too.
    /// Otherwise it is used only if the disk does not answer, without what is held back by now: where a disk is slow and
    /// threads push all the time, nothing would ever be sent.
    pub(crate) fn get(
        &mut self,
        share: DeltaSelection,
        suspects: &Arc<Suspects>,
        patience: Duration,
    ) -> Option<Batch> {
        let is_usable = |batch: &Batch| {
            let is_fresh = batch.at.elapsed() < limits::BATCH_FRESH;
            is_for_all(share, suspects) && is_fresh && batch.generation == self.client.generation()
        };
        if self.at_hand.as_ref().is_some_and(is_usable) {
            return self.at_hand.take();
        }
        let answer = if self.is_overdue { None } else { self.ask(share, suspects, patience) };
        let at_hand = self.at_hand.take();
        answer.or_else(|| self.free_of(at_hand?, share, suspects))
    }

    /// Waits for the answer, or for an offer that is as good. What else comes is kept. This thread may have come late to the
    /// answer, and deltas may have been kept since; so it asks once more then, but not for ever, as threads may push all the time.
    fn ask(
        &mut self,
        share: DeltaSelection,
        suspects: &Arc<Suspects>,
        patience: Duration,
    ) -> Option<Batch> {
        let until = Instant::now() + patience;
        let first = self.ask_once(share, suspects, until)?;
        if first.number == OFFERED || first.generation == self.client.generation() {
            return Some(first);
        }
        let Batch { access, .. } = first;
        let second = self.ask_once(share, suspects, until);
        let last =
            second.or_else(|| self.free_of(Batch { access: None, ..first }, share, suspects));
        let last = last.unwrap_or_else(Batch::nothing);
        Some(Batch { access: last.access.or(access), ..last })
    }

    fn ask_once(
        &mut self,
        share: DeltaSelection,
        suspects: &Arc<Suspects>,
        until: Instant,
    ) -> Option<Batch> {
        self.asked += 1;
        self.was_for_all = is_for_all(share, suspects);
        self.client.ask_for_batch(BatchRequest {
            number: self.asked,
            share,
            suspects: Arc::clone(suspects),
        });
        let mut access = None;
        while let Ok(mut batch) = self.answers.recv_deadline(until) {
            access = batch.access.take().or(access);
            let is_offer = batch.number == OFFERED && batch.deltas.is_ok();
            self.has_news |= is_offer;
            let is_good =
                is_offer && self.was_for_all && batch.generation == self.client.generation();
            if batch.number == self.asked || is_good {
                return Some(Batch { access, ..batch });
            }
            if is_offer {
                self.keep(batch);
            }
        }
        self.is_overdue = true;
        // Without an answer there may be changed credentials all the same.
        access.map(|access| Batch { access: Some(access), ..Batch::nothing() })
    }

    /// What may be sent of an older batch. An answer for some deltas alone is not at hand, so it has all that may be sent.
    fn free_of(
        &self,
        mut batch: Batch,
        share: DeltaSelection,
        suspects: &Suspects,
    ) -> Option<Batch> {
        let most = match share {
            DeltaSelection::Newest(most) => most,
            DeltaSelection::One => 1,
            DeltaSelection::None | DeltaSelection::Only(_) | DeltaSelection::Same(_) => {
                return None;
            }
        };
        let deltas = batch.deltas.as_mut().ok()?;
        if batch.at.elapsed() >= limits::BATCH_USABLE
            || !self.client.leave_free(batch.generation, deltas)
        {
            return None;
        }
        let held_back = suspects.held_back();
        deltas.retain(|kept| !held_back.contains(kept));
        deltas.truncate(most);
        Some(batch).filter(|batch| batch.deltas.as_ref().is_ok_and(|deltas| !deltas.is_empty()))
    }
}

/// A whole body, of all that may be sent: what is offered without a question.
fn is_for_all(share: DeltaSelection, suspects: &Suspects) -> bool {
    share == DeltaSelection::default() && suspects.is_empty()
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

    /// The heartbeat thread's side, and what an outbox thread has.
    fn parts() -> (Batches, Arc<RequestQueue>, Sender<Batch>) {
        let desk = Arc::new(RequestQueue::default());
        let (batches, answers) = unbounded();
        let (_, ended) = bounded(0);
        let client = Arc::new(OutboxClient::new(Arc::clone(&desk), Arc::default(), None, ended));
        (Batches::new(client, never(), answers), desk, batches)
    }

    fn batch(number: u64, generation: Generation) -> Batch {
        Batch {
            number,
            generation,
            at: Instant::now(),
            deltas: Ok(Vec::new()),
            access: None,
            are_gone: false,
        }
    }

    fn any(number: u64) -> Batch {
        batch(number, Generation::default())
    }

    fn get(batches: &mut Batches, patience: Duration) -> Option<u64> {
        batches.get(DeltaSelection::default(), &Arc::default(), patience).map(|batch| batch.number)
    }

    fn push() -> Request {
        let delta = LifecycleDelta::succeeded("d", Operation::Deploy);
        Request::NewRows(NewRows::Deltas(vec![delta], SentBy::Deliverer))
    }

    fn begin() -> Request {
        Request::NewRows(NewRows::Operation(Operation::Deploy, vec!["d".to_owned()]))
    }

    /// The numbers of the questions that are queued.
    fn questions(desk: &RequestQueue) -> Vec<u64> {
        let asked =
            if desk.queued() == 0 { Vec::new() } else { desk.next(0, None).unwrap().requests };
        let number = |request| match request {
            Request::Batch(question) => Some(question.number),
            _ => None,
        };
        asked.into_iter().filter_map(|(_, asked)| number(asked.request)).collect()
    }

    #[test]
    fn an_answer_that_is_overdue_is_not_waited_for_again() {
        let (mut batches, desk, answer) = parts();
        assert_eq!(get(&mut batches, SHORT), None);
        let since = Instant::now();
        assert_eq!((get(&mut batches, LONG), get(&mut batches, LONG)), (None, None));
        assert!(since.elapsed() < LONG);
        assert_eq!(questions(&desk), [1], "it is asked once");
        assert!(!batches.came(any(7)), "this one is another question's");
        assert!(!batches.came(any(1)), "there is nothing to send");
        assert_eq!(get(&mut batches, LONG), Some(1), "nothing has changed since");
        answer.send(any(2)).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(2));
        assert_eq!(questions(&desk), [2]);
        assert!(!batches.came(any(2)), "it came in time");
    }

    #[test]
    fn what_is_offered_calls_for_a_beat_even_if_a_beat_just_waits_for_another_answer() {
        let (mut batches, desk, answer) = parts();
        let kept = QueuedDelta { id: 1, delta: LifecycleDelta::succeeded("d", Operation::Deploy) };
        let offer = |desk: &RequestQueue| Batch {
            deltas: Ok(vec![kept.clone()]),
            ..batch(OFFERED, desk.generation())
        };
        assert!(batches.came(offer(&desk)));
        assert!(!batches.came(batch(OFFERED, desk.generation())), "there is nothing in it");
        assert!(!batches.take_news());
        desk.tell(push());
        answer.send(offer(&RequestQueue::default())).unwrap();
        answer.send(batch(1, desk.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(1), "the offer is out of date");
        assert!(batches.take_news() && !batches.take_news());
    }

    #[test]
    fn what_was_offered_is_used_once_and_only_while_no_row_has_changed() {
        let (mut batches, desk, answer) = parts();
        batches.came(batch(0, desk.generation()));
        assert_eq!(get(&mut batches, LONG), Some(0));
        answer.send(batch(1, desk.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(1), "it is used up");
        assert_eq!(questions(&desk), [1]);

        batches.came(batch(0, desk.generation()));
        desk.tell(push());
        answer.send(batch(2, desk.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(2), "rows are to be changed");

        let old = Instant::now().checked_sub(limits::BATCH_FRESH).unwrap();
        batches.came(Batch { at: old, ..batch(0, desk.generation()) });
        answer.send(batch(3, desk.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(3), "another process may have begun an operation");

        batches.came(batch(0, desk.generation()));
        answer.send(batch(4, desk.generation())).unwrap();
        let one = batches.get(DeltaSelection::One, &Arc::default(), LONG).unwrap();
        assert_eq!(one.number, 4, "it was looked for with another question");
    }

    #[test]
    fn an_answer_that_is_older_than_a_push_is_asked_for_once_more_and_no_more() {
        for pushes in 1..3 {
            let (mut batches, desk, answer) = parts();
            let before = desk.generation();
            desk.tell(push());
            answer.send(batch(1, before)).unwrap();
            answer.send(batch(2, if pushes == 1 { desk.generation() } else { before })).unwrap();
            assert_eq!((get(&mut batches, LONG), questions(&desk)), (Some(2), vec![1, 2]));
        }
    }

    #[test]
    fn an_offer_ends_the_waiting_only_if_it_is_of_now_and_for_all() {
        let (mut batches, desk, answer) = parts();
        let before = desk.generation();
        desk.tell(push());
        answer.send(batch(0, before)).unwrap();
        answer.send(batch(0, desk.generation())).unwrap();
        assert_eq!(get(&mut batches, LONG), Some(0));
        // The answer that was not needed is not the next one's.
        answer.send(any(1)).unwrap();
        answer.send(batch(0, desk.generation())).unwrap();
        answer.send(batch(2, desk.generation())).unwrap();
        let one = batches.get(DeltaSelection::One, &Arc::default(), LONG).unwrap();
        assert_eq!((one.number, questions(&desk)), (2, vec![1, 2]));
    }

    /// The ids of what may be sent.
    fn sent(batches: &mut Batches, share: DeltaSelection, suspects: &Arc<Suspects>) -> Vec<i64> {
        let batch = batches.get(share, suspects, Duration::from_millis(1));
        batch
            .map(|batch| batch.deltas.unwrap().into_iter().map(|kept| kept.id).collect())
            .unwrap_or_default()
    }

    fn two(desk: &RequestQueue, at: Instant) -> Batch {
        let kept = |(id, decky)| QueuedDelta {
            id,
            delta: LifecycleDelta::succeeded(decky, Operation::Deploy),
        };
        let deltas = Ok([(2, "e"), (1, "d")].map(kept).to_vec());
        Batch { deltas, at, ..batch(1, desk.generation()) }
    }

    fn offered(batch: Batch) -> Batch {
        Batch { number: OFFERED, ..batch }
    }

    #[test]
    fn where_the_disk_is_slow_an_older_batch_is_used_though_deltas_were_pushed_without_what_an_operation_holds_back()
     {
        for (change, expected) in [(push(), vec![2, 1]), (begin(), vec![2])] {
            let (mut batches, desk, _answer) = parts();
            assert_eq!(get(&mut batches, SHORT), None);
            // The snapshot took its time.
            let at = Instant::now().checked_sub(limits::BATCH_FRESH * 10).unwrap();
            assert!(batches.came(two(&desk, at)));
            desk.tell(change);
            assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), expected);
            let too_old = Instant::now().checked_sub(limits::BATCH_USABLE).unwrap();
            batches.came(offered(two(&desk, too_old)));
            assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), [0; 0]);
        }
    }

    #[test]
    fn where_the_disk_is_slow_deltas_are_sent_alone_too() {
        let (mut batches, desk, _answer) = parts();
        batches.came(offered(two(&desk, Instant::now())));
        assert_eq!(sent(&mut batches, DeltaSelection::One, &Arc::default()), [2]);
        batches.came(offered(two(&desk, Instant::now())));
    }

    #[test]
    fn of_two_batches_the_newer_one_is_used() {
        let (mut batches, desk, _answer) = parts();
        let older = any(0);
        batches.came(offered(two(&desk, Instant::now())));
        batches.came(older);
        assert_eq!(sent(&mut batches, DeltaSelection::default(), &Arc::default()), [2, 1]);
    }
}
