//! `track`: streams, terminals, signals and background processes of its command.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{Effect, Fault, RowStatus};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, kill_process_group, prlimit};

use crate::push_and_track::{
    TRACK, fifo, output, owners, queued, release, row, rows, start_track, track, waiting_script,
};
use crate::support::{Fixture, TIMEOUT, Terminal, in_shell_after, poll_until, wait_for_file};

/// The command `track` of this script.
fn track_command(fixture: &Fixture, script: &str) -> Command {
    fixture.command(&[&TRACK[..], &["sh", "-c", script]].concat())
}

/// A fixture with an open deploy of the decky.
fn deploy_fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    fixture
}

fn path(fixture: &Fixture, name: &str) -> String {
    fixture.path(name).to_str().unwrap().to_owned()
}

/// A script that writes 300 lines, to stdout and stderr in turn.
const ALTERNATING: &str =
    "n=0; while [ $n -lt 150 ]; do echo out$n; echo err$n >&2; n=$((n+1)); done";

fn alternating_lines(end: &str) -> String {
    (0..150).map(|n| format!("out{n}{end}err{n}{end}")).collect()
}

#[test]
fn terminal_is_passed_on_and_the_order_of_stdout_and_stderr_stays() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let script = format!(
        "test -t 0 && test -t 1 && test -t 2 && echo terminals; stty size <&2; {ALTERNATING}"
    );
    let mut child = terminal.spawn(&mut track_command(&fixture, &script));
    let shown = terminal.read_to_end();
    assert_eq!(shown, format!("terminals\r\n33 77\r\n{}", alternating_lines("\r\n")));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(row(&fixture), (RowStatus::Succeeded, None));
}

#[test]
fn shared_pipe_keeps_the_order_of_stdout_and_stderr() {
    let fixture = deploy_fixture();
    let (mut read, write) = io::pipe().unwrap();
    let mut command =
        track_command(&fixture, &format!("test -t 1 || test -t 2 || {{ {ALTERNATING}; }}"));
    let mut child = command.stdout(write.try_clone().unwrap()).stderr(write).spawn().unwrap();
    drop(command);
    let mut output = String::new();
    read.read_to_string(&mut output).unwrap();
    assert_eq!(output, alternating_lines("\n"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn separate_stdout_is_inherited() {
    let fixture = deploy_fixture();
    let file = path(&fixture, "out");
    let mut command = track_command(&fixture, "readlink /proc/$$/fd/1; test ! -t 2");
    assert!(
        command
            .stdout(File::create(&file).unwrap())
            .stderr(Stdio::piped())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{file}\n"));
}

#[test]
fn new_size_of_the_terminal_is_passed_on() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let script = "trap 'stty size <&2; exit 0' WINCH; stty size <&2; while :; do sleep 0.05; done";
    let mut child = terminal.spawn(&mut track_command(&fixture, script));
    terminal.read_until("33 77");
    terminal.resize(50, 132);
    // The terminal controls no process, so it sends no SIGWINCH.
    kill_process(Pid::from_child(&child), Signal::WINCH).unwrap();
    assert!(terminal.read_to_end().contains("50 132"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn terminal_output_is_reported_as_text() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let script = r"printf '\033[1;31mpulling 1%%\rpulling 9%%\rno such image\033[0m\n' >&2; exit 3";
    let mut child = terminal.spawn(&mut track_command(&fixture, script));
    assert!(terminal.read_to_end().contains("\u{1b}[1;31mpulling 1%\r"));
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("no such image".to_owned())));
}

#[test]
fn error_is_the_tail_of_stderr_or_the_name_of_the_signal() {
    for (script, code, error) in [
        ("echo 'no such image' >&2; exit 3", 3, "no such image"),
        ("exit 3", 3, "exited with 3"),
        ("kill -9 $$", 137, "ended by signal 9"),
        ("echo why >&2; kill -9 $$", 137, "ended by signal 9: why"),
    ] {
        let fixture = deploy_fixture();
        assert_eq!(track(&fixture, script).0, Some(code));
        assert_eq!(row(&fixture), (RowStatus::Failed, Some(error.to_owned())), "{script}");
    }
}

/// A command that ends and leaves a process running, which writes to stderr once the FIFO is
/// written.
fn script_with_background_process(fixture: &Fixture, more: &str) -> String {
    let fifo = fifo(fixture);
    let survived = path(fixture, "survived");
    let left = format!(
        "read line <'{fifo}'; for n in 1 2 3; do echo word$n >&2 || exit; done; touch '{survived}'"
    );
    format!("mkfifo '{fifo}'; (trap '' HUP; {left}) >/dev/null </dev/null & echo first >&2; {more}")
}

#[test]
fn background_processes_write_after_the_end_of_track() {
    let fixture = deploy_fixture();
    let mut child = track_command(&fixture, &script_with_background_process(&fixture, "exit 6"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let since = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(6), "an open stderr does not delay track");
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("first".to_owned())));
    release(fifo(&fixture));
    let mut output = String::new();
    child.stderr.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "first\nword1\nword2\nword3\n");
    wait_for_file(path(&fixture, "survived"));
}

#[test]
fn killed_track_closes_no_stderr() {
    let fixture = deploy_fixture();
    let fifo = fifo(&fixture);
    let survived = path(&fixture, "survived");
    let script =
        waiting_script(&fifo, &format!("echo word >&2 && echo more >&2 && touch '{survived}'"));
    let (mut child, _stdout) = start_track(&fixture, &script);
    child.kill().unwrap();
    child.wait().unwrap();
    release(fifo);
    let mut output = String::new();
    child.stderr.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "word\nmore\n");
    wait_for_file(&survived);
}

