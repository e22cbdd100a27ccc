//! `push` and `track` as a script on a worker uses them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use decnet_heartbeat::loopback::{LifecycleRow, Role, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Operation};
use rustix::fs::OFlags;
use serde_json::{Value, json};

use crate::support::{
    Fixture, TIMEOUT, deckies, json_of, now, poll_until, program, send_signal, wait_for_file,
    wait_for_stats,
};

/// Runs the program with these arguments. Returns its exit code, its stdout and its stderr.
pub fn output(fixture: &Fixture, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = fixture.command(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

const PUSH_FAILED: [&str; 7] =
    ["push", "--operation", "mutate", "--status", "failed", "--error", "compose exited with 1"];
pub const TRACK: [&str; 6] = ["track", "--operation", "deploy", "--decky", "d", "--"];

pub fn track(fixture: &Fixture, script: &str) -> (Option<i32>, String, String) {
    output(fixture, &[&TRACK[..], &["sh", "-c", script]].concat())
}

/// Starts `track` of a script, and waits until the script prints `ready`. The script's stdin stays
/// open until the child is dropped.
pub fn start_track(fixture: &Fixture, script: &str) -> (Child, BufReader<ChildStdout>) {
    let mut command = fixture.command(&[&TRACK[..], &["sh", "-c", script]].concat());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, stdout)
}

/// A script that creates the FIFO, prints `ready`, waits until [`release`] writes to the FIFO, and
/// then runs `commands`.
pub fn waiting_script(fifo: &str, commands: &str) -> String {
    format!("mkfifo '{fifo}'; echo ready; read line <'{fifo}'; {commands}")
}

/// Lets the script that reads the FIFO continue. Fails, and does not block, if no script reads it.
pub fn release(fifo: impl AsRef<Path>) {
    let mut options = File::options();
    options.write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    poll_until("a reader of the FIFO", || {
        options.open(&fifo).is_ok_and(|mut fifo| fifo.write_all(b"continue\n").is_ok())
    });
}

pub fn rows(fixture: &Fixture) -> Vec<(RowStatus, Option<String>)> {
    fixture
        .master
        .rows()
        .into_iter()
        .map(|LifecycleRow { status, error, .. }| (status, error))
        .collect()
}

/// The oldest row.
pub fn row(fixture: &Fixture) -> (RowStatus, Option<String>) {
    rows(fixture).remove(0)
}

/// The rows of the outbox: the decky, the error, and whether it is in flight.
pub fn queued(fixture: &Fixture) -> Vec<(String, Option<String>, bool)> {
    let database = rusqlite::Connection::open(fixture.outbox()).unwrap();
    let mut select = database
        .prepare("SELECT decky, error, completed_at IS NULL FROM delta ORDER BY id")
        .unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

/// The owners of the rows of the outbox.
pub fn owners(fixture: &Fixture) -> Vec<Option<String>> {
    let database = rusqlite::Connection::open(fixture.outbox()).unwrap();
    let mut select = database.prepare("SELECT owner FROM delta ORDER BY id").unwrap();
    let owners = select.query_map([], |row| row.get(0)).unwrap();
    owners.collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn push_delivers_without_a_status() {
    let fixture = Fixture::new();
    for decky in ["a", "b"] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "mutate");
    }
    let (code, stdout, log) = output(&fixture, &[&PUSH_FAILED[..], &["a", "b", "a"]].concat());
    assert_eq!((code, stdout.as_str(), log.as_str()), (Some(0), "delivered\n", ""));
    for row in fixture.master.rows() {
        assert_eq!(
            (row.status, row.error.as_deref()),
            (RowStatus::Failed, Some("compose exited with 1"))
        );
    }
    let request = fixture.master.received().remove(0);
    assert_eq!(deckies(&request), ["a", "b"], "a duplicate decky has one delta");
    assert_eq!(json_of(&request)["status"], json!({"error": "only deltas"}));
    let observed = json!({"error": "Docker has not been queried yet"});
    let nothing = json!({"topology_id": Value::Null, "applied_version_hash": Value::Null, "applied_at": Value::Null,
                         "last_error": Value::Null, "observed": observed});
    assert_eq!(
        json_of(&request)["topology"],
        nothing,
        "the master would rebuild the topology of a host that does not report it"
    );
    assert!(queued(&fixture).is_empty());
}

#[test]
fn push_leaves_delivery_to_run_during_an_outage() {
    let mut fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.stop();
    let push = ["push", "--operation", "deploy", "--status", "succeeded", "a"];
    let (code, stdout, _) = output(&fixture, &[&push[..], &["--timeout", "300ms"]].concat());
    let expected = format!(
        "kept in {} for decnet-heartbeat run, not delivered: the running agent has not delivered \
         it in time; its log says why\n",
        fixture.outbox().display()
    );
    assert_eq!((code, stdout), (Some(75), expected), "queued, and not delivered in time");
    assert_eq!(queued(&fixture), [("a".to_owned(), None, false)]);
    fixture.master.start_again().unwrap();
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(1);
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
    wait_for_stats(&heartbeat, |stats| stats.waiting == 0);
}

#[test]
fn concurrent_first_pushes_are_all_queued() {
    let mut fixture = Fixture::new();
    fixture.master.stop();
    let names: Vec<_> = (0..16).map(|n| format!("d{n:02}")).collect();
    let push = |name: &String| {
        fixture.command(&["push", "--operation", "deploy", "--status", "succeeded", name])
    };
    let commands: Vec<_> = names.iter().map(push).collect();
    let spawn = |mut command: Command| {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = commands.into_iter().map(spawn).collect();
    for child in children {
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        assert!(
            status.code() == Some(75) && stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&stderr)
        );
    }
    let mut queued: Vec<_> = queued(&fixture).into_iter().map(|(decky, ..)| decky).collect();
    queued.sort();
    assert_eq!(queued, names);
}

#[test]
fn push_logs_dropped_deltas() {
    let mut fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    fixture.master.stop();
    let waiting =
        (0..10_000).map(|n| LifecycleDelta::succeeded(format!("d{n}"), Operation::Mutate));
    heartbeat.deltas().push_all(waiting).unwrap();
    let (code, _, log) = output(&fixture, &[&PUSH_FAILED[..], &["a", "b"]].concat());
    assert!(code == Some(75) && log.ends_with("/heartbeat.db deltas=2 max_rows=10000\n"), "{log}");
    assert!(log.contains("[ERROR] (decnet-outbox) deltas dropped undelivered"), "{log}");
    let queued = queued(&fixture);
    assert_eq!((queued.len(), queued[0].0.as_str(), queued[9_999].0.as_str()), (10_000, "d2", "b"));
}

#[test]
fn push_distinguishes_unknown_host_and_rejected_certificate() {
    let fixture = Fixture::new();
    let push = || output(&fixture, &[&PUSH_FAILED[..], &["d"]].concat());
    let other = fixture.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &other.fingerprint);
    let (code, stdout, _) = push();
    let expected = "the master does not accept this host's certificate (http-403, fingerprint ";
    assert!(
        code == Some(75) && stdout.contains(&format!("{expected}{})", fixture.worker.fingerprint)),
        "{stdout}"
    );
    fixture.master.decommission(&fixture.worker.uuid);
    let (code, stdout, _) = push();
    assert!(
        code == Some(75)
            && stdout.contains("the master does not know this host; enrol it again (http-404): "),
        "{stdout}"
    );
}

