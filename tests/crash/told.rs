//! What the children have said: what may have reached the outbox, and what was promised to be in it.

use std::collections::{BTreeMap, BTreeSet};

use decnet_heartbeat::{LifecycleDelta, Operation};

/// Operations of a child, one after another.
const OPERATIONS: u32 = 12;

/// The deckies of a child's operations. The master has opened their rows before the child starts.
pub fn operation_names(run: u32) -> Vec<String> {
    (0..OPERATIONS).map(|n| format!("o-{run}-{n}")).collect()
}

/// The delta that is pushed for this decky: half of them each deploy and mutate, a third failed.
pub fn pushed(name: &str) -> LifecycleDelta {
    let n: u32 = name.rsplit('-').next().unwrap().parse().unwrap();
    let operation = if n.is_multiple_of(2) { Operation::Deploy } else { Operation::Mutate };
    if n.is_multiple_of(3) {
        LifecycleDelta::failed(name, operation, format!("why {name}"))
    } else {
        LifecycleDelta::succeeded(name, operation)
    }
}

/// How far an operation is known to have come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub begun: bool,
    /// The verdict that was about to be given: `succeeded`, or `failed` and the error.
    pub verdict: Option<String>,
    /// It was given.
    pub ended: bool,
}

/// All that was said.
#[derive(Debug, Default)]
pub struct Book {
    /// Deckies whose push was begun.
    pub tried: BTreeSet<String>,
    /// Deckies whose push has returned `Ok`.
    pub kept: BTreeSet<String>,
    /// Operations that were begun, or about to be.
    pub operations: BTreeMap<String, Told>,
}

impl Book {
    /// Notes a line of a child's.
    pub fn hear(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (name, verdict) = rest.split_once(' ').unwrap_or((rest, ""));
        match word {
            "try" => drop(self.tried.insert(name.to_owned())),
            "kept" => drop(self.kept.insert(name.to_owned())),
            "begin" => drop(self.operations.insert(name.to_owned(), Told::default())),
            "begun" => self.operation(name).begun = true,
            "end" => self.operation(name).verdict = Some(verdict.to_owned()),
            "ended" => self.operation(name).ended = true,
            "started" => (),
            _ => panic!("a child said {line:?}"),
        }
    }

    fn operation(&mut self, name: &str) -> &mut Told {
        self.operations.get_mut(name).unwrap()
    }
}
