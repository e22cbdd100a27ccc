//! Requests of the outbox thread: each is queued, then taken, then answered. A value; it blocks on nothing, and the time
//! is its caller's matter.
//!
//! | state | what has become of it | if the caller gives up |
//! | --- | --- | --- |
//! | queued | nothing | it is withdrawn: nothing was kept, and asking again is right |
//! | taken | it is in the transaction that is being written | it is *in doubt*: it may be kept, and asking again may do it twice |
//! | answered | it is kept, or the outbox has said why not | too late: the answer is there |
//!
//! - Requests are taken in the order in which they were queued, as many as fit into one transaction: at most so many
//!   rows, and at least one request, however large.
//! - What must not be lost (an operation's end, an acknowledgement) cannot be withdrawn, and the queue always has room for
//!   it. There are no more of these than rows in the outbox. If its caller gives up it is in doubt.
//! - The *generation* is another one after each request that changes rows. What was read in one generation is not all that
//!   there is in another.

use std::collections::{HashSet, VecDeque};

/// One request, among all of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) u64);

/// What has become of a request whose caller has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GivenUp<P> {
    /// It was still in the queue; here is what it asked for.
    Withdrawn(P),
    /// It was taken, or cannot be withdrawn: it will be done when the disk answers.
    InDoubt,
    /// It has its answer, or was never there.
    Answered,
}

/// How many changes were asked for, ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Generation(pub(crate) u64);

/// Requests for one transaction.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken<P> {
    pub(crate) requests: Vec<(Ticket, P)>,
    /// What is read after their transaction is of this generation.
    pub(crate) generation: Generation,
}

#[derive(Debug)]
struct Entry<P> {
    ticket: Ticket,
    /// So many rows are to be changed.
    rows: usize,
    payload: P,
    /// Somebody waits for the answer.
    is_awaited: bool,
    can_be_withdrawn: bool,
}

/// The queue, and which requests are taken.
#[derive(Debug)]
pub(crate) struct Requests<P> {
    queued: VecDeque<Entry<P>>,
    /// Of the queued ones, those that can be withdrawn.
    asked: usize,
    /// Taken, and their callers still wait.
    taken: HashSet<Ticket>,
    most: usize,
    generation: Generation,
    next: u64,
}

