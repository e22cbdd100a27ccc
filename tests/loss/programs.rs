//! `programs`: `run`, `push` and `track` as they are installed, side by side on one agent dir. Any of them is killed at a
//! random moment, while the master is taken away and brought back.

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
    for round in 1..=(options.kills / 5).max(1) {
        stage.come_or_go();
        let mut run = run(&stage);
        let mut reporters: Vec<_> = (0..REPORTERS).map(|n| Reporter::start(&mut stage, round, n)).collect();
        for reporter in &mut reporters {
            pause(Duration::from_millis(fastrand::u64(..6)));
            reporter.maybe_kill();
        }
        stage.come_or_go();
        if fastrand::bool() {
            kill(&mut run);
            run = self::run(&stage);
        }
        for reporter in reporters {
            reporter.end(&mut stage);
        }
        kill(&mut run);
        stage.check();
    }
    stage.finish()
}

fn program(stage: &Stage) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    program.arg("--config").arg(stage.ini()).stdin(Stdio::null());
    program
}

fn run(stage: &Stage) -> Child {
    let mut run = program(stage);
    run.args(["run", "--interval", "50ms", "--state-file", "/nonexistent", "--docker-socket", "/nonexistent"]);
    run.stderr(Stdio::null()).spawn().unwrap()
}

fn kill(child: &mut Child) {
    // It may have ended by itself, or have been refused as the one before it was just being killed.
    let _ = child.kill();
    child.wait().unwrap();
}

/// A `push`, or a `track` of a command that succeeds or fails.
struct Reporter {
    child: Child,
    name: String,
    /// Of a `track`: what it will report.
    verdict: Option<&'static str>,
}

impl Reporter {
    fn start(stage: &mut Stage, round: u32, n: u32) -> Self {
        if n.is_multiple_of(2) { Self::push(stage, format!("p-{round}-{n}")) } else { Self::track(stage, round, n) }
    }

    fn push(stage: &mut Stage, name: String) -> Self {
        let (mut command, delta) = (program(stage), pushed(&name));
        command.args(["push", "--operation", delta.operation().as_str(), "--status"]);
        match delta.outcome() {
            Outcome::Succeeded => command.arg("succeeded"),
            Outcome::Failed(error) => command.args(["failed", "--error", error]),
        };
        stage.hear(&format!("try {name}"));
        Self { child: spawn(command.arg(&name)), name, verdict: None }
    }

    fn track(stage: &mut Stage, round: u32, n: u32) -> Self {
        let name = format!("o-{round}-{n}");
        stage.master.open_operation(&stage.worker.uuid, &name, Operation::Deploy.as_str());
        let (script, verdict) =
            if n % 4 == 1 { ("exit 0", "succeeded") } else { ("echo why >&2; exit 3", "failed why") };
        let mut command = program(stage);
        command.args(["track", "--operation", "deploy", "--decky", &name, "--", "sh", "-c", script]);
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
    fn end(self, stage: &mut Stage) {
        let Self { child, name, verdict } = self;
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let Some(code) = status.code() else { return };
        let said = String::from_utf8(stderr).unwrap();
        assert!(!said.contains("neither") && !said.contains("cannot be used"), "{name}: {said}");
        match verdict {
            None => {
                assert!(code == 0 || code == 75, "{name}: {code}: {said}");
                stage.hear(&format!("kept {name}"));
            }
            Some(verdict) => {
                assert_eq!(code, if verdict == "succeeded" { 0 } else { 3 }, "{name}: {said}");
                stage.hear(&format!("begun {name}"));
                stage.hear(&format!("ended {name}"));
            }
        }
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}
