//! `run` as the first process of a container, which has no init process.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Docker, Loopback, TIMEOUT, commands};

/// Writes the root folder of an image: the program, its shared libraries, and an enrolment.
fn write_root_folder(folder: &Path, loopback: &Loopback) {
    let program = env!("CARGO_BIN_EXE_decnet-heartbeat");
    fs::copy(program, folder.join("decnet-heartbeat")).unwrap();
    let libraries = commands::run(Command::new("ldd").arg(program));
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = folder.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
    loopback.worker.write_ini(&folder.join("etc/decnet/decnet.ini")).unwrap();
}

#[test]
#[ignore = "needs root, docker.io and busybox-static"]
fn run_as_first_process_stops_on_signal_and_reports_missing_enrolment() {
    let docker = Docker::start();
    let folder = tempfile::tempdir().unwrap();
    let agent_dir = folder.path().join("etc/decnet/agent");
    let loopback = Loopback::new(&agent_dir);
    write_root_folder(folder.path(), &loopback);
    docker.import(folder.path(), ".", "heartbeat");
    // The ini has the path of the folder from which the image was made, so `--agent-dir` is needed.
    let run = |arguments: &[&str]| {
        let mut docker = docker.client("docker");
        docker.args(["run", "--name", "heartbeat", "--network", "host"]).args(arguments);
        docker.args(["heartbeat", "/decnet-heartbeat", "--agent-dir", "/etc/decnet/agent", "run"]);
        docker.args(["--interval", "100ms"]).output().unwrap()
    };
    assert!(run(&["--detach"]).status.success());
    assert!(loopback.master.wait_for_beats(3, TIMEOUT));
    let since = Instant::now();
    commands::run(docker.client("docker").args(["stop", "--time", "30", "heartbeat"]));
    assert!(since.elapsed() < Duration::from_secs(20), "the container was killed");
    let inspect = ["inspect", "--format", "{{.State.ExitCode}}", "heartbeat"];
    assert_eq!(commands::run(docker.client("docker").args(inspect)), "0");
    let log = docker.client("docker").args(["logs", "heartbeat"]).output().unwrap();
    assert!(String::from_utf8_lossy(&log.stderr).contains("signal=SIGTERM"), "{log:?}");
    docker.remove("heartbeat");
    let not_enrolled = run(&["--env", "DECNET_CONFIG=/nonexistent"]);
    assert_eq!(not_enrolled.status.code(), Some(78), "{not_enrolled:?}");
    docker.remove("heartbeat");
}
