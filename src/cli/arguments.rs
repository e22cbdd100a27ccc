//! The command line: its commands, its options and the values that they accept. Values only.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::builder::{
    PathBufValueParser, PossibleValue, PossibleValuesParser, StyledStr, TypedValueParser,
};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use humantime::{DurationError, format_duration};
use log::LevelFilter;

use super::rfc3339;
use super::state_file::source;
use crate::delta::{Operation, check_decky};
use crate::error::Error;
use crate::files::absolute;
use crate::limits;
use crate::master::identity::MasterIdentity;
use crate::status::decnet::{DOCKER_SOCKET, DecnetStatus};
use crate::text;

// The headings below have the style of clap's own. It is removed where the output has no colours.
const RUN_HELP: &str = "\
\u{1b}[1;4mExit codes:\u{1b}[0m
   0  stopped by SIGTERM or SIGINT
   1  any other error
   2  the command line is wrong
  78  a restart does not help: the host is not enrolled
      or was decommissioned, or its configuration or
      credentials are invalid

\u{1b}[1;4mExample:\u{1b}[0m
  decnet-heartbeat run --interval 30s --log-level debug";
const PIPE_HELP: &str = "\
\u{1b}[1;4mMessages:\u{1b}[0m
  One request in JSON-RPC 2.0 a line on stdin, one answer a
  line on stdout, after the commit and in the same order.
  begin   an operation on deckies; the result has a handle
  end     an operation, on all of its deckies or on one
  push    deltas of operations that have ended
  status  of the agent itself, or null for DECNET's
  stats   what the stats file has

\u{1b}[1;4mEnd:\u{1b}[0m
  At the end of stdin, open operations are reported failed,
  and queued deltas are sent. After SIGTERM or SIGINT stdin
  is read to its end, for 5 seconds at most.

\u{1b}[1;4mExit codes:\u{1b}[0m
   0  stdin has ended, or SIGTERM or SIGINT arrived
   1  any other error
   2  the command line is wrong
  78  a restart does not help, as for `run`

\u{1b}[1;4mExample:\u{1b}[0m
  echo '{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stats\"}' |
      decnet-heartbeat pipe";
const CHECK_HELP: &str = "\
\u{1b}[1;4mExit codes:\u{1b}[0m
   0  `run` would work here
   1  something is wrong: `run` would fail, or not do all
      of its work
   2  the command line is wrong
  78  `run` would not start, and a restart does not help

\u{1b}[1;4mExample:\u{1b}[0m
  decnet-heartbeat check --config /etc/decnet/decnet.ini";
const PUSH_HELP: &str = "\
Beside a running agent, push hands the delta over to it, and waits until it is delivered.

\u{1b}[1;4mExit codes:\u{1b}[0m
   0  the master has accepted the delta; with --no-wait, it
      is in the outbox
   1  the master has rejected it, or it is not in the outbox
   2  the command line or a line of stdin is wrong
  75  it is in the outbox, and was not delivered in time;
      the running agent delivers it
  78  a restart does not help, as for `run`

\u{1b}[1;4mLines:\u{1b}[0m
  The keys decky_name, operation and status; optional are
  error and completed_at. Nothing is reported if a line is
  wrong.

\u{1b}[1;4mExamples:\u{1b}[0m
  decnet-heartbeat push --operation deploy \\
      --status succeeded decky-01
  echo '{\"decky_name\":\"decky-01\",\"operation\":\"deploy\",
      \"status\":\"failed\"}' | tr -d '\\n' |
      decnet-heartbeat push --lines";
const TRACK_HELP: &str = "\
\u{1b}[1;4mExit codes:\u{1b}[0m
  The exit code of COMMAND. Also:
     2  the command line is wrong
   126  COMMAND cannot be started
   127  COMMAND does not exist
   128  plus the signal's number: a signal ended COMMAND,
        or arrived before COMMAND started

\u{1b}[1;4mExample:\u{1b}[0m
  decnet-heartbeat track --operation deploy \\
      --decky decky-01 -- docker compose up -d";
const SHIM_HELP: &str = "\
Save the module as sitecustomize.py in a folder on PYTHONPATH of the agent. Its first lines say how \
with systemd, and how to go back.

\u{1b}[1;4mExample:\u{1b}[0m
  decnet-heartbeat shim > sitecustomize.py";

// clap writes the usage on one line, which is too long for many terminals.
const PUSH_USAGE: &str = "decnet-heartbeat push [OPTIONS] --operation <WHAT>
           --status <HOW> <DECKY>...
       decnet-heartbeat push [OPTIONS] --lines";
const TRACK_USAGE: &str = "decnet-heartbeat track [OPTIONS] --operation <WHAT>
           --decky <NAME>... -- <COMMAND>...";

/// The tip where `track` has no `--`.
const TRACK_SEPARATOR: &str = "put `--` before the command, for example:
       decnet-heartbeat track --operation deploy --decky d1 -- docker compose up";

const DURATION_EXAMPLES: &str = "write for example 30s, 500ms or 1h";

/// Headings of groups of options.
const HOST: &str = "Host and master";
const LOG: &str = "Log";
const STATUS: &str = "Status";
const FILES: &str = "Files";
const DELIVERY: &str = "Delivery";

/// The heartbeat client of a DECNET worker. It reports to the master, over mTLS, that this host is
/// up, what runs on it, and how deploys and mutates ended.
#[derive(Debug, Parser)]
// `bin_name`: without it the usage shows argv[0].
#[command(name = "decnet-heartbeat", bin_name = "decnet-heartbeat", version)]
#[command(arg_required_else_help = true, max_term_width = limits::HELP_WIDTH)]
#[command(after_help = "\u{1b}[1;4mExample:\u{1b}[0m\n  decnet-heartbeat demo")]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, clap::Args)]
pub(super) struct Common {
    /// The configuration file [default: $DECNET_CONFIG, or /etc/decnet/decnet.ini]
    #[arg(long, global = true, value_name = "INI", value_parser = path(), help_heading = HOST)]
    pub(super) config: Option<PathBuf>,
    /// The folder of ca.crt, worker.crt, worker.key, topology.db and the outbox [default:
    /// $DECNET_AGENT_DIR, the ini, or /etc/decnet/agent]
    #[arg(long, global = true, value_name = "DIR", value_parser = folder(), help_heading = HOST)]
    #[arg(value_hint = ValueHint::DirPath)]
    pub(super) agent_dir: Option<PathBuf>,
    /// The rule for the master's certificate: name, host, ca, sha256:HEX or public [default:
    /// $DECNET_MASTER_IDENTITY, the ini, or name]
    #[arg(long, global = true, value_name = "RULE", help_heading = HOST)]
    pub(super) master_identity: Option<MasterIdentity>,
    /// The least severe level to log [default: info; for push and track: warn; for check and demo:
    /// off]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = log_level(), ignore_case = true)]
    #[arg(help_heading = LOG)]
    pub(super) log_level: Option<LevelFilter>,
    /// Append the log to this file instead of stderr; `run` reopens it on SIGHUP
    #[arg(long, global = true, value_name = "PATH", value_parser = path(), help_heading = LOG)]
    pub(super) log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Send beats to the master until SIGTERM or SIGINT
    #[command(after_help = RUN_HELP)]
    Run(RunOptions),
    /// Send heartbeats for an agent in any language: JSON-RPC on stdin and stdout
    #[command(after_help = PIPE_HELP)]
    Pipe(RunOptions),
    /// Check everything that `run` needs, and report what is wrong
    #[command(after_help = CHECK_HELP)]
    Check(CheckOptions),
    /// Report how an operation ended: now, or by way of the outbox
    #[command(after_help = PUSH_HELP, override_usage = PUSH_USAGE)]
    Push(PushOptions),
    /// Run a command, and report how it ended
    #[command(after_help = TRACK_HELP, override_usage = TRACK_USAGE)]
    Track(TrackOptions),
    /// Show a heartbeat with a built-in master; needs no configuration
    #[command(after_help = "\u{1b}[1;4mExample:\u{1b}[0m\n  decnet-heartbeat demo --seconds 30")]
    Demo {
        /// How long the demo takes, from 5 to 600 seconds
        #[arg(long, value_name = "N", default_value = "15", value_parser = demo_seconds)]
        seconds: u64,
    },
    /// Print the module that makes DECNET's own agent report through this program
    #[command(after_help = SHIM_HELP)]
    Shim,
    /// Print the completion script for a shell
    #[command(after_help = "\u{1b}[1;4mExample:\u{1b}[0m
  decnet-heartbeat completions bash > completions.bash")]
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
    /// The version of the agent, which the master receives [default: the version of this program]
    #[arg(long, value_name = "TEXT", value_parser = agent_version)]
    pub(super) agent_version: Option<String>,
    /// DECNET's state file [default: $DECNET_HEARTBEAT_STATE_FILE, or the file beside DECNET's
    /// Python package]
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = STATUS)]
    pub(super) state_file: Option<PathBuf>,
    /// Docker's socket [default: /var/run/docker.sock]
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = STATUS)]
    pub(super) docker_socket: Option<PathBuf>,
    /// The file of queued deltas [default: $DECNET_HEARTBEAT_OUTBOX, or heartbeat.db in the agent
    /// dir]
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = FILES)]
    pub(super) outbox: Option<PathBuf>,
    /// Write the stats to this file as JSON after each beat
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = FILES)]
    pub(super) stats_file: Option<PathBuf>,
    /// Write the stats to this file for Prometheus after each beat; node_exporter reads *.prom
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = FILES)]
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
    /// Print the result as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) run: RunOptions,
}

#[derive(Debug, clap::Args)]
pub(super) struct PushOptions {
    /// What was done
    #[arg(long, value_name = "WHAT", value_parser = operation(), required_unless_present = "lines")]
    pub(super) operation: Option<Operation>,
    /// How it ended
    #[arg(long, value_name = "HOW", required_unless_present = "lines")]
    pub(super) status: Option<FinalStatus>,
    /// Why it failed, for the master's operator; 2,000 characters at most
    #[arg(long, value_name = "TEXT")]
    pub(super) error: Option<String>,
    /// When it ended, in RFC 3339, such as 2026-11-24T12:00:00Z [default: now]
    #[arg(long, value_name = "TIME", value_parser = rfc3339::parse)]
    pub(super) completed_at: Option<SystemTime>,
    /// Read several outcomes from stdin, one JSON object a line; the last one is the newest
    #[arg(long, conflicts_with_all = ["operation", "status", "error", "completed_at", "deckies"])]
    pub(super) lines: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) delivery: DeliveryOptions,
    /// The deckies that it was done to
    #[arg(value_name = "DECKY", required_unless_present = "lines", value_parser = decky)]
    pub(super) deckies: Vec<String>,
}

/// How `push` and `track` deliver to the master.
#[derive(Debug, clap::Args)]
pub(super) struct DeliveryOptions {
    /// How long to try to reach the master, including the name lookup, from 1ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    #[arg(help_heading = DELIVERY)]
    pub(super) timeout: Duration,
    /// Only queue the report in the outbox; `run` delivers it
    #[arg(long, conflicts_with = "timeout", help_heading = DELIVERY)]
    pub(super) no_wait: bool,
    /// The file of queued deltas [default: $DECNET_HEARTBEAT_OUTBOX, or heartbeat.db in the agent
    /// dir]
    #[arg(long, value_name = "PATH", value_parser = path(), help_heading = DELIVERY)]
    pub(super) outbox: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum FinalStatus {
    Succeeded,
    Failed,
}

#[derive(Debug, clap::Args)]
pub(super) struct TrackOptions {
    /// What COMMAND does
    #[arg(long, value_name = "WHAT", value_parser = operation())]
    pub(super) operation: Operation,
    /// The deckies that COMMAND deploys or mutates
    #[arg(long = "decky", value_name = "NAME", required = true, num_args = 1.., value_parser = decky)]
    pub(super) deckies: Vec<String>,
    #[command(flatten)]
    pub(super) delivery: DeliveryOptions,
    /// The command to run, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    #[arg(value_hint = ValueHint::CommandWithArguments)]
    pub(super) command: Vec<OsString>,
}

/// Parses the command line. The error is safe to print once it is [`described`].
pub(super) fn parse(given: impl IntoIterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    let given: Vec<OsString> = given.into_iter().collect();
    Arguments::try_parse_from(&given).map_err(|error| {
        let mut error = escaped(error);
        if error.use_stderr() && is_track_without_separator(&given) {
            let tip = ContextValue::StyledStrs(vec![StyledStr::from(TRACK_SEPARATOR)]);
            error.insert(ContextKind::Suggested, tip);
        }
        error
    })
}

/// Whether the command of `track` may have been taken for deckies or options.
fn is_track_without_separator(given: &[OsString]) -> bool {
    let matches = Arguments::command().ignore_errors(true).try_get_matches_from(given);
    matches.is_ok_and(|matches| matches.subcommand_name() == Some("track"))
        && !given.iter().any(|argument| argument == "--")
}

/// Adds hints for completions to the command line.
pub(super) fn with_hints(command: clap::Command) -> clap::Command {
    let rules = ["name", "host", "ca", "public"];
    command.mut_subcommands(with_hints).mut_args(|argument| match argument.get_value_hint() {
        // The parser also accepts fingerprints. `sha256:` is left out, because zsh ends the list of
        // values at a colon.
        _ if argument.get_id() == "master_identity" => argument.value_parser(rules),
        // The hint of every path. In bash it appends a space to the name of a folder.
        ValueHint::AnyPath => argument.value_hint(ValueHint::FilePath),
        _ => argument,
    })
}

/// A decky's name. An invalid name is rejected before anything is written.
fn decky(name: &str) -> Result<String, Error> {
    check_decky(name).map(|()| name.to_owned())
}

fn operation() -> impl TypedValueParser<Value = Operation> {
    PossibleValuesParser::new([Operation::Deploy, Operation::Mutate].map(Operation::as_str))
        .try_map(|operation| operation.parse::<Operation>())
}

fn log_level() -> impl TypedValueParser<Value = LevelFilter> {
    let [off, error, info, debug, trace] =
        ["off", "error", "info", "debug", "trace"].map(PossibleValue::new);
    let warn = PossibleValue::new("warn").alias("warning");
    PossibleValuesParser::new([off, error, warn, info, debug, trace]).try_map(|level| {
        level.to_ascii_lowercase().replace("warning", "warn").parse::<LevelFilter>()
    })
}

/// A path that does not depend on the working directory.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().map(|path| absolute(&path))
}

/// The agent dir. It is logged and printed, so control characters are rejected.
fn folder() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| {
        if path.to_string_lossy().contains(char::is_control) {
            Err("must be a path on one line, without control characters")
        } else {
            Ok(path)
        }
    })
}

fn demo_seconds(given: &str) -> Result<u64, &'static str> {
    let seconds = given.parse().ok().filter(|seconds| (5..=600).contains(seconds));
    seconds.ok_or("must be a number from 5 to 600")
}

/// The master does not limit it. A person reads it there.
fn agent_version(given: &str) -> Result<String, String> {
    let most = limits::AGENT_VERSION;
    match given.chars().count() {
        0 => Err("is empty".to_owned()),
        length if length > most => Err(format!("must have at most {most} characters")),
        _ if given.chars().any(char::is_control) => {
            Err("must not have control characters".to_owned())
        }
        _ => Ok(given.to_owned()),
    }
}

fn interval(given: &str) -> Result<Duration, String> {
    duration(given, limits::MIN_INTERVAL, limits::MAX_INTERVAL)
}

fn timeout(given: &str) -> Result<Duration, String> {
    duration(given, limits::MIN_REPORT_TIMEOUT, limits::MAX_REPORT_TIMEOUT)
}

fn duration(given: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    match humantime::parse_duration(given) {
        Ok(duration) if (least..=most).contains(&duration) => Ok(duration),
        Ok(_) => {
            Err(format!("must be from {} to {}", format_duration(least), format_duration(most)))
        }
        Err(DurationError::UnknownUnit { unit, value, .. }) if unit.is_empty() => {
            Err(format!("the unit is missing; write {value}s, {value}ms or {value}m"))
        }
        Err(DurationError::UnknownUnit { unit, .. }) => {
            Err(format!("unknown unit '{}'; {DURATION_EXAMPLES}", text::sanitize(&unit)))
        }
        Err(error) => Err(format!("{}; {DURATION_EXAMPLES}", text::sanitize(&error.to_string()))),
    }
}

/// The text of an error, safe to print. [`parse`] has escaped and shortened what it quotes of the
/// command line; the rest of the text is escaped here.
pub(super) fn described(error: clap::Error) -> String {
    text::escape_lines(&error.render().to_string())
}

/// Escapes and shortens what the error quotes of the command line: a script may have got that from
/// an untrusted source.
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
            // The tip quotes the unescaped text.
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

    /// A start of a valid argument, or none, and arbitrary bytes.
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
        fn errors_quote_arguments_safely(
            given in prop::collection::vec(argument(), 0..6)
        ) {
            let given = std::iter::once("decnet-heartbeat".into()).chain(given);
            if let Err(error) = parse(given) {
                let message = described(error);
                prop_assert_eq!(text::escape_lines(&message), message);
            }
        }
    }

    fn error(given: &str) -> String {
        let given = format!("decnet-heartbeat {given}");
        described(parse(given.split(' ').map(OsString::from)).unwrap_err())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn track_without_separator_shows_the_right_call() {
        for given in [
            "track --operation deploy --decky decky-01 docker compose up -d",
            "track --operation deploy --decky decky-01 ./deploy",
            "track --operation deploy --decky=decky-01 docker",
            "track docker",
        ] {
            let message = error(given);
            assert!(message.contains("--decky d1 -- docker compose up"), "{message}");
        }
        for given in ["track --operation undo --decky d -- ls", "push track", "track -- ls"] {
            assert!(!error(given).contains("put `--` before"), "{}", error(given));
        }
    }

    #[test]
    fn unknown_values_are_named_with_the_possible_ones() {
        for (given, expected) in [
            (
                "run --log-level verbose",
                "invalid value 'verbose' for '--log-level <LEVEL>'\n  \
                 [possible values: off, error, warn, info, debug, trace]",
            ),
            (
                "push --operation undo",
                "invalid value 'undo' for '--operation <WHAT>'\n  [possible values: deploy, \
                 mutate]",
            ),
            (
                "run --interval 30",
                "invalid value '30' for '--interval <DURATION>': \
                 the unit is missing; write 30s, 30ms or 30m",
            ),
            (
                "track --timeout 5parsecs",
                "unknown unit 'parsecs'; write for example 30s, 500ms or 1h",
            ),
            ("check --master-identity sha256:12", "must be name, host, ca, public, or sha256:"),
            ("run --interval 10ms", "'--interval <DURATION>': must be from 50ms to 1h"),
            ("push --timeout 2h", "'--timeout <DURATION>': must be from 1ms to 1h"),
            ("demo --seconds 4", "'--seconds <N>': must be a number from 5 to 600"),
        ] {
            let message = error(given);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn mistakes_are_named_with_the_right_call() {
        for (given, expected) in [
            ("rum", "unrecognized subcommand 'rum'\n\n  tip: a similar subcommand exists: 'run'"),
            ("run --intervall 1s", "tip: a similar argument exists: '--interval'"),
            (
                "run --interval",
                "a value is required for '--interval <DURATION>' but none was supplied",
            ),
            ("push --no-wait=yes", "unexpected value 'yes' for '--no-wait' found"),
            ("push --operation deploy --status succeeded", "not provided:\n  <DECKY>..."),
        ] {
            let message = error(given);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn log_levels_have_the_names_that_operators_write() {
        for (given, expected) in [
            ("warning", LevelFilter::Warn),
            ("WARNING", LevelFilter::Warn),
            ("warn", LevelFilter::Warn),
            ("Info", LevelFilter::Info),
            ("off", LevelFilter::Off),
        ] {
            let given = ["decnet-heartbeat", "--log-level", given, "check"].map(OsString::from);
            assert_eq!(parse(given).unwrap().common.log_level, Some(expected));
        }
    }

    #[test]
    fn completions_know_values() {
        for (shell, expected) in [
            (Shell::Bash, "compgen -W \"deploy mutate\""),
            (Shell::Bash, "compgen -W \"off error warn info debug trace\""),
            (Shell::Zsh, ":WHAT:(deploy mutate)'"),
            (Shell::Zsh, ":HOW:(succeeded failed)'"),
            (Shell::Zsh, ":RULE:(name host ca public)'"),
            (Shell::Fish, "-l operation -d 'What was done' -r -f -a \"deploy\\t''\nmutate\\t''\""),
        ] {
            let mut script = Vec::new();
            clap_complete::generate(
                shell,
                &mut with_hints(Arguments::command()),
                "decnet-heartbeat",
                &mut script,
            );
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains(expected), "{script}");
        }
    }

    #[test]
    fn help_fits_terminals_of_60_columns() {
        let mut command = Arguments::command().term_width(60).color(clap::ColorChoice::Never);
        let names: Vec<_> =
            command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
        for name in names {
            let subcommand = command.find_subcommand_mut(&name).unwrap();
            let help = subcommand.clone().term_width(60).render_long_help().to_string();
            let too_long = help.lines().find(|line| line.chars().count() > 60);
            assert_eq!(too_long, None, "{name}");
        }
    }
}
