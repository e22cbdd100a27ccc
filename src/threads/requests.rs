//! The state of each request to the outbox thread: queued, then taken, then answered. A value: it
//! never blocks and reads no clock.
//!
//! | state | what has happened | if the caller gives up |
//! | --- | --- | --- |
//! | queued | nothing | it is withdrawn: nothing was done, and the caller may request it again |
//! | taken | it is part of the transaction that is being written | it is *in doubt*: it may be done, and requesting it again may do it twice |
//! | answered | it is done, or the outbox has returned an error | too late: the answer is there |
//!
//! - Requests are taken in the order in which they were queued, as many as fit into one
//!   transaction: up to a number of rows, and at least one request, however large.
//! - A request that must not be lost (the end of an operation, an acknowledgement) cannot be
//!   withdrawn, and the queue always has room for it. Their number is bounded by the rows of the
//!   outbox. If the caller gives up, such a request is in doubt.
//! - The *generation* advances with each request that changes rows. What was read in one generation
//!   may be incomplete in the next.

use std::collections::{HashSet, VecDeque};

/// Identifies a request within this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) u64);

/// What has become of a request whose caller has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GivenUp<P> {
    /// It was queued, and its payload is returned.
    Withdrawn(P),
    /// It was taken, or cannot be withdrawn: it will be done when the disk answers.
    InDoubt,
    /// It was answered before, or never existed.
    Answered,
}

/// The number of row changes that were requested so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Generation(pub(crate) u64);

/// The requests of one transaction.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken<P> {
    pub(crate) requests: Vec<(Ticket, P)>,
    /// The generation of what is read after their transaction.
    pub(crate) generation: Generation,
}

#[derive(Debug)]
struct Entry<P> {
    ticket: Ticket,
    /// The number of rows that it changes.
    rows: usize,
    payload: P,
    caller: CallerState,
}

/// What the caller of a queued request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallerState {
    /// It waits for the answer, and may withdraw the request.
    CanWithdraw,
    /// It waits for the answer. The request cannot be withdrawn.
    Waits,
    /// It does not wait. The request cannot be withdrawn.
    DoesNotWait,
}

/// The queued requests, and the tickets of the taken ones.
#[derive(Debug)]
pub(crate) struct Requests<P> {
    queued: VecDeque<Entry<P>>,
    /// The number of queued requests that can be withdrawn.
    withdrawable: usize,
    /// The taken requests whose callers wait.
    taken: HashSet<Ticket>,
    /// The limit of `withdrawable`.
    capacity: usize,
    generation: Generation,
    next_ticket: u64,
}

