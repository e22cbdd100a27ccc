//! `push` beside a `run`, which it wakes, and `push` alone, which posts the delta itself: the time
//! from the start of the process to its end, with the real master.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::disk;
use crate::process::Killed;
use crate::support::{self, RealMaster};
use crate::table::{Amount, Figures, Goal, Line, percentile};

const PROGRAM: &str = env!("CARGO_BIN_EXE_decnet-heartbeat");

const PUSHES: usize = 100;

/// Alternates between a push beside a `run` and a push on a host without one.
pub fn measure() -> Result<Figures, String> {
    if !support::python_path().exists() {
        return Err("the Python module: tests/e2e/setup.sh".to_owned());
    }
    let master = RealMaster::start();
    let folder = disk::folder()?;
    let beside = Host::new(&master, folder.path(), "beside");
    let alone = Host::new(&master, folder.path(), "alone");
    let mut run = beside.command(&["run", "--interval", "1h"]);
    run.arg("--state-file").arg(folder.path().join("none"));
    run.arg("--docker-socket").arg(folder.path().join("none"));
    let _run = Killed(run.stderr(Stdio::null()).spawn().unwrap());
    master.answers(1);
    let mut took_beside = Vec::new();
    let mut took_alone = Vec::new();
    for _ in 0..PUSHES {
        took_beside.push(beside.push());
        // The deliverer's commit after the answer is not part of the next push.
        thread::sleep(Duration::from_millis(20));
        took_alone.push(alone.push());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(vec![Line {
        what: "`push` beside a `run`, with the real master, p50; floor: `push` alone".to_owned(),
        floor: Some(Amount::Time(percentile(&took_alone, 50))),
        measured: Amount::Time(percentile(&took_beside, 50)),
        goal: Goal::AtMostTimes(0.6),
    }]
    .into())
}

/// An enrolled host.
struct Host {
    ini: std::path::PathBuf,
}

impl Host {
    fn new(master: &RealMaster, folder: &Path, name: &str) -> Self {
        let agent_dir = folder.join(name);
        std::fs::create_dir_all(&agent_dir).unwrap();
        let uuid = master.enrol(name, &agent_dir).uuid;
        let ini = folder.join(format!("{name}.ini"));
        let text = format!(
            "[decnet]\nmode = agent\n[agent]\nmaster-host = 127.0.0.1\nswarmctl-port = {}\n\
             agent-dir = {}\nhost-uuid = {uuid}\n",
            master.port(),
            agent_dir.display()
        );
        std::fs::write(&ini, text).unwrap();
        Self { ini }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env_clear().arg("--config").arg(&self.ini).args(arguments);
        command
    }

    fn push(&self) -> Duration {
        let arguments = ["push", "--operation", "deploy", "--status", "succeeded", "decky-1"];
        let mut command = self.command(&arguments);
        let since = Instant::now();
        let output = command.output().unwrap();
        let took = since.elapsed();
        assert_eq!(output.stdout, b"delivered\n", "{output:?}");
        took
    }
}
