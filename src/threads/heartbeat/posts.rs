//! The POSTs of one beat: what each carries, and what follows from its answer. Runs on the
//! heartbeat thread.

use std::slice;
use std::time::{Duration, Instant};

use super::{BeatResult, HeartbeatLoop, States};
use crate::limits;
use crate::master::body::{self, Body};
use crate::master::{PostResult, Verdict};
use crate::outbox::{DeliveryResult, QueuedDelta, RowChange};
use crate::panics::quietly;
use crate::status::Snapshot;
use crate::text::sanitize;
use crate::threads::content::{
    Availability, Consequence, DeltaSelection, NothingToSend, Post, PostOutcome,
};

/// A POST that was made.
#[derive(Debug)]
struct SentPost {
    /// What it carried. It carries no states if these became stale before it was sent.
    post: Post,
    deltas: Vec<QueuedDelta>,
    result: PostResult,
}

impl SentPost {
    fn outcome(&self) -> PostOutcome {
        let result = &self.result;
        match result.verdict {
            Verdict::Accepted => PostOutcome::Accepted,
            // A gateway may answer any body with its own page, so no delta is rejected for that.
            Verdict::BodyRejected
                if result.is_page && self.deltas.len() == 1 && !self.post.states =>
            {
                PostOutcome::InDoubt
            }
            Verdict::BodyRejected => PostOutcome::Rejected,
            Verdict::RetryLater(_) | Verdict::NoResponse if result.in_doubt => PostOutcome::InDoubt,
            _ => PostOutcome::Inconclusive,
        }
    }
}

impl HeartbeatLoop {
    /// Makes the POSTs of one beat. What each carries is decided after the previous one.
    pub(super) fn send_posts(&mut self, states: Option<&States>) -> Option<BeatResult> {
        let since = Instant::now();
        let mut last = None;
        let mut delivered = 0;
        self.content.begin_beat();
        self.states_sent = false;
        while last.is_none() || self.has_time_for_another(since) {
            let Some(post) = self.content.next_post(availability(states)) else {
                break;
            };
            let sent = match self.send(post, states) {
                Ok(sent) => sent,
                Err(why) => {
                    self.content.skip_post(why);
                    continue;
                }
            };
            self.record_decommission(sent.result.verdict);
            if sent.result.verdict == Verdict::Accepted {
                delivered += sent.deltas.len();
            }
            match self.post_ended(&sent) {
                Consequence::DecidesBeat => last = Some(sent.result),
                consequence => self.continue_beat(consequence, &sent),
            }
        }
        let suspended = self.content.suspended_deltas();
        self.stats.change(|stats| stats.suspended = suspended);
        last.map(|result| BeatResult { result, delivered })
    }

    /// Whether there is time for another POST, which may take two thirds of the interval, without
    /// delaying the next beat.
    fn has_time_for_another(&self, since: Instant) -> bool {
        self.stop.is_empty()
            && since.elapsed() < self.schedule.post_limit() / 2
            && !self.time_left().is_zero()
    }

    fn post_ended(&mut self, sent: &SentPost) -> Consequence {
        let outcome = sent.outcome();
        if matches!(outcome, PostOutcome::InDoubt | PostOutcome::Rejected) {
            self.last_failure = failure_text(&sent.result);
        }
        let was_whole = self.content.is_whole();
        let consequence = self.content.post_ended(sent.post, &sent.deltas, outcome);
        if self.content.is_whole() && !was_whole && self.states_failure.take().is_some() {
            quietly(|| log::info!("states accepted again: {}", self.credentials.names()));
        }
        consequence
    }

    /// Continues the beat without what the master has failed on.
    fn continue_beat(&mut self, consequence: Consequence, sent: &SentPost) {
        let reason = failure_text(&sent.result);
        match (consequence, sent.deltas.as_slice()) {
            (Consequence::DeltaRejected, [delta]) => self.reject(delta, reason),
            (Consequence::DeltaSuspended, [delta]) => self.record_suspended_delta(delta, &reason),
            (Consequence::StatesSuspended, _) => self.record_suspended_states(reason),
            _ => (),
        }
    }

