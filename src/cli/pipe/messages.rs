//! The messages of `pipe`: JSON-RPC 2.0, one message a line. Values only, for any thread.
//!
//! A line is parsed without recursion: parts that are not looked at may be nested as deeply as the
//! line is long.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::cli::json_delta::{Ended, JsonDelta, JsonStatus, from_text};
use crate::delta::{LifecycleDelta, Operation, check_decky};
use crate::error::{Error, chain};
use crate::limits;
use crate::stats::Stats;
use crate::status::Snapshot;
use crate::text::{escape_json, sanitize};

/// What a line asks for, and the id of its answer. `None`: it is a notification, and is not
/// answered.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) id: Option<Id>,
    pub(super) method: Result<Method, RpcError>,
}

/// The id of a request, as JSON text.
#[derive(Debug)]
pub(super) struct Id(Box<RawValue>);

/// A method with valid parameters.
#[derive(Debug)]
pub(super) enum Method {
    Begin(Begin),
    End(End),
    Push(Vec<LifecycleDelta>),
    /// `None`: the agent has no status of its own any more.
    Status(Option<Box<Snapshot>>),
    Stats,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Begin {
    pub(super) operation: Operation,
    /// Sorted by name, each once.
    pub(super) deckies: Vec<String>,
    /// Take over the rows that a process which has ended has in flight.
    pub(super) resumes: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) handle: u64,
    /// `None`: all that are open.
    pub(super) decky: Option<String>,
    pub(super) ended: Ended,
}

/// The result of a request.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum RpcResult {
    Begun { handle: u64, durable: bool, resumed: Vec<String> },
    Queued { durable: bool },
    Empty {},
    Stats(Box<Stats>),
}

/// The error of a request.
#[derive(Debug, Serialize)]
pub(super) struct RpcError {
    code: i32,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<ErrorData>,
}

#[derive(Debug, Serialize)]
struct ErrorData {
    in_doubt: bool,
}

impl RpcError {
    fn parse_error(problem: &str) -> Self {
        Self::new(-32_700, problem)
    }

    fn invalid_request(problem: &str) -> Self {
        Self::new(-32_600, problem)
    }

    fn unknown_method(name: &str) -> Self {
        let known = "begin, end, push, status, stats";
        Self::new(-32_601, &format!("unknown method {:?}; there are: {known}", sanitize(name)))
    }

    pub(super) fn invalid_params(problem: &str) -> Self {
        Self::new(-32_602, problem)
    }

    /// The outbox refuses the request, or has not answered.
    pub(super) fn outbox(error: &Error) -> Self {
        let data = Some(ErrorData { in_doubt: error.is_in_doubt() });
        Self { data, ..Self::new(-32_000, &chain(error)) }
    }

    fn new(code: i32, message: &str) -> Self {
        Self { code, message: message.to_owned(), data: None }
    }
}

impl Id {
    fn null() -> Self {
        Self(RawValue::NULL.to_owned())
    }

    /// The id, if it is a string, a number or null, and is not too long. It is echoed as it was
    /// given, so it must be a value that every parser accepts.
    fn of(json: &RawValue) -> Option<Self> {
        if json.get().len() > limits::PIPE_ID {
            return None;
        }
        match serde_json::from_str(json.get()) {
            Ok(Value::Null | Value::Number(_) | Value::String(_)) => Some(Self(json.to_owned())),
            _ => None,
        }
    }
}

/// Any object of JSON-RPC.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    jsonrpc: Option<&'a RawValue>,
    /// Present, and null, are different.
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    method: Option<&'a RawValue>,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
}

fn present<'de, D: Deserializer<'de>>(json: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(json).map(Some)
}

impl Message {
    /// The answer to a line that is longer than [`limits::PIPE_LINE`].
    pub(super) fn too_long() -> Self {
        let most = limits::PIPE_LINE;
        Self::of_unknown(RpcError::parse_error(&format!("the line has more than {most} bytes")))
    }

    /// The answer to a line whose id is unknown.
    fn of_unknown(error: RpcError) -> Self {
        Self { id: Some(Id::null()), method: Err(error) }
    }
}

/// Parses a line.
pub(super) fn parse(line: &[u8]) -> Message {
    let unknown = Message::of_unknown;
    let Ok(text) = str::from_utf8(line) else {
        return unknown(RpcError::parse_error("the line is not UTF-8"));
    };
    let json: &RawValue = match serde_json::from_str(text) {
        Ok(json) => json,
        Err(error) => return unknown(RpcError::parse_error(&problem(&error))),
    };
    if json.get().starts_with('[') {
        return unknown(RpcError::invalid_request("batches are not supported; send one by one"));
    }
    match serde_json::from_str::<Envelope<'_>>(json.get()) {
        Ok(envelope) => envelope.message(),
        Err(error) => unknown(RpcError::invalid_request(&problem(&error))),
    }
}

