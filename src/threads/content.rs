//! What the POSTs of a beat carry. Values only: the heartbeat thread reports how each POST ended, and so may a test.
//!
//! The master can fail on a body after it has applied the deltas in it, and a proxy can fail on a body that is too large
//! for it. Sent again unchanged, such a body fails for ever, and its deltas close newer rows. So a body that fails is made
//! lighter. A POST is *in doubt* if part of its body was sent and the answer is 5xx or missing.
//!
//! 1. *Whole* (the start): states and deltas in one body. In doubt → apart, from the next beat on. Refused → apart, at
//!    once.
//! 2. *Apart*: a POST carries states or deltas, never both. The *light* POST comes first: the deltas, without states.
//!    Once it is accepted, the states are sent alone. Accepted → whole again. In doubt or refused → the states rest.
//! 3. A light POST with deltas in doubt → the next beat starts *bare*: no states, no deltas. Bare in doubt → an outage;
//!    the deltas are tried together again. Bare accepted → deltas one to a body, newest first.
//! 4. A single delta in doubt rests, and so do older ones of its decky and operation. It is tried alone from then on. A
//!    bare POST follows it: if that is not accepted either, the master is away, and no other delta is tried.
//! 5. A refused body applied nothing: the deltas are halved at once, without states, until one is refused alone.
//! 6. What rests does so for 10 beats, doubled each time up to a day.
//! 7. A beat that had no time for all of its POSTs is gone on with in the next one.
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
    /// The states of what runs here; otherwise a status that says why they are left out.
    pub(crate) states: bool,
    pub(crate) deltas: DeltaSelection,
}

/// Which of the deltas that may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeltaSelection {
    None,
    /// So many of the newest, without those that rest.
    Newest(usize),
    /// The newest alone, if there is one.
    One,
    /// One that was in doubt alone before, unless a newer one of its decky and operation is to be sent first.
    Only(i64),
    /// Exactly this one, once more.
    Same(i64),
}

impl Default for DeltaSelection {
    /// A whole body of them.
    fn default() -> Self {
        Self::Newest(limits::DELTAS_PER_BODY)
    }
}

/// Why there was nothing to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nothing {
    /// No such delta waits.
    Gone,
    /// It waits for something newer of its decky and operation.
    Held,
    /// The outbox could not be read, or the states have grown old.
    NotNow,
}

/// How one POST ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PostOutcome {
    Accepted,
    /// The master may have applied the deltas.
    InDoubt,
    /// The body was refused, and nothing of it was applied.
    Refused,
    /// It says nothing about the body: no connection, a refused host, "later".
    Unchanged,
}

/// What the outcome of a POST means for its beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Consequence {
    /// The answer is the beat's.
    QueueCounts,
    /// The beat has been accepted before, and goes on.
    Absorbed(Cause),
}

/// Why an outcome is no failure of the beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The states rest.
    StatesRest,
    /// A delta that was sent alone rests.
    DeltaRests,
    /// A delta was refused alone, and is to be rejected.
    DeltaRefused,
}

/// A pause in beats. It is doubled each time, up to a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rest {
    left: u64,
    length: u64,
}

/// A delta that was in doubt alone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspect {
    decky: String,
    operation: Operation,
    rest: Rest,
}

impl Suspect {
    /// The master cannot tell the rows of the two apart.
    fn is_of(&self, decky: &str, operation: Operation) -> bool {
        self.operation == operation && self.decky == decky
    }
}

/// The deltas that were in doubt alone, by their ids. The outbox thread leaves out what they hold back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Suspects(BTreeMap<i64, Suspect>);

impl Suspects {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a delta is this suspect, or a newer one of its decky and operation.
    pub(crate) fn is_of(&self, id: i64, kept: &QueuedDelta) -> bool {
        let (decky, operation) = (kept.delta.decky(), kept.delta.operation());
        kept.id >= id && self.0.get(&id).is_some_and(|suspect| suspect.is_of(decky, operation))
    }

    /// What they keep out of a body.
    pub(crate) fn held_back(&self) -> HeldBack<'_> {
        let newest = self
            .0
            .iter()
            .map(|(id, Suspect { decky, operation, .. })| ((decky.as_str(), *operation), *id));
        HeldBack { suspects: self, newest: newest.collect() }
    }
}

/// Deltas that stay out of a body.
#[derive(Debug)]
pub(crate) struct HeldBack<'a> {
    suspects: &'a Suspects,
    newest: HashMap<(&'a str, Operation), i64>,
}

