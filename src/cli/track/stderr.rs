//! `track`'s side of the command's stderr: the file that the command writes to, and the requests to
//! the [`companion`](super::companion) that copies it. Runs on the main thread.

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

use super::companion::{NAME, READY, SIGNAL, TAIL, WRITTEN};
use crate::cli::command_signals::wait;
use crate::limits;

/// The stdout and stderr of the command. `None`: it inherits ours.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
}

/// The command's stderr, and the companion, if there is one.
#[derive(Debug)]
pub(super) struct Stderr {
    companion: Option<CompanionHandle>,
    /// The file that the companion reads. It stays open here, so that a command whose companion was
    /// killed waits for the next companion.
    input: Option<OwnedFd>,
    /// When the last companion was started.
    started: Instant,
    is_terminal: bool,
    /// The command has ended, and the tail was requested.
    has_ended: bool,
}

#[derive(Debug)]
struct CompanionHandle {
    socket: OwnedFd,
    /// The serial number of the last request.
    serial: u8,
    /// It may outlive this process.
    process: Child,
}

impl Stderr {
    /// Starts the companion. If that fails, the command writes to our stderr, and nothing is
    /// copied.
    pub(super) fn copied() -> (Self, Outputs) {
        let mut stderr = Self {
            companion: None,
            input: None,
            started: Instant::now(),
            is_terminal: io::stderr().is_terminal(),
            has_ended: false,
        };
        let outputs = stderr.start().unwrap_or_else(|error| {
            let error = error.to_string();
            log::warn!("stderr cannot be copied; the report will not quote it: error={error:?}");
            Outputs::default()
        });
        (stderr, outputs)
    }

    fn start(&mut self) -> io::Result<Outputs> {
        let (input, output) = if self.is_terminal { terminal()? } else { pipe()? };
        let is_same = is_same_file(io::stdout(), io::stderr());
        let stdout = if is_same { Some(output.try_clone()?) } else { None };
        self.companion = Some(CompanionHandle::start(&input)?);
        self.input = Some(input);
        Ok(Outputs { stdout, stderr: Some(output) })
    }

    /// Starts another companion if the last one was killed: without a reader the command would
    /// block. Starts at most one in [`limits::COMPANION_AGAIN`], and returns when to call it again.
    pub(super) fn restart_companion(&mut self) -> Option<Instant> {
        if self.has_reader() {
            return None;
        }
        let next = self.started + limits::COMPANION_AGAIN;
        if Instant::now() < next {
            return Some(next);
        }
        self.start_another();
        Some(self.started + limits::COMPANION_AGAIN)
    }

    /// Whether the companion is running, or none is needed.
    fn has_reader(&mut self) -> bool {
        let is_running =
            |companion: &mut CompanionHandle| matches!(companion.process.try_wait(), Ok(None));
        self.input.is_none() || self.companion.as_mut().is_some_and(is_running)
    }

    fn start_another(&mut self) {
        let Some(input) = &self.input else { return };
        self.started = Instant::now();
        let started = CompanionHandle::start(input);
        match &started {
            Ok(_) => log::warn!(
                "the process that copies stderr was killed and was restarted; some output is lost"
            ),
            Err(error) => {
                log::warn!(
                    "the process that copies stderr cannot be restarted; the command may block: \
                     error={:?}",
                    error.to_string()
                );
            }
        }
        self.companion = started.ok();
    }

    /// Whether this signal was sent to our whole process group. `None`: unknown.
    pub(super) fn group_received(&mut self, signal: i32) -> Option<bool> {
        let companion = self.companion.as_mut()?;
        if companion.received(signal)? {
            return Some(true);
        }
        // The processes of a group receive a signal one after another.
        thread::sleep(limits::GROUP_SIGNAL);
        companion.received(signal)
    }

    /// Gives the command's pseudoterminal, if it has one, the size of our terminal. Returns whether
    /// it has one.
    pub(super) fn resize(&self) -> bool {
        let Some(controller) = self.input.as_ref().filter(|_| self.is_terminal) else {
            return false;
        };
        copy_size(controller);
        true
    }

    /// The tail of the command's output so far, as text.
    pub(super) fn tail(&mut self) -> String {
        self.has_ended = true;
        if !self.has_reader() {
            self.start_another();
        }
        let companion = self.companion.as_mut();
        let tail = companion.and_then(|companion| companion.request(TAIL, 0, limits::STDERR_GRACE));
        text(&tail.unwrap_or_default())
    }

