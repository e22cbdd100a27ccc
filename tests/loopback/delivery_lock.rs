//! Only one heartbeat delivers from an outbox, in this process and in others.

use std::time::Duration;

use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation};

use crate::support::{ChildProcess, Fixture, TIMEOUT, wait_for_stats};

/// The error of a second heartbeat on the outbox.
fn error_while_locked_by(holder: u32, fixture: &Fixture) -> String {
    format!(
        "outbox {}: process {holder} already delivers from it; stop that process, or use another file",
        fixture.outbox().display()
    )
}

#[test]
fn second_start_names_the_delivering_process_and_works_after_its_stop() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let deltas = heartbeat.deltas();
    for _ in 0..2 {
        let error = fixture.builder().0.start().unwrap_err();
        assert_eq!(error.to_string(), error_while_locked_by(std::process::id(), &fixture));
        assert!(error.is_outbox());
        assert_eq!(error.path(), Some(fixture.outbox().as_path()));
    }
    assert_eq!(fixture.master.connections().len(), 1, "the second heartbeat sent nothing");
    // The first heartbeat still works.
    deltas.push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    let operation = heartbeat.begin(Operation::Deploy, ["e"]).unwrap();
    heartbeat.stop(TIMEOUT);
    // A handle or an operation of the first heartbeat does not hold the lock.
    let (builder, _tick) = fixture.builder();
    let second = builder.start().unwrap();
    assert_eq!(wait_for_stats(&second, |stats| stats.beats == 1).operations, 1);
    drop((operation, deltas));
    drop(second);
    fixture.builder().0.start().unwrap();
}

#[test]
fn other_outboxes_are_independent() {
    let fixture = Fixture::new();
    let (_heartbeat, _tick) = fixture.start_heartbeat();
    for location in [OutboxLocation::File(fixture.path("other.db")), OutboxLocation::Memory] {
        let (builder, _tick) = fixture.builder();
        let second = builder.outbox(location).start().unwrap();
        second.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
        wait_for_stats(&second, |stats| stats.delivered == 1);
    }
}

#[test]
fn second_run_exits_1_with_the_process_id_and_starts_after_the_stop() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let mut run = ChildProcess::start(&mut fixture.run_command());
    let log = run.stderr_lines();
    assert_eq!(run.wait(TIMEOUT).code(), Some(1));
    let error = error_while_locked_by(std::process::id(), &fixture);
    assert_eq!(log.iter().collect::<Vec<_>>(), [format!("decnet-heartbeat: {error}")]);
    heartbeat.stop(Duration::from_secs(5));
    let before = fixture.master.received().len();
    let run = ChildProcess::start(fixture.run_command().args(["--log-level", "off"]));
    fixture.wait_for_requests(before + 1);
    // Now the program holds the lock.
    let error = fixture.builder().0.start().unwrap_err();
    assert_eq!(error.to_string(), error_while_locked_by(run.id(), &fixture));
    // A killed process holds no lock.
    drop(run);
    fixture.builder().0.start().unwrap();
}
