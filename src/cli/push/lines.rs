//! The deltas of `push --lines`: one JSON object a line, as in the protocol. Reads stdin.

use std::io::{self, BufRead, Read};

use crate::cli::json_delta::JsonDelta;
use crate::delta::LifecycleDelta;
use crate::limits;
use crate::text::sanitize;

/// Reads all lines. The last delta is the newest. The error names the line and is safe to print.
pub(super) fn read(input: impl BufRead) -> Result<Vec<LifecycleDelta>, String> {
    let mut input = input;
    let mut deltas = Vec::new();
    for number in 1.. {
        let in_line = |problem: String| format!("line {number}: {problem}");
        let Some(line) = next_line(&mut input).map_err(in_line)? else { break };
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        if deltas.len() == limits::OUTBOX_ROWS {
            let most = limits::OUTBOX_ROWS;
            return Err(in_line(format!("is one too many; the outbox has room for {most}")));
        }
        deltas.push(parse(line).map_err(in_line)?);
    }
    if deltas.is_empty() { Err("has no deltas".to_owned()) } else { Ok(deltas) }
}

/// `None`: the input has ended.
fn next_line(input: &mut impl BufRead) -> Result<Option<Vec<u8>>, String> {
    let mut line = Vec::new();
    let limit = limits::PUSH_LINE as u64 + 1;
    let mut bounded: io::Take<_> = input.by_ref().take(limit);
    bounded.read_until(b'\n', &mut line).map_err(|error| format!("cannot be read: {error}"))?;
    match line.len() {
        0 => Ok(None),
        length if length > limits::PUSH_LINE => {
            Err(format!("has more than {} bytes", limits::PUSH_LINE))
        }
        _ => Ok(Some(line)),
    }
}

fn parse(line: &[u8]) -> Result<LifecycleDelta, String> {
    // Its text may quote the line. It counts lines, too, and this is always its first one.
    let problem = |error: serde_json::Error| {
        sanitize(&error.to_string()).replace(" at line 1 column ", " at column ")
    };
    serde_json::from_slice::<JsonDelta>(line).map_err(problem)?.into_delta()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::rfc3339;
    use crate::delta::Operation;

    const GOOD: &str = r#"{"decky_name":"d","operation":"deploy","status":"succeeded"}"#;

    #[test]
    fn lines_are_deltas_in_their_order() {
        let text = format!(
            "{GOOD}\n\n{}",
            r#"{"decky_name":"e","operation":"mutate","status":"failed","error":"no","completed_at":"2026-01-02T03:04:05+01:00"}"#
        );
        let deltas = read(text.as_bytes()).unwrap();
        let at = rfc3339::parse("2026-01-02T02:04:05Z").unwrap();
        assert_eq!(deltas[0].decky(), "d");
        assert_eq!(
            deltas[1],
            LifecycleDelta::failed("e", Operation::Mutate, "no").completed_at(at)
        );
    }

    #[test]
    fn error_names_the_line() {
        let long = "x".repeat(limits::PUSH_LINE + 1);
        for (line, problem) in [
            ("{", "line 2: EOF while parsing an object at column 1"),
            ("\u{1b}", "line 2: expected value at column 1"),
            (r#"{"decky_name":"d","operation":"x","status":"failed"}"#, "line 2: must be deploy"),
            (r#"{"decky_name":"d","operation":"deploy"}"#, "line 2: missing field `status`"),
            (
                r#"{"decky_name":"a b","operation":"deploy","status":"failed"}"#,
                "line 2: decky name: \"a b\" is not a valid name",
            ),
            (
                r#"{"decky_name":"d","operation":"deploy","status":"succeeded","error":"e"}"#,
                "line 2: error: says why it failed",
            ),
            (
                r#"{"decky_name":"d","operation":"deploy","status":"failed","completed_at":"now"}"#,
                "line 2: completed_at: must be a time in RFC 3339",
            ),
            (long.as_str(), "line 2: has more than 1048576 bytes"),
        ] {
            let error = read(format!("{GOOD}\n{line}\n{GOOD}").as_bytes()).unwrap_err();
            assert!(error.starts_with(problem), "{error}");
            assert!(!error.contains('\u{1b}'));
        }
        assert_eq!(read("\n\n".as_bytes()).unwrap_err(), "has no deltas");
        let many = format!("{GOOD}\n").repeat(limits::OUTBOX_ROWS + 1);
        let error = "line 10001: is one too many; the outbox has room for 10000";
        assert_eq!(read(many.as_bytes()).unwrap_err(), error);
    }
}
