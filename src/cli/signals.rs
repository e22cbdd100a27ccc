//! What the program does on a signal. Those that it survives have a handler that does nothing: an ignored signal would be
//! ignored by a command that `track` starts, too. A signal that was ignored when the program started, as SIGHUP is under
//! `nohup`, stays ignored. One that was blocked does not stay blocked: nobody could stop the program.
//!
//! | signal | `run` | other commands |
//! | --- | --- | --- |
//! | TERM, INT | stops; another one, a moment later, ends it at once | ends (`track` passes it on) |
//! | HUP | reopens `--log-file` | ends (`track` passes it on) |
//! | XFSZ | the file in question is full | the same |
//! | USR1, USR2, ALRM, VTALRM, PROF, IO, STKFLT, PWR, RTMIN to RTMAX | nothing | ends |
//! | PIPE | nothing; Rust's runtime ignores it | the same |
//! | QUIT, ABRT, SEGV, XCPU and the like | the system's default: a core dump | the same |
//! | STOP, TSTP, TTIN, TTOU, CONT | the system's default: job control | the same |

use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, bounded, never};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXFSZ,
};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::logging;
use crate::error::Error;
use crate::limits;

/// Signals that would end `run` and mean nothing to it. systemd counts an end by some of them as a clean one.
const MEANINGLESS: [c_int; 8] =
    [SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, libc::SIGSTKFLT, libc::SIGPWR];

/// For every process, before it writes its first file: a file that may not grow further (`ulimit -f`) is a write that fails,
/// as on a full disk, and not the end.
pub(super) fn survive_file_size_limit() -> Result<(), Error> {
    survive([SIGXFSZ])
}

/// For every command. For `run`, the signals that ask it to stop; for other commands none ever comes.
pub(super) fn start(is_run: bool) -> Result<Receiver<c_int>, Error> {
    survive_file_size_limit()?;
    let stops = if is_run { of_run()? } else { never() };
    // Last: one that waits would end `run`.
    SigSet::all().thread_unblock().map_err(|error| failed(error.into()))?;
    Ok(stops)
}

/// Until the log file is open SIGHUP does nothing.
fn of_run() -> Result<Receiver<c_int>, Error> {
    const NAME: &str = "signals";
    survive(MEANINGLESS.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()))?;
    let ignored = ignored();
    let wanted: Vec<_> =
        [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|signal| !has(ignored, *signal)).collect();
    let is_last = Arc::new(AtomicBool::new(false));
    for signal in wanted.iter().copied().filter(|signal| *signal != SIGHUP) {
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&is_last)).map_err(failed)?;
    }
    let mut caught = Signals::new(wanted).map_err(failed)?;
    let (sender, stops) = bounded(1);
    let act = move || {
        for signal in caught.forever() {
            if signal == SIGHUP {
                logging::reopen();
                continue;
            }
            // One is enough.
            let _ = sender.try_send(signal);
            // What signals a process and then its group, as timeout(1) does, has not asked twice.
            thread::sleep(limits::SAME_STOP);
            is_last.store(true, Ordering::SeqCst);
        }
    };
    thread::Builder::new()
        .name(NAME.to_owned())
        .spawn(act)
        .map_err(|source| Error::thread(NAME, source))?;
    Ok(stops)
}

/// For the thread that writes the log: a terminal in the mode `tostop` would stop the whole process, where it is not in the
/// foreground. This one writes there all the same.
pub(super) fn write_to_any_terminal() {
    // There is no error for a set of signals that the library made.
    let _ = SigSet::from(Signal::SIGTTOU).thread_block();
}

fn survive(signals: impl IntoIterator<Item = c_int>) -> Result<(), Error> {
    let (ignored, unread) = (ignored(), Arc::new(AtomicBool::new(false)));
    for signal in signals.into_iter().filter(|signal| !has(ignored, *signal)) {
        flag::register(signal, Arc::clone(&unread)).map_err(failed)?;
    }
    Ok(())
}

fn failed(source: io::Error) -> Error {
    Error::setting("signals", "cannot be caught").with_source(source)
}

/// The signals that this process ignores, a bit each from the first on. Where the system does not say, none.
pub(super) fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

pub(super) fn has(signals: u64, signal: c_int) -> bool {
    signals & 1 << (signal - 1) != 0
}
