//! `pipe`: what an agent in another language asks for, and what the master gets.

use std::process::Command;
use std::time::Duration;

use decnet_heartbeat::loopback::RowStatus;
use serde_json::{Value, json};

use crate::support::{Agent, Fixture, TIMEOUT, json_of, program, wait_for_line};

/// `pipe` with a beat every 50 ms.
pub fn often(fixture: &Fixture) -> Command {
    let mut command = fixture.pipe_command();
    command.args(["--interval", "50ms"]);
    command
}

/// `pipe` whose next beat is due in an hour.
pub fn rarely(fixture: &Fixture) -> Command {
    let mut command = fixture.pipe_command();
    command.args(["--interval", "1h"]);
    command
}

/// The status and the error of each of the master's rows.
pub fn rows(fixture: &Fixture) -> Vec<(String, RowStatus, Option<String>)> {
    let rows = fixture.master.rows().into_iter();
    rows.map(|row| (row.decky, row.status, row.error)).collect()
}

fn row(decky: &str, status: RowStatus, error: Option<&str>) -> (String, RowStatus, Option<String>) {
    (decky.to_owned(), status, error.map(str::to_owned))
}

fn delta(decky: &str) -> Value {
    json!({"decky_name": decky, "operation": "mutate", "status": "succeeded"})
}

#[test]
fn operation_ends_decky_by_decky_by_its_handle() {
    let fixture = Fixture::new();
    for decky in ["a", "b", "c"] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "deploy");
    }
    let mut agent = Agent::start(&mut rarely(&fixture));
    let begun = agent.deploy(&["b", "a", "c", "b"]);
    assert_eq!(begun, json!({"handle": 1, "durable": true, "resumed": []}));
    let one = json!({"handle": 1, "decky": "a", "status": "succeeded"});
    assert_eq!(agent.result("end", one.clone()), json!({"durable": true}));
    fixture.wait_for_closed_rows(1);
    let again = agent.ask("end", one)["error"].clone();
    assert_eq!(again["code"], -32_602);
    assert_eq!(again["message"], r#"decky: "a" is not open in this deploy"#);
    let rest = json!({"handle": 1, "status": "failed", "error": "no space left"});
    assert_eq!(agent.result("end", rest.clone()), json!({"durable": true}));
    fixture.wait_for_closed_rows(3);
    let expected = [
        row("a", RowStatus::Succeeded, None),
        row("b", RowStatus::Failed, Some("no space left")),
        row("c", RowStatus::Failed, Some("no space left")),
    ];
    assert_eq!(rows(&fixture), expected);
    assert_eq!(agent.ask("end", rest)["error"]["message"], "handle: 1 is not open");
    assert_eq!(agent.deploy(&["a"])["handle"], 2);
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn pushed_deltas_reach_the_master_at_once() {
    let fixture = Fixture::new();
    for decky in ["a", "b"] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "mutate");
    }
    let mut agent = Agent::start(&mut rarely(&fixture));
    let failed = json!({"decky_name": "b", "operation": "mutate", "status": "failed",
        "error": null, "completed_at": "2026-11-24T13:00:00.5+01:00"});
    let pushed = agent.result("push", json!({"deltas": [delta("a"), failed]}));
    assert_eq!(pushed, json!({"durable": true}));
    fixture.wait_for_closed_rows(2);
    assert_eq!(rows(&fixture)[1], row("b", RowStatus::Failed, Some("no reason given")));
    let sent =
        fixture.master.received().into_iter().find(|beat| !json_of(beat)["lifecycle"].is_null());
    let sent = json_of(&sent.unwrap())["lifecycle"][0].clone();
    assert!(sent["completed_at"].as_str().unwrap().starts_with("2026-11-24T12:00:00.5"), "{sent}");
    assert_eq!(agent.result("push", json!({"deltas": []})), json!({"durable": true}));
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn own_status_replaces_that_of_decnet_and_null_returns_to_it() {
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut often(&fixture));
    let has_status = |status: &Value| {
        let from = fixture.master.received().len();
        let is_sent = |seen: &decnet_heartbeat::loopback::Seen| {
            seen.received().iter().skip(from).any(|beat| json_of(beat)["status"] == *status)
        };
        assert!(fixture.master.wait_until(TIMEOUT, is_sent), "{status}");
    };
    let decnet = json!({"deployed": false, "deckies": []});
    has_status(&decnet);
    let own = json!({"deployed": true, "mode": "swarm", "deckies": [], "runtime": {}});
    assert_eq!(agent.result("status", json!({"status": own})), json!({}));
    has_status(&own);
    let wrong = agent.ask("status", json!({"status": {"deckies": 1}}))["error"].clone();
    assert_eq!(wrong["code"], -32_602);
    assert!(wrong["message"].as_str().unwrap().contains("deckies is not a list"), "{wrong}");
    has_status(&own);
    assert_eq!(agent.result("status", json!({"status": null})), json!({}));
    has_status(&decnet);
    // The topology is DECNET's in every beat.
    for beat in fixture.master.received() {
        assert_eq!(json_of(&beat)["topology"]["topology_id"], Value::Null);
        assert!(json_of(&beat)["topology"]["observed"]["error"].is_string());
    }
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn stats_have_the_keys_of_the_stats_file() {
    let fixture = Fixture::new();
    let file = fixture.dir.path().join("stats.json");
    let mut agent = Agent::start(often(&fixture).arg("--stats-file").arg(&file));
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    agent.deploy(&["a"]);
    let stats = agent.result("stats", Value::Null);
    assert_eq!((&stats["operations"], &stats["dormant"]), (&json!(1), &json!(false)));
    assert_eq!(stats["host_uuid"], fixture.worker.uuid);
    assert_eq!(agent.close(), Some(0));
    let in_file: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let keys = |json: &Value| json.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&stats), keys(&in_file));
}