impl<P> Requests<P> {
    /// Holds at most `capacity` requests that can be withdrawn.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            queued: VecDeque::new(),
            withdrawable: 0,
            taken: HashSet::new(),
            capacity,
            generation: Generation::default(),
            next_ticket: 0,
        }
    }

    /// Queues a request. If it can be withdrawn and the queue is full, the payload is returned as
    /// the error.
    pub(crate) fn enqueue(
        &mut self,
        rows: usize,
        payload: P,
        caller: CallerState,
    ) -> Result<Ticket, P> {
        if caller == CallerState::CanWithdraw {
            if self.withdrawable == self.capacity {
                return Err(payload);
            }
            self.withdrawable += 1;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.generation.0 += u64::from(rows > 0);
        self.queued.push_back(Entry { ticket, rows, payload, caller });
        Ok(ticket)
    }

    /// The number of queued requests.
    pub(crate) fn len(&self) -> usize {
        self.queued.len()
    }

    /// The current generation.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes the oldest requests, up to `max_rows` rows in total. A request with more rows is taken
    /// alone.
    pub(crate) fn take(&mut self, max_rows: usize) -> Taken<P> {
        let mut rows = 0;
        let fits = |entry: &&Entry<P>| {
            rows += entry.rows;
            rows <= max_rows
        };
        let count = self.queued.iter().take_while(fits).count().max(1).min(self.queued.len());
        let entries: Vec<_> = self.queued.drain(..count).collect();
        let is_withdrawable = |entry: &&Entry<P>| entry.caller == CallerState::CanWithdraw;
        self.withdrawable -= entries.iter().filter(is_withdrawable).count();
        let awaited = entries.iter().filter(|entry| entry.caller != CallerState::DoesNotWait);
        self.taken.extend(awaited.map(|entry| entry.ticket));
        let requests = entries.into_iter().map(|entry| (entry.ticket, entry.payload)).collect();
        // What is read next does not include the changes that are still queued.
        let later = self.queued.iter().filter(|entry| entry.rows > 0).count() as u64;
        Taken { requests, generation: Generation(self.generation.0 - later) }
    }

    /// Records that a request was answered. Returns whether its caller still waits.
    pub(crate) fn answer(&mut self, ticket: Ticket) -> bool {
        self.taken.remove(&ticket)
    }

    /// Records that the caller no longer waits.
    pub(crate) fn give_up(&mut self, ticket: Ticket) -> GivenUp<P> {
        if self.taken.remove(&ticket) {
            return GivenUp::InDoubt;
        }
        let Some(place) = self.queued.iter().position(|entry| entry.ticket == ticket) else {
            return GivenUp::Answered;
        };
        match self.queued.get_mut(place).map(|entry| &mut entry.caller) {
            Some(caller @ CallerState::Waits) => {
                *caller = CallerState::DoesNotWait;
                GivenUp::InDoubt
            }
            Some(CallerState::CanWithdraw) => {
                self.withdrawable -= 1;
                let entry = self.queued.remove(place);
                entry.map_or(GivenUp::Answered, |entry| GivenUp::Withdrawn(entry.payload))
            }
            Some(CallerState::DoesNotWait) | None => GivenUp::Answered,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const CAPACITY: usize = 4;

    fn queue(rows: &[usize]) -> Requests<usize> {
        let mut requests = Requests::new(CAPACITY);
        for (n, rows) in rows.iter().enumerate() {
            requests.enqueue(*rows, n, CallerState::CanWithdraw).unwrap();
        }
        requests
    }

    #[test]
    fn queued_request_is_withdrawn_and_taken_one_is_in_doubt() {
        let mut requests = queue(&[1, 1, 1]);
        assert_eq!(requests.give_up(Ticket(1)), GivenUp::Withdrawn(1));
        assert_eq!(requests.take(10).requests, [(Ticket(0), 0), (Ticket(2), 2)]);
        assert_eq!(requests.give_up(Ticket(0)), GivenUp::InDoubt);
        assert_eq!((requests.answer(Ticket(0)), requests.answer(Ticket(2))), (false, true));
        assert_eq!(requests.give_up(Ticket(2)), GivenUp::Answered);
    }

    #[test]
    fn transaction_is_bounded_in_rows_and_has_at_least_one_request() {
        let mut requests = queue(&[600, 400, 1, 5_000]);
        let mut taken =
            || requests.take(1_000).requests.into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!([taken(), taken(), taken(), taken()], [vec![0, 1], vec![2], vec![3], vec![]]);
    }

    #[test]
    fn only_requests_that_can_be_withdrawn_are_bounded() {
        let mut requests = queue(&[1; CAPACITY]);
        assert_eq!(requests.enqueue(1, 9, CallerState::CanWithdraw), Err(9));
        let not_awaited = requests.enqueue(1, 10, CallerState::DoesNotWait).unwrap();
        let awaited = requests.enqueue(1, 10, CallerState::Waits).unwrap();
        assert_eq!(requests.len(), CAPACITY + 2);
        assert_eq!(requests.give_up(not_awaited), GivenUp::Answered);
        assert_eq!(requests.give_up(awaited), GivenUp::InDoubt);
        assert_eq!(requests.give_up(awaited), GivenUp::Answered);
        requests.give_up(Ticket(0));
        requests.enqueue(1, 9, CallerState::CanWithdraw).unwrap();
    }

    #[test]
    fn row_change_advances_the_generation() {
        let mut requests = queue(&[1, 0]);
        let read = requests.take(10).generation;
        assert_eq!(requests.generation(), read);
        requests.enqueue(0, 2, CallerState::CanWithdraw).unwrap();
        assert_eq!(requests.generation(), read, "a request that only reads");
        requests.enqueue(1, 3, CallerState::DoesNotWait).unwrap();
        let pushed = requests.generation();
        assert!(pushed > read);
        requests.enqueue(1_000, 4, CallerState::DoesNotWait).unwrap();
        assert_eq!(requests.take(10).generation, pushed, "one is still queued");
        let last = requests.take(10).generation;
        assert!(last == requests.generation() && last > pushed);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Enqueue(usize),
        EnqueuePermanently(usize, bool),
        Take(usize),
        Answer,
        GiveUp(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..9usize).prop_map(Step::Enqueue),
            (0..9usize, any::<bool>())
                .prop_map(|(rows, is_awaited)| Step::EnqueuePermanently(rows, is_awaited)),
            (0..12usize).prop_map(Step::Take),
            Just(Step::Answer),
            (0..40u64).prop_map(Step::GiveUp),
        ];
        proptest::collection::vec(step, 0..60)
    }

    /// A request and how it was enqueued.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Enqueued {
        ticket: Ticket,
        rows: usize,
        is_awaited: bool,
        can_be_withdrawn: bool,
    }

    proptest! {
        /// Each request is taken once, in the order of the queue, or withdrawn once. Its caller
        /// receives one result. What is read after a transaction has the current generation if
        /// and only if no change is queued.
        #[test]
        fn each_request_ends_exactly_once(steps in steps()) {
            let mut requests = Requests::new(CAPACITY);
            let mut queued = Vec::<Enqueued>::new();
            let mut taken = Vec::<Enqueued>::new();
            let mut results = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Enqueue(rows) => {
                        let withdrawable = queued.iter().filter(|request| request.can_be_withdrawn).count();
                        let ticket = requests.enqueue(rows, rows, CallerState::CanWithdraw);
                        prop_assert_eq!(ticket.is_ok(), withdrawable < CAPACITY);
                        queued.extend(ticket.map(|ticket| Enqueued { ticket, rows, is_awaited: true, can_be_withdrawn: true }));
                    }
                    Step::EnqueuePermanently(rows, is_awaited) => {
                        let caller =
                            if is_awaited { CallerState::Waits } else { CallerState::DoesNotWait };
                        let ticket = requests.enqueue(rows, rows, caller).unwrap();
                        queued.push(Enqueued { ticket, rows, is_awaited, can_be_withdrawn: false });
                    }
                    Step::Take(most) => {
                        let got = requests.take(most);
                        prop_assert_eq!(got.requests.is_empty(), queued.is_empty());
                        let expected: Vec<_> = queued.drain(..got.requests.len()).collect();
                        prop_assert!(got.requests.iter().map(|(it, _)| *it).eq(expected.iter().map(|request| request.ticket)));
                        taken.extend(expected);
                        let then = got.generation;
                        let now = requests.generation();
                        prop_assert!(then <= now);
                        prop_assert_eq!(then == now, !queued.iter().any(|request| request.rows > 0));
                    }
                    Step::Answer => {
                        let Some(request) = taken.pop() else { continue };
                        let waits = request.is_awaited && !results.contains_key(&request.ticket);
                        prop_assert_eq!(requests.answer(request.ticket), waits);
                        results.entry(request.ticket).or_insert("answered");
                    }
                    Step::GiveUp(ticket) => match requests.give_up(Ticket(ticket)) {
                        GivenUp::Withdrawn(_) => {
                            prop_assert!(queued.iter().any(|request| request.ticket == Ticket(ticket) && request.can_be_withdrawn));
                            queued.retain(|request| request.ticket != Ticket(ticket));
                            prop_assert!(results.insert(Ticket(ticket), "withdrawn").is_none());
                        }
                        GivenUp::InDoubt => {
                            let mut request = taken.iter().chain(&queued);
                            prop_assert!(request.any(|request| request.ticket == Ticket(ticket) && request.is_awaited));
                            prop_assert!(results.insert(Ticket(ticket), "in doubt").is_none());
                        }
                        GivenUp::Answered => {
                            prop_assert!(!queued.iter().any(|request| request.ticket == Ticket(ticket) && request.can_be_withdrawn));
                        }
                    },
                }
                prop_assert_eq!(requests.len(), queued.len());
            }
        }
    }
}
