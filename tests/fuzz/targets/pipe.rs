//! The lines that an agent writes to `pipe`, whatever is in them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a target that cannot go on has found something"
)]

use serde_json::Value;

use super::messages::{Message, RpcResult, answer, parse};
use crate::fuzzing::assert_sanitized;

/// Parses each line, and writes its answer.
pub fn pipe(input: &[u8]) {
    input.split(|byte| *byte == b'\n').for_each(check);
}

fn check(line: &[u8]) {
    let Message { id, method } = parse(line);
    if let Err(error) = &method {
        assert_sanitized(&error.message);
    }
    let Some(id) = id else { return };
    let answer = answer(&id, &method.map(|_| RpcResult::Empty {}));
    assert_eq!(answer.iter().position(|byte| *byte == b'\n'), Some(answer.len() - 1));
    let json: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(json["jsonrpc"], "2.0");
    assert!(json.get("result").is_some() != json.get("error").is_some());
}
