//! `run` as the first process of a container, which has no init and no handlers but its own.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Docker, Loopback, process};

const PATIENCE: Duration = Duration::from_secs(30);

/// A root folder with the program, the libraries that it asks for, and an enrolment.
fn root(folder: &Path, loopback: &Loopback) {
    let program = env!("CARGO_BIN_EXE_decnet-heartbeat");
    fs::copy(program, folder.join("decnet-heartbeat")).unwrap();
    let libraries = process::run(Command::new("ldd").arg(program));
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = folder.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
    loopback.worker.write_ini(&folder.join("etc/decnet/decnet.ini")).unwrap();
}

#[test]
#[ignore = "needs root, docker.io and busybox-static"]
fn it_beats_and_stops_when_it_is_told_and_says_when_it_cannot() {
    let (docker, folder) = (Docker::start(), tempfile::tempdir().unwrap());
    let agent_dir = folder.path().join("etc/decnet/agent");
    let loopback = Loopback::new(&agent_dir);
    root(folder.path(), &loopback);
    docker.import(folder.path(), ".", "heartbeat");
    // The ini names the folder that the image was made of.
    let run = |arguments: &[&str]| {
        let mut docker = docker.client("docker");
        docker.args(["run", "--name", "heartbeat", "--network", "host"]).args(arguments);
        docker.args(["heartbeat", "/decnet-heartbeat", "--agent-dir", "/etc/decnet/agent", "run"]);
        docker.args(["--interval", "100ms"]).output().unwrap()
    };
    assert!(run(&["--detach"]).status.success());
    assert!(loopback.master.wait_for_beats(3, PATIENCE));
    let since = Instant::now();
    process::run(docker.client("docker").args(["stop", "--time", "30", "heartbeat"]));
    assert!(since.elapsed() < Duration::from_secs(20), "it was killed");
    let inspect = ["inspect", "--format", "{{.State.ExitCode}}", "heartbeat"];
    assert_eq!(process::run(docker.client("docker").args(inspect)), "0");
    let log = docker.client("docker").args(["logs", "heartbeat"]).output().unwrap();
    assert!(String::from_utf8_lossy(&log.stderr).contains("signal=SIGTERM"), "{log:?}");
    docker.remove("heartbeat");
    let not_enrolled = run(&["--env", "DECNET_CONFIG=/nonexistent"]);
    assert_eq!(not_enrolled.status.code(), Some(78), "{not_enrolled:?}");
    docker.remove("heartbeat");
}
