//! The outbox thread: it owns the agent dir, which is the outbox, the ini and the bundle, and is the only thread that waits
//! for its disk. All that is queued when it comes round goes into one transaction.

use std::iter::repeat_with;
use std::mem;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::batches::{Batch, News, OFFERED};
use super::desk::{Answer, Asked, Desk, Question, Request, Waiter};
use super::requests::{Generation, Taken, Ticket};
use crate::content::{Nothing, Share};
use crate::credentials::Credentials;
use crate::error::{Error, chain};
use crate::limits;
use crate::outbox::{Add, Change, Committed, Kept, Outbox, deadline};
use crate::panics::{caught, quietly};
use crate::repeats::Repeats;
use crate::stats::SharedStats;

/// What the thread does for the heartbeat thread.
#[derive(Debug)]
pub(super) struct Heartbeat {
    pub(super) credentials: Credentials,
    /// The credentials' files do not exist, as of the last look.
    pub(super) are_gone: bool,
    /// Full: the heartbeat thread has been told already.
    pub(super) news: Sender<News>,
    /// Answers and offers. It needs no bound of its own: questions have an answer each, and offers stop while some are unread.
    pub(super) answers: Sender<Batch>,
}

#[derive(Debug)]
pub(super) struct OutboxThread {
    desk: Arc<Desk>,
    outbox: Outbox,
    /// `None`: the program adds to the outbox, or the heartbeat has stopped.
    heartbeat: Option<Heartbeat>,
    has_stopped: bool,
    /// Who waits until what was there up to an id is sent.
    flushes: Vec<(i64, Ticket, Waiter)>,
    repeats: Repeats,
}

/// What goes into one transaction.
#[derive(Debug, Default)]
struct Group {
    adds: Vec<Add>,
    adding: Vec<(Ticket, Waiter)>,
    changing: Vec<(Ticket, Waiter)>,
    /// So many acknowledged or rejected deltas.
    settled: u64,
    is_urgent: bool,
}

impl OutboxThread {
    pub(super) fn new(desk: Arc<Desk>, outbox: Outbox, heartbeat: Option<Heartbeat>) -> Self {
        let (flushes, repeats) = (Vec::new(), Repeats::default());
        Self { desk, outbox, heartbeat, has_stopped: false, flushes, repeats }
    }

    /// Ends with the last one who may ask for something.
    pub(super) fn run(mut self, stats: Option<&SharedStats>) {
        let mut last = 0;
        // While it owns rows, a process without a heartbeat looks after them, too.
        while let Some(taken) = self.desk.next(last, self.outbox.is_named().then_some(limits::OUTBOX_LOOK)) {
            // An acknowledgement brings nobody back.
            last = taken.requests.iter().filter(|(_, asked)| asked.waiter.until.is_some()).count();
            if let Err(said) = caught(|| self.serve(taken)) {
                if let Some(stats) = stats {
                    stats.change(|stats| stats.panics += 1);
                }
                if let Some(times) = self.repeats.count("outbox", &said, Instant::now()) {
                    quietly(|| log::error!("the outbox thread panicked, going on: times={times} panic={said:?}"));
                }
            }
        }
    }

    /// Changes first, all in one transaction. What is read is of after them.
    fn serve(&mut self, taken: Taken<Asked>) {
        self.outbox.mend_index();
        if taken.requests.is_empty() {
            return self.outbox.look_after_rows();
        }
        let (mut group, mut others) = (Group::default(), Vec::new());
        for (ticket, Asked { request, is_urgent, waiter }) in taken.requests {
            group.is_urgent |= is_urgent;
            match request {
                Request::Add(add) => {
                    group.adds.push(add);
                    group.adding.push((ticket, waiter));
                }
                Request::Change(change) => {
                    group.settled += change.settled();
                    self.outbox.note(change);
                    group.changing.push((ticket, waiter));
                }
                other => others.push((ticket, waiter, other)),
            }
        }
        if !(group.adding.is_empty() && group.changing.is_empty()) {
            self.write(group, taken.generation);
        }
        for (ticket, waiter, request) in others {
            self.do_other(ticket, waiter, request, taken.generation);
        }
        self.answer_flushes();
    }

