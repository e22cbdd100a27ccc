//! What the master has heard, held against what the children have said.

use std::collections::{BTreeMap, BTreeSet};

use decnet_heartbeat::loopback::{LifecycleRow, Received, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Outcome};
use serde_json::Value;

use crate::told::{Book, Told, pushed};

/// What an operation is reported with whose process was killed: by the next start, and by another process that lives.
const KILLED: [&str; 2] =
    ["failed the agent restarted during deploy", "failed its process ended during deploy"];

/// What the master has accepted.
#[derive(Debug, Default)]
pub struct Heard {
    /// Of each decky, as often as it came.
    verdicts: BTreeMap<String, Vec<String>>,
    /// Each child with the deckies of whose deltas it has heard.
    answered: BTreeSet<(String, String)>,
    pub requests: usize,
}

impl Heard {
    /// Takes note of what has come in since the last time: nothing but what was said, and nothing again.
    pub fn hear(&mut self, book: &Book, received: &[Received]) {
        self.requests += received.len();
        for request in received {
            let deltas = deltas(request);
            deltas.iter().for_each(|delta| check_known(book, delta));
            self.check_nothing_again(request, &deltas);
            if request.status == Some(204) {
                for delta in &deltas {
                    self.verdicts
                        .entry(text(&delta["decky_name"]))
                        .or_default()
                        .push(verdict(delta));
                }
            }
        }
    }

    /// Within one child's life no delta comes again in a request after one that was answered 204. (A child that was killed
    /// may have died between the answer and its note, and the installed programs do not say which process they are.) That
    /// a row's operation is unique makes its decky a name for the delta.
    fn check_nothing_again(&mut self, request: &Received, deltas: &[Value]) {
        let run =
            request.json.as_ref().map(|json| text(&json["agent_version"])).unwrap_or_default();
        if !run.starts_with("run-") {
            return;
        }
        for name in deltas
            .iter()
            .map(|delta| text(&delta["decky_name"]))
            .filter(|name| !name.starts_with('x'))
        {
            let key = (run.clone(), name);
            assert!(!self.answered.contains(&key), "sent again after a 2xx: {key:?}");
            if request.status == Some(204) {
                self.answered.insert(key);
            }
        }
    }

    /// Every promise that was given is kept.
    pub fn check(&self, book: &Book, rows: &[LifecycleRow]) {
        for name in &book.kept {
            let heard = self.verdicts.contains_key(name);
            assert!(
                heard,
                "lost: the push of {name} returned Ok, and the master never heard of it"
            );
        }
        for row in rows {
            let accepted = self.verdicts.get(&row.decky).map_or(&[][..], Vec::as_slice);
            check_operation(&row.decky, book.operations.get(&row.decky), row, accepted);
        }
    }

    /// Pushes that were kept and operations that have ended, and of which the master has not heard.
    pub fn owed(&self, book: &Book) -> Vec<String> {
        let ended = book.operations.iter().filter(|(_, told)| told.ended).map(|(name, _)| name);
        book.kept
            .iter()
            .chain(ended)
            .filter(|name| !self.verdicts.contains_key(*name))
            .cloned()
            .collect()
    }

    /// Deltas in requests that were answered 204, each as often as it came.
    pub fn accepted(&self) -> usize {
        self.verdicts.values().map(Vec::len).sum()
    }

    /// How many of those had been accepted before.
    pub fn again(&self) -> usize {
        let once = self.verdicts.iter().filter(|(name, _)| !name.starts_with('x'));
        once.map(|(_, times)| times.len() - 1).sum()
    }
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
        (RowStatus::Failed, error) => {
            Some(format!("failed {}", error.as_deref().unwrap_or_default()))
        }
    };
    let context =
        format!("operation {name}: said {told:?}, heard {heard:?}, the row says {sealed:?}");
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
            assert!(
                KILLED.contains(&sealed.as_str()) || Some(&sealed) == told.verdict.as_ref(),
                "{context}"
            )
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
