//! A path that is not UTF-8 is a path like any other.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decnet_heartbeat::loopback::RowStatus;
use decnet_heartbeat::{EnrolmentSources, Heartbeat, OutboxLocation};
use serde_json::Value;

use crate::check::start_docker;
use crate::program::program;
use crate::support::{PATIENCE, Stage, nothing_deployed, settled};

/// A worker with everything in a folder of this name.
struct Worker {
    stage: Stage,
    folder: PathBuf,
}

impl Worker {
    fn new() -> Self {
        let stage = Stage::new();
        let folder = stage.dir.path().join(OsStr::from_bytes(b"a\xff"));
        fs::create_dir(&folder).unwrap();
        fs::rename(stage.agent_dir(), folder.join("agent")).unwrap();
        let (host, port) = ("127.0.0.1", stage.worker.port);
        let agent = format!(
            "host-uuid = {}\nmaster-host = {host}\nswarmctl-port = {port}\n",
            stage.worker.uuid
        );
        fs::write(folder.join("decnet.ini"), format!("[decnet]\nmode = agent\n[agent]\n{agent}"))
            .unwrap();
        let decky = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": []}]}, "compose_path": "/x"}"#;
        fs::write(folder.join("state.json"), decky).unwrap();
        Self { stage, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// With the paths as options, or as variables.
    fn program(&self, in_environment: bool) -> Command {
        let mut command = program();
        if in_environment {
            command
                .env("DECNET_CONFIG", self.path("decnet.ini"))
                .env("DECNET_AGENT_DIR", self.path("agent"));
            command.env("DECNET_HEARTBEAT_STATE_FILE", self.path("state.json"));
        } else {
            command
                .arg("--config")
                .arg(self.path("decnet.ini"))
                .arg("--agent-dir")
                .arg(self.path("agent"));
        }
        command
    }

    fn options(&self, command: &mut Command, in_environment: bool) {
        if !in_environment {
            command
                .arg("--state-file")
                .arg(self.path("state.json"))
                .arg("--outbox")
                .arg(self.path("outbox.db"));
        }
        command.arg("--docker-socket").arg(self.path("docker.sock"));
        command
            .arg("--stats-file")
            .arg(self.path("stats.json"))
            .arg("--metrics-file")
            .arg(self.path("x.prom"));
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn run_push_and_check_work_in_a_folder_that_is_not_utf_8() {
    for in_environment in [false, true] {
        let worker = Worker::new();
        start_docker(&worker.path("docker.sock"));
        let outbox = if in_environment {
            worker.path("agent/heartbeat.db")
        } else {
            worker.path("outbox.db")
        };
        let log = worker.path("log");
        let mut run = worker.program(in_environment);
        run.arg("--log-file").arg(&log).args(["run", "--interval", "50ms"]);
        worker.options(&mut run, in_environment);
        let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        assert!(worker.stage.master.wait_for_beats(3, PATIENCE));
        let mut push = worker.program(in_environment);
        push.args(["push", "--operation", "deploy", "--status", "succeeded", "d1"]);
        if !in_environment {
            push.arg("--outbox").arg(&outbox);
        }
        let row = worker.stage.master.open_operation(&worker.stage.worker.uuid, "d1", "deploy");
        let pushed = push.output().unwrap();
        assert_eq!(pushed.status.code(), Some(0), "{pushed:?}");
        let is_closed = |status: RowStatus| status == RowStatus::Succeeded;
        assert!(
            worker
                .stage
                .master
                .wait_until(PATIENCE, |seen| seen.rows().iter().any(|row| is_closed(row.status))),
            "{row}"
        );
        run.kill().unwrap();
        run.wait().unwrap();
        let mut check = worker.program(in_environment);
        check.arg("check").arg("--json");
        worker.options(&mut check, in_environment);
        let checked = check.stdin(Stdio::null()).output().unwrap();
        let report: Value = serde_json::from_slice(&checked.stdout).unwrap();
        assert_eq!(report["works"], true, "{report:#}");
        assert!(
            outbox.exists() && fs::read_to_string(&log).unwrap().contains("first beat accepted")
        );
        let stats = json(&worker.path("stats.json"));
        assert_eq!(stats["outbox"], outbox.to_string_lossy().into_owned(), "{stats:#}");
        assert!(
            fs::read_to_string(worker.path("x.prom"))
                .unwrap()
                .contains("decnet_heartbeat_outbox_durable 1")
        );
        let beat = worker.stage.master.received().pop().unwrap().json.unwrap();
        assert_eq!(beat["status"]["deckies"][0]["name"], "d1", "{beat}");
    }
}

#[test]
fn a_home_that_is_not_utf_8_has_the_agent_dir() {
    let worker = Worker::new();
    let sources =
        EnrolmentSources::from_variables([(OsStr::new("HOME"), worker.folder.as_os_str())]);
    let enrolment = sources.config(worker.path("decnet.ini")).read().unwrap();
    if !Path::new("/etc/decnet/agent").exists() {
        assert_eq!(enrolment.agent_dir().value(), &worker.path(".decnet/agent"));
    }
}

#[test]
fn a_librarys_outbox_and_its_stats_are_the_same_path() {
    let worker = Worker::new();
    let enrolment = EnrolmentSources::from_variables([("HOME", "/nonexistent")])
        .config(worker.path("decnet.ini"));
    let heartbeat = Heartbeat::builder()
        .enrolment(enrolment.agent_dir(worker.path("agent")).read().unwrap())
        .status_source(nothing_deployed)
        .outbox(OutboxLocation::File(worker.path("outbox.db")))
        .start()
        .unwrap();
    let stats = settled(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.outbox.as_deref(), Some(worker.path("outbox.db").as_path()));
    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!(json["outbox"], worker.path("outbox.db").to_string_lossy().into_owned());
}
