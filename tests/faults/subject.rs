//! The process under test: an agent that embeds the library and does what the lines on its stdin say. What it knows goes
//! to stdout, a line an answer, and all of its log to stderr.

use std::io::BufRead;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use decnet_heartbeat::{
    DecnetStatus, EnrolmentSources, Error, Heartbeat, LifecycleDelta, Operation, Snapshot,
    StatusSource, Stopped,
};
use log::LevelFilter;
use serde_json::json;
use simplelog::{ConfigBuilder, ThreadLogMode, WriteLogger};

/// Where the status comes from.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Source {
    /// DECNET's own, with the stage's files and Docker.
    Decnet,
    /// A status of so many bytes.
    Of(usize),
    Panics,
    PanicsEverySecondTime,
    /// With a payload that panics itself when it is dropped.
    PanicsWithAStubbornPayload,
    NeverReturns,
    /// Each answer takes so many seconds.
    Takes(u64),
}

/// What the subject is started with, as JSON in its argument.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Setup {
    pub ini: String,
    pub state_file: String,
    pub docker_socket: String,
    pub interval: Duration,
    pub source: Source,
    /// It beats on its own ticks, or else when it is told to.
    pub ticks: bool,
    pub logger: Logger,
}

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Logger {
    Stderr,
    /// Nowhere: it panics for each line.
    Panics,
}

/// A logger with a fault.
struct Panicking;

impl log::Log for Panicking {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("decnet_heartbeat") {
            panic!("no log today");
        }
    }

    fn flush(&self) {}
}

/// Panics each time it is dropped, with another one of its kind.
struct Stubborn(u32);

impl Drop for Stubborn {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(Stubborn(self.0 - 1));
        }
    }
}

/// The whole subject.
pub fn run(setup: &str) {
    let setup: Setup = serde_json::from_str(setup).unwrap();
    let config = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Error)
        .set_thread_mode(ThreadLogMode::Names)
        .add_filter_allow_str("decnet_heartbeat")
        .build();
    match setup.logger {
        Logger::Stderr => WriteLogger::init(LevelFilter::Trace, config, std::io::stderr()).unwrap(),
        Logger::Panics => {
            log::set_logger(&Panicking).unwrap();
            log::set_max_level(LevelFilter::Trace);
        }
    }
    std::panic::set_hook(Box::new(|_| ()));
    let (tick, ticks) = unbounded();
    if std::env::var_os(NO_ROOM).is_some() {
        leave_no_room();
    }
    match start(&setup, ticks) {
        Ok(heartbeat) => obey(&setup, heartbeat, &tick),
        Err(error) => println!("{}", json!({"error": format!("{error:?}")})),
    }
}

/// The variable that leaves a subject no memory for a thread's stack.
pub const NO_ROOM: &str = "SUBJECT_HAS_NO_ROOM";

fn leave_no_room() {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split_whitespace().next().unwrap().parse().unwrap();
    let bytes = pages * 4096 + 512 * 1024;
    let (pid, limit) = (std::process::id().to_string(), format!("--as={bytes}:"));
    assert!(
        std::process::Command::new("prlimit")
            .args(["--pid", &pid, &limit])
            .status()
            .unwrap()
            .success()
    );
}

fn start(setup: &Setup, ticks: Receiver<Instant>) -> Result<Heartbeat, Error> {
    let enrolment =
        EnrolmentSources::from_variables([("DECNET_CONFIG", setup.ini.as_str())]).read()?;
    let decnet = DecnetStatus::new(enrolment.agent_dir().value())
        .state_file(&setup.state_file)
        .docker_socket(&setup.docker_socket);
    let mut builder = Heartbeat::builder().enrolment(enrolment).interval(setup.interval);
    if !setup.ticks {
        builder = builder.ticks(ticks);
    }
    match setup.source {
        Source::Decnet => builder.status_source(decnet),
        source => builder.status_source(Other { source, asked: 0 }),
    }
    .start()
}

/// A source that is not DECNET's.
struct Other {
    source: Source,
    asked: u64,
}

impl StatusSource for Other {
    fn snapshot(&mut self) -> Snapshot {
        self.asked += 1;
        match self.source {
            Source::Of(size) => return Snapshot::new(&json!({ "filler": "x".repeat(size) })),
            Source::Panics => panic!("no such \u{1b}[31mdecky\n{}", "x".repeat(1_000)),
            Source::PanicsWithAStubbornPayload => std::panic::panic_any(Stubborn(3)),
            Source::PanicsEverySecondTime if self.asked.is_multiple_of(2) => panic!("the even one"),
            Source::NeverReturns => loop {
                thread::park();
            },
            Source::Takes(seconds) => thread::sleep(Duration::from_secs(seconds)),
            Source::Decnet | Source::PanicsEverySecondTime => (),
        }
        Snapshot::new(&json!({ "asked": self.asked }))
    }
}

/// `tick`, `beat` (a tick, and its beat waited for), `push DECKY`, `stats`, `second` (start another one), `forget` (every sender), `stop MILLISECONDS` or `drop`;
/// the end of stdin is a drop.
fn obey(setup: &Setup, heartbeat: Heartbeat, tick: &Sender<Instant>) {
    let (mut deltas, beats) = (Some(heartbeat.deltas()), heartbeat.beats());
    let mut heartbeat = Some(heartbeat);
    println!("{}", json!("started"));
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match command {
            "tick" => json!(tick.send(Instant::now()).is_ok()),
            "beat" => {
                let _ = tick.send(Instant::now());
                json!(beats.recv_timeout(setup.interval).is_ok())
            }
            "push" => match deltas
                .as_ref()
                .unwrap()
                .push(LifecycleDelta::succeeded(argument, Operation::Deploy))
            {
                Ok(()) => json!("pushed"),
                Err(error) => json!({"error": format!("{error:?}")}),
            },
            "stats" => serde_json::to_value(heartbeat.as_ref().unwrap().stats()).unwrap(),
            "second" => {
                json!(
                    start(setup, unbounded().1)
                        .map_or_else(|error| format!("{error:?}"), |_| "started".into())
                )
            }
            "forget" => json!(deltas.take().is_some()),
            "stop" => {
                let (since, grace) =
                    (Instant::now(), Duration::from_millis(argument.parse().unwrap()));
                let Stopped { undelivered, kept, in_time, .. } =
                    heartbeat.take().unwrap().stop(grace);
                let seconds = since.elapsed().as_secs_f64();
                json!({"undelivered": undelivered, "kept": kept, "in_time": in_time, "seconds": seconds})
            }
            "drop" => {
                let since = Instant::now();
                drop(heartbeat.take());
                json!({"seconds": since.elapsed().as_secs_f64()})
            }
            other => panic!("{other}"),
        };
        println!("{answer}");
    }
}
