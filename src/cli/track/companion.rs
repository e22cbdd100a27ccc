//! The companion of `track`: a process that copies the stderr of the command to ours, and stores
//! the tail for the report. It is this program, started with the name [`NAME`] as `argv[0]`. It has
//! one thread.
//!
//! - It is a process, because it must outlive `track`: processes that the command leaves running
//!   write to the same stderr. It ends when no process can write to that any more and everything is
//!   written. So the end of `track`, even by SIGKILL, neither blocks the command nor loses its
//!   output. If the companion is killed, `track` starts another one.
//! - Its stdin is the file that the command writes to, a pipe or the controlling side of a
//!   pseudoterminal. Its stderr is the real one. Its stdout is a socket to `track`. It has no other
//!   file of `track`.
//! - No write blocks: it writes as much as `poll` reports room for, and queues the rest. When the
//!   queue is full, it stops reading, and the command blocks as it would on the real stderr.
//! - After an error of the real stderr, queued output is dropped, and the command can go on.
//! - It stays in the process group of `track`, and signals to the group do not end it. So it can
//!   answer whether a signal was sent to the group, and has reached the command already. The origin
//!   of a signal does not contain that.
//!
//! The socket carries one message in each packet: a request, `[kind, argument, serial]`, and its
//! response, `[kind, serial, …]`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::{Errno, read, write};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::cli::command_signals::COMMANDS;
use crate::cli::signals::survive_file_size_limit;
use crate::limits;

/// The name of the process.
pub(super) const NAME: &str = "decnet-heartbeat-stderr";

/// The companion has started. Not a response.
pub(super) const READY: u8 = b'r';
/// Did the companion receive the signal of the argument since the last such request? The response
/// is one byte, 1 or 0.
pub(super) const SIGNAL: u8 = b's';
/// The response is the tail of the output.
pub(super) const TAIL: u8 = b't';
/// Everything before the tail request is written. The second response to [`TAIL`], of one byte: 1
/// if a process may write more, and 0 if the companion ends now.
pub(super) const WRITTEN: u8 = b'w';

/// Whether this process was started as a companion.
pub(in crate::cli) fn is_requested() -> bool {
    let mut arguments = std::env::args_os();
    arguments.next().is_some_and(|name| name == NAME) && arguments.next().is_none()
}

