//! The heartbeat with the real master and states from a real Docker Engine.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use decnet_heartbeat::{
    DecnetStatus, Heartbeat, LifecycleDelta, Observed, Operation, Snapshot, Stats, StatusSource,
};
use serde_json::{Value, json};

use crate::support::{
    Docker, EnrolledHost, commands, decky, deployed, send_tick, wait_for_stats, write_state_file,
};

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn beat_marks_host_as_active() {
    let host = EnrolledHost::new();
    let before = host.swarm_host_row();
    assert_eq!((&before["status"], &before["last_heartbeat"]), (&json!("enrolled"), &Value::Null));
    let (builder, _tick) = host.builder();
    let _heartbeat = builder.start().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);
    let after = host.swarm_host_row();
    assert_eq!(after["status"], "active");
    assert!(after["last_heartbeat"].is_string(), "{after}");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn pkcs1_key_is_accepted() {
    let host = EnrolledHost::new();
    let key = host.agent_dir().join("worker.key");
    let converted =
        Command::new("openssl").args(["rsa", "-traditional", "-in"]).arg(&key).output().unwrap();
    assert!(converted.stdout.starts_with(b"-----BEGIN RSA PRIVATE KEY-----"), "{converted:?}");
    std::fs::write(&key, converted.stdout).unwrap();
    let (builder, _tick) = host.builder();
    let _heartbeat = builder.start().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn status_equals_that_of_python_agent() {
    let host = EnrolledHost::new();
    let docker = Docker::start();
    let state_file = host.agent_dir().join("decnet-state.json");
    write_state_file(
        &state_file,
        &[decky("decky-01", &["ssh", "real_web"]), decky("decky-02", &["ftp", "smb"])],
    );
    docker.run("decky-01-ssh");
    docker.run("decky-01-real-web");
    docker.run("decky-02-ftp");
    docker.stop_container("decky-02-ftp");
    docker.run("decnet-extra");
    docker.network("decnet-topology-lan");
    let topology_db = host.agent_dir().join("topology.db");
    host.master.put_topology(&topology_db, "t1", "abc", Some("no space left"));

    let source = || {
        DecnetStatus::new(host.agent_dir()).state_file(&state_file).docker_socket(docker.socket())
    };
    let snapshot = source().snapshot();
    let original = host.master.executor_status(&state_file, &docker.socket());
    assert_eq!(serde_json::from_str::<Value>(snapshot.status()).unwrap(), original);
    let topology = snapshot.topology().unwrap();
    let original = host.master.topology_state(&topology_db, &docker.socket());
    let applied = topology.applied.as_ref().unwrap();
    assert_eq!(json!(applied.topology_id), original["topology_id"]);
    assert_eq!(json!(applied.applied_version_hash), original["applied_version_hash"]);
    assert_eq!(json!(applied.last_error), original["last_error"]);
    assert_eq!(json!(applied.applied_at), original["applied_at"]);
    let Observed::Seen { bridges, containers } = &topology.observed else { panic!("{topology:?}") };
    assert_eq!(json!({"bridges": bridges, "containers": containers}), original["observed"]);

    let (heartbeat, tick) = host.start(source());
    assert_eq!(host.wait_for_statuses(1), [204]);
    let stats = wait_for_stats(&heartbeat, |stats| stats.snapshots == 1);
    assert_eq!(stats.failure.map(|failure| failure.class), None);
    let shards = host.shards();
    let states: Vec<_> =
        shards.iter().map(|shard| (&shard["decky_name"], &shard["state"])).collect();
    assert_eq!(
        states,
        [(&json!("decky-01"), &json!("running")), (&json!("decky-02"), &json!("degraded"))]
    );

    // The Python agent's status of the same host, posted with its own TLS, changes no row.
    let status = host.master.executor_status(&state_file, &docker.socket());
    let body = json!({"host_uuid": host.worker.uuid, "agent_version": "1.0.0", "status": status});
    assert_eq!(host.master.post(host.agent_dir(), &body.to_string()).0, 204);
    assert_eq!(without_times(host.shards()), without_times(shards));

    // Without Docker the beat is on time, and no row changes.
    let before = host.shards();
    docker.stop();
    let since = Instant::now();
    send_tick(&tick);
    assert_eq!(host.wait_for_statuses(3), [204; 3]);
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(host.shards(), before);

    // An engine that accepts connections and does not answer delays no beat, and no row changes.
    docker.start_again();
    docker.freeze();
    heartbeat.deltas().push(deployed("decky-01")).unwrap();
    assert_eq!(host.wait_for_statuses(4), [204; 4]);
    assert_eq!(host.shards(), before);
    docker.thaw();
}

fn without_times(mut rows: Vec<Value>) -> Vec<Value> {
    for row in &mut rows {
        row["last_seen"].take();
        row["updated_at"].take();
    }
    rows
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn push_closes_open_row() {
    let host = EnrolledHost::new();
    let row = host.master.open_lifecycle("decky-01", "mutate", &host.worker.uuid, "running");
    let (builder, _tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let delta = LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1 ✗")
        .completed_at(at);
    heartbeat.deltas().push(delta).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    let row = host.lifecycle_row(&row);
    assert_eq!(
        (&row["status"], &row["error"]),
        (&json!("failed"), &json!("compose exited with 1 ✗"))
    );
    assert!(
        row["completed_at"].as_str().unwrap().starts_with("2023-11-14 22:13:20.123456"),
        "{row}"
    );
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn second_push_closes_newer_row() {
    let host = EnrolledHost::new();
    let (builder, _tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);
    let first = host.master.open_lifecycle("decky-01", "deploy", &host.worker.uuid, "pending");
    heartbeat
        .deltas()
        .push(LifecycleDelta::failed("decky-01", Operation::Deploy, "first"))
        .unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    let second = host.master.open_lifecycle("decky-01", "deploy", &host.worker.uuid, "running");
    heartbeat.deltas().push(deployed("decky-01")).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    let first = host.lifecycle_row(&first);
    let second = host.lifecycle_row(&second);
    assert_eq!((&first["status"], &first["error"]), (&json!("failed"), &json!("first")));
    assert_eq!((&second["status"], &second["error"]), (&json!("succeeded"), &Value::Null));
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn two_deltas_of_one_decky_close_their_own_rows_after_outage() {
    let host = EnrolledHost::new();
    let rows = [(); 2]
        .map(|()| host.master.open_lifecycle("decky-01", "deploy", &host.worker.uuid, "running"));
    let (builder, _tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    host.master.stop();
    for error in ["first", "second"] {
        heartbeat
            .deltas()
            .push(LifecycleDelta::failed("decky-01", Operation::Deploy, error))
            .unwrap();
    }
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    host.master.start_again();
    wait_for_stats(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!(
        rows.map(|id| host.lifecycle_row(&id)["error"].clone()),
        [json!("first"), json!("second")]
    );
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn rejected_host_is_accepted_after_new_enrolment() {
    let host = EnrolledHost::new();
    let (builder, tick) = host.builder();
    let heartbeat = builder.start().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);

    // Another certificate is pinned.
    let other_dir = tempfile::tempdir().unwrap();
    host.master.enrol_again(&host.worker.uuid, "worker", other_dir.path());
    for beats in 1..3 {
        send_tick(&tick);
        let failure =
            |stats: &Stats| stats.failure.as_ref().is_some_and(|failure| failure.count == beats);
        assert_eq!(wait_for_stats(&heartbeat, failure).failure.unwrap().class, "http-403");
    }
    let again = host.master.enrol_again(&host.worker.uuid, "worker", host.agent_dir());
    send_tick(&tick);
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 2);
    assert_eq!(
        (stats.failure.map(|failure| failure.class), stats.fingerprint),
        (None, Some(again.fingerprint))
    );

    host.master.decommission(&host.worker.uuid);
    send_tick(&tick);
    assert_eq!(
        wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap().class,
        "http-404"
    );
    host.master.enrol_again(&host.worker.uuid, "worker", host.agent_dir());
    send_tick(&tick);
    wait_for_stats(&heartbeat, |stats| stats.beats == 3 && stats.failure.is_none());
    assert_eq!(host.wait_for_statuses(6), [204, 403, 403, 204, 404, 204]);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn status_error_does_not_affect_rows_of_deckies() {
    let host = EnrolledHost::new();
    let status = json!({
        "deployed": true, "mode": "swarm", "compose_path": "/c.yml", "error": "topology.db: was deleted",
        "deckies": [decky("decky-01", &["ssh"])],
        "runtime": {"decky-01": {"running": true, "services": {"ssh": "running"}}},
    });
    let (builder, _tick) = host.builder();
    let _heartbeat = builder.status_source(move || Snapshot::new(&status)).start().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);
    assert_eq!(host.shards()[0]["state"], "running");
}

/// This is why a state file that is nested deeper than a hundred levels is not sent.
#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn master_rejects_deeply_nested_status() {
    let host = EnrolledHost::new();
    let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let beat = |depth| {
        let status = format!(r#"{{"deployed": true, "deckies": [], "x": {}}}"#, nested(depth));
        let body = format!(
            r#"{{"host_uuid": "{}", "agent_version": "1", "status": {status}}}"#,
            host.worker.uuid
        );
        host.master.post(host.agent_dir(), &body).0
    };
    assert_eq!(beat(100), 204);
    assert!(beat(100_000) >= 400);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn resync_is_requested_only_for_different_topology_hash() {
    let host = EnrolledHost::new();
    let expected = host.master.add_topology(&host.worker.uuid);
    let db = host.agent_dir().join("topology.db");
    host.master.put_topology(&db, &expected.id, &expected.hash, None);
    // The topology is reported without a state file and without Docker, too.
    let source = DecnetStatus::new(host.agent_dir())
        .state_file(host.agent_dir().join("none"))
        .docker_socket(host.agent_dir().join("none"));
    let (_heartbeat, tick) = host.start(source);
    assert_eq!(host.wait_for_statuses(1), [204]);
    assert!(!host.master.topology(&expected.id).needs_resync, "the expected hash was reported");
    host.master.put_topology(&db, &expected.id, "another", None);
    send_tick(&tick);
    assert_eq!(host.wait_for_statuses(2), [204; 2]);
    assert!(host.master.topology(&expected.id).needs_resync, "another hash was reported");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn resumed_session_keeps_certificate_pin() {
    let host = EnrolledHost::new();
    // uvicorn closes an idle connection after 5 s, so each beat needs a new one.
    let heartbeat = Heartbeat::builder()
        .enrolment(host.enrolment())
        .status_source(|| Snapshot::new(&json!({})))
        .interval(Duration::from_secs(6))
        .start()
        .unwrap();
    assert_eq!(host.wait_for_statuses(3), [204; 3]);
    let handshakes = host.master.handshakes();
    let last = handshakes.last().unwrap();
    assert!(handshakes.len() >= 2 && last.resumed, "{handshakes:?}");
    assert_eq!(last.version, "TLSv1.3");
    assert!(
        handshakes.iter().all(|it| it.fingerprint.as_deref() == Some(&*host.worker.fingerprint))
    );
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 3);
    assert!(stats.resumed && stats.failure.is_none(), "{stats:?}");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn program_reads_enrolment_from_ini() {
    let host = EnrolledHost::new();
    let ini = host.agent_dir().join("decnet.ini");
    host.write_ini(&ini);
    let mut program = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    program
        .env_clear()
        .arg("--config")
        .arg(&ini)
        .arg("run")
        .arg("--state-file")
        .arg(host.agent_dir().join("none"));
    let mut child = program.stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(host.wait_for_statuses(1), [204]);
    assert_eq!(host.swarm_host_row()["status"], "active");
    commands::signal("TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
