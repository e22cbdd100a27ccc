//! The signals that `track` catches. A handler writes to a socket, and the main thread polls that
//! socket; there is no thread for signals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::flag;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithOrigin;

use super::signals::without_ignored;

/// Signals that `track` passes on to its command: requests to end or to do something.
pub(super) const COMMANDS: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// Signals that request an end.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Catches signals from its creation until the process ends. `None`: they cannot be caught.
#[derive(Debug)]
pub(super) struct Signals(Option<SignalDelivery<UnixStream, WithOrigin>>);

/// A signal that was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CaughtSignal {
    pub(super) signal: i32,
    /// A process sent it. Otherwise the terminal sent it to the whole process group.
    pub(super) is_from_process: bool,
}

impl Signals {
    /// Catches the command's signals and SIGWINCH, except those that were ignored at the start, as
    /// SIGHUP is under `nohup`. Also catches SIGCHLD in any case: while it is ignored, the system
    /// discards the exit status of a child.
    ///
    /// The command gets the default action of each signal, because `exec` resets handlers. If
    /// signals cannot be caught, the command still runs, but a signal may end `track` before its
    /// report.
    pub(super) fn catch() -> Self {
        let optional = without_ignored(COMMANDS);
        let caught = UnixStream::pair().and_then(|(read, write)| {
            SignalDelivery::with_pipe(
                read,
                write,
                WithOrigin::default(),
                optional.chain([SIGCHLD, SIGWINCH]),
            )
        });
        if let Err(error) = &caught {
            log::warn!(
                "signals cannot be caught; one may end track before its report: error={:?}",
                error.to_string()
            );
            // A flag needs no file descriptor.
            let _ = flag::register(SIGCHLD, Arc::default());
        }
        Self(caught.ok())
    }

    /// The command's signals and SIGWINCH, as far as they were caught since the last call.
    pub(super) fn pending(&mut self) -> Vec<CaughtSignal> {
        let is_passed_on = |signal| COMMANDS.contains(&signal) || signal == SIGWINCH;
        let caught = self
            .0
            .iter_mut()
            .flat_map(SignalDelivery::pending)
            .filter(|origin| is_passed_on(origin.signal));
        caught
            .map(|origin| CaughtSignal {
                signal: origin.signal,
                is_from_process: origin.process.is_some(),
            })
            .collect()
    }

    /// The first of the command's signals that was caught since the last call. By default it would
    /// have ended the process.
    pub(super) fn first_for_command(&mut self) -> Option<i32> {
        self.pending()
            .into_iter()
            .map(|caught| caught.signal)
            .find(|signal| COMMANDS.contains(signal))
    }

    /// Whether a signal that requests an end was caught since the last call.
    pub(super) fn is_end_requested(&mut self) -> bool {
        self.pending().into_iter().any(|caught| ENDING.contains(&caught.signal))
    }

    /// Readable when a signal was caught.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|caught| caught.get_read().as_fd())
    }
}

/// Waits until one of the files is readable or closed, at most until `until`. It may return early.
pub(super) fn wait(files: &[BorrowedFd<'_>], until: Option<Instant>) -> io::Result<()> {
    let mut polled: Vec<_> =
        files.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)).collect();
    let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
