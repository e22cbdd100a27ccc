//! The outbox thread. It owns the agent dir (the outbox, the ini and the bundle), and is the only
//! thread that waits for its disk. It writes all queued requests in one transaction.

#[cfg(feature = "cli")]
mod resume;

use std::iter::repeat_with;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use log::Level;

use super::batches::{Batch, OFFERED, OutboxEvent};
#[cfg(feature = "cli")]
use super::hand_over::HandOver;
use super::request_queue::{BatchRequest, Caller, QueuedRequest, Request, RequestQueue};
use super::requests::{Generation, Taken};
use super::wake::{WakeThread, is_refused};
use crate::credentials::CredentialFiles;
use crate::error::{Error, chain};
use crate::limits;
use crate::log_throttle::LogThrottle;
use crate::outbox::{CommitResult, NewRows, Outbox, QueuedDelta, RowChange, deadline};
use crate::panics::{caught, quietly};
use crate::stats::SharedStats;
use crate::threads::content::{DeltaSelection, NothingToSend};

/// What a thread has that serves a heartbeat thread.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) credentials: CredentialFiles,
    /// The credentials' files did not exist at the last check.
    pub(super) files_missing: bool,
    /// Holds one event. If it is full, the heartbeat thread has one to read.
    pub(super) events: Sender<OutboxEvent>,
    /// Answers and offers. It is bounded by its use: each request has one answer, and no offer is
    /// sent while [`limits::OFFERS`] batches are unread.
    pub(super) batches: Sender<Batch>,
}

#[derive(Debug)]
pub(super) struct OutboxThread {
    queue: Arc<RequestQueue>,
    /// Wakes this thread when another process has added deltas. Dropped before the outbox, which
    /// has the lock that it needs.
    wake: Option<WakeThread>,
    #[cfg(feature = "cli")]
    hand_over: HandOver,
    outbox: Outbox,
    /// `None`: the program adds to the outbox, or the heartbeat has stopped.
    delivery: Option<Delivery>,
    has_stopped: bool,
    pending_flushes: Vec<PendingFlush>,
    throttle: LogThrottle,
}

/// A caller that waits until all deltas up to an id are sent.
#[derive(Debug)]
struct PendingFlush {
    newest: i64,
    caller: Caller,
}

/// The requests of one transaction.
#[derive(Debug, Default)]
struct Group {
    new_rows: Vec<NewRows>,
    new_rows_callers: Vec<Caller>,
    change_callers: Vec<Caller>,
    /// The number of acknowledged or rejected deltas.
    acknowledged: u64,
    is_urgent: bool,
}

impl OutboxThread {
    pub(super) fn new(
        queue: Arc<RequestQueue>,
        outbox: Outbox,
        delivery: Option<Delivery>,
    ) -> Self {
        Self {
            queue,
            wake: None,
            #[cfg(feature = "cli")]
            hand_over: HandOver::default(),
            outbox,
            delivery,
            has_stopped: false,
            pending_flushes: Vec::new(),
            throttle: LogThrottle::default(),
        }
    }

    /// Serves requests until the last client is dropped.
    pub(super) fn run(mut self, stats: Option<&SharedStats>) {
        let mut last_group = 0;
        if let Err(panic) = caught(|| self.update_wake_socket()) {
            self.record_panic(&panic, stats);
        }
        loop {
            // A process that owns rows maintains them, also without a heartbeat.
            let timeout = self.outbox.may_own_rows().then_some(limits::OUTBOX_CHECK);
            let Some(taken) = self.queue.take_group(last_group, timeout) else { return };
            // Callers that do not wait for an answer send no further request because of it.
            last_group = taken
                .requests
                .iter()
                .filter(|(_, queued)| queued.waiter.deadline.is_some())
                .count();
            if let Err(panic) = caught(|| self.serve(taken)) {
                self.record_panic(&panic, stats);
            }
        }
    }

    fn record_panic(&mut self, panic: &str, stats: Option<&SharedStats>) {
        if let Some(stats) = stats {
            stats.change(|stats| stats.panics += 1);
        }
        self.throttle.log("outbox", panic, |times| {
            log::error!("outbox thread panicked, continuing: times={times} panic={panic:?}");
        });
    }

    /// Logs a repeated problem at a decreasing rate.
    fn log_problem(&mut self, level: Level, event: &'static str, problem: &str) {
        self.throttle.log(event, problem, |times| {
            log::log!(level, "{event}: times={times} error={problem:?}");
        });
    }