/// The process that copies the command's stderr.
fn companion(track: &Child) -> Option<Pid> {
    let id = track.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let mut pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let is_companion = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.starts_with(b"decnet-heartbeat-stderr\0"))
    };
    pids.find(is_companion).and_then(Pid::from_raw)
}

#[test]
fn killed_companion_ends_neither_the_command_nor_the_report() {
    let fixture = deploy_fixture();
    let fifo = fifo(&fixture);
    let script = waiting_script(&fifo, "echo word >&2; echo more >&2; exit 3");
    let (mut child, _stdout) = start_track(&fixture, &script);
    let killed = companion(&child).unwrap();
    kill_process(killed, Signal::KILL).unwrap();
    poll_until("another companion", || companion(&child).is_some_and(|other| other != killed));
    release(fifo);
    let mut output = String::new();
    child.stderr.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{output}");
    assert!(
        output.contains("was killed and was restarted") && output.contains("word\nmore\n"),
        "{output}"
    );
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("word\nmore".to_owned())));
}

#[test]
fn command_survives_without_a_reader_of_its_stderr() {
    let fixture = deploy_fixture();
    let fifo = fifo(&fixture);
    let survived = path(&fixture, "survived");
    let script =
        waiting_script(&fifo, &format!("echo word >&2; echo more >&2; touch '{survived}'"));
    let (mut child, _stdout) = start_track(&fixture, &script);
    let track = Pid::from_child(&child);
    kill_process(track, Signal::STOP).unwrap();
    kill_process(companion(&child).unwrap(), Signal::KILL).unwrap();
    release(fifo);
    wait_for_file(&survived);
    kill_process(track, Signal::CONT).unwrap();
    let mut output = String::new();
    child.stderr.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{output}");
    assert!(output.contains("word\nmore\n"), "{output}");
}

#[test]
fn terminal_survives_a_killed_track() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let fifo = fifo(&fixture);
    let script = waiting_script(&fifo, "test -t 2 && echo still one >&2");
    let mut child = terminal.spawn(&mut track_command(&fixture, &script));
    terminal.read_until("ready\r\n");
    child.kill().unwrap();
    child.wait().unwrap();
    release(fifo);
    assert_eq!(terminal.read_to_end(), "still one\r\n");
}

#[test]
fn slow_reader_loses_nothing() {
    let fixture = deploy_fixture();
    let (mut read, write) = io::pipe().unwrap();
    let script = "head -c 150000 /dev/zero | tr '\\0' x >&2; echo; echo the end >&2; exit 3";
    let mut command = track_command(&fixture, script);
    let mut child = command.stdout(Stdio::null()).stderr(write).spawn().unwrap();
    drop(command);
    let since = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let (status, error) = row(&fixture);
    assert!(
        status == RowStatus::Failed && error.as_ref().unwrap().ends_with("xthe end"),
        "{error:?}"
    );
    let mut output = String::new();
    read.read_to_string(&mut output).unwrap();
    assert!(output.len() == 150_008 && output.ends_with("xthe end\n"), "{}", output.len());
}

