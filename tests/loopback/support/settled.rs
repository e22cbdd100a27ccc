//! Waiting for a heartbeat's stats; both test binaries do.

use std::time::{Duration, Instant};

use decnet_heartbeat::{Heartbeat, Stats};

/// Longer than any test waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the stats are as `done` wants them. They change just after the master has answered, which no event of
/// the master's shows; some change without a beat, so it looks now and then as well.
pub fn settled(heartbeat: &Heartbeat, done: impl Fn(&Stats) -> bool) -> Stats {
    let (beats, end) = (heartbeat.beats(), Instant::now() + PATIENCE);
    loop {
        let stats = heartbeat.stats();
        if done(&stats) {
            return stats;
        }
        assert!(Instant::now() < end, "{stats:?}");
        let _ = beats.recv_timeout(Duration::from_millis(20));
    }
}
