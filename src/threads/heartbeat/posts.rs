//! The POSTs of one beat: what each carries, and what follows from its answer. Runs on the heartbeat thread.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use serde_json::value::RawValue;

use super::{BeatEnd, HeartbeatLoop, States};
use crate::limits;
use crate::master::body::{self, Body};
use crate::master::{PostResult, Verdict};
use crate::outbox::{DeliveryResult, QueuedDelta, RowChange};
use crate::panics::quietly;
use crate::status::{Observed, Snapshot, Topology};
use crate::text::sanitize;
use crate::threads::content::{Cause, Consequence, DeltaSelection, Nothing, Post, PostOutcome};

/// A POST that was made.
#[derive(Debug)]
struct Sent {
    /// What it carried: less than it was to, where the states had grown old.
    post: Post,
    deltas: Vec<QueuedDelta>,
    reply: PostResult,
}

impl HeartbeatLoop {
    /// The POSTs of one beat. What each carries is decided when the one before it has ended.
    pub(super) fn make_posts(&mut self, states: Option<&States>) -> Option<BeatEnd> {
        let (since, mut last, mut delivered) = (Instant::now(), None, 0);
        self.content.begin();
        self.states_sent = false;
        while last.is_none() || self.may_go_on(since) {
            let Some(post) = self.content.next(states.is_some_and(States::are_known)) else {
                break;
            };
            let Sent { post, deltas, reply } = match self.exchange(post, states) {
                Ok(sent) => sent,
                Err(nothing) => {
                    self.content.nothing_to_send(nothing);
                    continue;
                }
            };
            self.note_decommission(reply.verdict);
            if reply.verdict == Verdict::Accepted {
                delivered += deltas.len();
            }
            match self.ended(post, &deltas, &reply) {
                Consequence::QueueCounts => last = Some(reply),
                Consequence::Absorbed(cause) => self.absorb(cause, &reply, &deltas),
            }
        }
        let suspended = self.content.resting();
        self.stats.change(|stats| stats.suspended = suspended);
        last.map(|reply| BeatEnd { reply, delivered })
    }

    /// The POSTs after the first must not delay the next beat: each may take two thirds of the interval.
    fn may_go_on(&self, since: Instant) -> bool {
        self.stop.is_empty()
            && since.elapsed() < self.schedule.post_limit() / 2
            && !self.within().is_zero()
    }

    fn ended(&mut self, post: Post, deltas: &[QueuedDelta], reply: &PostResult) -> Consequence {
        let outcome = match reply.verdict {
            Verdict::Accepted => PostOutcome::Accepted,
            // A gateway may answer any body with its page, so no delta is rejected because of one.
            Verdict::BodyRejected if reply.is_page && deltas.len() == 1 && !post.states => {
                PostOutcome::InDoubt
            }
            Verdict::BodyRejected => PostOutcome::Refused,
            Verdict::RetryLater(_) | Verdict::NoResponse if reply.in_doubt => PostOutcome::InDoubt,
            _ => PostOutcome::Unchanged,
        };
        if matches!(outcome, PostOutcome::InDoubt | PostOutcome::Refused) {
            self.in_trouble(reply);
        }
        let was_whole = self.content.is_whole();
        let consequence = self.content.ended(post, deltas, outcome);
        if self.content.is_whole() && !was_whole && self.states_rested {
            self.states_rested = false;
            quietly(|| log::info!("the master takes the states again: {}", self.link.names()));
        }
        consequence
    }

    /// What the POSTs that carry less say of it.
    fn in_trouble(&mut self, reply: &PostResult) {
        self.trouble = format!("{}: {}", reply.class, reply.detail);
    }