#[test]
fn unread_terminal_delays_neither_track_nor_the_report() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let script = "n=0; while [ $n -lt 600 ]; do echo $n xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&2; n=$((n+1)); done; \
                  echo the end >&2; exit 3";
    let mut child = terminal.spawn(&mut track_command(&fixture, script));
    let since = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let (status, error) = row(&fixture);
    assert!(
        status == RowStatus::Failed && error.as_ref().unwrap().ends_with("x\nthe end"),
        "{error:?}"
    );
    let shown = terminal.read_to_end();
    assert!(shown.lines().count() == 601 && shown.ends_with("the end\r\n"), "{}", shown.len());
}

#[test]
fn file_size_limit_does_not_end_track() {
    let fixture = deploy_fixture();
    let inner = track_command(&fixture, "exit 3");
    let mut command = in_shell_after("ulimit -f 0", &inner);
    assert_eq!(command.stderr(Stdio::null()).status().unwrap().code(), Some(3));
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("exited with 3".to_owned())));
}

#[test]
fn full_stderr_does_not_end_the_command() {
    let fixture = deploy_fixture();
    let file = path(&fixture, "err");
    let inner = track_command(&fixture, "head -c 500000 /dev/zero >&2; echo why >&2; exit 4");
    let mut command = in_shell_after("ulimit -f 8", &inner);
    let since = Instant::now();
    assert_eq!(command.stderr(File::create(&file).unwrap()).status().unwrap().code(), Some(4));
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let output = fs::read(&file).unwrap();
    assert!(
        !output.is_empty() && !String::from_utf8_lossy(&output).contains("killed"),
        "{}",
        output.len()
    );
}

#[test]
fn unneeded_companion_ends_before_track() {
    let fixture = deploy_fixture();
    let fifo = fifo(&fixture);
    let (mut child, _stdout) = start_track(&fixture, &waiting_script(&fifo, "echo word >&2"));
    let companion = companion(&child).unwrap();
    release(fifo);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // It is reaped, also if the process that inherits the children of track does not do that.
    assert!(!fs::exists(format!("/proc/{}", companion.as_raw_nonzero())).unwrap());
}

#[test]
fn closed_stderr_does_not_end_the_command() {
    let fixture = deploy_fixture();
    let (read, write) = io::pipe().unwrap();
    drop(read);
    let script = "head -c 500000 /dev/zero >&2 && exit 4";
    let mut command = track_command(&fixture, script);
    assert_eq!(command.stderr(write).status().unwrap().code(), Some(4));
}

/// The command, started by a parent that ignores SIGCHLD.
fn ignoring_sigchld(inner: &Command) -> Command {
    let mut command = Command::new("env");
    command.arg("--ignore-signal=CHLD").arg(inner.get_program()).args(inner.get_args());
    command
}

#[test]
fn parent_that_ignores_sigchld_does_not_change_the_result() {
    for (script, code, status) in
        [("exit 0", 0, RowStatus::Succeeded), ("exit 3", 3, RowStatus::Failed)]
    {
        let fixture = deploy_fixture();
        let inner = track_command(&fixture, script);
        let mut command = ignoring_sigchld(&inner);
        assert_eq!(command.stdin(Stdio::null()).status().unwrap().code(), Some(code));
        assert_eq!(row(&fixture).0, status);
    }
}

#[test]
fn missing_threads_fail_neither_the_command_nor_the_report() {
    let fixture = deploy_fixture();
    let mut command = track_command(&fixture, "echo why >&2; exit 3");
    // A stack size that no thread can have.
    let output = command.env("RUST_MIN_STACK", "70368744177664").output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(3), b"why\n".to_vec()));
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("why".to_owned())));
}

#[test]
fn command_runs_if_its_stderr_cannot_be_copied() {
    let fixture = deploy_fixture();
    let inner = track_command(&fixture, "exit 7");
    // Three standard files, two for signals, and none for a pipe.
    let mut command = in_shell_after("ulimit -n 6", &inner);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "{log}");
    assert!(log.contains("stderr cannot be copied; the report will not quote it: error="), "{log}");
}

#[test]
fn command_runs_if_signals_cannot_be_caught() {
    for ignores_sigchld in [false, true] {
        let fixture = deploy_fixture();
        let mut inner = track_command(&fixture, "exit 7");
        if ignores_sigchld {
            inner = ignoring_sigchld(&inner);
        }
        // Three standard files, and one that the dynamic loader needs.
        let mut command = in_shell_after("ulimit -n 4", &inner);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(7), "{log}");
        assert!(
            log.contains("signals cannot be caught; one may end track before its report: error="),
            "{log}"
        );
    }
}

