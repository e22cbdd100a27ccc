//! Where the lines of a log go: stderr or a file. Runs on the log's own thread, which may block here for ever.
//!
//! A line is written whole, or it is an error. What was written of a line that failed is ended before the next one.

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
    place: LogTarget,
    /// The last line lacks its end.
    is_cut: bool,
}

#[derive(Debug)]
enum LogTarget {
    Stderr,
    File {
        path: PathBuf,
        /// `None`: it is to be opened before the next line.
        file: Option<File>,
    },
}

impl Sink {
    pub(super) fn stderr() -> Self {
        Self { place: LogTarget::Stderr, is_cut: false }
    }

    /// Not opened yet.
    pub(super) fn file(path: PathBuf) -> Self {
        Self { place: LogTarget::File { path, file: None }, is_cut: false }
    }

    /// Opens the file anew. Where that fails the old one stays. Of stderr there is nothing to open.
    pub(super) fn reopen(&mut self) -> Result<(), Error> {
        let LogTarget::File { path, file } = &mut self.place else { return Ok(()) };
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
        if matches!(self.place, LogTarget::File { file: None, .. }) {
            self.reopen().map_err(io::Error::other)?;
        }
        let text = if self.is_cut { [b"\n", line].concat() } else { line.to_vec() };
        let mut left = text.as_slice();
        let result = match &self.place {
            LogTarget::Stderr => write_all(io::stderr().as_fd(), &mut left),
            LogTarget::File { file: Some(file), .. } => write_all(file.as_fd(), &mut left),
            LogTarget::File { file: None, .. } => Err(Errno::BADF),
        };
        let written = text.len() - left.len();
        if let Some(last) = text.get(..written).and_then(<[u8]>::last) {
            self.is_cut = *last != b'\n';
        }
        self.give_up_if_gone(result);
        result.map_err(io::Error::from)
    }

    /// A FIFO whose reader has left, and a file that its server has forgotten, work again once they are opened anew.
    fn give_up_if_gone(&mut self, result: Result<(), Errno>) {
        if let (LogTarget::File { file, .. }, Err(Errno::PIPE | Errno::STALE)) =
            (&mut self.place, result)
        {
            *file = None;
        }
    }
}

/// Writes to the end, also where whoever made the pipe has made it non-blocking. What could not be written is left in
/// `left`.
fn write_all(to: BorrowedFd<'_>, left: &mut &[u8]) -> Result<(), Errno> {
    while !left.is_empty() {
        match rustix::io::write(to, left) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => *left = left.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => (),
            // Nor is an error of this one: then the write has it, too.
            Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&to, PollFlags::OUT)], None)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A terminal must not become the one that controls this process.
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
    fn a_pipe_that_is_not_blocking_loses_nothing() {
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
    fn a_line_that_was_cut_is_ended_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut sink = Sink::file(path.clone());
        sink.write(b"one").unwrap();
        sink.write(b"two\n").unwrap();
        sink.write(b"three\n").unwrap();
        assert_eq!(fs::read(path).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn a_file_that_cannot_be_opened_anew_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("log"), dir.path().join("moved"));
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
