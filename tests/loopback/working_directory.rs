//! A host program may change its working directory: a relative path is resolved when it is given.

use std::env::set_current_dir;
use std::fs;
use std::path::Path;
use std::time::Duration;

use decnet_heartbeat::loopback::Enrolled;
use decnet_heartbeat::{
    DecnetStatus, EnrolmentSources, Heartbeat, LifecycleDelta, Operation, OutboxLocation,
};
use rusqlite::Connection;
use serde_json::Value;

use crate::support::{Fixture, TIMEOUT, run_in_own_process, start_docker};

const STATE: &str = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": []}]}, "compose_path": "/x"}"#;

const TOPOLOGY: &str =
    "CREATE TABLE applied_topology (topology_id, applied_version_hash, applied_at, last_error);
                        INSERT INTO applied_topology VALUES ('t', 'h', 5, NULL);";

/// Waits for a beat whose body fulfils the condition.
fn wait_for_beat(fixture: &Fixture, what: &str, is_expected: impl Fn(&Value) -> bool) {
    let arrived = fixture.master.wait_until(TIMEOUT, |seen| {
        seen.received().iter().filter_map(|beat| beat.json.as_ref()).any(&is_expected)
    });
    assert!(arrived, "{what}: {:?}", fixture.master.received().pop());
}

/// Writes an ini with a relative path to the agent dir.
fn write_ini(dir: &Path, worker: &Enrolled) {
    let ini = dir.join("decnet.ini");
    worker.write_ini(&ini).unwrap();
    let text = fs::read_to_string(&ini).unwrap();
    let relative =
        text.replace(&format!("agent-dir = {}", worker.agent_dir.display()), "agent-dir = agent");
    assert_ne!(text, relative);
    fs::write(ini, relative).unwrap();
}

fn assert_paths_survive_chdir(sources: impl FnOnce() -> EnrolmentSources) {
    let fixture = Fixture::new();
    let other = tempfile::tempdir().unwrap();
    let dir = fixture.dir.path();
    start_docker(&dir.join("docker.sock"));
    write_ini(dir, &fixture.worker);
    set_current_dir(dir).unwrap();
    let heartbeat = Heartbeat::builder()
        .enrolment(sources().read().unwrap())
        .status_source(
            DecnetStatus::new(Path::new("agent"))
                .state_file("state.json")
                .docker_socket("docker.sock"),
        )
        .outbox(OutboxLocation::File("outbox.db".into()))
        .interval(Duration::from_millis(50))
        .start()
        .unwrap();
    set_current_dir(other.path()).unwrap();

    fs::write(dir.join("state.json"), STATE).unwrap();
    wait_for_beat(&fixture, "the state file", |beat| beat["status"]["deckies"][0]["name"] == "d1");
    Connection::open(dir.join("agent/topology.db")).unwrap().execute_batch(TOPOLOGY).unwrap();
    wait_for_beat(&fixture, "topology.db", |beat| beat["topology"]["topology_id"] == "t");
    // A new enrolment with a new uuid and a new bundle.
    let again = fixture.master.enrol(&fixture.agent_dir()).unwrap();
    write_ini(dir, &again);
    wait_for_beat(&fixture, "the ini and the bundle", |beat| beat["host_uuid"] == again.uuid);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d1", Operation::Deploy)).unwrap();
    assert!(heartbeat.flush(TIMEOUT) && dir.join("outbox.db").exists());
    assert_eq!(heartbeat.stats().outbox.unwrap(), dir.canonicalize().unwrap().join("outbox.db"));
    drop(heartbeat);
    assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
}

#[test]
fn relative_paths_of_environment_and_ini_survive_chdir() {
    run_in_own_process(
        "working_directory::relative_paths_of_environment_and_ini_survive_chdir",
        || {
            assert_paths_survive_chdir(|| {
                EnrolmentSources::from_variables([("DECNET_CONFIG", "decnet.ini")])
            });
        },
    );
}

#[test]
fn relative_paths_of_the_caller_survive_chdir() {
    run_in_own_process("working_directory::relative_paths_of_the_caller_survive_chdir", || {
        assert_paths_survive_chdir(|| {
            EnrolmentSources::from_env().config("decnet.ini").agent_dir("agent")
        });
    });
}
