//! What the POSTs of a beat carry. Values only: the heartbeat thread, or a test, reports how each
//! POST ended.
//!
//! The master can fail on a body after it has applied the deltas in it, and a proxy can fail on a
//! body that is too large for it. If such a body is sent again unchanged, it fails every time, and
//! its deltas close newer rows. So a body that fails is made smaller. A POST is *in doubt* if part
//! of its body was sent and the answer is 5xx or missing.
//!
//! 1. *Whole* (the start): states and deltas in one body. In doubt → apart, from the next beat on.
//!    Rejected → apart, at once.
//! 2. *Apart*: a POST carries states or deltas, never both. The *light* POST comes first: the
//!    deltas, without states. Once it is accepted, the states are sent alone. Accepted → whole
//!    again. In doubt or rejected → the states are suspended.
//! 3. A light POST with deltas in doubt → the next beat starts *bare*: no states, no deltas. Bare
//!    in doubt → an outage; the deltas are tried together again. Bare accepted → deltas one to a
//!    body, newest first.
//! 4. A single delta in doubt is suspended, and so are older ones of its decky and operation. It is
//!    tried alone from then on. A bare POST follows it: if that is not accepted either, the master
//!    does not answer at all, and no other delta is tried.
//! 5. The master applied nothing of a rejected body: the deltas are halved at once, without states,
//!    until one is rejected alone.
//! 6. A suspension lasts 10 beats, doubled each time up to a day.
//! 7. If a beat has no time for all of its POSTs, the next beat continues with them.
//!
//! `schedule` decides when a beat is sent. This module decides what it carries.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crate::delta::Operation;
use crate::limits;
use crate::outbox::QueuedDelta;

/// What one POST carries besides the topology, which is in every POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Post {
    /// The states of what runs here. Otherwise the status says why they are left out.
    pub(crate) states: bool,
    pub(crate) deltas: DeltaSelection,
}

/// Whether states are known and fresh enough to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Available,
    Unavailable,
}

/// Which of the deltas that may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeltaSelection {
    None,
    /// At most this many of the newest, without the suspended ones.
    Newest(usize),
    /// The newest one.
    One,
    /// This delta, which was in doubt alone before, unless a newer one of its decky and operation
    /// must be sent first.
    Only(i64),
    /// Exactly this delta, in a second attempt.
    Same(i64),
}

impl Default for DeltaSelection {
    /// As many as fit into a body.
    fn default() -> Self {
        Self::Newest(limits::DELTAS_PER_BODY)
    }
}

/// Why a POST was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NothingToSend {
    /// The selected delta does not wait in the outbox.
    NoSuchDelta,
    /// It waits for a newer one of its decky and operation.
    Held,
    /// The outbox could not be read, or the states have become stale.
    NotAvailable,
}

/// How one POST ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PostOutcome {
    Accepted,
    /// The master may have applied the deltas.
    InDoubt,
    /// The body was rejected, and nothing of it was applied.
    Rejected,
    /// The outcome does not depend on the body: no connection, a rejected host, "retry later".
    Inconclusive,
}

/// What the outcome of a POST means for its beat. The last three do not fail the beat, because it
/// was accepted before, and it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Consequence {
    /// This result is the result of the beat.
    DecidesBeat,
    /// The states are suspended.
    StatesSuspended,
    /// A delta that was sent alone is suspended.
    DeltaSuspended,
    /// A delta that was sent alone is rejected.
    DeltaRejected,
}

/// A number of beats that something is left out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suspension {
    remaining: u64,
    length: u64,
}

/// A delta that was in doubt alone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspect {
    decky: String,
    operation: Operation,
    suspension: Suspension,
}

impl Suspect {
    /// Whether a delta with these values is for the same row of the master.
    fn has_row_of(&self, decky: &str, operation: Operation) -> bool {
        self.operation == operation && self.decky == decky
    }
}

/// The deltas that were in doubt alone, by their ids. The outbox thread leaves out what they hold
/// back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Suspects(BTreeMap<i64, Suspect>);

impl Suspects {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a delta is the suspect `id`, or a newer one of its decky and operation.
    pub(crate) fn is_same_or_newer(&self, id: i64, delta: &QueuedDelta) -> bool {
        let decky = delta.delta.decky();
        let operation = delta.delta.operation();
        delta.id >= id
            && self.0.get(&id).is_some_and(|suspect| suspect.has_row_of(decky, operation))
    }

    /// The deltas that they hold back.
    pub(crate) fn held_back(&self) -> HeldBack<'_> {
        let newest = self
            .0
            .iter()
            .map(|(id, Suspect { decky, operation, .. })| ((decky.as_str(), *operation), *id));
        HeldBack { suspects: self, newest: newest.collect() }
    }
}

/// Deltas that are left out of a body.
#[derive(Debug)]
pub(crate) struct HeldBack<'a> {
    suspects: &'a Suspects,
    /// The newest suspect of each decky and operation.
    newest: HashMap<(&'a str, Operation), i64>,
}

