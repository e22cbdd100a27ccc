//! `push` and `track` beside a process that delivers: they hand their deltas over to it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Fault, RowStatus};
use serde_json::{Value, json};

use crate::push_and_track::{TRACK, owners, queued, row, start_track};
use crate::support::{
    ChildProcess, Fixture, TIMEOUT, deckies, json_of, poll_until, program, wait_for_line,
};

const PUSH: [&str; 6] = ["push", "--operation", "deploy", "--status", "succeeded", "d"];

fn socket(fixture: &Fixture) -> PathBuf {
    fixture.agent_dir().join("heartbeat.db-wake")
}

fn is_socket(path: &PathBuf) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// The program beside `run`. It does not write the ini again, because `run` would reload it.
fn beside(fixture: &Fixture, arguments: &[&str]) -> Command {
    let mut command = program();
    command.env("PATH", std::env::var_os("PATH").unwrap()).stdin(Stdio::null());
    command.arg("--config").arg(fixture.ini()).args(arguments);
    command
}

/// Its exit code, its stdout and its stderr.
fn output(fixture: &Fixture, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = beside(fixture, arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// Starts `run` with this interval. Returns after its first beat, when it listens.
pub fn start_run(fixture: &Fixture, interval: &str) -> ChildProcess {
    let mut command = fixture.run_command();
    command.args(["--interval", interval]).stdout(Stdio::null()).stderr(Stdio::null());
    let running = ChildProcess::start(&mut command);
    fixture.wait_for_requests(1);
    poll_until("the wake socket", || is_socket(&socket(fixture)));
    running
}

fn open_rows(fixture: &Fixture, count: usize) {
    (0..count).for_each(|_| {
        fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    });
}

#[test]
fn push_beside_run_is_sent_on_its_connection_with_the_whole_status() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let _run = start_run(&fixture, "1h");
    let (code, stdout, log) = output(&fixture, &PUSH);
    assert_eq!((code, stdout.as_str(), log.as_str()), (Some(0), "delivered\n", ""));
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
    let requests = fixture.master.received();
    assert_eq!(requests.len(), 2, "the first beat, and one with the delta");
    assert_eq!(deckies(&requests[1]), ["d"]);
    assert_ne!(json_of(&requests[1])["status"], json!({"error": "only deltas"}));
    assert_eq!(fixture.master.connections().len(), 1, "the connection is that of run");
    assert!(queued(&fixture).is_empty());
}

#[test]
fn track_beside_run_is_sent_on_its_connection() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let _run = start_run(&fixture, "1h");
    let script = "echo no space left >&2; exit 3";
    assert_eq!(output(&fixture, &[&TRACK[..], &["sh", "-c", script]].concat()).0, Some(3));
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("no space left".to_owned())));
    assert_eq!(fixture.master.connections().len(), 1);
    assert!(queued(&fixture).is_empty());
}

#[test]
fn no_wait_wakes_run() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let _run = start_run(&fixture, "1h");
    assert_eq!(output(&fixture, &[&PUSH[..], &["--no-wait"]].concat()).0, Some(0));
    fixture.wait_for_closed_rows(1);
}

#[test]
fn push_posts_itself_after_run_was_killed() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let mut run = start_run(&fixture, "1h");
    run.signal("KILL");
    run.wait(TIMEOUT);
    assert!(is_socket(&socket(&fixture)), "it is stale");
    assert_eq!(output(&fixture, &PUSH).1, "delivered\n");
    let requests = fixture.master.received();
    assert_eq!(json_of(&requests[1])["status"], json!({"error": "only deltas"}));
    // The next process that delivers replaces it.
    let mut run = start_run(&fixture, "1h");
    poll_until("a listener", || UnixDatagram::unbound().unwrap().connect(socket(&fixture)).is_ok());
    assert_eq!(run.terminate(TIMEOUT), Some(0));
    assert!(!socket(&fixture).exists(), "a stop removes it");
}

