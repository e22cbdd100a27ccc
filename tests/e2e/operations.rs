//! Tracked operations with the real master, which closes the newest open row with each delta.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::Stdio;

use decnet_heartbeat::{Enrolment, Heartbeat, LifecycleDelta, Operation, Snapshot};
use serde_json::{Value, json};

use crate::support::{EnrolledHost, commands, deployed, send_tick, wait_for_stats};

/// The status and the error of an operation on the master, and whether it has ended.
fn row_state(host: &EnrolledHost, row: &str) -> Value {
    let row = host.lifecycle_row(row);
    json!([row["status"], row["error"], row["completed_at"].is_string()])
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn two_operations_of_one_decky_close_their_own_rows_after_outage() {
    let host = EnrolledHost::new();
    let rows = [(); 2]
        .map(|()| host.master.open_lifecycle("decky-01", "deploy", &host.worker.uuid, "running"));
    let (builder, _tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    host.master.stop();
    heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap().fail("first");
    heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap().succeed();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    host.master.start_again();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    let expected = [json!(["failed", "first", true]), json!(["succeeded", null, true])];
    assert_eq!(rows.map(|row| row_state(&host, &row)), expected);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn delta_is_held_while_newer_operation_is_in_flight() {
    let host = EnrolledHost::new();
    let open = |decky| host.master.open_lifecycle(decky, "deploy", &host.worker.uuid, "running");
    let rows = ["decky-01", "decky-01", "decky-02"].map(open);
    let (builder, tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    host.master.stop();
    heartbeat
        .deltas()
        .push(LifecycleDelta::failed("decky-01", Operation::Deploy, "older"))
        .unwrap();
    let newer = heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap();
    heartbeat.deltas().push(deployed("decky-02")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());

    host.master.start_again();
    for beats in 2..5 {
        send_tick(&tick);
        wait_for_stats(&heartbeat, |stats| stats.beats >= beats);
    }
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    let running = json!(["running", null, false]);
    let expected = [running.clone(), running, json!(["succeeded", null, true])];
    assert_eq!(rows.each_ref().map(|row| row_state(&host, row)), expected);

    newer.succeed();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 3);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
    let succeeded = json!(["succeeded", null, true]);
    let expected = [json!(["failed", "older", true]), succeeded.clone(), succeeded];
    assert_eq!(rows.each_ref().map(|row| row_state(&host, row)), expected);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn killed_operation_is_reported_as_failed_by_first_beat_after_restart() {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_KILLED";
    const BEGUN: &str = "begun";
    if let Ok(enrolment) = std::env::var(CHILD) {
        let (uuid, port, agent_dir): (String, u16, PathBuf) =
            serde_json::from_str(&enrolment).unwrap();
        let enrolment =
            Enrolment::new(uuid, "127.0.0.1", &agent_dir).unwrap().with_master_port(port).unwrap();
        let source = || Snapshot::new(&json!({}));
        let heartbeat =
            Heartbeat::builder().enrolment(enrolment).status_source(source).start().unwrap();
        wait_for_stats(&heartbeat, |stats| stats.beats == 1);
        let _operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"]).unwrap();
        println!("\n{BEGUN}");
        // The test kills this process. If the test ends before, its pipe is closed.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::abort();
    }
    let host = EnrolledHost::new();
    let open = |decky| host.master.open_lifecycle(decky, "deploy", &host.worker.uuid, "running");
    let rows = ["decky-01", "decky-02"].map(open);
    let enrolment = json!([host.worker.uuid, host.master.port(), host.agent_dir()]).to_string();
    let test = "operations::killed_operation_is_reported_as_failed_by_first_beat_after_restart";
    let mut child = commands::rerun_test(test)
        .env(CHILD, enrolment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = commands::lines(child.stdout.take().unwrap());
    let begun = lines.iter().any(|line| line == BEGUN);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(begun, "the child ended before its operation began");
    assert_eq!(host.wait_for_statuses(1), [204]);
    let running = json!(["running", null, false]);
    assert_eq!(rows.each_ref().map(|row| row_state(&host, row)), [running.clone(), running]);

    let (builder, _tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats > 0);
    assert_eq!((stats.beats, stats.delivered, stats.waiting, stats.operations), (1, 2, 0, 0));
    let failed = json!(["failed", "the agent restarted during deploy", true]);
    assert_eq!(rows.each_ref().map(|row| row_state(&host, row)), [failed.clone(), failed]);
    assert_eq!(host.wait_for_statuses(2), [204; 2]);
}