    fn write(&mut self, group: Group, generation: Generation) {
        let Group { mut adds, adding, changing, settled, is_urgent } = group;
        let is_refused = self.has_stopped && self.outbox.is_dead();
        if is_refused {
            adds.clear();
        }
        // Whoever waits for another process' lock hears of it before he gives up.
        let untils = adding.iter().chain(&changing).filter_map(|(_, waiter)| waiter.until);
        let by = untils.min().and_then(|until| until.checked_sub(limits::OUTBOX_MARGIN)).unwrap_or_else(deadline);
        let since = Instant::now();
        let Committed { added, changed } = self.outbox.commit(&adds, by);
        let (is_slow, is_written) = (since.elapsed() > limits::BATCH_FRESH, changed.is_ok());
        if is_urgent && is_written {
            let new = self.outbox.just_added(&adds, &added);
            self.offer(new, generation, is_slow);
        }
        let added = added.into_iter().chain(repeat_with(stopped)).take(adding.len());
        let answers = adding.into_iter().zip(added).map(|((ticket, waiter), added)| (ticket, waiter, added));
        self.answer_added(&adds, answers.collect());
        let problem = if is_refused { stopped().map(drop) } else { changed };
        self.answer_changed(changing, settled, problem);
        // What the file has refused is tried again before it is offered, and nobody waits for that.
        if is_urgent && !is_written {
            self.offer(None, generation, is_slow);
        }
        self.outbox.look_again();
        if is_urgent {
            self.send_changed_credentials();
        }
    }

    /// The rows of an operation that its caller does not know of are removed again.
    fn answer_added(&self, adds: &[Add], answers: Vec<(Ticket, Waiter, Answer)>) {
        let firsts: Vec<_> = answers.iter().map(|(.., added)| added.as_ref().ok().copied()).collect();
        for ((is_heard, first), add) in self.desk.answer(answers).into_iter().zip(firsts).zip(adds) {
            if let (false, Some(first), Add::Operation(_, deckies)) = (is_heard, first, add) {
                let rows = first..first + deckies.len() as i64;
                self.desk.tell(Request::Change(Change::Withdrawn(rows)));
            }
        }
    }

    fn answer_changed(&mut self, changing: Vec<(Ticket, Waiter)>, settled: u64, changed: Result<(), Error>) {
        let problem = changed.err().map(|error| chain(&error));
        if let Some(problem) = problem.as_ref().filter(|_| settled > 0)
            && let Some(times) = self.repeats.count("settle", problem, Instant::now())
        {
            quietly(|| log::error!("after a restart a delta may be sent again: times={times} error={problem:?}"));
        }
        let answer =
            || problem.as_ref().map_or(Ok(0), |problem| Err(self.outbox.error(NOT_WRITTEN).because(problem.clone())));
        self.desk.answer(changing.into_iter().map(|(ticket, waiter)| (ticket, waiter, answer())).collect());
    }

    fn do_other(&mut self, ticket: Ticket, waiter: Waiter, request: Request, generation: Generation) {
        let answer = match request {
            Request::Add(_) | Request::Change(_) => return,
            Request::Tend => return self.tend(),
            Request::Batch(question) => return self.send_batch(&question, generation),
            Request::Flush => {
                // An outbox that cannot be read has nothing that could be waited for.
                self.flushes.push((self.outbox.newest().unwrap_or_default(), ticket, waiter));
                self.answer_flushes();
                if !self.flushes.is_empty() {
                    self.wake(News::Flush);
                }
                return;
            }
            Request::Release => {
                (self.has_stopped, self.heartbeat) = (true, None);
                self.outbox.stop_delivering().map(|()| 0)
            }
            #[cfg(feature = "cli")]
            Request::IsOvertaken(kept) => self.outbox.is_overtaken(&kept).map(i64::from),
        };
        self.desk.answer(vec![(ticket, waiter, answer)]);
    }

    fn tend(&mut self) {
        let Some(heartbeat) = &mut self.heartbeat else { return };
        heartbeat.are_gone = heartbeat.credentials.are_gone();
        if let Err(error) = self.outbox.tend() {
            quietly(|| log::debug!("the outbox is as it was: error={:?}", chain(&error)));
        }
    }

    fn wake(&self, news: News) {
        // Full: it has been told already. It may have ended.
        let _ = self.heartbeat.as_ref().map(|heartbeat| heartbeat.news.try_send(news));
    }