#[test]
fn wrong_lines_are_answered_and_the_next_one_is_read() {
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut rarely(&fixture));
    let long = vec![b'x'; 3 << 20];
    let deep = "[".repeat(500_000);
    let deep_params = format!(
        r#"{{"jsonrpc":"2.0","id":5,"method":"push","params":{{"deltas":{}{}}}}}"#,
        "[".repeat(400_000),
        "]".repeat(400_000)
    );
    for (line, code, id) in [
        (&b"{\"jsonrpc\""[..], -32_700, Value::Null),
        (b"\0\xff\xfe\x1b[31m", -32_700, Value::Null),
        (&long, -32_700, Value::Null),
        (deep.as_bytes(), -32_700, Value::Null),
        (deep_params.as_bytes(), -32_602, json!(5)),
        (br#"[{"jsonrpc":"2.0","id":1,"method":"stats"}]"#, -32_600, Value::Null),
        (br#"{"jsonrpc":"2.0","id":6,"method":"quit"}"#, -32_601, json!(6)),
    ] {
        agent.write(&[line, b"\r\n\n \n"].concat());
        let answer = agent.answer();
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(code), &id), "{answer}");
        assert_eq!(agent.result("push", json!({"deltas": [delta("a")]})), json!({"durable": true}));
    }
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn endless_line_is_answered_and_takes_bounded_memory() {
    let fixture = Fixture::new();
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.result("stats", Value::Null);
    let before = agent.peak_memory();
    let piece = vec![b'['; 1 << 20];
    (0..2).for_each(|_| agent.write(&piece));
    assert_eq!(agent.answer()["error"]["code"], -32_700);
    (0..62).for_each(|_| agent.write(&piece));
    agent.write(b"\n");
    agent.result("stats", Value::Null);
    let grown = agent.peak_memory() - before;
    assert!(grown < 8 * 1024, "{grown} KiB");
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn last_line_needs_no_line_end_and_half_a_line_does_nothing() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "mutate");
    fixture.master.open_operation(&fixture.worker.uuid, "b", "mutate");
    let line = |decky: &str| {
        let params = json!({"deltas": [delta(decky)]});
        json!({"jsonrpc": "2.0", "id": 1, "method": "push", "params": params}).to_string()
    };
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.write(line("a").as_bytes());
    assert_eq!(agent.close(), Some(0));
    assert_eq!(agent.answer()["result"], json!({"durable": true}));
    let mut agent = Agent::start(&mut rarely(&fixture));
    let half = line("b");
    agent.write(&half.as_bytes()[..half.len() - 1]);
    assert_eq!(agent.close(), Some(0));
    assert_eq!(agent.answer()["error"]["code"], -32_700);
    let statuses: Vec<_> = rows(&fixture).into_iter().map(|(_, status, _)| status).collect();
    assert_eq!(statuses, [RowStatus::Succeeded, RowStatus::Running]);
}

#[test]
fn notifications_are_done_and_not_answered() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "mutate");
    let mut agent = Agent::start(&mut rarely(&fixture));
    let notify = |agent: &mut Agent, method: &str, params: Value| {
        let line = json!({"jsonrpc": "2.0", "method": method, "params": params});
        agent.write(format!("{line}\n").as_bytes());
    };
    notify(&mut agent, "push", json!({"deltas": [delta("a")]}));
    notify(&mut agent, "push", json!({"deltas": [delta("")]}));
    notify(&mut agent, "quit", Value::Null);
    notify(&mut agent, "begin", json!({"operation": "deploy", "deckies": ["a"]}));
    // Its answer is the next one.
    let stats = agent.result("stats", Value::Null);
    assert_eq!(stats["operations"], 0);
    fixture.wait_for_closed_rows(1);
    wait_for_line(
        &agent.log,
        "notification refused: times=1 error=\"deltas[0]: decky name: is empty",
    );
    wait_for_line(&agent.log, "unknown method \\\"quit\\\"");
    wait_for_line(&agent.log, "begin needs an id");
    assert!(!agent.has_answer(Duration::from_millis(50)));
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn host_that_is_not_enrolled_exits_78() {
    let output = program().args(["--config", "/nonexistent/decnet.ini", "pipe"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("not enrolled") && output.stdout.is_empty(), "{text}");
}
