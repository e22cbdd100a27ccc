//! A host program changes its folder: a relative path is of the folder in which it was given.

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

use crate::check::start_docker;
use crate::support::{PATIENCE, Stage, alone};

const STATE: &str = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": []}]}, "compose_path": "/x"}"#;

const TOPOLOGY: &str =
    "CREATE TABLE applied_topology (topology_id, applied_version_hash, applied_at, last_error);
                        INSERT INTO applied_topology VALUES ('t', 'h', 5, NULL);";

/// Waits for a beat of which this is so.
fn hears(stage: &Stage, what: &str, is_so: impl Fn(&Value) -> bool) {
    let is_so = stage.master.wait_until(PATIENCE, |seen| {
        seen.received().iter().filter_map(|beat| beat.json.as_ref()).any(&is_so)
    });
    assert!(is_so, "{what}: {:?}", stage.master.received().pop());
}

/// An ini that names its agent dir by a relative path.
fn write_ini(dir: &Path, worker: &Enrolled) {
    let ini = dir.join("decnet.ini");
    worker.write_ini(&ini).unwrap();
    let whole = fs::read_to_string(&ini).unwrap();
    let relative =
        whole.replace(&format!("agent-dir = {}", worker.agent_dir.display()), "agent-dir = agent");
    assert_ne!(whole, relative);
    fs::write(ini, relative).unwrap();
}

fn everything_is_still_found(sources: impl FnOnce() -> EnrolmentSources) {
    let (stage, elsewhere) = (Stage::new(), tempfile::tempdir().unwrap());
    let dir = stage.dir.path();
    start_docker(&dir.join("docker.sock"));
    write_ini(dir, &stage.worker);
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
    set_current_dir(elsewhere.path()).unwrap();

    fs::write(dir.join("state.json"), STATE).unwrap();
    hears(&stage, "the state file", |beat| beat["status"]["deckies"][0]["name"] == "d1");
    Connection::open(dir.join("agent/topology.db")).unwrap().execute_batch(TOPOLOGY).unwrap();
    hears(&stage, "topology.db", |beat| beat["topology"]["topology_id"] == "t");
    // With a new uuid and a new bundle.
    let again = stage.master.enrol(&stage.agent_dir()).unwrap();
    write_ini(dir, &again);
    hears(&stage, "the ini and the bundle", |beat| beat["host_uuid"] == again.uuid);
    heartbeat.deltas().push(LifecycleDelta::succeeded("d1", Operation::Deploy)).unwrap();
    assert!(heartbeat.flush(PATIENCE) && dir.join("outbox.db").exists());
    assert_eq!(heartbeat.stats().outbox.unwrap(), dir.canonicalize().unwrap().join("outbox.db"));
    drop(heartbeat);
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn relative_paths_of_the_environment_and_the_ini_stay_where_they_were() {
    alone("folder::relative_paths_of_the_environment_and_the_ini_stay_where_they_were", || {
        everything_is_still_found(|| {
            EnrolmentSources::from_variables([("DECNET_CONFIG", "decnet.ini")])
        });
    });
}

#[test]
fn relative_paths_of_the_program_stay_where_they_were() {
    alone("folder::relative_paths_of_the_program_stay_where_they_were", || {
        everything_is_still_found(|| {
            EnrolmentSources::from_env().config("decnet.ini").agent_dir("agent")
        });
    });
}