impl HeldBack<'_> {
    /// It was in doubt alone, or a newer one of its decky and operation was: the master would give it that one's row.
    pub(crate) fn contains(&self, kept: &QueuedDelta) -> bool {
        let newest = self.newest.get(&(kept.delta.decky(), kept.delta.operation()));
        newest.is_some_and(|newest| *newest > kept.id) || self.suspects.0.contains_key(&kept.id)
    }
}

/// What the bodies carry until further notice.
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
    /// The states alone, before the light POST: the last beat took too long to send them after it.
    StatesFirst,
    Light,
    Bare,
    /// A bare POST before a refused body of so many deltas is halved.
    BareBeforeHalves(usize),
    /// A bare POST after a single delta in doubt: whether it is the delta, or the master does not answer anybody.
    BareAfterSingle,
    /// A refused delta is among so many of the newest.
    Halves(usize),
    Singles,
    Suspects,
    States,
    Done,
}

#[derive(Debug)]
pub(crate) struct Content {
    mode: Mode,
    step: Step,
    /// Set while the states rest. Kept, with nothing left, until they are accepted.
    states: Option<Rest>,
    suspects: Arc<Suspects>,
    /// The longest rest.
    day: u64,
    /// Deltas that may still be sent one to a body in this beat.
    singles: usize,
    /// This beat begins with the suspects, for which the last one had no time.
    suspects_first: bool,
    /// A POST of this beat was accepted, so the beat is the master's already.
    accepted: bool,
}

impl Content {
    pub(crate) fn new(interval: Duration) -> Self {
        let day = limits::SUSPEND_MAX.as_nanos() / interval.as_nanos().max(1);
        let day = u64::try_from(day).unwrap_or(u64::MAX).max(limits::SUSPEND_BEATS);
        Self {
            mode: Mode::Whole,
            step: Step::Done,
            states: None,
            suspects: Arc::default(),
            day,
            singles: 0,
            suspects_first: false,
            accepted: false,
        }
    }

    /// A beat begins.
    pub(crate) fn begin(&mut self) {
        let over = |rest: &mut Rest| rest.left = rest.left.saturating_sub(1);
        if !self.suspects.is_empty() {
            self.suspects_mut().values_mut().for_each(|suspect| over(&mut suspect.rest));
        }
        self.states.iter_mut().for_each(over);
        let last_accepted = std::mem::replace(&mut self.accepted, false);
        self.singles = limits::SINGLES_PER_BEAT;
        let suspects_put_off =
            self.step == Step::Suspects && self.due().is_some() && !self.suspects_first;
        self.suspects_first = suspects_put_off && matches!(self.mode, Mode::Whole | Mode::Apart);
        self.step =
            if self.suspects_first { Step::Suspects } else { self.first_step(last_accepted) };
    }

    /// A beat that had no time for all of its POSTs is gone on with in the next one: begun anew each time, what takes
    /// long would never come to its end.
    fn first_step(&self, last_accepted: bool) -> Step {
        match (self.mode, self.step) {
            (Mode::Whole, _) => Step::Whole,
            // A refused half is no liveness, so each of them follows a POST that was accepted.
            (_, Step::Halves(suspects)) if last_accepted => Step::Halves(suspects),
            (_, Step::Halves(suspects) | Step::BareBeforeHalves(suspects)) => {
                Step::BareBeforeHalves(suspects)
            }
            (Mode::Singly, Step::Singles) if last_accepted => Step::Singles,
            (Mode::Bare | Mode::Singly, _) => Step::Bare,
            (Mode::Apart, Step::Suspects | Step::States) => Step::StatesFirst,
            (Mode::Apart, _) => Step::Light,
        }
    }

    /// The next POST of this beat, if there is one. `has_states`: they are known, and still fresh.
    pub(crate) fn next(&mut self, has_states: bool) -> Option<Post> {
        const ALL: DeltaSelection = DeltaSelection::Newest(limits::DELTAS_PER_BODY);
        let light = |deltas| Some(Post { states: false, deltas });
        match self.step {
            Step::Whole => Some(Post { states: has_states, deltas: ALL }),
            Step::StatesFirst if has_states && !self.states_rest() => {
                Some(Post { states: true, deltas: DeltaSelection::None })
            }
            Step::StatesFirst => {
                self.step = Step::Light;
                light(ALL)
            }
            Step::Light => light(ALL),
            Step::Bare | Step::BareBeforeHalves(_) | Step::BareAfterSingle => {
                light(DeltaSelection::None)
            }
            Step::Halves(suspects) => light(DeltaSelection::Newest(suspects.div_ceil(2))),
            Step::Singles if self.singles > 0 => light(DeltaSelection::One),
            Step::Singles | Step::Suspects => match self.due() {
                Some(id) if self.singles > 0 => {
                    self.step = Step::Suspects;
                    light(DeltaSelection::Only(id))
                }
                _ => {
                    self.step = Step::States;
                    self.next(has_states)
                }
            },
            Step::States => {
                if self.mode == Mode::Whole || self.states_rest() {
                    self.step = Step::Done;
                    return None;
                }
                // Where they have grown old meanwhile, they come first in the next beat.
                has_states.then_some(Post { states: true, deltas: DeltaSelection::None })
            }
            Step::Done => None,
        }
    }