    /// The beat goes on without what the master does not take.
    fn absorb(&mut self, cause: Cause, reply: &PostResult, deltas: &[QueuedDelta]) {
        let reason = format!("{}: {}", reply.class, reply.detail);
        match (cause, deltas) {
            (Cause::DeltaRefused, [kept]) => self.reject(kept, &reason),
            (Cause::DeltaRests, [kept]) => {
                if let Some(times) = self.repeats.count("delta", &reason, Instant::now()) {
                    let (decky, operation) = (sanitize(kept.delta.decky()), kept.delta.operation());
                    let names = self.link.names();
                    quietly(|| {
                        log::warn!(
                            "the master fails on a delta, it rests: {names} decky={decky:?} operation={operation} \
                             times={times} reason={reason:?}"
                        );
                    });
                }
            }
            (Cause::StatesRest, _) => {
                self.states_rested = true;
                self.states_trouble.clone_from(&reason);
                let fault = self.why_no_states(None).into_owned();
                self.stats.change(|stats| stats.status_fault = Some(fault));
                if let Some(times) = self.repeats.count("states", &reason, Instant::now()) {
                    let (names, beats) =
                        (self.link.names(), self.content.states_rest_for().unwrap_or_default());
                    quietly(|| {
                        log::error!(
                            "the master fails on the states, beating without them: {names} beats={beats} \
                             times={times} reason={reason:?}"
                        );
                    });
                }
            }
            _ => (),
        }
    }

    fn reject(&mut self, kept: &QueuedDelta, reason: &str) {
        let (decky, operation) = (sanitize(kept.delta.decky()), kept.delta.operation());
        let names = self.link.names();
        quietly(|| {
            log::error!(
                "the master refuses a delta for good, it is put aside: {names} decky={decky:?} operation={operation} \
                 reason={reason:?}"
            );
        });
        self.settle(std::slice::from_ref(kept), DeliveryResult::Rejected(reason.to_owned()));
        self.stats.change(|stats| stats.rejected += 1);
    }

    /// One POST, and what follows if it is accepted: the deltas in it are forgotten. Where the connection had ended it is
    /// tried once more at once, with what may be sent by then: an operation may have begun meanwhile that holds back some
    /// of it, and the states may be old. A delta that is sent alone stays the same one.
    fn exchange(&mut self, post: Post, states: Option<&States>) -> Result<Sent, Nothing> {
        let end = Instant::now() + self.within();
        let mut sent = self.post(post, states, end)?;
        if sent.reply.stale && Instant::now() < end {
            let (names, class) = (self.link.names(), &sent.reply.class);
            quietly(|| {
                log::debug!("the connection has ended, trying a fresh one: {names} class={class}")
            });
            let deltas = match (post.deltas, sent.deltas.as_slice()) {
                (DeltaSelection::One | DeltaSelection::Only(_), [kept]) => {
                    DeltaSelection::Same(kept.id)
                }
                (share, _) => share,
            };
            if let Ok(mut again) = self.post(Post { deltas, ..post }, states, end) {
                again.reply.in_doubt |= sent.reply.in_doubt;
                if sent.reply.in_doubt && sent.post.states && !again.post.states {
                    self.in_trouble(&sent.reply);
                    self.content.states_in_doubt();
                }
                sent = again;
            }
        }
        if sent.reply.verdict == Verdict::Accepted {
            if !sent.deltas.is_empty() {
                self.settle(&sent.deltas, DeliveryResult::Delivered);
            }
            self.accepted(&sent.reply, sent.deltas.len());
        }
        Ok(sent)
    }

    fn post(&mut self, post: Post, states: Option<&States>, end: Instant) -> Result<Sent, Nothing> {
        self.stats.change(|stats| stats.working_since = Some(Instant::now()));
        let deltas = self.share(post.deltas)?;
        // Decided last: the outbox may have taken its time.
        let post = Post { states: post.states && states.is_some_and(States::are_known), ..post };
        if !post.states && self.content.wants_states_alone() {
            return Err(Nothing::NotNow);
        }
        if deltas.is_empty() && self.content.is_only_for_deltas() {
            return Err(Nothing::Gone);
        }
        self.note_status_fault(post, states);
        let reply = match self.body(post, states, &deltas) {
            Ok(body) => {
                self.link.master().post(&body, end.saturating_duration_since(Instant::now()))
            }
            Err(error) => PostResult::invalid_body(&error),
        };
        Ok(Sent { post, deltas, reply })
    }

    /// What the beat does not say of what runs here. Once its states are sent, its other POSTs leave nothing out.
    fn note_status_fault(&mut self, post: Post, states: Option<&States>) {
        if self.states_sent
            && (post.states || post.deltas != DeltaSelection::Newest(limits::DELTAS_PER_BODY))
        {
            return;
        }
        self.states_sent = post.states;
        let fault = match states {
            Some(States { snapshot, .. }) if post.states => snapshot.fault().map(str::to_owned),
            _ => Some(self.why_no_states(states).into_owned()),
        };
        self.stats.change(|stats| stats.status_fault = fault);
    }