#[test]
fn push_reports_a_missing_answer() {
    let mut fixture = Fixture::new();
    fixture.master.stop();
    let (_, stdout, _) = output(&fixture, &[&PUSH_FAILED[..], &["d"]].concat());
    let expected = format!("no answer from {}: refused: ", fixture.master.url());
    assert!(stdout.contains(&expected), "{stdout}");
}

#[test]
fn push_fails_if_it_can_neither_deliver_nor_queue() {
    let mut fixture = Fixture::new();
    let arguments = [
        "push",
        "--operation",
        "deploy",
        "--status",
        "succeeded",
        "--outbox",
        "/nonexistent/db",
        "a",
    ];
    let (code, stdout, log) = output(&fixture, &arguments);
    assert_eq!((code, stdout.as_str()), (Some(0), "delivered\n"), "{log}");
    let keys = format!("host={} master={}", fixture.worker.uuid, fixture.master.url());
    let error = "error=\"outbox /nonexistent/db: cannot be written";
    assert!(log.contains(&format!("outbox cannot be used: {keys} {error}")), "{log}");
    fixture.master.stop();
    let (code, stdout, log) = output(&fixture, &arguments);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(
        log.contains("decnet-heartbeat: outbox in memory: neither delivered nor kept: "),
        "{log}"
    );
}

