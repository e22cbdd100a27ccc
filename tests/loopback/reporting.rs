//! `push` and `track`: the program as a script on a worker uses it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{LifecycleRow, Role, RowStatus};
use decnet_heartbeat::{LifecycleDelta, Operation};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Stage, deckies, json_of, now, settled};

/// The program for the stage's worker, with this command line after the options.
pub fn program(stage: &Stage, arguments: &[&str]) -> Command {
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", "/nonexistent");
    command.arg("--config").arg(ini).args(arguments).stdin(Stdio::null());
    command
}

pub fn output(stage: &Stage, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = program(stage, arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

const PUSH_FAILED: [&str; 7] =
    ["push", "--operation", "mutate", "--status", "failed", "--error", "compose exited with 1"];
pub const TRACK: [&str; 6] = ["track", "--operation", "deploy", "--decky", "d", "--"];

pub fn track(stage: &Stage, script: &str) -> (Option<i32>, String, String) {
    output(stage, &[&TRACK[..], &["sh", "-c", script]].concat())
}

/// `track` of a script that says when it is ready.
pub fn tracking(stage: &Stage, script: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = program(stage, &[&TRACK[..], &["sh", "-c", script]].concat());
    // Its stdin stays open for as long as the child is held.
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

pub fn signal(child: &Child, name: &str) {
    let kill = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}

pub fn rows(stage: &Stage) -> Vec<(RowStatus, Option<String>)> {
    stage
        .master
        .rows()
        .into_iter()
        .map(|LifecycleRow { status, error, .. }| (status, error))
        .collect()
}

/// The first of them.
pub fn row(stage: &Stage) -> (RowStatus, Option<String>) {
    rows(stage).remove(0)
}

pub fn outbox(stage: &Stage) -> PathBuf {
    stage.agent_dir().join("heartbeat.db")
}

/// The rows of the outbox: decky, error, in flight.
pub fn kept(stage: &Stage) -> Vec<(String, Option<String>, bool)> {
    let database = rusqlite::Connection::open(outbox(stage)).unwrap();
    let mut select = database
        .prepare("SELECT decky, error, completed_at IS NULL FROM delta ORDER BY id")
        .unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn push_delivers_now_and_says_nothing_of_what_runs() {
    let stage = Stage::new();
    for decky in ["a", "b"] {
        stage.master.open_operation(&stage.worker.uuid, decky, "mutate");
    }
    let (code, said, log) = output(&stage, &[&PUSH_FAILED[..], &["a", "b", "a"]].concat());
    assert_eq!((code, said.as_str(), log.as_str()), (Some(0), "delivered\n", ""));
    for row in stage.master.rows() {
        assert_eq!(
            (row.status, row.error.as_deref()),
            (RowStatus::Failed, Some("compose exited with 1"))
        );
    }
    let request = stage.master.received().remove(0);
    assert_eq!(deckies(&request), ["a", "b"], "of a decky that is named twice there is one delta");
    assert_eq!(json_of(&request)["status"], json!({"error": "only deltas"}));
    let observed = json!({"error": "Docker has not been queried yet"});
    let nothing = json!({"topology_id": Value::Null, "applied_version_hash": Value::Null, "applied_at": Value::Null,
                         "last_error": Value::Null, "observed": observed});
    assert_eq!(json_of(&request)["topology"], nothing, "leaving it out is not neutral");
    assert!(kept(&stage).is_empty());
}

#[test]
fn push_leaves_to_run_what_the_master_cannot_hear() {
    let mut stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "a", "deploy");
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    let (code, said, _) =
        output(&stage, &["push", "--operation", "deploy", "--status", "succeeded", "a"]);
    let expected =
        format!("kept in {} for decnet-heartbeat run, not delivered: ", outbox(&stage).display());
    assert_eq!(code, Some(75), "kept, and not delivered in time");
    assert!(
        said.starts_with(&expected)
            && said.trim_end().ends_with("Connection refused (os error 111)"),
        "{said}"
    );
    assert_eq!(kept(&stage), [("a".to_owned(), None, false)]);
    stage.master.start_again().unwrap();
    tick.send(now()).unwrap();
    stage.closed_rows(1);
    assert_eq!(row(&stage), (RowStatus::Succeeded, None));
    settled(&heartbeat, |stats| stats.waiting == 0);
}

#[test]
fn many_that_push_at_once_on_a_new_host_are_all_kept() {
    let mut stage = Stage::new();
    stage.master.stop();
    let names: Vec<_> = (0..16).map(|n| format!("d{n:02}")).collect();
    let push = |name: &String| {
        program(&stage, &["push", "--operation", "deploy", "--status", "succeeded", name])
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
    let mut kept: Vec<_> = kept(&stage).into_iter().map(|(decky, ..)| decky).collect();
    kept.sort();
    assert_eq!(kept, names);
}

#[test]
fn push_says_what_it_has_displaced() {
    let mut stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    stage.master.stop();
    let waiting =
        (0..10_000).map(|n| LifecycleDelta::succeeded(format!("d{n}"), Operation::Mutate));
    heartbeat.deltas().push_all(waiting).unwrap();
    let (code, _, log) = output(&stage, &[&PUSH_FAILED[..], &["a", "b"]].concat());
    assert!(code == Some(75) && log.ends_with("/heartbeat.db deltas=2 max_rows=10000\n"), "{log}");
    assert!(log.contains("[ERROR] (decnet-outbox) deltas dropped undelivered"), "{log}");
    let kept = kept(&stage);
    assert_eq!((kept.len(), kept[0].0.as_str(), kept[9_999].0.as_str()), (10_000, "d2", "b"));
}

#[test]
fn push_tells_a_host_that_is_not_known_from_a_certificate_that_is_refused() {
    let stage = Stage::new();
    let push = || output(&stage, &[&PUSH_FAILED[..], &["d"]].concat());
    let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    stage.master.pin(&stage.worker.uuid, &other.fingerprint);
    let (code, said, _) = push();
    let expected = "the master does not accept this host's certificate (http-403, fingerprint ";
    assert!(
        code == Some(75) && said.contains(&format!("{expected}{})", stage.worker.fingerprint)),
        "{said}"
    );
    stage.master.decommission(&stage.worker.uuid);
    let (code, said, _) = push();
    assert!(
        code == Some(75)
            && said.contains("the master does not know this host; enrol it again (http-404): "),
        "{said}"
    );
}

#[test]
fn push_says_that_there_was_no_answer() {
    let mut stage = Stage::new();
    stage.master.stop();
    let (_, said, _) = output(&stage, &[&PUSH_FAILED[..], &["d"]].concat());
    assert!(said.contains(&format!("no answer from {}: refused: ", stage.master.url())), "{said}");
}

#[test]
fn push_is_an_error_when_it_can_neither_deliver_nor_keep() {
    let mut stage = Stage::new();
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
    let (code, said, log) = output(&stage, &arguments);
    assert_eq!((code, said.as_str()), (Some(0), "delivered\n"), "{log}");
    let names = format!("host={} master={}", stage.worker.uuid, stage.master.url());
    let error = "error=\"outbox /nonexistent/db: cannot be written";
    assert!(log.contains(&format!("outbox cannot be used: {names} {error}")), "{log}");
    stage.master.stop();
    let (code, said, log) = output(&stage, &arguments);
    assert_eq!((code, said.as_str()), (Some(1), ""));
    assert!(
        log.contains("decnet-heartbeat: outbox in memory: neither delivered nor kept: "),
        "{log}"
    );
}

#[test]
fn a_wrong_command_line_is_2_and_says_what_is_wrong() {
    let stage = Stage::new();
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
        let (code, _, log) = output(&stage, arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(log.contains(problem), "{problem} in {log}");
    }
}

/// Colours, a title, a bell, C1, bidi, line ends.
const HOSTILE: &str = "\u{1b}[31mR\u{1b}]0;t\u{7}\u{9b}31m\u{202e}\r\n\u{2028}";

fn assert_printable(log: &str) {
    let is_safe = |c: char| c == '\n' || !(c.is_control() || matches!(c, '\u{2028}'..='\u{202e}'));
    assert!(log.chars().all(is_safe), "{log:?}");
}

#[test]
fn whatever_is_quoted_of_a_wrong_command_line_is_safe_to_print() {
    let stage = Stage::new();
    let push = ["push", "--operation", "deploy", "--status", "succeeded"];
    let (long, short, flag) =
        (format!("--x{HOSTILE}"), format!("-x{HOSTILE}"), format!("--operatio{HOSTILE}"));
    for arguments in [
        &[&push[..], &[&long]].concat()[..],
        &[&push[..], &[&short]].concat(),
        &[&push[..], &[&flag]].concat(),
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
        let (code, _, log) = output(&stage, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {log}");
        assert_printable(&log);
    }
    // A tip stays where it can be printed as it is.
    let (_, _, log) = output(&stage, &[&push[..], &["--errors"]].concat());
    assert!(log.contains("tip: a similar argument exists: '--error'"), "{log}");
    let (_, _, log) = output(&stage, &[&push[..], &["--xyz"]].concat());
    assert!(log.contains("tip: to pass '--xyz' as a value, use '-- --xyz'"), "{log}");
}

#[test]
fn track_reports_a_success_and_passes_all_three_streams_through() {
    let stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let mut command =
        program(&stage, &[&TRACK[..], &["sh", "-c", "cat; echo warning >&2"]].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"in and out").unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert_eq!(
        (status.code(), stdout, stderr),
        (Some(0), b"in and out".to_vec(), b"warning\n".to_vec())
    );
    assert_eq!(row(&stage), (RowStatus::Succeeded, None));
    assert!(kept(&stage).is_empty());
}

#[test]
fn track_reports_a_failure_with_the_tail_of_stderr_and_exits_as_the_command_did() {
    let stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let (code, _, log) = track(&stage, "seq 1 5000 >&2; echo 'no such image' >&2; exit 3");
    assert_eq!(code, Some(3));
    assert_eq!(log.lines().count(), 5_001, "all of it passes through");
    let (status, error) = row(&stage);
    let error = error.unwrap();
    assert_eq!((status, error.chars().count()), (RowStatus::Failed, 2_000));
    assert!(error.ends_with("4999\n5000\nno such image"), "{error}");
    assert!(
        error.starts_with(|first: char| first.is_ascii_digit()),
        "what the command wrote, and nothing before it: {error}"
    );
}

#[test]
fn track_reports_a_command_that_cannot_be_run() {
    for (command, code, error) in [
        ("/nonexistent", 127, "/nonexistent cannot be run: No such file or directory (os error 2)"),
        ("/etc/passwd", 126, "/etc/passwd cannot be run: Permission denied (os error 13)"),
    ] {
        let stage = Stage::new();
        stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
        let (exit, _, _) = output(&stage, &[&TRACK[..], &[command]].concat());
        assert_eq!((exit, row(&stage)), (Some(code), (RowStatus::Failed, Some(error.to_owned()))));
    }
}

#[test]
fn a_command_that_cannot_be_run_is_named_safe_to_print() {
    let stage = Stage::new();
    let (code, _, log) = output(&stage, &[&TRACK[..], &[HOSTILE]].concat());
    assert_eq!(code, Some(127));
    assert_printable(&log);
    assert!(log.contains("decnet-heartbeat: \\u{1b}[31mR"), "{log}");
}

#[test]
fn a_signal_passes_through_and_the_end_is_reported() {
    let stage = Stage::new();
    for _ in 0..2 {
        stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    }
    let (mut child, _stdout) = tracking(&stage, "echo ready; exec sleep 1000");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    // A command that ends in its own way is believed.
    let (mut child, _stdout) = tracking(
        &stage,
        "trap 'exit 5' USR1; mkfifo \"$0\"; echo ready; read line <>\"$0\""
            .replace("$0", &fifo(&stage))
            .as_str(),
    );
    signal(&child, "USR1");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    let rows = stage.master.rows();
    let errors: Vec<_> = rows.iter().map(|row| row.error.as_deref().unwrap()).collect();
    assert_eq!(
        errors,
        ["exited with 5", "ended by signal 15"],
        "each report takes the newest open row"
    );
}

pub fn fifo(stage: &Stage) -> String {
    stage.dir.path().join("fifo").to_str().unwrap().to_owned()
}

#[test]
fn an_ignored_signal_stays_ignored() {
    let stage = Stage::new();
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    // As under nohup: whoever starts it ignores SIGHUP, and so does its command.
    let script = "trap '' HUP; exec \"$0\" --config \"$1\" track --operation deploy --decky d -- \
                  sh -c 'grep SigIgn /proc/$PPID/status /proc/$$/status'";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_decnet-heartbeat")]).arg(ini);
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let masks: Vec<_> = output.lines().map(|line| line.rsplit('\t').next().unwrap()).collect();
    assert_eq!(masks.len(), 2, "{output}");
    for mask in masks {
        assert_eq!(u64::from_str_radix(mask, 16).unwrap() & 1, 1, "{output}");
    }
}

#[test]
fn a_track_that_has_nothing_else_to_do_notices_that_its_lock_file_was_removed() {
    let stage = Stage::new();
    let (mut child, stdout) = tracking(&stage, "echo ready; exec cat");
    let lock = outbox(&stage).with_file_name("heartbeat.db-lock");
    fs::remove_file(&lock).unwrap();
    let since = Instant::now();
    // Nobody else is there who would make it.
    while !lock.exists() {
        assert!(
            since.elapsed() < PATIENCE,
            "a minute later its operation would be taken for failed"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    drop((child.stdin.take(), stdout));
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_a_killed_track_was_doing_is_reported_failed_by_a_running_heartbeat() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let (mut child, stdout) = tracking(&stage, "echo ready; exec cat");
    tick.send(now()).unwrap();
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    settled(&heartbeat, |stats| stats.operations == 1);
    assert_eq!(stage.master.rows()[0].status, RowStatus::Running, "it lives");
    signal(&child, "KILL");
    child.wait().unwrap();
    drop(stdout);
    tick.send(now()).unwrap();
    stage.closed_rows(1);
    assert_eq!(
        row(&stage),
        (RowStatus::Failed, Some("its process ended during deploy".to_owned()))
    );
}

#[test]
fn while_track_runs_a_heartbeat_holds_older_deltas_back() {
    let mut stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.stop();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "first")).unwrap();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let fifo = fifo(&stage);
    let (mut child, _stdout) =
        tracking(&stage, &format!("mkfifo '{fifo}'; echo ready; read line <'{fifo}'"));
    stage.master.start_again().unwrap();
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.held == 1 && stats.failure.is_none());
    assert!(stage.master.rows().iter().all(|row| row.completed_at.is_none()));
    std::fs::write(fifo, "go on\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    tick.send(now()).unwrap();
    stage.closed_rows(2);
    assert_eq!(
        rows(&stage),
        [(RowStatus::Failed, Some("first".to_owned())), (RowStatus::Succeeded, None)]
    );
}

#[test]
fn of_two_tracks_that_overlap_each_lands_on_its_own_row_though_the_older_ends_first() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    let [older, newer] = [3, 0].map(|code| {
        stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
        let fifo = format!("{}-{code}", fifo(&stage));
        (
            tracking(
                &stage,
                &format!("mkfifo '{fifo}'; echo ready; read line <'{fifo}'; exit {code}"),
            ),
            fifo,
        )
    });
    let end = |((child, _stdout), fifo): ((Child, _), String)| {
        std::fs::write(fifo, "go on\n").unwrap();
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
    settled(&heartbeat, |stats| stats.held == 1 && stats.beats >= 2);
    assert!(
        stage.master.rows().iter().all(|row| row.status == RowStatus::Running),
        "{:?}",
        stage.master.rows()
    );
    assert_eq!(end(newer), (Some(0), String::new()));
    tick.send(now()).unwrap();
    stage.closed_rows(2);
    assert_eq!(
        rows(&stage),
        [(RowStatus::Failed, Some("exited with 3".to_owned())), (RowStatus::Succeeded, None)]
    );
}

#[test]
fn what_track_reports_does_not_overtake_a_newer_delta_that_waits() {
    let stage = Stage::new();
    let (heartbeat, tick) = stage.beating();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let fifo = fifo(&stage);
    let (mut child, _stdout) =
        tracking(&stage, &format!("mkfifo '{fifo}'; echo ready; read line <'{fifo}'"));
    stage.put_off(&heartbeat, &tick);
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    heartbeat.deltas().push(LifecycleDelta::failed("d", Operation::Deploy, "newer")).unwrap();
    std::fs::write(fifo, "go on\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    tick.send(now()).unwrap();
    stage.closed_rows(2);
    assert_eq!(
        rows(&stage),
        [(RowStatus::Succeeded, None), (RowStatus::Failed, Some("newer".to_owned()))]
    );
}

#[test]
fn a_command_runs_on_a_host_that_is_not_enrolled() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    command.env_clear().env("HOME", "/nonexistent").args(["--config", "/nonexistent"]).args(TRACK);
    let Output { status, stderr, .. } = command.args(["/bin/sh", "-c", "exit 4"]).output().unwrap();
    assert_eq!(status.code(), Some(4));
    let log = String::from_utf8(stderr).unwrap();
    assert!(
        log.contains("[WARN] (main) the operation is not reported: error=\"not enrolled: "),
        "{log}"
    );
}
