//! An agent that has `pipe` as its child.

use std::io::Write;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use serde_json::{Value, json};

use super::{ChildProcess, Fixture, TIMEOUT, lines, program};

/// The agent's end of the pipes.
pub struct Agent {
    pub pipe: ChildProcess,
    /// `None`: closed.
    pub stdin: Option<ChildStdin>,
    answers: Receiver<String>,
    pub log: Receiver<String>,
    last_id: u64,
}

impl Fixture {
    /// `pipe` with the worker's ini, and with a state file and a Docker socket that do not exist.
    pub fn pipe_command(&self) -> Command {
        self.write_ini();
        let mut command = program();
        command.arg("--config").arg(self.ini()).arg("pipe");
        command.arg("--state-file").arg(self.path("state"));
        command.arg("--docker-socket").arg(self.path("docker.sock"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

impl Agent {
    pub fn start(command: &mut Command) -> Self {
        let mut pipe = ChildProcess::start(command);
        let stdin = pipe.0.stdin.take();
        let answers = lines(pipe.0.stdout.take().unwrap());
        let log = lines(pipe.0.stderr.take().unwrap());
        Self { pipe, stdin, answers, log, last_id: 0 }
    }

    /// Sends these bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    pub fn answer(&self) -> Value {
        let line = self.answers.recv_timeout(TIMEOUT).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    pub fn has_answer(&self, within: Duration) -> bool {
        self.answers.recv_timeout(within).is_ok()
    }

    /// Sends a request, and waits for its answer.
    pub fn ask(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let request =
            json!({"jsonrpc": "2.0", "id": self.last_id, "method": method, "params": params});
        self.write(format!("{request}\n").as_bytes());
        let answer = self.answer();
        assert_eq!(answer["id"], self.last_id, "{answer}");
        answer
    }

    /// The result of a request.
    pub fn result(&mut self, method: &str, params: Value) -> Value {
        let answer = self.ask(method, params);
        answer.get("result").cloned().unwrap_or_else(|| panic!("{answer}"))
    }

    /// Begins a deploy, and returns its result.
    pub fn deploy(&mut self, deckies: &[&str]) -> Value {
        self.result("begin", json!({"operation": "deploy", "deckies": deckies}))
    }

    /// Closes stdin, and returns the exit code.
    pub fn close(&mut self) -> Option<i32> {
        drop(self.stdin.take());
        self.pipe.wait(TIMEOUT).code()
    }

    /// The most memory that it has had, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pipe.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