#[test]
fn command_succeeds_if_track_cannot_poll() {
    let fixture = deploy_fixture();
    let child = start_in_a_group(&mut track_command(&fixture, &counting_script(&fixture)));
    let track = Pid::from_child(&child);
    // `poll` rejects more files than the limit of the process.
    prlimit(Some(track), Resource::Nofile, Rlimit { current: Some(1), maximum: Some(1) }).unwrap();
    kill_process(track, Signal::TERM).unwrap();
    // The exit code is the command's.
    assert_eq!(count_signals(&fixture, child, 1), 1);
}

#[test]
fn log_file_that_cannot_be_opened_stops_neither_the_command_nor_the_report() {
    let fixture = deploy_fixture();
    let dir = path(&fixture, "");
    let arguments =
        [&["--log-file", &dir], &TRACK[..], &["sh", "-c", "echo why >&2; exit 3"]].concat();
    let (code, _, log) = output(&fixture, &arguments);
    assert_eq!(code, Some(3), "{log}");
    assert!(
        log.contains("log file cannot be opened, logging to stderr: error=\"--log-file: ")
            && log.ends_with("why\n"),
        "{log}"
    );
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("why".to_owned())));
}

/// The sets of signals that a process ignores, blocks and catches, from `/proc`.
fn signal_sets(status: &str) -> Vec<(String, u64)> {
    let sets = status.lines().map(|line| line.split_once(":\t").unwrap());
    sets.map(|(name, bits)| (name.to_owned(), u64::from_str_radix(bits, 16).unwrap())).collect()
}

#[test]
fn command_has_the_default_action_of_every_signal() {
    let fixture = deploy_fixture();
    let sets = [&TRACK[..], &["grep", "-E", "Sig(Blk|Ign|Cgt):", "/proc/self/status"]].concat();
    let inner = fixture.command(&sets);
    let output = ignoring_sigchld(&inner).output().unwrap();
    let sets = signal_sets(str::from_utf8(&output.stdout).unwrap());
    assert_eq!(sets.len(), 3, "{output:?}");
    for (name, set) in sets {
        for signal in [
            Signal::HUP,
            Signal::XFSZ,
            Signal::USR1,
            Signal::USR2,
            Signal::PIPE,
            Signal::CHILD,
            Signal::TERM,
        ] {
            assert_eq!(set & 1 << (signal.as_raw() - 1), 0, "{name} has {signal:?}");
        }
    }
}

/// A script that writes a line to `output` for each TERM, and ends when `stop` exists.
fn counting_script(fixture: &Fixture) -> String {
    let output = path(fixture, "output");
    let stop = path(fixture, "stop");
    format!(
        "trap 'echo got >>'\\''{output}'\\' TERM; echo ready; while [ ! -e '{stop}' ]; do sleep 0.02; done"
    )
}

/// The number of TERMs that the script has written.
fn written_signals(fixture: &Fixture) -> usize {
    fs::read_to_string(path(fixture, "output")).unwrap_or_default().lines().count()
}