    fn reject(&mut self, delta: &QueuedDelta, reason: String) {
        quietly(|| {
            log::error!(
                "delta rejected, it is not sent again: {} decky={:?} operation={} reason={reason:?}",
                self.credentials.names(),
                sanitize(delta.delta.decky()),
                delta.delta.operation(),
            );
        });
        // Counted first, as a caller of `flush` may read the stats at once.
        self.stats.change(|stats| stats.rejected += 1);
        self.acknowledge(slice::from_ref(delta), DeliveryResult::Rejected(reason));
    }

    /// Makes one POST. If it is accepted, its deltas are acknowledged.
    ///
    /// If the connection had been closed, a second attempt is made at once with what may be sent
    /// then: an operation that began since may hold back some of the deltas, and the states may
    /// have become stale. A delta that is sent alone stays the same.
    fn send(&mut self, post: Post, states: Option<&States>) -> Result<SentPost, NothingToSend> {
        let end = Instant::now() + self.time_left();
        let mut sent = self.send_once(post, states, end)?;
        if sent.result.stale && Instant::now() < end {
            let names = self.credentials.names();
            let class = &sent.result.class;
            quietly(|| {
                log::debug!("connection closed, retrying on a new one: {names} class={class}");
            });
            sent = self.send_again(post, sent, states, end);
        }
        if sent.result.verdict == Verdict::Accepted {
            if !sent.deltas.is_empty() {
                self.acknowledge(&sent.deltas, DeliveryResult::Delivered);
            }
            self.record_success(&sent.result, sent.deltas.len());
        }
        Ok(sent)
    }

    /// Makes the second attempt of a POST. Returns the first one if there is nothing to send.
    fn send_again(
        &mut self,
        post: Post,
        first: SentPost,
        states: Option<&States>,
        end: Instant,
    ) -> SentPost {
        let deltas = match (post.deltas, first.deltas.as_slice()) {
            (DeltaSelection::One | DeltaSelection::Only(_), [delta]) => {
                DeltaSelection::Same(delta.id)
            }
            (selection, _) => selection,
        };
        let Ok(mut second) = self.send_once(Post { deltas, ..post }, states, end) else {
            return first;
        };
        second.result.in_doubt |= first.result.in_doubt;
        if first.result.in_doubt && first.post.states && !second.post.states {
            self.last_failure = failure_text(&first.result);
            self.content.states_in_doubt();
        }
        second
    }

    fn send_once(
        &mut self,
        post: Post,
        states: Option<&States>,
        end: Instant,
    ) -> Result<SentPost, NothingToSend> {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        let deltas = self.select_deltas(post.deltas)?;
        // Checked after the outbox has answered, because that may take long.
        let post = Post { states: post.states && states.is_some_and(States::are_known), ..post };
        if !post.states && self.content.requires_states() {
            return Err(NothingToSend::NotAvailable);
        }
        if deltas.is_empty() && self.content.requires_deltas() {
            return Err(NothingToSend::NoSuchDelta);
        }
        self.record_status_fault(post, states);
        let result = match self.body(post, states, &deltas) {
            Ok(body) => {
                self.credentials.master().post(&body, end.saturating_duration_since(Instant::now()))
            }
            Err(error) => PostResult::invalid_body(&error),
        };
        Ok(SentPost { post, deltas, result })
    }

    /// Records what the beat leaves out of the states. Once its states are sent, its other POSTs
    /// leave out nothing.
    fn record_status_fault(&mut self, post: Post, states: Option<&States>) {
        if self.states_sent && (post.states || post.deltas != DeltaSelection::default()) {
            return;
        }
        self.states_sent = post.states;
        let fault = match states {
            Some(States { snapshot, .. }) if post.states => snapshot.fault().map(str::to_owned),
            _ => Some(self.why_no_states(states)),
        };
        self.stats.change(|stats| stats.status_fault = fault);
    }

