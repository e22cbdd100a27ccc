//! Real peers for the tests and the benchmark: the real master, in Python, and a Docker Engine. And
//! small file systems that can be full, read-only or frozen.

pub mod docker;
mod enrolled_host;
mod freezable_disk;
pub mod master;
#[path = "../../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "no test program uses all helpers")]
mod shared;
mod tmpfs;

pub use docker::Docker;
pub use enrolled_host::{EnrolledHost, decky, send_tick, write_state_file};
pub use freezable_disk::FreezableDisk;
pub use master::RealMaster;
pub use shared::{ChildProcess, Loopback, commands, nothing_deployed, wait_for_stats};
pub use tmpfs::Tmpfs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use decnet_heartbeat::{LifecycleDelta, Operation};

/// Longer than any step of a test takes. Reaching it is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// The errors with a file of this folder that were logged since the last call. The first call starts
/// the recording. Other tests log at the same time, and have other folders.
pub fn logged_errors(folder: &Path) -> Vec<String> {
    shared::record_errors();
    shared::take_errors_containing(folder.to_str().unwrap())
}

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
