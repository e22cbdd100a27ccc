//! The process under test, as the test sees it: it writes commands to its stdin, and reads replies
//! from its stdout and the log from a file.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::agent::AgentSettings;
use crate::support::proc_status::{status_number, sum_over_threads};
use crate::support::{lines, send_signal};
use crate::test_bed::TIMEOUT;

/// What a process uses.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub threads: u64,
    pub descriptors: usize,
    /// The largest resident memory so far, in KiB.
    pub peak: u64,
    /// The resident memory now, in KiB.
    pub resident: u64,
}

impl Footprint {
    fn of(process: u32) -> Self {
        Self {
            threads: status_number(process, "Threads"),
            descriptors: fs::read_dir(format!("/proc/{process}/fd")).unwrap().count(),
            peak: status_number(process, "VmHWM"),
            resident: status_number(process, "VmRSS"),
        }
    }
}

pub struct AgentProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    replies: Receiver<String>,
    log: PathBuf,
}

impl AgentProcess {
    pub fn spawn(settings: &AgentSettings, log: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = this_program();
        command.arg("--agent").arg(serde_json::to_string(settings).unwrap());
        let log_file = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file);
        let mut child = command.envs(variables.iter().copied()).spawn().unwrap();
        let replies = lines(child.stdout.take().unwrap());
        Self { stdin: child.stdin.take(), child, replies, log: log.to_owned() }
    }

    /// The next line of its stdout.
    pub fn read_reply(&mut self) -> Value {
        let line = self
            .replies
            .recv_timeout(TIMEOUT)
            .unwrap_or_else(|error| panic!("no reply from the agent: {error}\n{}", self.log()));
        serde_json::from_str(&line).unwrap()
    }

    /// Sends a command and reads its reply.
    pub fn command(&mut self, command: &str) -> Value {
        writeln!(self.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.read_reply()
    }

    pub fn push(&mut self, decky: &str) {
        assert_eq!(self.command(&format!("push {decky}")), "pushed");
    }

    pub fn tick(&mut self) {
        self.command("tick");
    }

    pub fn stats(&mut self) -> Value {
        self.command("stats")
    }

    /// Waits until the stats satisfy the condition, and returns them. They are read repeatedly,
    /// because they are in another process.
    pub fn wait_for(&mut self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + TIMEOUT;
        loop {
            let stats = self.stats();
            if condition(&stats) {
                return stats;
            }
            assert!(Instant::now() < end, "waited for {what}: {stats:#}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the heartbeat. The reply has the result and the time that it took.
    pub fn stop(&mut self, grace: Duration) -> Value {
        self.command(&format!("stop {}", grace.as_millis()))
    }

    pub fn signal(&self, name: &str) {
        send_signal(name, self.child.id());
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(self.child.id())
    }

    /// How often its threads went to sleep by themselves. Each time they were woken up before.
    pub fn sleeps(&self) -> u64 {
        sum_over_threads(self.child.id(), "voluntary_ctxt_switches")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        let start = log.len().saturating_sub(5_000);
        String::from_utf8_lossy(&log.as_bytes()[start..]).into_owned()
    }

    /// The lines of the log that contain this text.
    pub fn log_lines(&self, text: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

/// This program. Root runs it without the capabilities that bypass file permissions, so that a mode
/// of 000 has an effect.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap();
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-dac_override,-dac_read_search"]).arg(program);
    command
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
