//! What `run` does on a signal, and what commands do at the file size limit.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use decnet_heartbeat::loopback::{Effect, Fault};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::support::{
    ChildProcess, Fixture, TIMEOUT, in_shell_after, json_of, make_fifo, program, wait_for_line,
};

/// The limit for a stop, with a margin for a busy host.
const PROMPT: Duration = Duration::from_secs(4);

fn run_often(fixture: &Fixture) -> Command {
    let mut command = fixture.run_command();
    command.args(["--interval", "50ms"]).stderr(Stdio::null());
    command
}

/// The signal's bit in the kernel's masks.
fn signal_bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[test]
fn signals_without_effect_do_not_end_run() {
    let fixture = Fixture::new();
    let mut running = ChildProcess::start(&mut run_often(&fixture));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
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
        assert!(
            running.signal_mask("SigCgt") & signal_bit(number) != 0 || name == "PIPE",
            "{name}"
        );
        running.signal(name);
        fixture.wait_for_more_requests(2);
        assert!(running.0.try_wait().unwrap().is_none(), "{name}");
    }
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn int_stops_like_term_and_quit_has_its_default_action() {
    let fixture = Fixture::new();
    let mut running = ChildProcess::start(&mut run_often(&fixture));
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    running.signal("INT");
    assert_eq!(running.wait(PROMPT).code(), Some(0));
    let mut running = ChildProcess::start(
        in_shell_after("ulimit -c 0", &run_often(&fixture)).stderr(Stdio::null()),
    );
    fixture.wait_for_more_requests(2);
    running.signal("QUIT");
    assert_eq!(running.wait(PROMPT).signal(), Some(3));
}

#[test]
fn signal_ignored_at_the_start_stays_ignored() {
    let fixture = Fixture::new();
    // As nohup does, and as a shell does for background processes.
    let mut running = ChildProcess::start(
        in_shell_after("trap '' HUP INT USR1 XFSZ", &run_often(&fixture)).stderr(Stdio::null()),
    );
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    let ignored = running.signal_mask("SigIgn");
    for signal in [1, 2, 10, 25] {
        assert_ne!(ignored & signal_bit(signal), 0, "{signal}");
    }
    for name in ["HUP", "INT", "USR1"] {
        running.signal(name);
        fixture.wait_for_more_requests(2);
    }
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn second_signal_ends_run_at_once() {
    let fixture = Fixture::new();
    fixture.master.script([Fault::NeverAnswer(Effect::Lost)]);
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(command.stderr(Stdio::piped()));
    let log = running.stderr_lines();
    fixture.wait_for_requests(1);
    running.signal("TERM");
    wait_for_line(&log, "stopping: ");
    // Signals that arrive together count as one. No event shows that this time has passed.
    thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    assert_eq!(running.wait(PROMPT).code(), Some(1));
}

#[test]
fn interrupted_post_is_not_logged_as_a_failed_beat() {
    let fixture = Fixture::new();
    fixture.master.script([Fault::NeverAnswer(Effect::Lost)]);
    let mut command = fixture.run_command();
    let mut running = ChildProcess::start(command.stderr(Stdio::piped()));
    fixture.wait_for_requests(1);
    running.signal("TERM");
    assert_eq!(running.wait(TIMEOUT).code(), Some(0));
    let log: Vec<_> = running.stderr_lines().iter().collect();
    assert!(log.iter().any(|line| line.contains("beat interrupted by the stop: ")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains("beat failed")), "{log:#?}");
}

#[test]
fn repeated_signals_at_once_count_as_one_and_the_stop_is_orderly() {
    let fixture = Fixture::new();
    let mut running = ChildProcess::start(run_often(&fixture).stderr(Stdio::piped()));
    let log = running.stderr_lines();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT));
    for _ in 0..50 {
        // As timeout(1) signals a process and then its group. An error: it has ended.
        let _ = kill_process(Pid::from_child(&running.0), Signal::TERM);
    }
    assert_eq!(running.wait(PROMPT).code(), Some(0));
    wait_for_line(&log, "heartbeat stopped: ");
}

