//! The lines of a log on their way to where they go. Any thread adds one, and none waits: the queue is bounded, and a line
//! that finds it full is dropped and counted. A thread `log` takes the lines out and writes them.
//!
//! A line brings with it how many were dropped just before, so the notice of a gap is written where the gap is.
//!
//! Where the system refuses that thread, each line is written by the thread that logs it, which may then block: a `push` on
//! a host without room for a thread still works.

use std::fmt::Arguments;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, SendError, Sender, bounded};
use log::Level;

use super::log_line::Format;
use super::log_sink::Sink;
use super::signals;
use crate::error::{Error, chain};
use crate::limits;

const NAME: &str = "log";

#[derive(Debug)]
pub(super) enum Queue {
    Threaded {
        lines: Sender<Line>,
        shared: Arc<Shared>,
        /// A token after each line that was written.
        progress: Receiver<()>,
    },
    Direct(Mutex<Writer>),
}

/// A line, and how many were dropped just before it. Without a text it only wakes the writer.
#[derive(Debug, Default)]
pub(super) struct Line {
    dropped: u64,
    text: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Lines that are queued or being written.
    waiting: AtomicUsize,
    /// Lines that were dropped and that no queued line tells of yet.
    dropped: AtomicU64,
    is_to_reopen: AtomicBool,
}

impl Queue {
    pub(super) fn to_stderr(format: &Format) -> Self {
        // There is nothing to open.
        Self::start(Sink::stderr, format, |_| ()).0
    }

    /// The error is that of a file that can never be opened. Where it may be later (a full disk), or where the answer takes
    /// longer than a start may wait, `complain` is called with what goes wrong, and the file is opened for the next line.
    pub(super) fn to_file(
        path: &Path,
        format: &Format,
        complain: fn(&Error),
    ) -> Result<Self, Error> {
        let (queue, opened) = Self::start(|| Sink::file(path.to_owned()), format, complain);
        match opened.recv_timeout(limits::LOG_OPEN) {
            Ok(Err(error)) if error.is_transient() => complain(&error),
            Ok(answer) => answer?,
            Err(_) => (),
        }
        Ok(queue)
    }

    /// And whether the sink could be opened, once that is known.
    fn start(
        sink: impl Fn() -> Sink,
        format: &Format,
        late: fn(&Error),
    ) -> (Self, Receiver<Result<(), Error>>) {
        let (sender, opened) = bounded(1);
        let (lines, taken) = bounded(limits::LOG_LINES);
        let (written, progress) = bounded(1);
        let shared = Arc::new(Shared::default());
        let writer = || Writer {
            sink: sink(),
            format: format.clone(),
            unwritten: 0,
            shared: Arc::clone(&shared),
        };
        let (mut threads, answer) = (writer(), sender.clone());
        let work = move || {
            signals::write_to_any_terminal();
            if let Err(SendError(Err(error))) = answer.send(threads.sink.reopen()) {
                late(&error);
            }
            threads.run(&taken, &written);
        };
        if thread::Builder::new().name(NAME.to_owned()).spawn(work).is_ok() {
            return (Self::Threaded { lines, shared, progress }, opened);
        }
        let mut direct = writer();
        let _ = sender.send(direct.sink.reopen());
        (Self::Direct(Mutex::new(direct)), opened)
    }

    /// Queues a line that has its end.
    pub(super) fn push(&self, text: Vec<u8>) {
        match self {
            Self::Direct(writer) => {
                writer
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(&Line { dropped: 0, text });
            }
            Self::Threaded { lines, shared, .. } => {
                if !shared.send(lines, text) {
                    shared.dropped.fetch_add(1, Ordering::SeqCst);
                    // In case that the writer has just found nothing left to do.
                    shared.send(lines, Vec::new());
                }
            }
        }
    }

    /// Has the file opened anew before the next line, at once if there is none.
    pub(super) fn reopen(&self) {
        match self {
            Self::Direct(writer) => writer.lock().unwrap_or_else(PoisonError::into_inner).reopen(),
            Self::Threaded { lines, shared, .. } => {
                // However often it is asked meanwhile, it takes one place in the queue.
                if !shared.is_to_reopen.swap(true, Ordering::SeqCst) {
                    shared.send(lines, Vec::new());
                }
            }
        }
    }

    /// Waits until all that is queued is written, at most until `end`, and no longer than a writer may be stuck.
    pub(super) fn flush(&self, end: Instant) {
        let Self::Threaded { lines, shared, progress } = self else { return };
        // It brings what was dropped last.
        shared.send(lines, Vec::new());
        while shared.waiting.load(Ordering::SeqCst) > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || progress.recv_timeout(left.min(limits::LOG_STUCK)).is_err() {
                return;
            }
        }
    }
}

impl Shared {
    /// Whether there was room.
    fn send(&self, lines: &Sender<Line>, text: Vec<u8>) -> bool {
        let dropped = self.dropped.swap(0, Ordering::SeqCst);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let is_sent = lines.try_send(Line { dropped, text }).is_ok();
        if !is_sent {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            self.dropped.fetch_add(dropped, Ordering::SeqCst);
        }
        is_sent
    }
}

/// Takes lines and writes them.
#[derive(Debug)]
pub(super) struct Writer {
    sink: Sink,
    format: Format,
    /// Lines that were dropped, or could not be written, and that no notice tells of yet.
    unwritten: u64,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(mut self, lines: &Receiver<Line>, written: &Sender<()>) {
        for line in lines {
            if self.shared.is_to_reopen.swap(false, Ordering::SeqCst) {
                self.reopen();
            }
            self.write(&line);
            if lines.is_empty() {
                self.write(&Line {
                    dropped: self.shared.dropped.swap(0, Ordering::SeqCst),
                    text: Vec::new(),
                });
            }
            self.shared.waiting.fetch_sub(1, Ordering::SeqCst);
            let _ = written.try_send(());
        }
    }

