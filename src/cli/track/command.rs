//! The command that `track` runs: stdin, stdout, stderr and signals pass through. The main thread waits for its end and
//! passes signals on, without a thread.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal, getpgid, getpgrp, kill_process, pidfd_open};
use signal_hook::consts::SIGWINCH;

use super::stderr::{Outputs, Stderr};
use crate::cli::command_signals::{Caught, Signals, wait};
use crate::cli::output::complain;
use crate::delta::Outcome;
use crate::limits;
use crate::text::{last, sanitize};

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// As a shell would exit: the command's own code, 128 and the signal that ended it, 127 where there is no such
    /// command, 126 where it cannot be started.
    pub(super) code: u8,
}

impl Ended {
    /// A signal came before the command was started, so it was not.
    pub(super) fn before_the_start(signal: i32) -> Self {
        let error = format!("ended by signal {signal} before the command started");
        Self { outcome: Outcome::Failed(error), code: exit_code(128 + signal) }
    }

    fn not_started(name: &str, error: &io::Error) -> Self {
        let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        Self { outcome: Outcome::Failed(format!("{name} cannot be run: {error}")), code }
    }

    /// It was started, and is gone.
    fn unknown(error: &io::Error) -> Self {
        Self { outcome: Outcome::Failed(format!("how it ended is not known: {error}")), code: 1 }
    }

    /// An error is what the command itself wrote, where it exited by itself: a prefix would say nothing more, and the
    /// row's reader sees its first line. Of a signal the command cannot write.
    fn of(status: ExitStatus, tail: &str) -> Self {
        let (error, code) = match (status.code(), status.signal()) {
            (Some(0), _) => return Self { outcome: Outcome::Succeeded, code: 0 },
            (Some(code), _) if tail.is_empty() => (format!("exited with {code}"), code),
            (Some(code), _) => (last(tail, limits::DELTA_ERROR).to_owned(), code),
            (None, signal) => {
                let signal = signal.unwrap_or_default();
                let what = format!("ended by signal {signal}");
                let room = limits::DELTA_ERROR.saturating_sub(what.chars().count() + 2);
                let error =
                    if tail.is_empty() { what } else { format!("{what}: {}", last(tail, room)) };
                (error, 128 + signal)
            }
        };
        Self { outcome: Outcome::Failed(error), code: exit_code(code) }
    }
}

/// Codes are a byte, and signals end at 64.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// Runs it to its end, and passes signals on meanwhile.
pub(super) fn run(
    command: &[OsString],
    outputs: Outputs,
    signals: &mut Signals,
    stderr: &mut Stderr,
) -> Ended {
    let mut child = match start(command, outputs) {
        Ok(child) => child,
        Err(error) => {
            let name =
                command.first().map(|name| sanitize(&name.to_string_lossy())).unwrap_or_default();
            complain(&format!("{name}: {error}"));
            return Ended::not_started(&name, &error);
        }
    };
    match wait_for_its_end(&mut child, signals, stderr) {
        Ok(status) => Ended::of(status, &stderr.tail()),
        Err(error) => Ended::unknown(&error),
    }
}

/// An error only where the system knows nothing of the command any more.
fn wait_for_its_end(
    child: &mut Child,
    signals: &mut Signals,
    stderr: &mut Stderr,
) -> io::Result<ExitStatus> {
    for caught in signals.pending() {
        pass_on_early(caught, child, stderr);
    }
    let end: Option<OwnedFd> = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok();
    loop {
        let mend = stderr.mend();
        if let Some(status) = child.try_wait()? {
            // What has come up to now was for the command.
            signals.pending();
            return Ok(status);
        }
        let files: Vec<_> = signals.fd().into_iter().chain(end.as_ref().map(AsFd::as_fd)).collect();
        // SIGCHLD wakes us, too, unless it cannot be caught or whoever started us had it blocked.
        let look = end.is_none().then(|| Instant::now() + limits::COMMAND_CHECK);
        if wait(&files, look.or(mend)).is_err() {
            thread::sleep(limits::COMMAND_CHECK);
        }
        for caught in signals.pending() {
            pass_on(caught, child, stderr);
        }
    }
}

/// What the command writes to stays open in it alone.
fn start(command: &[OsString], outputs: Outputs) -> io::Result<Child> {
    let [program, arguments @ ..] = command else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut command = Command::new(program);
    command.args(arguments);
    if let Some(stdout) = outputs.stdout {
        command.stdout(stdout);
    }
    if let Some(stderr) = outputs.stderr {
        command.stderr(stderr);
    }
    command.spawn()
}

/// Passes a signal on, unless the command has it, because it came to the whole process group that the command is still in.
fn pass_on(Caught { signal, by_process }: Caught, child: &Child, stderr: &mut Stderr) {
    if signal == SIGWINCH {
        // The command may have asked for the size before it was the new one.
        if stderr.resize() || by_process {
            send(child, signal);
        }
        return;
    }
    // A terminal sends to a group, except that its end comes to the leader of the session alone.
    let came_to_group = stderr.group_got(signal).unwrap_or(!by_process);
    let is_in_our_group =
        getpgid(Some(Pid::from_child(child))).is_ok_and(|group| group == getpgrp());
    if !(came_to_group && is_in_our_group) {
        send(child, signal);
    }
}

/// Passes on what came about when the command was started. Whether it was in the group already cannot be known, and twice is
/// better than never.
fn pass_on_early(caught: Caught, child: &Child, stderr: &mut Stderr) {
    if caught.signal == SIGWINCH {
        return pass_on(caught, child, stderr);
    }
    // So that it is not taken for the next one.
    stderr.group_got(caught.signal);
    send(child, caught.signal);
}

fn send(child: &Child, signal: i32) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        // It is not reaped yet, so the pid is its own. One that has just ended needs no signal.
        let _ = kill_process(Pid::from_child(child), signal);
    }
}
