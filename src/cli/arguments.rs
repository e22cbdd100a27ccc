//! The command line: commands, options and what each may be. Values only.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use log::LevelFilter;

use super::source;
use crate::delta::{Operation, check_decky};
use crate::error::{Error, chain};
use crate::files::absolute;
use crate::heartbeat::check_interval;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::status::decnet::{DOCKER_SOCKET, DecnetStatus};
use crate::text;

const RUN_CODES: &str = "Exits 0 after SIGTERM or SIGINT; 78 when a restart does not help: the host is not enrolled or was \
                         decommissioned, or its configuration or bundle cannot be used; 2 for a wrong command line; 1 for \
                         anything else.";
const PUSH_CODES: &str = "Exits 0 when the master has the delta, with --no-wait when the outbox has it; 75 when the outbox has it and \
     the master could not be told in time, so that run delivers it; 2 for a wrong command line, such as a name that no \
     decky can have; 78 as run does; 1 when neither has it.";
const TRACK_CODES: &str = "Exits as the command did: with its code, with 128 and the signal that ended it, with 127 where there is \
     none, with 126 where it cannot be started. A signal that comes before the command starts ends track with 128 and the \
     signal, and the command is not started.

The command's stderr is copied, for the report, by a process of its own that lives for as long as somebody can write to it. \
Where stdout and stderr are the same file, stdout takes the same way, so that the order is kept. A terminal stays one.";
const CHECK_CODES: &str = "Exits 0 only if an agent would work; 78 if it would not even start, as run would exit; 1 if anything \
                           else is wrong, or the answer cannot be printed.";

/// Tells a DECNET master, over mTLS, that this worker lives, what it runs, and how deploys and mutates ended.
#[derive(Debug, Parser)]
// `bin_name`: otherwise the usage quotes argv[0], whatever that is.
#[command(
    name = "decnet-heartbeat",
    bin_name = "decnet-heartbeat",
    version,
    arg_required_else_help = true
)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, clap::Args)]
pub(super) struct Common {
    /// The ini to read instead of $DECNET_CONFIG or /etc/decnet/decnet.ini
    #[arg(long, global = true, value_name = "INI", value_parser = path())]
    pub(super) config: Option<PathBuf>,
    /// Where ca.crt, worker.crt, worker.key, topology.db and the outbox are
    #[arg(long, global = true, value_name = "DIR", value_parser = PathBufValueParser::new().try_map(agent_dir))]
    pub(super) agent_dir: Option<PathBuf>,
    /// Who counts as the master: name, host, ca, sha256:HEX or public [default: name]
    #[arg(long, global = true, value_name = "RULE")]
    pub(super) master_identity: Option<MasterIdentity>,
    /// off, error, warn, info, debug or trace [default: info; for push and track warn, for check and demo off]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(super) log_level: Option<LevelFilter>,
    /// Append the log to this file instead of stderr; SIGHUP has run open it anew
    #[arg(long, global = true, value_name = "PATH", value_parser = path())]
    pub(super) log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
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
pub(super) struct RunOptions {
    /// The time between two beats, from 50ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = interval)]
    pub(super) interval: Duration,
    /// DECNET's state file [default: $DECNET_HEARTBEAT_STATE_FILE, or beside DECNET's Python package]
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) state_file: Option<PathBuf>,
    /// The Docker Engine's socket [default: /var/run/docker.sock]
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) docker_socket: Option<PathBuf>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) outbox: Option<PathBuf>,
    /// Rewrite this file with the stats as JSON after each beat
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) stats_file: Option<PathBuf>,
    /// Rewrite this file with the stats for Prometheus after each beat; node_exporter reads *.prom
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) metrics_file: Option<PathBuf>,
}

impl RunOptions {
    pub(super) fn docker_socket(&self) -> &Path {
        self.docker_socket.as_deref().unwrap_or(Path::new(DOCKER_SOCKET))
    }

