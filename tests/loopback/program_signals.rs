//! What `run` does on a signal, and what commands do at the file size limit.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Effect, Fault};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::program::{program, run};
use crate::support::{PATIENCE, Running, Stage, json_of, line_with, lines};

/// The limit for a stop, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

/// The command, started by a shell after this line.
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

fn run_often(stage: &Stage) -> Command {
    let mut command = run(&stage.worker, stage.dir.path());
    command.args(["--interval", "50ms"]).stderr(Stdio::null());
    command
}

/// The signal's bit in the kernel's masks.
fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[test]
fn signals_without_effect_do_not_end_run() {
    let stage = Stage::new();
    let mut running = Running::start(&mut run_often(&stage));
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
        // Handled, not ignored: a child process would inherit that. Rust's runtime ignores PIPE.
        assert!(running.mask("SigCgt") & bit(number) != 0 || name == "PIPE", "{name}");
        running.signal(name);
        let beats = stage.master.received().len();
        stage.requests(beats + 2);
        assert!(running.0.try_wait().unwrap().is_none(), "{name}");
    }
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn int_stops_like_term_and_quit_has_its_default_action() {
    let stage = Stage::new();
    let mut running = Running::start(&mut run_often(&stage));
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    running.signal("INT");
    assert_eq!(running.end(PROMPT).code(), Some(0));
    let mut running = Running::start(&mut after("ulimit -c 0", &run_often(&stage)));
    let beats = stage.master.received().len();
    stage.requests(beats + 2);
    running.signal("QUIT");
    assert_eq!(running.end(PROMPT).signal(), Some(3));
}

#[test]
fn signal_ignored_at_the_start_stays_ignored() {
    let stage = Stage::new();
    // As nohup does, and as a shell does for background processes.
    let mut running = Running::start(&mut after("trap '' HUP INT USR1 XFSZ", &run_often(&stage)));
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
fn second_signal_ends_run_at_once() {
    let stage = Stage::new();
    stage.master.script([Fault::NeverAnswer(Effect::Lost)]);
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    stage.requests(1);
    running.signal("TERM");
    line_with(&log, "stopping: ");
    thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    assert_eq!(running.end(PROMPT).code(), Some(1));
}

#[test]
fn interrupted_post_is_not_logged_as_a_failed_beat() {
    let stage = Stage::new();
    stage.master.script([Fault::NeverAnswer(Effect::Lost)]);
    let mut command = run(&stage.worker, stage.dir.path());
    let mut running = Running::start(command.stderr(Stdio::piped()));
    stage.requests(1);
    running.signal("TERM");
    assert_eq!(running.end(PATIENCE).code(), Some(0));
    let log: Vec<_> = lines(running.0.stderr.take().unwrap()).iter().collect();
    assert!(log.iter().any(|line| line.contains("beat interrupted by the stop: ")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains("beat failed")), "{log:#?}");
}

#[test]
fn repeated_signals_at_once_count_as_one_and_the_stop_is_orderly() {
    let stage = Stage::new();
    let mut running = Running::start(run_often(&stage).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    for _ in 0..50 {
        // As timeout(1) signals a process and then its group. An error: it has ended.
        let _ = kill_process(Pid::from_child(&running.0), Signal::TERM);
    }
    assert_eq!(running.end(PROMPT).code(), Some(0));
    line_with(&log, "heartbeat stopped: ");
}

#[test]
fn signal_blocked_at_the_start_stops_run() {
    let stage = Stage::new();
    let run_often = run_often(&stage);
    let mut blocked = Command::new("env");
    blocked
        .arg("--block-signal")
        .arg(run_often.get_program())
        .args(run_often.get_args())
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
fn hup_while_the_log_file_is_being_opened_does_not_end_run() {
    let stage = Stage::new();
    let log = stage.dir.path().join("log");
    assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
    let mut running = Running::start(run_often(&stage).arg("--log-file").arg(&log));
    // The FIFO has no reader, so opening it blocks the thread `log`.
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

/// Sets the file size limit of the process in bytes. `None`: removes it.
fn limit_files(running: &Running, bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit { current: bytes.or(maximum), maximum };
    prlimit(Some(Pid::from_child(&running.0)), Resource::Fsize, limit).unwrap();
}

#[test]
fn run_beats_at_the_file_size_limit_and_its_outbox_is_durable_without_it() {
    let stage = Stage::new();
    let mut running =
        Running::start(after("ulimit -S -f 8", &run_often(&stage)).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    line_with(&log, "in memory");
    line_with(&log, "first beat accepted");
    assert!(stage.master.wait_for_beats(5, PATIENCE));
    limit_files(&running, None);
    line_with(&log, "outbox file reopened: outbox=");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn later_file_size_limit_acts_as_a_full_disk_and_sends_no_delta_twice() {
    let stage = Stage::new();
    let mut running = Running::start(run_often(&stage).stderr(Stdio::piped()));
    let log = lines(running.0.stderr.take().unwrap());
    line_with(&log, "first beat accepted");
    limit_files(&running, Some(1));
    let mut push = program();
    push.arg("--config").arg(stage.dir.path().join("decnet.ini"));
    // Nothing listens on this port, so only `run` can deliver.
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
    let requests = stage.requests(beats + 5);
    let deltas = requests
        .iter()
        .filter_map(|beat| json_of(beat)["lifecycle"].as_array().map(Vec::len))
        .sum::<usize>();
    assert_eq!(deltas, 1);
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn file_size_limit_does_not_kill_push_track_and_check() {
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
    let lifecycles: Vec<_> =
        stage.master.received().iter().map(|beat| json_of(beat)["lifecycle"].clone()).collect();
    assert_eq!(lifecycles.len(), 2, "{lifecycles:?}");
    let checked = limited(&["check"]);
    assert_eq!(checked.status.signal(), None, "{checked:?}");
}