impl HeldBack<'_> {
    /// Whether a delta is a suspect, or older than a suspect of its decky and operation, whose row
    /// the master would close with it.
    pub(crate) fn contains(&self, delta: &QueuedDelta) -> bool {
        let newest = self.newest.get(&(delta.delta.decky(), delta.delta.operation()));
        newest.is_some_and(|newest| *newest > delta.id) || self.suspects.0.contains_key(&delta.id)
    }
}

/// What bodies carry, from beat to beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Whole,
    Apart,
    /// Apart, and the next beat starts bare.
    Bare,
    /// Apart, and the deltas one to a body.
    Singly,
}

/// The next POST of the beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Whole,
    /// The states alone, before the light POST: the last beat had no time to send them after it.
    StatesFirst,
    Light,
    Bare,
    /// A bare POST before a rejected body with this many deltas is halved.
    BareBeforeHalves(usize),
    /// A bare POST after a single delta in doubt. It shows whether the delta is the cause, or the
    /// master does not answer at all.
    BareAfterSingle,
    /// One of this many newest deltas was rejected.
    Halves(usize),
    Singles,
    Suspects,
    States,
    Done,
}

/// Decides what each POST carries.
#[derive(Debug)]
pub(crate) struct Content {
    mode: Mode,
    step: Step,
    /// Set while the states are suspended. It stays, with no beats remaining, until the master
    /// accepts them.
    states: Option<Suspension>,
    suspects: Arc<Suspects>,
    /// The longest suspension, in beats.
    longest: u64,
    /// How many more deltas may be sent one to a body in this beat.
    singles_left: usize,
    /// This beat begins with the suspects, because the last one had no time for them.
    suspects_first: bool,
    /// A POST of this beat, or of the last one until this one begins, was accepted.
    accepted: bool,
}

impl Content {
    pub(crate) fn new(interval: Duration) -> Self {
        let longest = limits::SUSPEND_MAX.as_nanos() / interval.as_nanos().max(1);
        let longest = u64::try_from(longest).unwrap_or(u64::MAX).max(limits::SUSPEND_BEATS);
        Self {
            mode: Mode::Whole,
            step: Step::Done,
            states: None,
            suspects: Arc::default(),
            longest,
            singles_left: 0,
            suspects_first: false,
            accepted: false,
        }
    }

    /// Begins a beat.
    pub(crate) fn begin_beat(&mut self) {
        let count_down = |suspension: &mut Suspension| {
            suspension.remaining = suspension.remaining.saturating_sub(1);
        };
        if !self.suspects.is_empty() {
            self.suspects_mut()
                .values_mut()
                .for_each(|suspect| count_down(&mut suspect.suspension));
        }
        self.states.iter_mut().for_each(count_down);
        self.singles_left = limits::SINGLES_PER_BEAT;
        let suspects_remain =
            self.step == Step::Suspects && self.due_suspect().is_some() && !self.suspects_first;
        self.suspects_first = suspects_remain && matches!(self.mode, Mode::Whole | Mode::Apart);
        self.step = if self.suspects_first { Step::Suspects } else { self.first_step() };
        self.accepted = false;
    }

    /// Continues what the last beat had no time for. If each beat started over, a long sequence of
    /// POSTs would never be completed.
    fn first_step(&self) -> Step {
        match (self.mode, self.step) {
            (Mode::Whole, _) => Step::Whole,
            // A beat whose only POST is a rejected half would not count as a beat, so an accepted
            // POST comes before each of them.
            (_, Step::Halves(suspects)) if self.accepted => Step::Halves(suspects),
            (_, Step::Halves(suspects) | Step::BareBeforeHalves(suspects)) => {
                Step::BareBeforeHalves(suspects)
            }
            (Mode::Singly, Step::Singles) if self.accepted => Step::Singles,
            (Mode::Bare | Mode::Singly, _) => Step::Bare,
            (Mode::Apart, Step::Suspects | Step::States) => Step::StatesFirst,
            (Mode::Apart, _) => Step::Light,
        }
    }

    /// The next POST of this beat, if there is one.
    pub(crate) fn next_post(&mut self, states: Availability) -> Option<Post> {
        let has_states = states == Availability::Available;
        let light = |deltas| Some(Post { states: false, deltas });
        match self.step {
            Step::Whole => Some(Post { states: has_states, deltas: DeltaSelection::default() }),
            Step::StatesFirst if has_states && !self.states_are_suspended() => {
                Some(Post { states: true, deltas: DeltaSelection::None })
            }
            Step::StatesFirst => {
                self.step = Step::Light;
                light(DeltaSelection::default())
            }
            Step::Light => light(DeltaSelection::default()),
            Step::Bare | Step::BareBeforeHalves(_) | Step::BareAfterSingle => {
                light(DeltaSelection::None)
            }
            Step::Halves(suspects) => light(DeltaSelection::Newest(suspects.div_ceil(2))),
            Step::Singles if self.singles_left > 0 => light(DeltaSelection::One),
            Step::Singles | Step::Suspects => match self.due_suspect() {
                Some(id) if self.singles_left > 0 => {
                    self.step = Step::Suspects;
                    light(DeltaSelection::Only(id))
                }
                _ => {
                    self.step = Step::States;
                    self.next_post(states)
                }
            },
            Step::States => {
                if self.mode == Mode::Whole || self.states_are_suspended() {
                    self.step = Step::Done;
                    return None;
                }
                // If they have become stale, the next beat begins with them.
                has_states.then_some(Post { states: true, deltas: DeltaSelection::None })
            }
            Step::Done => None,
        }
    }

