//! The command that `track` runs: stdin, stdout, stderr and signals pass through, and the tail of its stderr is kept for the
//! report. The main thread waits for its end and passes signals on; a thread each reads its stderr, waits for it, and
//! catches signals.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, bounded, select, unbounded};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;

use super::output::complain;
use crate::delta::Outcome;
use crate::error::Error;
use crate::limits;
use crate::text::{last, printable};

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// As a shell would exit: the command's own code, 128 and the signal that ended it, 127 where there is no such
    /// command, 126 where it cannot be started.
    pub(super) code: u8,
}

/// The signals that are the command's, from when they are caught.
#[derive(Debug)]
pub(super) struct Signals(Receiver<i32>);

impl Signals {
    /// Catches all that ask a program to do something. One that was ignored when we started, as under `nohup`, stays
    /// ignored. One that the terminal has sent has reached the command, too, and is not passed on.
    pub(super) fn catch() -> Result<Self, Error> {
        const NAME: &str = "signals";
        let ignored = ignored();
        let wanted = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2].into_iter();
        let wanted = wanted.filter(|signal| ignored & 1 << (signal - 1) == 0);
        let mut caught = SignalsInfo::<WithOrigin>::new(wanted)
            .map_err(|source| Error::setting("signals", "cannot be caught").because(source))?;
        let (sender, receiver) = unbounded();
        let pass_on = move || {
            let sent = caught.forever().filter(|origin| origin.process.is_some());
            sent.map(|origin| origin.signal).try_for_each(|signal| sender.send(signal))
        };
        thread::Builder::new().name(NAME.to_owned()).spawn(pass_on).map_err(|source| Error::thread(NAME, source))?;
        Ok(Self(receiver))
    }
}

/// The ignored signals, a bit each from the first on. Where the system does not say, none.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// Runs it to its end, and passes signals on meanwhile.
pub(super) fn run(command: &[OsString], signals: &Signals) -> Ended {
    run_to_its_end(command, signals).unwrap_or_else(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        let name = command.first().map(|name| printable(&name.to_string_lossy())).unwrap_or_default();
        complain(&format!("{name}: {error}"));
        Ended { outcome: Outcome::Failed(format!("{name} cannot be run: {error}")), code }
    })
}

fn run_to_its_end(command: &[OsString], Signals(signals): &Signals) -> io::Result<Ended> {
    let [program, arguments @ ..] = command else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mut child = Command::new(program).args(arguments).stderr(Stdio::piped()).spawn()?;
    let tail = child.stderr.take().map(Tail::of).transpose()?;
    let ended = end_of(&child)?;
    let pid = Pid::from_child(&child);
    loop {
        select! {
            recv(ended) -> _ => break,
            recv(signals) -> signal => {
                if let Some(signal) = signal.ok().and_then(Signal::from_named_raw) {
                    // It is not reaped yet, so the pid is its own. One that has just ended needs no signal.
                    let _ = kill_process(pid, signal);
                }
            }
        }
    }
    let status = child.wait()?;
    Ok(how(status, &tail.map(Tail::text).unwrap_or_default()))
}

/// Disconnected when the child has ended. It is left to be reaped.
fn end_of(child: &Child) -> io::Result<Receiver<()>> {
    let (alive, ended) = bounded(0);
    let pid = Pid::from_child(child);
    let wait = move || {
        let _alive = alive;
        let ended = || waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while ended().is_err_and(|error| error == Errno::INTR) {}
    };
    thread::Builder::new().name("command".to_owned()).spawn(wait)?;
    Ok(ended)
}

fn how(status: ExitStatus, tail: &str) -> Ended {
    let (what, code) = match (status.code(), status.signal()) {
        (Some(0), _) => return Ended { outcome: Outcome::Succeeded, code: 0 },
        (Some(code), _) => (format!("exited with {code}"), code),
        (None, signal) => {
            let signal = signal.unwrap_or_default();
            (format!("ended by signal {signal}"), 128 + signal)
        }
    };
    let error = match limits::DELTA_ERROR.saturating_sub(what.chars().count() + 2) {
        _ if tail.is_empty() => what,
        room => format!("{what}: {}", last(tail, room)),
    };
    // Codes are a byte, and signals end at 64.
    Ended { outcome: Outcome::Failed(error), code: u8::try_from(code).unwrap_or(u8::MAX) }
}

/// The end of what the command says on stderr, while it goes on to ours.
struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    /// Disconnected when nobody can write to it any more.
    closed: Receiver<()>,
}

impl Tail {
    fn of(stderr: ChildStderr) -> io::Result<Self> {
        let kept = Arc::default();
        let (open, closed) = bounded(0);
        let tail = Self { kept: Arc::clone(&kept), closed };
        let pass_on = move || {
            let _open = open;
            copy(stderr, &kept);
        };
        thread::Builder::new().name("stderr".to_owned()).spawn(pass_on)?;
        Ok(tail)
    }

    /// Of a command that has ended. What it has left in the background may hold its stderr open, so not for long.
    fn text(self) -> String {
        let _ = self.closed.recv_timeout(limits::STDERR_GRACE);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(kept.make_contiguous()).trim().to_owned()
    }
}

fn copy(mut stderr: ChildStderr, kept: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 4096];
    loop {
        let said = match stderr.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        // Ours may be closed: the command must be able to go on all the same.
        let _ = io::stderr().write_all(said);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(said);
        let excess = kept.len().saturating_sub(limits::STDERR_TAIL);
        kept.drain(..excess);
    }
}
