//! Waits for states that no event reports: files, and the state of other processes.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::TIMEOUT;

/// The time between two polls.
const POLL: Duration = Duration::from_millis(5);

/// Polls until `is_done` returns true. `what` names the state in a failure.
pub fn poll_until(what: &str, mut is_done: impl FnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !is_done() {
        assert!(Instant::now() < end, "{what}: not within {TIMEOUT:?}");
        thread::sleep(POLL);
    }
}

/// Waits until the file exists.
pub fn wait_for_file(path: impl AsRef<Path>) {
    let path = path.as_ref();
    poll_until(&format!("{} exists", path.display()), || path.exists());
}

/// Waits until the file contains this text. Returns the content.
pub fn wait_for_text(path: &Path, part: &str) -> String {
    let mut text = String::new();
    poll_until(&format!("{} contains {part:?}", path.display()), || {
        text = fs::read_to_string(path).unwrap_or_default();
        text.contains(part)
    });
    text
}
