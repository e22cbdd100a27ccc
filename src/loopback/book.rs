//! The master's book: who is enrolled, which operations are open, what is known of the deckies, and how a heartbeat
//! changes that. No I/O and no lock: whoever holds the state calls it. The rules are those of `docs/protocol.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fault::{Answer, first_header};
use super::{Enrolled, LifecycleRow, Received, RowStatus, Shard, ShardState};
use crate::limits;
use crate::text;

#[derive(Debug, Default)]
pub(super) struct Book {
    /// Host uuid to the fingerprint that is pinned for it.
    pins: BTreeMap<String, String>,
    /// Oldest first.
    pub(super) rows: Vec<LifecycleRow>,
    /// The places of those that are running: most are not, after a long test.
    running: BTreeSet<usize>,
    /// By decky.
    pub(super) shards: BTreeMap<String, Shard>,
}

/// The request's model. What the book does not read is checked all the same.
#[derive(Deserialize)]
#[allow(dead_code, reason = "checked, but not read")]
struct Heartbeat {
    host_uuid: String,
    agent_version: Option<String>,
    status: Map<String, Value>,
    topology: Option<Map<String, Value>>,
    lifecycle: Option<Vec<Map<String, Value>>>,
}

/// The model of a decky: strict, and unknown keys are forbidden.
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

impl Book {
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

    /// Acts on a request as the real master does, and answers it.
    pub(super) fn judge(&mut self, request: &Received, fingerprint: &str) -> Answer {
        if request.path != "/swarm/heartbeat" {
            return refusal(404, "Not Found");
        }
        if request.method != "POST" {
            return refusal(405, "Method Not Allowed").header("allow", "POST");
        }
        match parse(request) {
            Ok(heartbeat) => self.beat(&heartbeat, fingerprint),
            Err(answer) => answer,
        }
    }

    fn beat(&mut self, heartbeat: &Heartbeat, fingerprint: &str) -> Answer {
        match self.pins.get(&heartbeat.host_uuid) {
            None => return refusal(404, "unknown host"),
            Some(pinned) if pinned != fingerprint => {
                return refusal(403, "cert fingerprint mismatch");
            }
            Some(_) => {}
        }
        for delta in heartbeat.lifecycle.iter().flatten() {
            self.seal(&heartbeat.host_uuid, delta);
        }
        self.note_shards(&heartbeat.host_uuid, &heartbeat.status);
        Answer::status(204)
    }

    /// Pivots one delta onto the newest open row that fits it. One that is malformed or fits none is dropped.
    fn seal(&mut self, uuid: &str, delta: &Map<String, Value>) -> Option<()> {
        let decky = written(delta.get("decky_name")?);
        let operation = written(delta.get("operation")?);
        let status = match written(delta.get("status")?).as_str() {
            "running" => RowStatus::Running,
            "succeeded" => RowStatus::Succeeded,
            "failed" => RowStatus::Failed,
            _ => return None,
        };
        let fits = |row: &LifecycleRow| {
            row.host_uuid == uuid && row.decky == decky && row.operation == operation
        };
        let place =
            *self.running.iter().rev().find(|place| self.rows.get(**place).is_some_and(fits))?;
        let row = self.rows.get_mut(place)?;
        row.status = status;
        if status != RowStatus::Running {
            self.running.remove(&place);
        }
        if let Some(error) = delta.get("error").filter(|error| !error.is_null()) {
            row.error = Some(text::cut(&written(error), limits::DELTA_ERROR).to_owned());
        }
        let said = delta.get("completed_at").and_then(Value::as_str).and_then(parse_time);
        if said.is_some() || status != RowStatus::Running {
            row.completed_at = Some(said.unwrap_or_else(SystemTime::now));
        }
        Some(())
    }

    /// Writes down every decky that the status names: running if `runtime` says so, else degraded.
    fn note_shards(&mut self, uuid: &str, status: &Map<String, Value>) {
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

/// The body as the request's model, or the framework's answer to one that is not.
fn parse(request: &Received) -> Result<Heartbeat, Answer> {
    if std::str::from_utf8(&request.body).is_err() {
        return Err(refusal(400, "There was an error parsing the body"));
    }
    if !is_json(first_header(&request.headers, "content-type").unwrap_or_default()) {
        return Err(unprocessable(
            "model_attributes_type",
            "Input should be a valid dictionary or object",
        ));
    }
    match &request.json {
        Some(Value::Object(body)) => {
            // By way of a `Value`: of a key that stands there twice, the last one counts.
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
    // A list of the values in their order would do for serde.
    decky
        .as_object()
        .and_then(|decky| Decky::deserialize(decky).ok())
        .filter(|decky| !decky.services.is_empty())
}

/// RFC 3339 in UTC, with a `Z` or an offset of nothing.
fn parse_time(text: &str) -> Option<SystemTime> {
    let utc = text.strip_suffix("+00:00").or(text.strip_suffix('Z')).or(text.strip_suffix('z'))?;
    humantime::parse_rfc3339(&format!("{utc}Z")).ok()
}

/// A value as Python's `str` has it, near enough: the master takes any value for a name or an error.
fn written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        other => other.to_string(),
    }
}

/// Whether Python holds a value for true.
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

fn refusal(status: u16, detail: &str) -> Answer {
    json_answer(status, &json!({ "detail": detail }))
}

fn unprocessable(kind: &str, message: &str) -> Answer {
    json_answer(422, &json!({ "detail": [{ "type": kind, "loc": ["body"], "msg": message }] }))
}

fn json_answer(status: u16, body: &Value) -> Answer {
    Answer::status(status).header("content-type", "application/json").body(body.to_string())
}
