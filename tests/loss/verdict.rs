//! What the master has heard, held against what the children have said.

use std::collections::{BTreeMap, BTreeSet};

use decnet_heartbeat::loopback::{LifecycleRow, LoopbackMaster, Received, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Outcome};
use serde_json::Value;

use crate::told::{Book, Told, pushed};

/// What an operation is reported with whose process was killed: by the next start, and by another process that lives.
const KILLED: [&str; 2] = ["failed the agent restarted during deploy", "failed its process ended during deploy"];

/// What was counted on the way.
pub struct Figures {
    /// Deltas in requests that were answered 204, each as often as it came.
    pub accepted: usize,
    /// How many of those had been accepted before.
    pub again: usize,
}

/// Every promise that was given is kept, and nothing else was said.
pub fn check(book: &Book, master: &LoopbackMaster) -> Figures {
    let received = master.received();
    let mut accepted: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for request in &received {
        for delta in deltas(request) {
            check_known(book, &delta);
            if request.status == Some(204) {
                accepted.entry(text(&delta["decky_name"])).or_default().push(verdict(&delta));
            }
        }
    }
    for name in &book.kept {
        assert!(accepted.contains_key(name), "lost: the push of {name} returned Ok, and the master never heard of it");
    }
    let rows: BTreeMap<String, LifecycleRow> = master.rows().into_iter().map(|row| (row.decky.clone(), row)).collect();
    for (name, row) in &rows {
        let told = book.operations.get(name);
        check_operation(name, told, row, accepted.get(name).map_or(&[], Vec::as_slice));
    }
    check_nothing_again(&received);
    let count: usize = accepted.values().map(Vec::len).sum();
    let again = accepted.iter().filter(|(name, _)| !name.starts_with('x')).map(|(_, times)| times.len() - 1).sum();
    Figures { accepted: count, again }
}

/// It is one that a child has pushed, as it has pushed it; or the end of an operation that it has begun.
fn check_known(book: &Book, delta: &Value) {
    let name = text(&delta["decky_name"]);
    match name.as_bytes()[0] {
        b'p' => {
            assert!(book.tried.contains(&name), "invented: nobody has pushed {delta}");
            let expected: LifecycleDelta = pushed(&name);
            let verdict_of = match expected.outcome() {
                Outcome::Succeeded => "succeeded".to_owned(),
                Outcome::Failed(error) => format!("failed {error}"),
            };
            let expected = (expected.operation().as_str().to_owned(), verdict_of);
            assert_eq!((text(&delta["operation"]), verdict(delta)), expected, "changed: {delta}");
        }
        b'o' => assert!(book.operations.contains_key(&name), "invented: nobody has begun {delta}"),
        _ => assert!(name.starts_with("x-"), "invented: {delta}"),
    }
}

/// An operation ends with one verdict: the one that was given, or that its process was killed.
fn check_operation(name: &str, told: Option<&Told>, row: &LifecycleRow, accepted: &[String]) {
    let heard: BTreeSet<&String> = accepted.iter().collect();
    let sealed = match (row.status, &row.error) {
        (RowStatus::Running, _) => None,
        (RowStatus::Succeeded, _) => Some("succeeded".to_owned()),
        (RowStatus::Failed, error) => Some(format!("failed {}", error.as_deref().unwrap_or_default())),
    };
    let context = format!("operation {name}: said {told:?}, heard {heard:?}, the row says {sealed:?}");
    assert!(heard.len() <= 1, "two verdicts: {context}");
    let Some(told) = told else {
        assert!(sealed.is_none() && heard.is_empty(), "invented: {context}");
        return;
    };
    assert_eq!(heard.first().copied(), sealed.as_ref(), "{context}");
    match sealed {
        None => assert!(!told.begun, "lost: {context}"),
        Some(sealed) if told.ended => assert_eq!(Some(&sealed), told.verdict.as_ref(), "{context}"),
        Some(sealed) => {
            assert!(KILLED.contains(&sealed.as_str()) || Some(&sealed) == told.verdict.as_ref(), "{context}")
        }
    }
}

/// Within one child's life no delta comes again in a request after one that was answered 204. (A child that was killed may
/// have died between the answer and its note, and the installed programs do not say which process they are.) That a row's
/// operation is unique makes its decky a name for the delta.
fn check_nothing_again(received: &[Received]) {
    let mut answered = BTreeSet::new();
    for request in received {
        let Some(json) = &request.json else { continue };
        let run = text(&json["agent_version"]);
        if !run.starts_with("run-") {
            continue;
        }
        let names: Vec<_> = deltas(request).iter().map(|delta| text(&delta["decky_name"])).collect();
        for name in names.iter().filter(|name| !name.starts_with('x')) {
            let key = (run.clone(), name.clone());
            assert!(!answered.contains(&key), "sent again by {run} after a 2xx: {name}");
            if request.status == Some(204) {
                answered.insert(key);
            }
        }
    }
}

fn deltas(request: &Received) -> Vec<Value> {
    let json = request.json.as_ref();
    json.and_then(|json| json["lifecycle"].as_array()).cloned().unwrap_or_default()
}

fn verdict(delta: &Value) -> String {
    match delta["error"].as_str() {
        Some(error) => format!("{} {error}", text(&delta["status"])),
        None => text(&delta["status"]),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}