    /// Writes all changes in one transaction, and reads afterwards.
    fn serve(&mut self, taken: Taken<QueuedRequest>) {
        self.outbox.repair_index();
        if taken.requests.is_empty() {
            return self.outbox.maintain_owned_rows();
        }
        let mut group = Group::default();
        let mut reads = Vec::new();
        for (ticket, QueuedRequest { request, is_urgent, waiter }) in taken.requests {
            let caller = Caller { ticket, waiter };
            group.is_urgent |= is_urgent;
            match request {
                Request::NewRows(rows) => {
                    group.new_rows.push(rows);
                    group.new_rows_callers.push(caller);
                }
                Request::RowChange(change) => {
                    group.acknowledged += change.answered();
                    self.outbox.record_change(change);
                    group.change_callers.push(caller);
                }
                read => reads.push((caller, read)),
            }
        }
        if !(group.new_rows_callers.is_empty() && group.change_callers.is_empty()) {
            self.write(group, taken.generation);
        }
        for (caller, request) in reads {
            self.serve_read(caller, request, taken.generation);
        }
        self.answer_flushes();
    }

    fn write(&mut self, group: Group, generation: Generation) {
        let Group { mut new_rows, new_rows_callers, change_callers, acknowledged, is_urgent } =
            group;
        let is_closed = self.has_stopped && self.outbox.is_closed();
        if is_closed {
            new_rows.clear();
        }
        // If another process has the file locked, the callers get that error before they give up.
        let callers = new_rows_callers.iter().chain(&change_callers);
        let lock_deadline = callers
            .filter_map(|caller| caller.waiter.deadline)
            .min()
            .and_then(|deadline| deadline.checked_sub(limits::OUTBOX_MARGIN))
            .unwrap_or_else(deadline);
        let since = Instant::now();
        let CommitResult { added, changed } = self.outbox.commit(&new_rows, lock_deadline);
        let commit_time = since.elapsed();
        let is_written = changed.is_ok();
        let new_deltas =
            (is_urgent && is_written).then(|| self.outbox.just_added(&new_rows, &added)).flatten();
        let added =
            added.into_iter().chain(repeat_with(stopped_error)).take(new_rows_callers.len());
        self.answer_new_rows(&new_rows, new_rows_callers.into_iter().zip(added).collect());
        let changed = if is_closed { stopped_error().map(drop) } else { changed };
        self.answer_changes(change_callers, acknowledged, changed);
        // After the answers: no caller waits while this thread reads, or while the heartbeat thread
        // uses the processor. What the file has refused is tried again before it is offered.
        if is_urgent {
            self.offer(new_deltas, generation, commit_time);
        }
        self.outbox.verify_after_commit();
        if is_urgent {
            self.send_changed_credentials();
            #[cfg(feature = "cli")]
            if self.outbox.is_standby() && !self.hand_over.wake(&self.outbox) {
                // The process that delivered may have ended.
                self.maintain();
            }
        }
    }

    /// Removes the rows of an operation again if its caller has not received the answer.
    fn answer_new_rows(&self, new_rows: &[NewRows], answers: Vec<(Caller, Result<i64, Error>)>) {
        let first_ids: Vec<_> =
            answers.iter().map(|(_, added)| added.as_ref().ok().copied()).collect();
        let received = self.queue.answer(answers);
        for ((is_received, first), rows) in received.into_iter().zip(first_ids).zip(new_rows) {
            if !is_received
                && let Some(first) = first
                && let NewRows::Operation(_, deckies) = rows
            {
                let ids = first..first + deckies.len() as i64;
                self.queue.send(Request::RowChange(RowChange::Withdrawn(ids)));
            }
        }
    }

    fn answer_changes(
        &mut self,
        callers: Vec<Caller>,
        acknowledged: u64,
        changed: Result<(), Error>,
    ) {
        let problem = changed.err().map(|error| chain(&error));
        if let Some(problem) = problem.as_ref().filter(|_| acknowledged > 0) {
            let event = "could not record delivery; deltas may be sent again";
            self.log_problem(Level::Error, event, problem);
        }
        let answer = || match &problem {
            None => Ok(0),
            Some(problem) => Err(self.outbox.error(NOT_WRITTEN).with_source(problem.clone())),
        };
        self.queue.answer(callers.into_iter().map(|caller| (caller, answer())).collect());
    }