    /// The POST was not made.
    pub(crate) fn nothing_to_send(&mut self, why: Nothing) {
        match (self.step, why) {
            (Step::Suspects, Nothing::Gone) => {
                drop(self.due().and_then(|id| self.suspects_mut().remove(&id)))
            }
            (Step::Suspects, _) => {
                let due = self.due();
                if let Some(suspect) = due.and_then(|id| self.suspects_mut().get_mut(&id)) {
                    suspect.rest.left = 1;
                }
            }
            (Step::Singles, Nothing::Gone | Nothing::Held) => self.all_singles_sent(),
            (Step::StatesFirst, _) => self.step = Step::Light,
            (Step::Light, _) => self.step = Step::Suspects,
            (Step::States, _) => (),
            _ => self.step = Step::Done,
        }
    }

    /// The next POST is for the states, and for nothing else.
    pub(crate) fn wants_states_alone(&self) -> bool {
        matches!(self.step, Step::States | Step::StatesFirst)
    }

    /// The beat has been accepted, so the next POST is only made for deltas.
    pub(crate) fn is_only_for_deltas(&self) -> bool {
        self.step == Step::Light && self.accepted
    }

    /// A body with the states in it was in doubt, and the same without them was accepted in its place.
    pub(crate) fn states_in_doubt(&mut self) {
        if self.mode == Mode::Whole {
            self.mode = Mode::Apart;
        }
    }

