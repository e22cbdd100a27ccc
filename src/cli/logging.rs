//! The program's log: simplelog on stderr or in a file. Set up on the program's main thread.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::path::Path;

use log::LevelFilter;
use simplelog::{ColorChoice, ConfigBuilder, TermLogger, TerminalMode, ThreadLogMode, WriteLogger};

use crate::error::{Error, printable_path};
use crate::panics;

/// A line a fact: time in UTC, level, thread, message. The libraries below say nothing here: what they would quote of
/// an answer is not escaped.
pub(super) fn start(file: Option<&Path>, level: LevelFilter) -> Result<(), Error> {
    let config = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Error)
        .set_thread_mode(ThreadLogMode::Names)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .add_filter_allow_str("decnet_heartbeat")
        .build();
    let started = match file {
        None => TermLogger::init(level, config, TerminalMode::Stderr, colours()),
        Some(path) => WriteLogger::init(level, config, open(path)?),
    };
    started.map_err(|source| Error::setting("the log", "is in use already").because(source))
}

/// On one line, and safe to print: what a panic says may be somebody else's words.
pub(super) fn panicked(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    log::error!("panic: at={at} said={:?}", panics::said(panic.payload()));
}

/// Only for a person: `ColorChoice::Auto` would colour a pipe and a journal, too.
fn colours() -> ColorChoice {
    if paints(&io::stderr()) { ColorChoice::Auto } else { ColorChoice::Never }
}

/// Whether there is a terminal, and nobody who wants no colours.
pub(super) fn paints(out: &impl IsTerminal) -> bool {
    out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn open(path: &Path) -> Result<File, Error> {
    OpenOptions::new().create(true).append(true).open(path).map_err(|source| {
        let problem = format!("{} cannot be appended to", printable_path(path));
        Error::setting("--log-file", problem).because(source)
    })
}
