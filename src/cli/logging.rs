//! The program's log, on stderr or in a file, and what it says on stderr itself. Runs on every thread that logs; none of
//! them waits for whoever reads the log or for a disk, also at the end.

use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

use super::log_line::Format;
use super::log_queue::Queue;
use crate::error::{Error, chain};
use crate::limits;
use crate::panics;

/// `--log-file`.
static FILE: OnceLock<Queue> = OnceLock::new();

/// Stderr, for the log or for [`say_on_stderr`]. Its thread starts with its first line: most commands have none.
static STDERR: OnceLock<Queue> = OnceLock::new();

/// A line a fact.
pub(super) fn start(file: Option<&Path>, level: LevelFilter) -> Result<(), Error> {
    let format = Format::new(file.is_none() && paints(&io::stderr()));
    if let Some(path) = file {
        let complain =
            |error: &Error| say_on_stderr(&format!("decnet-heartbeat: {}\n", chain(error)));
        // The first and only time.
        let _ = FILE.set(Queue::to_file(path, &format, complain)?);
    }
    log::set_boxed_logger(Box::new(Logger { level, format }))
        .map_err(|source| Error::setting("the log", "is in use already").with_source(source))?;
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

    /// Nobody waits for the log while the program runs.
    fn flush(&self) {}
}

fn stderr() -> &'static Queue {
    STDERR.get_or_init(|| Queue::to_stderr(&Format::new(paints(&io::stderr()))))
}

/// A line for stderr, wherever the log goes. It comes after the lines of the log that went there before it.
pub(super) fn say_on_stderr(line: &str) {
    stderr().push(line.as_bytes().to_vec());
}

/// SIGHUP: what rotates logs has moved the file.
pub(super) fn reopen() {
    match FILE.get() {
        Some(file) => file.reopen(),
        None => log::info!("there is no log file to reopen: signal=SIGHUP log=stderr"),
    }
}

/// Waits until what was logged is written, for a moment: for the end of the program. What a reader that is stuck has not
/// taken by then is lost.
pub(super) fn flush() {
    let end = Instant::now() + limits::LOG_FLUSH;
    [&FILE, &STDERR].into_iter().filter_map(OnceLock::get).for_each(|queue| queue.flush(end));
}

/// On one line, and safe to print: what a panic says may be somebody else's words.
pub(super) fn panicked(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    log::error!("panic: at={at} message={:?}", panics::panic_message(panic.payload()));
    // This one ends the program.
    if thread::current().name() == Some("main") {
        flush();
    }
}

/// Whether there is a terminal that has colours, and nobody who wants none.
pub(super) fn paints(out: &impl IsTerminal) -> bool {
    let has_colours =
        std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb");
    has_colours
        && out.is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