#[test]
fn signal_blocked_at_the_start_stops_run() {
    let fixture = Fixture::new();
    let run_often = run_often(&fixture);
    let mut blocked = Command::new("env");
    blocked
        .arg("--block-signal")
        .arg(run_often.get_program())
        .args(run_often.get_args())
        .stderr(Stdio::null());
    for name in ["TERM", "INT"] {
        let mut running = ChildProcess::start(&mut blocked);
        fixture.wait_for_more_requests(1);
        running.signal(name);
        assert_eq!(running.wait(PROMPT).code(), Some(0), "{name}");
    }
}

#[test]
fn hup_while_the_log_file_is_being_opened_does_not_end_run() {
    let fixture = Fixture::new();
    let log = fixture.path("log");
    make_fifo(&log);
    let mut running = ChildProcess::start(run_often(&fixture).arg("--log-file").arg(&log));
    // The FIFO has no reader, so opening it blocks the thread `log`.
    running.wait_for_thread("log");
    running.signal("HUP");
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    assert_eq!(running.terminate(PROMPT), Some(0));
}

/// Sets the file size limit of the process in bytes. `None`: removes it.
fn limit_files(running: &ChildProcess, bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit { current: bytes.or(maximum), maximum };
    prlimit(Some(Pid::from_child(&running.0)), Resource::Fsize, limit).unwrap();
}

#[test]
fn run_beats_at_the_file_size_limit_and_its_outbox_is_durable_without_it() {
    let fixture = Fixture::new();
    let mut running = ChildProcess::start(
        in_shell_after("ulimit -S -f 8", &run_often(&fixture)).stderr(Stdio::piped()),
    );
    let log = running.stderr_lines();
    wait_for_line(&log, "in memory");
    wait_for_line(&log, "first beat accepted");
    assert!(fixture.master.wait_for_beats(5, TIMEOUT));
    limit_files(&running, None);
    wait_for_line(&log, "outbox file reopened: outbox=");
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn later_file_size_limit_acts_as_a_full_disk_and_sends_no_delta_twice() {
    let fixture = Fixture::new();
    let mut running = ChildProcess::start(run_often(&fixture).stderr(Stdio::piped()));
    let log = running.stderr_lines();
    wait_for_line(&log, "first beat accepted");
    limit_files(&running, Some(1));
    let mut push = program();
    push.arg("--config").arg(fixture.ini());
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
    wait_for_line(&log, "in memory");
    fixture.wait_for_more_requests(5);
    limit_files(&running, None);
    wait_for_line(&log, "again: outbox=");
    let requests = fixture.wait_for_more_requests(5);
    let deltas = requests
        .iter()
        .filter_map(|beat| json_of(beat)["lifecycle"].as_array().map(Vec::len))
        .sum::<usize>();
    assert_eq!(deltas, 1);
    assert_eq!(running.terminate(PROMPT), Some(0));
}

#[test]
fn file_size_limit_does_not_kill_push_track_and_check() {
    let fixture = Fixture::new();
    let ini = fixture.ini();
    fixture.write_ini();
    let limited = |arguments: &[&str]| {
        let mut command = program();
        command.arg("--config").arg(&ini).args(arguments);
        in_shell_after("ulimit -f 1", &command).output().unwrap()
    };
    let pushed = limited(&["push", "--operation", "deploy", "--status", "succeeded", "decky-01"]);
    assert_eq!(pushed.status.code(), Some(0), "{pushed:?}");
    let tracked = limited(&["track", "--operation", "deploy", "--decky", "decky-02", "--", "true"]);
    assert_eq!(tracked.status.code(), Some(0), "{tracked:?}");
    let lifecycles: Vec<_> =
        fixture.master.received().iter().map(|beat| json_of(beat)["lifecycle"].clone()).collect();
    assert_eq!(lifecycles.len(), 2, "{lifecycles:?}");
    let checked = limited(&["check"]);
    assert_eq!(checked.status.signal(), None, "{checked:?}");
}
