//! The peers that these tests run: the real master, in Python, and a Docker Engine of their own; and small file systems.

pub mod docker;
mod frozen;
mod log;
mod loopback;
pub mod master;
pub mod process;
mod stage;
#[path = "../../support/stats.rs"]
mod stats;
mod tmpfs;

pub use docker::Docker;
pub use frozen::Freezable;
pub use log::errors;
pub use loopback::Loopback;
pub use master::RealMaster;
pub use stage::{Stage, beat};
pub use stats::wait_for_stats as settled;
pub use tmpfs::Tmpfs;

use std::path::{Path, PathBuf};

/// The Python that has the real master.
pub fn python() -> PathBuf {
    let python = python_path();
    assert!(
        python.exists(),
        "{} is not there: run tests/e2e/setup.sh, or set DECNET_PYTHON",
        python.display()
    );
    python
}

/// Where it is, if it is there.
pub fn python_path() -> PathBuf {
    match std::env::var_os("DECNET_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/decnet-venv/bin/python"),
    }
}
