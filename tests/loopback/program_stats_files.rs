//! `--stats-file` and `--metrics-file`: which files they may replace.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::program::run;
use crate::program_signals::after;
use crate::support::{PATIENCE, Running, Stage, line_with, lines};

/// The limit for a stop, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

#[test]
fn target_other_than_a_regular_file_exits_78_and_stays() {
    let stage = Stage::new();
    let at = |name: &str| stage.dir.path().join(name);
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("file"), "theirs").unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink("/dev/null", at("null")).unwrap();
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    for option in ["--stats-file", "--metrics-file"] {
        for (name, what) in [
            ("socket", "a socket"),
            ("folder", "a directory"),
            ("link", "a symlink"),
            ("null", "a symlink"),
            ("fifo", "a FIFO"),
        ] {
            let before = fs::symlink_metadata(at(name)).unwrap().file_type();
            let mut running =
                Running::start(run(&stage.worker, stage.dir.path()).arg(option).arg(at(name)));
            let code = running.end(PROMPT).code();
            let mut message = String::new();
            running.0.stderr.take().unwrap().read_to_string(&mut message).unwrap();
            assert_eq!(code, Some(78), "{message}");
            let expected = format!(
                "decnet-heartbeat: {option}: {} cannot be replaced; name a regular file, or a path that does not exist: it is \
                 {what}, not a regular file\n",
                at(name).display()
            );
            assert_eq!(message, expected);
            assert_eq!(fs::symlink_metadata(at(name)).unwrap().file_type(), before);
        }
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "theirs");
    assert_eq!(stage.master.received().len(), 0);
}

#[test]
fn later_replacement_of_the_target_is_not_replaced() {
    let stage = Stage::new();
    let stats = stage.dir.path().join("stats.json");
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(
        command.args(["--log-level", "trace", "--interval", "50ms", "--stats-file"]).arg(&stats),
    );
    let log = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    let is_fifo = || fs::symlink_metadata(&stats).unwrap().file_type().is_fifo();
    let fifo = stage.dir.path().join("fifo");
    let lines = std::iter::repeat_with(|| {
        // The file may have replaced the FIFO between the check and the rename.
        if !is_fifo() {
            assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
            fs::rename(&fifo, &stats).unwrap();
        }
        line_with(&log, "")
    });
    let line =
        lines.take(100).find(|line| line.contains("stats file cannot be written: ")).unwrap();
    assert!(
        line.contains("(stats-files)") && line.contains("it is a FIFO, not a regular file"),
        "{line}"
    );
    let beats = stage.master.received().len();
    stage.requests(beats + 3);
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(is_fifo());
}

#[test]
fn failed_write_leaves_no_file() {
    let stage = Stage::new();
    let stats = stage.dir.path().join("stats");
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms", "--stats-file"]).arg(&stats);
    // Files may grow to 512 bytes.
    let mut running = Running::start(after("ulimit -f 1", &command).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    line_with(&log, "stats file cannot be written: ");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(!stats.exists() && !stage.dir.path().join("stats.new").exists());
}

#[test]
fn obstacle_of_the_temporary_file_is_named() {
    let stage = Stage::new();
    let stats = stage.dir.path().join("stats");
    let next = stage.dir.path().join("stats.new");
    fs::create_dir(&next).unwrap();
    let mut running =
        Running::start(run(&stage.worker, stage.dir.path()).arg("--stats-file").arg(&stats));
    let log = lines(running.0.stderr.take().unwrap());
    let line = line_with(&log, "stats file cannot be written: ");
    assert!(line.contains(&format!("error=\"{} cannot be removed: ", next.display())), "{line}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn paths_may_be_other_than_utf8() {
    let stage = Stage::new();
    let [stats, metrics] = [&b"stats-\xff"[..], b"metrics-\xff"]
        .map(|name| stage.dir.path().join(OsStr::from_bytes(name)));
    let mut command = run(&stage.worker, stage.dir.path());
    command
        .args(["--interval", "50ms", "--stats-file"])
        .arg(&stats)
        .arg("--metrics-file")
        .arg(&metrics);
    let mut running = Running::start(command.stderr(Stdio::null()));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(stats).unwrap().contains("\"beats\": "));
    assert!(fs::read_to_string(metrics).unwrap().contains("decnet_heartbeat_beats_total "));
}

/// The messages of `run` and `check` that reject this target. Checks their exit codes.
fn rejections(
    stage: &Stage,
    option: &str,
    path: &std::path::Path,
    others: &[&OsStr],
) -> Vec<String> {
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    let messages = ["run", "check"].map(|name| {
        let mut command = crate::program::program();
        command.arg("--config").arg(&ini).arg(name).arg(option).arg(path).args(others);
        let output = command
            .env("DECNET_HEARTBEAT_STATE_FILE", stage.dir.path().join("state"))
            .output()
            .unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let line = text
            .lines()
            .find(|line| line.contains("which would be replaced"))
            .unwrap_or_else(|| panic!("{text}"));
        assert_eq!(output.status.code(), Some(if name == "run" { 78 } else { 1 }), "{text}");
        line.to_owned()
    });
    messages.to_vec()
}

#[test]
fn own_files_of_the_heartbeat_are_not_valid_targets() {
    let stage = Stage::new();
    let dir = stage.dir.path();
    let agent = stage.agent_dir();
    fs::write(dir.join("state"), "{}").unwrap();
    let own = [
        agent.join("worker.key"),
        agent.join("ca.crt"),
        agent.join("topology.db"),
        agent.join("heartbeat.db"),
        agent.join("heartbeat.db-wal"),
        dir.join("decnet.ini"),
        dir.join("state"),
        agent.join("../agent/./worker.crt"),
    ];
    for (option, path) in
        own.iter().flat_map(|path| [("--stats-file", path), ("--metrics-file", path)])
    {
        let before = fs::read(path).ok();
        for line in rejections(&stage, option, path, &[]) {
            assert!(line.contains(std::path::absolute(path).unwrap().to_str().unwrap()), "{line}");
        }
        assert!(
            path.ends_with("decnet.ini") || fs::read(path).ok() == before,
            "{}",
            path.display()
        );
    }
    let both = dir.join("both");
    let log = dir.join("log");
    rejections(&stage, "--stats-file", &both, &["--metrics-file".as_ref(), both.as_os_str()]);
    rejections(&stage, "--stats-file", &log, &["--log-file".as_ref(), log.as_os_str()]);
    rejections(&stage, "--metrics-file", &both, &["--outbox".as_ref(), both.as_os_str()]);
}