impl Envelope<'_> {
    fn message(&self) -> Message {
        let id = self.id.map(Id::of);
        let invalid = |id: Option<Id>, problem: &str| Message {
            id: Some(id.unwrap_or_else(Id::null)),
            method: Err(RpcError::invalid_request(problem)),
        };
        let id = match id {
            Some(None) => {
                let most = limits::PIPE_ID;
                let problem = format!("id must be a string or a number of at most {most} bytes");
                return invalid(None, &problem);
            }
            Some(id) => id,
            None => None,
        };
        if self.jsonrpc.is_none_or(|version| version.get() != r#""2.0""#) {
            return invalid(id, r#"jsonrpc must be "2.0""#);
        }
        let name = self.method.map(|name| serde_json::from_str::<String>(name.get()));
        let Some(Ok(name)) = name else { return invalid(id, "method must be a string") };
        let method = match method(&name, self.params) {
            // Nobody could end it.
            Ok(Method::Begin(_)) if id.is_none() => {
                Err(RpcError::invalid_params("begin needs an id: its result has the handle"))
            }
            method => method,
        };
        Message { id, method }
    }
}

fn method(name: &str, params: Option<&RawValue>) -> Result<Method, RpcError> {
    match name {
        "begin" => begin(parameters(params)?).map(Method::Begin),
        "end" => end(parameters(params)?).map(Method::End),
        "push" => push(parameters(params)?).map(Method::Push),
        "status" => status(parameters(params)?).map(Method::Status),
        "stats" => parameters::<NoParams>(params).map(|NoParams {}| Method::Stats),
        name => Err(RpcError::unknown_method(name)),
    }
}

/// Absent parameters are those without a key.
fn parameters<P: DeserializeOwned>(params: Option<&RawValue>) -> Result<P, RpcError> {
    let json = params.map_or("{}", RawValue::get);
    if !json.starts_with('{') {
        return Err(RpcError::invalid_params("params must be an object"));
    }
    serde_json::from_str(json)
        .map_err(|error| RpcError::invalid_params(&format!("params: {}", problem(&error))))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BeginParams {
    #[serde(deserialize_with = "from_text")]
    operation: Operation,
    deckies: Vec<String>,
    #[serde(default)]
    resume: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EndParams {
    handle: u64,
    decky: Option<String>,
    status: JsonStatus,
    error: Option<String>,
    completed_at: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PushParams {
    deltas: Vec<JsonDelta>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StatusParams {
    #[serde(deserialize_with = "status_or_null")]
    status: Option<Box<RawValue>>,
}

/// The key must be there.
fn status_or_null<'de, D: Deserializer<'de>>(json: D) -> Result<Option<Box<RawValue>>, D::Error> {
    let status = Box::<RawValue>::deserialize(json)?;
    Ok(Some(status).filter(|status| status.get() != "null"))
}

fn begin(params: BeginParams) -> Result<Begin, RpcError> {
    let BeginParams { operation, deckies, resume } = params;
    if deckies.is_empty() {
        return Err(RpcError::invalid_params("deckies: are none; name at least one"));
    }
    deckies.iter().try_for_each(|decky| check_decky(decky)).map_err(invalid)?;
    // A decky that is named twice counts once.
    let deckies: BTreeSet<String> = deckies.into_iter().collect();
    let mut deckies: Vec<String> = deckies.into_iter().collect();
    // They are held for as long as the operation is open.
    deckies.iter_mut().for_each(String::shrink_to_fit);
    Ok(Begin { operation, deckies, resumes: resume })
}

fn end(params: EndParams) -> Result<End, RpcError> {
    let EndParams { handle, decky, status, error, completed_at } = params;
    let ended = Ended::new(status, error, completed_at);
    let ended = ended.map_err(|problem| RpcError::invalid_params(&problem))?;
    Ok(End { handle, decky, ended })
}

fn push(params: PushParams) -> Result<Vec<LifecycleDelta>, RpcError> {
    let delta = |(place, delta): (usize, JsonDelta)| {
        delta
            .into_delta()
            .map_err(|problem| RpcError::invalid_params(&format!("deltas[{place}]: {problem}")))
    };
    params.deltas.into_iter().enumerate().map(delta).collect()
}

fn status(params: StatusParams) -> Result<Option<Box<Snapshot>>, RpcError> {
    let Some(status) = params.status else { return Ok(None) };
    if !status.get().starts_with('{') {
        return Err(RpcError::invalid_params("status: must be an object or null"));
    }
    let snapshot = Snapshot::new(&status);
    match snapshot.fault() {
        Some(problem) => Err(RpcError::invalid_params(&format!("status: {problem}"))),
        None => Ok(Some(Box::new(snapshot))),
    }
}

fn invalid(error: Error) -> RpcError {
    RpcError::invalid_params(&chain(&error))
}

/// The text may quote the line.
fn problem(error: &serde_json::Error) -> String {
    sanitize(&error.to_string())
}

/// The line that answers a request.
pub(super) fn answer(id: &Id, reply: &Result<RpcResult, RpcError>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Answer<'a> {
        jsonrpc: &'static str,
        id: &'a RawValue,
        #[serde(skip_serializing_if = "Option::is_none")]
        result: Option<&'a RpcResult>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a RpcError>,
    }
    let result = reply.as_ref().ok();
    let error = reply.as_ref().err();
    let answer = Answer { jsonrpc: "2.0", id: &id.0, result, error };
    // Serializing values of these types cannot fail.
    let json = serde_json::to_string(&answer).unwrap_or_default();
    let mut line = escape_json(&json).into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests;