#[test]
fn outbox_path_longer_than_that_of_a_socket_works() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let folder = fixture.path("d".repeat(100)).join("e".repeat(100));
    fs::create_dir_all(&folder).unwrap();
    let outbox = folder.join("heartbeat.db");
    let mut command = fixture.run_command();
    command.args(["--interval", "1h", "--outbox"]).arg(&outbox);
    let _run = ChildProcess::start(command.stderr(Stdio::null()));
    poll_until("the wake socket", || is_socket(&folder.join("heartbeat.db-wake")));
    fixture.wait_for_requests(1);
    let outbox = outbox.to_str().unwrap();
    assert_eq!(output(&fixture, &[&PUSH[..], &["--outbox", outbox]].concat()).1, "delivered\n");
    assert_eq!(fixture.master.connections().len(), 1);
}

#[test]
fn push_gives_up_after_its_timeout_and_leaves_the_delta_to_a_suspended_run() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let run = start_run(&fixture, "1h");
    run.signal("STOP");
    let since = Instant::now();
    let (code, stdout, _) = output(&fixture, &[&PUSH[..], &["--timeout", "300ms"]].concat());
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(code, Some(75));
    assert!(stdout.contains("not delivered: the running agent has not"), "{stdout}");
    assert_eq!(owners(&fixture), [None]);
    run.signal("CONT");
    fixture.wait_for_closed_rows(1);
}

#[test]
fn push_claims_its_delta_if_run_is_killed_meanwhile() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let mut run = start_run(&fixture, "1h");
    run.signal("STOP");
    let mut command = beside(&fixture, &[&PUSH[..], &["--timeout", "30s"]].concat());
    let mut push = ChildProcess::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    poll_until("the row", || fixture.outbox().exists() && !queued(&fixture).is_empty());
    push.assert_is_running();
    run.signal("KILL");
    run.wait(TIMEOUT);
    assert_eq!(push.wait(TIMEOUT).code(), Some(0));
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
    assert!(queued(&fixture).is_empty());
}

#[test]
fn delta_that_the_master_rejects_is_an_error_of_push() {
    let fixture = Fixture::new();
    let _run = start_run(&fixture, "1h");
    let answer = Answer::status(422).body("invalid delta");
    fixture.master.always(Some(Fault::AnswerTo(b"\"bad".to_vec(), answer)));
    let push = ["push", "--operation", "deploy", "--status", "succeeded", "bad"];
    let (code, stdout, log) = output(&fixture, &push);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{log}");
    assert!(log.contains("the master rejected it: http-422: invalid delta"), "{log}");
}

#[test]
fn push_does_not_wait_for_a_delta_that_a_newer_operation_holds() {
    let fixture = Fixture::new();
    let run = start_run(&fixture, "1h");
    run.signal("STOP");
    let mut command = beside(&fixture, &[&PUSH[..], &["--timeout", "30s"]].concat());
    let push = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    poll_until("the row", || fixture.outbox().exists() && !queued(&fixture).is_empty());
    let (mut track, _stdout) = start_track(&fixture, "echo ready; read line");
    let pushed = push.wait_with_output().unwrap();
    let stdout = String::from_utf8(pushed.stdout).unwrap();
    assert_eq!(pushed.status.code(), Some(75));
    assert!(stdout.contains("a newer operation of the same decky"), "{stdout}");
    run.signal("CONT");
    drop(track.stdin.take());
    track.wait().unwrap();
}

#[test]
fn removed_socket_is_bound_again_at_the_next_tick() {
    let fixture = Fixture::new();
    let _run = start_run(&fixture, "200ms");
    fs::remove_file(socket(&fixture)).unwrap();
    poll_until("the wake socket", || is_socket(&socket(&fixture)));
    let mode = fs::symlink_metadata(socket(&fixture)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn another_file_in_place_of_the_socket_is_left_alone_and_push_posts_itself() {
    let fixture = Fixture::new();
    fs::write(socket(&fixture), "theirs").unwrap();
    let mut command = fixture.run_command();
    let mut run = ChildProcess::start(command.args(["--interval", "1h"]));
    let lines = run.stderr_lines();
    wait_for_line(&lines, "no wake socket; push and track post");
    fixture.wait_for_requests(1);
    assert_eq!(output(&fixture, &PUSH).1, "delivered\n");
    assert_eq!(fs::read(socket(&fixture)).unwrap(), b"theirs");
    assert_eq!(fixture.master.connections().len(), 2);
}

/// How often the outbox thread has slept. `None`: there is no such thread.
fn outbox_thread_switches(process: &ChildProcess) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).ok()?;
    let mut statuses =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let status = statuses.find(|status| status.contains("decnet-outbox"))?;
    let field = |line: &str| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok();
    status.lines().find_map(field)
}

