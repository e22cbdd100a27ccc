//! `check` changes nothing on the host, whatever state the outbox is in.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::check::step_of;
use crate::support::{ChildProcess, Fixture, TIMEOUT, make_fifo, program};

/// What `check` must not change of a file.
#[derive(Debug, PartialEq)]
struct FileState {
    inode: u64,
    mode: u32,
    owner: [u32; 2],
    size: u64,
    changed: [i64; 2],
    content: Vec<u8>,
}

impl FileState {
    fn of(path: &Path) -> Self {
        let found = fs::symlink_metadata(path).unwrap();
        Self {
            inode: found.ino(),
            mode: found.mode(),
            owner: [found.uid(), found.gid()],
            size: found.len(),
            changed: [found.mtime(), found.mtime_nsec()],
            content: if found.is_file() { fs::read(path).unwrap() } else { Vec::new() },
        }
    }
}

fn files(folder: &Path) -> BTreeMap<PathBuf, FileState> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.clone(), FileState::of(&path))).collect()
}

fn check_json(fixture: &Fixture, arguments: &[&Path]) -> Output {
    let mut check = program();
    check.arg("--config").arg(fixture.ini()).args(["check", "--json"]).args(arguments);
    check.stdin(Stdio::null()).output().unwrap()
}

/// The step `outbox` of `check`. Asserts that no file in the agent dir has changed.
fn outbox_of(fixture: &Fixture) -> Value {
    let before = files(&fixture.agent_dir());
    let output = check_json(fixture, &[]);
    let after = files(&fixture.agent_dir());
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (path, file) in &before {
        assert!(after[path] == *file, "{} was {file:?} and is {:?}", path.display(), after[path]);
    }
    step_of(&output, "outbox")
}

