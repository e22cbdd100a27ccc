//! The master's data: enrolled hosts, operations and deckies, and how a heartbeat changes them. No
//! I/O and no lock: the caller holds the lock of the state. The rules are those of
//! `docs/protocol.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fault::{Answer, first_header};
use super::{Enrolled, LifecycleRow, Received, RowStatus, Shard, ShardState};
use crate::limits;
use crate::text;

#[derive(Debug, Default)]
pub(super) struct Database {
    /// The pinned fingerprint of each host uuid.
    pins: BTreeMap<String, String>,
    /// The oldest comes first.
    pub(super) rows: Vec<LifecycleRow>,
    /// The indices of the rows that are running. After a long test most rows are not.
    running: BTreeSet<usize>,
    /// By the decky's name.
    pub(super) shards: BTreeMap<String, Shard>,
}

/// The model of a request. Fields that are not used are checked, as the real master does.
#[derive(Deserialize)]
#[allow(dead_code, reason = "checked, but not read")]
struct Heartbeat {
    host_uuid: String,
    agent_version: Option<String>,
    status: Map<String, Value>,
    topology: Option<Map<String, Value>>,
    lifecycle: Option<Vec<Map<String, Value>>>,
}

/// The model of a decky. Unknown keys are an error.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "checked, but not read")]
struct Decky {
    name: String,
    ip: String,
    services: Vec<String>,
    distro: String,
    base_image: String,
    hostname: String,
    #[serde(default)]
    build_base: String,
    archetype: Option<String>,
    #[serde(default)]
    service_config: BTreeMap<String, Map<String, Value>>,
    #[serde(default)]
    nmap_os: String,
    mutate_interval: Option<i64>,
    #[serde(default)]
    last_mutated: f64,
    #[serde(default)]
    last_login_attempt: f64,
    host_uuid: Option<String>,
}

impl Database {
    pub(super) fn pin(&mut self, uuid: &str, fingerprint: &str) {
        self.pins.insert(uuid.to_owned(), fingerprint.to_ascii_lowercase());
    }

    pub(super) fn unpin(&mut self, uuid: &str) {
        self.pins.remove(uuid);
    }

    pub(super) fn open(&mut self, uuid: &str, decky: &str, operation: &str) -> u64 {
        let id = self.rows.last().map_or(1, |newest| newest.id + 1);
        self.running.insert(self.rows.len());
        self.rows.push(LifecycleRow {
            id,
            host_uuid: uuid.to_owned(),
            decky: decky.to_owned(),
            operation: operation.to_owned(),
            status: RowStatus::Running,
            error: None,
            completed_at: None,
        });
        id
    }

    /// Handles a request as the real master does.
    pub(super) fn handle(&mut self, request: &Received, fingerprint: &str) -> Answer {
        if request.path != "/swarm/heartbeat" {
            return rejection(404, "Not Found");
        }
        if request.method != "POST" {
            return rejection(405, "Method Not Allowed").header("allow", "POST");
        }
        match parse(request) {
            Ok(heartbeat) => self.beat(&heartbeat, fingerprint),
            Err(answer) => answer,
        }
    }

    fn beat(&mut self, heartbeat: &Heartbeat, fingerprint: &str) -> Answer {
        match self.pins.get(&heartbeat.host_uuid) {
            None => return rejection(404, "unknown host"),
            Some(pinned) if pinned != fingerprint => {
                return rejection(403, "cert fingerprint mismatch");
            }
            Some(_) => {}
        }
        for delta in heartbeat.lifecycle.iter().flatten() {
            self.apply_delta(&heartbeat.host_uuid, delta);
        }
        self.update_shards(&heartbeat.host_uuid, &heartbeat.status);
        Answer::status(204)
    }

    /// Applies a delta to the newest open row of its host, decky and operation. A delta that is
    /// malformed or matches no row is dropped.
    fn apply_delta(&mut self, uuid: &str, delta: &Map<String, Value>) -> Option<()> {
        let decky = python_str(delta.get("decky_name")?);
        let operation = python_str(delta.get("operation")?);
        let status = match python_str(delta.get("status")?).as_str() {
            "running" => RowStatus::Running,
            "succeeded" => RowStatus::Succeeded,
            "failed" => RowStatus::Failed,
            _ => return None,
        };
        let matches = |row: &LifecycleRow| {
            row.host_uuid == uuid && row.decky == decky && row.operation == operation
        };
        let place =
            *self.running.iter().rev().find(|place| self.rows.get(**place).is_some_and(matches))?;
        let row = self.rows.get_mut(place)?;
        row.status = status;
        if status != RowStatus::Running {
            self.running.remove(&place);
        }
        if let Some(error) = delta.get("error").filter(|error| !error.is_null()) {
            row.error = Some(text::cut(&python_str(error), limits::DELTA_ERROR).to_owned());
        }
        let reported = delta.get("completed_at").and_then(Value::as_str).and_then(parse_time);
        if reported.is_some() || status != RowStatus::Running {
            row.completed_at = Some(reported.unwrap_or_else(SystemTime::now));
        }
        Some(())
    }

