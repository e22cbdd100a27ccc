//! The program: its commands and exit codes. Runs on the main thread.

mod arguments;
mod check;
mod command_signals;
mod demo;
mod log_line;
mod log_queue;
mod log_sink;
mod logging;
mod metrics;
mod output;
mod own_files;
mod push;
mod report;
mod rfc3339;
mod run;
mod signals;
mod stats_files;
mod systemd;
mod track;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use arguments::{Arguments, Command, Common, described};
use clap::CommandFactory;
use clap_complete::Shell;
use crossbeam_channel::{Receiver, bounded, never};
use log::LevelFilter;
use log_line::Style;
use output::print_result;

use crate::credentials::enrolment::{Enrolment, EnrolmentSources};
use crate::error::{Error, chain, sanitize_path};
use crate::files::absolute;
use crate::limits;
use crate::outbox::OutboxLocation;
use crate::status::decnet::DecnetStatus;

/// `EX_CONFIG` of sysexits.h: the host is not enrolled, or its configuration or credentials are
/// invalid. A restart does not help.
const NOT_CONFIGURED: u8 = 78;

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
        Command::Run(_) => LevelFilter::Info,
        // These print their own result, or that of their command.
        Command::Push(_) | Command::Track(_) => LevelFilter::Warn,
        Command::Check(_) | Command::Demo { .. } | Command::Completions { .. } => LevelFilter::Off,
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
        Command::Push(options) => push::push(&common, options),
        Command::Track(options) => track::track(&common, options),
        Command::Check(options) => check::check(&common, &options),
        Command::Demo { seconds } => {
            demo::demo(Duration::from_secs(seconds)).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => completions(shell).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| fail(&error))
}

/// Sets up signals and the log. Returns the signals that stop `run`. After an error, `track` still
/// runs its command.
fn prepare(
    command: &Command,
    log_file: Option<&Path>,
    level: LevelFilter,
) -> Result<Receiver<i32>, Error> {
    let signals = match command {
        Command::Run(_) => signals::start_run(),
        // Only `run` waits for them.
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

/// Prints the help, the version, or what is wrong with the command line.
fn help_or_usage_error(error: clap::Error) -> ExitCode {
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

fn completions(shell: Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    let name = env!("CARGO_PKG_NAME");
    let mut command = arguments::with_hints(Arguments::command());
    clap_complete::generate(shell, &mut command, name, &mut script);
    print_result(&String::from_utf8_lossy(&script))
}

/// Reads the enrolment: the options first, then the environment and the ini.
fn enrolment(common: &Common) -> Result<Enrolment, Error> {
    let mut sources = EnrolmentSources::from_env();
    if let Some(ini) = &common.config {
        sources = sources.config(ini.clone());
    }
    if let Some(dir) = &common.agent_dir {
        sources = sources.agent_dir(dir.clone());
    }
    let (sender, receiver) = bounded(1);
    let sources_of_thread = sources.clone();
    // On its own thread: the disk may not respond, and `track` must still run its command.
    let run = move || drop(sender.send(sources_of_thread.read()));
    if thread::Builder::new().name("ini".to_owned()).spawn(run).is_err() {
        return sources.read();
    }
    receiver.recv_timeout(limits::CREDENTIALS_WAIT).unwrap_or_else(|_| {
        let seconds = limits::CREDENTIALS_WAIT.as_secs();
        let problem =
            format!("cannot be read: its disk has not responded for {seconds} s; try again later");
        Err(Error::setting("ini", problem).passing())
    })
}

/// The environment variable that names the state file.
const STATE_FILE_VARIABLE: &str = "DECNET_HEARTBEAT_STATE_FILE";

/// The state file that the environment variable names. An empty variable counts as unset.
fn state_file_of_environment() -> Option<PathBuf> {
    std::env::var_os(STATE_FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// DECNET's status, with the state file of the option or the environment variable, if any.
fn source(agent_dir: &Path, state_file: Option<&Path>) -> DecnetStatus {
    let source = DecnetStatus::new(agent_dir);
    match state_file.map(Path::to_owned).or_else(state_file_of_environment) {
        Some(path) => source.state_file(path),
        None => source,
    }
}

/// Warns of deckies that the state file does not list: the master probably does not know them
/// either. Does nothing if the state file does not exist or cannot be read.
fn warn_of_unlisted<'a>(agent_dir: &Path, deckies: impl IntoIterator<Item = &'a str>) {
    let Some((file, unlisted)) = source(agent_dir, None).unlisted(deckies) else { return };
    for decky in unlisted {
        let file = sanitize_path(&file);
        log::warn!("the state file does not list the decky: decky={decky} file={file}");
    }
}

/// The environment variable that names the outbox.
const OUTBOX_VARIABLE: &str = "DECNET_HEARTBEAT_OUTBOX";

/// The outbox that the environment variable names. An empty variable counts as unset.
fn outbox_of_environment() -> Option<PathBuf> {
    std::env::var_os(OUTBOX_VARIABLE)
        .filter(|path| !path.is_empty())
        .map(|path| absolute(Path::new(&path)))
}

/// The outbox of `--outbox`, that of the environment variable, or the default one.
fn outbox(path: Option<PathBuf>) -> OutboxLocation {
    path.or_else(outbox_of_environment).map_or(OutboxLocation::AgentDir, OutboxLocation::File)
}

/// Prints the error on stderr, unless the reader of stdout has closed the pipe.
fn fail(error: &Error) -> ExitCode {
    if !error.is_pipe_closed() {
        logging::report_error(&chain(error));
    }
    ExitCode::from(code_of(error))
}

/// The exit code for an error. A supervisor restarts the program, except after [`NOT_CONFIGURED`].
fn code_of(error: &Error) -> u8 {
    let is_configuration = error.is_not_enrolled() || error.is_config() || error.is_bundle();
    if is_configuration && !error.is_transient() { NOT_CONFIGURED } else { 1 }
}
