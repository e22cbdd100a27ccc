//! `million`: pushes without a master. The memory does not grow, the limits of the outbox hold, the
//! stats are correct, and the beats continue.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{LoopbackMaster, Received};
use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation, OutboxLocation};

use crate::Options;
use crate::child::{PUSHERS, push};
use crate::crash_test::TIMEOUT;
use crate::support::proc_status::status_number;
use crate::support::{deckies, nothing_deployed};

/// The capacity of the outbox.
const CAPACITY: u64 = 10_000;

const INTERVAL: Duration = Duration::from_millis(500);

/// The longest time between two beats that fail: an interval, the wait of a delta for a snapshot,
/// and the delay of a busy machine.
const MAX_GAP: Duration = Duration::from_millis(2_500);

/// How much the memory may vary.
const MEMORY_KB: u64 = 4 * 1024;

/// The maximum size of the file and its log. The rows take about 2 MB, and SQLite checkpoints a log
/// of 4 MB.
const FILE_BYTES: u64 = 16 * 1024 * 1024;

pub fn million(options: &Options) -> String {
    let folder = temporary_folder();
    let path = folder.path().join("heartbeat.db");
    let mut master = LoopbackMaster::start().unwrap();
    let worker = master.enrol(&folder.path().join("agent")).unwrap();
    let heartbeat = Heartbeat::builder()
        .enrolment(worker.enrolment().unwrap())
        .status_source(nothing_deployed)
        .outbox(OutboxLocation::File(path.clone()))
        .interval(INTERVAL)
        .start()
        .unwrap();
    assert!(master.wait_for_beats(1, TIMEOUT));
    master.stop();

    let pushes_per_thread = options.pushes / PUSHERS;
    let figures = thread::scope(|scope| {
        let pushing: Vec<_> = (0..PUSHERS)
            .map(|pusher| {
                scope.spawn({
                    let deltas = heartbeat.deltas();
                    move || {
                        (0..pushes_per_thread)
                            .for_each(|n| assert!(push(&deltas, &delta(pusher, n))));
                    }
                })
            })
            .collect();
        measure(&heartbeat, &path, || pushing.iter().all(thread::ScopedJoinHandle::is_finished))
    });
    let pushes = u64::from(pushes_per_thread * PUSHERS);
    // The stats change with a beat.
    heartbeat.beats().recv_timeout(TIMEOUT).unwrap();
    let stats = heartbeat.stats();
    assert_eq!(
        (stats.waiting, stats.dropped),
        (CAPACITY.min(pushes), pushes.saturating_sub(CAPACITY))
    );
    assert_eq!(
        (stats.delivered, stats.rejected, stats.outbox.as_deref()),
        (0, 0, Some(path.as_path()))
    );
    figures.check();

    master.start_again().unwrap();
    while heartbeat.stats().waiting > 0 {
        heartbeat.beats().recv_timeout(TIMEOUT).unwrap();
    }
    assert_eq!(heartbeat.stats().delivered, CAPACITY.min(pushes));
    heartbeat.stop(TIMEOUT);
    assert_newest_first(&master.received(), pushes_per_thread);
    format!(
        "{pushes} pushes, {} dropped, memory {:+} kB, file at most {} kB, beats at most {} ms apart",
        stats.dropped,
        figures.grown_kb(),
        figures.file_bytes / 1024,
        figures.gap.as_millis()
    )
}

/// A folder in memory, if possible. A million waits for the disk would take long and test nothing.
fn temporary_folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

fn delta(pusher: u32, n: u32) -> LifecycleDelta {
    LifecycleDelta::failed(format!("d-{pusher}-{n}"), Operation::Mutate, "compose exited with 1")
}

/// Figures during the pushes.
#[derive(Debug, Default)]
struct Figures {
    /// The anonymous memory after each beat, since the outbox was full.
    memory_kb: Vec<u64>,
    /// The largest size of the file and its log.
    file_bytes: u64,
    /// The longest time between two beats.
    gap: Duration,
    beats: u64,
}

impl Figures {
    fn grown_kb(&self) -> i64 {
        let most = self.memory_kb.iter().max().copied().unwrap_or_default();
        most as i64 - self.memory_kb.first().copied().unwrap_or_default() as i64
    }

    fn check(&self) {
        assert!(self.grown_kb() <= MEMORY_KB as i64, "the memory grows: {:?} kB", self.memory_kb);
        assert!(self.file_bytes <= FILE_BYTES, "the file grows: {} bytes", self.file_bytes);
        assert!(self.gap <= MAX_GAP, "a beat was late: {:?}", self.gap);
        assert!(self.beats > 0, "no beat while pushing");
    }
}

/// Measures after each beat, until `is_done`.
fn measure(heartbeat: &Heartbeat, path: &PathBuf, is_done: impl Fn() -> bool) -> Figures {
    let beats = heartbeat.beats();
    let mut figures = Figures::default();
    let mut last = Instant::now();
    let log = path.with_extension("db-wal");
    while !is_done() {
        beats.recv_timeout(TIMEOUT).unwrap();
        figures.gap = figures.gap.max(last.elapsed());
        figures.beats += 1;
        last = Instant::now();
        let stats = heartbeat.stats();
        assert!(stats.waiting <= CAPACITY, "{} deltas wait", stats.waiting);
        if stats.dropped > 0 {
            figures.memory_kb.push(status_number(std::process::id(), "RssAnon"));
        }
        let size = |path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        figures.file_bytes = figures.file_bytes.max(size(path) + size(&log));
    }
    figures
}

/// Asserts that the last pushes of each thread were received, the newest first.
fn assert_newest_first(received: &[Received], pushes_per_thread: u32) {
    let mut numbers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for request in received.iter().filter(|request| request.status == Some(204)) {
        let deckies = deckies(request);
        assert!(deckies.len() <= 500, "{} deltas in a body", deckies.len());
        for name in deckies {
            let [_, pusher, n] = name.split('-').collect::<Vec<_>>()[..] else { panic!("{name}") };
            numbers.entry(pusher.parse().unwrap()).or_default().push(n.parse().unwrap());
        }
    }
    for (pusher, numbers) in numbers {
        let expected: Vec<u32> = (0..pushes_per_thread).rev().take(numbers.len()).collect();
        assert!(numbers == expected, "thread {pusher}: not the newest deltas, or in another order");
    }
}
