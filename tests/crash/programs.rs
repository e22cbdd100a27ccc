//! `programs`: `run`, `push` and `track` of the installed program at the same time, with one agent
//! dir. Each may be killed at a random moment, while the master is stopped and started.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use decnet_heartbeat::{Operation, Outcome};

use crate::Options;
use crate::child_reports::delta_of;
use crate::crash_test::{CrashTest, pause};
use crate::support::ChildProcess;

/// The number of reporters in each round.
const REPORTERS: u32 = 8;

/// The users of the programs. `None` is the user of this process.
pub struct Users<'a> {
    /// The users of reporters.
    pub reporters: &'a [Option<u32>],
    /// The usual user of `run`.
    pub service: Option<u32>,
}

impl Users<'_> {
    /// The user of a reporter.
    fn random(&self) -> Option<u32> {
        *fastrand::choice(self.reporters).unwrap()
    }

    /// The user of a `run`. In one of five cases it is any user, as after a mistake.
    fn of_run(&self) -> Option<u32> {
        if fastrand::u8(..5) == 0 { self.random() } else { self.service }
    }
}

pub fn programs(options: &Options) -> String {
    let mut test = CrashTest::new();
    test.worker.write_ini(&test.ini()).unwrap();
    run_rounds(&mut test, options, &Users { reporters: &[None], service: None });
    test.finish()
}

pub fn run_rounds(test: &mut CrashTest, options: &Options, users: &Users<'_>) {
    for round in 1..=options.fifth_of_kills() {
        test.maybe_stop_or_start_master();
        let mut run = start_run(test, users.of_run());
        let mut reporters = Vec::new();
        for n in 0..REPORTERS {
            reporters.push(Reporter::start(test, users.random(), round, n));
        }
        for reporter in &mut reporters {
            pause(Duration::from_millis(fastrand::u64(..6)));
            reporter.maybe_kill();
        }
        test.maybe_stop_or_start_master();
        if fastrand::bool() {
            drop(run);
            run = start_run(test, users.of_run());
        }
        for reporter in reporters {
            reporter.finish(test);
        }
        drop(run);
        test.check();
    }
}

/// The program with the ini of the test, as this user.
fn program(test: &CrashTest, user: Option<u32>) -> Command {
    let mut program = Command::new(&test.program);
    if let Some(user) = user {
        program.uid(user).gid(user);
    }
    program.arg("--config").arg(test.ini()).stdin(Stdio::null());
    program
}

/// Starts a `run`, which is killed when the value is dropped. It may end before: it is refused while
/// another `run` still holds the lock.
pub fn start_run(test: &CrashTest, user: Option<u32>) -> ChildProcess {
    let mut run = program(test, user);
    run.args(["run", "--interval", "50ms"]);
    run.args(["--state-file", "/nonexistent", "--docker-socket", "/nonexistent"]);
    ChildProcess::start(run.stderr(Stdio::null()))
}

/// A `push`, or a `track` of a command that succeeds or fails.
pub struct Reporter {
    child: Child,
    name: String,
    /// The outcome that `track` reports. `None`: it is a `push`.
    outcome: Option<&'static str>,
}

/// How a reporter ended by itself.
pub struct ReporterEnd {
    /// Whether the delta must be delivered.
    pub is_queued: bool,
    /// Its exit code and its stderr.
    pub output: String,
}

/// What a `push` does after it has queued its delta.
enum Delivery {
    Wait,
    /// `run` delivers the delta.
    LeaveToRun,
}

impl Reporter {
    pub fn start(test: &mut CrashTest, user: Option<u32>, round: u32, n: u32) -> Self {
        let command = program(test, user);
        if n.is_multiple_of(2) {
            let delivery = if fastrand::bool() { Delivery::LeaveToRun } else { Delivery::Wait };
            Self::push(test, command, format!("p-{round}-{n}"), delivery)
        } else {
            Self::track(test, command, round, n)
        }
    }

    /// Starts a push whose delta is delivered by `run`, so that its success shows that `run` uses
    /// the same file.
    pub fn left_to_run(test: &mut CrashTest, round: u32, n: u32) -> Self {
        let command = program(test, None);
        Self::push(test, command, format!("p-{round}-{n}"), Delivery::LeaveToRun)
    }

    fn push(test: &mut CrashTest, mut command: Command, name: String, delivery: Delivery) -> Self {
        let delta = delta_of(&name);
        command.args(["push", "--operation", delta.operation().as_str(), "--status"]);
        match delta.outcome() {
            Outcome::Succeeded => command.arg("succeeded"),
            Outcome::Failed(error) => command.args(["failed", "--error", error]),
        };
        match delivery {
            Delivery::LeaveToRun => command.arg("--no-wait"),
            Delivery::Wait => command.args(["--timeout", &timeout()]),
        };
        test.record(&format!("pushing {name}"));
        Self { child: spawn(command.arg(&name)), name, outcome: None }
    }

    fn track(test: &mut CrashTest, mut command: Command, round: u32, n: u32) -> Self {
        let name = format!("o-{round}-{n}");
        test.master.open_operation(&test.worker.uuid, &name, Operation::Deploy.as_str());
        let (script, outcome) = if n % 4 == 1 {
            ("exit 0", "succeeded")
        } else {
            ("echo why >&2; exit 3", "failed why")
        };
        let script = format!("sleep 0.{:03}; {script}", fastrand::u8(..60));
        command.args(["track", "--operation", "deploy", "--decky", &name]);
        command.args(["--timeout", &timeout()]);
        command.args(["--", "sh", "-c", &script]);
        test.record(&format!("beginning {name}"));
        test.record(&format!("ending {name} {outcome}"));
        Self { child: spawn(&mut command), name, outcome: Some(outcome) }
    }

    fn maybe_kill(&mut self) {
        if fastrand::bool() {
            self.child.kill().unwrap();
        }
    }

    /// Waits for its end, and asserts that its delta is queued unless it was killed.
    pub fn finish(self, test: &mut CrashTest) {
        let name = self.name.clone();
        if let Some(end) = self.wait(test) {
            assert!(end.is_queued, "{name}: {}", end.output);
        }
    }

    /// Waits for its end, and records whether its delta is queued. `None`: it was killed.
    pub fn wait(self, test: &mut CrashTest) -> Option<ReporterEnd> {
        let Self { child, name, outcome } = self;
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let code = status.code()?;
        let stderr = String::from_utf8(stderr).unwrap();
        let is_queued = match outcome {
            None => code == 0 || code == 75,
            Some(outcome) => {
                // `track` exits with the code of its command in any case.
                let expected = if outcome == "succeeded" { 0 } else { 3 };
                assert_eq!(code, expected, "{name}: {stderr}");
                !stderr.contains("neither") && !stderr.contains("cannot be used")
            }
        };
        let events: &[_] = match (is_queued, outcome) {
            (false, _) => &[],
            (true, None) => &["queued"],
            (true, Some(_)) => &["begun", "ended"],
        };
        events.iter().for_each(|event| test.record(&format!("{event} {name}")));
        Some(ReporterEnd { is_queued, output: format!("exit code {code}: {stderr}") })
    }
}

/// A random time limit of a delivery. While `run` cannot reach the master, a reporter waits for it.
fn timeout() -> String {
    format!("{}ms", fastrand::u64(1..1_000))
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}
