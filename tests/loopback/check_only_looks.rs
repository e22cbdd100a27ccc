//! `check` changes nothing on the host, whatever state the outbox is in.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::program::{program, run};
use crate::support::{PATIENCE, Stage};

/// The inode, mode, owner, size, change time and content of each file.
type Files = BTreeMap<PathBuf, (u64, u32, [u32; 2], u64, [i64; 2], Vec<u8>)>;

fn files(folder: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let found = fs::symlink_metadata(&path).unwrap();
        let times = [found.mtime(), found.mtime_nsec()];
        let content = if found.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        files.insert(
            path,
            (found.ino(), found.mode(), [found.uid(), found.gid()], found.len(), times, content),
        );
    }
    files
}

/// The step `outbox` of `check`. Asserts that no file in the agent dir has changed.
fn outbox_of(stage: &Stage) -> Value {
    let before = files(&stage.agent_dir());
    let mut check = program();
    check.arg("--config").arg(stage.dir.path().join("decnet.ini")).args(["check", "--json"]);
    let output = check.stdin(Stdio::null()).output().unwrap();
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let after = files(&stage.agent_dir());
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    for (path, file) in &before {
        assert!(after[path] == *file, "{} was {file:?} and is {:?}", path.display(), after[path]);
    }
    let steps = report["steps"].as_array().unwrap();
    steps.iter().find(|step| step["step"] == "outbox").unwrap().clone()
}

