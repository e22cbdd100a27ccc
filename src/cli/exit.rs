//! The exit codes, and the message that comes with them. Runs on the main thread.

use std::io;
use std::process::ExitCode;

use super::arguments::described;
use super::log_line::Style;
use super::logging;
use super::output::print_result;
use crate::error::{Error, chain};

/// `EX_CONFIG` of sysexits.h: the host is not enrolled, or its configuration or credentials are
/// invalid. A restart does not help.
pub(super) const NOT_CONFIGURED: u8 = 78;

/// Prints the help, the version, or what is wrong with the command line.
pub(super) fn help_or_usage_error(error: clap::Error) -> ExitCode {
    if error.use_stderr() {
        let code = u8::try_from(error.exit_code()).unwrap_or(1);
        logging::write_to_stderr(&described(error));
        return ExitCode::from(code);
    }
    // The help quotes nothing of the command line.
    let help = error.render();
    let text = match Style::of(&io::stdout()) {
        Style::Coloured => help.ansi().to_string(),
        Style::Plain => help.to_string(),
    };
    print_result(&text).map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

/// Prints the error on stderr, unless the reader of stdout has closed the pipe.
pub(super) fn fail(error: &Error) -> ExitCode {
    if !error.is_pipe_closed() {
        logging::report_error(&chain(error));
    }
    ExitCode::from(code_of(error))
}

/// The exit code for an error. A supervisor restarts the program, except after [`NOT_CONFIGURED`].
pub(super) fn code_of(error: &Error) -> u8 {
    let is_configuration = error.is_not_enrolled() || error.is_config() || error.is_bundle();
    if is_configuration && !error.is_transient() { NOT_CONFIGURED } else { 1 }
}
