//! The program while it runs.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A process that does not outlive its test.
pub struct Running(pub Child);

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub fn signal(&self, name: &str) {
        let kill =
            Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status().unwrap();
        assert!(kill.success(), "{name}");
    }

    /// Waits until it has a thread of this name.
    pub fn await_thread(&self, name: &str) {
        let tasks = format!("/proc/{}/task", self.0.id());
        let names =
            || std::fs::read_dir(&tasks).unwrap().map(|task| task.unwrap().path().join("comm"));
        let end = Instant::now() + PATIENCE;
        while !names()
            .any(|comm| std::fs::read_to_string(comm).is_ok_and(|found| found.trim_end() == name))
        {
            assert!(Instant::now() < end, "no thread {name}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// How it ends within so long.
    pub fn end(&mut self, within: Duration) -> ExitStatus {
        let (sender, receiver) = channel();
        let (pid, child) = (self.0.id(), &mut self.0);
        thread::scope(|scope| {
            scope.spawn(move || sender.send(child.wait().unwrap()));
            receiver.recv_timeout(within).unwrap_or_else(|_| {
                Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
                panic!("it has not ended in {within:?}")
            })
        })
    }

    /// Its exit code after SIGTERM.
    pub fn terminate(&mut self, within: Duration) -> Option<i32> {
        self.signal("TERM");
        self.end(within).code()
    }

    /// A line of the kernel's about it: a mask of signals, a bit each from the first on.
    pub fn mask(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of a pipe, as they come.
pub fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

/// Waits for a line with this in it, and gives it.
pub fn line_with(lines: &Receiver<String>, what: &str) -> String {
    let mut others = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(what) => return line,
            Ok(line) => others.push(line),
            Err(_) => panic!("no {what:?} in {others:#?}"),
        }
    }
}
