//! What the POSTs of a beat carry. Values only: the heartbeat thread reports how each POST ended, and so may a test.
//!
//! The master can fail on a body after it has applied the deltas in it, and a proxy can fail on a body that is too large
//! for it. Sent again unchanged, such a body fails for ever, and its deltas close newer rows. So a body that fails is made
//! lighter. A POST is *in doubt* if part of its body was sent and the answer is 5xx or missing.
//!
//! 1. *Whole* (the start): states and deltas in one body. In doubt → apart, from the next beat on. Refused → apart, at
//!    once.
//! 2. *Apart*: a POST carries states or deltas, never both. The *light* POST comes first: the deltas, without states.
//!    Once it is accepted, the states follow alone. Accepted → whole again. In doubt or refused → the states rest.
//! 3. A light POST with deltas in doubt → the next beat starts *bare*: no states, no deltas. Bare in doubt → an outage;
//!    the deltas are tried together again. Bare accepted → deltas one to a body, newest first.
//! 4. A single delta in doubt rests, and so do older ones of its decky and operation. It is tried alone from then on. A
//!    bare POST follows it: if that is not accepted either, the master is away, and no other delta is tried.
//! 5. A refused body applied nothing: the deltas are halved at once, without states, until one is refused alone.
//! 6. What rests does so for 10 beats, doubled each time up to a day.
//!
//! `schedule` decides when a beat is sent. This module decides what it carries.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::delta::Operation;
use crate::limits;
use crate::outbox::Kept;

/// What one POST carries besides the topology, which is in every POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Post {
    /// The states of what runs here; otherwise a status that says why they are left out.
    pub(crate) states: bool,
    pub(crate) deltas: Share,
}

/// Which of the deltas that may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    None,
    /// So many of the newest, without those that rest.
    Newest(usize),
    /// The newest alone, if there is one.
    One,
    /// One that was in doubt alone before.
    Only(i64),
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
    Counts,
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
    /// By their ids.
    suspects: BTreeMap<i64, Suspect>,
    /// The longest rest.
    day: u64,
    /// Deltas that may still be sent one to a body in this beat.
    singles: usize,
    /// A POST of this beat was accepted, so the beat is the master's already.
    accepted: bool,
}

impl Content {
    pub(crate) fn new(interval: Duration) -> Self {
        let day = limits::REST_MOST.as_nanos() / interval.as_nanos().max(1);
        let day = u64::try_from(day).unwrap_or(u64::MAX).max(limits::REST_BEATS);
        Self {
            mode: Mode::Whole,
            step: Step::Done,
            states: None,
            suspects: BTreeMap::new(),
            day,
            singles: 0,
            accepted: false,
        }
    }

    /// A beat begins.
    pub(crate) fn begin(&mut self) {
        let rests = self.suspects.values_mut().map(|suspect| &mut suspect.rest).chain(&mut self.states);
        rests.for_each(|rest| rest.left = rest.left.saturating_sub(1));
        (self.singles, self.accepted) = (limits::SINGLES_PER_BEAT, false);
        self.step = match self.mode {
            Mode::Whole => Step::Whole,
            Mode::Apart => Step::Light,
            Mode::Bare | Mode::Singly => Step::Bare,
        };
    }

    /// The next POST of this beat, if there is one. `has_states`: they are known, and still fresh.
    pub(crate) fn next(&mut self, has_states: bool) -> Option<Post> {
        const ALL: Share = Share::Newest(limits::DELTAS_PER_BODY);
        let light = |deltas| Some(Post { states: false, deltas });
        match self.step {
            Step::Whole => Some(Post { states: has_states, deltas: ALL }),
            Step::Light => light(ALL),
            Step::Bare | Step::BareBeforeHalves(_) | Step::BareAfterSingle => light(Share::None),
            Step::Halves(suspects) => light(Share::Newest(suspects.div_ceil(2))),
            Step::Singles if self.singles > 0 => light(Share::One),
            Step::Singles | Step::Suspects => match self.due() {
                Some(id) if self.singles > 0 => {
                    self.step = Step::Suspects;
                    light(Share::Only(id))
                }
                _ => {
                    self.step = Step::States;
                    self.next(has_states)
                }
            },
            Step::States => {
                let wanted = self.mode != Mode::Whole && has_states && !self.states_rest();
                wanted.then_some(Post { states: true, deltas: Share::None })
            }
            Step::Done => None,
        }
    }

    /// There was no such delta, so the POST was not made.
    pub(crate) fn nothing_to_send(&mut self, post: Post) {
        match post.deltas {
            Share::Only(id) => drop(self.suspects.remove(&id)),
            _ => self.all_singles_sent(),
        }
    }

