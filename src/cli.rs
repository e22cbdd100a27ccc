//! The program: its commands and exit codes. Runs on the main thread.

mod arguments;
mod check;
mod command_signals;
mod demo;
mod enrolment;
mod exit;
mod json_delta;
mod log_line;
mod log_queue;
mod log_sink;
mod logging;
mod metrics;
mod output;
mod own_files;
mod pipe;
mod push;
mod report;
mod rfc3339;
mod run;
mod shim;
mod signals;
mod state_file;
mod stats_files;
mod systemd;
mod track;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use arguments::{Arguments, Command};
use clap::CommandFactory;
use clap_complete::Shell;
use crossbeam_channel::{Receiver, never};
use exit::{fail, help_or_usage_error};
use log::LevelFilter;
use output::print_result;

use crate::error::{Error, chain};
use crate::limits;

/// Runs the program.
pub fn main() -> ExitCode {
    if track::companion::is_requested() {
        return track::companion::main();
    }
    let code = execute();
    logging::flush();
    code
}

fn execute() -> ExitCode {
    let Arguments { common, command } = match arguments::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) => return help_or_usage_error(error),
    };
    let default_level = match command {
        Command::Run(_) | Command::Pipe(_) => LevelFilter::Info,
        // These print their own result, or that of their command.
        Command::Push(_) | Command::Track(_) => LevelFilter::Warn,
        Command::Check(_) | Command::Demo { .. } | Command::Shim | Command::Completions { .. } => {
            LevelFilter::Off
        }
    };
    let level = common.log_level.unwrap_or(default_level);
    let stops = match prepare(&command, common.log_file.as_deref(), level) {
        Ok(stops) => stops,
        Err(error) => return fail(&error),
    };
    if !matches!(command, Command::Demo { .. }) {
        std::panic::set_hook(Box::new(logging::log_panic));
    }
    let result = match command {
        Command::Run(options) => run::run(&common, options, &stops).map(|()| ExitCode::SUCCESS),
        Command::Pipe(options) => pipe::pipe(&common, options, &stops).map(|()| ExitCode::SUCCESS),
        Command::Push(options) => push::push(&common, options),
        Command::Track(options) => track::track(&common, options),
        Command::Check(options) => check::check(&common, &options),
        Command::Demo { seconds } => {
            demo::demo(Duration::from_secs(seconds)).map(|()| ExitCode::SUCCESS)
        }
        Command::Shim => shim::print().map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => completions(shell).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| fail(&error))
}

/// Sets up signals and the log. Returns the signals that stop `run` and `pipe`. After an error,
/// `track` still runs its command.
fn prepare(
    command: &Command,
    log_file: Option<&Path>,
    level: LevelFilter,
) -> Result<Receiver<i32>, Error> {
    let signals = match command {
        Command::Run(_) => signals::start_run(limits::RUN_STOPS),
        Command::Pipe(_) => signals::start_run(limits::PIPE_STOPS),
        // Only these wait for them.
        _ => signals::start().map(|()| never()),
    };
    let log = logging::start(log_file, level);
    if !matches!(command, Command::Track(_)) {
        return log.and(signals);
    }
    if let Err(error) = log {
        logging::start(None, level)?;
        log::warn!("log file cannot be opened, logging to stderr: error={:?}", chain(&error));
    }
    // If signals cannot be caught, `track` logs that when it needs them.
    Ok(signals.unwrap_or_else(|_| never()))
}

fn completions(shell: Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    let name = env!("CARGO_PKG_NAME");
    let mut command = arguments::with_hints(Arguments::command());
    clap_complete::generate(shell, &mut command, name, &mut script);
    print_result(&String::from_utf8_lossy(&script))
}