/// Waits for `at_least` TERMs and for a possible further one, ends the script, and returns how many
/// it has written.
fn count_signals(fixture: &Fixture, mut child: Child, at_least: usize) -> usize {
    poll_until("a signal", || written_signals(fixture) >= at_least);
    // A further signal must not arrive. No event shows that.
    std::thread::sleep(Duration::from_millis(400));
    fs::write(path(fixture, "stop"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    written_signals(fixture)
}

/// `track` in its own process group, once its command is ready.
fn start_in_a_group(command: &mut Command) -> Child {
    let mut child =
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    wait_until_track_waits(&child);
    child
}

/// Waits until `track` waits for the end of its command. An earlier signal is passed on whether or
/// not it was sent to the group.
fn wait_until_track_waits(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    poll_until("asleep", || fs::read_to_string(&status).unwrap().contains("State:\tS"));
}

#[test]
fn signal_to_the_process_group_reaches_the_command_once() {
    let fixture = deploy_fixture();
    let child = start_in_a_group(&mut track_command(&fixture, &counting_script(&fixture)));
    let track = Pid::from_child(&child);
    // If track passed the signal on at the same time, the kernel would merge both.
    kill_process(track, Signal::STOP).unwrap();
    kill_process_group(track, Signal::TERM).unwrap();
    wait_for_file(path(&fixture, "output"));
    kill_process(track, Signal::CONT).unwrap();
    assert_eq!(count_signals(&fixture, child, 1), 1);
}

#[test]
fn signal_to_only_track_reaches_the_command_once_even_after_one_to_the_group() {
    let fixture = deploy_fixture();
    let child = start_in_a_group(&mut track_command(&fixture, &counting_script(&fixture)));
    for n in 1..=3 {
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        poll_until("a signal", || written_signals(&fixture) == n);
    }
    kill_process_group(Pid::from_child(&child), Signal::TERM).unwrap();
    poll_until("a signal", || written_signals(&fixture) == 4);
    // `track` handles the signal to the group without a visible effect.
    std::thread::sleep(Duration::from_millis(100));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(count_signals(&fixture, child, 5), 5);
}

/// `track` of this script as the leader of a session with this controlling terminal.
fn start_in_a_session(fixture: &Fixture, terminal: &Terminal, script: &str) -> Child {
    let inner = track_command(fixture, script);
    let mut command = Command::new("setsid");
    command.arg("--ctty").arg(inner.get_program()).args(inner.get_args());
    let child = terminal.spawn(&mut command);
    terminal.read_until("ready\r\n");
    wait_until_track_waits(&child);
    child
}

#[test]
fn signal_from_the_terminal_reaches_the_command_once() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let child =
        start_in_a_session(&fixture, &terminal, &counting_script(&fixture).replace("TERM", "INT"));
    // Ctrl-C.
    terminal.write(b"\x03").unwrap();
    assert_eq!(count_signals(&fixture, child, 1), 1);
}

#[test]
fn hangup_of_the_terminal_reaches_the_command() {
    let fixture = deploy_fixture();
    let terminal = Terminal::new();
    let child =
        start_in_a_session(&fixture, &terminal, &counting_script(&fixture).replace("TERM", "HUP"));
    drop(terminal);
    assert_eq!(count_signals(&fixture, child, 1), 1);
}

#[test]
fn command_in_another_process_group_gets_the_signals_of_tracks_group() {
    let fixture = deploy_fixture();
    let script = counting_script(&fixture);
    let child = start_in_a_group(
        &mut fixture.command(&[&TRACK[..], &["setsid", "sh", "-c", &script]].concat()),
    );
    kill_process_group(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(count_signals(&fixture, child, 1), 1);
}

/// Locks the outbox.
fn lock_outbox(fixture: &Fixture) -> rusqlite::Connection {
    // Creates the file if it is missing.
    assert_eq!(track(fixture, "exit 0").0, Some(0));
    let other = rusqlite::Connection::open(fixture.outbox()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}

#[test]
fn signal_before_the_start_prevents_the_start() {
    let fixture = deploy_fixture();
    let other = lock_outbox(&fixture);
    let before = fixture.master.received().len();
    let ran = path(&fixture, "ran");
    let mut child =
        track_command(&fixture, &format!("touch '{ran}'")).stderr(Stdio::piped()).spawn().unwrap();
    // `track` waits up to 1 s for the outbox. No event shows that it waits, or that it has given
    // up.
    std::thread::sleep(Duration::from_millis(400));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    std::thread::sleep(Duration::from_millis(1_000));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert!(!fs::exists(&ran).unwrap());
    let error = "ended by signal 15 before the command started".to_owned();
    assert_eq!(
        (queued(&fixture), owners(&fixture)),
        (vec![("d".to_owned(), Some(error), false)], vec![None])
    );
    assert_eq!(fixture.master.received().len(), before, "run delivers it");
}

#[test]
fn missing_command_ends_at_once() {
    let fixture = deploy_fixture();
    let since = Instant::now();
    assert_eq!(
        fixture.command(&[&TRACK[..], &["/nonexistent"]].concat()).output().unwrap().status.code(),
        Some(127)
    );
    assert!(since.elapsed() < Duration::from_millis(900), "{:?}", since.elapsed());
}

#[test]
fn signal_during_the_report_leaves_it_to_run_at_once() {
    for name in [Signal::TERM, Signal::INT, Signal::HUP] {
        let fixture = deploy_fixture();
        fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
        let mut command = track_command(&fixture, "echo why >&2; exit 3");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        assert!(fixture.master.wait_until(TIMEOUT, |seen| !seen.received().is_empty()));
        let since = Instant::now();
        kill_process(Pid::from_child(&child), name).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3));
        assert!(since.elapsed() < Duration::from_secs(2), "{name:?}: {:?}", since.elapsed());
        let mut log = String::new();
        child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert!(log.contains("error=\"interrupted by a signal\""), "{log}");
        let row = ("d".to_owned(), Some("why".to_owned()), false);
        assert_eq!((queued(&fixture), owners(&fixture)), (vec![row], vec![None]));
    }
}

#[test]
fn timeout_limits_the_report_and_no_wait_sends_none() {
    for (options, least, requests) in [(["--timeout=300ms"], 300, 1), (["--no-wait"], 0, 0)] {
        let fixture = deploy_fixture();
        fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
        let arguments = [&TRACK[..5], &options, &["--", "sh", "-c", "exit 3"]].concat();
        let since = Instant::now();
        assert_eq!(
            fixture.command(&arguments).stderr(Stdio::null()).status().unwrap().code(),
            Some(3)
        );
        let took = since.elapsed();
        assert!(
            (Duration::from_millis(least)..Duration::from_secs(3)).contains(&took),
            "{options:?}: {took:?}"
        );
        assert_eq!(
            (fixture.master.received().len(), owners(&fixture)),
            (requests, vec![None]),
            "{options:?}"
        );
    }
}

#[test]
fn lock_that_is_released_before_the_end_loses_no_report() {
    let fixture = deploy_fixture();
    let other = lock_outbox(&fixture);
    fixture.master.open_operation(&fixture.worker.uuid, "d", "deploy");
    let fifo = fifo(&fixture);
    let (mut child, _stdout) = start_track(&fixture, &waiting_script(&fifo, "exit 3"));
    other.execute_batch("COMMIT").unwrap();
    // The report cannot be sent, so it is queued in the file.
    fixture.master.always(Some(Fault::NeverAnswer(Effect::Lost)));
    release(fifo);
    fixture.wait_for_requests(2);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(queued(&fixture), [("d".to_owned(), Some("exited with 3".to_owned()), false)]);
}

#[test]
fn lock_that_outlasts_the_command_loses_no_report_without_a_master() {
    let mut fixture = deploy_fixture();
    let other = lock_outbox(&fixture);
    fixture.master.stop();
    let mut child = track_command(&fixture, "exit 3").stderr(Stdio::piped()).spawn().unwrap();
    // Longer than each wait of `track` for the outbox.
    std::thread::sleep(Duration::from_millis(3_500));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_eq!(queued(&fixture), [("d".to_owned(), Some("exited with 3".to_owned()), false)]);
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(
        log.contains("not delivered; queued for decnet-heartbeat run") && !log.contains("neither"),
        "{log}"
    );
}

#[test]
fn lock_at_the_end_does_not_change_the_outcome() {
    let fixture = deploy_fixture();
    let fifo = fifo(&fixture);
    let (mut child, _stdout) = start_track(&fixture, &waiting_script(&fifo, "exit 0"));
    let other = rusqlite::Connection::open(fixture.outbox()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    release(fifo);
    // Longer than each wait of `track` for the outbox.
    std::thread::sleep(Duration::from_millis(3_500));
    other.execute_batch("COMMIT").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!((rows(&fixture), queued(&fixture)), (vec![(RowStatus::Succeeded, None)], vec![]));
}

#[test]
fn invalid_ini_stops_neither_the_command_nor_the_report() {
    let fixture = deploy_fixture();
    let ini = path(&fixture, "decnet.ini");
    let good = path(&fixture, "good.ini");
    let fixed = path(&fixture, "fixed");
    let script = format!("if [ -e '{fixed}' ]; then cp '{good}' '{ini}'; fi; echo why >&2; exit 4");
    for is_fixed in [false, true] {
        // The command writes the ini.
        let mut command = track_command(&fixture, &script);
        fs::copy(&ini, &good).unwrap();
        if is_fixed {
            fs::write(&fixed, "").unwrap();
        }
        File::options()
            .append(true)
            .open(&ini)
            .unwrap()
            .write_all(b"[agent]\nmaster-host = a b\n")
            .unwrap();
        let output = command.output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{log}");
        assert!(
            log.contains("could not record the operation; trying again after the command: error="),
            "{log}"
        );
        assert_eq!(
            log.contains("report lost, neither delivered nor queued: error="),
            !is_fixed,
            "{log}"
        );
    }
    assert_eq!(row(&fixture), (RowStatus::Failed, Some("why".to_owned())));
}
