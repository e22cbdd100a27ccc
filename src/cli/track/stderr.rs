//! The stderr of `track`'s command, on the side of `track`: what the command writes to, and the questions to the
//! [`companion`](super::companion) that copies it. Runs on the main thread.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anstream::adapter::strip_str;
use rustix::fs::fstat;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::companion::{NAME, READY, SIGNAL, SIZE, TAIL, WRITTEN};
use crate::cli::command_signals::wait;
use crate::limits;

/// What the command gets as its stdout and stderr; where `None`, ours.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
}

/// The command's stderr, and the companion where there is one.
#[derive(Debug)]
pub(super) struct Stderr {
    companion: Option<Companion>,
    /// What the companion reads, kept open so that a command whose companion is killed waits for the next one.
    input: Option<OwnedFd>,
    /// When a companion was started last.
    started: Instant,
    is_terminal: bool,
    /// The tail was asked for, as the command has ended.
    is_over: bool,
}

#[derive(Debug)]
struct Companion {
    socket: OwnedFd,
    /// Of the last question.
    serial: u8,
    /// It may outlive us.
    process: Child,
}

impl Stderr {
    /// Starts the companion. Without one the command writes to our stderr itself, and no copy is kept.
    pub(super) fn copied() -> (Self, Outputs) {
        let is_terminal = io::stderr().is_terminal();
        let copied = || {
            let (input, output) = if is_terminal { terminal()? } else { pipe()? };
            let companion = Companion::start(&input)?;
            let stdout = if is_same_file(io::stdout(), io::stderr()) {
                Some(output.try_clone()?)
            } else {
                None
            };
            io::Result::Ok((Some(companion), Some(input), Outputs { stdout, stderr: Some(output) }))
        };
        let (companion, input, outputs) = copied().unwrap_or_else(|error| {
            log::warn!(
                "stderr is not copied, so a report cannot quote it: error={:?}",
                error.to_string()
            );
            (None, None, Outputs::default())
        });
        (Self { companion, input, started: Instant::now(), is_terminal, is_over: false }, outputs)
    }

    /// Starts another companion where the last one was killed: without a reader the command would wait for ever. When this
    /// is to be called again, as it starts no more than one a second.
    pub(super) fn mend(&mut self) -> Option<Instant> {
        if self.is_read() {
            return None;
        }
        let next = self.started + limits::COMPANION_AGAIN;
        if Instant::now() < next {
            return Some(next);
        }
        self.start_another();
        Some(self.started + limits::COMPANION_AGAIN)
    }

    /// Whether there is a companion that lives, or none is needed.
    fn is_read(&mut self) -> bool {
        let lives = |companion: &mut Companion| matches!(companion.process.try_wait(), Ok(None));
        self.input.is_none() || self.companion.as_mut().is_some_and(lives)
    }

    fn start_another(&mut self) {
        let Some(input) = &self.input else { return };
        self.started = Instant::now();
        let started = Companion::start(input);
        match &started {
            Ok(_) => log::warn!(
                "the process that copies stderr was killed, another one goes on: what it had is lost"
            ),
            Err(error) => {
                log::warn!(
                    "nobody reads the command's stderr, which may have to wait: error={:?}",
                    error.to_string()
                );
            }
        }
        self.companion = started.ok();
    }

    /// Whether this signal came to our whole process group, so that others in it have it, too. `None`: nobody knows.
    pub(super) fn group_got(&mut self, signal: i32) -> Option<bool> {
        let companion = self.companion.as_mut()?;
        if companion.got(signal)? {
            return Some(true);
        }
        // The processes of a group get it one after another.
        thread::sleep(limits::GROUP_SIGNAL);
        companion.got(signal)
    }

    /// Our terminal has another size. Whether the command's has it now, too, without knowing.
    pub(super) fn resize(&mut self) -> bool {
        let companion = self.companion.as_mut().filter(|_| self.is_terminal);
        companion
            .is_some_and(|companion| companion.ask(SIZE, 0, limits::COMPANION_ANSWER).is_some())
    }

    /// The end of what the command has written so far, as text.
    pub(super) fn tail(&mut self) -> String {
        self.is_over = true;
        if !self.is_read() {
            self.start_another();
        }
        let companion = self.companion.as_mut();
        let tail = companion.and_then(|companion| companion.ask(TAIL, 0, limits::STDERR_GRACE));
        text(&tail.unwrap_or_default())
    }

