//! `push` beside `run`, with the real master.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::{ChildProcess, Docker, EnrolledHost, decky, write_state_file};

/// The program with this ini.
fn program(ini: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    command.env_clear().arg("--config").arg(ini).args(arguments);
    command
}

#[test]
#[ignore = "needs the real master (tests/e2e/setup.sh), and root and Docker"]
fn master_sees_shards_and_lifecycle_change_together() {
    let host = EnrolledHost::new();
    let docker = Docker::start();
    let folder = tempfile::tempdir().unwrap();
    let ini = folder.path().join("decnet.ini");
    let state_file = folder.path().join("state.json");
    host.write_ini(&ini);
    let mut command = program(&ini, &["run", "--interval", "1h"]);
    command.arg("--state-file").arg(&state_file).arg("--docker-socket").arg(docker.socket());
    let _run = ChildProcess::start(command.stderr(Stdio::null()));
    assert_eq!(host.wait_for_statuses(1), [204]);
    assert!(host.shards().is_empty());
    let row = host.master.open_lifecycle("decky-01", "deploy", &host.worker.uuid, "running");

    docker.run("decky-01-ssh");
    write_state_file(&state_file, &[decky("decky-01", &["ssh"])]);
    let arguments = ["push", "--operation", "deploy", "--status", "succeeded", "decky-01"];
    let pushed = program(&ini, &arguments).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&pushed.stdout), "delivered\n", "{pushed:?}");
    assert_eq!(host.lifecycle_row(&row)["status"], json!("succeeded"));
    let shards = host.shards();
    assert_eq!(shards.len(), 1, "{shards:?}");
    assert_eq!(shards[0]["decky_name"], json!("decky-01"));
    assert_eq!(shards[0]["state"], json!("running"));
    let answers = host.master.answers(2);
    assert_eq!(answers.len(), 2, "one beat has both");
    assert_eq!(answers[0].client_port, answers[1].client_port, "on the open connection");
}