    /// A POST has ended. `deltas` were in it.
    pub(crate) fn ended(
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
        Consequence::QueueCounts
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
            PostOutcome::Refused => {
                self.mode = Mode::Apart;
                Step::Light
            }
            PostOutcome::Unchanged => Step::Done,
        };
    }

    fn light_ended(&mut self, deltas: &[QueuedDelta], outcome: PostOutcome) {
        self.step = match outcome {
            PostOutcome::Accepted => Step::Suspects,
            PostOutcome::InDoubt => {
                self.deltas_in_doubt(deltas);
                Step::Done
            }
            PostOutcome::Refused if deltas.is_empty() => Step::Done,
            // The master lives, so the fault is in the deltas.
            PostOutcome::Refused if self.accepted => Step::Halves(deltas.len()),
            PostOutcome::Refused => Step::BareBeforeHalves(deltas.len()),
            PostOutcome::Unchanged => Step::Done,
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
            (PostOutcome::InDoubt | PostOutcome::Refused, _) if self.mode == Mode::Bare => {
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
            (PostOutcome::Refused, [_]) => {
                self.step = Step::Light;
                return Consequence::Absorbed(Cause::DeltaRefused);
            }
            (PostOutcome::Refused, [_, _, ..]) => Step::Halves(deltas.len()),
            (PostOutcome::Accepted, [_, ..]) if deltas.len() < suspects => {
                Step::Halves(suspects - deltas.len())
            }
            // All of them have been accepted, or held back meanwhile. None was at fault.
            (PostOutcome::Accepted, _) => Step::Suspects,
            (PostOutcome::InDoubt, [_]) => return self.single_ended(deltas, outcome),
            (PostOutcome::InDoubt, _) => {
                self.deltas_in_doubt(deltas);
                Step::Done
            }
            _ => Step::Done,
        };
        Consequence::QueueCounts
    }

    fn single_ended(&mut self, deltas: &[QueuedDelta], outcome: PostOutcome) -> Consequence {
        self.singles = self.singles.saturating_sub(1);
        let [kept] = deltas else { return Consequence::QueueCounts };
        match outcome {
            PostOutcome::Accepted => {
                self.suspects_mut().remove(&kept.id);
                Consequence::QueueCounts
            }
            PostOutcome::InDoubt => {
                let known = self.suspects.0.get(&kept.id).map(|suspect| suspect.rest);
                let (decky, operation) = (kept.delta.decky().to_owned(), kept.delta.operation());
                let rest = longer(known, self.day);
                self.suspects_mut().insert(kept.id, Suspect { decky, operation, rest });
                self.step = Step::BareAfterSingle;
                Consequence::Absorbed(Cause::DeltaRests)
            }
            PostOutcome::Refused => {
                self.suspects_mut().remove(&kept.id);
                Consequence::Absorbed(Cause::DeltaRefused)
            }
            PostOutcome::Unchanged => {
                self.step = Step::Done;
                Consequence::QueueCounts
            }
        }
    }

    fn states_ended(&mut self, outcome: PostOutcome) -> Consequence {
        self.step = match (self.step, outcome) {
            (Step::StatesFirst, PostOutcome::Unchanged) => Step::Done,
            (Step::StatesFirst, _) => Step::Light,
            _ => Step::Done,
        };
        match outcome {
            PostOutcome::Accepted => {
                self.states = None;
                if self.mode == Mode::Apart {
                    self.mode = Mode::Whole;
                }
                Consequence::QueueCounts
            }
            PostOutcome::InDoubt | PostOutcome::Refused => {
                self.states = Some(longer(self.states, self.day));
                Consequence::Absorbed(Cause::StatesRest)
            }
            PostOutcome::Unchanged => Consequence::QueueCounts,
        }
    }

    /// Every delta that waited has been tried alone.
    fn all_singles_sent(&mut self) {
        if self.mode == Mode::Singly {
            self.mode = Mode::Apart;
        }
        self.step = Step::Suspects;
    }

    /// A delta whose rest is over, the newest first. One that is older than another suspect of its decky and operation
    /// waits for that one.
    fn due(&self) -> Option<i64> {
        let mut seen = HashSet::new();
        let mut newest = self
            .suspects
            .0
            .iter()
            .rev()
            .filter(|(_, it)| seen.insert((it.decky.as_str(), it.operation)));
        newest.find(|(_, suspect)| suspect.rest.left == 0).map(|(id, _)| *id)
    }

    /// The deltas that were in doubt alone.
    pub(crate) fn suspects(&self) -> &Arc<Suspects> {
        &self.suspects
    }

    fn suspects_mut(&mut self) -> &mut BTreeMap<i64, Suspect> {
        &mut Arc::make_mut(&mut self.suspects).0
    }

    /// The states are not sent in this beat.
    pub(crate) fn states_rest(&self) -> bool {
        self.states_rest_for().is_some()
    }

    /// In how many beats the states are tried again.
    pub(crate) fn states_rest_for(&self) -> Option<u64> {
        self.states.map(|rest| rest.left.min(rest.length)).filter(|left| *left > 0)
    }

    /// States and deltas share a body.
    pub(crate) fn is_whole(&self) -> bool {
        self.mode == Mode::Whole
    }

    /// Deltas that were in doubt alone.
    pub(crate) fn resting(&self) -> u64 {
        self.suspects.0.len() as u64
    }
}