/// Runs the companion.
pub(in crate::cli) fn main() -> ExitCode {
    match Companion::start().and_then(|mut companion| companion.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

struct Companion {
    signals: SignalDelivery<UnixStream, SignalOnly>,
    /// When signals arrived that `track` has not asked about.
    received: BTreeMap<i32, Instant>,
    /// A process may still write to the command's stderr.
    is_open: bool,
    /// `track` may still send requests, or waits for [`WRITTEN`].
    is_tracked: bool,
    /// Output that was read and is not written yet.
    queue: VecDeque<u8>,
    tail: VecDeque<u8>,
    /// Our stderr.
    output: OwnedFd,
    /// The most bytes of one write to it.
    write_limit: usize,
    /// When to write again, after there was less room than `poll` had reported.
    resume: Option<Instant>,
    /// The serial of the tail request, and how many bytes are to be written before [`WRITTEN`] is
    /// sent.
    pending_written: Option<(u8, usize)>,
}

/// Our stderr, and how much can be written to it without blocking. `poll` reports a terminal as
/// writable if it has room for one byte. So a terminal is opened again in non-blocking mode: other
/// processes share the inherited one, whose mode must not change.
fn output() -> io::Result<(OwnedFd, usize)> {
    let inherited = io::stderr().as_fd().try_clone_to_owned()?;
    if !inherited.is_terminal() {
        return Ok((inherited, limits::STDERR_WRITE));
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // This fails if the terminal belongs to another user.
    let opened = open("/proc/self/fd/2", flags, Mode::empty());
    Ok(opened.map_or((inherited, limits::TERMINAL_WRITE), |opened| (opened, limits::STDERR_WRITE)))
}

/// Which files are ready.
struct Ready {
    input: bool,
    output: bool,
    request: bool,
}

impl Companion {
    fn start() -> io::Result<Self> {
        // At the file size limit the real stderr fails, and the companion continues.
        survive_file_size_limit().map_err(io::Error::other)?;
        let (caught, handler) = UnixStream::pair()?;
        let signals = SignalDelivery::with_pipe(caught, handler, SignalOnly, COMMANDS)?;
        // No other running process reads from this end.
        fcntl_setfl(io::stdin(), fcntl_getfl(io::stdin())? | OFlags::NONBLOCK)?;
        let (output, write_limit) = output()?;
        send(io::stdout(), &[READY, 0], SendFlags::NOSIGNAL)?;
        Ok(Self {
            signals,
            received: BTreeMap::new(),
            is_open: true,
            is_tracked: true,
            queue: VecDeque::new(),
            tail: VecDeque::new(),
            output,
            write_limit,
            resume: None,
            pending_written: None,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        while self.is_open || self.is_tracked || !self.queue.is_empty() {
            let ready = self.wait()?;
            if self.note_signals() && !self.is_open && !self.is_tracked {
                // Only a blocked reader of the real stderr is left, and the sender of the signal
                // wants the process group to end.
                break;
            }
            if ready.input {
                self.read_output(limits::STDERR_QUEUE);
            }
            if ready.output {
                self.write_output();
            }
            if ready.request {
                self.respond();
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> io::Result<Ready> {
        self.resume = self.resume.filter(|resume| Instant::now() < *resume);
        let input = io::stdin();
        let socket = io::stdout();
        let reads = self.is_open && self.queue.len() < limits::STDERR_QUEUE;
        let writes = !self.queue.is_empty() && self.resume.is_none();
        let mut files = vec![PollFd::new(self.signals.get_read(), PollFlags::IN)];
        // `poll` also reports closed files, so only the files that are needed are polled.
        let polled = [
            (reads, input.as_fd(), PollFlags::IN),
            (writes, self.output.as_fd(), PollFlags::OUT),
            (self.is_tracked, socket.as_fd(), PollFlags::IN),
        ];
        let polled = polled.into_iter().filter(|(is_polled, ..)| *is_polled);
        files.extend(polled.map(|(_, file, flags)| PollFd::from_borrowed_fd(file, flags)));
        let pause = self.resume.map(|resume| resume.saturating_duration_since(Instant::now()));
        let pause = pause.and_then(|pause| Timespec::try_from(pause).ok());
        match poll(&mut files, pause.as_ref()) {
            Ok(_) | Err(Errno::INTR) => (),
            Err(error) => return Err(error.into()),
        }
        let mut ready = files.iter().skip(1).map(|file| !file.revents().is_empty());
        let mut is_ready = |is_polled| is_polled && ready.next().unwrap_or(false);
        Ok(Ready {
            input: is_ready(reads),
            output: is_ready(writes),
            request: is_ready(self.is_tracked),
        })
    }

    /// Records signals, and returns whether there were any.
    fn note_signals(&mut self) -> bool {
        let now = Instant::now();
        let mut has_any = false;
        for signal in self.signals.pending() {
            self.received.insert(signal, now);
            has_any = true;
        }
        has_any
    }

    /// Reads once, if fewer than `limit` bytes are queued. Returns whether it read anything.
    fn read_output(&mut self, limit: usize) -> bool {
        let mut buffer = [0; limits::STDERR_WRITE];
        let room = limit.saturating_sub(self.queue.len()).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
            return false;
        };
        let output = match read(io::stdin(), &mut *buffer) {
            Ok(length @ 1..) => buffer.get(..length).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => return false,
            // EIO: no process has the pseudoterminal open any more.
            Ok(0) | Err(_) => {
                self.is_open = false;
                return false;
            }
        };
        self.queue.extend(output);
        self.tail.extend(output);
        let excess = self.tail.len().saturating_sub(limits::STDERR_TAIL);
        self.tail.drain(..excess);
        true
    }

    /// Writes once.
    fn write_output(&mut self) {
        let (first, _) = self.queue.as_slices();
        let chunk = first.get(..self.write_limit).unwrap_or(first);
        let written = match write(&self.output, chunk) {
            Ok(length) => length,
            Err(Errno::INTR) => 0,
            Err(Errno::AGAIN) => {
                self.resume = Some(Instant::now() + limits::STDERR_PAUSE);
                0
            }
            Err(_) => self.queue.len(),
        };
        self.queue.drain(..written);
        if let Some((_, left)) = &mut self.pending_written {
            *left = left.saturating_sub(written);
        }
        self.send_written();
    }

    fn respond(&mut self) {
        let mut request = [0; 3];
        match recv(io::stdout(), &mut request, RecvFlags::DONTWAIT) {
            Ok((3, _)) => (),
            Err(Errno::AGAIN | Errno::INTR) => return,
            // `track` has ended.
            Ok(_) | Err(_) => {
                self.is_tracked = false;
                return;
            }
        }
        let [kind, argument, serial] = request;
        match kind {
            SIGNAL => {
                self.note_signals();
                let received = self.received.remove(&i32::from(argument));
                let is_recent = received.is_some_and(|at| at.elapsed() < limits::GROUP_SIGNAL_AGE);
                self.send(&[kind, serial, u8::from(is_recent)]);
            }
            TAIL => {
                // Read what is in the pipe, which holds as much as the queue.
                let limit = self.queue.len() + limits::STDERR_QUEUE;
                while self.is_open && self.read_output(limit) {}
                let mut response = vec![kind, serial];
                response.extend(&self.tail);
                self.send(&response);
                self.pending_written = Some((serial, self.queue.len()));
                self.send_written();
            }
            _ => (),
        }
    }

    /// Sends [`WRITTEN`] if everything is written.
    fn send_written(&mut self) {
        if let Some((serial, 0)) = self.pending_written {
            self.send(&[WRITTEN, serial, u8::from(self.is_open)]);
            self.pending_written = None;
            self.is_tracked = false;
        }
    }

    fn send(&mut self, message: &[u8]) {
        // An error means that `track` has ended; the next `recv` reports that.
        let _ = send(io::stdout(), message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}