    /// New deltas are to be sent, unless all are held back. Where few wait the heartbeat thread need not ask for them. If the disk
    /// `is_slow` it has all that fit into a body, as an answer would come too late.
    fn offer(&mut self, new: Option<Vec<Kept>>, generation: Generation, is_slow: bool) {
        let Some(unread) = self.heartbeat.as_ref().map(|heartbeat| heartbeat.answers.len()) else { return };
        let batch = if let Some(new) = new {
            Some(self.batch_of(Ok(new), generation))
        } else if is_slow || self.outbox.waiting() <= limits::FEW_DELTAS {
            Some(self.batch(&Question::default(), generation))
        } else {
            None
        };
        match batch {
            Some(batch) if batch.deltas.as_ref().is_ok_and(Vec::is_empty) => (),
            // What is offered says that there is something new.
            Some(batch) if batch.deltas.is_ok() && unread < limits::OFFERS => self.send(batch),
            // Where it reads none it will ask.
            _ => self.wake(News::Pushed),
        }
    }

    fn send_batch(&mut self, question: &Question, generation: Generation) {
        if question.share == Share::default() {
            self.outbox.count();
        }
        let batch = self.batch(question, generation);
        let access = self.heartbeat.as_mut().and_then(|heartbeat| heartbeat.credentials.refresh()).map(Box::new);
        self.send(Batch { access, ..batch });
    }

    /// Nobody has asked for them, but there are deltas to be sent.
    fn send_changed_credentials(&mut self) {
        let Some(heartbeat) = &mut self.heartbeat else { return };
        if let Some(access) = heartbeat.credentials.refresh() {
            self.send(Batch {
                access: Some(Box::new(access)),
                ..self.batch_of(Err(Nothing::NotNow), Generation::default())
            });
        }
    }

    fn send(&self, batch: Batch) {
        // The heartbeat thread may have ended.
        let _ = self.heartbeat.as_ref().map(|heartbeat| heartbeat.answers.send(batch).is_ok());
    }

    fn batch(&mut self, question: &Question, generation: Generation) -> Batch {
        let deltas = look_for(&mut self.outbox, question).unwrap_or_else(|error| {
            let problem = chain(&error);
            if let Some(times) = self.repeats.count("deliverable", &problem, Instant::now()) {
                quietly(|| {
                    log::warn!("beating without deltas, they stay in the outbox: times={times} error={problem:?}");
                });
            }
            Err(Nothing::NotNow)
        });
        Batch { number: question.number, ..self.batch_of(deltas, generation) }
    }

    fn batch_of(&self, deltas: Result<Vec<Kept>, Nothing>, generation: Generation) -> Batch {
        let are_gone = self.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.are_gone);
        Batch { number: OFFERED, generation, at: Instant::now(), deltas, access: None, are_gone }
    }

    /// Says that all is sent to those who wait for it. Who waits no longer is forgotten.
    fn answer_flushes(&mut self) {
        for (newest, ticket, waiter) in mem::take(&mut self.flushes) {
            if self.outbox.delivers_up_to(newest).unwrap_or(true) {
                if waiter.until.is_some_and(|until| until > Instant::now()) {
                    self.flushes.push((newest, ticket, waiter));
                }
            } else {
                self.desk.answer(vec![(ticket, waiter, Ok(0))]);
            }
        }
    }
}

/// The deltas that a question asks for.
fn look_for(outbox: &mut Outbox, question: &Question) -> Result<Result<Vec<Kept>, Nothing>, Error> {
    let suspects = &question.suspects;
    let held_back = suspects.held_back();
    let is_free = |kept: &Kept| !held_back.contains(kept);
    let free: Option<&dyn Fn(&Kept) -> bool> = if suspects.is_empty() { None } else { Some(&is_free) };
    let (id, found) = match question.share {
        Share::None => return Ok(Ok(Vec::new())),
        Share::Newest(most) => return Ok(Ok(outbox.deliverable_where(most, free)?)),
        Share::One => {
            let found = outbox.deliverable_where(1, free)?;
            return Ok(if found.is_empty() { Err(Nothing::Gone) } else { Ok(found) });
        }
        // The newest of its decky and operation that waits, if that is it.
        Share::Only(id) => (id, outbox.deliverable_where(1, Some(&|kept| suspects.is_of(id, kept)))?),
        Share::Same(id) => (id, outbox.deliverable_where(1, Some(&|kept| kept.id == id))?),
    };
    Ok(match found.as_slice() {
        [kept] if kept.id == id => Ok(found),
        _ if outbox.waits(id)? => Err(Nothing::Held),
        _ => Err(Nothing::Gone),
    })
}

const NOT_WRITTEN: &str = "cannot be written, what has changed is in memory";

fn stopped() -> Answer {
    Err(Error::outbox(None, "the heartbeat has stopped, and nothing outlives it in memory"))
}
