//! Runs the command of `track`. Runs on the main thread, which waits for the command's end and
//! passes signals on to it.

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
use crate::cli::command_signals::{CaughtSignal, Signals, wait};
use crate::cli::logging::report_error;
use crate::delta::Outcome;
use crate::limits;
use crate::text::{last, sanitize};

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommandEnd {
    pub(super) outcome: Outcome,
    /// The exit code, as of a shell: the command's own, or 128 plus the signal that ended it, 127
    /// if the command does not exist, 126 if it cannot be started.
    pub(super) code: u8,
}

impl CommandEnd {
    /// A signal arrived before the start, so the command was not started.
    pub(super) fn before_start(signal: i32) -> Self {
        let error = format!("ended by signal {signal} before the command started");
        Self { outcome: Outcome::Failed(error), code: exit_code(128 + signal) }
    }

    fn not_started(name: &str, error: &io::Error) -> Self {
        let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        Self { outcome: Outcome::Failed(format!("{name} cannot be run: {error}")), code }
    }

    /// The system does not report how the command ended.
    fn unknown(error: &io::Error) -> Self {
        Self { outcome: Outcome::Failed(format!("its exit status is unknown: {error}")), code: 1 }
    }

    /// The error of a command that exited is the tail of its stderr, without a prefix: the master
    /// shows its first line. A signal is named, as the command cannot report it.
    fn of(status: ExitStatus, tail: &str) -> Self {
        let (error, code) = match (status.code(), status.signal()) {
            (Some(0), _) => return Self { outcome: Outcome::Succeeded, code: 0 },
            (Some(code), _) if tail.is_empty() => (format!("exited with {code}"), code),
            (Some(code), _) => (last(tail, limits::DELTA_ERROR).to_owned(), code),
            (None, signal) => {
                let signal = signal.unwrap_or_default();
                let prefix = format!("ended by signal {signal}");
                let room = limits::DELTA_ERROR.saturating_sub(prefix.chars().count() + 2);
                let error = if tail.is_empty() {
                    prefix
                } else {
                    format!("{prefix}: {}", last(tail, room))
                };
                (error, 128 + signal)
            }
        };
        Self { outcome: Outcome::Failed(error), code: exit_code(code) }
    }
}

/// Exit codes are one byte; 128 plus the highest signal, 64, fits.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// Runs the command to its end, and passes signals on to it.
pub(super) fn run(
    command: &[OsString],
    outputs: Outputs,
    signals: &mut Signals,
    stderr: &mut Stderr,
) -> CommandEnd {
    let mut child = match start(command, outputs) {
        Ok(child) => child,
        Err(error) => {
            let name =
                command.first().map(|name| sanitize(&name.to_string_lossy())).unwrap_or_default();
            report_error(&format!("{name}: {error}"));
            return CommandEnd::not_started(&name, &error);
        }
    };
    match wait_for_end(&mut child, signals, stderr) {
        Ok(status) => CommandEnd::of(status, &stderr.tail()),
        Err(error) => CommandEnd::unknown(&error),
    }
}

/// Fails if the system does not report how the command ended.
fn wait_for_end(
    child: &mut Child,
    signals: &mut Signals,
    stderr: &mut Stderr,
) -> io::Result<ExitStatus> {
    for caught in signals.pending() {
        pass_on_at_start(caught, child, stderr);
    }
    let pidfd: Option<OwnedFd> = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok();
    loop {
        let next_restart = stderr.restart_companion();
        if let Some(status) = child.try_wait()? {
            // Signals up to now were for the command, and do not end the report.
            signals.pending();
            return Ok(status);
        }
        let files: Vec<_> =
            signals.fd().into_iter().chain(pidfd.as_ref().map(AsFd::as_fd)).collect();
        // SIGCHLD also ends the wait, unless it cannot be caught or is blocked by the parent
        // process.
        let next_look = pidfd.is_none().then(|| Instant::now() + limits::COMMAND_CHECK);
        if wait(&files, next_look.or(next_restart)).is_err() {
            thread::sleep(limits::COMMAND_CHECK);
        }
        for caught in signals.pending() {
            pass_on(caught, child, stderr);
        }
    }
}

/// Consumes `outputs`, so that only the command holds their write ends.
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

/// Passes a signal on, unless it was sent to the whole process group and the command is still in
/// it.
fn pass_on(
    CaughtSignal { signal, is_from_process }: CaughtSignal,
    child: &Child,
    stderr: &mut Stderr,
) {
    if signal == SIGWINCH {
        // The command may have read the old size before `resize`.
        if stderr.resize() || is_from_process {
            send(child, signal);
        }
        return;
    }
    // A terminal signals a group, except that its hangup signals only the session leader.
    let is_for_group = stderr.group_received(signal).unwrap_or(!is_from_process);
    let is_in_our_group =
        getpgid(Some(Pid::from_child(child))).is_ok_and(|group| group == getpgrp());
    if !(is_for_group && is_in_our_group) {
        send(child, signal);
    }
}

/// Passes on a signal that arrived while the command was started. Whether the command was in the
/// group already is unknown; a signal that arrives twice is better than none.
fn pass_on_at_start(caught: CaughtSignal, child: &Child, stderr: &mut Stderr) {
    if caught.signal == SIGWINCH {
        return pass_on(caught, child, stderr);
    }
    // So that the companion does not count it for the next signal.
    stderr.group_received(caught.signal);
    send(child, caught.signal);
}

fn send(child: &Child, signal: i32) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        // The command is not reaped yet, so the pid is still its own. The error that it has ended
        // is ignored.
        let _ = kill_process(Pid::from_child(child), signal);
    }
}