/// A process that is killed at the end of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A `run` that has nothing to do for an hour, and one delta that assert_one_queued for it.
fn idle_run(stage: &Stage) -> Running {
    stage.master.decommission(&stage.worker.uuid);
    let mut run = run(&stage.worker, stage.dir.path());
    let child = Running(
        run.args(["--interval", "1h"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(),
    );
    assert!(stage.master.wait_until(PATIENCE, |seen| !seen.received().is_empty()));
    let mut push = program();
    push.arg("--config").arg(stage.dir.path().join("decnet.ini"));
    push.args(["push", "--operation", "deploy", "--status", "succeeded", "decky-01"]);
    push.output().unwrap();
    child
}

fn assert_one_queued(step: &Value) {
    assert_eq!(
        (&step["outcome"], &step["facts"]["waiting"]),
        (&"ok".into(), &1.into()),
        "{step:#}"
    );
}

fn outbox(stage: &Stage, suffix: &str) -> PathBuf {
    stage.agent_dir().join(format!("heartbeat.db{suffix}"))
}

/// An outbox with one delta, of a process that was stopped.
fn closed() -> Stage {
    let stage = Stage::new();
    let mut child = idle_run(&stage);
    Command::new("kill").arg(child.0.id().to_string()).status().unwrap();
    child.0.wait().unwrap();
    assert!(!outbox(&stage, "-wal").exists());
    stage
}

/// An outbox with one delta, of a process that was killed.
fn crashed() -> Stage {
    let stage = Stage::new();
    drop(idle_run(&stage));
    assert!(fs::metadata(outbox(&stage, "-wal")).unwrap().len() > 0);
    stage
}

#[test]
fn running_run_is_not_disturbed() {
    let stage = Stage::new();
    let child = idle_run(&stage);
    for _ in 0..3 {
        let step = outbox_of(&stage);
        assert_one_queued(&step);
        assert_eq!(step["facts"]["delivered_by"], child.0.id(), "{step:#}");
    }
}

#[test]
fn files_of_an_ended_process_are_read_and_not_changed() {
    assert_one_queued(&outbox_of(&closed()));
    let stage = crashed();
    assert_one_queued(&outbox_of(&stage));
    fs::remove_file(outbox(&stage, "-shm")).unwrap();
    assert_one_queued(&outbox_of(&stage));
    fs::write(outbox(&stage, "-shm"), "").unwrap();
    assert_one_queued(&outbox_of(&stage));
    let stage = closed();
    fs::write(outbox(&stage, "-wal"), "").unwrap();
    assert_one_queued(&outbox_of(&stage));
}

#[test]
fn missing_and_empty_outboxes_are_good() {
    let stage = Stage::new();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    assert_eq!(outbox_of(&stage)["outcome"], "ok");
    fs::write(outbox(&stage, ""), "").unwrap();
    assert_eq!(outbox_of(&stage)["facts"]["waiting"], 0);
}

#[test]
fn mode_that_lets_others_read_gets_advice_and_is_not_changed() {
    for (stage, suffix) in [(closed(), ""), (crashed(), "-wal"), (crashed(), "-shm")] {
        let file = outbox(&stage, suffix);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let step = outbox_of(&stage);
        assert_one_queued(&step);
        let advice = step["advice"].as_str().unwrap();
        assert!(
            advice.starts_with(&format!("other users can read it: chmod 600 {}", file.display())),
            "{advice}"
        );
    }
}

#[test]
fn corrupt_outbox_fails_and_is_not_changed() {
    type Damage = fn(&Stage);
    let damages: [(fn() -> Stage, Damage); 7] = [
        (closed, |stage| {
            fs::write(outbox(stage, ""), "not an outbox, and long enough to be read").unwrap()
        }),
        (closed, |stage| {
            let mut content = fs::read(outbox(stage, "")).unwrap();
            content[4_000..8_000].fill(0xaa);
            fs::write(outbox(stage, ""), content).unwrap();
        }),
        (closed, |stage| {
            let content = fs::read(outbox(stage, "")).unwrap();
            fs::write(outbox(stage, ""), &content[..5_000]).unwrap();
        }),
        (closed, |stage| {
            fs::remove_file(outbox(stage, "")).unwrap();
            fs::create_dir(outbox(stage, "")).unwrap();
        }),
        (closed, |stage| {
            fs::rename(outbox(stage, ""), outbox(stage, "-moved")).unwrap();
            symlink(outbox(stage, "-moved"), outbox(stage, "")).unwrap();
        }),
        (closed, |stage| {
            fs::remove_file(outbox(stage, "-lock")).unwrap();
            assert!(Command::new("mkfifo").arg(outbox(stage, "-lock")).status().unwrap().success());
        }),
        (crashed, |stage| {
            let mut content = fs::read(outbox(stage, "")).unwrap();
            content[100..].fill(0xaa);
            fs::write(outbox(stage, ""), content).unwrap();
            fs::write(outbox(stage, "-wal"), [0xaa; 9_000]).unwrap();
        }),
    ];
    for (number, (stage, damage)) in damages.into_iter().enumerate() {
        let stage = stage();
        damage(&stage);
        let step = outbox_of(&stage);
        assert_eq!(step["outcome"], "failed", "{number}: {step:#}");
        assert!(
            step["advice"].as_str().is_some_and(|advice| !advice.is_empty()),
            "{number}: {step:#}"
        );
    }
}

#[test]
fn topology_is_read_and_not_changed() {
    for mode in ["delete", "wal"] {
        let stage = closed();
        let topology = stage.agent_dir().join("topology.db");
        let database = rusqlite::Connection::open(&topology).unwrap();
        database.pragma_update(None, "journal_mode", mode).unwrap();
        let table = "CREATE TABLE applied_topology (topology_id TEXT PRIMARY KEY, applied_version_hash TEXT,
                     hydrated_blob_json TEXT, applied_at INTEGER, last_error TEXT)";
        database.execute(table, []).unwrap();
        database.close().unwrap();
        assert_one_queued(&outbox_of(&stage));
    }
}

#[test]
fn targets_that_run_would_not_replace_fail_with_advice() {
    let stage = Stage::new();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    let target = stage.dir.path().join("target");
    type Make = fn(&Path);
    let makes: [(Make, bool); 5] = [
        (|_| (), true),
        (|path| fs::write(path, "old").unwrap(), true),
        (|path| symlink("/nonexistent", path).unwrap(), false),
        (|path| fs::create_dir(path).unwrap(), false),
        (|path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()), false),
    ];
    for (number, (make, good)) in makes.into_iter().enumerate() {
        let paths =
            ["stats", "metrics"].map(|what| target.with_extension(format!("{what}-{number}")));
        paths.iter().for_each(|path| make(path));
        let mut check = program();
        check.arg("--config").arg(stage.dir.path().join("decnet.ini")).args(["check", "--json"]);
        check.arg("--stats-file").arg(&paths[0]).arg("--metrics-file").arg(&paths[1]);
        let report: Value =
            serde_json::from_slice(&check.stdin(Stdio::null()).output().unwrap().stdout).unwrap();
        for name in ["stats-file", "metrics-file"] {
            let step = report["steps"]
                .as_array()
                .unwrap()
                .iter()
                .find(|step| step["step"] == name)
                .unwrap();
            assert_eq!(step["outcome"] == "ok", good, "{number}: {step:#}");
            assert_eq!(step["advice"].is_string(), !good, "{number}: {step:#}");
        }
    }
    let mut check = program();
    check.arg("--config").arg(stage.dir.path().join("decnet.ini")).args([
        "check",
        "--stats-file",
        "/dev/null",
    ]);
    let text = String::from_utf8(check.output().unwrap().stdout).unwrap();
    assert!(text.contains("✗ stats-file    /dev/null: "), "{text}");
    assert!(fs::symlink_metadata("/dev/null").unwrap().file_type().is_char_device());
}
