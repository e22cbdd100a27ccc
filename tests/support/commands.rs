//! Child processes: their lines, their end and signals to them, with timeouts and without sleeping.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// The lines of a pipe, as they arrive. The channel is closed when the pipe is, so nothing waits
/// for a process that has died.
pub fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        // The pipe is drained even after the receiver was dropped. Otherwise the process blocks.
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    receiver
}

/// Waits up to `timeout` for the child's end. `None`: it did not end in time and was killed.
pub fn wait_for_exit(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let pid = child.id();
    thread::scope(|scope| {
        let (sender, receiver) = channel();
        scope.spawn(move || sender.send(child.wait().expect("a child can be waited for")));
        // The scope joins that thread, which ends because the child ended or is killed here.
        receiver.recv_timeout(timeout).inspect_err(|_| signal("KILL", pid)).ok()
    })
}

/// Sends a signal with the shell's built-in `kill`. Does nothing if there is no such process.
pub fn signal(name: &str, pid: u32) {
    run(Command::new("sh").args(["-c", &format!("kill -{name} {pid} 2>/dev/null || true")]));
}

/// Runs a command to its end and returns its trimmed stdout. Panics with its stderr if it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// This test program again, for one test. The caller sets an environment variable by which the
/// test knows that it is the child.
pub fn rerun_test(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--include-ignored", "--nocapture"]);
    command
}
