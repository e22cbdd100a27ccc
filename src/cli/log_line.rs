//! Formats one line of the log with simplelog. Runs on the thread that logs.
//!
//! Each line has its own writer. So no thread holds a lock that another thread's line needs, and a
//! value that panics while it is formatted loses only its own line.

use std::env;
use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Record};
use simplelog::{Config, ConfigBuilder, ThreadLogMode, WriteLogger};

use crate::limits;

/// Whether output has escape sequences for colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Coloured,
}

impl Style {
    /// Coloured for a terminal that supports it, unless `NO_COLOR` is set.
    pub(super) fn of(out: &impl IsTerminal) -> Self {
        let is_set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let has_colours = is_set("TERM").is_some_and(|term| term != "dumb");
        if has_colours && out.is_terminal() && is_set("NO_COLOR").is_none() {
            Self::Coloured
        } else {
            Self::Plain
        }
    }
}

/// The format of a line: time in UTC, level, thread, message.
#[derive(Clone, Debug)]
pub(super) struct Format {
    config: Config,
    style: Style,
}

impl Format {
    /// Only lines of this crate: other crates quote answers of the network without escaping them.
    pub(super) fn new(style: Style) -> Self {
        let config = ConfigBuilder::new()
            .set_time_format_rfc3339()
            .set_thread_level(LevelFilter::Error)
            .set_thread_mode(ThreadLogMode::Names)
            .set_target_level(LevelFilter::Off)
            .set_location_level(LevelFilter::Off)
            .add_filter_allow_str(env!("CARGO_CRATE_NAME"))
            .build();
        Self { config, style }
    }

    /// The line with its line end, or nothing if it is another crate's.
    pub(super) fn line(&self, record: &Record<'_>) -> Vec<u8> {
        let buffer = Buffer::default();
        WriteLogger::new(LevelFilter::Trace, self.config.clone(), buffer.clone()).log(record);
        let line = buffer.take();
        match self.style {
            Style::Coloured => coloured(line, record.level()),
            Style::Plain => line,
        }
    }

    /// A line about the log itself.
    pub(super) fn own_line(&self, level: Level, message: Arguments<'_>) -> Vec<u8> {
        self.line(
            &Record::builder().level(level).target(env!("CARGO_CRATE_NAME")).args(message).build(),
        )
    }
}

/// What simplelog has written of a line so far.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    /// The line with its line end, also if it was cut.
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
    /// Fails once the line is too long, so that formatting an endless value ends.
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

/// Colours the level as simplelog's logger for terminals does.
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

    fn line(format: &Format, message: Arguments<'_>) -> String {
        String::from_utf8(format.own_line(Level::Warn, message)).unwrap()
    }

    #[test]
    fn line_has_time_level_thread_and_message() {
        let thread = std::thread::current().name().unwrap().to_owned();
        let plain = line(&Format::new(Style::Plain), format_args!("it failed: n={}", 1));
        let (time, rest) = plain.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{plain}");
        assert_eq!(rest, format!("[WARN] ({thread}) it failed: n=1\n"));
        let coloured = line(&Format::new(Style::Coloured), format_args!("it failed: n={}", 1));
        assert!(coloured.contains(" \u{1b}[33m[WARN]\u{1b}[0m ("), "{coloured:?}");
    }

    #[test]
    fn lines_of_other_crates_are_empty() {
        let record =
            Record::builder().level(Level::Error).target("rustls").args(format_args!("x")).build();
        assert_eq!(Format::new(Style::Coloured).line(&record), b"");
    }

    /// Never ends.
    struct Endless;

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str("äx")?;
            }
        }
    }

    #[test]
    fn endless_line_is_cut_between_characters() {
        let cut = line(&Format::new(Style::Plain), format_args!("{Endless}"));
        assert!(
            cut.ends_with("…\n") && cut.len() <= limits::LOG_LINE + "…\n".len(),
            "{}",
            cut.len()
        );
    }

    /// Panics.
    struct Panicking;

    impl fmt::Display for Panicking {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no")
        }
    }

    #[test]
    fn panicking_value_loses_only_its_line() {
        let format = Format::new(Style::Plain);
        assert!(
            catch_unwind(AssertUnwindSafe(|| line(&format, format_args!("{Panicking}")))).is_err()
        );
        assert!(line(&format, format_args!("next")).ends_with("next\n"));
    }
}
