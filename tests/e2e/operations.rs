//! Tracked operations against the real master, which gives each delta to the newest open row.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::Stdio;

use decnet_heartbeat::{Enrolment, Heartbeat, LifecycleDelta, Operation, Snapshot};
use serde_json::{Value, json};

use crate::support::{Stage, beat, process, settled};

/// What the master made of an operation: its status, its error, and whether it has ended.
fn verdict(stage: &Stage, row: &str) -> Value {
    let row = stage.row(row);
    json!([row["status"], row["error"], row["completed_at"].is_string()])
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn an_outage_mixes_up_neither_of_two_operations_that_begin_and_end_in_it() {
    let stage = Stage::new();
    let rows = [(); 2]
        .map(|()| stage.master.open_lifecycle("decky-01", "deploy", &stage.worker.uuid, "running"));
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    stage.master.stop();
    heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap().fail("first");
    heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap().succeed();
    settled(&heartbeat, |stats| stats.failure.is_some());
    stage.master.start_again();
    settled(&heartbeat, |stats| stats.delivered == 2);
    let expected = [json!(["failed", "first", true]), json!(["succeeded", null, true])];
    assert_eq!(rows.map(|row| verdict(&stage, &row)), expected);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_delta_that_an_operation_has_overtaken_does_not_seal_its_row() {
    let stage = Stage::new();
    let open = |decky| stage.master.open_lifecycle(decky, "deploy", &stage.worker.uuid, "running");
    let rows = ["decky-01", "decky-01", "decky-02"].map(open);
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    stage.master.stop();
    heartbeat
        .deltas()
        .push(LifecycleDelta::failed("decky-01", Operation::Deploy, "older"))
        .unwrap();
    let newer = heartbeat.begin(Operation::Deploy, ["decky-01"]).unwrap();
    heartbeat.deltas().push(LifecycleDelta::succeeded("decky-02", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());

    stage.master.start_again();
    for beats in 2..5 {
        beat(&tick);
        settled(&heartbeat, |stats| stats.beats >= beats);
    }
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.waiting, stats.held, stats.operations), (1, 1, 1));
    let running = json!(["running", null, false]);
    let expected = [running.clone(), running, json!(["succeeded", null, true])];
    assert_eq!(rows.each_ref().map(|row| verdict(&stage, row)), expected);

    newer.succeed();
    let stats = settled(&heartbeat, |stats| stats.delivered == 3);
    assert_eq!((stats.waiting, stats.held, stats.operations), (0, 0, 0));
    let succeeded = json!(["succeeded", null, true]);
    let expected = [json!(["failed", "older", true]), succeeded.clone(), succeeded];
    assert_eq!(rows.each_ref().map(|row| verdict(&stage, row)), expected);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn an_operation_whose_process_was_killed_is_reported_failed_by_the_first_beat_of_the_next_start() {
    const CHILD: &str = "DECNET_HEARTBEAT_TEST_KILLED";
    const BEGUN: &str = "begun";
    if let Ok(host) = std::env::var(CHILD) {
        let host: (String, u16, PathBuf) = serde_json::from_str(&host).unwrap();
        let enrolment =
            Enrolment::new(host.0, "127.0.0.1", &host.2).unwrap().with_master_port(host.1).unwrap();
        let source = || Snapshot::new(&json!({}));
        let heartbeat =
            Heartbeat::builder().enrolment(enrolment).status_source(source).start().unwrap();
        settled(&heartbeat, |stats| stats.beats == 1);
        let _operation = heartbeat.begin(Operation::Deploy, ["decky-01", "decky-02"]).unwrap();
        println!("\n{BEGUN}");
        // The end comes from outside; if the test dies first, its pipe does, too.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::abort();
    }
    let stage = Stage::new();
    let open = |decky| stage.master.open_lifecycle(decky, "deploy", &stage.worker.uuid, "running");
    let rows = ["decky-01", "decky-02"].map(open);
    let host = json!([stage.worker.uuid, stage.master.port(), stage.agent_dir()]).to_string();
    let test = "operations::\
        an_operation_whose_process_was_killed_is_reported_failed_by_the_first_beat_of_the_next_start";
    let mut child = process::again(test)
        .env(CHILD, host)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = process::lines(child.stdout.take().unwrap());
    let begun = said.iter().any(|line| line == BEGUN);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(begun, "the child ended before its operation began");
    assert_eq!(stage.statuses(1), [204]);
    let running = json!(["running", null, false]);
    assert_eq!(rows.each_ref().map(|row| verdict(&stage, row)), [running.clone(), running]);

    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats > 0);
    assert_eq!((stats.beats, stats.delivered, stats.waiting, stats.operations), (1, 2, 0, 0));
    let failed = json!(["failed", "the agent restarted during deploy", true]);
    assert_eq!(rows.each_ref().map(|row| verdict(&stage, row)), [failed.clone(), failed]);
    assert_eq!(stage.statuses(2), [204; 2]);
}
