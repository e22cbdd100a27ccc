//! What the children reported before they were killed: the deltas that may be in the outbox, and
//! those that must be.

use std::collections::{BTreeMap, BTreeSet};

use decnet_heartbeat::{LifecycleDelta, Operation};

/// The number of operations of a child. It runs them one after another.
const OPERATIONS: u32 = 12;

/// The deckies of a child's operations. The master opens their rows before the child starts.
pub fn operation_names(run: u32) -> Vec<String> {
    (0..OPERATIONS).map(|n| format!("o-{run}-{n}")).collect()
}

/// The delta that is pushed for this decky. Half of them are of each operation, and a third failed.
pub fn delta_of(name: &str) -> LifecycleDelta {
    let n: u32 = name.rsplit('-').next().unwrap().parse().unwrap();
    let operation = if n.is_multiple_of(2) { Operation::Deploy } else { Operation::Mutate };
    if n.is_multiple_of(3) {
        LifecycleDelta::failed(name, operation, format!("why {name}"))
    } else {
        LifecycleDelta::succeeded(name, operation)
    }
}

/// The known state of an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationReport {
    pub has_begun: bool,
    /// The outcome with which it ends or ended: `succeeded`, or `failed` and the error.
    pub outcome: Option<String>,
    pub has_ended: bool,
}

/// All reports.
#[derive(Debug, Default)]
pub struct ChildReports {
    /// The deckies of all pushes that were started.
    pub attempted: BTreeSet<String>,
    /// The deckies of all pushes that returned `Ok`.
    pub queued: BTreeSet<String>,
    /// All operations that were begun, or whose begin was started.
    pub operations: BTreeMap<String, OperationReport>,
}

impl ChildReports {
    /// Records a line of a child: an event, a decky, and for `ending` the outcome.
    pub fn record(&mut self, line: &str) {
        let (event, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (name, outcome) = rest.split_once(' ').unwrap_or((rest, ""));
        match event {
            "pushing" => drop(self.attempted.insert(name.to_owned())),
            "queued" => drop(self.queued.insert(name.to_owned())),
            "beginning" => {
                drop(self.operations.insert(name.to_owned(), OperationReport::default()));
            }
            "begun" => self.operation(name).has_begun = true,
            "ending" => self.operation(name).outcome = Some(outcome.to_owned()),
            "ended" => self.operation(name).has_ended = true,
            "started" => (),
            _ => panic!("unknown line of a child: {line:?}"),
        }
    }

    fn operation(&mut self, name: &str) -> &mut OperationReport {
        self.operations.get_mut(name).unwrap()
    }
}