#[test]
fn push_that_waits_long_reads_less_often() {
    let fixture = Fixture::new();
    let run = start_run(&fixture, "1h");
    run.signal("STOP");
    let mut command = beside(&fixture, &[&PUSH[..], &["--timeout", "2s"]].concat());
    let mut push = ChildProcess::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let mut switches = 0;
    poll_until("the end of push", || {
        switches = outbox_thread_switches(&push).unwrap_or(switches);
        push.0.try_wait().unwrap().is_some()
    });
    // Every 2 ms would be 1,000 reads.
    assert!((20..500).contains(&switches), "{switches}");
}

#[test]
fn flood_of_datagrams_causes_no_beat_and_few_wake_ups() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let run = start_run(&fixture, "1h");
    let before = outbox_thread_switches(&run).unwrap();
    let flooder = UnixDatagram::unbound().unwrap();
    flooder.connect(socket(&fixture)).unwrap();
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(1) {
        flooder.send(&[7; 1_000]).unwrap();
    }
    assert_eq!(output(&fixture, &PUSH).1, "delivered\n");
    assert_eq!(fixture.master.received().len(), 2);
    // It is woken every 5 ms at most, and each wake-up has a few switches.
    let woken = outbox_thread_switches(&run).unwrap() - before;
    assert!(woken < 1_000, "{woken}");
}

#[test]
#[ignore = "needs strace"]
fn push_beside_run_syncs_at_most_twice() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let _run = start_run(&fixture, "1h");
    let trace = fixture.path("trace");
    let push = beside(&fixture, &PUSH);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=fsync,fdatasync", "-o"]).arg(&trace);
    strace.arg(push.get_program()).args(push.get_args()).env_clear().stderr(Stdio::null());
    let traced = strace.output().unwrap();
    assert_eq!(String::from_utf8(traced.stdout).unwrap(), "delivered\n");
    let trace = fs::read_to_string(trace).unwrap();
    let syncs = trace.lines().filter(|line| line.contains("sync(")).count();
    assert!((1..=2).contains(&syncs), "{trace}");
}

/// Runs `push` with these options and this text as its stdin.
fn push_lines(fixture: &Fixture, options: &[&str], text: &str) -> (Option<i32>, String, String) {
    let mut command = beside(fixture, &[&["push", "--lines"], options].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut push = command.spawn().unwrap();
    // An error means that it has ended: it reads nothing after a wrong line.
    let _ = push.stdin.take().unwrap().write_all(text.as_bytes());
    let Output { status, stdout, stderr } = push.wait_with_output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn lines_are_delivered_together_with_their_times() {
    let fixture = Fixture::new();
    fixture.write_ini();
    let lines = concat!(
        r#"{"decky_name":"a","operation":"deploy","status":"succeeded"}"#,
        "\n",
        r#"{"decky_name":"b","operation":"mutate","status":"failed","error":"no","#,
        r#""completed_at":"2026-01-02T03:04:05+01:00"}"#,
    );
    let expected = |result: &str| json!({"result": result, "deltas": 2, "outbox": fixture.outbox(), "reason": null});
    let (code, stdout, log) = push_lines(&fixture, &["--json"], lines);
    assert_eq!((code, log.as_str()), (Some(0), ""));
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), expected("delivered"));
    let requests = fixture.master.received();
    assert_eq!(requests.len(), 1);
    assert_eq!(deckies(&requests[0]).len(), 2);
    let sent = json_of(&requests[0])["lifecycle"].to_string();
    assert!(sent.contains("2026-01-02T02:04:05"), "{sent}");

    let _run = start_run(&fixture, "1h");
    let (_, stdout, _) = push_lines(&fixture, &["--json"], lines);
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), expected("delivered"));
    // The first beat of run may be later than the push.
    let beats = fixture.master.received();
    assert!(beats.iter().skip(1).any(|beat| deckies(beat).len() == 2));
}

