//! Tests of the messages.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::cli::rfc3339;
use crate::delta::Outcome;

/// The answer to a line that cannot be done. Asserts that it has one.
fn refused(line: &str) -> Value {
    let message = parse(line.as_bytes());
    let error = message.method.expect_err(line);
    let answer = answer(&message.id.expect(line), &Err(error));
    serde_json::from_slice(&answer).unwrap()
}

fn code(line: &str) -> (i64, Value) {
    let answer = refused(line);
    (answer["error"]["code"].as_i64().unwrap(), answer["id"].clone())
}

fn method_of(line: &str) -> Method {
    parse(line.as_bytes()).method.map_err(|error| error.message).unwrap()
}

#[test]
fn line_that_is_no_json_is_a_parse_error() {
    for line in ["{", "x", "{}{}", "[1,", "\"", "{\"id\":1", "nul", "{\"a\":\"\u{1}\"}", "1 2"] {
        assert_eq!(code(line), (-32_700, Value::Null), "{line}");
    }
    let message = parse(b"{\"id\":\"\xff\"}");
    assert_eq!(message.method.unwrap_err().message, "the line is not UTF-8");
}

#[test]
fn json_that_is_no_request_is_an_invalid_request() {
    for (line, id) in [
        ("1", Value::Null),
        ("null", Value::Null),
        ("[]", Value::Null),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"stats"}]"#, Value::Null),
        ("{}", Value::Null),
        (r#"{"id":1,"method":"stats"}"#, json!(1)),
        (r#"{"jsonrpc":"1.0","id":1,"method":"stats"}"#, json!(1)),
        (r#"{"jsonrpc":2.0,"id":"a","method":"stats"}"#, json!("a")),
        (r#"{"jsonrpc":"2.0","id":1}"#, json!(1)),
        (r#"{"jsonrpc":"2.0","id":1,"result":{}}"#, json!(1)),
        (r#"{"jsonrpc":"2.0","id":1,"method":7}"#, json!(1)),
        (r#"{"jsonrpc":"2.0","id":{},"method":"stats"}"#, Value::Null),
        (r#"{"jsonrpc":"2.0","id":[1],"method":"stats"}"#, Value::Null),
        (r#"{"jsonrpc":"2.0","id":true,"method":"stats"}"#, Value::Null),
        (r#"{"jsonrpc":"2.0","id":1e999,"method":"stats"}"#, Value::Null),
        (r#"{"jsonrpc":"2.0","id":"\ud800","method":"stats"}"#, Value::Null),
        (r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"stats"}"#, Value::Null),
    ] {
        assert_eq!(code(line), (-32_600, id), "{line}");
    }
    let long = format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"stats"}}"#, "x".repeat(300));
    assert_eq!(code(&long), (-32_600, Value::Null));
}

#[test]
fn unknown_method_and_wrong_parameters_have_their_codes() {
    let line = |rest: &str| format!(r#"{{"jsonrpc":"2.0","id":null,"method":{rest}}}"#);
    assert_eq!(code(&line(r#""stop""#)), (-32_601, Value::Null));
    for rest in [
        r#""stats","params":{"a":1}"#,
        r#""stats","params":[]"#,
        r#""begin""#,
        r#""begin","params":{"operation":"deploy"}"#,
        r#""begin","params":{"operation":"deploy","deckies":[]}"#,
        r#""begin","params":{"operation":"deploy","deckies":"d"}"#,
        r#""begin","params":{"operation":"deploy","deckies":["a b"]}"#,
        r#""begin","params":{"operation":"build","deckies":["d"]}"#,
        r#""begin","params":{"operation":"deploy","deckies":["d"],"resume":1}"#,
        r#""begin","params":{"operation":"deploy","deckies":["d"],"resumed":true}"#,
        r#""end","params":{"handle":-1,"status":"succeeded"}"#,
        r#""end","params":{"handle":1,"status":"running"}"#,
        r#""end","params":{"handle":1,"status":"succeeded","error":"why"}"#,
        r#""end","params":{"handle":1,"status":"failed","completed_at":"now"}"#,
        r#""push","params":{}"#,
        r#""push","params":{"deltas":[{"decky_name":""}]}"#,
        r#""push","params":{"deltas":[{"decky_name":"","operation":"deploy","status":"failed"}]}"#,
        r#""status","params":{}"#,
        r#""status","params":{"status":[]}"#,
        r#""status","params":{"status":{"deckies":{}}}"#,
        r#""status","params":{"status":{"a":"\ud800"}}"#,
    ] {
        assert_eq!(code(&line(rest)).0, -32_602, "{rest}");
    }
    let name = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{}"}}"#, "x".repeat(5_000));
    assert!(refused(&name)["error"]["message"].as_str().unwrap().len() < 500);
    let delta = r#"{"decky_name":"d","operation":"deploy","status":"succeeded"}"#;
    let bad = r#"{"decky_name":"a/b","operation":"deploy","status":"succeeded"}"#;
    let second = line(&format!(r#""push","params":{{"deltas":[{delta},{bad}]}}"#));
    let message = refused(&second)["error"]["message"].clone();
    assert!(message.as_str().unwrap().starts_with("deltas[1]: decky name: \"a/b\""), "{message}");
}

#[test]
fn notification_has_no_id_and_begin_needs_one() {
    let stats = parse(br#"{"jsonrpc":"2.0","method":"stats"}"#);
    assert!(stats.id.is_none() && matches!(stats.method, Ok(Method::Stats)));
    let unknown = parse(br#"{"jsonrpc":"2.0","method":"stop"}"#);
    assert!(unknown.id.is_none() && unknown.method.is_err());
    let begin =
        br#"{"jsonrpc":"2.0","method":"begin","params":{"operation":"deploy","deckies":["d"]}}"#;
    let begin = parse(begin);
    assert!(begin.id.is_none());
    assert_eq!(begin.method.unwrap_err().message, "begin needs an id: its result has the handle");
}

#[test]
fn parameters_are_read() {
    let line = |method: &str, params: Value| {
        json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string()
    };
    let begin = json!({"operation": "mutate", "deckies": ["b", "a", "b"], "resume": true});
    let Method::Begin(begin) = method_of(&line("begin", begin)) else { panic!() };
    let deckies = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(begin, Begin { operation: Operation::Mutate, deckies, resumes: true });

    let end = json!({"handle": 7, "decky": null, "status": "failed", "error": null});
    let Method::End(end) = method_of(&line("end", end)) else { panic!() };
    let outcome = Outcome::Failed("no reason given".to_owned());
    let ended = Ended { outcome, completed_at: None };
    assert_eq!(end, End { handle: 7, decky: None, ended });

    let delta = json!({"decky_name": "d", "operation": "deploy", "status": "failed", "error": "why",
                       "completed_at": "2026-11-24T13:00:00+01:00"});
    let Method::Push(deltas) = method_of(&line("push", json!({"deltas": [delta]}))) else {
        panic!()
    };
    let noon = rfc3339::parse("2026-11-24T12:00:00Z").unwrap();
    let expected = LifecycleDelta::failed("d", Operation::Deploy, "why").completed_at(noon);
    assert_eq!(deltas, [expected]);

    let own = json!({"status": {"deployed": false, "deckies": []}});
    let Method::Status(Some(own)) = method_of(&line("status", own)) else { panic!() };
    assert_eq!(own.status(), r#"{"deckies":[],"deployed":false}"#);
    let none = method_of(&line("status", json!({"status": null})));
    assert!(matches!(none, Method::Status(None)));
}

#[test]
fn long_error_is_truncated_once_and_not_for_each_decky() {
    let error = "ä".repeat(limits::PIPE_LINE / 3);
    let params = json!({"handle": 1, "status": "failed", "error": error});
    let line = json!({"jsonrpc": "2.0", "id": 1, "method": "end", "params": params}).to_string();
    let Method::End(End { ended, .. }) = method_of(&line) else { panic!() };
    let Outcome::Failed(error) = ended.outcome else { panic!() };
    assert_eq!((error.chars().count(), error.capacity()), (2_000, 4_000));
}

#[test]
fn deep_nesting_is_no_recursion() {
    let deep = "[".repeat(400_000) + &"]".repeat(400_000);
    let method = |name: &str, params: &str| {
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{name}","params":{params}}}"#)
    };
    assert_eq!(code(&deep).0, -32_600);
    assert_eq!(code(&method("push", &deep)).0, -32_602);
    assert_eq!(code(&method("push", &format!(r#"{{"deltas":{deep}}}"#))).0, -32_602);
    assert_eq!(code(&method("status", &format!(r#"{{"status":{{"a":{deep}}}}}"#))).0, -32_602);
    assert_eq!(code(&format!(r#"{{"jsonrpc":"2.0","id":{deep},"method":"stats"}}"#)).0, -32_600);
    assert_eq!(code(&"[".repeat(1_000_000)).0, -32_700);
}

#[test]
fn id_is_returned_as_it_was_given() {
    for id in ["1.50", "-0", "123456789012345678901234567890", r#""\u00e9""#, "null"] {
        let line = format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"x"}}"#);
        let message = parse(line.as_bytes());
        let answer = answer(&message.id.unwrap(), &Ok(RpcResult::Queued { durable: true }));
        let expected =
            format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{{\"durable\":true}}}}\n");
        assert_eq!(String::from_utf8(answer).unwrap(), expected);
    }
}

#[test]
fn error_of_the_outbox_says_whether_it_is_in_doubt() {
    let error = Error::outbox(None, "its disk has not answered").in_doubt();
    let answer = answer(&Id::null(), &Err(RpcError::outbox(&error)));
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["error"]["code"], -32_000);
    assert_eq!(answer["error"]["data"], json!({"in_doubt": true}));
}

/// Parts of messages, right and wrong, in any order.
fn text() -> impl Strategy<Value = Vec<u8>> {
    let parts = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "\"jsonrpc\":\"2.0\",",
        "\"id\":1,",
        "\"id\":",
        "\"method\":",
        "\"begin\"",
        "\"push\"",
        "\"end\"",
        "\"status\"",
        ",\"params\":",
        "null",
        "\"deltas\":",
        "\"decky_name\":\"d\",",
        "\"operation\":\"deploy\",",
        "\"status\":\"failed\"",
        "\"handle\":",
        "1e5",
        "-",
        "\u{202e}",
        "ä",
        "\r",
        " ",
    ]);
    let part = prop_oneof![
        9 => parts.prop_map(|part| part.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn every_line_gets_an_answer_on_one_line(line in text()) {
        let Message { id, method } = parse(&line);
        let reply = method.map(|_| RpcResult::Empty {});
        if let Some(id) = id {
            let answer = answer(&id, &reply);
            prop_assert_eq!(answer.iter().position(|byte| *byte == b'\n'), Some(answer.len() - 1));
            let json: Value = serde_json::from_slice(&answer).unwrap();
            prop_assert_eq!(&json["jsonrpc"], "2.0");
        }
    }
}
