//! The peers themselves: what the other tests take for granted of the real master and of Docker.

use crate::support::{Docker, RealMaster};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

fn beat(uuid: &str, more: Value) -> String {
    let mut body = json!({"host_uuid": uuid, "agent_version": "1.0.0", "status": {}});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

fn decky(name: &str, services: &[&str]) -> Value {
    json!({
        "name": name, "ip": "10.0.0.5", "services": services, "distro": "debian", "base_image": "debian:12",
        "hostname": name,
    })
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn the_master_answers_as_the_protocol_says() {
    let (master, folder) = (RealMaster::start(), tempfile::tempdir().unwrap());
    let (ours, sibling) = (folder.path().join("ours"), folder.path().join("sibling"));
    let worker = master.enrol("worker", &ours);
    assert_ne!(master.issue("sibling", &sibling), worker.fingerprint);
    let good = beat(&worker.uuid, json!({}));

    assert_eq!(master.post(&ours, &good), (204, String::new()));
    assert_eq!(master.post(&sibling, &good).0, 403);
    assert_eq!(master.post(&ours, &beat("nobody", json!({}))).0, 404);
    assert_eq!(master.post(&ours, "{}").0, 422);
    assert_eq!(master.post(&ours, &beat(&worker.uuid, json!({"agent_version": 1}))).0, 422);

    let statuses: Vec<_> = master.answers(5).iter().map(|answer| answer.status.unwrap()).collect();
    assert_eq!(statuses, [204, 403, 404, 422, 422]);
    assert!(master.answers(1).iter().all(|answer| answer.path == "/swarm/heartbeat"));
    let handshakes = master.handshakes();
    assert_eq!(handshakes[0].client_port, master.answers(1)[0].client_port);
    assert_eq!(handshakes[0].fingerprint.as_deref(), Some(&*worker.fingerprint));
    assert_eq!((&*handshakes[0].version, handshakes[0].resumed), ("TLSv1.3", false));

    let again = folder.path().join("again");
    let pinned = master.enrol_again(&worker.uuid, "worker", &again).fingerprint;
    assert_eq!((master.post(&ours, &good).0, master.post(&again, &good).0), (403, 204));
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
fn the_master_seals_the_newest_open_row_and_is_the_same_after_a_restart() {
    let (master, folder) = (RealMaster::start(), tempfile::tempdir().unwrap());
    let worker = master.enrol("worker", folder.path());
    assert_eq!(
        std::fs::read(master.ca()).unwrap(),
        std::fs::read(folder.path().join("ca.crt")).unwrap()
    );
    let older = master.open_lifecycle("decky-01", "deploy", &worker.uuid, "pending");
    let newer = master.open_lifecycle("decky-01", "deploy", &worker.uuid, "running");
    let (port, status) = (master.port(), |id| {
        master.rows("decky_lifecycle", json!({"id": id}))[0]["status"].clone()
    });

    master.stop();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    master.start_again();
    assert_eq!(
        (master.port(), status(&older), status(&newer)),
        (port, json!("pending"), json!("running"))
    );

    let delta = json!({"decky_name": "decky-01", "operation": "deploy", "status": "failed", "error": "no image"});
    assert_eq!(
        master.post(folder.path(), &beat(&worker.uuid, json!({"lifecycle": [delta]}))).0,
        204
    );
    assert_eq!((status(&older), status(&newer)), (json!("pending"), json!("failed")));

    master.kill();
    master.start_again();
    assert_eq!((status(&older), status(&newer)), (json!("pending"), json!("failed")));
    assert_eq!(
        master.log().matches("Finished server process").count(),
        1,
        "stopped once, killed once"
    );
}

#[test]
#[ignore = "needs the real master: tests/e2e/setup.sh"]
fn the_master_orders_a_resync_unless_the_hash_that_it_expects_is_reported() {
    let (master, folder) = (RealMaster::start(), tempfile::tempdir().unwrap());
    let worker = master.enrol("worker", folder.path());
    let expected = master.add_topology(&worker.uuid);
    let report = |hash: &str| {
        let topology = json!({"topology_id": expected.id, "applied_version_hash": hash});
        assert_eq!(
            master.post(folder.path(), &beat(&worker.uuid, json!({"topology": topology}))).0,
            204
        );
        master.topology(&expected.id).needs_resync
    };

    assert!(!expected.needs_resync && !report(&expected.hash));
    assert!(report("another"));
    // The order itself is part of what is hashed, so the push that follows hands the host a hash to be refused again.
    assert_ne!(master.topology(&expected.id).hash, expected.hash);
    master.clear_resync(&expected.id);
    assert!(!report(&expected.hash));
    assert_eq!(master.post(folder.path(), &beat(&worker.uuid, json!({}))).0, 204);
    assert!(
        master.topology(&expected.id).needs_resync,
        "no topology in the beat is a mismatch too"
    );
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn docker_runs_what_the_original_agent_sees() {
    let (master, docker, folder) =
        (RealMaster::start(), Docker::start(), tempfile::tempdir().unwrap());
    let (state_file, db) =
        (folder.path().join("decnet-state.json"), folder.path().join("topology.db"));
    let deckies = [decky("decky-01", &["ssh", "real_web", "ftp", "smb"])];
    let config = json!({
        "mode": "swarm", "interface": "eth0", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "deckies": deckies,
    });
    std::fs::write(&state_file, json!({"config": config, "compose_path": "/c.yml"}).to_string())
        .unwrap();
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
    assert!(connection.read(&mut [0; 1]).is_err(), "a frozen engine is silent");
    connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    docker.thaw();
    assert_eq!(connection.read(&mut [0; 1]).unwrap(), 1);

    docker.stop();
    assert!(UnixStream::connect(docker.socket()).is_err());
    assert_eq!(
        runtime(&state_file),
        json!({}),
        "the original sends no runtime when Docker is away"
    );
    docker.start_again();
    let services =
        json!({"ssh": "created", "real_web": "exited", "ftp": "exited", "smb": "absent"});
    assert_eq!(runtime(&state_file)["decky-01"]["services"], services);
}
