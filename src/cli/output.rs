//! What the program prints besides its log. A failed write, such as to a closed pipe or a full
//! disk, does not panic.

use std::io::{self, IsTerminal, Write};

use rustix::termios::tcgetwinsize;

use crate::error::Error;

/// Prints the result of a command, or a part of it. An error means that the command has failed.
pub(super) fn print_result(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::output)
}

/// The columns of the terminal that stdout is. `None`: it is no terminal, or it has no size.
pub(super) fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    let size = if stdout.is_terminal() { tcgetwinsize(&stdout).ok()? } else { return None };
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}