#[test]
fn invalid_command_line_exits_2_and_names_the_mistake() {
    let fixture = Fixture::new();
    for (arguments, problem) in [
        (&["push", "--operation", "deploy", "--status", "succeeded"][..], "<DECKY>..."),
        (
            &["push", "--operation", "build", "--status", "succeeded", "d"],
            "[possible values: deploy, mutate]",
        ),
        (
            &["push", "--operation", "deploy", "--status", "succeeded", "--error", "e", "d"],
            "--status failed",
        ),
        (&["track", "--operation", "deploy", "--decky", "d"], "<COMMAND>..."),
        (&["track", "--operation", "deploy", "--", "true"], "--decky <NAME>..."),
    ] {
        let (code, _, log) = output(&fixture, arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(log.contains(problem), "{problem} in {log}");
    }
}

/// Colours, a window title, a bell, a C1 control, a change of the text direction, and line ends.
const HOSTILE: &str = "\u{1b}[31mR\u{1b}]0;t\u{7}\u{9b}31m\u{202e}\r\n\u{2028}";

fn assert_escaped(log: &str) {
    let is_safe = |c: char| c == '\n' || !(c.is_control() || matches!(c, '\u{2028}'..='\u{202e}'));
    assert!(log.chars().all(is_safe), "{log:?}");
}

#[test]
fn quoted_parts_of_an_invalid_command_line_are_escaped() {
    let fixture = Fixture::new();
    let push = ["push", "--operation", "deploy", "--status", "succeeded"];
    let long = format!("--x{HOSTILE}");
    let short = format!("-x{HOSTILE}");
    let misspelled = format!("--operatio{HOSTILE}");
    for arguments in [
        &[&push[..], &[&long]].concat()[..],
        &[&push[..], &[&short]].concat(),
        &[&push[..], &[&misspelled]].concat(),
        &[&push[..], &[HOSTILE]].concat(),
        &["push", "--operation", HOSTILE],
        &["push", "--status", HOSTILE],
        &["run", "--interval", HOSTILE],
        &["run", "--interval", &format!("5{HOSTILE}")],
        &["run", HOSTILE],
        &["run", &long],
        &["track", "--operation", "deploy", "--decky", "d", &long],
        &["demo", "--seconds", HOSTILE],
        &["completions", HOSTILE],
        &["--master-identity", HOSTILE, "run"],
        &["--log-level", HOSTILE, "run"],
        &["--agent-dir", HOSTILE, "run"],
        &[HOSTILE],
        &[&format!("run{HOSTILE}")],
        &[&long],
        &[&format!("--log-level=info{HOSTILE}")],
        &["help", HOSTILE],
    ] {
        let (code, _, log) = output(&fixture, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {log}");
        assert_escaped(&log);
    }
    // A tip about a safe argument is printed.
    let (_, _, log) = output(&fixture, &[&push[..], &["--errors"]].concat());
    assert!(log.contains("tip: a similar argument exists: '--error'"), "{log}");
    let (_, _, log) = output(&fixture, &[&push[..], &["--xyz"]].concat());
    assert!(log.contains("tip: to pass '--xyz' as a value, use '-- --xyz'"), "{log}");
}

#[test]
fn track_reports_success_and_passes_on_all_streams() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let mut command =
        fixture.command(&[&TRACK[..], &["sh", "-c", "cat; echo warning >&2"]].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"in and out").unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert_eq!(
        (status.code(), stdout, stderr),
        (Some(0), b"in and out".to_vec(), b"warning\n".to_vec())
    );
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
    assert!(queued(&fixture).is_empty());
}

#[test]
fn track_reports_failure_with_the_tail_of_stderr_and_passes_on_the_exit_code() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let (code, _, log) = track(&fixture, "seq 1 5000 >&2; echo 'no such image' >&2; exit 3");
    assert_eq!(code, Some(3));
    assert_eq!(log.lines().count(), 5_001, "all of stderr is passed on");
    let (status, error) = row(&fixture);
    let error = error.unwrap();
    assert_eq!((status, error.chars().count()), (RowStatus::Failed, 2_000));
    assert!(error.ends_with("4999\n5000\nno such image"), "{error}");
    assert!(
        error.starts_with(|first: char| first.is_ascii_digit()),
        "only output of the command: {error}"
    );
}

