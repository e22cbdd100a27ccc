//! Real peers for the tests and the benchmark: the real master, in Python, and a Docker Engine. And
//! small file systems that can be full, read-only or frozen.

#[path = "../../support/commands.rs"]
pub mod commands;
pub mod docker;
mod enrolled_host;
mod freezable_disk;
mod log;
#[path = "../../support/loopback.rs"]
mod loopback;
pub mod master;
#[path = "../../support/requests.rs"]
mod requests;
#[path = "../../support/stats.rs"]
mod stats;
mod tmpfs;

pub use docker::Docker;
pub use enrolled_host::{EnrolledHost, decky, send_tick, write_state_file};
pub use freezable_disk::FreezableDisk;
pub use log::logged_errors;
pub use loopback::{Loopback, nothing_deployed};
pub use master::RealMaster;
pub use stats::wait_for_stats;
pub use tmpfs::Tmpfs;

use std::path::{Path, PathBuf};

use decnet_heartbeat::{LifecycleDelta, Operation};

/// A delta of a successful deploy.
pub fn deployed(decky: impl Into<String>) -> LifecycleDelta {
    LifecycleDelta::succeeded(decky, Operation::Deploy)
}

/// The Python interpreter whose packages include the real master.
pub fn python() -> PathBuf {
    let python = python_path();
    assert!(
        python.exists(),
        "{} does not exist: run tests/e2e/setup.sh, or set DECNET_PYTHON",
        python.display()
    );
    python
}

/// Its path, whether it exists or not.
pub fn python_path() -> PathBuf {
    match std::env::var_os("DECNET_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/decnet-venv/bin/python"),
    }
}
