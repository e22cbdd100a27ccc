//! What the program prints itself, beside its log. No print panics: whoever reads may be gone, and a disk full.

use std::io::{self, Write};

use super::logging::say_on_stderr;

/// Prints the program's answer. Who reads it may have read enough.
pub(super) fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Says why something did not work on stderr, wherever the log goes: an operator looks there first.
pub(super) fn complain(what: &str) {
    say_on_stderr(&format!("decnet-heartbeat: {what}\n"));
}