#[test]
fn track_reports_a_command_that_cannot_be_run() {
    for (command, code, error) in [
        ("/nonexistent", 127, "/nonexistent cannot be run: No such file or directory (os error 2)"),
        ("/etc/passwd", 126, "/etc/passwd cannot be run: Permission denied (os error 13)"),
    ] {
        let fixture = Fixture::new();
        fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
        let (exit, _, _) = output(&fixture, &[&TRACK[..], &[command]].concat());
        assert_eq!(
            (exit, row(&fixture)),
            (Some(code), (RowStatus::Failed, Some(error.to_owned())))
        );
    }
}

#[test]
fn name_of_a_command_that_cannot_be_run_is_escaped() {
    let fixture = Fixture::new();
    let (code, _, log) = output(&fixture, &[&TRACK[..], &[HOSTILE]].concat());
    assert_eq!(code, Some(127));
    assert_escaped(&log);
    assert!(log.contains("decnet-heartbeat: \\u{1b}[31mR"), "{log}");
}

#[test]
fn signal_is_passed_on_and_the_end_is_reported() {
    let fixture = Fixture::new();
    for _ in 0..2 {
        fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    }
    let (mut child, _stdout) = start_track(&fixture, "echo ready; exec sleep 1000");
    send_signal("TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    // The command's own exit code counts.
    let (mut child, _stdout) = start_track(
        &fixture,
        "trap 'exit 5' USR1; mkfifo \"$0\"; echo ready; read line <>\"$0\""
            .replace("$0", &fifo(&fixture))
            .as_str(),
    );
    send_signal("USR1", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(5));
    let rows = fixture.master.rows();
    let errors: Vec<_> = rows.iter().map(|row| row.error.as_deref().unwrap()).collect();
    assert_eq!(
        errors,
        ["exited with 5", "ended by signal 15"],
        "each report takes the newest open row"
    );
}

pub fn fifo(fixture: &Fixture) -> String {
    fixture.path("fifo").to_str().unwrap().to_owned()
}

#[test]
fn ignored_signal_stays_ignored() {
    let fixture = Fixture::new();
    fixture.write_ini();
    // As under nohup, the parent ignores SIGHUP, and so does the command.
    let script = "trap '' HUP; exec \"$0\" --config \"$1\" track --operation deploy --decky d -- \
                  sh -c 'grep SigIgn /proc/$PPID/status /proc/$$/status'";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_decnet-heartbeat")]).arg(fixture.ini());
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let masks: Vec<_> = output.lines().map(|line| line.rsplit('\t').next().unwrap()).collect();
    assert_eq!(masks.len(), 2, "{output}");
    for mask in masks {
        assert_eq!(u64::from_str_radix(mask, 16).unwrap() & 1, 1, "{output}");
    }
}

#[test]
fn idle_track_restores_a_removed_lock_file() {
    let fixture = Fixture::new();
    let (mut child, stdout) = start_track(&fixture, "echo ready; exec cat");
    let lock = fixture.agent_dir().join("heartbeat.db-lock");
    fs::remove_file(&lock).unwrap();
    // No other process creates it. Without it, another process would report the operation as failed
    // after a minute.
    wait_for_file(&lock);
    drop((child.stdin.take(), stdout));
    assert!(child.wait().unwrap().success());
}

#[test]
fn operation_of_a_killed_track_is_reported_as_failed() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let (mut child, stdout) = start_track(&fixture, "echo ready; exec cat");
    tick.send(now()).unwrap();
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    wait_for_stats(&heartbeat, |stats| stats.operations == 1);
    assert_eq!(fixture.master.rows()[0].status, RowStatus::Running, "its process is running");
    send_signal("KILL", child.id());
    child.wait().unwrap();
    drop(stdout);
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(1);
    assert_eq!(
        row(&fixture),
        (RowStatus::Failed, Some("its process ended during deploy".to_owned()))
    );
}

