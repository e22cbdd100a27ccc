//! The companion of `track`: a process that copies the stderr of a command to ours and keeps the tail for the report. It is
//! this program, started under a name of its own, and it has one thread.
//!
//! - It is a process, because it must outlive `track`: what a command leaves running writes to the same stderr. It ends
//!   when nobody can write to that any more and all is written. So the end of `track`, a SIGKILL included, neither takes
//!   the reader away from a command nor loses a word of it. `track` starts another one where one is killed.
//! - Its stdin is what the command writes to, a pipe or the controlling side of a pseudoterminal; its stderr is the real
//!   one; its stdout is a socket to `track`. It has no other file of `track`'s.
//! - No write blocks: it writes what `poll` says there is room for. What is not written yet is queued. When the queue is
//!   full it stops reading, and the command waits as it would for the real stderr.
//! - An error of the real stderr drops what is queued, and the command goes on.
//! - It stays in the process group of `track`, and none of the signals that may be sent to a group ends it. So it can tell
//!   `track` whether a signal was sent to the group, and has therefore reached the command already: a signal's origin does
//!   not say that.
//!
//! The socket carries a message a packet: a question, `[kind, argument, serial]`, and its answer, `[kind, serial, …]`.

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
use rustix::termios::{tcgetwinsize, tcsetwinsize};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::cli::command_signals::COMMANDS;
use crate::cli::signals::survive_file_size_limit;
use crate::limits;

/// The name that it is started by.
pub(super) const NAME: &str = "decnet-heartbeat-stderr";

/// It has started. Not an answer.
pub(super) const READY: u8 = b'r';
/// Whether it got the signal of the argument since the last such question. The answer is one byte, 1 or 0.
pub(super) const SIGNAL: u8 = b's';
/// Makes the pseudoterminal as large as the terminal.
pub(super) const SIZE: u8 = b'z';
/// What was written last, which is the answer.
pub(super) const TAIL: u8 = b't';
/// All is written that was there when the tail was asked for. An answer to the same question, its second, of one byte: 1 if
/// somebody may write more, and 0 if the process ends now.
pub(super) const WRITTEN: u8 = b'w';

/// Whether this process is meant to be one.
pub(in crate::cli) fn is_meant() -> bool {
    let mut arguments = std::env::args_os();
    arguments.next().is_some_and(|name| name == NAME) && arguments.next().is_none()
}