    /// Records that the POST was not made.
    pub(crate) fn skip_post(&mut self, why: NothingToSend) {
        match (self.step, why) {
            (Step::Suspects, NothingToSend::NoSuchDelta) => {
                if let Some(id) = self.due_suspect() {
                    self.suspects_mut().remove(&id);
                }
            }
            (Step::Suspects, _) => {
                let due = self.due_suspect();
                if let Some(suspect) = due.and_then(|id| self.suspects_mut().get_mut(&id)) {
                    suspect.suspension.remaining = 1;
                }
            }
            (Step::Singles, NothingToSend::NoSuchDelta | NothingToSend::Held) => {
                // Every delta that waited has been tried alone.
                if self.mode == Mode::Singly {
                    self.mode = Mode::Apart;
                }
                self.step = Step::Suspects;
            }
            (Step::StatesFirst, _) => self.step = Step::Light,
            (Step::Light, _) => self.step = Step::Suspects,
            (Step::States, _) => (),
            _ => self.step = Step::Done,
        }
    }

    /// Whether the next POST is only made for the states.
    pub(crate) fn requires_states(&self) -> bool {
        matches!(self.step, Step::States | Step::StatesFirst)
    }

    /// Whether the next POST is only made for deltas, because the beat was accepted before.
    pub(crate) fn requires_deltas(&self) -> bool {
        self.step == Step::Light && self.accepted
    }

    /// Records that a body with states was in doubt, and a second attempt without them was made.
    pub(crate) fn states_in_doubt(&mut self) {
        if self.mode == Mode::Whole {
            self.mode = Mode::Apart;
        }
    }

    /// Records how a POST with these deltas ended.
    pub(crate) fn post_ended(
        &mut self,
        post: Post,
        deltas: &[QueuedDelta],
        outcome: PostOutcome,
    ) -> Consequence {
        self.accepted |= outcome == PostOutcome::Accepted;
        match self.step {
            Step::Whole => self.whole_ended(post, outcome),
            Step::Light => self.light_ended(deltas, outcome),
            Step::Bare | Step::BareBeforeHalves(_) | Step::BareAfterSingle => {
                self.bare_ended(outcome)
            }
            Step::Halves(suspects) => return self.half_ended(suspects, deltas, outcome),
            Step::Singles | Step::Suspects => return self.single_ended(deltas, outcome),
            Step::States | Step::StatesFirst => return self.states_ended(outcome),
            Step::Done => (),
        }
        Consequence::DecidesBeat
    }

    fn whole_ended(&mut self, post: Post, outcome: PostOutcome) {
        self.step = match outcome {
            PostOutcome::Accepted => {
                if post.states {
                    self.states = None;
                }
                Step::Suspects
            }
            PostOutcome::InDoubt => {
                self.mode = Mode::Apart;
                Step::Done
            }
            PostOutcome::Rejected => {
                self.mode = Mode::Apart;
                Step::Light
            }
            PostOutcome::Inconclusive => Step::Done,
        };
    }

    fn light_ended(&mut self, deltas: &[QueuedDelta], outcome: PostOutcome) {
        self.step = match outcome {
            PostOutcome::Accepted => Step::Suspects,
            PostOutcome::InDoubt => {
                self.deltas_in_doubt(deltas);
                Step::Done
            }
            PostOutcome::Rejected if deltas.is_empty() => Step::Done,
            // The master accepts bodies, so one of the deltas is the cause.
            PostOutcome::Rejected if self.accepted => Step::Halves(deltas.len()),
            PostOutcome::Rejected => Step::BareBeforeHalves(deltas.len()),
            PostOutcome::Inconclusive => Step::Done,
        };
    }

    fn deltas_in_doubt(&mut self, deltas: &[QueuedDelta]) {
        self.mode = if deltas.is_empty() { Mode::Apart } else { Mode::Bare };
    }

    fn bare_ended(&mut self, outcome: PostOutcome) {
        self.step = match (outcome, self.step) {
            (PostOutcome::Accepted, Step::BareBeforeHalves(suspects)) => Step::Halves(suspects),
            (PostOutcome::Accepted, Step::BareAfterSingle) if self.mode != Mode::Singly => {
                Step::Suspects
            }
            (PostOutcome::Accepted, _) => {
                self.mode = Mode::Singly;
                Step::Singles
            }
            (PostOutcome::InDoubt | PostOutcome::Rejected, _) if self.mode == Mode::Bare => {
                self.mode = Mode::Apart;
                Step::Done
            }
            _ => Step::Done,
        };
    }

