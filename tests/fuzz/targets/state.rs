//! DECNET's state file with any content.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::assert_sanitized;
use crate::master::body::Body;
use crate::status::Snapshot;
use crate::status::decnet::report;
use crate::status::docker::{Containers, DockerState, Networks};
use crate::status::state::State;
use crate::text::sanitize;

/// Makes a status from a state file with this content, with and without an answer of Docker.
pub fn state_file(input: &[u8]) {
    let containers = [
        ("decky-01-ssh", "running"),
        ("decky-01-smb-share", "exited"),
        ("decky-02-ftp", "running"),
    ];
    let states = containers.map(|(name, state)| (name.to_owned(), Some(state.to_owned()))).into();
    let networks = Ok(Networks::default());
    let engine = DockerState {
        containers: Ok(Containers { states, left_out: None }),
        networks: networks.clone(),
    };
    let without_answer = DockerState { containers: Err("no answer".to_owned()), networks };
    let state = State::parse(input).map_err(|problem| sanitize(&problem));
    let reported = |engine| {
        state.as_ref().map_err(String::clone).and_then(|state| report(Some(state), engine, None))
    };
    if let Some(status) = check(reported(&engine)) {
        check_deckies(input, &status);
    }
    if let Some(status) = check(reported(&without_answer)) {
        assert_eq!(object(&status).get("error").map(|error| error.get()), Some(r#""no answer""#));
        // The master counts a decky without states as degraded.
        assert!(!object(&status).contains_key("deckies"));
    }
}

/// The status, if it is known. Asserts that the body of its beat is valid JSON, and that of a beat
/// with the error as well.
fn check(status: Result<Snapshot, String>) -> Option<String> {
    let snapshot = match &status {
        Ok(status) => status.clone(),
        Err(problem) => {
            assert_sanitized(problem);
            Snapshot::unknown(problem)
        }
    };
    let body = serde_json::to_string(&Body::of("u", &snapshot, &[])).unwrap();
    assert_eq!(object(&body)["status"].get(), snapshot.status());
    object(snapshot.status());
    status.ok().map(|_| snapshot.status().to_owned())
}

/// Parses a JSON object. Its fields are not parsed, because they may be nested too deep.
fn object(json: &str) -> BTreeMap<&str, &RawValue> {
    serde_json::from_str(json).unwrap()
}

fn check_deckies(input: &[u8], status: &str) {
    #[derive(Deserialize)]
    struct Decky {
        name: String,
        services: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Runtime {
        running: bool,
        services: HashMap<String, String>,
    }
    let status = object(status);
    let deckies: Vec<&RawValue> = serde_json::from_str(status["deckies"].get()).unwrap();
    let runtime: HashMap<String, Runtime> = serde_json::from_str(status["runtime"].get()).unwrap();
    let mut rest = input;
    // If two deckies have the same name, the last one counts, also for readers of the JSON.
    let mut named = HashMap::new();
    for decky in deckies {
        let bytes = decky.get().as_bytes();
        let at = rest.windows(bytes.len()).position(|found| found == bytes);
        rest = &rest[at.expect("the bytes of the file, in its order") + bytes.len()..];
        let decky: Decky = serde_json::from_str(decky.get()).unwrap();
        named.insert(decky.name, decky.services);
    }
    assert_eq!(named.len(), runtime.len());
    for (name, services) in named {
        let states = &runtime[&name];
        let services: HashSet<_> = services.iter().collect();
        assert_eq!(services, states.services.keys().collect());
        let all_run = states.services.values().all(|state| state == "running");
        assert_eq!(states.running, !services.is_empty() && all_run);
    }
}