    fn write(&mut self, line: &Line) {
        self.unwritten += line.dropped;
        // One that could not be written is no reason to try again before there is something to write.
        if self.unwritten > 0 && (line.dropped > 0 || !line.text.is_empty()) {
            self.write_notice();
        }
        if !line.text.is_empty() && self.sink.write(&line.text).is_err() {
            self.unwritten += 1;
        }
    }

    fn write_notice(&mut self) {
        let lines = self.unwritten;
        if self.say(Level::Warn, format_args!("lines of the log were dropped: lines={lines}")) {
            self.unwritten = 0;
        }
    }

    fn reopen(&mut self) {
        match self.sink.reopen() {
            Ok(()) if self.unwritten > 0 => self.write_notice(),
            Ok(()) => (),
            Err(error) => {
                let error = chain(&error);
                self.say(
                    Level::Warn,
                    format_args!(
                        "the log file cannot be reopened and the old one is used: error={error:?}"
                    ),
                );
            }
        }
    }

    /// Whether it was written.
    fn say(&mut self, level: Level, what: Arguments<'_>) -> bool {
        self.sink.write(&self.format.own_line(level, what)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{BufRead, BufReader, Read};
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    fn to_file(path: &Path) -> Queue {
        Queue::to_file(path, &Format::new(false), |error| panic!("{error:?}")).unwrap()
    }

    fn push(queue: &Queue, lines: std::ops::Range<usize>) {
        lines.for_each(|n| queue.push(format!("{n}\n").into_bytes()));
    }

    fn flush(queue: &Queue) {
        queue.flush(Instant::now() + limits::LOG_FLUSH);
    }

    fn mkfifo(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    #[test]
    fn a_full_queue_drops_lines_and_says_how_many_where_they_are_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifo(&path);
        // Nobody reads, so no line is taken.
        let queue = to_file(&path);
        push(&queue, 0..limits::LOG_LINES + 476);
        let mut reader = BufReader::new(File::open(&path).unwrap());
        let mut next = move || {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line
        };
        for n in 0..limits::LOG_LINES {
            assert_eq!(next(), format!("{n}\n"));
        }
        let notice = next();
        assert!(
            notice.ends_with("[WARN] (log) lines of the log were dropped: lines=476\n"),
            "{notice}"
        );
        push(&queue, 5_000..5_002);
        assert_eq!([next(), next()], ["5000\n", "5001\n"]);
    }

    #[test]
    fn a_line_tells_of_those_that_were_dropped_just_before_it() {
        let (lines, taken) = bounded(2);
        let queue = Queue::Threaded { lines, shared: Arc::default(), progress: bounded(0).1 };
        let take = || {
            taken
                .try_recv()
                .map(|line| (line.dropped, String::from_utf8(line.text).unwrap()))
                .unwrap()
        };
        push(&queue, 0..5);
        assert_eq!([take(), take()], [(0, "0\n".to_owned()), (0, "1\n".to_owned())]);
        push(&queue, 5..8);
        assert_eq!([take(), take()], [(3, "5\n".to_owned()), (0, "6\n".to_owned())]);
        flush(&queue);
        assert_eq!(take(), (1, String::new()), "there is no other line to tell of it");
    }

    #[test]
    fn however_often_a_file_is_to_be_reopened_there_is_room_for_lines() {
        let (lines, taken) = bounded(2);
        let queue = Queue::Threaded { lines, shared: Arc::default(), progress: bounded(0).1 };
        for _ in 0..5 {
            queue.reopen();
        }
        push(&queue, 0..1);
        let texts: Vec<_> = taken.try_iter().map(|line| line.text).collect();
        assert_eq!(texts, [&b""[..], b"0\n"]);
    }

    #[test]
    fn the_end_waits_for_a_writer_that_works_and_not_for_one_that_is_stuck() {
        let dir = tempfile::tempdir().unwrap();
        let (path, fifo) = (dir.path().join("log"), dir.path().join("fifo"));
        let queue = to_file(&path);
        push(&queue, 0..limits::LOG_LINES);
        flush(&queue);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), limits::LOG_LINES);
        mkfifo(&fifo);
        let queue = to_file(&fifo);
        push(&queue, 0..10);
        let start = Instant::now();
        flush(&queue);
        assert!(
            start.elapsed() < limits::LOG_STUCK + Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        let mut said = String::new();
        let reader = File::open(&fifo);
        // The writer ends with its queue.
        drop(queue);
        reader.unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said.lines().count(), 10);
    }

    #[test]
    fn without_a_thread_lines_are_written_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (sink, format) = (Sink::file(path.clone()), Format::new(false));
        let queue = Queue::Direct(Mutex::new(Writer {
            sink,
            format,
            unwritten: 3,
            shared: Arc::default(),
        }));
        push(&queue, 0..2);
        let said = fs::read_to_string(&path).unwrap();
        let (notice, rest) = said.split_once('\n').unwrap();
        assert!(notice.ends_with("lines of the log were dropped: lines=3"), "{notice}");
        assert_eq!(rest, "0\n1\n");
        fs::remove_file(&path).unwrap();
        queue.reopen();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_an_error_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = Queue::to_file(dir.path(), &Format::new(false), |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("--log-file: {} cannot be appended to", dir.path().display())
        );
    }
}