    fn half_ended(
        &mut self,
        suspects: usize,
        deltas: &[QueuedDelta],
        outcome: PostOutcome,
    ) -> Consequence {
        self.step = match (outcome, deltas) {
            (PostOutcome::Rejected, [_]) => {
                self.step = Step::Light;
                return Consequence::DeltaRejected;
            }
            (PostOutcome::Rejected, [_, _, ..]) => Step::Halves(deltas.len()),
            (PostOutcome::Accepted, [_, ..]) if deltas.len() < suspects => {
                Step::Halves(suspects - deltas.len())
            }
            // All of them were accepted, or are held back now.
            (PostOutcome::Accepted, _) => Step::Suspects,
            (PostOutcome::InDoubt, [_]) => return self.single_ended(deltas, outcome),
            (PostOutcome::InDoubt, _) => {
                self.deltas_in_doubt(deltas);
                Step::Done
            }
            _ => Step::Done,
        };
        Consequence::DecidesBeat
    }

    fn single_ended(&mut self, deltas: &[QueuedDelta], outcome: PostOutcome) -> Consequence {
        self.singles_left = self.singles_left.saturating_sub(1);
        let [delta] = deltas else { return Consequence::DecidesBeat };
        match outcome {
            PostOutcome::Accepted => {
                self.suspects_mut().remove(&delta.id);
                Consequence::DecidesBeat
            }
            PostOutcome::InDoubt => {
                let last = self.suspects.0.get(&delta.id).map(|suspect| suspect.suspension);
                let suspect = Suspect {
                    decky: delta.delta.decky().to_owned(),
                    operation: delta.delta.operation(),
                    suspension: next_suspension(last, self.longest),
                };
                self.suspects_mut().insert(delta.id, suspect);
                self.step = Step::BareAfterSingle;
                Consequence::DeltaSuspended
            }
            PostOutcome::Rejected => {
                self.suspects_mut().remove(&delta.id);
                Consequence::DeltaRejected
            }
            PostOutcome::Inconclusive => {
                self.step = Step::Done;
                Consequence::DecidesBeat
            }
        }
    }

    fn states_ended(&mut self, outcome: PostOutcome) -> Consequence {
        self.step = match (self.step, outcome) {
            (Step::StatesFirst, PostOutcome::Inconclusive) => Step::Done,
            (Step::StatesFirst, _) => Step::Light,
            _ => Step::Done,
        };
        match outcome {
            PostOutcome::Accepted => {
                self.states = None;
                if self.mode == Mode::Apart {
                    self.mode = Mode::Whole;
                }
                Consequence::DecidesBeat
            }
            PostOutcome::InDoubt | PostOutcome::Rejected => {
                self.states = Some(next_suspension(self.states, self.longest));
                Consequence::StatesSuspended
            }
            PostOutcome::Inconclusive => Consequence::DecidesBeat,
        }
    }

    /// The newest suspect whose suspension is over. A suspect waits for newer ones of its decky and
    /// operation.
    fn due_suspect(&self) -> Option<i64> {
        let mut seen = HashSet::new();
        let mut newest = self
            .suspects
            .0
            .iter()
            .rev()
            .filter(|(_, suspect)| seen.insert((suspect.decky.as_str(), suspect.operation)));
        newest.find(|(_, suspect)| suspect.suspension.remaining == 0).map(|(id, _)| *id)
    }

    /// The deltas that were in doubt alone.
    pub(crate) fn suspects(&self) -> &Arc<Suspects> {
        &self.suspects
    }

    fn suspects_mut(&mut self) -> &mut BTreeMap<i64, Suspect> {
        &mut Arc::make_mut(&mut self.suspects).0
    }

    /// Whether the states are left out of this beat.
    pub(crate) fn states_are_suspended(&self) -> bool {
        self.states_suspended_for().is_some()
    }

    /// The number of beats until the states are tried again.
    pub(crate) fn states_suspended_for(&self) -> Option<u64> {
        self.states
            .map(|suspension| suspension.remaining.min(suspension.length))
            .filter(|remaining| *remaining > 0)
    }

    /// Whether states and deltas share a body.
    pub(crate) fn is_whole(&self) -> bool {
        self.mode == Mode::Whole
    }

    /// The number of deltas that were in doubt alone.
    pub(crate) fn suspended_deltas(&self) -> u64 {
        self.suspects.0.len() as u64
    }
}

