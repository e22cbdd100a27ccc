//! What `run` does on a signal, and every command at the limit of a file's size.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Effect, Fault};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::program::{program, run};
use crate::support::{PATIENCE, Running, Stage, json_of, line_with, lines};

/// A stop, with room for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

/// The command after a line of shell.
pub fn after(line: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("{line}; exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    shell.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.env("PATH", std::env::var_os("PATH").unwrap()).stderr(Stdio::null());
    shell
}

fn often(stage: &Stage) -> Command {
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms"]).stderr(Stdio::null());
    command
}

/// The signal's bit in the kernel's masks.
fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[test]
fn signals_that_mean_nothing_to_run_do_not_end_it() {
    let stage = Stage::new();
    let mut running = Running::start(&mut often(&stage));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    let signals = [
        ("HUP", 1),
        ("USR1", 10),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("STKFLT", 16),
        ("XFSZ", 25),
        ("VTALRM", 26),
        ("PROF", 27),
        ("IO", 29),
        ("PWR", 30),
        ("RTMIN", 34),
        ("64", 64),
    ];
    for (name, number) in signals {
        // Handled, not ignored: a command that it would start had the default action. PIPE is Rust's.
        assert!(running.mask("SigCgt") & bit(number) != 0 || name == "PIPE", "{name}");
        running.signal(name);
        let beats = stage.master.received().len();
        stage.requests(beats + 2);
        assert!(running.0.try_wait().unwrap().is_none(), "{name}");
    }
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn int_stops_as_term_does_and_quit_ends_with_its_own_action() {
    let stage = Stage::new();
    let mut running = Running::start(&mut often(&stage));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    running.signal("INT");
    assert_eq!(running.end(PROMPT).code(), Some(0));
    let mut running = Running::start(&mut after("ulimit -c 0", &often(&stage)));
    let beats = stage.master.received().len();
    stage.requests(beats + 2);
    running.signal("QUIT");
    assert_eq!(running.end(PROMPT).signal(), Some(3));
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let stage = Stage::new();
    // As nohup does, and a shell for what it starts in the background.
    let mut running = Running::start(&mut after("trap '' HUP INT USR1 XFSZ", &often(&stage)));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    let ignored = running.mask("SigIgn");
    for signal in [1, 2, 10, 25] {
        assert_ne!(ignored & bit(signal), 0, "{signal}");
    }
    for name in ["HUP", "INT", "USR1"] {
        running.signal(name);
        let beats = stage.master.received().len();
        stage.requests(beats + 2);
    }
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn the_second_signal_ends_it_at_once() {
    let stage = Stage::new();
    stage.master.script([Fault::NeverAnswer(Effect::Lost)]);
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.stderr(Stdio::piped()));
    let said = lines(running.0.stderr.take().unwrap());
    stage.requests(1);
    running.signal("TERM");
    line_with(&said, "stopping: ");
    thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    assert_eq!(running.end(PROMPT).code(), Some(1));
}

#[test]
fn signals_that_come_together_are_one_and_the_stop_is_orderly() {
    let stage = Stage::new();
    let mut running = Running::start(often(&stage).stderr(Stdio::piped()));
    let said = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    for _ in 0..50 {
        // As timeout(1) does to a process and then to its group. It may have ended.
        let _ = kill_process(Pid::from_child(&running.0), Signal::TERM);
    }
    assert_eq!(running.end(PROMPT).code(), Some(0));
    line_with(&said, "heartbeat stopped: ");
}

#[test]
fn a_signal_that_was_blocked_at_the_start_stops_it_all_the_same() {
    let stage = Stage::new();
    let often = often(&stage);
    let mut blocked = Command::new("env");
    blocked
        .arg("--block-signal")
        .arg(often.get_program())
        .args(often.get_args())
        .stderr(Stdio::null());
    for name in ["TERM", "INT"] {
        let mut running = Running::start(&mut blocked);
        let beats = stage.master.received().len();
        stage.requests(beats + 1);
        running.signal(name);
        assert_eq!(running.end(PROMPT).code(), Some(0), "{name}");
    }
}

#[test]
fn hup_while_the_log_file_is_being_opened_does_not_end_it() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
    let mut running = Running::start(often(&stage).arg("--log-file").arg(&log));
    // Nobody reads the FIFO, so that thread waits.
    let tasks = format!("/proc/{}/task", running.0.id());
    let names = || {
        fs::read_dir(&tasks)
            .unwrap()
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
    };
    let until = Instant::now() + PATIENCE;
    while !names().any(|name| name == "log\n") {
        assert!(Instant::now() < until);
    }
    running.signal("HUP");
    assert!(stage.master.wait_for_beats(2, PATIENCE));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

/// Bytes that the files of this process may grow to; `None`: as the limit was.
fn limit_files(running: &Running, bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit { current: bytes.or(maximum), maximum };
    prlimit(Some(Pid::from_child(&running.0)), Resource::Fsize, limit).unwrap();
}

#[test]
fn where_no_file_may_grow_run_beats_and_its_outbox_has_a_file_once_they_may() {
    let stage = Stage::new();
    let mut running =
        Running::start(after("ulimit -S -f 8", &often(&stage)).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    line_with(&log, "in memory");
    line_with(&log, "first beat accepted");
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    limit_files(&running, None);
    line_with(&log, "again: outbox=");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn a_limit_that_comes_later_is_a_full_disk_and_no_delta_is_sent_twice() {
    let stage = Stage::new();
    let mut running = Running::start(often(&stage).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    line_with(&log, "first beat accepted");
    limit_files(&running, Some(1));
    let mut push = program();
    push.arg("--config").arg(stage.dir.path().join("decnet.ini"));
    // The master is asked by run alone: nobody listens there.
    push.env("DECNET_SWARMCTL_PORT", "1").args([
        "push",
        "--operation",
        "deploy",
        "--status",
        "succeeded",
        "decky-01",
    ]);
    assert_eq!(push.output().unwrap().status.code(), Some(75));
    line_with(&log, "in memory");
    let beats = stage.master.received().len();
    stage.requests(beats + 5);
    limit_files(&running, None);
    line_with(&log, "again: outbox=");
    let beats = stage.master.received().len();
    let heard = stage.requests(beats + 5);
    let deltas = heard
        .iter()
        .filter_map(|beat| json_of(beat)["lifecycle"].as_array().map(Vec::len))
        .sum::<usize>();
    assert_eq!(deltas, 1);
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn push_and_check_are_not_killed_where_no_file_may_grow() {
    let stage = Stage::new();
    let ini = stage.dir.path().join("decnet.ini");
    stage.worker.write_ini(&ini).unwrap();
    let limited = |arguments: &[&str]| {
        let mut command = program();
        command.arg("--config").arg(&ini).args(arguments);
        after("ulimit -f 1", &command).output().unwrap()
    };
    let pushed = limited(&["push", "--operation", "deploy", "--status", "succeeded", "decky-01"]);
    assert_eq!(pushed.status.code(), Some(0), "{pushed:?}");
    let tracked = limited(&["track", "--operation", "deploy", "--decky", "decky-02", "--", "true"]);
    assert_eq!(tracked.status.code(), Some(0), "{tracked:?}");
    let heard: Vec<_> =
        stage.master.received().iter().map(|beat| json_of(beat)["lifecycle"].clone()).collect();
    assert_eq!(heard.len(), 2, "{heard:?}");
    let checked = limited(&["check"]);
    assert_eq!(checked.status.signal(), None, "{checked:?}");
}