impl<P> Requests<P> {
    /// Holds at most `most` requests that can be withdrawn.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            queued: VecDeque::new(),
            asked: 0,
            taken: HashSet::new(),
            most,
            generation: Generation::default(),
            next: 0,
        }
    }

    /// Queues a request whose caller waits for the answer and may withdraw it. `Err`: there is no
    /// room, and it comes back.
    pub(crate) fn ask(&mut self, rows: usize, payload: P) -> Result<Ticket, P> {
        if self.asked == self.most {
            return Err(payload);
        }
        self.asked += 1;
        Ok(self.queue(rows, payload, true, true))
    }

    /// Queues what cannot be withdrawn.
    pub(crate) fn tell(&mut self, rows: usize, payload: P, is_awaited: bool) -> Ticket {
        self.queue(rows, payload, is_awaited, false)
    }

    fn queue(
        &mut self,
        rows: usize,
        payload: P,
        is_awaited: bool,
        can_be_withdrawn: bool,
    ) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.generation.0 += u64::from(rows > 0);
        self.queued.push_back(Entry { ticket, rows, payload, is_awaited, can_be_withdrawn });
        ticket
    }

    /// How many are in the queue.
    pub(crate) fn len(&self) -> usize {
        self.queued.len()
    }

    /// The generation as of now.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes the oldest requests, of at most so many rows together; one that alone has more is taken alone.
    pub(crate) fn take(&mut self, most_rows: usize) -> Taken<P> {
        let mut rows = 0;
        let fits = |entry: &&Entry<P>| {
            rows += entry.rows;
            rows <= most_rows
        };
        let count = self.queued.iter().take_while(fits).count().max(1).min(self.queued.len());
        let entries: Vec<_> = self.queued.drain(..count).collect();
        self.asked -= entries.iter().filter(|entry| entry.can_be_withdrawn).count();
        self.taken
            .extend(entries.iter().filter(|entry| entry.is_awaited).map(|entry| entry.ticket));
        let requests = entries.into_iter().map(|entry| (entry.ticket, entry.payload)).collect();
        // What is still in the queue is not in what is read next.
        let later = self.queued.iter().filter(|entry| entry.rows > 0).count() as u64;
        Taken { requests, generation: Generation(self.generation.0 - later) }
    }

    /// The answer is there. Whether its caller still waits for it.
    pub(crate) fn answer(&mut self, ticket: Ticket) -> bool {
        self.taken.remove(&ticket)
    }

    /// The caller waits no longer.
    pub(crate) fn give_up(&mut self, ticket: Ticket) -> GivenUp<P> {
        if self.taken.remove(&ticket) {
            return GivenUp::InDoubt;
        }
        let Some(place) = self.queued.iter().position(|entry| entry.ticket == ticket) else {
            return GivenUp::Answered;
        };
        match self.queued.get_mut(place) {
            Some(entry) if !entry.can_be_withdrawn => {
                if std::mem::take(&mut entry.is_awaited) {
                    GivenUp::InDoubt
                } else {
                    GivenUp::Answered
                }
            }
            _ => {
                self.asked -= 1;
                self.queued
                    .remove(place)
                    .map_or(GivenUp::Answered, |entry| GivenUp::Withdrawn(entry.payload))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const MOST: usize = 4;

    fn queue(rows: &[usize]) -> Requests<usize> {
        let mut requests = Requests::new(MOST);
        for (n, rows) in rows.iter().enumerate() {
            requests.ask(*rows, n).unwrap();
        }
        requests
    }

    #[test]
    fn what_is_queued_is_withdrawn_and_what_is_taken_is_in_doubt() {
        let mut requests = queue(&[1, 1, 1]);
        assert_eq!(requests.give_up(Ticket(1)), GivenUp::Withdrawn(1));
        assert_eq!(requests.take(10).requests, [(Ticket(0), 0), (Ticket(2), 2)]);
        assert_eq!(requests.give_up(Ticket(0)), GivenUp::InDoubt);
        assert_eq!((requests.answer(Ticket(0)), requests.answer(Ticket(2))), (false, true));
        assert_eq!(requests.give_up(Ticket(2)), GivenUp::Answered);
    }

    #[test]
    fn one_transaction_has_its_rows_and_at_least_one_request() {
        let mut requests = queue(&[600, 400, 1, 5_000]);
        let mut taken =
            || requests.take(1_000).requests.into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!([taken(), taken(), taken(), taken()], [vec![0, 1], vec![2], vec![3], vec![]]);
    }

    #[test]
    fn the_queue_is_bounded_but_for_what_cannot_be_withdrawn() {
        let mut requests = queue(&[1; MOST]);
        assert_eq!(requests.ask(1, 9), Err(9));
        let [told, awaited] = [false, true].map(|is_awaited| requests.tell(1, 10, is_awaited));
        assert_eq!(requests.len(), MOST + 2);
        assert_eq!(requests.give_up(told), GivenUp::Answered);
        assert_eq!(requests.give_up(awaited), GivenUp::InDoubt);
        assert_eq!(requests.give_up(awaited), GivenUp::Answered);
        requests.give_up(Ticket(0));
        requests.ask(1, 9).unwrap();
    }

    #[test]
    fn what_was_read_is_of_another_generation_once_rows_are_to_be_changed() {
        let mut requests = queue(&[1, 0]);
        let read = requests.take(10).generation;
        assert_eq!(requests.generation(), read);
        requests.ask(0, 2).unwrap();
        assert_eq!(requests.generation(), read, "a question changes nothing");
        requests.tell(1, 3, false);
        let pushed = requests.generation();
        assert!(pushed > read);
        requests.tell(1_000, 4, false);
        assert_eq!(requests.take(10).generation, pushed, "one is still queued");
        let last = requests.take(10).generation;
        assert!(last == requests.generation() && last > pushed);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask(usize),
        Tell(usize, bool),
        Take(usize),
        Answer,
        GiveUp(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..9usize).prop_map(Step::Ask),
            (0..9usize, any::<bool>()).prop_map(|(rows, is_awaited)| Step::Tell(rows, is_awaited)),
            (0..12usize).prop_map(Step::Take),
            Just(Step::Answer),
            (0..40u64).prop_map(Step::GiveUp),
        ];
        proptest::collection::vec(step, 0..60)
    }

    /// What a request was made as.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Made {
        ticket: Ticket,
        rows: usize,
        is_awaited: bool,
        is_asked: bool,
    }

    proptest! {
        /// Each request is taken once or withdrawn once, in the order in which it came, its caller hears one thing, and what
        /// is read after it was taken is of the latest generation only if no change is queued.
        #[test]
        fn a_request_ends_once_whatever_happens(steps in steps()) {
            let mut requests = Requests::new(MOST);
            let (mut queued, mut taken) = (Vec::<Made>::new(), Vec::<Made>::new());
            let mut said = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Ask(rows) => {
                        let asked = queued.iter().filter(|made| made.is_asked).count();
                        let ticket = requests.ask(rows, rows);
                        prop_assert_eq!(ticket.is_ok(), asked < MOST);
                        queued.extend(ticket.map(|ticket| Made { ticket, rows, is_awaited: true, is_asked: true }));
                    }
                    Step::Tell(rows, is_awaited) => {
                        let ticket = requests.tell(rows, rows, is_awaited);
                        queued.push(Made { ticket, rows, is_awaited, is_asked: false });
                    }
                    Step::Take(most) => {
                        let got = requests.take(most);
                        prop_assert_eq!(got.requests.is_empty(), queued.is_empty());
                        let expected: Vec<_> = queued.drain(..got.requests.len()).collect();
                        prop_assert!(got.requests.iter().map(|(it, _)| *it).eq(expected.iter().map(|made| made.ticket)));
                        taken.extend(expected);
                        let (then, now) = (got.generation, requests.generation());
                        prop_assert!(then <= now);
                        prop_assert_eq!(then == now, !queued.iter().any(|made| made.rows > 0));
                    }
                    Step::Answer => {
                        let Some(made) = taken.pop() else { continue };
                        let waits = made.is_awaited && !said.contains_key(&made.ticket);
                        prop_assert_eq!(requests.answer(made.ticket), waits);
                        said.entry(made.ticket).or_insert("answered");
                    }
                    Step::GiveUp(ticket) => match requests.give_up(Ticket(ticket)) {
                        GivenUp::Withdrawn(_) => {
                            prop_assert!(queued.iter().any(|made| made.ticket == Ticket(ticket) && made.is_asked));
                            queued.retain(|made| made.ticket != Ticket(ticket));
                            prop_assert!(said.insert(Ticket(ticket), "withdrawn").is_none());
                        }
                        GivenUp::InDoubt => {
                            let mut made = taken.iter().chain(&queued);
                            prop_assert!(made.any(|made| made.ticket == Ticket(ticket) && made.is_awaited));
                            prop_assert!(said.insert(Ticket(ticket), "in doubt").is_none());
                        }
                        GivenUp::Answered => {
                            prop_assert!(!queued.iter().any(|made| made.ticket == Ticket(ticket) && made.is_asked));
                        }
                    },
                }
                prop_assert_eq!(requests.len(), queued.len());
            }
        }
    }
}
