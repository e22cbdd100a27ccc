//! The process under test: an agent that embeds the library and obeys the commands on its stdin. It
//! writes one reply per command to stdout, as JSON, and its log to stderr.

use std::io::BufRead;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::{
    DecnetStatus, DeltaSender, EnrolmentSources, Error, Heartbeat, LifecycleDelta, Operation,
    Snapshot, StatusSource, Stopped,
};
use log::LevelFilter;
use serde_json::{Value, json};
use simplelog::{ConfigBuilder, ThreadLogMode, WriteLogger};

use crate::test_bed::Ticks;

/// The status source.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Source {
    /// DECNET's, with the files and the Docker socket of the test bed.
    Decnet,
    /// Returns a status with this many bytes.
    OfSize(usize),
    Panics,
    PanicsEverySecondTime,
    /// Panics with a payload that panics when it is dropped.
    PanicsWithPanickingPayload,
    NeverReturns,
    /// Returns after this many seconds.
    ReturnsAfter(u64),
    /// Returns once for each command `snapshot`.
    ReturnsOnCommand,
}

/// The settings of the agent, as JSON in its argument.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct AgentSettings {
    pub ini: String,
    pub state_file: String,
    pub docker_socket: String,
    pub interval: Duration,
    pub source: Source,
    pub ticks: Ticks,
    pub logger: Logger,
}

/// Where the log is written.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Logger {
    Stderr,
    /// Nowhere: it panics for each line.
    Panics,
}

struct PanickingLogger;

impl log::Log for PanickingLogger {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("decnet_heartbeat") {
            panic!("the logger fails");
        }
    }

    fn flush(&self) {}
}

/// Panics when it is dropped, with a payload of the same type, as often as its number says.
struct PanicsOnDrop(u32);

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(PanicsOnDrop(self.0 - 1));
        }
    }
}

/// The main function of the process.
pub fn run(settings: &str) {
    let settings: AgentSettings = serde_json::from_str(settings).unwrap();
    start_logger(settings.logger);
    std::panic::set_hook(Box::new(|_| ()));
    let agent = Agent::new(settings);
    if std::env::var_os(LIMIT_MEMORY).is_some() {
        limit_memory();
    }
    match agent.start() {
        Ok(heartbeat) => agent.run_commands(heartbeat),
        Err(error) => println!("{}", json!({"error": format!("{error:?}")})),
    }
}

fn start_logger(logger: Logger) {
    let config = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Error)
        .set_thread_mode(ThreadLogMode::Names)
        .add_filter_allow_str("decnet_heartbeat")
        .build();
    match logger {
        Logger::Stderr => WriteLogger::init(LevelFilter::Trace, config, std::io::stderr()).unwrap(),
        Logger::Panics => {
            log::set_logger(&PanickingLogger).unwrap();
            log::set_max_level(LevelFilter::Trace);
        }
    }
}

/// The environment variable with which the agent leaves itself no memory for a thread's stack.
pub const LIMIT_MEMORY: &str = "AGENT_LIMITS_ITS_MEMORY";

fn limit_memory() {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split_whitespace().next().unwrap().parse().unwrap();
    let bytes = pages * 4096 + 512 * 1024;
    let mut prlimit = std::process::Command::new("prlimit");
    prlimit.args(["--pid", &std::process::id().to_string(), &format!("--as={bytes}:")]);
    assert!(prlimit.status().unwrap().success());
}

struct Agent {
    settings: AgentSettings,
    tick: Sender<Instant>,
    ticks: Receiver<Instant>,
    snapshot: Sender<()>,
    snapshots: Receiver<()>,
}

impl Agent {
    fn new(settings: AgentSettings) -> Self {
        let (tick, ticks) = unbounded();
        let (snapshot, snapshots) = unbounded();
        Self { settings, tick, ticks, snapshot, snapshots }
    }

    fn start(&self) -> Result<Heartbeat, Error> {
        self.start_with_ticks(self.ticks.clone())
    }

