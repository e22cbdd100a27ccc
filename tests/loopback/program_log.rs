//! The program's log: whoever reads it, or does not, delays nothing.

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

/// A stop, and a log that is stuck, with room for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

/// A pipe without room, and who could read it. What fills it is empty lines.
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

/// `run` that beats often, with its log in this file.
fn logging_to(stage: &Stage, log: &Path) -> Command {
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms", "--log-file"]).arg(log);
    command
}

/// Until the file says so.
fn wait_for(log: &Path, what: &str) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        let said = fs::read_to_string(log).unwrap_or_default();
        if said.contains(what) {
            return said;
        }
        assert!(Instant::now() < until, "{what} in {said}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Without time, level and thread.
fn message(line: &str) -> &str {
    line.split_once(") ").map_or(line, |(_, message)| message)
}

#[test]
fn a_log_that_nobody_reads_stops_neither_beats_nor_sigterm() {
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

/// A terminal: who looks at it, and what a program writes to.
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
fn a_stopped_terminal_stops_neither_beats_nor_sigterm() {
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
fn a_terminal_that_stops_what_writes_from_the_background_does_not_stop_the_beats() {
    let stage = Stage::new();
    let (mut screen, terminal) = terminal();
    let often = run(&stage.worker, stage.dir.path());
    // Job control: what is started is in a process group that is not the terminal's.
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
fn no_colour_and_a_dumb_terminal_get_no_colours() {
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
            let mut answering = Running::start(command.stdout(terminal));
            drop(command);
            let mut said = Vec::new();
            // EIO: nobody has the terminal any more.
            let _ = BufReader::new(screen).read_to_end(&mut said);
            assert!(answering.end(PATIENCE).code().is_some());
            assert!(
                !said.is_empty() && !said.contains(&0x1b),
                "{name} {answer}: {}",
                String::from_utf8_lossy(&said)
            );
        }
    }
}

#[test]
fn an_error_reaches_a_slow_reader_and_a_stuck_one_does_not_delay_the_exit() {
    let not_enrolled = || {
        let mut command = program();
        command.args(["--config", "/nonexistent/decnet.ini", "run"]);
        command
    };
    let (reader, full) = full_pipe();
    let mut running = Running::start(not_enrolled().stderr(full));
    let mut said = String::new();
    for line in BufReader::new(reader).lines() {
        said += &line.unwrap();
    }
    assert!(said.starts_with("decnet-heartbeat: not enrolled: "), "{said}");
    assert_eq!(running.end(2 * PROMPT).code(), Some(78));
    let (_reader, full) = full_pipe();
    assert_eq!(Running::start(not_enrolled().stderr(full)).end(2 * PROMPT).code(), Some(78));
}

#[test]
fn a_reader_that_has_gone_ends_nothing() {
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
fn a_pipe_that_somebody_made_non_blocking_loses_no_line() {
    let stage = Stage::new();
    let (reader, full) = full_pipe();
    rustix::io::ioctl_fionbio(&full, true).unwrap();
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running =
        Running::start(command.args(["--interval", "50ms", "--log-level", "trace"]).stderr(full));
    drop(command);
    stage.requests(5);
    let read = thread::spawn(move || {
        let mut said = String::new();
        BufReader::new(reader).read_to_string(&mut said).unwrap();
        said
    });
    assert_eq!(running.terminate(PROMPT), Some(0));
    let said = read.join().unwrap();
    assert!(
        said.contains("heartbeat starting: ")
            && said.contains("heartbeat stopped: ")
            && !said.contains("were dropped"),
        "{said}"
    );
    let mut logged = said.lines().filter(|line| !line.is_empty());
    assert!(
        logged.all(|line| line.starts_with("20") && line.contains("] (")),
        "whole lines: {said}"
    );
}

#[test]
fn a_fifo_without_a_reader_delays_nothing_and_its_first_reader_gets_every_line() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    mkfifo(&log);
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    let said = lines(File::open(&log).unwrap());
    let first = said.recv_timeout(PATIENCE).unwrap();
    assert!(message(&first).starts_with("heartbeat starting: "), "{first}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    let last = said.iter().last().unwrap();
    assert!(message(&last).starts_with("heartbeat stopped: "), "{last}");
}

#[test]
fn a_fifo_that_never_has_a_reader_delays_no_exit() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    mkfifo(&log);
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_fifo_whose_reader_returns_works_again_and_tells_of_the_gap() {
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
    let said = lines(File::open(&log).unwrap());
    let first = said.recv_timeout(PATIENCE).unwrap();
    assert!(first.contains("[WARN] (log) lines of the log were dropped: lines=1"), "{first}");
    let next = said.recv_timeout(PATIENCE).unwrap();
    assert!(message(&next).starts_with("beat failed: "), "{next}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn after_hup_the_new_log_file_is_there_at_once_and_gets_what_follows() {
    let stage = Stage::new();
    let (log, old) = (stage.dir.path().join("log"), stage.dir.path().join("log.1"));
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.arg("--log-file").arg(&log));
    wait_for(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    running.signal("HUP");
    assert_eq!(wait_until_there(&log), "", "nothing was logged meanwhile");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("stopping: "));
    assert!(!fs::read_to_string(&old).unwrap().contains("stopping: "));
}

/// What is in the file, once it is there.
fn wait_until_there(log: &Path) -> String {
    let until = Instant::now() + PATIENCE;
    while !log.exists() {
        assert!(Instant::now() < until, "{} is not there", log.display());
        thread::sleep(Duration::from_millis(5));
    }
    fs::read_to_string(log).unwrap()
}

#[test]
fn a_log_file_that_cannot_be_reopened_stays_and_says_so() {
    let stage = Stage::new();
    let (log, old) = (stage.dir.path().join("log"), stage.dir.path().join("log.1"));
    let mut running = Running::start(&mut logging_to(&stage, &log));
    wait_for(&log, "first beat accepted");
    fs::rename(&log, &old).unwrap();
    fs::create_dir(&log).unwrap();
    running.signal("HUP");
    let said = wait_for(&old, "the log file cannot be reopened and the old one is used: error=");
    assert!(said.contains(&log.display().to_string()), "{said}");
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&old).unwrap().contains("stopping: "));
}

#[test]
fn what_a_full_disk_did_not_take_is_counted_in_the_next_file() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    fs::remove_file(&log).unwrap();
    running.signal("HUP");
    let said = wait_for(&log, "\n");
    assert!(said.contains("[WARN] (log) lines of the log were dropped: lines="), "{said}");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn with_the_log_on_stderr_hup_is_a_line() {
    let stage = Stage::new();
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.stderr(Stdio::piped()));
    let said = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    running.signal("HUP");
    let line = line_with(&said, "SIGHUP");
    assert!(
        line.contains("[INFO] (signals) there is no log file to reopen: signal=SIGHUP log=stderr"),
        "{line}"
    );
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_log_file_that_cannot_be_opened_is_an_error_of_the_start() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["run", "check"] {
        let output = program().arg("--log-file").arg(dir.path()).arg(command).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "decnet-heartbeat: --log-file: {} cannot be appended to: ",
            dir.path().display()
        );
        assert!(said.starts_with(&expected) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn a_log_file_that_cannot_be_opened_for_a_reason_that_passes_delays_no_beat_and_is_opened_later() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    // ENXIO, as ENOSPC on a disk that is full.
    let socket = UnixListener::bind(&log).unwrap();
    let mut running = Running::start(logging_to(&stage, &log).stderr(Stdio::piped()));
    let said = lines(running.0.stderr.take().unwrap());
    line_with(
        &said,
        &format!("decnet-heartbeat: --log-file: {} cannot be appended to: ", log.display()),
    );
    assert!(stage.master.wait_for_beats(3, PATIENCE));
    drop(socket);
    fs::remove_file(&log).unwrap();
    assert_eq!(running.terminate(PROMPT), Some(0));
    let said = fs::read_to_string(&log).unwrap();
    let (first, rest) = said.split_once('\n').unwrap();
    assert!(first.contains("[WARN] (log) lines of the log were dropped: lines="), "{first}");
    assert!(message(rest).starts_with("stopping: "), "{rest}");
}

#[test]
fn a_log_file_whose_path_is_not_utf8_works() {
    let stage = Stage::new();
    let log = stage.dir.path().join(OsStr::from_bytes(b"log-\xff"));
    let mut running = Running::start(&mut logging_to(&stage, &log));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("first beat accepted"));
}