#[test]
fn running_track_holds_older_deltas_of_a_heartbeat() {
    let mut fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.stop();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "first")).unwrap();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let fifo = fifo(&fixture);
    let (mut child, _stdout) = start_track(&fixture, &waiting_script(&fifo, "exit 0"));
    fixture.master.start_again().unwrap();
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.held == 1 && stats.failure.is_none());
    assert!(fixture.master.rows().iter().all(|row| row.completed_at.is_none()));
    release(fifo);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(2);
    assert_eq!(
        rows(&fixture),
        [(RowStatus::Failed, Some("first".to_owned())), (RowStatus::Succeeded, None)]
    );
}

#[test]
fn overlapping_tracks_close_their_own_rows() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    let [older, newer] = [3, 0].map(|code| {
        fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
        let fifo = format!("{}-{code}", fifo(&fixture));
        let script = waiting_script(&fifo, &format!("exit {code}"));
        (start_track(&fixture, &script), fifo)
    });
    let end = |((child, _stdout), fifo): ((Child, _), String)| {
        release(fifo);
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    };
    let (code, log) = end(older);
    assert_eq!(code, Some(3));
    assert!(
        log.trim_end()
            .ends_with("error=\"a newer operation of the same decky must be delivered first\""),
        "{log}"
    );
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
    assert!(
        fixture.master.rows().iter().all(|row| row.status == RowStatus::Running),
        "{:?}",
        fixture.master.rows()
    );
    assert_eq!(end(newer), (Some(0), String::new()));
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(2);
    assert_eq!(
        rows(&fixture),
        [(RowStatus::Failed, Some("exited with 3".to_owned())), (RowStatus::Succeeded, None)]
    );
}

#[test]
fn report_of_track_does_not_overtake_a_newer_delta() {
    let fixture = Fixture::new();
    let (heartbeat, tick) = fixture.start_heartbeat();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let fifo = fifo(&fixture);
    let (mut child, _stdout) = start_track(&fixture, &waiting_script(&fifo, "exit 0"));
    fixture.fail_one_beat(&heartbeat, &tick);
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "newer")).unwrap();
    release(fifo);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    tick.send(now()).unwrap();
    fixture.wait_for_closed_rows(2);
    assert_eq!(
        rows(&fixture),
        [(RowStatus::Succeeded, None), (RowStatus::Failed, Some("newer".to_owned()))]
    );
}

#[test]
fn command_runs_on_a_host_that_is_not_enrolled() {
    let mut command = program();
    command.args(["--config", "/nonexistent"]).args(TRACK);
    let Output { status, stderr, .. } = command.args(["/bin/sh", "-c", "exit 4"]).output().unwrap();
    assert_eq!(status.code(), Some(4));
    let log = String::from_utf8(stderr).unwrap();
    assert!(
        log.contains("[WARN] (main) the operation is not reported: error=\"not enrolled: "),
        "{log}"
    );
}