    fn serve_read(&mut self, caller: Caller, request: Request, generation: Generation) {
        match request {
            Request::NewRows(_) | Request::RowChange(_) => {}
            Request::Maintain => self.maintain(),
            Request::Batch(request) => self.send_batch(&request, generation),
            Request::Flush => self.begin_flush(caller),
            #[cfg(feature = "cli")]
            Request::Resume(request) => self.resume(caller, request),
            Request::OfferAdded => self.offer_added(generation),
            Request::Release => self.release(caller),
            #[cfg(feature = "cli")]
            Request::IsOvertaken(delta) => {
                let is_overtaken = self.outbox.is_overtaken(&delta).map(i64::from);
                self.queue.answer(vec![(caller, is_overtaken)]);
            }
            #[cfg(feature = "cli")]
            Request::HandOver(request) => {
                let found = self.hand_over.serve(&mut self.outbox, request).map(i64::from);
                self.queue.answer(vec![(caller, found)]);
            }
        }
    }

    fn maintain(&mut self) {
        let Some(delivery) = &mut self.delivery else { return };
        delivery.files_missing = delivery.credentials.are_absent();
        let delivered = self.outbox.delivers();
        if let Err(error) = self.outbox.maintain() {
            quietly(|| log::debug!("outbox not maintained: error={:?}", chain(&error)));
        }
        if !delivered && self.outbox.delivers() {
            self.send_event(OutboxEvent::DeliveryBegan);
        }
        self.update_wake_socket();
    }

    /// Binds the wake socket while this process delivers from a file, again if the folder was
    /// replaced or the socket was removed. Without it, other processes post their deltas
    /// themselves.
    fn update_wake_socket(&mut self) {
        let Some(path) = self.outbox.delivered_file().filter(|_| self.delivery.is_some()) else {
            self.wake = None;
            return;
        };
        if self.wake.as_ref().is_some_and(|wake| wake.is_bound_for(path)) {
            return;
        }
        match WakeThread::start(path, &self.queue) {
            Ok(wake) => self.wake = Some(wake),
            // The older socket may return with its folder.
            Err(error) => {
                let level = if is_refused(&error) { Level::Warn } else { Level::Debug };
                let event = "no wake socket; push and track post their deltas themselves";
                self.log_problem(level, event, &chain(&error));
            }
        }
    }

    /// Offers what other processes have added. A datagram without a change of the file, from
    /// whomever, costs one read.
    fn offer_added(&mut self, generation: Generation) {
        if self.outbox.was_changed_by_others() {
            self.outbox.recount();
            self.offer(None, generation, Duration::ZERO);
            self.send_changed_credentials();
        }
    }

    fn release(&mut self, caller: Caller) {
        self.has_stopped = true;
        self.delivery = None;
        let released = self.outbox.stop_delivering().map(|()| 0);
        self.queue.answer(vec![(caller, released)]);
        // After the answer, because a disk that has stopped answering blocks the removal of the
        // socket.
        self.wake = None;
    }

    fn begin_flush(&mut self, caller: Caller) {
        // If the outbox cannot be read, there is no row to wait for.
        let newest = self.outbox.newest_id().unwrap_or_default();
        self.pending_flushes.push(PendingFlush { newest, caller });
        self.answer_flushes();
        if !self.pending_flushes.is_empty() {
            self.send_event(OutboxEvent::Flush);
        }
    }

    /// Answers the flushes that are complete, and forgets those whose callers have given up.
    fn answer_flushes(&mut self) {
        for flush in mem::take(&mut self.pending_flushes) {
            if !self.outbox.has_deliverable_up_to(flush.newest).unwrap_or(true) {
                self.queue.answer(vec![(flush.caller, Ok(0))]);
            } else if flush.caller.waiter.deadline > Some(Instant::now()) {
                self.pending_flushes.push(flush);
            }
        }
    }

    fn send_event(&self, event: OutboxEvent) {
        // An error means that the heartbeat thread has an event to read, or has ended.
        let _ = self.delivery.as_ref().map(|delivery| delivery.events.try_send(event));
    }

