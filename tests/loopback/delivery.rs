//! One heartbeat at a time delivers from an outbox, in this process and in others.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::time::Duration;

use decnet_heartbeat::{LifecycleDelta, Operation, OutboxLocation};

use crate::program;
use crate::support::{PATIENCE, Stage, settled};

/// A process that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the second one hears.
fn held(stage: &Stage, holder: u32) -> String {
    format!(
        "outbox {}: process {holder} already delivers from it; stop that process, or use another file",
        stage.agent_dir().join("heartbeat.db").display()
    )
}

#[test]
fn a_second_start_hears_who_delivers_and_can_have_it_after_a_stop() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let deltas = heartbeat.deltas();
    for _ in 0..2 {
        let error = stage.builder().0.start().unwrap_err();
        assert_eq!(error.to_string(), held(&stage, std::process::id()));
        assert!(error.is_outbox());
        assert_eq!(error.path(), Some(stage.agent_dir().join("heartbeat.db").as_path()));
    }
    assert_eq!(stage.master.connections().len(), 1, "the second has not beaten");
    // The first is none the worse for it.
    deltas.push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    let operation = heartbeat.begin(Operation::Deploy, ["e"]).unwrap();
    heartbeat.stop(PATIENCE);
    // Neither a handle nor an operation of the first keeps the second out.
    let (builder, _tick) = stage.builder();
    let second = builder.start().unwrap();
    assert_eq!(settled(&second, |stats| stats.beats == 1).operations, 1);
    drop((operation, deltas));
    drop(second);
    stage.builder().0.start().unwrap();
}

#[test]
fn another_file_or_memory_is_no_matter_of_the_first() {
    let stage = Stage::new();
    let (_heartbeat, _tick) = stage.beating();
    for location in
        [OutboxLocation::File(stage.dir.path().join("other.db")), OutboxLocation::Memory]
    {
        let (builder, _tick) = stage.builder();
        let second = builder.outbox(location).start().unwrap();
        second.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
        settled(&second, |stats| stats.delivered == 1);
    }
}

#[test]
fn the_program_exits_1_with_the_holders_id_and_runs_when_it_has_gone() {
    let stage = Stage::new();
    let (heartbeat, _tick) = stage.beating();
    let mut child = Killed(program::run(&stage.worker, stage.dir.path()).spawn().unwrap());
    // A first line and no second; one that ran all the same would begin its log.
    let said: Vec<_> = BufReader::new(child.0.stderr.take().unwrap())
        .lines()
        .take(2)
        .map(Result::unwrap)
        .collect();
    assert_eq!(said, [format!("decnet-heartbeat: {}", held(&stage, std::process::id()))]);
    assert_eq!(child.0.wait().unwrap().code(), Some(1));
    heartbeat.stop(Duration::from_secs(5));
    let before = stage.master.received().len();
    let child = Killed(
        program::run(&stage.worker, stage.dir.path()).args(["--log-level", "off"]).spawn().unwrap(),
    );
    stage.requests(before + 1);
    // And the other way round.
    let error = stage.builder().0.start().unwrap_err();
    assert_eq!(error.to_string(), held(&stage, child.0.id()));
    // Killed, it holds nothing any more.
    drop(child);
    stage.builder().0.start().unwrap();
}