    /// Records every decky in the status: running if `runtime` reports that, otherwise degraded.
    fn update_shards(&mut self, uuid: &str, status: &Map<String, Value>) {
        if !status.get("deployed").is_some_and(is_truthy) {
            return;
        }
        let runtime = status.get("runtime");
        for decky in status.get("deckies").and_then(Value::as_array).into_iter().flatten() {
            let Some(decky) = parse_decky(decky) else { continue };
            let running =
                runtime.and_then(|all| all.get(&decky.name)).and_then(|state| state.get("running"));
            let state = if running.is_some_and(is_truthy) {
                ShardState::Running
            } else {
                ShardState::Degraded
            };
            self.shards.insert(
                decky.name,
                Shard { host_uuid: uuid.to_owned(), services: decky.services, state },
            );
        }
    }
}

impl Enrolled {
    /// The worker's `decnet.ini`, as the master writes it into an enrolment bundle.
    pub(super) fn ini(&self) -> String {
        format!(
            "; Written by the loopback master.\n\
             [decnet]\n\
             mode = agent\n\
             disallow-master = true\n\
             log-directory = /var/log/decnet\n\
             \n\
             [agent]\n\
             master-host = 127.0.0.1\n\
             swarmctl-port = {}\n\
             swarm-syslog-port = 6514\n\
             agent-port = 8765\n\
             agent-dir = {}\n\
             updater-dir = /etc/decnet/updater\n\
             host-uuid = {}\n",
            self.port,
            self.agent_dir.display(),
            self.uuid,
        )
    }
}

/// Parses the body. The error is the answer that the master's web framework gives.
fn parse(request: &Received) -> Result<Heartbeat, Answer> {
    if std::str::from_utf8(&request.body).is_err() {
        return Err(rejection(400, "There was an error parsing the body"));
    }
    if !is_json(first_header(&request.headers, "content-type").unwrap_or_default()) {
        return Err(unprocessable(
            "model_attributes_type",
            "Input should be a valid dictionary or object",
        ));
    }
    match &request.json {
        Some(Value::Object(body)) => {
            // Deserialized from a `Value`, so that the last one of duplicate keys counts.
            Heartbeat::deserialize(body)
                .map_err(|cause| unprocessable("value_error", &cause.to_string()))
        }
        Some(_) => Err(unprocessable(
            "model_attributes_type",
            "Input should be a valid dictionary or object",
        )),
        None if request.body.is_empty() => Err(unprocessable("missing", "Field required")),
        None => Err(unprocessable("json_invalid", "JSON decode error")),
    }
}

/// `application/json` or `application/…+json`, with or without parameters.
fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence
        .strip_prefix("application/")
        .is_some_and(|subtype| subtype == "json" || subtype.ends_with("+json"))
}

fn parse_decky(decky: &Value) -> Option<Decky> {
    // Serde would also accept an array of the values in order.
    decky
        .as_object()
        .and_then(|decky| Decky::deserialize(decky).ok())
        .filter(|decky| !decky.services.is_empty())
}

/// Parses RFC 3339 in UTC, with `Z` or the offset `+00:00`.
fn parse_time(text: &str) -> Option<SystemTime> {
    let utc = text.strip_suffix("+00:00").or(text.strip_suffix('Z')).or(text.strip_suffix('z'))?;
    humantime::parse_rfc3339(&format!("{utc}Z")).ok()
}

/// Approximates Python's `str`, because the master accepts any value as a name or an error.
fn python_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        other => other.to_string(),
    }
}

/// Whether a value is true in Python.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(truth) => *truth,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
    }
}

fn rejection(status: u16, detail: &str) -> Answer {
    json_answer(status, &json!({ "detail": detail }))
}

fn unprocessable(kind: &str, message: &str) -> Answer {
    json_answer(422, &json!({ "detail": [{ "type": kind, "loc": ["body"], "msg": message }] }))
}

fn json_answer(status: u16, body: &Value) -> Answer {
    Answer::status(status).header("content-type", "application/json").body(body.to_string())
}
