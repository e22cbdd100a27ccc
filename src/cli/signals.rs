//! What the program does on a signal. Those that it survives have a handler that does nothing: an ignored signal would be
//! ignored by a command that `track` starts, too. A signal that was ignored when the program started, as SIGHUP is under
//! `nohup`, stays ignored.
//!
//! | signal | `run` | other commands |
//! | --- | --- | --- |
//! | TERM, INT | stops; the second one ends it at once | ends (`track` passes it on) |
//! | HUP | reopens `--log-file` | ends (`track` passes it on) |
//! | XFSZ | the file in question is full | the same |
//! | USR1, USR2, ALRM, VTALRM, PROF, IO, STKFLT, PWR | nothing | ends |
//! | PIPE | nothing; Rust's runtime ignores it | the same |
//! | QUIT, ABRT, SEGV, XCPU and the like | the system's default: a core dump | the same |
//! | STOP, TSTP, TTIN, TTOU, CONT | the system's default: job control | the same |

use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::logging;
use crate::error::Error;

/// Signals that would end `run` and mean nothing to it. systemd counts an end by some of them as a clean one.
const MEANINGLESS: [c_int; 8] = [SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, libc::SIGSTKFLT, libc::SIGPWR];

/// A file that may not grow further (`ulimit -f`) is a write that fails, as on a full disk, and not the end. For every
/// command, before it writes its first file.
pub(super) fn survive_file_size_limit() -> Result<(), Error> {
    survive(&[SIGXFSZ])
}

/// For `run`: the signals that end it. The second one ends the program at once, whatever its threads do. SIGHUP reopens the
/// log file. Both are done by a thread `signals`.
pub(super) fn of_run() -> Result<Receiver<c_int>, Error> {
    const NAME: &str = "signals";
    survive(&MEANINGLESS)?;
    let ignored = ignored();
    let wanted: Vec<_> = [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|signal| !has(ignored, *signal)).collect();
    let asked = Arc::new(AtomicBool::new(false));
    for signal in wanted.iter().copied().filter(|signal| *signal != SIGHUP) {
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&asked)).map_err(failed)?;
        flag::register(signal, Arc::clone(&asked)).map_err(failed)?;
    }
    let mut caught = Signals::new(wanted).map_err(failed)?;
    let (sender, stops) = bounded(1);
    let act = move || {
        for signal in caught.forever() {
            match signal {
                SIGHUP => logging::reopen(),
                // One is enough.
                signal => drop(sender.try_send(signal)),
            }
        }
    };
    thread::Builder::new().name(NAME.to_owned()).spawn(act).map_err(|source| Error::thread(NAME, source))?;
    Ok(stops)
}

fn survive(signals: &[c_int]) -> Result<(), Error> {
    let (ignored, unread) = (ignored(), Arc::new(AtomicBool::new(false)));
    for signal in signals.iter().copied().filter(|signal| !has(ignored, *signal)) {
        flag::register(signal, Arc::clone(&unread)).map_err(failed)?;
    }
    Ok(())
}

fn failed(source: io::Error) -> Error {
    Error::setting("signals", "cannot be caught").because(source)
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
