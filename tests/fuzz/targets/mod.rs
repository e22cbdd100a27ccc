//! What the fuzz targets run, compiled into the library as `decnet_heartbeat::fuzzing`: for each a function that takes what others have written, does with it what
//! the program does, and asserts what must hold. Built for them alone (`--cfg fuzzing`); all on one thread.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a target that cannot go on has found something"
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

/// What separates the parts of an input: no text file and no HTTP head has one.
const SEPARATOR: u8 = 0;

/// Characters of an error or a detail at the most: a few texts of [`crate::limits::LOG_TEXT`], all of it escaped.
const SAID: usize = 4_096;

/// The parts of an input; the last one is all of the rest.
fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == SEPARATOR);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// What is said of foreign text stays on its line, hides nothing, and ends.
#[track_caller]
pub(crate) fn assert_sayable(text: &str) {
    assert_eq!(sanitize_within(text, SAID), text.trim());
}

/// A folder of this process, made once. Whoever runs the targets says where by `TMPDIR`, and removes it.
fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let path =
            std::env::temp_dir().join(format!("decnet-heartbeat-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    })
}
