//! The program `decnet-heartbeat`.

use std::process::{Command, Stdio};

use super::{Fixture, signals};

/// The program with an empty environment.
pub fn program() -> Command {
    signals::reset_ignored_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_decnet-heartbeat"));
    command.env_clear().env("HOME", "/nonexistent");
    command
}

impl Fixture {
    /// The program with the worker's ini, which this writes, and these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.write_ini();
        let mut command = program();
        command.env("PATH", std::env::var_os("PATH").unwrap()).stdin(Stdio::null());
        command.arg("--config").arg(self.ini()).args(arguments);
        command
    }

    /// `run` with the worker's ini, and with a state file and a Docker socket that do not exist.
    /// Its stderr is piped.
    pub fn run_command(&self) -> Command {
        self.write_ini();
        let mut command = program();
        command.arg("--config").arg(self.ini()).arg("run");
        command.arg("--state-file").arg(self.path("state"));
        command.arg("--docker-socket").arg(self.path("docker.sock"));
        command.stderr(Stdio::piped());
        command
    }
}
