//! Writes the lines of the log to stderr or to a file. Runs on the thread `log`, which may block
//! here without a limit.
//!
//! A line is written completely, or the write fails. A line that was written in part is ended with
//! a line end before the next one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::error::{Error, sanitize_path};

#[derive(Debug)]
pub(super) struct Sink {
    target: LogTarget,
    /// The last line was written in part.
    is_cut: bool,
}

#[derive(Debug)]
enum LogTarget {
    Stderr,
    File {
        path: PathBuf,
        /// `None`: the next line opens it.
        file: Option<File>,
    },
}

impl Sink {
    pub(super) fn stderr() -> Self {
        Self { target: LogTarget::Stderr, is_cut: false }
    }

    /// The file is not opened yet.
    pub(super) fn file(path: PathBuf) -> Self {
        Self { target: LogTarget::File { path, file: None }, is_cut: false }
    }

    /// Opens the file again. If that fails, the old one stays in use. Does nothing for stderr.
    pub(super) fn reopen(&mut self) -> Result<(), Error> {
        let LogTarget::File { path, file } = &mut self.target else { return Ok(()) };
        let opened = open(path).map_err(|source| {
            let problem = format!("{} cannot be appended to", sanitize_path(path));
            Error::setting("--log-file", problem).with_source(source)
        })?;
        *file = Some(opened);
        self.is_cut = false;
        Ok(())
    }

    /// Writes one line.
    pub(super) fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if matches!(self.target, LogTarget::File { file: None, .. }) {
            self.reopen().map_err(io::Error::other)?;
        }
        let text = if self.is_cut { [b"\n", line].concat() } else { line.to_vec() };
        let mut left = text.as_slice();
        let result = match &self.target {
            LogTarget::Stderr => write_all(io::stderr().as_fd(), &mut left),
            LogTarget::File { file: Some(file), .. } => write_all(file.as_fd(), &mut left),
            LogTarget::File { file: None, .. } => Err(Errno::BADF),
        };
        let written = text.len() - left.len();
        if let Some(last) = text.get(..written).and_then(<[u8]>::last) {
            self.is_cut = *last != b'\n';
        }
        self.close_if_unusable(result);
        result.map_err(io::Error::from)
    }

    /// A FIFO whose reader has closed it, and a stale NFS handle, work again once they are
    /// reopened.
    fn close_if_unusable(&mut self, result: Result<(), Errno>) {
        if let (LogTarget::File { file, .. }, Err(Errno::PIPE | Errno::STALE)) =
            (&mut self.target, result)
        {
            *file = None;
        }
    }
}

/// Writes everything, also to a non-blocking pipe. After an error `left` is what was not written.
fn write_all(to: BorrowedFd<'_>, left: &mut &[u8]) -> Result<(), Errno> {
    while !left.is_empty() {
        match rustix::io::write(to, left) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => *left = left.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => (),
            // An error of `poll` is ignored: the next write reports it.
            Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&to, PollFlags::OUT)], None)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `O_NOCTTY`: a terminal must not become the controlling terminal of this process.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).custom_flags(libc::O_NOCTTY).open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::thread;

    use super::*;

    #[test]
    fn non_blocking_pipe_loses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let line = vec![b'x'; 300_000];
        let read = thread::spawn(move || {
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            read.len()
        });
        write_all(writer.as_fd(), &mut line.as_slice()).unwrap();
        drop(writer);
        assert_eq!(read.join().unwrap(), 300_000);
    }

    #[test]
    fn partial_line_is_ended_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut sink = Sink::file(path.clone());
        sink.write(b"one").unwrap();
        sink.write(b"two\n").unwrap();
        sink.write(b"three\n").unwrap();
        assert_eq!(fs::read(path).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn file_that_cannot_be_reopened_stays_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let moved = dir.path().join("moved");
        let mut sink = Sink::file(path.clone());
        sink.write(b"one\n").unwrap();
        fs::rename(&path, &moved).unwrap();
        fs::create_dir(&path).unwrap();
        let error = sink.reopen().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("--log-file: {} cannot be appended to", path.display())
        );
        sink.write(b"two\n").unwrap();
        assert_eq!(fs::read(moved).unwrap(), b"one\ntwo\n");
    }
}
