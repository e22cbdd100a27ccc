//! The heartbeat against the real master, with state from a real Docker Engine.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use decnet_heartbeat::{
    DecnetStatus, Heartbeat, LifecycleDelta, Operation, Snapshot, Stats, StatusSource,
};
use serde_json::{Value, json};

use crate::support::{Docker, Stage, beat, settled};

fn decky(name: &str, services: &[&str]) -> Value {
    json!({
        "name": name, "ip": "10.0.0.5", "services": services, "distro": "debian", "base_image": "debian:12",
        "build_base": "debian:12", "hostname": name, "archetype": null, "service_config": {"ssh": {"banner": "é\n"}},
        "nmap_os": "linux", "mutate_interval": 30, "last_mutated": 1_700_000_000.25, "last_login_attempt": 0.0,
        "host_uuid": null,
    })
}

/// A state file as the original agent writes it.
fn write_state(path: &Path, deckies: &[Value]) {
    let config = json!({
        "mode": "swarm", "interface": "eth0", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "deckies": deckies,
        "log_file": null, "ipvlan": false, "mutate_interval": 30,
    });
    std::fs::write(
        path,
        json!({"config": config, "compose_path": "/opt/decnet/c.yml"}).to_string(),
    )
    .unwrap();
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_beat_marks_the_host_as_active() {
    let stage = Stage::new();
    let before = stage.host();
    assert_eq!((&before["status"], &before["last_heartbeat"]), (&json!("enrolled"), &Value::Null));
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.start().unwrap();
    assert_eq!(stage.statuses(1), [204]);
    let after = stage.host();
    assert_eq!(after["status"], "active");
    assert!(after["last_heartbeat"].is_string(), "{after}");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_pkcs1_key_is_as_good_as_a_pkcs8_key() {
    let stage = Stage::new();
    let key = stage.agent_dir().join("worker.key");
    let converted =
        Command::new("openssl").args(["rsa", "-traditional", "-in"]).arg(&key).output().unwrap();
    assert!(converted.stdout.starts_with(b"-----BEGIN RSA PRIVATE KEY-----"), "{converted:?}");
    std::fs::write(&key, converted.stdout).unwrap();
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.start().unwrap();
    assert_eq!(stage.statuses(1), [204]);
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn deckies_are_reported_as_the_original_reports_them() {
    let (stage, docker) = (Stage::new(), Docker::start());
    let state_file = stage.agent_dir().join("decnet-state.json");
    write_state(
        &state_file,
        &[decky("decky-01", &["ssh", "real_web"]), decky("decky-02", &["ftp", "smb"])],
    );
    docker.run("decky-01-ssh");
    docker.run("decky-01-real-web");
    docker.run("decky-02-ftp");
    docker.stop_container("decky-02-ftp");
    docker.run("decnet-extra");
    docker.network("decnet-topology-lan");
    let topology = stage.agent_dir().join("topology.db");
    stage.master.put_topology(&topology, "t1", "abc", Some("no space left"));

    let source = || {
        DecnetStatus::new(stage.agent_dir()).state_file(&state_file).docker_socket(docker.socket())
    };
    let ours = source().snapshot();
    let theirs = stage.master.executor_status(&state_file, &docker.socket());
    assert_eq!(serde_json::from_str::<Value>(ours.status()).unwrap(), theirs);
    let theirs = stage.master.topology_state(&topology, &docker.socket());
    let ours = ours.topology().unwrap();
    let applied = ours.applied.as_ref().unwrap();
    assert_eq!(
        (
            &json!(applied.topology_id),
            &json!(applied.applied_version_hash),
            &json!(applied.last_error)
        ),
        (&theirs["topology_id"], &theirs["applied_version_hash"], &theirs["last_error"])
    );
    assert_eq!(json!(applied.applied_at), theirs["applied_at"]);
    let decnet_heartbeat::Observed::Seen { bridges, containers } = &ours.observed else {
        panic!("{ours:?}")
    };
    assert_eq!(json!({"bridges": bridges, "containers": containers}), theirs["observed"]);

    let (heartbeat, tick) = stage.start(source());
    assert_eq!(stage.statuses(1), [204]);
    let settled = settled(&heartbeat, |stats| stats.snapshots == 1);
    assert_eq!(settled.failure.map(|failure| failure.class), None);
    let ours = stage.shards();
    let states: Vec<_> = ours.iter().map(|shard| (&shard["decky_name"], &shard["state"])).collect();
    assert_eq!(
        states,
        [(&json!("decky-01"), &json!("running")), (&json!("decky-02"), &json!("degraded"))]
    );

    // The original's own words for the same host, posted by the original's own TLS: the rows stay as ours made them.
    let status = stage.master.executor_status(&state_file, &docker.socket());
    let body = json!({"host_uuid": stage.worker.uuid, "agent_version": "1.0.0", "status": status});
    assert_eq!(stage.master.post(stage.agent_dir(), &body.to_string()).0, 204);
    assert_eq!(without_times(stage.shards()), without_times(ours));

    // With Docker away the beat is on time, and no row changes.
    let before = stage.shards();
    docker.stop();
    let since = Instant::now();
    beat(&tick);
    assert_eq!(stage.statuses(3), [204; 3]);
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(stage.shards(), before);

    // An engine that accepts and never answers holds up neither a beat nor the rows.
    docker.start_again();
    docker.freeze();
    heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy)).unwrap();
    assert_eq!(stage.statuses(4), [204; 4]);
    assert_eq!(stage.shards(), before);
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
fn a_push_seals_the_open_row() {
    let stage = Stage::new();
    let row = stage.master.open_lifecycle("decky-01", "mutate", &stage.worker.uuid, "running");
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let delta = LifecycleDelta::failed("decky-01", Operation::Mutate, "compose exited with 1 ✗")
        .completed_at(at);
    heartbeat.deltas().push(delta).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    let row = stage.row(&row);
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
fn the_second_of_two_pushes_lands_on_the_newer_row() {
    let stage = Stage::new();
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    assert_eq!(stage.statuses(1), [204]);
    let first = stage.master.open_lifecycle("decky-01", "deploy", &stage.worker.uuid, "pending");
    heartbeat
        .deltas()
        .push(LifecycleDelta::failed("decky-01", Operation::Deploy, "first"))
        .unwrap();
    settled(&heartbeat, |stats| stats.delivered == 1);
    let second = stage.master.open_lifecycle("decky-01", "deploy", &stage.worker.uuid, "running");
    heartbeat.deltas().push(LifecycleDelta::succeeded("decky-01", Operation::Deploy)).unwrap();
    settled(&heartbeat, |stats| stats.delivered == 2);
    let (first, second) = (stage.row(&first), stage.row(&second));
    assert_eq!((&first["status"], &first["error"]), (&json!("failed"), &json!("first")));
    assert_eq!((&second["status"], &second["error"]), (&json!("succeeded"), &Value::Null));
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn an_outage_delays_two_deltas_of_one_decky_and_mixes_up_neither() {
    let stage = Stage::new();
    let rows = [(); 2]
        .map(|()| stage.master.open_lifecycle("decky-01", "deploy", &stage.worker.uuid, "running"));
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    stage.master.stop();
    for error in ["first", "second"] {
        heartbeat
            .deltas()
            .push(LifecycleDelta::failed("decky-01", Operation::Deploy, error))
            .unwrap();
    }
    settled(&heartbeat, |stats| stats.failure.is_some());
    stage.master.start_again();
    settled(&heartbeat, |stats| stats.delivered == 2);
    assert_eq!(rows.map(|id| stage.row(&id)["error"].clone()), [json!("first"), json!("second")]);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_refused_host_keeps_beating_and_is_accepted_once_it_is_enrolled_again() {
    let stage = Stage::new();
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    assert_eq!(stage.statuses(1), [204]);

    // Another certificate is pinned, and ours is not it.
    let elsewhere = tempfile::tempdir().unwrap();
    stage.master.enrol_again(&stage.worker.uuid, "worker", elsewhere.path());
    for beats in 1..3 {
        beat(&tick);
        let failure =
            |stats: &Stats| stats.failure.as_ref().is_some_and(|failure| failure.count == beats);
        assert_eq!(settled(&heartbeat, failure).failure.unwrap().class, "http-403");
    }
    let again = stage.master.enrol_again(&stage.worker.uuid, "worker", stage.agent_dir());
    beat(&tick);
    let stats = settled(&heartbeat, |stats| stats.beats == 2);
    assert_eq!(
        (stats.failure.map(|failure| failure.class), stats.fingerprint),
        (None, Some(again.fingerprint))
    );

    stage.master.decommission(&stage.worker.uuid);
    beat(&tick);
    assert_eq!(
        settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap().class,
        "http-404"
    );
    stage.master.enrol_again(&stage.worker.uuid, "worker", stage.agent_dir());
    beat(&tick);
    settled(&heartbeat, |stats| stats.beats == 3 && stats.failure.is_none());
    assert_eq!(stage.statuses(6), [204, 403, 403, 204, 404, 204]);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn an_error_beside_the_deckies_keeps_no_row_from_the_master() {
    let stage = Stage::new();
    let status = json!({
        "deployed": true, "mode": "swarm", "compose_path": "/c.yml", "error": "topology.db: was deleted",
        "deckies": [decky("decky-01", &["ssh"])],
        "runtime": {"decky-01": {"running": true, "services": {"ssh": "running"}}},
    });
    let (builder, _tick) = stage.builder();
    let _heartbeat = builder.status_source(move || Snapshot::new(&status)).start().unwrap();
    assert_eq!(stage.statuses(1), [204]);
    assert_eq!(stage.shards()[0]["state"], "running");
}

/// Why a state file that is nested deeper than a hundred levels is not passed on.
#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn the_master_cannot_read_what_is_nested_too_deep() {
    let stage = Stage::new();
    let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let beat = |depth| {
        let status = format!(r#"{{"deployed": true, "deckies": [], "x": {}}}"#, nested(depth));
        let body = format!(
            r#"{{"host_uuid": "{}", "agent_version": "1", "status": {status}}}"#,
            stage.worker.uuid
        );
        stage.master.post(stage.agent_dir(), &body).0
    };
    assert_eq!(beat(100), 204);
    assert!(beat(100_000) >= 400);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_topology_is_pushed_again_only_when_its_hash_differs() {
    let stage = Stage::new();
    let expected = stage.master.add_topology(&stage.worker.uuid);
    let db = stage.agent_dir().join("topology.db");
    stage.master.put_topology(&db, &expected.id, &expected.hash, None);
    // No state file and no Docker: the topology is reported all the same.
    let source = DecnetStatus::new(stage.agent_dir())
        .state_file(stage.agent_dir().join("none"))
        .docker_socket(stage.agent_dir().join("none"));
    let (_heartbeat, tick) = stage.start(source);
    assert_eq!(stage.statuses(1), [204]);
    assert!(!stage.master.topology(&expected.id).needs_resync, "what is expected is applied");
    stage.master.put_topology(&db, &expected.id, "another", None);
    beat(&tick);
    assert_eq!(stage.statuses(2), [204; 2]);
    assert!(stage.master.topology(&expected.id).needs_resync, "another hash is");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn a_session_is_resumed_after_the_master_has_closed_the_connection_and_still_pinned() {
    let stage = Stage::new();
    // A beat every 6 s: uvicorn closes an idle connection after 5 s.
    let heartbeat = Heartbeat::builder()
        .enrolment(stage.enrolment())
        .status_source(|| Snapshot::new(&json!({})))
        .interval(Duration::from_secs(6))
        .start()
        .unwrap();
    assert_eq!(stage.statuses(3), [204; 3]);
    let handshakes = stage.master.handshakes();
    let last = handshakes.last().unwrap();
    assert!(handshakes.len() >= 2 && last.resumed, "{handshakes:?}");
    assert_eq!(last.version, "TLSv1.3");
    assert!(
        handshakes.iter().all(|it| it.fingerprint.as_deref() == Some(&*stage.worker.fingerprint))
    );
    let stats = settled(&heartbeat, |stats| stats.beats == 3);
    assert!(stats.resumed && stats.failure.is_none(), "{stats:?}");
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn the_program_beats_for_a_worker_that_is_enrolled_by_its_ini() {
    let stage = Stage::new();
    let ini = stage.agent_dir().join("decnet.ini");
    let (uuid, port, dir) = (&stage.worker.uuid, stage.master.port(), stage.agent_dir().display());
    let text = format!(
        "[decnet]\nmode = agent\ndisallow-master = true\nlog-directory = /var/log/decnet\n\n\
         [agent]\nmaster-host = 127.0.0.1\nswarmctl-port = {port}\nswarm-syslog-port = 6514\nagent-port = 8765\n\
         agent-dir = {dir}\nupdater-dir = /etc/decnet/updater\nhost-uuid = {uuid}\n"
    );
    std::fs::write(&ini, text).unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    program
        .env_clear()
        .arg("--config")
        .arg(&ini)
        .arg("run")
        .arg("--state-file")
        .arg(stage.agent_dir().join("none"));
    let mut child = program.stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(stage.statuses(1), [204]);
    assert_eq!(stage.host()["status"], "active");
    let kill = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
