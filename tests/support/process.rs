//! Child processes: their lines, signals and ends.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::commands::{lines, run, wait_for_exit};
use super::{TIMEOUT, poll_until};

/// A process that is killed when the value is dropped, so that it does not outlive its test.
pub struct ChildProcess(pub Child);

impl ChildProcess {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The lines of its stderr, which must be piped.
    pub fn stderr_lines(&mut self) -> Receiver<String> {
        lines(self.0.stderr.take().unwrap())
    }

    pub fn signal(&self, name: &str) {
        send_signal(name, self.id());
    }

    pub fn assert_is_running(&mut self) {
        assert_eq!(self.0.try_wait().unwrap(), None);
    }

    /// Waits until it has a thread with this name.
    pub fn wait_for_thread(&self, name: &str) {
        let tasks = format!("/proc/{}/task", self.id());
        poll_until(&format!("thread {name}"), || {
            let tasks = fs::read_dir(&tasks).unwrap().map(|task| task.unwrap().path());
            let mut names = tasks.filter_map(|task| fs::read_to_string(task.join("comm")).ok());
            names.any(|found| found.trim_end() == name)
        });
    }

    /// Waits up to `timeout` for its end. Kills it and panics if it has not ended then.
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        wait_for_exit(&mut self.0, timeout)
            .unwrap_or_else(|| panic!("the process has not ended within {timeout:?}"))
    }

    /// Sends SIGTERM, and waits up to `timeout` for the exit code.
    pub fn terminate(&mut self, timeout: Duration) -> Option<i32> {
        self.signal("TERM");
        self.wait(timeout).code()
    }

    /// A set of signals in its `/proc/PID/status`, such as `SigIgn`. Bit 0 is signal 1.
    pub fn signal_mask(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command, started by a shell that first runs this line. It has the command's arguments and
/// variables.
pub fn in_shell_after(line: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{line}; exec \"$@\""), "sh"]);
    shell.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    shell.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell
}

/// Sends a signal by name or number. Fails if there is no such process or signal.
pub fn send_signal(name: &str, pid: u32) {
    run(Command::new("kill").args(["-s", name, &pid.to_string()]));
}

/// Waits for a line that contains this text, and returns it.
pub fn wait_for_line(lines: &Receiver<String>, part: &str) -> String {
    let mut others = Vec::new();
    loop {
        match lines.recv_timeout(TIMEOUT) {
            Ok(line) if line.contains(part) => return line,
            Ok(line) => others.push(line),
            Err(_) => panic!("no {part:?} in {others:#?}"),
        }
    }
}

pub fn make_fifo(path: &Path) {
    run(Command::new("mkfifo").arg(path));
}