    pub(super) fn source(&self, agent_dir: &Path) -> DecnetStatus {
        source(agent_dir, self.state_file.as_deref()).docker_socket(self.docker_socket())
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct CheckOptions {
    #[command(flatten)]
    pub(super) run: RunOptions,
    /// Say it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct PushOptions {
    /// deploy or mutate
    #[arg(long, value_name = "WHAT")]
    pub(super) operation: Operation,
    /// How it ended
    #[arg(long, value_name = "HOW")]
    pub(super) status: Status,
    /// Why it failed, for the master's operator; 2,000 characters at most
    #[arg(long, value_name = "TEXT")]
    pub(super) error: Option<String>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) outbox: Option<PathBuf>,
    #[command(flatten)]
    pub(super) telling: DeltaOptions,
    /// The deckies that it was done to
    #[arg(value_name = "DECKY", required = true, value_parser = decky)]
    pub(super) deckies: Vec<String>,
}

/// How long `push` and `track` try to tell the master.
#[derive(Debug, clap::Args)]
pub(super) struct DeltaOptions {
    /// How long to try to tell the master, the lookup of its name included, from 1ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    pub(super) timeout: Duration,
    /// Leave it to the outbox, for run to deliver, without trying to tell the master
    #[arg(long, conflicts_with = "timeout")]
    pub(super) no_wait: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Status {
    Succeeded,
    Failed,
}

#[derive(Debug, clap::Args)]
pub(super) struct TrackOptions {
    /// deploy or mutate
    #[arg(long, value_name = "WHAT")]
    pub(super) operation: Operation,
    /// The deckies that it is done to
    #[arg(long = "decky", value_name = "NAME", required = true, num_args = 1.., value_parser = decky)]
    pub(super) deckies: Vec<String>,
    /// Where deltas are kept [default: heartbeat.db in the agent dir]
    #[arg(long, value_name = "PATH", value_parser = path())]
    pub(super) outbox: Option<PathBuf>,
    #[command(flatten)]
    pub(super) telling: DeltaOptions,
    /// What does it; its exit code is the program's
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<OsString>,
}

/// A decky's name of the command line: what no decky can have is refused before anything is written.
fn decky(name: &str) -> Result<String, Error> {
    check_decky(name).map(|()| name.to_owned())
}

/// A file that does not depend on where this process is.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().map(|path| absolute(&path))
}

/// `--agent-dir`. No path that is meant has a control character, and none can be shown as it is.
fn agent_dir(path: PathBuf) -> Result<PathBuf, &'static str> {
    let has_control = path.to_string_lossy().contains(char::is_control);
    if has_control {
        Err("must be a path on one line, without control characters")
    } else {
        Ok(path)
    }
}

/// `--interval`.
fn interval(given: &str) -> Result<Duration, String> {
    let interval = duration(given)?;
    check_interval(interval)
        .map(|()| interval)
        .map_err(|error| chain(&error).replace("interval: ", ""))
}

/// `--timeout`.
fn timeout(given: &str) -> Result<Duration, String> {
    let timeout = duration(given)?;
    let (least, most) = limits::REPORT_TIMEOUT;
    if (least..=most).contains(&timeout) {
        Ok(timeout)
    } else {
        Err("must be from 1 ms to 1 h".to_owned())
    }
}

fn duration(given: &str) -> Result<Duration, String> {
    humantime::parse_duration(given).map_err(|error| text::sanitize(&error.to_string()))
}

/// What is wrong with the command line, safe to print: it quotes what was given, and a script may have got that from
/// somebody else. What is quoted is on one line and cut; whatever else is in the text is escaped as well.
pub(super) fn described(error: clap::Error) -> String {
    text::escape_lines(&escaped(error).render().to_string())
}

fn escaped(mut error: clap::Error) -> clap::Error {
    let escaped = |given: &String| text::escape_within(given, limits::LOG_TEXT);
    let given = |value: &ContextValue| match value {
        ContextValue::String(given) => Some(ContextValue::String(escaped(given))),
        ContextValue::Strings(given) => {
            Some(ContextValue::Strings(given.iter().map(escaped).collect()))
        }
        _ => None,
    };
    let safe: Vec<_> =
        error.context().filter_map(|(kind, value)| Some((kind, given(value)?))).collect();
    for (kind, value) in safe {
        if error.get(kind) != Some(&value) {
            // Its tip says how to pass the same text, in colours.
            error.remove(ContextKind::Suggested);
            error.insert(kind, value);
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    /// An argument that may nearly be one of ours, with anything in it.
    fn argument() -> impl Strategy<Value = OsString> {
        let start = prop::sample::select(vec![
            "",
            "-",
            "--",
            "run",
            "push",
            "--interval=",
            "--interval",
            "--operation=",
            "--status",
            "--decky=",
            "--seconds=",
            "demo",
            "completions",
            "help",
            "--log-level=",
            "--master-identity=",
            "track",
            "check",
            "--config",
            "--no",
        ]);
        let bytes = prop_oneof![
            Just(Vec::new()),
            prop::collection::vec(any::<u8>(), 0..8),
            prop::collection::vec(any::<char>(), 0..8)
                .prop_map(|text| String::from_iter(text).into_bytes()),
            prop::collection::vec(
                prop::sample::select(vec![
                    '\u{1b}', '\n', '\u{9b}', '\u{202e}', '\u{3164}', '{', '\''
                ]),
                0..4
            )
            .prop_map(|text| String::from_iter(text).into_bytes()),
        ];
        (start, bytes)
            .prop_map(|(start, bytes)| OsString::from_vec([start.as_bytes(), &bytes].concat()))
    }

    proptest! {
        #[test]
        fn whatever_the_arguments_are_what_is_said_of_them_is_printable(
            given in prop::collection::vec(argument(), 0..6)
        ) {
            let given = std::iter::once("decnet-heartbeat".into()).chain(given);
            if let Err(error) = Arguments::try_parse_from(given) {
                let said = described(error);
                prop_assert_eq!(text::escape_lines(&said), said);
            }
        }
    }
}
