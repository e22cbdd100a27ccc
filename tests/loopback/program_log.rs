//! The program's log. A slow, blocked or missing reader delays nothing.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::Answer;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, tcflow};

use crate::program::{program, run};
use crate::support::{PATIENCE, Running, Stage, line_with, lines};

/// The limit for a stop with a blocked log, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

/// A pipe that is full of empty lines, and its reader.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'\n'; 512]).is_ok() {}
    while writer.write(b"\n").is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// `run` with a short interval and this log file.
fn logging_to(stage: &Stage, log: &Path) -> Command {
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms", "--log-file"]).arg(log);
    command
}

/// Waits until the file contains the text.
fn wait_for(log: &Path, part: &str) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        if text.contains(part) {
            return text;
        }
        assert!(Instant::now() < until, "{part} in {text}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The message of a line, without time, level and thread.
fn message(line: &str) -> &str {
    line.split_once(") ").map_or(line, |(_, message)| message)
}

#[test]
fn unread_log_blocks_neither_beats_nor_sigterm() {
    let stage = Stage::new();
    let (_reader, full) = full_pipe();
    stage.master.always(Some(Answer::status(503).into()));
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running =
        Running::start(command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(full));
    stage.requests(20);
    stage.master.always(None);
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

/// A pseudoterminal: the controlling side, and the side that a program writes to.
fn terminal() -> (File, File) {
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let path = OsString::from_vec(ptsname(&screen, Vec::new()).unwrap().into_bytes());
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(OpenptFlags::NOCTTY.bits() as i32)
        .open(path)
        .unwrap();
    (File::from(screen), terminal)
}

#[test]
fn stopped_terminal_blocks_neither_beats_nor_sigterm() {
    let stage = Stage::new();
    let (screen, terminal) = terminal();
    let stderr = terminal.try_clone().unwrap();
    let mut command = run(&stage.worker, stage.dir.path());
    command
        .args(["--interval", "50ms", "--log-level", "trace"])
        .env("TERM", "xterm")
        .stderr(stderr);
    let mut running = Running::start(&mut command);
    let mut first = String::new();
    BufReader::new(screen.try_clone().unwrap()).read_line(&mut first).unwrap();
    assert!(first.contains("\u{1b}[34m[INFO]"), "in colours: {first:?}");
    // Ctrl-S.
    tcflow(&terminal, Action::OOff).unwrap();
    stage.master.always(Some(Answer::status(503).into()));
    stage.requests(20);
    stage.master.always(None);
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn tostop_terminal_does_not_stop_beats_in_the_background() {
    let stage = Stage::new();
    let (mut screen, terminal) = terminal();
    let often = run(&stage.worker, stage.dir.path());
    // Job control: the program runs in a background process group.
    let mut shell = Command::new("setsid");
    shell.args([
        "--ctty",
        "sh",
        "-c",
        "stty tostop; set -m; \"$@\" & read line; kill $!; wait $!",
        "sh",
    ]);
    shell.args(["timeout", "--foreground", "60"]).arg(often.get_program()).args(often.get_args());
    shell.args(["--interval", "50ms", "--log-level", "trace"]);
    shell
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .stderr(terminal);
    let mut running = Running::start(&mut shell);
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    screen.write_all(b"\n").unwrap();
    assert_eq!(running.end(PROMPT).code(), Some(0));
}

#[test]
fn no_color_and_dumb_terminals_get_no_colours() {
    for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let stage = Stage::new();
        let (screen, terminal) = terminal();
        let mut command = run(&stage.worker, stage.dir.path());
        let _running =
            Running::start(command.env("TERM", "xterm").env(name, value).stderr(terminal));
        let mut first = String::new();
        BufReader::new(screen).read_line(&mut first).unwrap();
        assert!(first.contains(" [INFO] (main) heartbeat starting: "), "{first:?}");
        for answer in ["--help", "check"] {
            let (screen, terminal) = self::terminal();
            let mut command = program();
            command
                .args(["--config", "/nonexistent/decnet.ini", answer])
                .env("TERM", "xterm")
                .env(name, value);
            let mut running = Running::start(command.stdout(terminal));
            drop(command);
            let mut text = Vec::new();
            // EIO: no process has the terminal open any more.
            let _ = BufReader::new(screen).read_to_end(&mut text);
            assert!(running.end(PATIENCE).code().is_some());
            assert!(
                !text.is_empty() && !text.contains(&0x1b),
                "{name} {answer}: {}",
                String::from_utf8_lossy(&text)
            );
        }
    }
}

#[test]
fn error_reaches_a_slow_reader_and_a_blocked_reader_does_not_delay_the_exit() {
    let not_enrolled = || {
        let mut command = program();
        command.args(["--config", "/nonexistent/decnet.ini", "run"]);
        command
    };
    let (reader, full) = full_pipe();
    let mut running = Running::start(not_enrolled().stderr(full));
    let mut text = String::new();
    for line in BufReader::new(reader).lines() {
        text += &line.unwrap();
    }
    assert!(text.starts_with("decnet-heartbeat: not enrolled: "), "{text}");
    assert_eq!(running.end(2 * PROMPT).code(), Some(78));
    let (_reader, full) = full_pipe();
    assert_eq!(Running::start(not_enrolled().stderr(full)).end(2 * PROMPT).code(), Some(78));
}

#[test]
fn closed_reader_does_not_end_the_program() {
    let stage = Stage::new();
    let (reader, writer) = pipe().unwrap();
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running =
        Running::start(command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(writer));
    drop(reader);
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut not_enrolled = program();
    not_enrolled.args(["--config", "/nonexistent/decnet.ini", "run"]).stderr(writer);
    assert_eq!(Running::start(&mut not_enrolled).end(2 * PROMPT).code(), Some(78));
}

#[test]
fn non_blocking_pipe_loses_no_line() {
    let stage = Stage::new();
    let (reader, full) = full_pipe();
    rustix::io::ioctl_fionbio(&full, true).unwrap();
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running =
        Running::start(command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(full));
    drop(command);
    stage.requests(5);
    let read = thread::spawn(move || {
        let mut text = String::new();
        BufReader::new(reader).read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(running.terminate(PROMPT), Some(0));
    let text = read.join().unwrap();
    assert!(
        text.contains("heartbeat starting: ")
            && text.contains("heartbeat stopped: ")
            && !text.contains("lines dropped"),
        "{text}"
    );
    let mut logged = text.lines().filter(|line| !line.is_empty());
    assert!(
        logged.all(|line| line.starts_with("20") && line.contains("] (")),
        "whole lines: {text}"
    );
}

#[test]
fn fifo_without_reader_delays_nothing_and_the_first_reader_gets_every_line() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    mkfifo(&log);
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    let text = lines(File::open(&log).unwrap());
    let first = text.recv_timeout(PATIENCE).unwrap();
    assert!(message(&first).starts_with("heartbeat starting: "), "{first}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    let last = text.iter().last().unwrap();
    assert!(message(&last).starts_with("heartbeat stopped: "), "{last}");
}

#[test]
fn fifo_without_reader_does_not_delay_the_exit() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    mkfifo(&log);
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn fifo_whose_reader_returns_works_again_and_counts_dropped_lines() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    mkfifo(&log);
    let mut running = Running::start(&mut logging_to(&stage, &log));
    let mut reader = BufReader::new(File::open(&log).unwrap());
    reader.read_line(&mut String::new()).unwrap();
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    drop(reader);
    stage.master.always(Some(Answer::status(503).into()));
    stage.requests(10);
    let text = lines(File::open(&log).unwrap());
    let first = text.recv_timeout(PATIENCE).unwrap();
    assert!(first.contains("[WARN] (log) log lines dropped: lines=1"), "{first}");
    let next = text.recv_timeout(PATIENCE).unwrap();
    assert!(message(&next).starts_with("beat failed: "), "{next}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn hup_creates_the_new_log_file_at_once_and_uses_it() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    let old = stage.dir.path().join("log.1");
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.arg("--log-file").arg(&log));
    wait_for(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    running.signal("HUP");
    assert_eq!(wait_until_exists(&log), "", "nothing was logged meanwhile");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("stopping: "));
    assert!(!fs::read_to_string(&old).unwrap().contains("stopping: "));
}

/// The content of the file, once it exists.
fn wait_until_exists(log: &Path) -> String {
    let until = Instant::now() + PATIENCE;
    while !log.exists() {
        assert!(Instant::now() < until, "{} does not exist", log.display());
        thread::sleep(Duration::from_millis(5));
    }
    fs::read_to_string(log).unwrap()
}

#[test]
fn log_file_that_cannot_be_reopened_stays_in_use() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    let old = stage.dir.path().join("log.1");
    let mut running = Running::start(&mut logging_to(&stage, &log));
    wait_for(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    fs::create_dir(&log).unwrap();
    running.signal("HUP");
    let text = wait_for(&old, "log file cannot be reopened, still using the old one: error=");
    assert!(text.contains(&log.display().to_string()), "{text}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&old).unwrap().contains("stopping: "));
}

#[test]
fn lines_lost_to_a_full_disk_are_counted_in_the_next_file() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    fs::remove_file(&log).unwrap();
    running.signal("HUP");
    let text = wait_for(&log, "\n");
    assert!(text.contains("[WARN] (log) log lines dropped: lines="), "{text}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn hup_with_the_log_on_stderr_is_logged() {
    let stage = Stage::new();
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.stderr(Stdio::piped()));
    let text = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    running.signal("HUP");
    let line = line_with(&text, "SIGHUP");
    assert!(
        line.contains("[INFO] (signals) no log file to reopen: signal=SIGHUP log=stderr"),
        "{line}"
    );
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn log_file_that_cannot_be_opened_is_a_start_error() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["run", "check"] {
        let output = program().arg("--log-file").arg(dir.path()).arg(command).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "decnet-heartbeat: --log-file: {} cannot be appended to: ",
            dir.path().display()
        );
        assert!(text.starts_with(&expected) && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn log_file_with_a_transient_error_delays_no_beat_and_is_opened_later() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    // ENXIO, which is transient as ENOSPC of a full disk is.
    let socket = UnixListener::bind(&log).unwrap();
    let mut running = Running::start(logging_to(&stage, &log).stderr(Stdio::piped()));
    let text = lines(running.0.stderr.take().unwrap());
    line_with(
        &text,
        &format!("decnet-heartbeat: --log-file: {} cannot be appended to: ", log.display()),
    );
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    drop(socket);
    fs::remove_file(&log).unwrap();
    assert_eq!(running.terminate(PROMPT), Some(0));
    let text = fs::read_to_string(&log).unwrap();
    let (first, rest) = text.split_once('\n').unwrap();
    assert!(first.contains("[WARN] (log) log lines dropped: lines="), "{first}");
    assert!(message(rest).starts_with("stopping: "), "{rest}");
}

#[test]
fn log_file_path_may_be_other_than_utf8() {
    let stage = Stage::new();
    let log = stage.dir.path().join(OsStr::from_bytes(b"log-\xff"));
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("first beat accepted"));
}
