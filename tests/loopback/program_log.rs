//! The program's log. A slow, blocked or missing reader delays nothing.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use decnet_heartbeat::loopback::Answer;
use rustix::termios::{Action, tcflow};

use crate::support::{
    ChildProcess, Fixture, TIMEOUT, Terminal, lines, make_fifo, program, wait_for_file,
    wait_for_line, wait_for_text,
};

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

/// `run` with a short interval and this log file.
fn logging_to(fixture: &Fixture, log: &Path) -> Command {
    let mut command = fixture.run_command();
    command.args(["--interval", "50ms", "--log-file"]).arg(log);
    command
}

/// The message of a line, without time, level and thread.
fn message(line: &str) -> &str {
    line.split_once(") ").map_or(line, |(_, message)| message)
}

#[test]
fn unread_log_blocks_neither_beats_nor_sigterm() {
    let fixture = Fixture::new();
    let (_reader, full) = full_pipe();
    fixture.master.always(Some(Answer::status(503).into()));
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(
        command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(full),
    );
    fixture.wait_for_requests(20);
    fixture.master.always(None);
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

/// The first line of the terminal's output.
fn first_line(terminal: &Terminal) -> String {
    let mut line = String::new();
    BufReader::new(terminal.controller()).read_line(&mut line).unwrap();
    line
}

#[test]
fn stopped_terminal_blocks_neither_beats_nor_sigterm() {
    let fixture = Fixture::new();
    let terminal = Terminal::new();
    let side = terminal.side();
    let stderr = terminal.side();
    let mut command = fixture.run_command();
    command
        .args(["--interval", "50ms", "--log-level", "trace"])
        .env("TERM", "xterm")
        .stderr(stderr);
    let mut running = ChildProcess::start(&mut command);
    let first = first_line(&terminal);
    assert!(first.contains("\u{1b}[34m[INFO]"), "in colours: {first:?}");
    // Ctrl-S.
    tcflow(&side, Action::OOff).unwrap();
    fixture.master.always(Some(Answer::status(503).into()));
    fixture.wait_for_requests(20);
    fixture.master.always(None);
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn tostop_terminal_does_not_stop_beats_in_the_background() {
    let fixture = Fixture::new();
    let terminal = Terminal::new();
    let run = fixture.run_command();
    // Job control: the program runs in a background process group.
    let mut shell = Command::new("setsid");
    shell.args([
        "--ctty",
        "sh",
        "-c",
        "stty tostop; set -m; \"$@\" & read line; kill $!; wait $!",
        "sh",
    ]);
    shell.args(["timeout", "--foreground", "60"]).arg(run.get_program()).args(run.get_args());
    shell.args(["--interval", "50ms", "--log-level", "trace"]);
    shell.stdin(terminal.side()).stdout(terminal.side()).stderr(terminal.side());
    let mut running = ChildProcess::start(&mut shell);
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    terminal.write(b"\n").unwrap();
    assert_eq!(running.wait(PROMPT).code(), Some(0));
}

#[test]
fn no_color_and_dumb_terminals_get_no_colours() {
    for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let fixture = Fixture::new();
        let terminal = Terminal::new();
        let mut command = fixture.run_command();
        let _running = ChildProcess::start(
            command.env("TERM", "xterm").env(name, value).stderr(terminal.side()),
        );
        let first = first_line(&terminal);
        assert!(first.contains(" [INFO] (main) heartbeat starting: "), "{first:?}");
        for answer in ["--help", "check"] {
            let terminal = Terminal::new();
            let mut command = program();
            command
                .args(["--config", "/nonexistent/decnet.ini", answer])
                .env("TERM", "xterm")
                .env(name, value);
            let mut running = ChildProcess::start(command.stdout(terminal.side()));
            drop(command);
            let text = terminal.read_to_end();
            assert!(running.wait(TIMEOUT).code().is_some());
            assert!(!text.is_empty() && !text.contains('\u{1b}'), "{name} {answer}: {text}");
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
    let mut running = ChildProcess::start(not_enrolled().stderr(full));
    let mut text = String::new();
    for line in BufReader::new(reader).lines() {
        text += &line.unwrap();
    }
    assert!(text.starts_with("decnet-heartbeat: not enrolled: "), "{text}");
    assert_eq!(running.wait(2 * PROMPT).code(), Some(78));
    let (_reader, full) = full_pipe();
    assert_eq!(ChildProcess::start(not_enrolled().stderr(full)).wait(2 * PROMPT).code(), Some(78));
}

#[test]
fn closed_reader_does_not_end_the_program() {
    let fixture = Fixture::new();
    let (reader, writer) = pipe().unwrap();
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(
        command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(writer),
    );
    drop(reader);
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut not_enrolled = program();
    not_enrolled.args(["--config", "/nonexistent/decnet.ini", "run"]).stderr(writer);
    assert_eq!(ChildProcess::start(&mut not_enrolled).wait(2 * PROMPT).code(), Some(78));
}

#[test]
fn non_blocking_pipe_loses_no_line() {
    let fixture = Fixture::new();
    let (reader, full) = full_pipe();
    rustix::io::ioctl_fionbio(&full, true).unwrap();
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(
        command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(full),
    );
    drop(command);
    fixture.wait_for_requests(5);
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
    let fixture = Fixture::new();
    let log = fixture.path("log");
    make_fifo(&log);
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    let text = lines(File::open(&log).unwrap());
    let first = text.recv_timeout(TIMEOUT).unwrap();
    assert!(message(&first).starts_with("heartbeat starting: "), "{first}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    let last = text.iter().last().unwrap();
    assert!(message(&last).starts_with("heartbeat stopped: "), "{last}");
}

#[test]
fn fifo_without_reader_does_not_delay_the_exit() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    make_fifo(&log);
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn fifo_whose_reader_returns_works_again_and_counts_dropped_lines() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    make_fifo(&log);
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    let mut reader = BufReader::new(File::open(&log).unwrap());
    reader.read_line(&mut String::new()).unwrap();
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    drop(reader);
    fixture.master.always(Some(Answer::status(503).into()));
    fixture.wait_for_requests(10);
    let text = lines(File::open(&log).unwrap());
    let first = text.recv_timeout(TIMEOUT).unwrap();
    assert!(first.contains("[WARN] (log) log lines dropped: lines=1"), "{first}");
    let next = text.recv_timeout(TIMEOUT).unwrap();
    assert!(message(&next).starts_with("beat failed: "), "{next}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn hup_creates_the_new_log_file_at_once_and_uses_it() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    let old = fixture.path("log.1");
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(command.arg("--log-file").arg(&log));
    wait_for_text(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    running.signal("HUP");
    wait_for_file(&log);
    assert_eq!(fs::read_to_string(&log).unwrap(), "", "nothing was logged meanwhile");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("stopping: "));
    assert!(!fs::read_to_string(&old).unwrap().contains("stopping: "));
}

#[test]
fn log_file_that_cannot_be_reopened_stays_in_use() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    let old = fixture.path("log.1");
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    wait_for_text(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    fs::create_dir(&log).unwrap();
    running.signal("HUP");
    let text = wait_for_text(&old, "log file cannot be reopened, still using the old one: error=");
    assert!(text.contains(&log.display().to_string()), "{text}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&old).unwrap().contains("stopping: "));
}

#[test]
fn lines_lost_to_a_full_disk_are_counted_in_the_next_file() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
    fs::remove_file(&log).unwrap();
    running.signal("HUP");
    let text = wait_for_text(&log, "\n");
    assert!(text.contains("[WARN] (log) log lines dropped: lines="), "{text}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn hup_with_the_log_on_stderr_is_logged() {
    let fixture = Fixture::new();
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(command.stderr(Stdio::piped()));
    let text = running.stderr_lines();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    running.signal("HUP");
    let line = wait_for_line(&text, "SIGHUP");
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
    let fixture = Fixture::new();
    let log = fixture.path("log");
    // ENXIO, which is transient as ENOSPC of a full disk is.
    let socket = UnixListener::bind(&log).unwrap();
    let mut running = ChildProcess::start(logging_to(&fixture, &log).stderr(Stdio::piped()));
    let text = running.stderr_lines();
    wait_for_line(
        &text,
        &format!("decnet-heartbeat: --log-file: {} cannot be appended to: ", log.display()),
    );
    assert!(fixture.master.wait_for_beats(3, TIMEOUT));
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
    let fixture = Fixture::new();
    let log = fixture.path(OsStr::from_bytes(b"log-\xff"));
    let mut running = ChildProcess::start(&mut logging_to(&fixture, &log));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("first beat accepted"));
}
