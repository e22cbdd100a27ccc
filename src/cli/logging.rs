//! The program's log, on stderr or in a file, and its messages on stderr. Runs on every thread that
//! logs. No thread waits for a reader of the log or for a disk; the end of the program waits a
//! limited time.

use std::io;
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

use super::log_line::{Format, Style};
use super::log_queue::Queue;
use crate::error::{Error, chain};
use crate::limits;
use crate::panics;

/// `--log-file`.
static FILE: OnceLock<Queue> = OnceLock::new();

/// Stderr, for the log or for [`write_to_stderr`]. Its thread starts with the first line: most
/// commands write none.
static STDERR: OnceLock<Queue> = OnceLock::new();

/// Starts the log. An error means that the log file can never be opened.
pub(super) fn start(file: Option<&Path>, level: LevelFilter) -> Result<(), Error> {
    let format = Format::new(if file.is_none() { Style::of(&io::stderr()) } else { Style::Plain });
    if let Some(path) = file {
        // No other code sets it.
        let _ = FILE.set(Queue::to_file(path, &format, |error| report_error(&chain(error)))?);
    }
    log::set_boxed_logger(Box::new(Logger { level, format }))
        .map_err(|source| Error::setting("the log", "is already in use").with_source(source))?;
    log::set_max_level(level);
    Ok(())
}

struct Logger {
    level: LevelFilter,
    format: Format,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = self.format.line(record);
            if !line.is_empty() {
                FILE.get().unwrap_or_else(stderr).push(line);
            }
        }
    }

    /// Does nothing: no thread waits for the log while the program runs.
    fn flush(&self) {}
}

fn stderr() -> &'static Queue {
    STDERR.get_or_init(|| Queue::to_stderr(&Format::new(Style::of(&io::stderr()))))
}

/// Writes a line to stderr, also if the log goes to a file. Earlier lines of the log on stderr come
/// first.
pub(super) fn write_to_stderr(line: &str) {
    stderr().push(line.as_bytes().to_vec());
}

/// Prints an error on stderr, also if the log goes to a file: an operator looks there first.
pub(super) fn report_error(problem: &str) {
    write_to_stderr(&format!("decnet-heartbeat: {problem}\n"));
}

/// Reopens the log file, after SIGHUP: a log rotation has moved it.
pub(super) fn reopen() {
    match FILE.get() {
        Some(file) => file.reopen(),
        None => log::info!("no log file to reopen: signal=SIGHUP log=stderr"),
    }
}

/// Waits until the log is written, at most [`limits::LOG_FLUSH`]. For the end of the program. Lines
/// that a blocked reader has not taken by then are lost.
pub(super) fn flush() {
    let end = Instant::now() + limits::LOG_FLUSH;
    [&FILE, &STDERR].into_iter().filter_map(OnceLock::get).for_each(|queue| queue.flush(end));
}

/// Logs a panic on one line. The message is escaped: it may quote foreign text.
pub(super) fn log_panic(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    log::error!("panic: at={at} message={:?}", panics::panic_message(panic.payload()));
    // A panic of the main thread ends the program.
    if thread::current().name() == Some("main") {
        flush();
    }
}
