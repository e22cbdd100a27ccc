//! The program's command line and its exit codes. Runs on the program's main thread.

mod check;
mod command;
mod demo;
mod logging;
mod metrics;
mod push;
mod report;
mod run;
mod track;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use log::LevelFilter;

use crate::delta::{Operation, check_decky};
use crate::enrolment::{Enrolment, EnrolmentSources};
use crate::error::{Error, chain, printable_path};
use crate::heartbeat::check_interval;
use crate::identity::MasterIdentity;
use crate::outbox::OutboxLocation;
use crate::status::decnet::{DOCKER_SOCKET, DecnetStatus};
use crate::{limits, text};

/// `EX_CONFIG` of sysexits.h: the host is not enrolled, or its configuration or bundle cannot be used.
const NOT_CONFIGURED: u8 = 78;

const RUN_CODES: &str = "Exits 0 after SIGTERM or SIGINT; 78 when the host is not enrolled or its configuration or bundle cannot \
                         be used; 2 for a wrong command line; 1 for anything else.";
const PUSH_CODES: &str = "Exits 0 when the master has the delta or the outbox keeps it; 2 for a wrong command line, such as a name that no \
     decky can have; 78 as run does; 1 when it is neither.";
const TRACK_CODES: &str = "Exits as the command did: with its code, with 128 and the signal that ended it, with 127 where there is \
                           none, with 126 where it cannot be started.";
const CHECK_CODES: &str = "Exits 0 only if an agent would work; 78 if it would not even start, for want of an enrolment or a \
                           bundle; 1 if anything else is wrong.";

/// Tells a DECNET master, over mTLS, that this worker lives, what it runs, and how deploys and mutates ended.
#[derive(Debug, Parser)]
// `bin_name`: otherwise the usage quotes argv[0], whatever that is.
#[command(name = "decnet-heartbeat", bin_name = "decnet-heartbeat", version, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The ini to read instead of $DECNET_CONFIG or /etc/decnet/decnet.ini
    #[arg(long, global = true, value_name = "INI")]
    config: Option<PathBuf>,
    /// Where ca.crt, worker.crt, worker.key, topology.db and the outbox are
    #[arg(long, global = true, value_name = "DIR", value_parser = PathBufValueParser::new().try_map(agent_dir))]
    agent_dir: Option<PathBuf>,
    /// Who counts as the master: name, host, ca, sha256:HEX or public [default: name]
    #[arg(long, global = true, value_name = "RULE")]
    master_identity: Option<MasterIdentity>,
    /// off, error, warn, info, debug or trace [default: info; for push and track warn, for check and demo off]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<LevelFilter>,
    /// Append the log to this file instead of stderr
    #[arg(long, global = true, value_name = "PATH")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Beat until SIGTERM or SIGINT
    #[command(after_help = RUN_CODES)]
    Run(RunOptions),
    /// Report how an operation ended: now, or by way of the outbox
    #[command(after_help = PUSH_CODES)]
    Push(PushOptions),
    /// Run a command as an operation, report how it ended, and exit as it did
    #[command(after_help = TRACK_CODES)]
    Track(TrackOptions),
    /// Go through all that an agent needs, and say what is wrong with it
    #[command(after_help = CHECK_CODES)]
    Check(CheckOptions),
    /// Watch it work against a master of its own; needs nothing
    Demo {
        /// About how long the demonstration takes, from 5 to 600 seconds
        #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u64).range(5..=600))]
        seconds: u64,
    },
    /// Print the completions of this command line for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, clap::Args)]
struct RunOptions {
    /// The time between two beats, from 50ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = interval)]
    interval: Duration,
    /// DECNET's state file [default: $DECNET_HEARTBEAT_STATE_FILE, or beside DECNET's Python package]
    #[arg(long, value_name = "PATH")]
    state_file: Option<PathBuf>,
    /// The Docker Engine's socket [default: /var/run/docker.sock]
    #[arg(long, value_name = "PATH")]
    docker_socket: Option<PathBuf>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH")]
    outbox: Option<PathBuf>,
    /// Rewrite this file with the stats as JSON after each beat
    #[arg(long, value_name = "PATH")]
    stats_file: Option<PathBuf>,
    /// Rewrite this file with the stats for Prometheus after each beat; node_exporter reads *.prom
    #[arg(long, value_name = "PATH")]
    metrics_file: Option<PathBuf>,
}

impl RunOptions {
    fn docker_socket(&self) -> &Path {
        self.docker_socket.as_deref().unwrap_or(Path::new(DOCKER_SOCKET))
    }

    fn source(&self, agent_dir: &Path) -> DecnetStatus {
        source(agent_dir, self.state_file.as_deref()).docker_socket(self.docker_socket())
    }
}