/// A `run` that has nothing to do for an hour, with one delta queued for it.
fn idle_run(fixture: &Fixture) -> ChildProcess {
    fixture.master.decommission(&fixture.worker.uuid);
    let mut run = fixture.run_command();
    let run = run.args(["--interval", "1h"]).stdout(Stdio::null()).stderr(Stdio::null());
    let child = ChildProcess::start(run);
    fixture.wait_for_requests(1);
    let mut push = program();
    push.arg("--config").arg(fixture.ini());
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

fn outbox(fixture: &Fixture, suffix: &str) -> PathBuf {
    fixture.agent_dir().join(format!("heartbeat.db{suffix}"))
}

/// An outbox with one delta, of a process that was stopped.
fn closed() -> Fixture {
    let fixture = Fixture::new();
    idle_run(&fixture).terminate(TIMEOUT);
    assert!(!outbox(&fixture, "-wal").exists());
    fixture
}

/// An outbox with one delta, of a process that was killed.
fn crashed() -> Fixture {
    let fixture = Fixture::new();
    drop(idle_run(&fixture));
    assert!(fs::metadata(outbox(&fixture, "-wal")).unwrap().len() > 0);
    fixture
}

#[test]
fn running_run_is_not_disturbed() {
    let fixture = Fixture::new();
    let child = idle_run(&fixture);
    for _ in 0..3 {
        let step = outbox_of(&fixture);
        assert_one_queued(&step);
        assert_eq!(step["facts"]["delivered_by"], child.id(), "{step:#}");
    }
}

#[test]
fn files_of_an_ended_process_are_read_and_not_changed() {
    assert_one_queued(&outbox_of(&closed()));
    let fixture = crashed();
    assert_one_queued(&outbox_of(&fixture));
    fs::remove_file(outbox(&fixture, "-shm")).unwrap();
    assert_one_queued(&outbox_of(&fixture));
    fs::write(outbox(&fixture, "-shm"), "").unwrap();
    assert_one_queued(&outbox_of(&fixture));
    let fixture = closed();
    fs::write(outbox(&fixture, "-wal"), "").unwrap();
    assert_one_queued(&outbox_of(&fixture));
}

#[test]
fn missing_and_empty_outboxes_are_good() {
    let fixture = Fixture::new();
    fixture.write_ini();
    assert_eq!(outbox_of(&fixture)["outcome"], "ok");
    fs::write(outbox(&fixture, ""), "").unwrap();
    assert_eq!(outbox_of(&fixture)["facts"]["waiting"], 0);
}

#[test]
fn mode_that_lets_others_read_gets_advice_and_is_not_changed() {
    for (fixture, suffix) in [(closed(), ""), (crashed(), "-wal"), (crashed(), "-shm")] {
        let file = outbox(&fixture, suffix);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let step = outbox_of(&fixture);
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
    type Damage = fn(&Fixture);
    let damages: [(fn() -> Fixture, Damage); 7] = [
        (closed, |fixture| {
            fs::write(outbox(fixture, ""), "not an outbox, and long enough to be read").unwrap()
        }),
        (closed, |fixture| {
            let mut content = fs::read(outbox(fixture, "")).unwrap();
            content[4_000..8_000].fill(0xaa);
            fs::write(outbox(fixture, ""), content).unwrap();
        }),
        (closed, |fixture| {
            let content = fs::read(outbox(fixture, "")).unwrap();
            fs::write(outbox(fixture, ""), &content[..5_000]).unwrap();
        }),
        (closed, |fixture| {
            fs::remove_file(outbox(fixture, "")).unwrap();
            fs::create_dir(outbox(fixture, "")).unwrap();
        }),
        (closed, |fixture| {
            fs::rename(outbox(fixture, ""), outbox(fixture, "-moved")).unwrap();
            symlink(outbox(fixture, "-moved"), outbox(fixture, "")).unwrap();
        }),
        (closed, |fixture| {
            fs::remove_file(outbox(fixture, "-lock")).unwrap();
            make_fifo(&outbox(fixture, "-lock"));
        }),
        (crashed, |fixture| {
            let mut content = fs::read(outbox(fixture, "")).unwrap();
            content[100..].fill(0xaa);
            fs::write(outbox(fixture, ""), content).unwrap();
            fs::write(outbox(fixture, "-wal"), [0xaa; 9_000]).unwrap();
        }),
    ];
    for (number, (fixture, damage)) in damages.into_iter().enumerate() {
        let fixture = fixture();
        damage(&fixture);
        let step = outbox_of(&fixture);
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
        let fixture = closed();
        let topology = fixture.agent_dir().join("topology.db");
        let database = rusqlite::Connection::open(&topology).unwrap();
        database.pragma_update(None, "journal_mode", mode).unwrap();
        let table = "CREATE TABLE applied_topology (topology_id TEXT PRIMARY KEY, applied_version_hash TEXT,
                     hydrated_blob_json TEXT, applied_at INTEGER, last_error TEXT)";
        database.execute(table, []).unwrap();
        database.close().unwrap();
        assert_one_queued(&outbox_of(&fixture));
    }
}

#[test]
fn targets_that_run_would_not_replace_fail_with_advice() {
    let fixture = Fixture::new();
    fixture.write_ini();
    let target = fixture.path("target");
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
        let options = [
            Path::new("--stats-file"),
            paths[0].as_path(),
            Path::new("--metrics-file"),
            paths[1].as_path(),
        ];
        let output = check_json(&fixture, &options);
        for name in ["stats-file", "metrics-file"] {
            let step = step_of(&output, name);
            assert_eq!(step["outcome"] == "ok", good, "{number}: {step:#}");
            assert_eq!(step["advice"].is_string(), !good, "{number}: {step:#}");
        }
    }
    let mut check = program();
    check.arg("--config").arg(fixture.ini()).args(["check", "--stats-file", "/dev/null"]);
    let text = String::from_utf8(check.output().unwrap().stdout).unwrap();
    assert!(text.contains("✗ stats-file    /dev/null: "), "{text}");
    assert!(fs::symlink_metadata("/dev/null").unwrap().file_type().is_char_device());
}