#[test]
fn wrong_line_is_named_and_nothing_is_reported() {
    let fixture = Fixture::new();
    fixture.write_ini();
    let lines =
        concat!(r#"{"decky_name":"a","operation":"deploy","status":"succeeded"}"#, "\n{\u{1b}\n");
    let (code, stdout, log) = push_lines(&fixture, &[], lines);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(log.contains("stdin: line 2: ") && !log.contains('\u{1b}'), "{log}");
    assert!(fixture.master.received().is_empty() && !fixture.outbox().exists());
    let (code, _, log) = push_lines(&fixture, &["--operation", "deploy"], "");
    assert_eq!(code, Some(2), "{log}");
    assert_eq!(output(&fixture, &["push", "d"]).0, Some(2), "without --operation and --status");
}

#[test]
fn json_has_the_reason_of_an_undelivered_delta() {
    let mut fixture = Fixture::new();
    fixture.write_ini();
    fixture.master.stop();
    let time = ["--completed-at", "2026-01-02T03:04:05Z", "--json"];
    let (code, stdout, _) = output(&fixture, &[&PUSH[..], &time].concat());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &result["result"]), (Some(75), &json!("undelivered")));
    assert!(result["reason"].as_str().unwrap().contains("Connection refused"), "{stdout}");
    assert_eq!(output(&fixture, &[&PUSH[..], &["--completed-at", "now"]].concat()).0, Some(2));
}

#[test]
fn variable_names_the_outbox_of_run_and_push() {
    let fixture = Fixture::new();
    open_rows(&fixture, 1);
    let outbox = fixture.path("other.db");
    let mut run = fixture.run_command();
    run.args(["--interval", "1h"]).env("DECNET_HEARTBEAT_OUTBOX", &outbox);
    let _run = ChildProcess::start(run.stderr(Stdio::null()));
    poll_until("the wake socket", || is_socket(&fixture.path("other.db-wake")));
    let mut push = beside(&fixture, &PUSH);
    let pushed = push.env("DECNET_HEARTBEAT_OUTBOX", &outbox).output().unwrap();
    assert_eq!(pushed.stdout, b"delivered\n");
    assert_eq!(fixture.master.connections().len(), 1);
    assert!(!fixture.outbox().exists());
}

#[test]
fn check_names_the_other_outbox_of_a_running_agent() {
    let fixture = Fixture::new();
    let check = |outbox: Option<PathBuf>, stats: Option<PathBuf>| {
        let mut command = beside(&fixture, &["check"]);
        command.args(stats.map(|stats| format!("--stats-file={}", stats.display())));
        command.envs(outbox.map(|outbox| ("DECNET_HEARTBEAT_OUTBOX", outbox)));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let run = start_run(&fixture, "1h");
    let other = fixture.path("other.db");
    let advice = format!("the running agent (process {}) delivers from ", run.id());
    assert!(!check(None, None).contains(&advice));
    let text = check(Some(other.clone()), None);
    let expected = format!(
        "{advice}{}, but push and track with these settings would use {}",
        fixture.outbox().display(),
        other.display()
    );
    assert!(text.contains(&expected), "{text}");
    drop(run);
    // The stats file names an outbox that nothing else does.
    let stats = fixture.path("stats");
    let mut command = fixture.run_command();
    command.arg("--outbox").arg(&other).arg("--stats-file").arg(&stats);
    let run = ChildProcess::start(command.stderr(Stdio::null()));
    poll_until("the stats", || stats.exists());
    let text = check(None, Some(stats.clone()));
    assert!(
        text.contains(&format!("(process {}) delivers from {}", run.id(), other.display())),
        "{text}"
    );
}
