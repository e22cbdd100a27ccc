//! What the program does on a signal. A signal without effect has a handler that does nothing: if
//! it were ignored, the command of `track` would inherit that. A signal that was ignored when the
//! program started, as SIGHUP is under `nohup`, stays ignored. A signal that was blocked is
//! unblocked: the program must be possible to stop.
//!
//! | signal | `run`, `pipe` | other commands |
//! | --- | --- | --- |
//! | TERM, INT | stops (`pipe` when stdin ends, or at a second one); the next one ends it at once | ends (`track` passes it on) |
//! | HUP | reopens `--log-file` | ends (`track` passes it on) |
//! | XFSZ | no effect; the write fails as on a full disk | the same |
//! | USR1, USR2, ALRM, VTALRM, PROF, IO, STKFLT, PWR, RTMIN to RTMAX | no effect | ends |
//! | PIPE | no effect; Rust's runtime ignores it | the same |
//! | QUIT, ABRT, SEGV, XCPU and the like | the system's default: a core dump | the same |
//! | STOP, TSTP, TTIN, TTOU, CONT | the system's default: job control | the same |

use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use nix::sys::signal::SigSet;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXFSZ,
};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::logging;
use crate::error::Error;
use crate::limits;

/// Signals that have no meaning for `run` but would end it by default.
const WITHOUT_EFFECT: [c_int; 8] =
    [SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, libc::SIGSTKFLT, libc::SIGPWR];

/// Makes a write beyond the file size limit (`ulimit -f`) fail as on a full disk, instead of ending
/// the process. Every process calls it before it writes its first file.
pub(super) fn survive_file_size_limit() -> Result<(), Error> {
    survive([SIGXFSZ])
}

/// Sets up the signals of all commands but `run` and `pipe`.
pub(super) fn start() -> Result<(), Error> {
    survive_file_size_limit()?;
    SigSet::all().thread_unblock().map_err(|error| failed(error.into()))
}

/// Sets up the signals of `run` and `pipe`. SIGHUP has no effect until the log file is open. The
/// receiver gets the signals that stop them. After this many of them, the next one ends the process
/// at once.
pub(super) fn start_run(stops: usize) -> Result<Receiver<c_int>, Error> {
    const NAME: &str = "signals";
    survive(WITHOUT_EFFECT.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()))?;
    let handled: Vec<_> = without_ignored([SIGTERM, SIGINT, SIGHUP]).collect();
    let is_last = Arc::new(AtomicBool::new(false));
    for signal in handled.iter().copied().filter(|signal| *signal != SIGHUP) {
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&is_last)).map_err(failed)?;
    }
    let mut caught = Signals::new(handled).map_err(failed)?;
    let (sender, receiver) = bounded(1);
    let act = move || {
        let mut received = 0;
        loop {
            let Some(signal) = stop_among(caught.wait()) else { continue };
            // If the channel is full, the program is stopping already.
            let _ = sender.try_send(signal);
            // timeout(1) signals a process and then its group: that is one request to stop.
            thread::sleep(limits::SAME_STOP);
            stop_among(caught.pending());
            received += 1;
            if received >= stops {
                is_last.store(true, Ordering::SeqCst);
            }
        }
    };
    thread::Builder::new()
        .name(NAME.to_owned())
        .spawn(act)
        .map_err(|source| Error::thread(NAME, source))?;
    // Last: a pending signal without its handler would end `run`.
    start()?;
    Ok(receiver)
}

/// Acts on SIGHUP, and returns another signal.
fn stop_among(signals: impl Iterator<Item = c_int>) -> Option<c_int> {
    let (hangups, stops): (Vec<_>, Vec<_>) = signals.partition(|signal| *signal == SIGHUP);
    if !hangups.is_empty() {
        logging::reopen();
    }
    stops.first().copied()
}

fn survive(signals: impl IntoIterator<Item = c_int>) -> Result<(), Error> {
    let unread = Arc::new(AtomicBool::new(false));
    for signal in without_ignored(signals) {
        flag::register(signal, Arc::clone(&unread)).map_err(failed)?;
    }
    Ok(())
}

fn failed(source: io::Error) -> Error {
    Error::setting("signals", "cannot be caught").with_source(source)
}

/// Those of the signals that this process does not ignore. If `/proc` cannot be read, all of them.
pub(super) fn without_ignored(
    signals: impl IntoIterator<Item = c_int>,
) -> impl Iterator<Item = c_int> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1.
    let ignored = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    signals.into_iter().filter(move |signal| ignored & 1 << (signal - 1) == 0)
}