    fn start_with_ticks(&self, ticks: Receiver<Instant>) -> Result<Heartbeat, Error> {
        let settings = &self.settings;
        let enrolment =
            EnrolmentSources::from_variables([("DECNET_CONFIG", settings.ini.as_str())]).read()?;
        let decnet = DecnetStatus::new(enrolment.agent_dir().value())
            .state_file(&settings.state_file)
            .docker_socket(&settings.docker_socket);
        let mut builder = Heartbeat::builder().enrolment(enrolment).interval(settings.interval);
        if settings.ticks == Ticks::FromTest {
            builder = builder.ticks(ticks);
        }
        let faulty =
            FaultySource { kind: settings.source, calls: 0, released: self.snapshots.clone() };
        match settings.source {
            Source::Decnet => builder.status_source(decnet),
            _ => builder.status_source(faulty),
        }
        .start()
    }

    /// Runs these commands until stdin ends, which drops the heartbeat:
    ///
    /// | command | effect |
    /// | --- | --- |
    /// | `tick` | sends a tick |
    /// | `beat` | sends a tick and waits for its beat |
    /// | `push DECKY` | pushes a delta |
    /// | `stats` | replies with the stats |
    /// | `snapshot` | lets a source of [`Source::ReturnsOnCommand`] return once |
    /// | `start_second` | starts a second heartbeat |
    /// | `drop_sender` | drops the delta sender |
    /// | `stop MILLISECONDS` | stops the heartbeat with this grace |
    /// | `drop` | drops the heartbeat |
    fn run_commands(&self, heartbeat: Heartbeat) {
        let beats = heartbeat.beats();
        let mut deltas = Some(heartbeat.deltas());
        let mut heartbeat = Some(heartbeat);
        println!("{}", json!("started"));
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
            let reply = match command {
                "tick" => json!(self.tick.send(Instant::now()).is_ok()),
                "beat" => {
                    let _ = self.tick.send(Instant::now());
                    json!(beats.recv_timeout(self.settings.interval).is_ok())
                }
                "push" => push(deltas.as_ref().unwrap(), argument),
                "stats" => serde_json::to_value(heartbeat.as_ref().unwrap().stats()).unwrap(),
                "snapshot" => json!(self.snapshot.send(()).is_ok()),
                "start_second" => match self.start_with_ticks(unbounded().1) {
                    Ok(_) => json!("started"),
                    Err(error) => json!(format!("{error:?}")),
                },
                "drop_sender" => json!(deltas.take().is_some()),
                "stop" => {
                    let grace = Duration::from_millis(argument.parse().unwrap());
                    stop(heartbeat.take().unwrap(), grace)
                }
                "drop" => {
                    let since = Instant::now();
                    drop(heartbeat.take());
                    json!({"seconds": since.elapsed().as_secs_f64()})
                }
                other => panic!("unknown command {other}"),
            };
            println!("{reply}");
        }
    }
}

fn push(deltas: &DeltaSender, decky: &str) -> Value {
    match deltas.push(LifecycleDelta::succeeded(decky, Operation::Deploy)) {
        Ok(()) => json!("pushed"),
        Err(error) => json!({"error": format!("{error:?}")}),
    }
}

fn stop(heartbeat: Heartbeat, grace: Duration) -> Value {
    let since = Instant::now();
    let Stopped { undelivered, durable, in_time, .. } = heartbeat.stop(grace);
    let seconds = since.elapsed().as_secs_f64();
    json!({"undelivered": undelivered, "durable": durable, "in_time": in_time, "seconds": seconds})
}

/// A status source with a fault.
struct FaultySource {
    kind: Source,
    calls: u64,
    /// A message for each snapshot that [`Source::ReturnsOnCommand`] may return.
    released: Receiver<()>,
}

impl StatusSource for FaultySource {
    fn snapshot(&mut self) -> Snapshot {
        self.calls += 1;
        match self.kind {
            Source::OfSize(size) => return Snapshot::new(&json!({ "filler": "x".repeat(size) })),
            Source::Panics => panic!("no such \u{1b}[31mdecky\n{}", "x".repeat(1_000)),
            Source::PanicsWithPanickingPayload => std::panic::panic_any(PanicsOnDrop(3)),
            Source::PanicsEverySecondTime if self.calls.is_multiple_of(2) => panic!("an even call"),
            Source::NeverReturns => loop {
                thread::park();
            },
            // The fault is the pause itself.
            Source::ReturnsAfter(seconds) => thread::sleep(Duration::from_secs(seconds)),
            Source::ReturnsOnCommand => {
                let _ = self.released.recv();
            }
            Source::Decnet | Source::PanicsEverySecondTime => (),
        }
        Snapshot::new(&json!({ "calls": self.calls }))
    }
}
