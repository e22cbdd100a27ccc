//! Waits for the stats of a heartbeat.

use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, Stats};

/// Longer than any test waits.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until `is_done` returns true for the stats, and returns them. The stats change after the
/// end of a beat, which `beats` reports. Some change without a beat, so they are polled, too.
pub fn wait_for_stats(heartbeat: &Heartbeat, is_done: impl Fn(&Stats) -> bool) -> Stats {
    let beats = heartbeat.beats();
    let end = Instant::now() + TIMEOUT;
    loop {
        let stats = heartbeat.stats();
        if is_done(&stats) {
            return stats;
        }
        assert!(Instant::now() < end, "{stats:?}");
        let _ = beats.recv_timeout(Duration::from_millis(20));
    }
}
