//! The signals that `track` catches, without a thread: a handler writes to a socket, and the main thread waits for that.

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

use super::signals::{has, ignored};

/// The ones that ask a program to end or to do something: the command's, not ours.
pub(super) const COMMANDS: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// The ones that ask a program to end.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Catches signals from when it is made until the process ends. `None`: they cannot be caught.
#[derive(Debug)]
pub(super) struct Signals(Option<SignalDelivery<UnixStream, WithOrigin>>);

/// A signal that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caught {
    pub(super) signal: i32,
    /// A process has sent it. Otherwise the terminal has, to the whole process group.
    pub(super) by_process: bool,
}

impl Signals {
    /// Catches all that are the command's, and the change of a terminal's size. One that was ignored when we started, as
    /// under `nohup`, stays ignored. SIGCHLD is caught in any case: where it is ignored, nobody learns how a child ended.
    ///
    /// The command gets the default action of each, because `exec` resets what is caught. It runs, too, where nothing can be
    /// caught; then a signal may end us before the report.
    pub(super) fn catch() -> Self {
        let ignored = ignored();
        let optional = COMMANDS.into_iter().filter(|signal| !has(ignored, *signal));
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
                "signals cannot be caught, so one may end track before its report: error={:?}",
                error.to_string()
            );
            // This one needs no file.
            let _ = flag::register(SIGCHLD, Arc::default());
        }
        Self(caught.ok())
    }

    /// The command's signals that have come since the last call, and SIGWINCH.
    pub(super) fn pending(&mut self) -> Vec<Caught> {
        let is_passed_on = |signal| COMMANDS.contains(&signal) || signal == SIGWINCH;
        let caught = self
            .0
            .iter_mut()
            .flat_map(SignalDelivery::pending)
            .filter(|origin| is_passed_on(origin.signal));
        caught
            .map(|origin| Caught { signal: origin.signal, by_process: origin.process.is_some() })
            .collect()
    }

    /// The first signal that has come since the last call and that would have ended a program which does not catch it.
    pub(super) fn deadly(&mut self) -> Option<i32> {
        self.pending()
            .into_iter()
            .map(|caught| caught.signal)
            .find(|signal| COMMANDS.contains(signal))
    }

    /// Whether a signal has come since the last call that asks us to end.
    pub(super) fn ask_to_end(&mut self) -> bool {
        self.pending().into_iter().any(|caught| ENDING.contains(&caught.signal))
    }

    /// Readable when a signal has come.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|caught| caught.get_read().as_fd())
    }
}

/// Sleeps until one of these is readable or closed, at the longest until then. It may return early.
pub(super) fn wait(files: &[BorrowedFd<'_>], until: Option<Instant>) -> io::Result<()> {
    let mut polled: Vec<_> =
        files.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)).collect();
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut polled, left.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