    fn body(
        &self,
        post: Post,
        states: Option<&States>,
        deltas: &[QueuedDelta],
    ) -> serde_json::Result<Vec<u8>> {
        let lifecycle: Vec<_> = deltas.iter().map(|kept| &kept.delta).collect();
        let fresh = states.filter(|states| !states.are_stale());
        let snapshot = fresh.map(|states| &states.snapshot);
        let why_not = self.why_no_states(states);
        let (missing, topology);
        // A snapshot without states says itself why, in its source's own words.
        let has_reason = |snapshot: &Snapshot| snapshot.is_unknown() && !self.content.states_rest();
        let status: &RawValue = match snapshot {
            Some(snapshot) if post.states || has_reason(snapshot) => snapshot.raw_status(),
            _ => {
                missing = Snapshot::unknown(&why_not);
                missing.raw_status()
            }
        };
        // What is observed is a part of the states: it may be as large, and grows as old.
        let observed = snapshot
            .filter(|_| post.states || self.content.is_whole())
            .and_then(Snapshot::topology);
        topology = match (observed, &self.topology) {
            (Some(topology), _) => Some(Cow::Borrowed(topology)),
            (None, Some(applied)) => {
                let has_states = post.states && snapshot.is_some();
                let why_not =
                    if has_states { "this snapshot has no topology".into() } else { why_not };
                let observed = Observed::Unknown(why_not.into_owned());
                Some(Cow::Owned(Topology { applied: applied.clone(), observed }))
            }
            (None, None) => None,
        };
        serde_json::to_vec(&Body {
            host_uuid: self.link.host(),
            agent_version: &self.agent_version,
            status,
            topology: topology.as_deref().map(body::Topology::from),
            lifecycle: &lifecycle,
        })
    }

    /// Why a POST has no states, for its `status.error`.
    fn why_no_states<'a>(&self, states: Option<&'a States>) -> Cow<'a, str> {
        let trouble = &self.trouble;
        if self.content.states_rest() {
            return format!(
                "the states are left out, as the master failed on them: {}",
                self.states_trouble
            )
            .into();
        }
        match states {
            Some(states) if states.are_stale() => {
                "no fresh snapshot: it grew old while it was sent".into()
            }
            Some(States { snapshot, .. }) if snapshot.is_unknown() => {
                snapshot.fault().unwrap_or_default().into()
            }
            Some(_) if self.content.is_whole() => "the states are in another POST".into(),
            Some(_) => format!(
                "the states are sent alone, as the master failed on a body with more: {trouble}"
            )
            .into(),
            None => self.no_snapshot().into(),
        }
    }

    pub(super) fn within(&self) -> Duration {
        let limit = self.schedule.post_limit();
        self.deadline
            .map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()).min(limit))
    }

    /// The deltas of a POST. While the outbox does not answer a beat goes on without deltas.
    fn share(&mut self, share: DeltaSelection) -> Result<Vec<QueuedDelta>, Nothing> {
        if share == DeltaSelection::None {
            return Ok(Vec::new());
        }
        let patience = limits::BATCH_WAIT.min(self.schedule.interval() / 2).min(self.within());
        let deltas = match self.batches.get(share, self.content.suspects(), patience) {
            Some(mut batch) => {
                self.note_files(&mut batch);
                batch.deltas
            }
            None => {
                self.files_are_gone = false;
                self.note_overdue();
                Err(Nothing::NotNow)
            }
        };
        match (share, deltas) {
            (DeltaSelection::Newest(_), Err(Nothing::NotNow)) => Ok(Vec::new()),
            (_, deltas) => deltas,
        }
    }

    fn settle(&self, deltas: &[QueuedDelta], settled: DeliveryResult) {
        self.outbox
            .settle(RowChange::Answered(deltas.iter().map(|kept| kept.id).collect(), settled));
    }

    /// What a beat says when its snapshot is not there in time.
    fn no_snapshot(&self) -> String {
        match (self.deadline, self.schedule.asked()) {
            (Some(_), _) => "no fresh snapshot: the agent is stopping".to_owned(),
            (None, Some(asked)) => format!(
                "no fresh snapshot: the status source has not answered for {:.1} s",
                asked.elapsed().as_secs_f64()
            ),
            (None, None) => "no fresh snapshot".to_owned(),
        }
    }
}
