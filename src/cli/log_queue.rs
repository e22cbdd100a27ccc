//! A bounded queue of log lines. Any thread adds lines and never waits: if the queue is full, the
//! line is dropped and counted. The thread `log` takes the lines from the queue and writes them.
//!
//! A line carries the number of lines that were dropped just before it, so the notice of a gap is
//! written where the gap is.
//!
//! If the system refuses that thread, the thread that logs a line also writes it, and may block: a
//! `push` works also on a host that has reached its limit of threads.

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

/// A line, and how many were dropped just before it. A line without text only wakes the writer.
#[derive(Debug, Default)]
pub(super) struct Line {
    dropped: u64,
    text: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Lines that are queued or being written.
    waiting: AtomicUsize,
    /// Lines that were dropped and that no queued line counts yet.
    dropped: AtomicU64,
    is_to_reopen: AtomicBool,
}

impl Queue {
    pub(super) fn to_stderr(format: &Format) -> Self {
        // Stderr is open already.
        Self::start(Sink::stderr, format, |_| ()).0
    }

    /// Fails if the file can never be opened. If it may be opened later (the disk is full), or if
    /// it takes longer than a start may wait, errors go to `report`, and the next line opens the
    /// file.
    pub(super) fn to_file(path: &Path, format: &Format, report: fn(&Error)) -> Result<Self, Error> {
        let (queue, opened) = Self::start(|| Sink::file(path.to_owned()), format, report);
        match opened.recv_timeout(limits::LOG_OPEN) {
            Ok(Err(error)) if error.is_transient() => report(&error),
            Ok(result) => result?,
            Err(_) => (),
        }
        Ok(queue)
    }

    /// The receiver gets the result of opening the sink. If no one receives it any more, an error
    /// goes to `report_late`.
    fn start(
        sink: impl Fn() -> Sink,
        format: &Format,
        report_late: fn(&Error),
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
        let mut writer_of_thread = writer();
        let sender_of_thread = sender.clone();
        let work = move || {
            signals::allow_background_writes();
            let result = writer_of_thread.sink.reopen();
            if let Err(SendError(Err(error))) = sender_of_thread.send(result) {
                report_late(&error);
            }
            writer_of_thread.run(&taken, &written);
        };
        if thread::Builder::new().name(NAME.to_owned()).spawn(work).is_ok() {
            return (Self::Threaded { lines, shared, progress }, opened);
        }
        let mut direct = writer();
        let _ = sender.send(direct.sink.reopen());
        (Self::Direct(Mutex::new(direct)), opened)
    }

    /// Queues a line. It ends with a line end.
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
                    // The writer may have emptied the queue just now, and then writes the notice.
                    shared.send(lines, Vec::new());
                }
            }
        }
    }

    /// Reopens the file before the next line, or at once if no line is queued.
    pub(super) fn reopen(&self) {
        match self {
            Self::Direct(writer) => writer.lock().unwrap_or_else(PoisonError::into_inner).reopen(),
            Self::Threaded { lines, shared, .. } => {
                // Repeated requests take one place in the queue.
                if !shared.is_to_reopen.swap(true, Ordering::SeqCst) {
                    shared.send(lines, Vec::new());
                }
            }
        }
    }

    /// Waits until all queued lines are written, at most until `end`. Gives up when the writer
    /// makes no progress for [`limits::LOG_STUCK`].
    pub(super) fn flush(&self, end: Instant) {
        let Self::Threaded { lines, shared, progress } = self else { return };
        // This empty line carries the count of the lines dropped last.
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
    /// Returns whether the queue had room.
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
    /// Lines that were dropped or could not be written, and that no notice counts yet.
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
        // After a failed write the notice waits for the next line or the next drop.
        if self.unwritten > 0 && (line.dropped > 0 || !line.text.is_empty()) {
            self.write_notice();
        }
        if !line.text.is_empty() && self.sink.write(&line.text).is_err() {
            self.unwritten += 1;
        }
    }

    fn write_notice(&mut self) {
        let lines = self.unwritten;
        if self.write_own(Level::Warn, format_args!("log lines dropped: lines={lines}")) {
            self.unwritten = 0;
        }
    }

    fn reopen(&mut self) {
        match self.sink.reopen() {
            Ok(()) if self.unwritten > 0 => self.write_notice(),
            Ok(()) => (),
            Err(error) => {
                let error = chain(&error);
                self.write_own(
                    Level::Warn,
                    format_args!(
                        "log file cannot be reopened, still using the old one: error={error:?}"
                    ),
                );
            }
        }
    }

    /// Writes a line about the log itself. Returns whether it was written.
    fn write_own(&mut self, level: Level, message: Arguments<'_>) -> bool {
        self.sink.write(&self.format.own_line(level, message)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{BufRead, BufReader, Read};
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::cli::log_line::Style;

    fn to_file(path: &Path) -> Queue {
        Queue::to_file(path, &Format::new(Style::Plain), |error| panic!("{error:?}")).unwrap()
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
    fn full_queue_drops_lines_and_counts_them_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifo(&path);
        // The FIFO has no reader, so the writer takes no line.
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
        assert!(notice.ends_with("[WARN] (log) log lines dropped: lines=476\n"), "{notice}");
        push(&queue, 5_000..5_002);
        assert_eq!([next(), next()], ["5000\n", "5001\n"]);
    }

    #[test]
    fn line_counts_those_dropped_just_before_it() {
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
        assert_eq!(take(), (1, String::new()), "flush queues a line that counts it");
    }

    #[test]
    fn repeated_reopen_takes_one_place_in_the_queue() {
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
    fn flush_waits_for_a_working_writer_but_not_for_a_blocked_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let fifo = dir.path().join("fifo");
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
        let mut written = String::new();
        let reader = File::open(&fifo);
        // The writer ends with its queue.
        drop(queue);
        reader.unwrap().read_to_string(&mut written).unwrap();
        assert_eq!(written.lines().count(), 10);
    }

    #[test]
    fn queue_without_a_thread_writes_lines_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let sink = Sink::file(path.clone());
        let format = Format::new(Style::Plain);
        let queue = Queue::Direct(Mutex::new(Writer {
            sink,
            format,
            unwritten: 3,
            shared: Arc::default(),
        }));
        push(&queue, 0..2);
        let written = fs::read_to_string(&path).unwrap();
        let (notice, rest) = written.split_once('\n').unwrap();
        assert!(notice.ends_with("log lines dropped: lines=3"), "{notice}");
        assert_eq!(rest, "0\n1\n");
        fs::remove_file(&path).unwrap();
        queue.reopen();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn error_names_the_file_that_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let error = Queue::to_file(dir.path(), &Format::new(Style::Plain), |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("--log-file: {} cannot be appended to", dir.path().display())
        );
    }
}