#[derive(Debug, clap::Args)]
struct CheckOptions {
    #[command(flatten)]
    run: RunOptions,
    /// Say it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct PushOptions {
    /// deploy or mutate
    #[arg(long, value_name = "WHAT")]
    operation: Operation,
    /// How it ended
    #[arg(long, value_name = "HOW")]
    status: Status,
    /// Why it failed, for the master's operator; 2,000 characters at most
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH")]
    outbox: Option<PathBuf>,
    /// The deckies that it was done to
    #[arg(value_name = "DECKY", required = true, value_parser = decky)]
    deckies: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Status {
    Succeeded,
    Failed,
}

#[derive(Debug, clap::Args)]
struct TrackOptions {
    /// deploy or mutate
    #[arg(long, value_name = "WHAT")]
    operation: Operation,
    /// The deckies that it is done to
    #[arg(long = "decky", value_name = "NAME", required = true, num_args = 1.., value_parser = decky)]
    deckies: Vec<String>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH")]
    outbox: Option<PathBuf>,
    /// What does it; its exit code is the program's
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The whole program.
pub fn main() -> ExitCode {
    let Arguments { common, command } = Arguments::try_parse().unwrap_or_else(|error| escaped(error).exit());
    let usual = match command {
        Command::Run(_) => LevelFilter::Info,
        // Their result is what they print, or their command's.
        Command::Push(_) | Command::Track(_) => LevelFilter::Warn,
        Command::Check(_) | Command::Demo { .. } | Command::Completions { .. } => LevelFilter::Off,
    };
    if let Err(error) = logging::start(common.log_file.as_deref(), common.log_level.unwrap_or(usual)) {
        return fail(&error);
    }
    if !matches!(command, Command::Demo { .. }) {
        std::panic::set_hook(Box::new(logging::panicked));
    }
    let done = match command {
        Command::Run(options) => run::run(&common, options).map(|()| ExitCode::SUCCESS),
        Command::Push(options) => push::push(&common, options).map(|()| ExitCode::SUCCESS),
        Command::Track(options) => track::track(&common, options),
        Command::Check(options) => Ok(check::check(&common, &options)),
        Command::Demo { seconds } => demo::demo(Duration::from_secs(seconds)).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            completions(shell);
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| fail(&error))
}

fn completions(shell: Shell) {
    let (mut command, mut script) = (Arguments::command(), Vec::new());
    clap_complete::generate(shell, &mut command, env!("CARGO_PKG_NAME"), &mut script);
    print(&String::from_utf8_lossy(&script));
}

/// Prints the program's answer. Who reads it may have read enough.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
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
    sources.read()
}

/// A decky's name of the command line: what no decky can have is refused before anything is written.
fn decky(name: &str) -> Result<String, Error> {
    check_decky(name).map(|()| name.to_owned())
}

/// `--agent-dir`. No path that is meant has a control character, and none can be shown as it is.
fn agent_dir(path: PathBuf) -> Result<PathBuf, &'static str> {
    let has_control = path.to_string_lossy().contains(char::is_control);
    if has_control { Err("must be a path on one line, without control characters") } else { Ok(path) }
}

/// `--interval`.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    check_interval(interval).map(|()| interval).map_err(|error| chain(&error).replace("interval: ", ""))
}

/// What is wrong with the command line, safe to print: it quotes what was given, and a script may have got that from
/// somebody else.
fn escaped(mut error: clap::Error) -> clap::Error {
    let escaped = |given: &String| text::escaped_within(given, limits::LOG_TEXT);
    let given = |value: &ContextValue| match value {
        ContextValue::String(given) => Some(ContextValue::String(escaped(given))),
        ContextValue::Strings(given) => Some(ContextValue::Strings(given.iter().map(escaped).collect())),
        _ => None,
    };
    let safe: Vec<_> = error.context().filter_map(|(kind, value)| Some((kind, given(value)?))).collect();
    for (kind, value) in safe {
        if error.get(kind) != Some(&value) {
            // Its tip says how to pass the same text, in colours.
            error.remove(ContextKind::Suggested);
            error.insert(kind, value);
        }
    }
    error
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
        let file = printable_path(&file);
        log::warn!("the state file does not list this decky: decky={decky} file={file}");
    }
}

/// `--outbox`.
fn outbox(path: Option<PathBuf>) -> OutboxLocation {
    path.map_or(OutboxLocation::AgentDir, OutboxLocation::File)
}

/// Says why on stderr, wherever the log goes: an operator looks there first.
fn fail(error: &Error) -> ExitCode {
    eprintln!("decnet-heartbeat: {}", chain(error));
    if error.is_not_enrolled() || error.is_config() || error.is_bundle() {
        return ExitCode::from(NOT_CONFIGURED);
    }
    ExitCode::FAILURE
}
