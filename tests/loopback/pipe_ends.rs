//! How `pipe` ends: its agent ends, is killed, or is stopped together with it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::RowStatus;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

use crate::pipe::{often, rarely, rows};
use crate::support::{Agent, ChildProcess, Fixture, TIMEOUT, wait_for_line};

/// Longer than the time in which an agent may resume its operations.
const JUDGED: Duration = Duration::from_secs(5);

#[test]
fn end_of_stdin_reports_open_operations_failed() {
    let fixture = Fixture::new();
    for operation in ["deploy", "mutate"] {
        fixture.master.open_operation(&fixture.worker.uuid, "a", operation);
    }
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.deploy(&["a"]);
    agent.result("begin", json!({"operation": "mutate", "deckies": ["a"]}));
    assert_eq!(agent.close(), Some(0));
    let errors: Vec<_> = rows(&fixture).into_iter().map(|(_, _, error)| error.unwrap()).collect();
    assert_eq!(errors, ["the agent ended during deploy", "the agent ended during mutate"]);
    wait_for_line(
        &agent.log,
        "the agent ended during operations; they are reported failed: rows=2",
    );
}

#[test]
fn queued_deltas_outlast_a_master_that_is_away_at_the_end() {
    let mut fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.deploy(&["a"]);
    fixture.master.stop();
    assert_eq!(agent.close(), Some(0));
    wait_for_line(&agent.log, "stopped with undelivered deltas: ");
    fixture.master.start_again().unwrap();
    assert_eq!(Agent::start(&mut rarely(&fixture)).close(), Some(0));
    assert_eq!(rows(&fixture)[0].2.as_deref(), Some("the agent ended during deploy"));
}

#[test]
fn after_a_signal_stdin_is_read_to_its_end() {
    for signal in ["TERM", "INT"] {
        let fixture = Fixture::new();
        fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
        let mut agent = Agent::start(&mut often(&fixture));
        agent.deploy(&["a"]);
        agent.pipe.signal(signal);
        wait_for_line(&agent.log, &format!("signal=SIG{signal}"));
        let beats = fixture.master.received().len();
        fixture.wait_for_requests(beats + 2);
        let end = json!({"handle": 1, "status": "succeeded"});
        assert_eq!(agent.result("end", end), json!({"durable": true}));
        assert_eq!(agent.close(), Some(0));
        assert_eq!(rows(&fixture)[0].1, RowStatus::Succeeded, "{signal}");
    }
}

#[test]
fn agent_that_stops_only_its_pipe_resumes_its_operations() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut agent = Agent::start(&mut often(&fixture));
    agent.deploy(&["a"]);
    let since = Instant::now();
    agent.pipe.signal("TERM");
    // Its stdin stays open.
    assert_eq!(agent.pipe.wait(TIMEOUT).code(), Some(0));
    assert!(since.elapsed() >= Duration::from_secs(4), "{:?}", since.elapsed());
    resume_and_succeed(&fixture);
}

#[test]
fn second_signal_ends_the_wait_for_the_agent_and_queued_deltas_are_sent() {
    let mut fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "b", "mutate");
    let mut agent = Agent::start(&mut rarely(&fixture));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    fixture.master.stop();
    let delta = json!({"decky_name": "b", "operation": "mutate", "status": "succeeded"});
    agent.result("push", json!({"deltas": [delta]}));
    wait_for_line(&agent.log, "beat failed");
    fixture.master.start_again().unwrap();
    agent.pipe.signal("TERM");
    wait_for_line(&agent.log, "stopping at the end of stdin");
    // Signals that arrive together count as one. No event shows that this time has passed.
    thread::sleep(Duration::from_millis(500));
    agent.pipe.signal("TERM");
    assert_eq!(agent.pipe.wait(TIMEOUT).code(), Some(0));
    assert_eq!(rows(&fixture)[0].1, RowStatus::Succeeded);
}

#[test]
fn killed_pipe_is_resumed() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut agent = Agent::start(&mut often(&fixture));
    agent.deploy(&["a"]);
    agent.pipe.signal("KILL");
    agent.pipe.wait(TIMEOUT);
    resume_and_succeed(&fixture);
}

/// A new `pipe` takes over the deploy of decky a, and reports its success.
fn resume_and_succeed(fixture: &Fixture) {
    let mut agent = Agent::start(&mut often(fixture));
    let begin = json!({"operation": "deploy", "deckies": ["b", "a"], "resume": true});
    let begun = agent.result("begin", begin);
    assert_eq!(begun, json!({"handle": 1, "durable": true, "resumed": ["a"]}));
    let end = json!({"handle": 1, "decky": "a", "status": "succeeded"});
    assert_eq!(agent.result("end", end), json!({"durable": true}));
    fixture.wait_for_closed_rows(1);
    assert_eq!(rows(fixture), [("a".to_owned(), RowStatus::Succeeded, None)]);
    assert_eq!(agent.close(), Some(0));
}

#[test]
fn operations_that_are_not_resumed_are_reported_failed_after_five_seconds() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut agent = Agent::start(&mut rarely(&fixture));
    agent.deploy(&["a"]);
    agent.pipe.signal("KILL");
    agent.pipe.wait(TIMEOUT);
    let since = Instant::now();
    let _agent = Agent::start(&mut often(&fixture));
    fixture.wait_for_closed_rows(1);
    assert!(since.elapsed() >= JUDGED, "{:?}", since.elapsed());
    assert_eq!(rows(&fixture)[0].2.as_deref(), Some("its process ended during deploy"));
}

#[test]
fn signal_to_the_group_ends_agent_and_pipe() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let begin = json!({"operation": "deploy", "deckies": ["a"]});
    let begin = json!({"jsonrpc": "2.0", "id": 1, "method": "begin", "params": begin});
    // The agent is a shell that hangs in its deploy.
    let script = format!("(echo '{begin}'; exec sleep 600) | \"$@\" && echo ended");
    let pipe = often(&fixture);
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, "sh"]).arg(pipe.get_program()).args(pipe.get_args());
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut agent = ChildProcess::start(&mut shell);
    let mut answers = BufReader::new(agent.0.stdout.take().unwrap()).lines();
    assert!(answers.next().unwrap().unwrap().contains(r#""handle":1"#));
    kill_process_group(Pid::from_child(&agent.0), Signal::TERM).unwrap();
    agent.wait(TIMEOUT);
    fixture.wait_for_closed_rows(1);
    assert_eq!(rows(&fixture)[0].2.as_deref(), Some("the agent ended during deploy"));
    assert!(answers.next().is_none(), "the pipe has ended");
}
