//! What the program prints itself, beside its log. No print panics: whoever reads may be gone, and a disk full.

use std::io::{self, Write};

use super::logging::say_on_stderr;
use crate::error::Error;

/// Prints what a command says beside what it does. That it cannot be printed changes nothing.
pub(super) fn print(text: &str) {
    let _ = answer(text);
}

/// Prints a part of the answer that a command is there for: if it cannot be printed, the command has failed.
pub(super) fn answer(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::answer)
}

/// Says on stderr what is wrong with the command line.
pub(super) fn refuse(text: &str) {
    say_on_stderr(text);
}

/// Says why something did not work on stderr, wherever the log goes: an operator looks there first.
pub(super) fn complain(what: &str) {
    say_on_stderr(&format!("decnet-heartbeat: {what}\n"));
}
