//! `kill` and `faults`: children that are killed one after another, with one agent dir.

use std::time::Duration;

use decnet_heartbeat::loopback::{Answer, Effect, Fault};

use crate::Options;
use crate::crash_test::{CrashTest, pause};

/// Children are killed while the master is stopped and started.
pub fn kill(options: &Options) -> String {
    let mut test = CrashTest::new();
    for run in 1..=options.kills {
        let child = test.start_child(run);
        // Some are killed before or while they open the outbox and recover it, the others while
        // they work.
        let is_early = fastrand::u8(..6) == 0;
        let lifetime = if is_early { fastrand::u64(..30) } else { 30 + fastrand::u64(..250) };
        for _ in 0..2 {
            pause(Duration::from_millis(lifetime / 2));
            test.maybe_stop_or_start_master();
        }
        test.kill(child);
    }
    test.finish()
}

/// Children are killed while the master fails during requests.
pub fn faults(options: &Options) -> String {
    let mut test = CrashTest::new();
    for run in 1..=options.fifth_of_kills() {
        let is_first = run == 1;
        let mut script: Vec<Fault> = std::iter::repeat_with(random_fault).take(40).collect();
        if is_first {
            // Only once, because it takes a second: the timeout of an answer with this interval.
            script.insert(3, Fault::NeverAnswer(Effect::Applied));
        }
        test.master.script(script);
        let child = test.start_child(run);
        let lifetime = if is_first { 3_000 } else { 100 + fastrand::u64(..900) };
        pause(Duration::from_millis(lifetime));
        test.kill(child);
    }
    test.finish()
}

/// A random fault, or none.
fn random_fault() -> Fault {
    match fastrand::u8(..12) {
        0 => Fault::CutBeforeHandshake,
        1 => Fault::CutBeforeRequest,
        2 => Fault::CutInBody,
        3 => Fault::CutAfterBody(Effect::Lost),
        4 => Fault::CutAfterBody(Effect::Applied),
        5 => Fault::CutAfterAnswer,
        6 => Answer::status(500).body("Internal Server Error").into(),
        // Rarely, because it takes at least a second.
        7 if fastrand::u8(..4) == 0 => Answer::status(503).header("Retry-After", "1").into(),
        7 => Fault::Raw(b"HTTP/1.1 2".to_vec()),
        _ => Fault::Serve,
    }
}
