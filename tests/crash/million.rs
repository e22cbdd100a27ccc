//! `million`: pushes that nobody hears. The memory stays flat, the bounds hold, the books balance, the beat goes on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{LoopbackMaster, Received};
use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation, OutboxLocation, Snapshot};
use serde_json::json;

use crate::Options;
use crate::child::{PUSHERS, push};

/// What the outbox holds at the most.
const ROWS: u64 = 10_000;

/// Longer than anything takes; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

const INTERVAL: Duration = Duration::from_millis(500);

/// Between two beats that fail: an interval, a delta's patience, and what a busy machine adds.
const LATE: Duration = Duration::from_millis(2_500);

/// What a flat memory may vary by.
const FLAT_KB: u64 = 4 * 1024;

/// The file and its log: the rows take about 2 MB, and SQLite checkpoints a log of 4 MB.
const FILE_BYTES: u64 = 16 * 1024 * 1024;

pub fn million(options: &Options) -> String {
    let folder = scratch();
    let path = folder.path().join("heartbeat.db");
    let mut master = LoopbackMaster::start().unwrap();
    let worker = master.enrol(&folder.path().join("agent")).unwrap();
    let heartbeat = Heartbeat::builder()
        .enrolment(worker.enrolment().unwrap())
        .status_source(|| Snapshot::new(&json!({"deployed": false, "deckies": []})))
        .outbox(OutboxLocation::File(path.clone()))
        .interval(INTERVAL)
        .start()
        .unwrap();
    assert!(master.wait_for_beats(1, PATIENCE));
    master.stop();

    let each = options.pushes / PUSHERS;
    let watched = thread::scope(|scope| {
        let pushing: Vec<_> = (0..PUSHERS)
            .map(|pusher| {
                scope.spawn({
                    let deltas = heartbeat.deltas();
                    move || (0..each).for_each(|n| assert!(push(&deltas, &delta(pusher, n))))
                })
            })
            .collect();
        watch(&heartbeat, &path, || pushing.iter().all(thread::ScopedJoinHandle::is_finished))
    });
    let pushes = u64::from(each * PUSHERS);
    // The books are as of the last look: one more beat.
    heartbeat.beats().recv_timeout(PATIENCE).unwrap();
    let stats = heartbeat.stats();
    assert_eq!((stats.waiting, stats.dropped), (ROWS.min(pushes), pushes.saturating_sub(ROWS)));
    assert_eq!(
        (stats.delivered, stats.rejected, stats.outbox.as_deref()),
        (0, 0, Some(path.as_path()))
    );
    watched.check();

    master.start_again().unwrap();
    while heartbeat.stats().waiting > 0 {
        heartbeat.beats().recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(heartbeat.stats().delivered, ROWS.min(pushes));
    heartbeat.stop(PATIENCE);
    check_newest(&master.received(), each);
    format!(
        "{pushes} pushes, {} dropped, memory {:+} kB, file at most {} kB, beats at most {} ms apart",
        stats.dropped,
        watched.grown_kb(),
        watched.file / 1024,
        watched.gap.as_millis()
    )
}

/// In memory, where there is such a folder: a million times waiting for the disk shows nothing.
fn scratch() -> tempfile::TempDir {
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

/// What was seen while the pushes went on.
#[derive(Debug, Default)]
struct Watched {
    /// Anonymous memory, from when the outbox was full for the first time.
    memory_kb: Vec<u64>,
    /// The largest size of the file and its log.
    file: u64,
    /// The longest time between two beats.
    gap: Duration,
    beats: u64,
}

impl Watched {
    fn grown_kb(&self) -> i64 {
        let most = self.memory_kb.iter().max().copied().unwrap_or_default();
        most as i64 - self.memory_kb.first().copied().unwrap_or_default() as i64
    }

    fn check(&self) {
        assert!(self.grown_kb() <= FLAT_KB as i64, "the memory grows: {:?} kB", self.memory_kb);
        assert!(self.file <= FILE_BYTES, "the file grows: {} bytes", self.file);
        assert!(self.gap <= LATE, "a beat was late: {:?}", self.gap);
        assert!(self.beats > 0, "no beat while pushing");
    }
}

/// After each beat, until `done`.
fn watch(heartbeat: &Heartbeat, path: &PathBuf, done: impl Fn() -> bool) -> Watched {
    let (beats, mut watched, mut last) = (heartbeat.beats(), Watched::default(), Instant::now());
    let log = path.with_extension("db-wal");
    while !done() {
        beats.recv_timeout(PATIENCE).unwrap();
        watched.gap = watched.gap.max(last.elapsed());
        (watched.beats, last) = (watched.beats + 1, Instant::now());
        let stats = heartbeat.stats();
        assert!(stats.waiting <= ROWS, "{} deltas wait", stats.waiting);
        if stats.dropped > 0 {
            watched.memory_kb.push(anonymous_kb());
        }
        let size = |path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        watched.file = watched.file.max(size(path) + size(&log));
    }
    watched
}

fn anonymous_kb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Of each thread's pushes the last ones have come, and in each body the newest first.
fn check_newest(received: &[Received], each: u32) {
    let mut came: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for request in received.iter().filter(|request| request.status == Some(204)) {
        let json = request.json.as_ref().unwrap();
        let lifecycle = json["lifecycle"].as_array().cloned().unwrap_or_default();
        assert!(lifecycle.len() <= 500, "{} deltas in a body", lifecycle.len());
        for delta in lifecycle {
            let name = delta["decky_name"].as_str().unwrap();
            let [_, pusher, n] = name.split('-').collect::<Vec<_>>()[..] else { panic!("{name}") };
            came.entry(pusher.parse().unwrap()).or_default().push(n.parse().unwrap());
        }
    }
    for (pusher, numbers) in came {
        let newest_first: Vec<u32> = (0..each).rev().take(numbers.len()).collect();
        assert!(
            numbers == newest_first,
            "of pusher {pusher} not the newest, or not in their order"
        );
    }
}
