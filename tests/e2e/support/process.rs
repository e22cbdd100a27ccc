//! Child processes: waiting for what they say and for their end, with deadlines and without sleeping.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// The lines of a pipe, as they come. The channel ends with the pipe, so nothing that the process says is left unread
/// and nothing waits for a process that has died.
pub fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        // Who has heard enough drops the receiver; the pipe must be drained all the same.
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    receiver
}

/// Waits for the child's end. `None`: it has not come in time, and the child was killed.
pub fn end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let pid = child.id();
    thread::scope(|scope| {
        let (sender, receiver) = channel();
        scope.spawn(move || sender.send(child.wait().expect("a child can be waited for")));
        // The scope waits for that thread, and killed or ended, the child lets it go.
        receiver.recv_timeout(patience).inspect_err(|_| signal("KILL", pid)).ok()
    })
}

/// Sends a signal, by the shell's own `kill`. No such process: nothing happens.
pub fn signal(name: &str, pid: u32) {
    run(Command::new("sh").args(["-c", &format!("kill -{name} {pid} 2>/dev/null || true")]));
}

/// Runs a command to its end and gives what it printed, trimmed; panics with its stderr if it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// This test binary once more, for one test. A variable is to tell it that it is the child.
pub fn again(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--include-ignored", "--nocapture"]);
    command
}
