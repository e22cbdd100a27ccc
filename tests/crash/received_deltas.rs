//! The deltas that the master received, compared with the reports of the children.

use std::collections::{BTreeMap, BTreeSet};

use decnet_heartbeat::loopback::{LifecycleRow, Received, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Outcome};
use serde_json::Value;

use crate::child_reports::{ChildReports, OperationReport, delta_of};
use crate::support::deltas;

/// The outcomes of an operation whose process was killed: from the next start, and from another
/// process that runs.
const KILLED: [&str; 2] =
    ["failed the agent restarted during deploy", "failed its process ended during deploy"];

#[derive(Debug, Default)]
pub struct ReceivedDeltas {
    /// The outcomes of each decky, one for each accepted delta.
    accepted: BTreeMap<String, Vec<String>>,
    /// Each child with a decky for which it got the answer 204.
    answered: BTreeSet<(String, String)>,
    pub requests: usize,
}

impl ReceivedDeltas {
    /// Records requests. Asserts that each delta was pushed by a child, and that none was sent
    /// again.
    pub fn record(&mut self, reports: &ChildReports, received: &[Received]) {
        self.requests += received.len();
        for request in received {
            let deltas = deltas(request);
            deltas.iter().for_each(|delta| assert_is_known(reports, delta));
            self.assert_not_sent_again(request, &deltas);
            if request.status == Some(204) {
                for delta in &deltas {
                    let outcomes = self.accepted.entry(text(&delta["decky_name"])).or_default();
                    outcomes.push(outcome_of(delta));
                }
            }
        }
    }

    /// Asserts that a child sends no delta again after the answer 204. A child that was killed may
    /// have died between the answer and its acknowledgement, so this is per child. The installed
    /// programs do not tell which process they are. A decky identifies its delta, because the
    /// operation of a row is unique.
    fn assert_not_sent_again(&mut self, request: &Received, deltas: &[Value]) {
        let json = request.json.as_ref();
        let run = json.map(|json| text(&json["agent_version"])).unwrap_or_default();
        if !run.starts_with("run-") {
            return;
        }
        let names = deltas.iter().map(|delta| text(&delta["decky_name"]));
        for name in names.filter(|name| !name.starts_with('x')) {
            let key = (run.clone(), name);
            assert!(!self.answered.contains(&key), "sent again after a 2xx: {key:?}");
            if request.status == Some(204) {
                self.answered.insert(key);
            }
        }
    }

    /// Asserts that no delta is lost, and that each operation has its outcome.
    pub fn assert_complete(&self, reports: &ChildReports, rows: &[LifecycleRow]) {
        for name in &reports.queued {
            let is_accepted = self.accepted.contains_key(name);
            assert!(is_accepted, "lost: the push of {name} returned Ok, and it was not delivered");
        }
        for row in rows {
            let accepted = self.accepted.get(&row.decky).map_or(&[][..], Vec::as_slice);
            check_operation(&row.decky, reports.operations.get(&row.decky), row, accepted);
        }
    }

    /// The queued deltas and ended operations that the master has not accepted yet.
    pub fn undelivered(&self, reports: &ChildReports) -> Vec<String> {
        let ended = reports.operations.iter().filter(|(_, report)| report.has_ended);
        let names = reports.queued.iter().chain(ended.map(|(name, _)| name));
        names.filter(|name| !self.accepted.contains_key(*name)).cloned().collect()
    }

    /// The number of accepted deltas, duplicates included.
    pub fn count(&self) -> usize {
        self.accepted.values().map(Vec::len).sum()
    }

    /// The number of duplicates.
    pub fn duplicates(&self) -> usize {
        let unique = self.accepted.iter().filter(|(name, _)| !name.starts_with('x'));
        unique.map(|(_, outcomes)| outcomes.len() - 1).sum()
    }
}

/// Asserts that a child pushed this delta with this content, or began its operation.
fn assert_is_known(reports: &ChildReports, delta: &Value) {
    let name = text(&delta["decky_name"]);
    match name.as_bytes()[0] {
        b'p' => {
            assert!(reports.attempted.contains(&name), "invented: not pushed: {delta}");
            let expected: LifecycleDelta = delta_of(&name);
            let expected_outcome = match expected.outcome() {
                Outcome::Succeeded => "succeeded".to_owned(),
                Outcome::Failed(error) => format!("failed {error}"),
            };
            assert_eq!(text(&delta["operation"]), expected.operation().as_str(), "{delta}");
            assert_eq!(outcome_of(delta), expected_outcome, "changed: {delta}");
        }
        b'o' => assert!(reports.operations.contains_key(&name), "invented: not begun: {delta}"),
        _ => assert!(name.starts_with("x-"), "invented: {delta}"),
    }
}

/// Asserts that an operation has one outcome: the reported one, or that of a killed process.
fn check_operation(
    name: &str,
    report: Option<&OperationReport>,
    row: &LifecycleRow,
    accepted: &[String],
) {
    let accepted: BTreeSet<&String> = accepted.iter().collect();
    let in_row = match (row.status, &row.error) {
        (RowStatus::Running, _) => None,
        (RowStatus::Succeeded, _) => Some("succeeded".to_owned()),
        (RowStatus::Failed, error) => {
            Some(format!("failed {}", error.as_deref().unwrap_or_default()))
        }
    };
    let context = format!(
        "operation {name}: reported {report:?}, accepted {accepted:?}, in the row {in_row:?}"
    );
    assert!(accepted.len() <= 1, "two outcomes: {context}");
    let Some(report) = report else {
        assert!(in_row.is_none() && accepted.is_empty(), "invented: {context}");
        return;
    };
    assert_eq!(accepted.first().copied(), in_row.as_ref(), "{context}");
    let is_reported = in_row == report.outcome;
    match &in_row {
        None => assert!(!report.has_begun, "lost: {context}"),
        Some(_) if report.has_ended => assert!(is_reported, "{context}"),
        Some(outcome) => {
            assert!(is_reported || KILLED.contains(&outcome.as_str()), "{context}");
        }
    }
}

fn outcome_of(delta: &Value) -> String {
    match delta["error"].as_str() {
        Some(error) => format!("{} {error}", text(&delta["status"])),
        None => text(&delta["status"]),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}")).to_owned()
}
