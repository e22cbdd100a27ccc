//! Signals as a program usually finds them.

use std::sync::{Arc, Once};

use signal_hook::consts::{FORBIDDEN, SIGPIPE};
use signal_hook::flag;

/// What these tests start has no signal ignored, also where they run under `nohup` or in a shell's background: a signal that
/// this process handles has its default action in its children.
pub fn none_is_ignored() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
        // PIPE is Rust's own.
        let ignored =
            (1..=64).filter(|signal| ignored & 1 << (signal - 1) != 0 && *signal != SIGPIPE);
        for signal in ignored.filter(|signal| !FORBIDDEN.contains(signal)) {
            // The C library keeps some for itself.
            let _ = flag::register(signal, Arc::default());
        }
    });
}