    /// Waits until all is written that was there when the tail was asked for, but not for a reader who does not read. Where
    /// nobody holds the command's stderr any more, the companion ends before us: not everybody who gets our children waits
    /// for them.
    pub(super) fn finish(&mut self) {
        if !self.is_over {
            self.tail();
        }
        let Some(companion) = &mut self.companion else { return };
        if companion.receive(WRITTEN, limits::STDERR_GRACE).is_some_and(|is_open| is_open == [0]) {
            companion.reap();
        }
    }
}

impl Companion {
    fn start(input: &OwnedFd) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // Whatever has become of our file's name: this is what runs.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).current_dir("/").stdin(input.try_clone()?).stdout(theirs);
        let process = command.spawn()?;
        // The other end of the socket, which the command had.
        drop(command);
        let companion = Self { socket, serial: 0, process };
        if companion.receive(READY, limits::COMPANION_START).is_none() {
            return Err(io::Error::other("the process that copies it has not started"));
        }
        Ok(companion)
    }

    /// Waits for a companion that ends now.
    fn reap(&mut self) {
        let Ok(end) = pidfd_open(Pid::from_child(&self.process), PidfdFlags::empty()) else {
            return;
        };
        let _ = wait(&[end.as_fd()], Some(Instant::now() + limits::STDERR_GRACE));
        let _ = self.process.try_wait();
    }

    fn got(&mut self, signal: i32) -> Option<bool> {
        let answer = self.ask(SIGNAL, u8::try_from(signal).ok()?, limits::COMPANION_ANSWER)?;
        Some(answer == [1])
    }

    fn ask(&mut self, kind: u8, argument: u8, within: Duration) -> Option<Vec<u8>> {
        self.serial = self.serial.wrapping_add(1);
        let question = [kind, argument, self.serial];
        send(&self.socket, &question, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).ok()?;
        self.receive(kind, within)
    }

    /// The rest of the answer of this kind to the last question. One that comes too late is an answer to none.
    fn receive(&self, kind: u8, within: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + within;
        let mut buffer = vec![0; limits::STDERR_TAIL + 2];
        while Instant::now() < until {
            wait(&[self.socket.as_fd()], Some(until)).ok()?;
            match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                // It has ended.
                Ok((0, _)) => return None,
                Ok((length, _)) => {
                    let message = buffer.get(..length).unwrap_or_default();
                    if let [of, serial, rest @ ..] = message
                        && (*of, *serial) == (kind, self.serial)
                    {
                        return Some(rest.to_vec());
                    }
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => (),
                Err(_) => return None,
            }
        }
        None
    }
}

/// What the companion reads, and what the command writes to.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = io::pipe()?;
    Ok((read.into(), write.into()))
}

/// The same for a command whose stderr is to be a terminal. It changes nothing of what is written: our terminal does that.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    // Without a controlling terminal we must not get one.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags)?;
    unlockpt(&controller)?;
    let terminal = ioctl_tiocgptpeer(&controller, flags)?;
    let mut attributes = tcgetattr(&terminal)?;
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes)?;
    if let Ok(size) = tcgetwinsize(io::stderr()) {
        tcsetwinsize(&controller, size)?;
    }
    Ok((controller, terminal))
}

/// Whether both lead to the same file, terminal, pipe or socket.
fn is_same_file(one: impl AsFd, other: impl AsFd) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => {
            (one.st_dev, one.st_ino, one.st_rdev) == (other.st_dev, other.st_ino, other.st_rdev)
        }
        _ => false,
    }
}

/// What a person would have seen of it: without escape sequences, and of a line that was overwritten what was there last.
fn text(written: &[u8]) -> String {
    let written = strip_str(&String::from_utf8_lossy(written)).to_string();
    let seen = |line: &str| {
        line.rsplit('\r').find(|part| !part.trim().is_empty()).unwrap_or_default().to_owned()
    };
    let lines: Vec<_> = written.split('\n').map(seen).collect();
    lines.join("\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_is_written_to_a_terminal_the_text_that_was_seen_last_is_kept() {
        let written = b"\x1b[1;31mred\x1b[0m\r\npull 1%\rpull 99%\rpulled\r\n\r\n\x1b]0;title\x07no such image\n";
        assert_eq!(text(written), "red\npulled\n\nno such image");
        assert_eq!(text(b"caf\xe9 is not there\n"), "caf\u{fffd} is not there");
        assert_eq!(text(b" \r\n\r"), "");
    }
}