/// The first suspension, or one that is twice as long as the last one.
fn next_suspension(last: Option<Suspension>, longest: u64) -> Suspension {
    let length = last
        .map_or(limits::SUSPEND_BEATS, |suspension| suspension.length.saturating_mul(2))
        .min(longest);
    // The beat in which it begins does not count.
    Suspension { remaining: length.saturating_add(1), length }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::Availability::{Available, Unavailable};
    use super::*;
    use crate::delta::LifecycleDelta;

    const INTERVAL: Duration = Duration::from_secs(30);

    /// A master that fails on what a test chooses, and the outbox of its host.
    #[derive(Default)]
    struct FakeMaster {
        waiting: BTreeMap<i64, QueuedDelta>,
        /// Bodies with one of these fail, or are rejected, whatever else is in them.
        failing: BTreeSet<i64>,
        rejecting: BTreeSet<i64>,
        states: Option<PostOutcome>,
        /// It does not answer.
        is_down: bool,
        /// Bodies with more deltas fail.
        max_deltas: Option<usize>,
        /// How often each was in a POST that was not rejected.
        sent: BTreeMap<i64, u32>,
        rejected: BTreeSet<i64>,
        states_accepted: u32,
    }

    impl FakeMaster {
        fn push(&mut self, id: i64) {
            // Three deckies, so that some share one.
            let delta = LifecycleDelta::succeeded(format!("d{}", id % 3), Operation::Deploy);
            self.waiting.insert(id, QueuedDelta { id, delta });
        }

        fn answer(&self, post: Post, deltas: &[QueuedDelta]) -> PostOutcome {
            let has = |ids: &BTreeSet<i64>| deltas.iter().any(|delta| ids.contains(&delta.id));
            match self.states.filter(|_| post.states) {
                _ if self.is_down => PostOutcome::InDoubt,
                Some(outcome) => outcome,
                _ if has(&self.rejecting) => PostOutcome::Rejected,
                _ if has(&self.failing)
                    || self.max_deltas.is_some_and(|max_deltas| deltas.len() > max_deltas) =>
                {
                    PostOutcome::InDoubt
                }
                _ => PostOutcome::Accepted,
            }
        }

        fn select(&self, content: &Content, selection: DeltaSelection) -> Vec<QueuedDelta> {
            let free = self
                .waiting
                .values()
                .rev()
                .filter(|delta| !content.suspects().held_back().contains(delta))
                .cloned();
            match selection {
                DeltaSelection::None => Vec::new(),
                DeltaSelection::Newest(max_deltas) => free.take(max_deltas).collect(),
                DeltaSelection::One => free.take(1).collect(),
                DeltaSelection::Only(id) => {
                    let mut same = self
                        .waiting
                        .values()
                        .rev()
                        .filter(|delta| content.suspects().is_same_or_newer(id, delta));
                    same.next().filter(|delta| delta.id == id).cloned().into_iter().collect()
                }
                DeltaSelection::Same(id) => self.waiting.get(&id).cloned().into_iter().collect(),
            }
        }

        /// Makes one beat as the heartbeat thread does: what each POST carried, and how it ended.
        fn beat(&mut self, content: &mut Content) -> Vec<(bool, Vec<i64>, PostOutcome)> {
            self.short_beat(content, 10_000)
        }

        /// The same with time for `max_posts` POSTs, and then as many as it takes to decide the
        /// beat.
        fn short_beat(
            &mut self,
            content: &mut Content,
            max_posts: usize,
        ) -> Vec<(bool, Vec<i64>, PostOutcome)> {
            content.begin_beat();
            let mut posts = Vec::new();
            let mut is_decided = false;
            while !is_decided || posts.len() < max_posts {
                let Some(post) = content.next_post(Available) else { break };
                let deltas = self.select(content, post.deltas);
                let is_for_one =
                    matches!(post.deltas, DeltaSelection::One | DeltaSelection::Only(_));
                if deltas.is_empty() && (is_for_one || content.requires_deltas()) {
                    let is_there = matches!(post.deltas, DeltaSelection::Only(id) if self.waiting.contains_key(&id));
                    content.skip_post(if is_there {
                        NothingToSend::Held
                    } else {
                        NothingToSend::NoSuchDelta
                    });
                    continue;
                }
                assert!(
                    !post.states || deltas.is_empty() || content.is_whole(),
                    "states and deltas apart"
                );
                let outcome = self.answer(post, &deltas);
                let ids: Vec<_> = deltas.iter().map(|delta| delta.id).collect();
                if outcome != PostOutcome::Rejected {
                    ids.iter().for_each(|id| *self.sent.entry(*id).or_default() += 1);
                }
                if outcome == PostOutcome::Accepted {
                    ids.iter().for_each(|id| drop(self.waiting.remove(id)));
                    self.states_accepted += u32::from(post.states);
                }
                let consequence = content.post_ended(post, &deltas, outcome);
                is_decided |= consequence == Consequence::DecidesBeat;
                if consequence == Consequence::DeltaRejected {
                    self.waiting.remove(&ids[0]);
                    self.rejected.insert(ids[0]);
                }
                posts.push((post.states, ids, outcome));
                assert!(posts.len() < 10_000, "a beat ends");
            }
            posts
        }
    }

    use PostOutcome::{Accepted, InDoubt, Inconclusive, Rejected};

    #[test]
    fn beat_is_one_whole_body_by_default() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster::default();
        master.push(1);
        assert_eq!(master.beat(&mut content), [(true, vec![1], Accepted)]);
        assert_eq!(master.beat(&mut content), [(true, vec![], Accepted)]);
    }

    #[test]
    fn failing_states_are_suspended_for_ten_beats_then_twenty() {
        for outcome in [InDoubt, Rejected] {
            let mut content = Content::new(INTERVAL);
            let mut master = FakeMaster { states: Some(outcome), ..FakeMaster::default() };
            master.push(1);
            let first = master.beat(&mut content);
            let apart = [(false, vec![1], Accepted), (true, vec![], outcome)];
            match outcome {
                // It may have been applied, so only the next beat is lighter.
                InDoubt => {
                    assert_eq!(first, [(true, vec![1], InDoubt)]);
                    assert_eq!(master.beat(&mut content), apart);
                }
                _ => assert_eq!(first, [&[(true, vec![1], Rejected)][..], &apart].concat()),
            }
            for pause in [10, 20, 40] {
                for left in (1..=pause).rev() {
                    assert_eq!(master.beat(&mut content), [(false, vec![], Accepted)]);
                    assert_eq!(content.states_suspended_for(), Some(left));
                }
                assert_eq!(
                    master.beat(&mut content),
                    [(false, vec![], Accepted), (true, vec![], outcome)]
                );
            }
            master.states = None;
            while master.states_accepted == 0 {
                master.beat(&mut content);
            }
            assert_eq!(master.beat(&mut content), [(true, vec![], Accepted)], "whole again");
            master.states = Some(Rejected);
            master.beat(&mut content);
            assert_eq!(content.states_suspended_for(), Some(10), "a new suspension is short again");
        }
    }

    #[test]
    fn suspension_is_at_most_a_day() {
        for (interval, longest) in [(30, 2_880), (3_600, 24), (86_400, 10)] {
            let mut content = Content::new(Duration::from_secs(interval));
            let mut master = FakeMaster { states: Some(Rejected), ..FakeMaster::default() };
            for _ in 0..20_000 {
                master.beat(&mut content);
                assert!(content.states_suspended_for().unwrap_or(0) <= longest + 1);
            }
            assert_eq!(content.states.unwrap().length, longest);
        }
    }

    #[test]
    fn failing_delta_and_older_ones_of_its_decky_are_suspended() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster::default();
        // 2, 5 and 8 share a decky.
        (1..=8).for_each(|id| master.push(id));
        master.failing.insert(5);
        assert_eq!(master.beat(&mut content), [(true, (1..=8).rev().collect(), InDoubt)]);
        assert_eq!(master.beat(&mut content), [(false, (1..=8).rev().collect(), InDoubt)]);
        let one = |id| (false, vec![id], Accepted);
        let bare = || (false, vec![], Accepted);
        let states = || (true, vec![], Accepted);
        let singly = [
            bare(),
            one(8),
            one(7),
            one(6),
            (false, vec![5], InDoubt),
            bare(),
            one(4),
            one(3),
            one(1),
            states(),
        ];
        assert_eq!(master.beat(&mut content), singly);
        assert_eq!(
            (content.suspended_deltas(), master.waiting.keys().copied().collect::<Vec<_>>()),
            (1, vec![2, 5])
        );
        // A newer one of its decky is sent in the meantime.
        master.push(11);
        assert_eq!(master.beat(&mut content), [(true, vec![11], Accepted)]);
        for _ in 0..9 {
            assert_eq!(master.beat(&mut content), [(true, vec![], Accepted)]);
        }
        assert_eq!(
            master.beat(&mut content),
            [(true, vec![], Accepted), (false, vec![5], InDoubt), bare()]
        );
        for _ in 0..20 {
            assert_eq!(master.beat(&mut content), [(true, vec![], Accepted)]);
        }
        master.failing.clear();
        assert_eq!(master.beat(&mut content), [(true, vec![], Accepted), one(5)]);
        assert_eq!(master.beat(&mut content), [(true, vec![2], Accepted)]);
        assert!(
            master.waiting.is_empty()
                && master.rejected.is_empty()
                && content.suspended_deltas() == 0
        );
    }

    #[test]
    fn outage_suspends_no_delta() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster { is_down: true, ..FakeMaster::default() };
        (1..=3).for_each(|id| master.push(id));
        let tried: Vec<_> = (0..7).flat_map(|_| master.beat(&mut content)).collect();
        let all = vec![3, 2, 1];
        let none = vec![];
        let carried: Vec<_> = tried.iter().map(|(states, ids, _)| (*states, ids.clone())).collect();
        let light = |ids: &Vec<i64>| (false, ids.clone());
        let expected = [
            (true, all.clone()),
            light(&all),
            light(&none),
            light(&all),
            light(&none),
            light(&all),
            light(&none),
        ];
        assert_eq!(carried, expected);
        master.is_down = false;
        assert_eq!(master.beat(&mut content), [(false, all, Accepted), (true, vec![], Accepted)]);
        assert_eq!(content.suspended_deltas(), 0);
    }

    #[test]
    fn outage_among_single_deltas_suspends_only_the_first() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster { max_deltas: Some(1), ..FakeMaster::default() };
        (1..=9).for_each(|id| master.push(id));
        master.beat(&mut content);
        master.beat(&mut content);
        content.begin_beat();
        let post = content.next_post(Available).unwrap();
        assert_eq!(post, Post { states: false, deltas: DeltaSelection::None });
        assert_eq!(content.post_ended(post, &[], Accepted), Consequence::DecidesBeat);
        let single = content.next_post(Available).unwrap();
        let deltas = master.select(&content, single.deltas);
        assert_eq!(content.post_ended(single, &deltas, InDoubt), Consequence::DeltaSuspended);
        let bare = content.next_post(Available).unwrap();
        assert_eq!(
            content.post_ended(bare, &[], InDoubt),
            Consequence::DecidesBeat,
            "the beat has failed"
        );
        assert_eq!((content.next_post(Available), content.suspended_deltas()), (None, 1));
    }

    #[test]
    fn at_most_fifty_single_deltas_in_a_beat() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster { max_deltas: Some(1), ..FakeMaster::default() };
        (1..=120).for_each(|id| master.push(id));
        master.beat(&mut content);
        master.beat(&mut content);
        let counts: Vec<_> = (0..3).map(|_| master.beat(&mut content).len()).collect();
        // Plus a bare POST and the states.
        assert_eq!(counts, [52, 52, 22]);
        assert_eq!(master.beat(&mut content), [(true, vec![], Accepted)]);
    }

    #[test]
    fn halving_finds_the_rejected_deltas() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster::default();
        (1..=40).for_each(|id| master.push(id));
        master.rejecting.extend([1, 20, 21, 40]);
        let posts = master.beat(&mut content);
        assert_eq!(master.rejected, master.rejecting);
        assert!(master.waiting.is_empty());
        assert_eq!(
            posts.iter().filter(|(states, ..)| *states).count(),
            2,
            "the first, and the last: {posts:?}"
        );
        let bare = posts.iter().filter(|(states, ids, _)| !states && ids.is_empty()).count();
        assert_eq!(bare, 1, "before the halves");
        assert!(posts.len() <= 2 + 4 * 8 + 2, "{}", posts.len());
        assert!(
            master.sent.values().all(|times| *times == 1),
            "nothing was sent twice: {:?}",
            master.sent
        );
    }

    #[test]
    fn states_that_were_left_over_come_first_in_the_next_beat() {
        for (outcome, then) in [(Accepted, true), (InDoubt, false), (Inconclusive, false)] {
            let mut content = Content::new(INTERVAL);
            let alone = Some(Post { states: true, deltas: DeltaSelection::None });
            let light = Some(Post {
                states: false,
                deltas: DeltaSelection::Newest(limits::DELTAS_PER_BODY),
            });
            let next = |content: &mut Content, outcome| {
                let post = content.next_post(Available);
                post.map(|post| content.post_ended(post, &[], outcome))
            };
            content.begin_beat();
            let _ = next(&mut content, InDoubt);
            // Each POST takes so long that a beat has time for one.
            for _ in 0..2 {
                content.begin_beat();
                assert_eq!(content.next_post(Unavailable), light, "there are no states");
                let _ = next(&mut content, Accepted);
            }
            content.begin_beat();
            assert_eq!(content.next_post(Available), alone);
            let consequence = next(&mut content, outcome);
            assert_eq!(consequence == Some(Consequence::DecidesBeat), outcome != InDoubt);
            assert_eq!(
                (content.next_post(Available), content.is_whole()),
                (light.filter(|_| outcome != Inconclusive), then)
            );
        }
    }

    #[test]
    fn inconclusive_outcome_changes_nothing() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster { states: Some(Inconclusive), ..FakeMaster::default() };
        master.push(1);
        for _ in 0..3 {
            assert_eq!(master.beat(&mut content), [(true, vec![1], Inconclusive)]);
        }
        master.states = None;
        assert_eq!(master.beat(&mut content), [(true, vec![1], Accepted)]);
    }

    #[test]
    fn unknown_states_are_not_counted_as_accepted() {
        let mut content = Content::new(INTERVAL);
        content.begin_beat();
        let whole = content.next_post(Available).unwrap();
        let _ = content.post_ended(whole, &[], InDoubt);
        content.begin_beat();
        let light = content.next_post(Unavailable).unwrap();
        let _ = content.post_ended(light, &[], Accepted);
        assert_eq!(content.next_post(Unavailable), None);
        assert!(!content.is_whole());
    }

    #[test]
    fn suspect_waits_for_a_newer_one_of_its_decky() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster::default();
        master.push(1);
        master.failing.insert(1);
        (0..6).for_each(|_| drop(master.beat(&mut content)));
        // The same decky. It is in doubt some beats later.
        master.push(4);
        master.failing.insert(4);
        (0..4).for_each(|_| drop(master.beat(&mut content)));
        assert_eq!(content.suspended_deltas(), 2);
        master.failing.clear();
        let mut sent = Vec::new();
        while !master.waiting.is_empty() {
            sent.extend(master.beat(&mut content).into_iter().flat_map(|(_, ids, _)| ids));
        }
        assert_eq!(sent, [4, 1]);
    }

    #[test]
    fn held_suspect_stays_a_suspect() {
        let mut content = Content::new(INTERVAL);
        let mut master = FakeMaster::default();
        master.push(1);
        master.failing.insert(1);
        (0..3).for_each(|_| drop(master.beat(&mut content)));
        for _ in 0..30 {
            content.begin_beat();
            while let Some(post) = content.next_post(Available) {
                match post.deltas {
                    DeltaSelection::Only(_) => content.skip_post(NothingToSend::Held),
                    _ => drop(content.post_ended(post, &[], Accepted)),
                }
            }
        }
        assert_eq!(content.suspended_deltas(), 1);
        let tried: Vec<_> = master.beat(&mut content).into_iter().map(|(_, ids, _)| ids).collect();
        assert_eq!(tried, [vec![], vec![1], vec![]], "alone, as before");
    }

    proptest! {
        /// Whatever number of POSTs a beat has time for.
        #[test]
        fn short_beats_send_everything_in_the_end(
            deltas in 1..40_i64,
            failing in prop::collection::btree_set(1..40_i64, 0..3),
            rejecting in prop::collection::btree_set(1..40_i64, 0..3),
            max_deltas in prop::option::of(1..50_usize),
            posts in 1..4_usize,
            outage in 0..4_u32,
        ) {
            let mut content = Content::new(INTERVAL);
            let mut master = FakeMaster { max_deltas, ..FakeMaster::default() };
            (1..=deltas).for_each(|id| master.push(id));
            master.failing = &failing - &rejecting;
            master.rejecting = rejecting.clone();
            master.is_down = true;
            (0..outage).for_each(|_| drop(master.short_beat(&mut content, posts)));
            master.is_down = false;
            let mut without_success = 0;
            for _ in 0..300 {
                let accepted = master.short_beat(&mut content, posts).iter().any(|(.., outcome)| *outcome == Accepted);
                without_success = if accepted { 0 } else { without_success + 1 };
                prop_assert!(without_success <= 3, "the master accepts a beat again and again");
            }
            master.failing.clear();
            for _ in 0..400 {
                master.short_beat(&mut content, posts);
            }
            prop_assert!(master.waiting.is_empty(), "{:?}", master.waiting.keys());
            let expected: BTreeSet<_> = rejecting.into_iter().filter(|id| *id <= deltas).collect();
            prop_assert_eq!(&master.rejected, &expected);
            prop_assert!(content.is_whole());
            prop_assert_eq!(master.short_beat(&mut content, posts), [(true, vec![], Accepted)]);
        }

        #[test]
        fn all_but_failing_deltas_arrive(
            deltas in 1..90_i64,
            failing in prop::collection::btree_set(1..90_i64, 0..4),
            rejecting in prop::collection::btree_set(1..90_i64, 0..4),
            states in prop::sample::select(vec![None, Some(InDoubt), Some(Rejected)]),
            max_deltas in prop::option::of(1..100_usize),
            outage in 0..6_u32,
        ) {
            let mut content = Content::new(INTERVAL);
            let mut master = FakeMaster { states, max_deltas, ..FakeMaster::default() };
            (1..=deltas).for_each(|id| master.push(id));
            master.failing = &failing - &rejecting;
            master.rejecting = rejecting.clone();
            master.is_down = true;
            for _ in 0..outage {
                master.beat(&mut content);
            }
            master.is_down = false;
            for _ in 0..20 {
                let posts = master.beat(&mut content);
                // Each beat is accepted, or the one after it.
                prop_assert!(posts.iter().any(|(.., outcome)| *outcome == Accepted) || !content.is_whole());
            }
            // A failing delta holds back older ones of its decky, and nothing else.
            let held = |id: &i64| master.failing.iter().any(|failing| failing >= id && (failing - id) % 3 == 0);
            prop_assert!(master.waiting.keys().all(held), "{:?} behind {:?}", master.waiting.keys(), master.failing);
            prop_assert!(master.rejected.is_subset(&rejecting), "{:?}", master.rejected);
            master.failing.clear();
            for _ in 0..200 {
                master.beat(&mut content);
            }
            prop_assert!(master.waiting.is_empty(), "{:?}", master.waiting.keys());
            let expected: BTreeSet<_> = rejecting.into_iter().filter(|id| *id <= deltas).collect();
            prop_assert_eq!(master.rejected, expected);
        }
    }
}
