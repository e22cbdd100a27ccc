//! `push`: its exit codes, its timeout, and what it leaves to `run`.

use std::fs::OpenOptions;
use std::process::Stdio;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Effect, Fault, RowStatus};

use crate::push_and_track::{output, owners, queued, row};
use crate::support::{ChildProcess, Fixture, TIMEOUT, in_shell_after, wait_for_stats};

const PUSH: [&str; 5] = ["push", "--operation", "deploy", "--status", "succeeded"];

fn push(fixture: &Fixture, options: &[&str]) -> (Option<i32>, String, String) {
    output(fixture, &[&PUSH[..], options, &["d"]].concat())
}

#[test]
fn no_wait_queues_without_a_post_and_leaves_delivery_to_run() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let (code, stdout, log) = push(&fixture, &["--no-wait"]);
    let expected = format!("kept in {} for decnet-heartbeat run\n", fixture.outbox().display());
    assert_eq!((code, stdout, log.as_str()), (Some(0), expected, ""));
    assert!(fixture.master.connections().is_empty(), "{:?}", fixture.master.connections());
    assert_eq!(
        (queued(&fixture), owners(&fixture)),
        (vec![("d".to_owned(), None, false)], vec![None])
    );
    let (_heartbeat, _tick) = fixture.start_heartbeat();
    fixture.wait_for_closed_rows(1);
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
}

#[test]
fn no_wait_fails_if_the_outbox_has_no_file() {
    let fixture = Fixture::new();
    let (code, stdout, log) = push(&fixture, &["--no-wait", "--outbox", "/nonexistent/db"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(log.contains("neither delivered nor kept: the outbox is only in memory"), "{log}");
    assert!(fixture.master.connections().is_empty());
}

#[test]
fn truncated_index_does_not_end_run_or_lose_a_delta() {
    let fixture = Fixture::new();
    fixture.master.always(Some(Answer::status(503).into()));
    let mut run = fixture.run_command();
    run.args(["--interval", "100ms"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut running = ChildProcess::start(&mut run);
    fixture.wait_for_requests(1);
    assert_eq!(push(&fixture, &["--no-wait"]).0, Some(0));
    // The push has woken `run`, which must not read the index at the moment of the truncation.
    fixture.wait_for_more_requests(1);
    let index = fixture.agent_dir().join("heartbeat.db-shm");
    OpenOptions::new().write(true).truncate(true).open(&index).unwrap();
    fixture.wait_for_more_requests(3);
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    fixture.master.always(None);
    fixture.wait_for_closed_rows(1);
    assert_eq!(running.terminate(TIMEOUT), Some(0));
}

#[test]
fn timeout_limits_push_to_a_master_that_does_not_answer() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    let since = Instant::now();
    let (code, stdout, _) = push(&fixture, &["--timeout", "300ms"]);
    let took = since.elapsed();
    assert_eq!(code, Some(75), "{stdout}");
    assert!((Duration::from_millis(300)..Duration::from_secs(3)).contains(&took), "{took:?}");
    assert!(
        stdout.contains("not delivered: no answer from ") && stdout.contains("timeout"),
        "{stdout}"
    );
    assert_eq!(owners(&fixture), [None], "run may deliver it");
    fixture.master.always(None);
    let (heartbeat, _tick) = fixture.start_heartbeat();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
}

#[test]
fn push_waits_up_to_its_timeout() {
    let fixture = Fixture::new();
    fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    let since = Instant::now();
    let (code, stdout, _) = push(&fixture, &["--timeout", "6s"]);
    assert_eq!(code, Some(75), "{stdout}");
    // The default limit of a POST is shorter.
    assert!(since.elapsed() >= Duration::from_secs(6), "{:?}", since.elapsed());
}

#[test]
fn timeout_out_of_range_or_with_no_wait_exits_2() {
    let fixture = Fixture::new();
    let track = |options: &[&str]| {
        output(
            &fixture,
            &[&["track", "--operation", "deploy", "--decky", "d"], options, &["--", "true"]]
                .concat(),
        )
    };
    for timeout in ["0s", "999us", "2h", "3601s", "x", ""] {
        for (code, _, log) in
            [push(&fixture, &["--timeout", timeout]), track(&["--timeout", timeout])]
        {
            assert_eq!(code, Some(2), "{timeout}: {log}");
            assert!(log.contains("--timeout"), "{log}");
        }
    }
    let both = ["--no-wait", "--timeout", "1s"];
    for (code, _, log) in [push(&fixture, &both), track(&both)] {
        assert_eq!(code, Some(2), "{log}");
    }
    for timeout in ["1ms", "1h"] {
        assert_ne!(push(&fixture, &["--timeout", timeout]).0, Some(2));
    }
}

#[test]
fn push_delivers_without_threads() {
    let fixture = Fixture::new();
    let mut command = fixture.command(&[&PUSH[..], &["d"]].concat());
    // A stack size that no thread can have.
    let output = command.env("RUST_MIN_STACK", "70368744177664").output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"delivered\n".to_vec()));
}

#[test]
fn file_size_limit_does_not_end_push() {
    let fixture = Fixture::new();
    let inner = fixture.command(&[&PUSH[..], &["d"]].concat());
    let mut command = in_shell_after("ulimit -f 0", &inner);
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"delivered\n".to_vec()));
}
