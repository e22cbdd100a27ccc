//! Paths that are not UTF-8 work everywhere.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decnet_heartbeat::loopback::RowStatus;
use decnet_heartbeat::{EnrolmentSources, Heartbeat, OutboxLocation};
use serde_json::Value;

use crate::support::{
    ChildProcess, Fixture, TIMEOUT, nothing_deployed, program, start_docker, wait_for_stats,
};

/// A worker with all its files in a folder whose name is not UTF-8.
struct Worker {
    fixture: Fixture,
    folder: PathBuf,
}

impl Worker {
    fn new() -> Self {
        let fixture = Fixture::new();
        let folder = fixture.path(OsStr::from_bytes(b"a\xff"));
        fs::create_dir(&folder).unwrap();
        fs::rename(fixture.agent_dir(), folder.join("agent")).unwrap();
        let agent = format!(
            "host-uuid = {}\nmaster-host = 127.0.0.1\nswarmctl-port = {}\n",
            fixture.worker.uuid, fixture.worker.port
        );
        fs::write(folder.join("decnet.ini"), format!("[decnet]\nmode = agent\n[agent]\n{agent}"))
            .unwrap();
        let decky = r#"{"config": {"mode": "swarm", "deckies": [{"name": "d1", "services": []}]}, "compose_path": "/x"}"#;
        fs::write(folder.join("state.json"), decky).unwrap();
        Self { fixture, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The program, with the ini and the agent dir given in this way.
    fn program(&self, given: Given) -> Command {
        let mut command = program();
        match given {
            Given::AsVariables => {
                command.env("DECNET_CONFIG", self.path("decnet.ini"));
                command.env("DECNET_AGENT_DIR", self.path("agent"));
                command.env("DECNET_HEARTBEAT_STATE_FILE", self.path("state.json"));
            }
            Given::AsOptions => {
                command.arg("--config").arg(self.path("decnet.ini"));
                command.arg("--agent-dir").arg(self.path("agent"));
            }
        }
        command
    }

    /// Adds the options for other paths, which `run` and `check` have.
    fn add_options(&self, command: &mut Command, given: Given) {
        if given == Given::AsOptions {
            command.arg("--state-file").arg(self.path("state.json"));
            command.arg("--outbox").arg(self.path("outbox.db"));
        }
        command.arg("--docker-socket").arg(self.path("docker.sock"));
        command.arg("--stats-file").arg(self.path("stats.json"));
        command.arg("--metrics-file").arg(self.path("x.prom"));
    }
}

/// How the program is given its paths.
#[derive(Clone, Copy, PartialEq)]
enum Given {
    AsVariables,
    AsOptions,
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn run_push_and_check_work_in_a_non_utf8_folder() {
    for given in [Given::AsOptions, Given::AsVariables] {
        let worker = Worker::new();
        start_docker(&worker.path("docker.sock"));
        let outbox = match given {
            Given::AsVariables => worker.path("agent/heartbeat.db"),
            Given::AsOptions => worker.path("outbox.db"),
        };
        let log = worker.path("log");
        let mut run = worker.program(given);
        run.arg("--log-file").arg(&log).args(["run", "--interval", "50ms"]);
        worker.add_options(&mut run, given);
        let run = ChildProcess::start(run.stdout(Stdio::null()).stderr(Stdio::null()));
        assert!(worker.fixture.master.wait_for_beats(3, TIMEOUT));
        let mut push = worker.program(given);
        push.args(["push", "--operation", "deploy", "--status", "succeeded", "d1"]);
        if given == Given::AsOptions {
            push.arg("--outbox").arg(&outbox);
        }
        worker.fixture.master.open_operation(&worker.fixture.worker.uuid, "d1", "deploy");
        let pushed = push.output().unwrap();
        assert_eq!(pushed.status.code(), Some(0), "{pushed:?}");
        worker.fixture.wait_for_closed_rows(1);
        assert_eq!(worker.fixture.master.rows()[0].status, RowStatus::Succeeded);
        drop(run);
        let mut check = worker.program(given);
        check.arg("check").arg("--json");
        worker.add_options(&mut check, given);
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
        let beat = worker.fixture.master.received().pop().unwrap().json.unwrap();
        assert_eq!(beat["status"]["deckies"][0]["name"], "d1", "{beat}");
    }
}

#[test]
fn agent_dir_is_found_in_a_non_utf8_home() {
    let worker = Worker::new();
    let sources =
        EnrolmentSources::from_variables([(OsStr::new("HOME"), worker.folder.as_os_str())]);
    let enrolment = sources.config(worker.path("decnet.ini")).read().unwrap();
    if !Path::new("/etc/decnet/agent").exists() {
        assert_eq!(enrolment.agent_dir().value(), &worker.path(".decnet/agent"));
    }
}

#[test]
fn stats_show_the_path_of_the_outbox() {
    let worker = Worker::new();
    let enrolment = EnrolmentSources::from_variables([("HOME", "/nonexistent")])
        .config(worker.path("decnet.ini"));
    let heartbeat = Heartbeat::builder()
        .enrolment(enrolment.agent_dir(worker.path("agent")).read().unwrap())
        .status_source(nothing_deployed)
        .outbox(OutboxLocation::File(worker.path("outbox.db")))
        .start()
        .unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    assert_eq!(stats.outbox.as_deref(), Some(worker.path("outbox.db").as_path()));
    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!(json["outbox"], worker.path("outbox.db").to_string_lossy().into_owned());
}
