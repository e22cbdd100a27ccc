//! The program's command line and its exit codes. Runs on the program's main thread.

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
use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use crossbeam_channel::{Receiver, bounded, never};
use log::LevelFilter;
use output::{answer, complain, refuse};

use crate::credentials::enrolment::{Enrolment, EnrolmentSources};
use crate::error::{Error, chain, sanitize_path};
use crate::limits;
use crate::outbox::OutboxLocation;
use crate::status::decnet::DecnetStatus;

/// `EX_CONFIG` of sysexits.h: the host is not enrolled, or its configuration or bundle cannot be used, and a restart does not
/// change that.
const NOT_CONFIGURED: u8 = 78;

/// The whole program.
pub fn main() -> ExitCode {
    if track::companion::is_meant() {
        return track::companion::main();
    }
    let code = execute();
    logging::flush();
    code
}

fn execute() -> ExitCode {
    let Arguments { common, command } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return help_or_refuse(error),
    };
    let usual = match command {
        Command::Run(_) => LevelFilter::Info,
        // Their result is what they print, or their command's.
        Command::Push(_) | Command::Track(_) => LevelFilter::Warn,
        Command::Check(_) | Command::Demo { .. } | Command::Completions { .. } => LevelFilter::Off,
    };
    let level = common.log_level.unwrap_or(usual);
    let stops = match prepare(&command, common.log_file.as_deref(), level) {
        Ok(stops) => stops,
        Err(error) => return fail(&error),
    };
    if !matches!(command, Command::Demo { .. }) {
        std::panic::set_hook(Box::new(logging::panicked));
    }
    let done = match command {
        Command::Run(options) => run::run(&common, options, &stops).map(|()| ExitCode::SUCCESS),
        Command::Push(options) => push::push(&common, options),
        Command::Track(options) => track::track(&common, options),
        Command::Check(options) => check::check(&common, &options),
        Command::Demo { seconds } => {
            demo::demo(Duration::from_secs(seconds)).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => completions(shell).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| fail(&error))
}

/// Signals and the log; of `run`, the signals that ask it to stop. `track` runs its command in any case.
fn prepare(
    command: &Command,
    log_file: Option<&Path>,
    level: LevelFilter,
) -> Result<Receiver<i32>, Error> {
    let signals = signals::start(matches!(command, Command::Run(_)));
    let log = logging::start(log_file, level);
    if !matches!(command, Command::Track(_)) {
        return log.and(signals);
    }
    if let Err(error) = log {
        logging::start(None, level)?;
        log::warn!("the log is on stderr: error={:?}", chain(&error));
    }
    // Where signals cannot be caught `track` says so itself, once it needs them.
    Ok(signals.unwrap_or_else(|_| never()))
}

/// Prints the help or the version, or what is wrong with the command line. What was given is escaped.
fn help_or_refuse(error: clap::Error) -> ExitCode {
    if error.use_stderr() {
        let code = u8::try_from(error.exit_code()).unwrap_or(1);
        refuse(&described(error));
        return ExitCode::from(code);
    }
    // Nothing that was given is in there.
    let help = error.render();
    let help =
        if logging::paints(&io::stdout()) { help.ansi().to_string() } else { help.to_string() };
    answer(&help).map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

fn completions(shell: Shell) -> Result<(), Error> {
    let (mut command, mut script) = (Arguments::command(), Vec::new());
    clap_complete::generate(shell, &mut command, env!("CARGO_PKG_NAME"), &mut script);
    answer(&String::from_utf8_lossy(&script))
}

/// The environment and the ini, after the options.
fn enrolment(common: &Common) -> Result<Enrolment, Error> {
    let mut sources = EnrolmentSources::from_env();
    if let Some(ini) = &common.config {
        sources = sources.config(ini.clone());
    }
    if let Some(dir) = &common.agent_dir {
        sources = sources.agent_dir(dir.clone());
    }
    let (read, enrolment) = bounded(1);
    let elsewhere = sources.clone();
    // Its disk may hang, and a command must run all the same.
    let run = move || drop(read.send(elsewhere.read()));
    if thread::Builder::new().name("ini".to_owned()).spawn(run).is_err() {
        return sources.read();
    }
    enrolment.recv_timeout(limits::CREDENTIALS_WAIT).unwrap_or_else(|_| {
        let seconds = limits::CREDENTIALS_WAIT.as_secs();
        let problem = format!(
            "cannot be read, its disk has not answered for {seconds} s; try again when it does"
        );
        Err(Error::setting("ini", problem).passing())
    })
}

/// The variable that names the state file.
const STATE_FILE_VARIABLE: &str = "DECNET_HEARTBEAT_STATE_FILE";

/// The state file that the environment names. An empty variable counts as unset.
fn state_file_of_environment() -> Option<PathBuf> {
    std::env::var_os(STATE_FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// DECNET's status, with the state file that the option or the environment names, if one does.
fn source(agent_dir: &Path, state_file: Option<&Path>) -> DecnetStatus {
    let source = DecnetStatus::new(agent_dir);
    match state_file.map(Path::to_owned).or_else(state_file_of_environment) {
        Some(path) => source.state_file(path),
        None => source,
    }
}

/// Warns of names that the state file does not list: the master has no such decky. Where the state file is not there or
/// cannot be read, nothing is known of any name.
fn warn_of_unlisted<'a>(agent_dir: &Path, deckies: impl IntoIterator<Item = &'a str>) {
    let Some((file, unlisted)) = source(agent_dir, None).unlisted(deckies) else { return };
    for decky in unlisted {
        let file = sanitize_path(&file);
        log::warn!("the state file does not list this decky: decky={decky} file={file}");
    }
}

/// `--outbox`.
fn outbox(path: Option<PathBuf>) -> OutboxLocation {
    path.map_or(OutboxLocation::AgentDir, OutboxLocation::File)
}

/// Says why on stderr, unless it is that the reader of the answer has closed the pipe.
fn fail(error: &Error) -> ExitCode {
    if !error.is_pipe_closed() {
        complain(&chain(error));
    }
    ExitCode::from(code_of(error))
}

/// What the program exits with for an error: a supervisor starts it again, except after [`NOT_CONFIGURED`].
fn code_of(error: &Error) -> u8 {
    let is_configuration = error.is_not_enrolled() || error.is_config() || error.is_bundle();
    if is_configuration && !error.is_transient() { NOT_CONFIGURED } else { 1 }
}
