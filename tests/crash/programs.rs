//! `programs`: `run`, `push` and `track` as they are installed, side by side on one agent dir. Any of them is killed at a
//! random moment, while the master is taken away and brought back.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use decnet_heartbeat::{Operation, Outcome};

use crate::Options;
use crate::crash::{Stage, pause};
use crate::told::pushed;

/// Programs that report something, in each round.
const REPORTERS: u32 = 8;

pub fn programs(options: &Options) -> String {
    let mut stage = Stage::new();
    stage.worker.write_ini(&stage.ini()).unwrap();
    play(&mut stage, options, &[None], None);
    stage.finish()
}

/// Rounds in which any of these users reports, and this one runs `run`, but for once in a while.
pub fn play(stage: &mut Stage, options: &Options, users: &[Option<u32>], service: Option<u32>) {
    for round in 1..=(options.kills / 5).max(1) {
        stage.come_or_go();
        let mut run = Running::start(stage, by(users, service));
        let start = |n| Reporter::start(stage, *fastrand::choice(users).unwrap(), round, n);
        let mut reporters: Vec<_> = (0..REPORTERS).map(start).collect();
        for reporter in &mut reporters {
            pause(Duration::from_millis(fastrand::u64(..6)));
            reporter.maybe_kill();
        }
        stage.come_or_go();
        if fastrand::bool() {
            run.kill();
            run = Running::start(stage, by(users, service));
        }
        for reporter in reporters {
            reporter.end(stage);
        }
        run.kill();
        stage.check();
    }
}

/// Who starts a `run`: the service's user, and once in a while any of them, by mistake.
fn by(users: &[Option<u32>], service: Option<u32>) -> Option<u32> {
    if fastrand::u8(..5) == 0 { *fastrand::choice(users).unwrap() } else { service }
}

/// The program, as this user runs it. `None`: ours.
fn program(stage: &Stage, user: Option<u32>) -> Command {
    let mut program = Command::new(&stage.program);
    if let Some(user) = user {
        program.uid(user).gid(user);
    }
    program.arg("--config").arg(stage.ini()).stdin(Stdio::null());
    program
}

/// A `run`, which is killed with the end of its scenario.
pub struct Running(Child);

impl Running {
    pub fn start(stage: &Stage, user: Option<u32>) -> Self {
        let mut run = program(stage, user);
        run.args([
            "run",
            "--interval",
            "50ms",
            "--state-file",
            "/nonexistent",
            "--docker-socket",
            "/nonexistent",
        ]);
        Self(run.stderr(Stdio::null()).spawn().unwrap())
    }

    pub fn assert_runs(&mut self) {
        assert_eq!(self.0.try_wait().unwrap(), None, "run has ended");
    }

    pub fn kill(&mut self) {
        // It may have ended by itself, or have been refused as the one before it was just being killed.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A `push`, or a `track` of a command that succeeds or fails.
pub struct Reporter {
    child: Child,
    name: String,
    /// Of a `track`: what it will report.
    verdict: Option<&'static str>,
}

impl Reporter {
    pub fn start(stage: &mut Stage, user: Option<u32>, round: u32, n: u32) -> Self {
        let command = program(stage, user);
        if n.is_multiple_of(2) {
            Self::push(stage, command, format!("p-{round}-{n}"), fastrand::bool())
        } else {
            Self::track(stage, command, round, n)
        }
    }

    /// A push that is left to `run`, which must have the file for that.
    pub fn left_to_run(stage: &mut Stage, round: u32, n: u32) -> Self {
        let command = program(stage, None);
        Self::push(stage, command, format!("p-{round}-{n}"), false)
    }

    fn push(stage: &mut Stage, mut command: Command, name: String, waits: bool) -> Self {
        let delta = pushed(&name);
        command.args(["push", "--operation", delta.operation().as_str(), "--status"]);
        match delta.outcome() {
            Outcome::Succeeded => command.arg("succeeded"),
            Outcome::Failed(error) => command.args(["failed", "--error", error]),
        };
        if !waits {
            command.arg("--no-wait");
        }
        stage.hear(&format!("try {name}"));
        Self { child: spawn(command.arg(&name)), name, verdict: None }
    }

    fn track(stage: &mut Stage, mut command: Command, round: u32, n: u32) -> Self {
        let name = format!("o-{round}-{n}");
        stage.master.open_operation(&stage.worker.uuid, &name, Operation::Deploy.as_str());
        let (script, verdict) = if n % 4 == 1 {
            ("exit 0", "succeeded")
        } else {
            ("echo why >&2; exit 3", "failed why")
        };
        let script = format!("sleep 0.{:03}; {script}", fastrand::u8(..60));
        command.args([
            "track",
            "--operation",
            "deploy",
            "--decky",
            &name,
            "--",
            "sh",
            "-c",
            &script,
        ]);
        stage.hear(&format!("begin {name}"));
        stage.hear(&format!("end {name} {verdict}"));
        Self { child: spawn(&mut command), name, verdict: Some(verdict) }
    }

    fn maybe_kill(&mut self) {
        if fastrand::bool() {
            self.child.kill().unwrap();
        }
    }

    /// What it has promised by the way in which it ended. One that was killed has promised nothing.
    pub fn end(self, stage: &mut Stage) {
        let name = self.name.clone();
        if let Some((has_promised, said)) = self.try_end(stage) {
            assert!(has_promised, "{name}: {said}");
        }
    }

    /// Whether it has promised that the master hears of it, and what it said. `None`: it was killed.
    pub fn try_end(self, stage: &mut Stage) -> Option<(bool, String)> {
        let Self { child, name, verdict } = self;
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let (code, said) = (status.code()?, String::from_utf8(stderr).unwrap());
        let has_promised = match verdict {
            None => code == 0 || code == 75,
            Some(verdict) => {
                // It ends as its command does, in any case.
                assert_eq!(code, if verdict == "succeeded" { 0 } else { 3 }, "{name}: {said}");
                !said.contains("neither") && !said.contains("cannot be used")
            }
        };
        let promises: &[_] = match (has_promised, verdict) {
            (false, _) => &[],
            (true, None) => &["kept"],
            (true, Some(_)) => &["begun", "ended"],
        };
        promises.iter().for_each(|promise| stage.hear(&format!("{promise} {name}")));
        Some((has_promised, format!("exit code {code}: {said}")))
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}
