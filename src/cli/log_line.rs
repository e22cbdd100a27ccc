//! One line of the log: simplelog formats it. Runs on the thread that logs.
//!
//! Each line has a writer of its own. So no thread holds a lock that another one's line needs, and a value that panics
//! while it is formatted costs its own line alone.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Record};
use simplelog::{Config, ConfigBuilder, ThreadLogMode, WriteLogger};

use crate::limits;

/// Time in UTC, level, thread, message.
#[derive(Clone, Debug)]
pub(super) struct Format {
    config: Config,
    is_coloured: bool,
}

impl Format {
    /// Lines of this crate alone: what the libraries below quote of an answer is not escaped.
    pub(super) fn new(is_coloured: bool) -> Self {
        let config = ConfigBuilder::new()
            .set_time_format_rfc3339()
            .set_thread_level(LevelFilter::Error)
            .set_thread_mode(ThreadLogMode::Names)
            .set_target_level(LevelFilter::Off)
            .set_location_level(LevelFilter::Off)
            .add_filter_allow_str(env!("CARGO_CRATE_NAME"))
            .build();
        Self { config, is_coloured }
    }

    /// The whole line with its end, or nothing if it is another crate's.
    pub(super) fn line(&self, record: &Record<'_>) -> Vec<u8> {
        let buffer = Buffer::default();
        WriteLogger::new(LevelFilter::Trace, self.config.clone(), buffer.clone()).log(record);
        let line = buffer.take();
        if self.is_coloured { coloured(line, record.level()) } else { line }
    }

    /// A line of the log's own.
    pub(super) fn own_line(&self, level: Level, what: Arguments<'_>) -> Vec<u8> {
        self.line(
            &Record::builder().level(level).target(env!("CARGO_CRATE_NAME")).args(what).build(),
        )
    }
}

/// What simplelog has written of a line.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    /// With the line's end, also where it was cut.
    fn take(self) -> Vec<u8> {
        let mut line = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !line.is_empty() && !line.ends_with(b"\n") {
            // Not in the middle of a character.
            let whole = line.utf8_chunks().next().map_or(0, |chunk| chunk.valid().len());
            line.truncate(whole);
            line.extend_from_slice("…\n".as_bytes());
        }
        line
    }
}

impl Write for Buffer {
    /// An error once the line is too long, so that a value without an end is not formatted any further.
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = limits::LOG_LINE.saturating_sub(line.len());
        let taken = piece.get(..room).unwrap_or(piece);
        line.extend_from_slice(taken);
        if taken.is_empty() && !piece.is_empty() {
            Err(io::ErrorKind::WriteZero.into())
        } else {
            Ok(taken.len())
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The level in its colour, as simplelog's logger for terminals has it.
fn coloured(line: Vec<u8>, level: Level) -> Vec<u8> {
    let colour = match level {
        Level::Error => 31,
        Level::Warn => 33,
        Level::Info => 34,
        Level::Debug => 36,
        Level::Trace => 37,
    };
    let tag = format!("[{level}]");
    String::from_utf8_lossy(&line)
        .replacen(&tag, &format!("\u{1b}[{colour}m{tag}\u{1b}[0m"), 1)
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use std::fmt;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn line(format: &Format, what: Arguments<'_>) -> String {
        String::from_utf8(format.own_line(Level::Warn, what)).unwrap()
    }

    #[test]
    fn a_line_has_its_time_level_thread_and_message() {
        let thread = std::thread::current().name().unwrap().to_owned();
        let plain = line(&Format::new(false), format_args!("it failed: n={}", 1));
        let (time, rest) = plain.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{plain}");
        assert_eq!(rest, format!("[WARN] ({thread}) it failed: n=1\n"));
        let coloured = line(&Format::new(true), format_args!("it failed: n={}", 1));
        assert!(coloured.contains(" \u{1b}[33m[WARN]\u{1b}[0m ("), "{coloured:?}");
    }

    #[test]
    fn another_crates_line_is_none() {
        let record =
            Record::builder().level(Level::Error).target("rustls").args(format_args!("x")).build();
        assert_eq!(Format::new(true).line(&record), b"");
    }

    /// Writes without end.
    struct Endless;

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str("äx")?;
            }
        }
    }

    #[test]
    fn a_line_is_cut_on_a_character_while_it_is_formatted() {
        let cut = line(&Format::new(false), format_args!("{Endless}"));
        assert!(
            cut.ends_with("…\n") && cut.len() <= limits::LOG_LINE + "…\n".len(),
            "{}",
            cut.len()
        );
    }

    /// Panics.
    struct Broken;

    impl fmt::Display for Broken {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no")
        }
    }

    #[test]
    fn a_value_that_panics_costs_its_line_alone() {
        let format = Format::new(false);
        assert!(
            catch_unwind(AssertUnwindSafe(|| line(&format, format_args!("{Broken}")))).is_err()
        );
        assert!(line(&format, format_args!("next")).ends_with("next\n"));
    }
}
