//! `--stats-file` and `--metrics-file`: which files they may replace.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::support::{
    ChildProcess, Fixture, TIMEOUT, in_shell_after, make_fifo, program, wait_for_line,
};

/// The limit for a stop, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

#[test]
fn target_other_than_a_regular_file_exits_78_and_stays() {
    let fixture = Fixture::new();
    let at = |name: &str| fixture.path(name);
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("file"), "theirs").unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink("/dev/null", at("null")).unwrap();
    make_fifo(&at("fifo"));
    for option in ["--stats-file", "--metrics-file"] {
        for (name, what) in [
            ("socket", "a socket"),
            ("folder", "a directory"),
            ("link", "a symlink"),
            ("null", "a symlink"),
            ("fifo", "a FIFO"),
        ] {
            let before = fs::symlink_metadata(at(name)).unwrap().file_type();
            let mut running = ChildProcess::start(fixture.run_command().arg(option).arg(at(name)));
            let code = running.wait(PROMPT).code();
            let mut message = String::new();
            running.0.stderr.take().unwrap().read_to_string(&mut message).unwrap();
            assert_eq!(code, Some(78), "{message}");
            let expected = format!(
                "decnet-heartbeat: {option}: {} cannot be replaced; name a regular file, or a path that does not exist: it is {what}, \
                 not a regular file\n",
                at(name).display()
            );
            assert_eq!(message, expected);
            assert_eq!(fs::symlink_metadata(at(name)).unwrap().file_type(), before);
        }
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "theirs");
    assert_eq!(fixture.master.received().len(), 0);
}

#[test]
fn later_replacement_of_the_target_is_not_replaced() {
    let fixture = Fixture::new();
    let stats = fixture.path("stats.json");
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(
        command.args(["--log-level", "trace", "--interval", "50ms", "--stats-file"]).arg(&stats),
    );
    let log = running.stderr_lines();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    let is_fifo = || fs::symlink_metadata(&stats).unwrap().file_type().is_fifo();
    let fifo = fixture.path("fifo");
    let lines = std::iter::repeat_with(|| {
        // The file may have replaced the FIFO between the check and the rename.
        if !is_fifo() {
            make_fifo(&fifo);
            fs::rename(&fifo, &stats).unwrap();
        }
        wait_for_line(&log, "")
    });
    let line =
        lines.take(100).find(|line| line.contains("stats file cannot be written: ")).unwrap();
    assert!(line.contains("(stats-files)") && line.contains("it is a FIFO"), "{line}");
    fixture.wait_for_more_requests(3);
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(is_fifo());
}

#[test]
fn failed_write_leaves_no_file() {
    let fixture = Fixture::new();
    let stats = fixture.path("stats");
    let mut command = fixture.run_command();
    command.args(["--interval", "50ms", "--stats-file"]).arg(&stats);
    // Files may grow to 512 bytes.
    let mut running =
        ChildProcess::start(in_shell_after("ulimit -f 1", &command).stderr(Stdio::piped()));
    let log = running.stderr_lines();
    wait_for_line(&log, "stats file cannot be written: ");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(!stats.exists() && !fixture.path("stats.new").exists());
}

#[test]
fn obstacle_of_the_temporary_file_is_named() {
    let fixture = Fixture::new();
    let stats = fixture.path("stats");
    let next = fixture.path("stats.new");
    fs::create_dir(&next).unwrap();
    let mut running = ChildProcess::start(fixture.run_command().arg("--stats-file").arg(&stats));
    let log = running.stderr_lines();
    let line = wait_for_line(&log, "stats file cannot be written: ");
    assert!(line.contains(&format!("error=\"{} cannot be removed: ", next.display())), "{line}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn paths_may_be_other_than_utf8() {
    let fixture = Fixture::new();
    let [stats, metrics] =
        [&b"stats-\xff"[..], b"metrics-\xff"].map(|name| fixture.path(OsStr::from_bytes(name)));
    let mut command = fixture.run_command();
    command
        .args(["--interval", "50ms", "--stats-file"])
        .arg(&stats)
        .arg("--metrics-file")
        .arg(&metrics);
    let mut running = ChildProcess::start(command.stderr(Stdio::null()));
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(stats).unwrap().contains("\"beats\": "));
    assert!(fs::read_to_string(metrics).unwrap().contains("decnet_heartbeat_beats_total "));
}

/// The messages of `run` and `check` that reject this target. Checks their exit codes.
fn rejections(fixture: &Fixture, option: &str, path: &Path, others: &[&OsStr]) -> Vec<String> {
    let ini = fixture.ini();
    fixture.write_ini();
    let messages = ["run", "check"].map(|name| {
        let mut command = program();
        command.arg("--config").arg(&ini).arg(name).arg(option).arg(path).args(others);
        let output =
            command.env("DECNET_HEARTBEAT_STATE_FILE", fixture.path("state")).output().unwrap();
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
    let fixture = Fixture::new();
    let dir = fixture.dir.path();
    let agent = fixture.agent_dir();
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
        for line in rejections(&fixture, option, path, &[]) {
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
    rejections(&fixture, "--stats-file", &both, &["--metrics-file".as_ref(), both.as_os_str()]);
    rejections(&fixture, "--stats-file", &log, &["--log-file".as_ref(), log.as_os_str()]);
    rejections(&fixture, "--metrics-file", &both, &["--outbox".as_ref(), both.as_os_str()]);
}
