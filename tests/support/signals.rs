//! The signal actions that child processes inherit.

use std::sync::{Arc, Once};

use signal_hook::consts::{FORBIDDEN, SIGPIPE};
use signal_hook::flag;

/// Child processes start with no signal ignored, also if the tests run under `nohup` or in a
/// shell's background. A signal that this process handles has its default action in its children.
pub fn reset_ignored_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        // Rust's runtime ignores SIGPIPE, and resets it in children.
        let ignored =
            (1..=64).filter(|signal| ignored & 1 << (signal - 1) != 0 && *signal != SIGPIPE);
        for signal in ignored.filter(|signal| !FORBIDDEN.contains(signal)) {
            // An error: the C library reserves a few signals.
            let _ = flag::register(signal, Arc::default());
        }
    });
}
