//! `check` on a real worker: a real master, a real Docker Engine. Its outputs are those that the page on operations shows.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::{Docker, Stage};

struct Worker {
    stage: Stage,
    docker: Docker,
    folder: tempfile::TempDir,
}

impl Worker {
    fn new() -> Self {
        let worker = Self {
            stage: Stage::new(),
            docker: Docker::start(),
            folder: tempfile::tempdir().unwrap(),
        };
        let ini = format!(
            "[decnet]\nmode = agent\n[agent]\nhost-uuid = {}\nmaster-host = 127.0.0.1\nswarmctl-port = {}\nagent-dir = {}\n",
            worker.stage.worker.uuid,
            worker.stage.master.port(),
            worker.stage.agent_dir().display()
        );
        std::fs::write(worker.path("decnet.ini"), ini).unwrap();
        let decky = |name: &str, services: &[&str]| {
            json!({"name": name, "ip": "10.0.0.5", "services": services, "distro": "debian", "base_image": "debian:12",
                   "hostname": name})
        };
        let deckies = json!([decky("decky-01", &["ssh", "ftp"]), decky("decky-02", &["http"])]);
        let state = json!({"config": {"mode": "swarm", "deckies": deckies}, "compose_path": "/opt/decnet/c.yml"});
        std::fs::write(worker.path("state.json"), state.to_string()).unwrap();
        for name in ["decky-01-ssh", "decky-01-ftp", "decky-02-http"] {
            worker.docker.run(name);
        }
        worker
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What it says, and what it exits with.
    fn check(&self) -> (String, Option<i32>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
        command.env_clear().arg("--config").arg(self.path("decnet.ini")).arg("check");
        command
            .arg("--state-file")
            .arg(self.path("state.json"))
            .arg("--docker-socket")
            .arg(self.docker.socket());
        let output = command.output().unwrap();
        (String::from_utf8(output.stdout).unwrap(), output.status.code())
    }
}

/// The output that the page on operations shows under this heading.
fn shown(heading: &str) -> Vec<&'static str> {
    let page = include_str!("../../src/docs/operations.md");
    let section = page.split_once(heading).unwrap_or_else(|| panic!("no {heading} in the page")).1;
    section.split("```text\n").nth(1).unwrap().split("```").next().unwrap().lines().collect()
}

/// A line without what differs from host to host: of a step its mark and its name, of anything else all but a fingerprint.
fn same(line: &str) -> String {
    if line.starts_with(['✓', '✗', '-']) {
        return line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    }
    let is_fingerprint =
        |word: &&str| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    line.split(' ')
        .map(|word| if is_fingerprint(&word) { "…" } else { word })
        .collect::<Vec<_>>()
        .join(" ")
}

/// The documented lines are in the output, in the same order; `…` stands for omitted lines.
fn is_as_shown(heading: &str, (said, code): (String, Option<i32>), expected: i32) {
    assert_eq!(code, Some(expected), "{said}");
    let mut lines = said.lines().map(same);
    let mut skips = false;
    for shown in shown(heading) {
        if shown == "…" {
            skips = true;
            continue;
        }
        let found = if skips { lines.find(|line| *line == same(shown)) } else { lines.next() };
        assert_eq!(found.as_deref(), Some(same(shown).as_str()), "{heading}: {shown}\n{said}");
        skips = false;
    }
    assert!(skips || lines.next().is_none(), "{heading} shows less than\n{said}");
}

fn copy_identity(from: &Path, to: &Path) {
    for name in ["worker.crt", "worker.key"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn documented_outputs_of_check_are_its_outputs() {
    let worker = Worker::new();
    is_as_shown("**A healthy worker.**", worker.check(), 0);

    let (dir, own, other) = (worker.stage.agent_dir(), worker.path("own"), worker.path("other"));
    std::fs::create_dir(&own).unwrap();
    copy_identity(dir, &own);
    worker.stage.master.issue("worker-01", &other);
    copy_identity(&other, dir);
    is_as_shown("**A wrong certificate.**", worker.check(), 1);
    copy_identity(&own, dir);

    worker.stage.master.stop();
    is_as_shown("**The master is down.**", worker.check(), 1);
    worker.stage.master.start_again();

    worker.docker.stop();
    is_as_shown("**Docker is stopped.**", worker.check(), 1);
}