    /// Offers new deltas to the heartbeat thread, unless all are held. If only few deltas wait, the
    /// offer contains all of them, so that the heartbeat thread need not request them. If the
    /// commit was slow, the offer contains as many as fit into a body, because an answer would be
    /// late.
    fn offer(
        &mut self,
        new: Option<Vec<QueuedDelta>>,
        generation: Generation,
        commit_time: Duration,
    ) {
        let is_slow = commit_time > limits::BATCH_FRESH;
        let Some(unread) = self.delivery.as_ref().map(|delivery| delivery.batches.len()) else {
            return;
        };
        let batch = match new {
            Some(new) => self.new_batch(Ok(new), generation),
            None if is_slow || self.outbox.waiting() <= limits::FEW_DELTAS => {
                self.read_batch(&BatchRequest::default(), generation)
            }
            None => return self.send_event(OutboxEvent::Pushed),
        };
        match &batch.deltas {
            Ok(deltas) if deltas.is_empty() => (),
            Ok(_) if unread < limits::OFFERS => self.send(batch),
            // The heartbeat thread will request them.
            _ => self.send_event(OutboxEvent::Pushed),
        }
    }

    fn send_batch(&mut self, request: &BatchRequest, generation: Generation) {
        if request.selection == DeltaSelection::default() {
            self.outbox.recount();
        }
        let batch = self.read_batch(request, generation);
        let delivery = self.delivery.as_mut();
        let credentials = delivery.and_then(|delivery| delivery.credentials.reload());
        self.send(Batch { credentials: credentials.map(Box::new), ..batch });
    }

    /// Sends changed credentials with an offer, because its deltas are sent without a request.
    fn send_changed_credentials(&mut self) {
        let Some(delivery) = &mut self.delivery else { return };
        if let Some(credentials) = delivery.credentials.reload() {
            let deltas = Err(NothingToSend::NotAvailable);
            let batch = self.new_batch(deltas, Generation::default());
            self.send(Batch { credentials: Some(Box::new(credentials)), ..batch });
        }
    }

    fn send(&self, batch: Batch) {
        // An error means that the heartbeat thread has ended.
        let _ = self.delivery.as_ref().map(|delivery| delivery.batches.send(batch).is_ok());
    }

    fn read_batch(&mut self, request: &BatchRequest, generation: Generation) -> Batch {
        let deltas = select(&mut self.outbox, request).unwrap_or_else(|error| {
            let event = "could not read the outbox; beats are sent without deltas";
            self.log_problem(Level::Warn, event, &chain(&error));
            Err(NothingToSend::NotAvailable)
        });
        Batch { number: request.number, ..self.new_batch(deltas, generation) }
    }

    fn new_batch(
        &self,
        deltas: Result<Vec<QueuedDelta>, NothingToSend>,
        generation: Generation,
    ) -> Batch {
        Batch {
            number: OFFERED,
            generation,
            read_at: Instant::now(),
            deltas,
            credentials: None,
            files_missing: self.delivery.as_ref().is_some_and(|delivery| delivery.files_missing),
        }
    }
}

/// Reads the deltas that a request selects.
fn select(
    outbox: &mut Outbox,
    request: &BatchRequest,
) -> Result<Result<Vec<QueuedDelta>, NothingToSend>, Error> {
    let suspects = &request.suspects;
    let held_back = suspects.held_back();
    let is_sendable = |delta: &QueuedDelta| !held_back.contains(delta);
    let (id, found) = match request.selection {
        DeltaSelection::None => return Ok(Ok(Vec::new())),
        DeltaSelection::Newest(count) => {
            return outbox.read_deliverable(count, is_sendable).map(Ok);
        }
        DeltaSelection::One => {
            let found = outbox.read_deliverable(1, is_sendable)?;
            return Ok(if found.is_empty() { Err(NothingToSend::NoSuchDelta) } else { Ok(found) });
        }
        // It is only sent if it is the newest of its decky and operation.
        DeltaSelection::Only(id) => {
            (id, outbox.read_deliverable(1, |delta| suspects.is_same_or_newer(id, delta))?)
        }
        DeltaSelection::Same(id) => (id, outbox.read_deliverable(1, |delta| delta.id == id)?),
    };
    Ok(match found.as_slice() {
        [delta] if delta.id == id => Ok(found),
        _ if outbox.is_waiting(id)? => Err(NothingToSend::Held),
        _ => Err(NothingToSend::NoSuchDelta),
    })
}

const NOT_WRITTEN: &str = "cannot be written; the change is in memory";

fn stopped_error() -> Result<i64, Error> {
    Err(Error::outbox(None, "the heartbeat has stopped; its outbox in memory takes no more deltas"))
}