/// The first rest, or twice the last one.
fn longer(last: Option<Rest>, most: u64) -> Rest {
    let length = last.map_or(limits::SUSPEND_BEATS, |rest| rest.length.saturating_mul(2)).min(most);
    // The beat that begins it does not count.
    Rest { left: length.saturating_add(1), length }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::delta::LifecycleDelta;

    const INTERVAL: Duration = Duration::from_secs(30);

    /// A master that fails on what a test says, and the outbox of its host.
    #[derive(Default)]
    struct Peer {
        waiting: BTreeMap<i64, QueuedDelta>,
        /// Failed on, and refused, together with whatever else.
        poison: BTreeSet<i64>,
        refused: BTreeSet<i64>,
        states: Option<PostOutcome>,
        /// Nobody answers.
        is_away: bool,
        /// More deltas than that in a body are failed on.
        most: Option<usize>,
        /// How often each was in a POST that was not refused.
        sent: BTreeMap<i64, u32>,
        rejected: BTreeSet<i64>,
        states_accepted: u32,
    }

    impl Peer {
        fn push(&mut self, id: i64) {
            // Three deckies, so that some share one.
            let delta = LifecycleDelta::succeeded(format!("d{}", id % 3), Operation::Deploy);
            self.waiting.insert(id, QueuedDelta { id, delta });
        }

        fn answer(&self, post: Post, deltas: &[QueuedDelta]) -> PostOutcome {
            let has = |ids: &BTreeSet<i64>| deltas.iter().any(|kept| ids.contains(&kept.id));
            match self.states.filter(|_| post.states) {
                _ if self.is_away => PostOutcome::InDoubt,
                Some(outcome) => outcome,
                _ if has(&self.refused) => PostOutcome::Refused,
                _ if has(&self.poison) || self.most.is_some_and(|most| deltas.len() > most) => {
                    PostOutcome::InDoubt
                }
                _ => PostOutcome::Accepted,
            }
        }

        fn share(&self, content: &Content, share: DeltaSelection) -> Vec<QueuedDelta> {
            let free = self
                .waiting
                .values()
                .rev()
                .filter(|kept| !content.suspects().held_back().contains(kept))
                .cloned();
            match share {
                DeltaSelection::None => Vec::new(),
                DeltaSelection::Newest(most) => free.take(most).collect(),
                DeltaSelection::One => free.take(1).collect(),
                DeltaSelection::Only(id) => {
                    let mut same = self
                        .waiting
                        .values()
                        .rev()
                        .filter(|kept| content.suspects().is_of(id, kept));
                    same.next().filter(|kept| kept.id == id).cloned().into_iter().collect()
                }
                DeltaSelection::Same(id) => self.waiting.get(&id).cloned().into_iter().collect(),
            }
        }

        /// One beat, as the heartbeat thread makes it: what each POST carried, and how it ended.
        fn beat(&mut self, content: &mut Content) -> Vec<(bool, Vec<i64>, PostOutcome)> {
            self.short_beat(content, 10_000)
        }

        /// The same with time for so many POSTs, and then as many as it takes until one is its answer.
        fn short_beat(
            &mut self,
            content: &mut Content,
            most: usize,
        ) -> Vec<(bool, Vec<i64>, PostOutcome)> {
            content.begin();
            let mut posts = Vec::new();
            let mut has_answer = false;
            while !has_answer || posts.len() < most {
                let Some(post) = content.next(true) else { break };
                let deltas = self.share(content, post.deltas);
                let is_for_one =
                    matches!(post.deltas, DeltaSelection::One | DeltaSelection::Only(_));
                if deltas.is_empty() && (is_for_one || content.is_only_for_deltas()) {
                    let is_there = matches!(post.deltas, DeltaSelection::Only(id) if self.waiting.contains_key(&id));
                    content.nothing_to_send(if is_there { Nothing::Held } else { Nothing::Gone });
                    continue;
                }
                assert!(
                    !post.states || deltas.is_empty() || content.is_whole(),
                    "states and deltas apart"
                );
                let outcome = self.answer(post, &deltas);
                let ids: Vec<_> = deltas.iter().map(|kept| kept.id).collect();
                if outcome != PostOutcome::Refused {
                    ids.iter().for_each(|id| *self.sent.entry(*id).or_default() += 1);
                }
                if outcome == PostOutcome::Accepted {
                    ids.iter().for_each(|id| drop(self.waiting.remove(id)));
                    self.states_accepted += u32::from(post.states);
                }
                let consequence = content.ended(post, &deltas, outcome);
                has_answer |= consequence == Consequence::QueueCounts;
                if consequence == Consequence::Absorbed(Cause::DeltaRefused) {
                    self.waiting.remove(&ids[0]);
                    self.rejected.insert(ids[0]);
                }
                posts.push((post.states, ids, outcome));
                assert!(posts.len() < 10_000, "a beat ends");
            }
            posts
        }
    }

    use PostOutcome::{Accepted, InDoubt, Refused, Unchanged};

    #[test]
    fn while_all_is_well_a_beat_is_one_whole_body() {
        let (mut content, mut peer) = (Content::new(INTERVAL), Peer::default());
        peer.push(1);
        assert_eq!(peer.beat(&mut content), [(true, vec![1], Accepted)]);
        assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted)]);
    }

    #[test]
    fn a_body_that_the_states_fail_is_sent_without_them_and_they_rest_for_ten_beats_and_then_for_twenty()
     {
        for failing in [InDoubt, Refused] {
            let (mut content, mut peer) =
                (Content::new(INTERVAL), Peer { states: Some(failing), ..Peer::default() });
            peer.push(1);
            let first = peer.beat(&mut content);
            let apart = [(false, vec![1], Accepted), (true, vec![], failing)];
            match failing {
                // It may have been applied, so it is the next beat that is lighter.
                InDoubt => {
                    assert_eq!(first, [(true, vec![1], InDoubt)]);
                    assert_eq!(peer.beat(&mut content), apart);
                }
                _ => assert_eq!(first, [&[(true, vec![1], Refused)][..], &apart].concat()),
            }
            for pause in [10, 20, 40] {
                for left in (1..=pause).rev() {
                    assert_eq!(peer.beat(&mut content), [(false, vec![], Accepted)]);
                    assert_eq!(content.states_rest_for(), Some(left));
                }
                assert_eq!(
                    peer.beat(&mut content),
                    [(false, vec![], Accepted), (true, vec![], failing)]
                );
            }
            peer.states = None;
            while peer.states_accepted == 0 {
                peer.beat(&mut content);
            }
            assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted)], "whole again");
            peer.states = Some(Refused);
            peer.beat(&mut content);
            assert_eq!(content.states_rest_for(), Some(10), "and a rest begins short again");
        }
    }

    #[test]
    fn no_rest_is_longer_than_a_day() {
        for (interval, most) in [(30, 2_880), (3_600, 24), (86_400, 10)] {
            let mut content = Content::new(Duration::from_secs(interval));
            let mut peer = Peer { states: Some(Refused), ..Peer::default() };
            for _ in 0..20_000 {
                peer.beat(&mut content);
                assert!(content.states_rest_for().unwrap_or(0) <= most + 1);
            }
            assert_eq!(content.states.unwrap().length, most);
        }
    }

    #[test]
    fn a_delta_that_the_master_fails_on_rests_and_so_do_older_ones_of_its_decky() {
        let (mut content, mut peer) = (Content::new(INTERVAL), Peer::default());
        // 2, 5 and 8 share a decky.
        (1..=8).for_each(|id| peer.push(id));
        peer.poison.insert(5);
        assert_eq!(peer.beat(&mut content), [(true, (1..=8).rev().collect(), InDoubt)]);
        assert_eq!(peer.beat(&mut content), [(false, (1..=8).rev().collect(), InDoubt)]);
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
        assert_eq!(peer.beat(&mut content), singly);
        assert_eq!(
            (content.resting(), peer.waiting.keys().copied().collect::<Vec<_>>()),
            (1, vec![2, 5])
        );
        // The next of its decky is sent meanwhile, as it is newer.
        peer.push(11);
        assert_eq!(peer.beat(&mut content), [(true, vec![11], Accepted)]);
        for _ in 0..9 {
            assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted)]);
        }
        assert_eq!(
            peer.beat(&mut content),
            [(true, vec![], Accepted), (false, vec![5], InDoubt), bare()]
        );
        for _ in 0..20 {
            assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted)]);
        }
        peer.poison.clear();
        assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted), one(5)]);
        assert_eq!(peer.beat(&mut content), [(true, vec![2], Accepted)]);
        assert!(peer.waiting.is_empty() && peer.rejected.is_empty() && content.resting() == 0);
    }

    #[test]
    fn an_outage_makes_no_delta_a_suspect() {
        let (mut content, mut peer) =
            (Content::new(INTERVAL), Peer { is_away: true, ..Peer::default() });
        (1..=3).for_each(|id| peer.push(id));
        let tried: Vec<_> = (0..7).flat_map(|_| peer.beat(&mut content)).collect();
        let (all, none) = (vec![3, 2, 1], vec![]);
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
        peer.is_away = false;
        assert_eq!(peer.beat(&mut content), [(false, all, Accepted), (true, vec![], Accepted)]);
        assert_eq!(content.resting(), 0);
    }

    #[test]
    fn an_outage_among_single_deltas_stops_at_the_first() {
        let (mut content, mut peer) =
            (Content::new(INTERVAL), Peer { most: Some(1), ..Peer::default() });
        (1..=9).for_each(|id| peer.push(id));
        peer.beat(&mut content);
        peer.beat(&mut content);
        content.begin();
        let post = content.next(true).unwrap();
        assert_eq!(post, Post { states: false, deltas: DeltaSelection::None });
        assert_eq!(content.ended(post, &[], Accepted), Consequence::QueueCounts);
        let single = content.next(true).unwrap();
        let deltas = peer.share(&content, single.deltas);
        assert_eq!(
            content.ended(single, &deltas, InDoubt),
            Consequence::Absorbed(Cause::DeltaRests)
        );
        let bare = content.next(true).unwrap();
        assert_eq!(
            content.ended(bare, &[], InDoubt),
            Consequence::QueueCounts,
            "the beat has failed"
        );
        assert_eq!((content.next(true), content.resting()), (None, 1));
    }

    #[test]
    fn at_most_fifty_deltas_are_sent_alone_in_a_beat() {
        let (mut content, mut peer) =
            (Content::new(INTERVAL), Peer { most: Some(1), ..Peer::default() });
        (1..=120).for_each(|id| peer.push(id));
        peer.beat(&mut content);
        peer.beat(&mut content);
        let counts: Vec<_> = (0..3).map(|_| peer.beat(&mut content).len()).collect();
        // Beside the deltas: a bare POST, and the states.
        assert_eq!(counts, [52, 52, 22]);
        assert_eq!(peer.beat(&mut content), [(true, vec![], Accepted)]);
    }

    #[test]
    fn refused_deltas_are_found_by_halves_without_the_states_and_rejected() {
        let (mut content, mut peer) = (Content::new(INTERVAL), Peer::default());
        (1..=40).for_each(|id| peer.push(id));
        peer.refused.extend([1, 20, 21, 40]);
        let posts = peer.beat(&mut content);
        assert_eq!(peer.rejected, peer.refused);
        assert!(peer.waiting.is_empty());
        assert_eq!(
            posts.iter().filter(|(states, ..)| *states).count(),
            2,
            "the first, and the last: {posts:?}"
        );
        let bare = posts.iter().filter(|(states, ids, _)| !states && ids.is_empty()).count();
        assert_eq!(bare, 1, "before the halves");
        assert!(posts.len() <= 2 + 4 * 8 + 2, "{}", posts.len());
        assert!(
            peer.sent.values().all(|times| *times == 1),
            "nothing was sent twice: {:?}",
            peer.sent
        );
    }

    #[test]
    fn states_that_the_last_beat_had_no_time_for_come_first_in_the_next() {
        for (outcome, then) in [(Accepted, true), (InDoubt, false), (Unchanged, false)] {
            let mut content = Content::new(INTERVAL);
            let alone = Some(Post { states: true, deltas: DeltaSelection::None });
            let light = Some(Post {
                states: false,
                deltas: DeltaSelection::Newest(limits::DELTAS_PER_BODY),
            });
            let next = |content: &mut Content, outcome| {
                let post = content.next(true);
                post.map(|post| content.ended(post, &[], outcome))
            };
            content.begin();
            let _ = next(&mut content, InDoubt);
            // Each POST takes so long that a beat makes one.
            for _ in 0..2 {
                content.begin();
                assert_eq!(content.next(false), light, "they are not known");
                let _ = next(&mut content, Accepted);
            }
            content.begin();
            assert_eq!(content.next(true), alone);
            let consequence = next(&mut content, outcome);
            assert_eq!(consequence == Some(Consequence::QueueCounts), outcome != InDoubt);
            assert_eq!(
                (content.next(true), content.is_whole()),
                (light.filter(|_| outcome != Unchanged), then)
            );
        }
    }

    #[test]
    fn what_says_nothing_of_the_body_changes_nothing() {
        let (mut content, mut peer) =
            (Content::new(INTERVAL), Peer { states: Some(Unchanged), ..Peer::default() });
        peer.push(1);
        for _ in 0..3 {
            assert_eq!(peer.beat(&mut content), [(true, vec![1], Unchanged)]);
        }
        peer.states = None;
        assert_eq!(peer.beat(&mut content), [(true, vec![1], Accepted)]);
    }

    #[test]
    fn states_that_are_not_known_are_not_sent_and_do_not_count_as_accepted() {
        let mut content = Content::new(INTERVAL);
        content.begin();
        let whole = content.next(true).unwrap();
        let _ = content.ended(whole, &[], InDoubt);
        content.begin();
        let light = content.next(false).unwrap();
        let _ = content.ended(light, &[], Accepted);
        assert_eq!(content.next(false), None);
        assert!(!content.is_whole());
    }

    #[test]
    fn a_suspect_waits_for_a_newer_one_of_its_decky() {
        let (mut content, mut peer) = (Content::new(INTERVAL), Peer::default());
        peer.push(1);
        peer.poison.insert(1);
        (0..6).for_each(|_| drop(peer.beat(&mut content)));
        // Of the same decky, and in doubt some beats later.
        peer.push(4);
        peer.poison.insert(4);
        (0..4).for_each(|_| drop(peer.beat(&mut content)));
        assert_eq!(content.resting(), 2);
        peer.poison.clear();
        let mut sent = Vec::new();
        while !peer.waiting.is_empty() {
            sent.extend(peer.beat(&mut content).into_iter().flat_map(|(_, ids, _)| ids));
        }
        assert_eq!(sent, [4, 1]);
    }

    #[test]
    fn a_suspect_that_is_held_is_not_forgotten() {
        let (mut content, mut peer) = (Content::new(INTERVAL), Peer::default());
        peer.push(1);
        peer.poison.insert(1);
        (0..3).for_each(|_| drop(peer.beat(&mut content)));
        for _ in 0..30 {
            content.begin();
            while let Some(post) = content.next(true) {
                match post.deltas {
                    DeltaSelection::Only(_) => content.nothing_to_send(Nothing::Held),
                    _ => drop(content.ended(post, &[], Accepted)),
                }
            }
        }
        assert_eq!(content.resting(), 1);
        let tried: Vec<_> = peer.beat(&mut content).into_iter().map(|(_, ids, _)| ids).collect();
        assert_eq!(tried, [vec![], vec![1], vec![]], "alone, as before");
    }

    proptest! {
        /// However few POSTs there is time for in a beat.
        #[test]
        fn a_beat_that_is_cut_short_is_gone_on_with(
            deltas in 1..40_i64,
            poison in prop::collection::btree_set(1..40_i64, 0..3),
            refused in prop::collection::btree_set(1..40_i64, 0..3),
            most in prop::option::of(1..50_usize),
            posts in 1..4_usize,
            outage in 0..4_u32,
        ) {
            let (mut content, mut peer) = (Content::new(INTERVAL), Peer { most, ..Peer::default() });
            (1..=deltas).for_each(|id| peer.push(id));
            (peer.poison, peer.refused) = (&poison - &refused, refused.clone());
            peer.is_away = true;
            (0..outage).for_each(|_| drop(peer.short_beat(&mut content, posts)));
            peer.is_away = false;
            let mut deaf = 0;
            for _ in 0..300 {
                let accepted = peer.short_beat(&mut content, posts).iter().any(|(.., outcome)| *outcome == Accepted);
                deaf = if accepted { 0 } else { deaf + 1 };
                prop_assert!(deaf <= 3, "the master hears of the host again and again");
            }
            peer.poison.clear();
            for _ in 0..400 {
                peer.short_beat(&mut content, posts);
            }
            prop_assert!(peer.waiting.is_empty(), "{:?}", peer.waiting.keys());
            let expected: BTreeSet<_> = refused.into_iter().filter(|id| *id <= deltas).collect();
            prop_assert_eq!(&peer.rejected, &expected);
            prop_assert!(content.is_whole());
            prop_assert_eq!(peer.short_beat(&mut content, posts), [(true, vec![], Accepted)]);
        }

        #[test]
        fn all_but_what_the_master_never_takes_arrives(
            deltas in 1..90_i64,
            poison in prop::collection::btree_set(1..90_i64, 0..4),
            refused in prop::collection::btree_set(1..90_i64, 0..4),
            states in prop::sample::select(vec![None, Some(InDoubt), Some(Refused)]),
            most in prop::option::of(1..100_usize),
            outage in 0..6_u32,
        ) {
            let (mut content, mut peer) = (Content::new(INTERVAL), Peer { states, most, ..Peer::default() });
            (1..=deltas).for_each(|id| peer.push(id));
            (peer.poison, peer.refused) = (&poison - &refused, refused.clone());
            peer.is_away = true;
            for _ in 0..outage {
                peer.beat(&mut content);
            }
            peer.is_away = false;
            for _ in 0..20 {
                let posts = peer.beat(&mut content);
                // The master hears of the host in each beat, at the latest in the next.
                prop_assert!(posts.iter().any(|(.., outcome)| *outcome == Accepted) || !content.is_whole());
            }
            // A poison holds back what is older and of its decky; nothing else is held back.
            let held = |id: &i64| peer.poison.iter().any(|poison| poison >= id && (poison - id) % 3 == 0);
            prop_assert!(peer.waiting.keys().all(held), "{:?} behind {:?}", peer.waiting.keys(), peer.poison);
            prop_assert!(peer.rejected.is_subset(&refused), "{:?}", peer.rejected);
            peer.poison.clear();
            for _ in 0..200 {
                peer.beat(&mut content);
            }
            prop_assert!(peer.waiting.is_empty(), "{:?}", peer.waiting.keys());
            let expected: BTreeSet<_> = refused.into_iter().filter(|id| *id <= deltas).collect();
            prop_assert_eq!(peer.rejected, expected);
        }
    }
}
