//! `push`: its exit codes, its timeout, and what it leaves to `run`.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Answer, Effect, Fault, RowStatus};

use crate::program::run;
use crate::reporting::{kept, outbox, output, program, row};
use crate::support::{PATIENCE, Running, Stage, settled};
use crate::track::owners;

const PUSH: [&str; 5] = ["push", "--operation", "deploy", "--status", "succeeded"];

fn push(stage: &Stage, options: &[&str]) -> (Option<i32>, String, String) {
    output(stage, &[&PUSH[..], options, &["d"]].concat())
}

#[test]
fn no_wait_queues_without_a_post_and_leaves_delivery_to_run() {
    let stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    let (code, said, log) = push(&stage, &["--no-wait"]);
    let expected = format!("kept in {} for decnet-heartbeat run\n", outbox(&stage).display());
    assert_eq!((code, said, log.as_str()), (Some(0), expected, ""));
    assert!(stage.master.connections().is_empty(), "{:?}", stage.master.connections());
    assert_eq!((kept(&stage), owners(&stage)), (vec![("d".to_owned(), None, false)], vec![None]));
    let (_heartbeat, _tick) = stage.beating();
    stage.closed_rows(1);
    assert_eq!(row(&stage), (RowStatus::Succeeded, None));
}

#[test]
fn no_wait_fails_if_the_outbox_has_no_file() {
    let stage = Stage::new();
    let (code, said, log) = push(&stage, &["--no-wait", "--outbox", "/nonexistent/db"]);
    assert_eq!((code, said.as_str()), (Some(1), ""));
    assert!(log.contains("neither delivered nor kept: the outbox is only in memory"), "{log}");
    assert!(stage.master.connections().is_empty());
}

#[test]
fn truncated_index_does_not_end_run_or_lose_a_delta() {
    let stage = Stage::new();
    stage.master.always(Some(Answer::status(503).into()));
    let mut run = run(&stage.worker, stage.dir.path());
    run.args(["--interval", "100ms"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut running = Running::start(&mut run);
    stage.requests(1);
    assert_eq!(push(&stage, &["--no-wait"]).0, Some(0));
    let index = stage.agent_dir().join("heartbeat.db-shm");
    OpenOptions::new().write(true).truncate(true).open(&index).unwrap();
    stage.requests(stage.master.received().len() + 3);
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    stage.master.always(None);
    stage.closed_rows(1);
    assert_eq!(running.terminate(PATIENCE), Some(0));
}

#[test]
fn timeout_limits_push_to_a_master_that_does_not_answer() {
    let stage = Stage::new();
    stage.master.open_operation(&stage.worker.uuid, "d", "deploy");
    stage.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    let since = Instant::now();
    let (code, said, _) = push(&stage, &["--timeout", "300ms"]);
    let took = since.elapsed();
    assert_eq!(code, Some(75), "{said}");
    assert!((Duration::from_millis(300)..Duration::from_secs(3)).contains(&took), "{took:?}");
    assert!(said.contains("not delivered: no answer from ") && said.contains("timeout"), "{said}");
    assert_eq!(owners(&stage), [None], "run may deliver it");
    stage.master.always(None);
    let (heartbeat, _tick) = stage.beating();
    settled(&heartbeat, |stats| stats.delivered == 1);
}

#[test]
fn push_waits_up_to_its_timeout() {
    let stage = Stage::new();
    stage.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    let since = Instant::now();
    let (code, said, _) = push(&stage, &["--timeout", "6s"]);
    assert_eq!(code, Some(75), "{said}");
    // The default limit of a POST is shorter.
    assert!(since.elapsed() >= Duration::from_secs(6), "{:?}", since.elapsed());
}

#[test]
fn timeout_out_of_range_or_with_no_wait_exits_2() {
    let stage = Stage::new();
    let track = |options: &[&str]| {
        output(
            &stage,
            &[&["track", "--operation", "deploy", "--decky", "d"], options, &["--", "true"]]
                .concat(),
        )
    };
    for timeout in ["0s", "999us", "2h", "3601s", "x", ""] {
        for (code, _, log) in
            [push(&stage, &["--timeout", timeout]), track(&["--timeout", timeout])]
        {
            assert_eq!(code, Some(2), "{timeout}: {log}");
            assert!(log.contains("--timeout"), "{log}");
        }
    }
    let both = ["--no-wait", "--timeout", "1s"];
    for (code, _, log) in [push(&stage, &both), track(&both)] {
        assert_eq!(code, Some(2), "{log}");
    }
    for timeout in ["1ms", "1h"] {
        assert_ne!(push(&stage, &["--timeout", timeout]).0, Some(2));
    }
}

#[test]
fn push_delivers_without_threads() {
    let stage = Stage::new();
    let mut command: Command = program(&stage, &[&PUSH[..], &["d"]].concat());
    // More stack for a thread than any machine has.
    let output = command.env("RUST_MIN_STACK", "70368744177664").output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"delivered\n".to_vec()));
}

#[test]
fn file_size_limit_does_not_end_push() {
    let stage = Stage::new();
    let inner = program(&stage, &[&PUSH[..], &["d"]].concat());
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -f 0; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args());
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"delivered\n".to_vec()));
}
