//! What the tests against real peers share.

use std::path::PathBuf;

/// The Python interpreter of a virtual environment with `decnet` 1.0.0: `DECNET_PYTHON`, or the one that
/// `tests/real/setup.sh` makes.
pub fn python() -> PathBuf {
    if let Some(path) = std::env::var_os("DECNET_PYTHON") {
        return PathBuf::from(path);
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/decnet-venv/bin/python");
    assert!(path.exists(), "{} does not exist: run tests/real/setup.sh, or set DECNET_PYTHON", path.display());
    path
}