    /// A POST has ended. `deltas` were in it.
    pub(crate) fn ended(&mut self, post: Post, deltas: &[Kept], outcome: PostOutcome) -> Consequence {
        self.accepted |= outcome == PostOutcome::Accepted;
        match self.step {
            Step::Whole => self.whole_ended(post, outcome),
            Step::Light => self.light_ended(deltas, outcome),
            Step::Bare | Step::BareBeforeHalves(_) | Step::BareAfterSingle => self.bare_ended(outcome),
            Step::Halves(suspects) => return self.half_ended(suspects, deltas, outcome),
            Step::Singles | Step::Suspects => return self.single_ended(deltas, outcome),
            Step::States => return self.states_ended(outcome),
            Step::Done => (),
        }
        Consequence::Counts
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

    fn light_ended(&mut self, deltas: &[Kept], outcome: PostOutcome) {
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

    fn deltas_in_doubt(&mut self, deltas: &[Kept]) {
        self.mode = if deltas.is_empty() { Mode::Apart } else { Mode::Bare };
    }

    fn bare_ended(&mut self, outcome: PostOutcome) {
        self.step = match (outcome, self.step) {
            (PostOutcome::Accepted, Step::BareBeforeHalves(suspects)) => Step::Halves(suspects),
            (PostOutcome::Accepted, Step::BareAfterSingle) if self.mode != Mode::Singly => Step::Suspects,
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

    fn half_ended(&mut self, suspects: usize, deltas: &[Kept], outcome: PostOutcome) -> Consequence {
        self.step = match (outcome, deltas) {
            (PostOutcome::Refused, [_]) => {
                self.step = Step::Light;
                return Consequence::Absorbed(Cause::DeltaRefused);
            }
            (PostOutcome::Refused, [_, _, ..]) => Step::Halves(deltas.len()),
            (PostOutcome::Accepted, [_, ..]) if deltas.len() < suspects => Step::Halves(suspects - deltas.len()),
            // All of them have been accepted, or held back meanwhile. None was at fault.
            (PostOutcome::Accepted, _) => Step::Suspects,
            (PostOutcome::InDoubt, _) => {
                self.deltas_in_doubt(deltas);
                Step::Done
            }
            _ => Step::Done,
        };
        Consequence::Counts
    }

    fn single_ended(&mut self, deltas: &[Kept], outcome: PostOutcome) -> Consequence {
        self.singles = self.singles.saturating_sub(1);
        let [kept] = deltas else { return Consequence::Counts };
        match outcome {
            PostOutcome::Accepted => {
                self.suspects.remove(&kept.id);
                Consequence::Counts
            }
            PostOutcome::InDoubt => {
                let known = self.suspects.get(&kept.id).map(|suspect| suspect.rest);
                let (decky, operation) = (kept.delta.decky().to_owned(), kept.delta.operation());
                let rest = longer(known, self.day);
                self.suspects.insert(kept.id, Suspect { decky, operation, rest });
                self.step = Step::BareAfterSingle;
                Consequence::Absorbed(Cause::DeltaRests)
            }
            PostOutcome::Refused => {
                self.suspects.remove(&kept.id);
                Consequence::Absorbed(Cause::DeltaRefused)
            }
            PostOutcome::Unchanged => {
                self.step = Step::Done;
                Consequence::Counts
            }
        }
    }

    fn states_ended(&mut self, outcome: PostOutcome) -> Consequence {
        self.step = Step::Done;
        match outcome {
            PostOutcome::Accepted => {
                self.states = None;
                if self.mode == Mode::Apart {
                    self.mode = Mode::Whole;
                }
                Consequence::Counts
            }
            PostOutcome::InDoubt | PostOutcome::Refused => {
                self.states = Some(longer(self.states, self.day));
                Consequence::Absorbed(Cause::StatesRest)
            }
            PostOutcome::Unchanged => Consequence::Counts,
        }
    }

    /// Every delta that waited has been tried alone.
    fn all_singles_sent(&mut self) {
        if self.mode == Mode::Singly {
            self.mode = Mode::Apart;
        }
        self.step = Step::Suspects;
    }

    /// A delta whose rest is over, the newest first.
    fn due(&self) -> Option<i64> {
        let mut due = self.suspects.iter().rev().filter(|(_, suspect)| suspect.rest.left == 0);
        due.next().map(|(id, _)| *id)
    }

    /// The states are not sent in this beat.
    pub(crate) fn states_rest(&self) -> bool {
        self.states.is_some_and(|rest| rest.left > 0)
    }

    /// In how many beats the states are tried again.
    pub(crate) fn states_rest_for(&self) -> Option<u64> {
        self.states.map(|rest| rest.left).filter(|left| *left > 0)
    }

    /// States and deltas share a body.
    pub(crate) fn is_whole(&self) -> bool {
        self.mode == Mode::Whole
    }

    /// Deltas that were in doubt alone.
    pub(crate) fn resting(&self) -> u64 {
        self.suspects.len() as u64
    }

    /// Whether a delta stays out of the body: it was in doubt alone, or a newer one of its decky and operation was. The
    /// master would give an older delta the newer one's row.
    pub(crate) fn holds_back(&self, kept: &Kept) -> bool {
        let mut newer = self.suspects.range(kept.id..);
        newer.any(|(id, suspect)| {
            *id == kept.id || (suspect.operation == kept.delta.operation() && suspect.decky == kept.delta.decky())
        })
    }
}

/// The first rest, or twice the last one.
fn longer(last: Option<Rest>, most: u64) -> Rest {
    let length = last.map_or(limits::REST_BEATS, |rest| rest.length.saturating_mul(2)).min(most);
    // The beat that begins it does not count.
    Rest { left: length.saturating_add(1), length }
}
