//! The helpers of all test programs. A test program includes them with
//! `#[path = "../support/mod.rs"] mod support;`, and allows `dead_code` and `unused_imports` there,
//! because no program uses all of them.

#[cfg(feature = "cli")]
mod agent;
pub mod commands;
mod docker;
mod fixture;
mod log;
mod loopback;
mod openssl;
mod own_process;
pub mod proc_status;
mod process;
#[cfg(feature = "cli")]
mod program;
mod raw_master;
mod requests;
#[cfg(feature = "cli")]
pub mod signals;
mod stats;
mod terminal;
mod wait;

use std::time::Duration;

#[cfg(feature = "cli")]
pub use agent::Agent;
pub use commands::lines;
pub use docker::{json_answer, start_docker, start_docker_with};
pub use fixture::{Fixture, blocking_source, json_of, now};
pub use log::{errors_containing, record_errors, take_errors_containing};
pub use loopback::{Loopback, nothing_deployed};
pub use openssl::OpenSsl;
pub use own_process::run_in_own_process;
pub use process::{ChildProcess, in_shell_after, make_fifo, send_signal, wait_for_line};
#[cfg(feature = "cli")]
pub use program::program;
pub use raw_master::RawMaster;
pub use requests::{deckies, deltas};
pub use stats::wait_for_stats;
pub use terminal::Terminal;
pub use wait::{poll_until, wait_for_file, wait_for_text};

/// Longer than any step of a test takes. Reaching it is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(20);
