//! The functions of the fuzz targets, compiled into the library as `decnet_heartbeat::fuzzing`.
//! Each takes bytes of another program, processes them as the library does, and asserts invariants.
//! They are built only with `--cfg fuzzing`, and run on one thread.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a target that panics has found an error"
)]

mod answers;
mod bundle;
mod ini;
mod outbox;
mod state;

#[cfg(not(feature = "cli"))]
pub use crate::cli::pipe::fuzz::pipe;
pub use answers::{docker_http, docker_json, master, retry_after};
pub use bundle::bundle;
pub use ini::ini;
pub use outbox::{outbox_file, outbox_rows};
pub use state::state_file;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::text::sanitize_within;

/// The separator of the parts of an input. Neither a text file nor an HTTP head contains it.
const SEPARATOR: u8 = 0;

/// The maximum number of characters in an error or a detail: a few texts of
/// [`crate::limits::LOG_TEXT`], all escaped.
const MESSAGE: usize = 4_096;

/// The parts of an input. The last one is the rest.
fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == SEPARATOR);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Asserts that a text is on one line, has no control character, and is not too long.
#[track_caller]
pub(crate) fn assert_sanitized(text: &str) {
    assert_eq!(sanitize_within(text, MESSAGE), text.trim());
}

/// A folder of this process. The caller sets `TMPDIR`, and removes the folder.
fn temporary_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let path =
            std::env::temp_dir().join(format!("decnet-heartbeat-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    })
}