    /// Waits until the output before the tail is written, at most [`limits::STDERR_GRACE`]. If no
    /// process holds the command's stderr any more, also waits for the companion's end: the process
    /// that inherits our children may never reap them.
    pub(super) fn finish(&mut self) {
        if !self.has_ended {
            self.tail();
        }
        let Some(companion) = &mut self.companion else { return };
        if companion.receive(WRITTEN, limits::STDERR_GRACE).is_some_and(|is_open| is_open == [0]) {
            companion.reap();
        }
    }
}

impl CompanionHandle {
    fn start(input: &OwnedFd) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (socket, their_end) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // The running file, even if its name was removed or replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).current_dir("/").stdin(input.try_clone()?).stdout(their_end);
        let process = command.spawn()?;
        // Closes our copy of the other end of the socket.
        drop(command);
        let companion = Self { socket, serial: 0, process };
        if companion.receive(READY, limits::COMPANION_START).is_none() {
            return Err(io::Error::other("the process that copies it did not start in time"));
        }
        Ok(companion)
    }

    /// Waits for the end of the companion, which is ending.
    fn reap(&mut self) {
        let Ok(pidfd) = pidfd_open(Pid::from_child(&self.process), PidfdFlags::empty()) else {
            return;
        };
        let _ = wait(&[pidfd.as_fd()], Some(Instant::now() + limits::STDERR_GRACE));
        let _ = self.process.try_wait();
    }

    fn received(&mut self, signal: i32) -> Option<bool> {
        let answer = self.request(SIGNAL, u8::try_from(signal).ok()?, limits::COMPANION_ANSWER)?;
        Some(answer == [1])
    }

    fn request(&mut self, kind: u8, argument: u8, within: Duration) -> Option<Vec<u8>> {
        self.serial = self.serial.wrapping_add(1);
        let request = [kind, argument, self.serial];
        send(&self.socket, &request, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).ok()?;
        self.receive(kind, within)
    }

    /// Receives the response of this kind to the last request, without its header. Ignores
    /// responses to earlier requests, which were too late.
    fn receive(&self, kind: u8, within: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + within;
        let mut buffer = vec![0; limits::STDERR_TAIL + 2];
        while Instant::now() < until {
            wait(&[self.socket.as_fd()], Some(until)).ok()?;
            match recv(&self.socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                // The companion has ended.
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

/// The file that the companion reads, and the one that the command writes to.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = io::pipe()?;
    Ok((read.into(), write.into()))
}

/// Like [`pipe`], as a pseudoterminal. It is in raw mode: our terminal processes the output.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    // `NOCTTY`: it must not become our controlling terminal.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags)?;
    unlockpt(&controller)?;
    let terminal = ioctl_tiocgptpeer(&controller, flags)?;
    let mut attributes = tcgetattr(&terminal)?;
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes)?;
    copy_size(&controller);
    Ok((controller, terminal))
}

/// Copies the size of our terminal. An error means that it has no size.
fn copy_size(controller: &OwnedFd) {
    let _ = tcgetwinsize(io::stderr()).and_then(|size| tcsetwinsize(controller, size));
}

/// Whether both refer to the same file, terminal, pipe or socket.
fn is_same_file(one: impl AsFd, other: impl AsFd) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => {
            (one.st_dev, one.st_ino, one.st_rdev) == (other.st_dev, other.st_ino, other.st_rdev)
        }
        _ => false,
    }
}

/// The text as a person would see it: without escape sequences, and with the last state of each
/// line that was overwritten.
fn text(written: &[u8]) -> String {
    let written = strip_str(&String::from_utf8_lossy(written)).to_string();
    let visible = |line: &str| {
        line.rsplit('\r').find(|part| !part.trim().is_empty()).unwrap_or_default().to_owned()
    };
    let lines: Vec<_> = written.split('\n').map(visible).collect();
    lines.join("\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_output_becomes_the_text_that_was_visible_last() {
        let written = b"\x1b[1;31mred\x1b[0m\r\npull 1%\rpull 99%\rpulled\r\n\r\n\
            \x1b]0;title\x07no such image\n";
        assert_eq!(text(written), "red\npulled\n\nno such image");
        assert_eq!(text(b"caf\xe9 is not there\n"), "caf\u{fffd} is not there");
        assert_eq!(text(b" \r\n\r"), "");
    }
}