    fn body(
        &self,
        post: Post,
        states: Option<&States>,
        deltas: &[QueuedDelta],
    ) -> serde_json::Result<Vec<u8>> {
        let snapshot = states.filter(|states| !states.are_stale()).map(|states| &states.snapshot);
        let why_not = self.why_no_states(states);
        let without_states = Snapshot::unknown(&why_not);
        // The status of a snapshot without states already says why.
        let has_reason =
            |snapshot: &Snapshot| snapshot.is_unknown() && !self.content.states_are_suspended();
        let status = snapshot
            .filter(|snapshot| post.states || has_reason(snapshot))
            .unwrap_or(&without_states);
        // What is observed of the topology is part of the states: it may be as large, and becomes
        // stale at the same time.
        let observed = snapshot
            .filter(|_| post.states || self.content.is_whole())
            .and_then(Snapshot::topology);
        let why_unobserved = if post.states && snapshot.is_some() {
            "this snapshot has no topology"
        } else {
            &why_not
        };
        let topology = match (observed, &self.topology) {
            (Some(topology), _) => Some(body::Topology::from(topology)),
            (None, Some(applied)) => {
                Some(body::Topology::unobserved(applied.as_ref(), why_unobserved))
            }
            (None, None) => None,
        };
        let lifecycle: Vec<_> = deltas.iter().map(|delta| &delta.delta).collect();
        let body = Body::of(self.credentials.host(), status, &lifecycle);
        serde_json::to_vec(&Body { agent_version: &self.agent_version, topology, ..body })
    }

    /// Why a POST carries no states, for its `status.error`.
    pub(super) fn why_no_states(&self, states: Option<&States>) -> String {
        if self.content.states_are_suspended() {
            let failure = self.states_failure.as_deref().unwrap_or_default();
            return format!("the states are left out because the master failed on them: {failure}");
        }
        match states {
            Some(states) if states.are_stale() => {
                "no fresh snapshot: it became stale before it was sent".to_owned()
            }
            Some(States { snapshot, .. }) if snapshot.is_unknown() => {
                snapshot.fault().unwrap_or_default().to_owned()
            }
            Some(_) if self.content.is_whole() => "the states are in another POST".to_owned(),
            Some(_) => format!(
                "the states are sent alone because the master failed on a larger body: {}",
                self.last_failure
            ),
            None => self.why_no_snapshot(),
        }
    }

    /// How long the next POST may take.
    pub(super) fn time_left(&self) -> Duration {
        let limit = self.schedule.post_limit();
        self.deadline
            .map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()).min(limit))
    }

    /// The deltas of a POST. While the outbox does not answer, beats are sent without deltas.
    fn select_deltas(
        &mut self,
        selection: DeltaSelection,
    ) -> Result<Vec<QueuedDelta>, NothingToSend> {
        if selection == DeltaSelection::None {
            return Ok(Vec::new());
        }
        let timeout = match self.deadline {
            // Half of the rest is for the POST.
            Some(_) => self.time_left() / 2,
            None => limits::BATCH_WAIT.min(self.schedule.interval() / 2),
        };
        let deltas = match self.batches.get(selection, self.content.suspects(), timeout) {
            Some(mut batch) => {
                self.take_credentials(&mut batch);
                batch.deltas
            }
            None => {
                self.files_missing = false;
                self.record_overdue_outbox();
                Err(NothingToSend::NotAvailable)
            }
        };
        match (selection, deltas) {
            (DeltaSelection::Newest(_), Err(NothingToSend::NotAvailable)) => Ok(Vec::new()),
            (_, deltas) => deltas,
        }
    }

    fn acknowledge(&self, deltas: &[QueuedDelta], result: DeliveryResult) {
        let ids = deltas.iter().map(|delta| delta.id).collect();
        self.outbox.acknowledge(RowChange::Answered(ids, result));
    }

    /// Why a beat has no snapshot.
    fn why_no_snapshot(&self) -> String {
        if self.deadline.is_some() {
            return "no fresh snapshot: the agent is stopping".to_owned();
        }
        match self.schedule.snapshot_requested() {
            Some(requested) => format!(
                "no fresh snapshot: the status source has not answered for {:.1} s",
                requested.elapsed().as_secs_f64()
            ),
            None => "no fresh snapshot".to_owned(),
        }
    }
}

fn availability(states: Option<&States>) -> Availability {
    match states {
        Some(states) if states.are_known() => Availability::Available,
        _ => Availability::Unavailable,
    }
}

fn failure_text(result: &PostResult) -> String {
    format!("{}: {}", result.class, result.detail)
}
