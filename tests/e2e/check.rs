//! `check` on a worker with a real master and a real Docker Engine. Its outputs equal those in the
//! page on operations.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Docker, EnrolledHost, decky, write_state_file};

struct Worker {
    host: EnrolledHost,
    docker: Docker,
    folder: tempfile::TempDir,
}

impl Worker {
    fn new() -> Self {
        let host = EnrolledHost::new();
        let docker = Docker::start();
        let worker = Self { host, docker, folder: tempfile::tempdir().unwrap() };
        worker.host.write_ini(&worker.path("decnet.ini"));
        let deckies = [decky("decky-01", &["ssh", "ftp"]), decky("decky-02", &["http"])];
        write_state_file(&worker.path("state.json"), &deckies);
        for name in ["decky-01-ssh", "decky-01-ftp", "decky-02-http"] {
            worker.docker.run(name);
        }
        worker
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The output and the exit code of `check`.
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

/// The output in the page on operations under this heading.
fn documented_output(heading: &str) -> Vec<&'static str> {
    let page = include_str!("../../src/docs/operations.md");
    let section = page.split_once(heading).unwrap_or_else(|| panic!("no {heading} in the page")).1;
    section.split("```text\n").nth(1).unwrap().split("```").next().unwrap().lines().collect()
}

/// A line without the parts that differ between hosts: the mark and the name of a step, or any
/// other line without its fingerprint.
fn normalize(line: &str) -> String {
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

/// Asserts that the output has the documented lines in the same order. `…` stands for omitted
/// lines.
fn assert_documented(heading: &str, (output, code): (String, Option<i32>), expected: i32) {
    assert_eq!(code, Some(expected), "{output}");
    let mut lines = output.lines().map(normalize);
    let mut skips = false;
    for expected_line in documented_output(heading) {
        if expected_line == "…" {
            skips = true;
            continue;
        }
        let found =
            if skips { lines.find(|line| *line == normalize(expected_line)) } else { lines.next() };
        assert_eq!(
            found.as_deref(),
            Some(normalize(expected_line).as_str()),
            "{heading}: {expected_line}\n{output}"
        );
        skips = false;
    }
    assert!(skips || lines.next().is_none(), "{heading} has fewer lines than\n{output}");
}

fn copy_identity(from: &Path, to: &Path) {
    for name in ["worker.crt", "worker.key"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
#[ignore = "needs root, docker.io and busybox-static, and the real master: tests/e2e/setup.sh"]
fn output_of_check_equals_documented_output() {
    let worker = Worker::new();
    assert_documented("**A healthy worker.**", worker.check(), 0);

    let dir = worker.host.agent_dir();
    let own = worker.path("own");
    let other = worker.path("other");
    std::fs::create_dir(&own).unwrap();
    copy_identity(dir, &own);
    worker.host.master.issue("worker-01", &other);
    copy_identity(&other, dir);
    assert_documented("**A wrong certificate.**", worker.check(), 1);
    copy_identity(&own, dir);

    worker.host.master.stop();
    assert_documented("**The master is down.**", worker.check(), 1);
    worker.host.master.start_again();

    worker.docker.stop();
    assert_documented("**Docker is stopped.**", worker.check(), 1);
}
