//! Assumptions of the other tests about the real master and Docker.

use crate::support::{Docker, RealMaster, decky, write_state_file};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A body with these fields besides the mandatory ones.
fn body_with(uuid: &str, fields: Value) -> String {
    let mut body = json!({"host_uuid": uuid, "agent_version": "1.0.0", "status": {}});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn master_answers_as_documented() {
    let master = RealMaster::start();
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own");
    let sibling = folder.path().join("sibling");
    let worker = master.enrol("worker", &own);
    assert_ne!(master.issue("sibling", &sibling), worker.fingerprint);
    let good = body_with(&worker.uuid, json!({}));

    assert_eq!(master.post(&own, &good), (204, String::new()));
    assert_eq!(master.post(&sibling, &good).0, 403);
    assert_eq!(master.post(&own, &body_with("nobody", json!({}))).0, 404);
    assert_eq!(master.post(&own, "{}").0, 422);
    assert_eq!(master.post(&own, &body_with(&worker.uuid, json!({"agent_version": 1}))).0, 422);

    let statuses: Vec<_> = master.answers(5).iter().map(|answer| answer.status.unwrap()).collect();
    assert_eq!(statuses, [204, 403, 404, 422, 422]);
    assert!(master.answers(1).iter().all(|answer| answer.path == "/swarm/heartbeat"));
    let handshakes = master.handshakes();
    assert_eq!(handshakes[0].client_port, master.answers(1)[0].client_port);
    assert_eq!(handshakes[0].fingerprint.as_deref(), Some(&*worker.fingerprint));
    assert_eq!((&*handshakes[0].version, handshakes[0].resumed), ("TLSv1.3", false));

    let again = folder.path().join("again");
    let pinned = master.enrol_again(&worker.uuid, "worker", &again).fingerprint;
    assert_eq!((master.post(&own, &good).0, master.post(&again, &good).0), (403, 204));
    let hosts = master.rows("swarm_hosts", json!({"uuid": worker.uuid}));
    assert_eq!(
        (&hosts[0]["client_cert_fingerprint"], &hosts[0]["status"]),
        (&json!(pinned), &json!("active"))
    );

    master.decommission(&worker.uuid);
    assert_eq!(master.post(&again, &good).0, 404);
    assert_eq!(master.rows("swarm_hosts", json!({})), [] as [Value; 0]);
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn master_closes_newest_open_row_and_keeps_its_state_after_restart() {
    let master = RealMaster::start();
    let folder = tempfile::tempdir().unwrap();
    let worker = master.enrol("worker", folder.path());
    assert_eq!(
        std::fs::read(master.ca()).unwrap(),
        std::fs::read(folder.path().join("ca.crt")).unwrap()
    );
    let older = master.open_lifecycle("decky-01", "deploy", &worker.uuid, "pending");
    let newer = master.open_lifecycle("decky-01", "deploy", &worker.uuid, "running");
    let port = master.port();
    let status = |id| master.rows("decky_lifecycle", json!({"id": id}))[0]["status"].clone();

    master.stop();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    master.start_again();
    assert_eq!(
        (master.port(), status(&older), status(&newer)),
        (port, json!("pending"), json!("running"))
    );

    let delta = json!({"decky_name": "decky-01", "operation": "deploy", "status": "failed", "error": "no image"});
    assert_eq!(
        master.post(folder.path(), &body_with(&worker.uuid, json!({"lifecycle": [delta]}))).0,
        204
    );
    assert_eq!((status(&older), status(&newer)), (json!("pending"), json!("failed")));

    master.kill();
    master.start_again();
    assert_eq!((status(&older), status(&newer)), (json!("pending"), json!("failed")));
    assert_eq!(
        master.log().matches("Finished server process").count(),
        1,
        "one process was stopped, and one killed"
    );
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn master_requests_resync_unless_expected_hash_is_reported() {
    let master = RealMaster::start();
    let folder = tempfile::tempdir().unwrap();
    let worker = master.enrol("worker", folder.path());
    let expected = master.add_topology(&worker.uuid);
    let report = |hash: &str| {
        let topology = json!({"topology_id": expected.id, "applied_version_hash": hash});
        assert_eq!(
            master.post(folder.path(), &body_with(&worker.uuid, json!({"topology": topology}))).0,
            204
        );
        master.topology(&expected.id).needs_resync
    };

    assert!(!expected.needs_resync && !report(&expected.hash));
    assert!(report("another"));
    // The request itself is part of the hashed data. So the push that follows gives the host a hash
    // that the master does not accept, either.
    assert_ne!(master.topology(&expected.id).hash, expected.hash);
    master.clear_resync(&expected.id);
    assert!(!report(&expected.hash));
    assert_eq!(master.post(folder.path(), &body_with(&worker.uuid, json!({}))).0, 204);
    assert!(
        master.topology(&expected.id).needs_resync,
        "a beat without a topology is a mismatch, too"
    );
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn python_agent_reports_states_of_docker() {
    let master = RealMaster::start();
    let docker = Docker::start();
    let folder = tempfile::tempdir().unwrap();
    let state_file = folder.path().join("decnet-state.json");
    let db = folder.path().join("topology.db");
    write_state_file(&state_file, &[decky("decky-01", &["ssh", "real_web", "ftp", "smb"])]);
    let runtime =
        |state_file: &Path| master.executor_status(state_file, &docker.socket())["runtime"].clone();

    docker.create("decky-01-ssh");
    docker.run("decky-01-real-web");
    docker.run("decky-01-ftp");
    docker.stop_container("decky-01-ftp");
    docker.run("decnet-extra");
    docker.network("decnet-topology-lan");
    docker.network("another");
    let services =
        json!({"ssh": "created", "real_web": "running", "ftp": "exited", "smb": "absent"});
    assert_eq!(runtime(&state_file), json!({"decky-01": {"running": false, "services": services}}));

    master.put_topology(&db, "t1", "abc", Some("no space left"));
    let mut topology = master.topology_state(&db, &docker.socket());
    assert!(topology["applied_at"].take().is_u64());
    let observed = json!({"bridges": ["decnet-topology-lan"], "containers": ["decnet-extra"]});
    assert_eq!(
        topology,
        json!({
            "topology_id": "t1", "applied_version_hash": "abc", "applied_at": null, "last_error": "no space left",
            "observed": observed,
        })
    );

    docker.remove("decnet-extra");
    let mut connection = UnixStream::connect(docker.socket()).unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    docker.freeze();
    connection.write_all(b"GET /_ping HTTP/1.0\r\n\r\n").unwrap();
    assert!(connection.read(&mut [0; 1]).is_err(), "a suspended engine does not answer");
    connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    docker.thaw();
    assert_eq!(connection.read(&mut [0; 1]).unwrap(), 1);

    docker.stop();
    assert!(UnixStream::connect(docker.socket()).is_err());
    assert_eq!(runtime(&state_file), json!({}), "the Python agent sends no runtime without Docker");
    docker.start_again();
    let services =
        json!({"ssh": "created", "real_web": "exited", "ftp": "exited", "smb": "absent"});
    assert_eq!(runtime(&state_file)["decky-01"]["services"], services);
}