/// All of that process.
pub(in crate::cli) fn main() -> ExitCode {
    match Companion::start().and_then(|mut companion| companion.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

struct Companion {
    signals: SignalDelivery<UnixStream, SignalOnly>,
    /// The signals that `track` has not asked about, and when they came.
    seen: BTreeMap<i32, Instant>,
    /// Somebody may still write to it.
    is_open: bool,
    /// `track` may still ask, or waits for [`WRITTEN`].
    is_tracked: bool,
    /// Read, and not written yet.
    queue: VecDeque<u8>,
    tail: VecDeque<u8>,
    /// Our stderr.
    output: OwnedFd,
    /// Bytes of one write to it.
    most: usize,
    /// When it is tried again, after it had less room than `poll` said.
    resume: Option<Instant>,
    /// The serial of the question for the tail, and the bytes that have to be written before [`WRITTEN`] is true.
    owed: Option<(u8, usize)>,
}

/// Our stderr, and how much can be written to it without blocking. A terminal that has room for a byte is writable, so it is
/// opened once more, not to block: others have the one that we were given.
fn output() -> io::Result<(OwnedFd, usize)> {
    let given = io::stderr().as_fd().try_clone_to_owned()?;
    if !given.is_terminal() {
        return Ok((given, limits::STDERR_WRITE));
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // It may be another user's.
    let opened = open("/proc/self/fd/2", flags, Mode::empty());
    Ok(opened.map_or((given, limits::TERMINAL_WRITE), |opened| (opened, limits::STDERR_WRITE)))
}

/// What can be done without waiting.
struct Ready {
    input: bool,
    output: bool,
    question: bool,
}

impl Companion {
    fn start() -> io::Result<Self> {
        // A file that may not grow is an error of the real stderr.
        survive_file_size_limit().map_err(io::Error::other)?;
        let (caught, handler) = UnixStream::pair()?;
        let signals = SignalDelivery::with_pipe(caught, handler, SignalOnly, COMMANDS)?;
        // Nobody else has this end.
        fcntl_setfl(io::stdin(), fcntl_getfl(io::stdin())? | OFlags::NONBLOCK)?;
        let (output, most) = output()?;
        send(io::stdout(), &[READY, 0], SendFlags::NOSIGNAL)?;
        Ok(Self {
            signals,
            seen: BTreeMap::new(),
            is_open: true,
            is_tracked: true,
            queue: VecDeque::new(),
            tail: VecDeque::new(),
            output,
            most,
            resume: None,
            owed: None,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        while self.is_open || self.is_tracked || !self.queue.is_empty() {
            let ready = self.wait()?;
            if self.note_signals() && !self.is_open && !self.is_tracked {
                // Only a reader who does not read is left, and whoever sent this wants the process group to end.
                break;
            }
            if ready.input {
                self.take(limits::STDERR_QUEUE);
            }
            if ready.output {
                self.give();
            }
            if ready.question {
                self.answer();
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> io::Result<Ready> {
        self.resume = self.resume.filter(|resume| Instant::now() < *resume);
        let (input, socket) = (io::stdin(), io::stdout());
        let reads = self.is_open && self.queue.len() < limits::STDERR_QUEUE;
        let writes = !self.queue.is_empty() && self.resume.is_none();
        let mut files = vec![PollFd::new(self.signals.get_read(), PollFlags::IN)];
        // A file that is polled is reported when it is closed, too. So the others are left out.
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
            question: is_ready(self.is_tracked),
        })
    }

    /// Whether there were any.
    fn note_signals(&mut self) -> bool {
        let now = Instant::now();
        let mut came = false;
        for signal in self.signals.pending() {
            self.seen.insert(signal, now);
            came = true;
        }
        came
    }

    /// Reads once, while fewer than so many bytes are queued. Whether there was anything.
    fn take(&mut self, most: usize) -> bool {
        let mut buffer = [0; limits::STDERR_WRITE];
        let room = most.saturating_sub(self.queue.len()).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
            return false;
        };
        let said = match read(io::stdin(), &mut *buffer) {
            Ok(length @ 1..) => buffer.get(..length).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => return false,
            // A pseudoterminal that nobody has open any more is an error, EIO.
            Ok(0) | Err(_) => {
                self.is_open = false;
                return false;
            }
        };
        self.queue.extend(said);
        self.tail.extend(said);
        let excess = self.tail.len().saturating_sub(limits::STDERR_TAIL);
        self.tail.drain(..excess);
        true
    }

    /// Writes once.
    fn give(&mut self) {
        let (first, _) = self.queue.as_slices();
        let chunk = first.get(..self.most).unwrap_or(first);
        let gone = match write(&self.output, chunk) {
            Ok(length) => length,
            Err(Errno::INTR) => 0,
            Err(Errno::AGAIN) => {
                self.resume = Some(Instant::now() + limits::STDERR_PAUSE);
                0
            }
            Err(_) => self.queue.len(),
        };
        self.queue.drain(..gone);
        if let Some((_, left)) = &mut self.owed {
            *left = left.saturating_sub(gone);
        }
        self.settle();
    }

    fn answer(&mut self) {
        let mut question = [0; 3];
        match recv(io::stdout(), &mut question, RecvFlags::DONTWAIT) {
            Ok((3, _)) => (),
            Err(Errno::AGAIN | Errno::INTR) => return,
            // `track` has ended.
            Ok(_) | Err(_) => {
                self.is_tracked = false;
                return;
            }
        }
        let [kind, argument, serial] = question;
        match kind {
            SIGNAL => {
                self.note_signals();
                let came = self.seen.remove(&i32::from(argument));
                let is_recent = came.is_some_and(|came| came.elapsed() < limits::GROUP_SIGNAL_AGE);
                self.say(&[kind, serial, u8::from(is_recent)]);
            }
            SIZE => {
                // Where one of them has no size there is nothing to be done.
                let _ = tcgetwinsize(&self.output).and_then(|size| tcsetwinsize(io::stdin(), size));
                self.say(&[kind, serial]);
            }
            TAIL => {
                // What is in the pipe already, which holds as much as the queue.
                let most = self.queue.len() + limits::STDERR_QUEUE;
                while self.is_open && self.take(most) {}
                let mut answer = vec![kind, serial];
                answer.extend(&self.tail);
                self.say(&answer);
                self.owed = Some((serial, self.queue.len()));
                self.settle();
            }
            _ => (),
        }
    }

    /// Says that all is written, when it is.
    fn settle(&mut self) {
        if let Some((serial, 0)) = self.owed {
            self.say(&[WRITTEN, serial, u8::from(self.is_open)]);
            self.owed = None;
            self.is_tracked = false;
        }
    }

    fn say(&mut self, message: &[u8]) {
        // An error: `track` has ended, which the socket says next.
        let _ = send(io::stdout(), message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}
